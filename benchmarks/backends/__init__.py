"""Backends against each other, on this host and for others."""
