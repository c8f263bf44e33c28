"""Pages from the templates that lie beside the code that fills them in: HTML, Markdown, SVG."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from mteditflow.config.settings import MIN_SESSIONS
from mteditflow.record.figures import figure, fixed, format_interval, format_number
from mteditflow.record.files import replace_file


def write_page(template: str, values: Mapping[str, Any], path: Path) -> Path:
    """Fill in a template, and write the page whole or not at all; return its path."""
    replace_file(path, fill_in(template, values).encode())
    return path


def fill_in(template: str, values: Mapping[str, Any]) -> str:
    """Return the page of a template, named by its path in the package."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    """Make the environment of every page; a name that the values do not have is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent)
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(("html.jinja", "svg.jinja")),
    )  # fmt: skip
    environment.globals.update(
        figure=figure,
        fixed=fixed,
        min_sessions=MIN_SESSIONS,
        format_interval=format_interval,
        format_number=format_number,
    )
    return environment
