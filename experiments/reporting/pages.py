"""Renders the templates of the reports."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_TEMPLATES.filters["base64"] = lambda content: base64.b64encode(content).decode()


def render(template: str, **content: Any) -> str:
    """The text of a report.

    Args:
      template: the name of a file in `templates/`; in HTML all values are escaped.
      **content: the values that the template shows. The filter ``base64`` embeds bytes.

    Raises:
      jinja2.UndefinedError: the template needs a value that is missing.
    """
    return _TEMPLATES.get_template(template).render(content)
