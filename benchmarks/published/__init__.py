"""Comparisons with figures that others published, run again here."""
