"""From the user's model to a graph: where it is found, what it is called with, and how it is captured.

:mod:`~graphprune.frontend.sources` finds a model by its text, :mod:`~graphprune.frontend.inputs` its example
inputs, :mod:`~graphprune.frontend.capture` makes the :class:`~graphprune.graph.Graph`.
"""
