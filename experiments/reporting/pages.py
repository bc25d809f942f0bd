"""Renders the templates of the reports; makes the page of a study from what it printed."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from experiments import cli
from experiments.reporting import tables
from experiments.runs.records import PLACES, plain_options, provenance

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
# From how many characters on a cell holds a text, which is left-aligned and may be wrapped.
_LONG = 40
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


def study(
    title: str,
    command: str,
    options: Any,
    printed: Sequence[Any],
    pictures: Mapping[str, bytes] | None = None,
    template: str = "study.html",
    **content: Any,
) -> str:
    """The page of a study: what it printed, with tables that sort, its pictures and settings.

    Args:
      title: the heading.
      command: what is typed before the options.
      options: its options, a dataclass.
      printed: the texts and tables that it printed, see `experiments.cli.Printer`.
      pictures: SVG files by what they show.
      template: the name of a file in `templates/` that extends `study.html`.
      **content: the further values that it shows.
    """
    source = provenance(command, options)
    settings = [("command", source["command_line"]), *source["environment"].items()]
    settings += [("date", source["date"]), ("load", source["load"])]
    for name, value in plain_options(options).items():
        given = value is not None and value is not False and value != ""  # 0 is given: 0 == False
        if given and name not in PLACES:
            settings.append((name.replace("_", " "), value))
    return render(
        template,
        title=title,
        parts=list(_parts(printed)),
        pictures=pictures or {},
        settings=settings,
        **content,
    )


def _parts(printed: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Texts and tables as the template shows them."""
    for part in printed:
        if isinstance(part, Table):
            names, rows = tables.plain(part)
            wide = any(len(cell) > _LONG for row in rows for cell in row)
            bold = ["bold" in str(row.style) for row in part.rows]
            yield {
                "title": str(part.title or ""),
                "names": names,
                "rows": list(zip(rows, bold, strict=True)),
                "texts": wide,
            }
        elif text := str(part).strip():
            yield {"text": text}


def write_study(path: Path, title: str, command: str, options: Any, **shown: Any) -> None:
    """Writes the page of a study, and its folder where there is none.

    Args:
      path: the file.
      title: the heading.
      command: what is typed before the options.
      options: its options, a dataclass.
      **shown: `printed`, `pictures`, `template` and what it shows, as for `study`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.write_atomic(path, study(title, command, options, **shown))
