"""Where a positive factor for every channel can stand: between what writes a value and what reads it.

Scaling the channels of a value by ``s`` changes nothing where everything that writes it takes ``s`` into its
weights, everything that reads it takes ``1/s``, and all that lies between is positively homogeneous,
``f(s x) = s f(x)``. An axis (:mod:`graphprune.axes`) says which positions of which tensors belong
together; a *segment* is one stretch of an axis between such writers and readers. A depthwise convolution
both reads and writes: its axis goes on as another segment with factors of its own.
"""

from __future__ import annotations

from .members import Member, cast
from .segments import Segment, refusals, segments

__all__ = ["Member", "Segment", "cast", "refusals", "segments"]
