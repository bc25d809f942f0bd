"""The comparison of eigensolvers as a table and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from experiments.reporting import tables

COLUMNS = ("name", "setting", "products", "milliseconds", "ratio", "error", "compile_seconds")


def table(rows: Sequence[dict[str, Any]], product_milliseconds: float) -> Table:
    """Medians, with quartiles in brackets.

    Args:
      rows: one row per solver, as `experiments.training.eigensolvers.measure` returns them.
      product_milliseconds: time of one product; the table shows what share of a solver's time is
        spent outside its products.
    """
    columns = ["solver", "setting", "products", "milliseconds", "outside products", "to lanczos"]
    view = tables.table([*columns, "error", "compile"], left=2, wrap=True)
    for row in rows:
        if "milliseconds" not in row:
            view.add_row(row["name"], row["note"])
            continue
        low, median, high = row["milliseconds"]
        share = max(0.0, 1 - row["products"] * product_milliseconds / median)
        seconds = row["compile_seconds"]
        view.add_row(
            row["name"],
            row["setting"],
            f"{row['products']:.1f}".removesuffix(".0"),
            f"{median:.0f} ({low:.0f}–{high:.0f})",
            f"{100 * share:.0f} %",
            f"{row['ratio'][1]:.2f}",
            f"{row['error']:.0e}",
            "" if seconds is None else f"{seconds:.1f} s",
        )
    return view


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line per solver, with medians of what has quartiles.

    Args:
      rows: one row per solver, as `experiments.training.eigensolvers.measure` returns them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "note"])
    for row in rows:
        values = [row.get(name) for name in (*COLUMNS, "note")]
        writer.writerow(value[1] if isinstance(value, list) else value for value in values)
    return text.getvalue()
