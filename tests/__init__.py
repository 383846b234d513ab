"""The tests; a package so that `tests.zoo` can be imported by tests, benchmarks and examples alike."""
