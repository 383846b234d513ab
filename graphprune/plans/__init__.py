"""Removing positions of axes: what may go, what does, and the smaller network that is left.

:mod:`~graphprune.plans.candidates` are the queue of what may go, :mod:`~graphprune.plans.budget` takes from
it what a budget asks for, as a :class:`~graphprune.plans.plan.Plan`; :mod:`~graphprune.plans.rewrite` makes
the smaller graph of a plan, :mod:`~graphprune.plans.masking` the original with zeros to compare it with.
"""
