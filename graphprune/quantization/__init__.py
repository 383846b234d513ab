"""Numbers as integers: scales and zero points, what to take them from, and how weights are rounded."""
