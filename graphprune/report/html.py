"""A report as one HTML page: no scripts, no fonts, nothing fetched from anywhere."""

from __future__ import annotations

from pathlib import Path

import jinja2

from .sections import sections
from .values import Report


def render(report: Report) -> str:
    """The page as text. Everything that comes from the model is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(report=report, sections=list(sections(report, full=True)))
