"""What structured pruning shows in figures: coverage, speed, half-size networks, language-model shapes."""
