"""What the pages have in common: one file each that asks for nothing, escaped texts, and a whole file or none."""

from __future__ import annotations

from pathlib import Path

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


def write_page(page: str, path: Path) -> None:
    """Write a page; whoever reads it meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)
