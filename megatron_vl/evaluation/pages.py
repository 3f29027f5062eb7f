"""What the pages have in common: one file each that asks for nothing, and escaped texts."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def page_environment() -> Environment:
    """The template engine of the pages: every text is escaped but our own ``svg``; an undefined name is an error."""
    environment = Environment(
        loader=PackageLoader("megatron_vl.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment
