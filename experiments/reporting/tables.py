"""Tables for a terminal, and numbers as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

Form = Callable[[float], str]


def percent(mean: float, error: float | None = None) -> str:
    """A share in percent, with two decimals.

    Args:
      mean: the share, between 0 and 1.
      error: its standard error, if there is one.

    Example:
      >>> percent(0.95, 0.004)
      '95.00 ± 0.40'
    """
    return f"{100 * mean:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def count(value: float) -> str:
    """A mean number of things: whole from 10 on, otherwise with three digits.

    Args:
      value: the number.

    Example:
      >>> count(1234.5), count(2.345)
      ('1,234', '2.35')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def short(value: float) -> str:
    """A number with three digits, or all digits before the point if these are more.

    Args:
      value: the number.

    Example:
      >>> short(1234.5), short(2.0)
      ('1234', '2.00')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def quartiles(values: Sequence[float], form: Form, median_form: Form | None = None) -> str:
    """A median with its quartiles in brackets.

    Args:
      values: the lower quartile, the median and the upper quartile.
      form: formats the quartiles.
      median_form: formats the median; by default in the form of the quartiles.

    Example:
      >>> quartiles([1.0, 1.5, 2.25], "{:.2f}".format)
      '1.50 (1.00–2.25)'
    """
    low, median, high = values
    return f"{(median_form or form)(median)} ({form(low)}–{form(high)})"


def mean_and_deviation(values: Sequence[float], form: Form) -> str:
    """The mean and standard deviation of the finite values.

    Args:
      values: one value for each seed; not finite for a seed that diverged.
      form: formats the mean and the deviation.

    Example:
      >>> mean_and_deviation([0.25, 0.75, float("inf")], "{:.2f}".format)
      '0.50 ± 0.35 (1 diverged)'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged"
    text = form(statistics.fmean(finite))
    if len(finite) > 1:
        text += f" ± {form(statistics.stdev(finite))}"
    return text + (f" ({len(values) - len(finite)} diverged)" if len(finite) < len(values) else "")


def plain(view: Table) -> tuple[list[str], list[list[str]]]:
    """The column names and the rows of a table as plain text.

    >>> view = table(["way", "ms"])
    >>> view.add_row("whole", "1.5")
    >>> plain(view)
    (['way', 'ms'], [['whole', '1.5']])

    Args:
      view: the table.
    """
    names = [" ".join(str(column.header).split()) for column in view.columns]
    columns = [[" ".join(str(cell).split()) for cell in column.cells] for column in view.columns]
    return names, [list(row) for row in zip(*columns, strict=True)]


def table(
    columns: Sequence[str], title: str | None = None, *, left: int = 1, wrap: bool = False
) -> Table:
    """A table without rows, in the format of all commands.

    Args:
      columns: the column names.
      title: the line above the table.
      left: number of leading columns that are left-aligned; the others hold numbers.
      wrap: whether a cell that is too wide is wrapped; otherwise it is cut off.

    Returns:
      The table; fill it with its `add_row`.
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
