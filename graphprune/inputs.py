"""Example inputs for a model that was given none."""

from __future__ import annotations
