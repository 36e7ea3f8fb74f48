"""What one step computes and in which order: host integers, and those integers on the device. Knows no layer."""
