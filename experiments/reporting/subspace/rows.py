"""Selects rows of the subspace study and reads the end of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.runs.units import Rows


def pick(rows: Rows, **identity: Any) -> Rows:
    """The rows that have all these values.

    Args:
      rows: the rows to select from.
      **identity: the wanted value of each column.
    """
    return [row for row in rows if all(row[key] == value for key, value in identity.items())]


def seeds(rows: Rows) -> list[int]:
    """The seeds that occur in the rows, in ascending order."""
    return sorted({row["seed"] for row in rows})


def column(rows: Rows, key: str) -> np.ndarray:
    """One column of numbers.

    Args:
      rows: the rows to read.
      key: the name of the column.

    Returns:
      The numbers, of shape ``[rows]``; NaN where a row has no value or ``None``.
    """
    return np.array([row.get(key) for row in rows], float)


def final_loss(rows: Rows) -> float:
    """Mean training loss over the last tenth of a run's evaluations; infinite if it diverged."""
    return _final(rows, "train_loss", math.inf)


def final_accuracy(rows: Rows) -> float:
    """Mean test accuracy over the last tenth of a run's evaluations; 0 if it diverged."""
    return _final(rows, "test_accuracy", 0.0)


def _final(rows: Rows, key: str, diverged: float) -> float:
    values = column(rows, key)
    last = values[-max(1, len(values) // 10) :]
    return float(last.mean()) if len(last) and np.isfinite(last).all() else diverged


def is_stable(rows: Rows) -> bool:
    """Whether a run stayed finite and ended no higher than it began."""
    return final_loss(rows) <= rows[0]["train_loss"]


def line(rows: Rows, name: str) -> Iterator[tuple[float, Rows]]:
    """The runs on the line between two methods, including both ends.

    Args:
      rows: the rows of the panel `switch`.
      name: the line, such as ``"sgd_to_bulk"``.

    Yields:
      alpha in ascending order, and the rows of its runs.
    """
    first, last = name.split("_to_")
    yield 0.0, pick(rows, method=first)
    for alpha in sorted({row["alpha"] for row in rows if row["method"] == name}):
        yield alpha, pick(rows, method=name, alpha=alpha)
    yield 1.0, pick(rows, method=last)


def ablation(rows: Rows, name: str) -> dict[float, dict[str, Rows]]:
    """The runs of an ablation, by value in ascending order and method.

    Args:
      rows: the rows of the panel `stability`.
      name: the changed setting.
    """
    rows = pick(rows, ablation=name)
    return {
        value: {method: pick(rows, value=value, method=method) for method in ("sgd", "bulk")}
        for value in sorted({row["value"] for row in rows})
    }


def highest_stable(rows: Rows, name: str, method: str) -> float | None:
    """The highest value of an ablation up to which every run of a method is stable.

    Args:
      rows: the rows of the panel `stability`.
      name: the changed setting.
      method: ``"sgd"`` or ``"bulk"``.

    Returns:
      The value; ``None`` if the run with the lowest one is already unstable.
    """
    highest = None
    for value, runs in ablation(rows, name).items():
        if not is_stable(runs[method]):
            break
        highest = value
    return highest
