"""Quantization: what it gains in time and size, and what it keeps of a network's accuracy."""
