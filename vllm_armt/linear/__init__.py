"""Weights of all L decoder layers in one parameter, so that the rows of several layers are one product."""
