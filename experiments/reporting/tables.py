"""Tables for a terminal, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table


def percent(mean: float, error: float | None) -> str:
    """An accuracy with its standard error, in percent."""
    return f"{100 * mean:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


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
