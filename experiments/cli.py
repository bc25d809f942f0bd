"""What the command lines share: options, errors and files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

T = TypeVar("T")


class UsageError(ValueError):
    """Wrong input: one line saying which value, what is allowed, how to fix it."""


def check_known(kind: str, value: str | None, valid: Sequence[str]) -> None:
    """Raises `UsageError`, listing the valid names, if a name is given and is none of them."""
    if value is not None and value not in valid:
        raise UsageError(f"unknown {kind} {value!r}; valid: {', '.join(valid)}")


def check_folder_name(name: str | None) -> None:
    """Raises `UsageError` if `--name` is a path instead of a plain folder name."""
    if name is not None and Path(name).name != name:
        raise UsageError(
            f"--name must be a plain folder name, got {name!r}; "
            "--runs-dir says where the folder is made"
        )


def parse(default: T, argv: Sequence[str] | None, prog: str) -> T:
    """Reads a command line; an unknown option's error lists the valid ones.

    Args:
      default: an instance of a dataclass with one field per option: the values of the options that
        are not given.
      argv: the arguments; ``None`` for those of the process.
      prog: the command, for messages.

    Returns:
      The options. Wrong ones end the process with exit code 2.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(default), args=argv, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code not in (0, None):
            reason = _first_paragraph(complaint.getvalue())
            fields = dataclasses.fields(default)  # type: ignore[arg-type]
            names = (f"--{field.name.replace('_', '-')}" for field in fields)
            print(f"error: {reason} Valid options: {' '.join(names)}", file=sys.stderr)
        raise


def _first_paragraph(box: str) -> str:
    """What is wrong, in one line, from the box that Tyro draws: a title, what is wrong, help."""
    lines = (line.strip("│| ") for line in box.splitlines())

    def is_gap(line: str) -> bool:  # an empty line or a rule
        return not line.strip("─-")

    text = itertools.dropwhile(is_gap, lines)
    next(text, None)  # the title
    return " ".join(
        itertools.takewhile(lambda line: not is_gap(line), itertools.dropwhile(is_gap, text))
    )


def console(width: int) -> Console:
    """Where a command prints: the terminal, or that many columns in a file or a pipe."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=width)


def table(
    columns: Sequence[str], title: str | None = None, *, left: int = 1, wrap: bool = False
) -> Table:
    """A table without rows, as all commands print it.

    Args:
      columns: names.
      title: above it.
      left: number of columns, the first ones, that are aligned left: the others hold numbers.
      wrap: whether a cell for which there is no room is wrapped; else it is cut.

    Returns:
      The table, to be filled by its `add_row`.
    """
    view = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for i, column in enumerate(columns):
        justify: Any = "left" if i < left else "right"
        view.add_column(column, justify=justify, vertical="bottom", no_wrap=not wrap)
    return view


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: an interrupted run never leaves half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def to_json(value: Any) -> str:
    """Indented JSON; numbers that are not finite are refused (None stands for them)."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
