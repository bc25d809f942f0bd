"""The comparison of eigensolvers as a table, and its medians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from experiments.reporting import tables

COLUMNS = (
    *("name", "setting", "products", "milliseconds", "ratio", "cpu_milliseconds", "cpu_ratio"),
    *("error", "compile_seconds"),
)


def table(rows: Sequence[dict[str, Any]], product_milliseconds: float) -> Table:
    """Medians, with quartiles in brackets.

    Args:
      rows: one row per solver, as `experiments.training.studies.eigensolvers.measure` returns them.
      product_milliseconds: time of one product; the table shows what share of a solver's time is
        spent outside its products.
    """
    columns = ["solver", "setting", "products", "milliseconds", "outside products", "to lanczos"]
    view = tables.table([*columns, "CPU", "error", "compile"], left=2, wrap=True)
    for row in rows:
        if "milliseconds" not in row:
            view.add_row(row["name"], row["note"])
            continue
        median = row["milliseconds"][1]
        share = max(0.0, 1 - row["products"] * product_milliseconds / median)
        seconds = row["compile_seconds"]
        view.add_row(
            row["name"],
            row["setting"],
            f"{row['products']:.1f}".removesuffix(".0"),
            tables.quartiles(row["milliseconds"], "{:.0f}".format),
            f"{100 * share:.0f} %",
            f"{row['ratio'][1]:.2f}",
            f"{row['cpu_ratio'][1]:.2f}",
            f"{row['error']:.0e}",
            "" if seconds is None else f"{seconds:.1f} s",
        )
    return view


def density_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Medians of time, with quartiles in brackets, and of the error.

    Args:
      rows: one row per program, as `experiments.training.studies.densities.measure` returns them.
    """
    columns = ["spectral density", "products", "milliseconds", "to ours", "CPU", "error", "compile"]
    view = tables.table(columns, left=1, wrap=True)
    for row in rows:
        if "milliseconds" not in row:
            view.add_row(f"{row['name']}: {row['note']}")
            continue
        seconds = row["compile_seconds"]
        view.add_row(
            row["name"],
            str(row["products"]),
            tables.quartiles(row["milliseconds"], "{:.0f}".format),
            f"{row['ratio'][1]:.2f}",
            f"{row['cpu_ratio'][1]:.2f}",
            f"{row['error']:.4f}",
            "" if seconds is None else f"{seconds:.1f} s",
        )
    return view


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of results.csv: one per solver, with the medians of what has quartiles.

    Args:
      rows: one row per solver, as `experiments.training.studies.eigensolvers.measure` returns them.
    """
    lines = ({name: row.get(name) for name in (*COLUMNS, "note")} for row in rows)
    return [
        {name: value[1] if isinstance(value, list) else value for name, value in line.items()}
        for line in lines
    ]
