"""Diagonal batching: the plan of a step, the wave over closed segments, and the rows of open ones."""
