"""Weights that are zero: which (:mod:`.patterns`), and what the others do about it (:mod:`.compensation`)."""
