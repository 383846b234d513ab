"""Axis types: every dimension of every tensor has one, and coupling is unification."""

from __future__ import annotations
