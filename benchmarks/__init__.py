"""Measurements as commands: each module prints its table and writes it under `benchmarks/results`."""
