"""What an optimisation did, what it proved and what it measured, as one value.

:class:`Report` is what ``result.report`` is: it prints as tables, turns into JSON for machines and into
one self-contained HTML page for people.
"""

from __future__ import annotations

from .values import AuditSummary, Latency, Report

__all__ = ["AuditSummary", "Latency", "Report"]
