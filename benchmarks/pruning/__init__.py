"""Pruning, repaired: what it keeps of a network's accuracy."""
