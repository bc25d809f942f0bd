"""The comparison of subspace trackers: what is asked of them, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments.reporting import tables

# What this project asks of its default tracker, after the first checkpoint.
TARGETS = {"chi": 0.01, "cos2": 0.99, "step": 8.0, "against ARPACK": 100.0, "linear algebra": 0.2}
PRODUCT_FREE_STEP = 1.5


class Check(NamedTuple):
    """One thing that is asked of a tracker.

    Attributes:
      what: the quantity.
      value: what was measured.
      comparison: ``"<="`` or ``">="``.
      limit: what is asked.
      holds: whether the value is within the limit.
    """

    what: str
    value: float
    comparison: str
    limit: float
    holds: bool


def summarize(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The worst of a tracker's checkpoints after the first, and means of cosines and directions.

    Args:
      rows: one row per checkpoint and tracker.
      name: the tracker.
    """
    checkpoints = [row for row in rows if row["tracker"] == name]
    checkpoints = checkpoints[1:] or checkpoints
    result: dict[str, Any] = {}
    for prefix in ("", "before "):
        for key in ("chi full", "chi batch", "eigenvalues", "orthogonality"):
            result[prefix + key] = max(row[prefix + key] for row in checkpoints)
        cosines = [row[prefix + "cos2"] for row in checkpoints]
        result[prefix + "cos2"] = min(cosines)
        result[prefix + "mean cos2"] = float(np.mean(cosines))
    for key in ("residual held", "residual"):
        norms = [row[key] for row in checkpoints if row[key] is not None]
        result[key] = max(norms) if norms else None
    for key in ("directions", "exact directions"):
        result[key] = float(np.mean([row[key] for row in checkpoints]))
    return result


def checks(summary: Mapping[str, Mapping[str, Any]], cost: Sequence[dict[str, Any]]) -> list[Check]:
    """What is asked of the default tracker and of the one without products.

    Args:
      summary: by tracker, what `summarize` returns.
      cost: one row per tracker that was timed.
    """
    result = []

    def add(what: str, value: float, comparison: str, limit: float) -> None:
        holds = value <= limit if comparison == "<=" else value >= limit
        result.append(Check(what, value, comparison, limit, holds))

    if "block" in summary:
        block = summary["block"]
        add("default tracker: error of chi, full gradient", block["chi full"], "<=", TARGETS["chi"])
        add("default tracker: error of chi, mini-batch", block["chi batch"], "<=", TARGETS["chi"])
        add("default tracker: mean squared cosine", block["mean cos2"], ">=", TARGETS["cos2"])
    for row in cost:
        if row["tracker"] == "block":
            add("default tracker: step / SGD step", row["ratio"][1], "<=", TARGETS["step"])
            name = "against ARPACK"
            add("default tracker: ARPACK step / step", row[name], ">=", TARGETS[name])
            name = "linear algebra"
            add("default tracker: linear algebra in a refresh", row[name], "<=", TARGETS[name])
        if row["tracker"] == "gradient":
            add("product-free: step / SGD step", row["ratio"][1], "<=", PRODUCT_FREE_STEP)
    return result


def verdict(check: Check) -> str:
    """A check as a line of text."""
    word = "pass" if check.holds else "FAIL"
    return f"{word}  {check.what}: {check.value:.4g} ({check.comparison} {check.limit:g})"


def checkpoint_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One table per kind of error, with a line per checkpoint and a column per tracker.

    Args:
      rows: one row per checkpoint and tracker.
    """
    names = list(dict.fromkeys(row["tracker"] for row in rows))
    cells = {(row["tracker"], row["step"]): row for row in rows}
    views = []
    for key, title in (
        ("chi full", "error of chi, gradient of the whole split: used / before the refresh"),
        ("chi batch", "error of chi, mini-batch gradient: used / before the refresh"),
        ("cos2", "mean squared cosine: used / before the refresh"),
    ):
        exact = [] if key == "cos2" else ["exact chi"]
        view = tables.table(["step", *exact, *names], title)
        for step in dict.fromkeys(row["step"] for row in rows):
            line = [str(step)]
            line += [f"{cells[names[0], step]['exact ' + key]:.3f}" for _ in exact]
            for row in (cells[name, step] for name in names):
                line.append(f"{row[key]:.4f} / {row['before ' + key]:.4f}")
            view.add_row(*line)
        views.append(view)
    return views


def summary_table(
    trackers: Mapping[str, tuple[str, int | str, int]],
    summary: Mapping[str, Mapping[str, Any]],
    cost: Sequence[dict[str, Any]],
) -> Table:
    """One line per tracker.

    Args:
      trackers: by name, the examples that refreshes see, the steps between two refreshes, and the
        number of refreshes behind the cold start.
      summary: by tracker, what `summarize` returns.
      cost: one row per tracker that was timed.
    """
    columns = ["tracker", "examples", "every", "refreshes", "chi full", "chi batch", "cos2"]
    columns += ["lowest", "directions", "eigenvalues", "residual", "|UU'-I|", "products/step"]
    columns += ["step / SGD step", "ARPACK / step"]
    title = (
        "worst checkpoint after the first (cos2: mean, lowest; directions: mean / exact; residual: "
        "in the state / on the whole split), and cost"
    )
    view = tables.table([*columns, "linear algebra"], title, wrap=True)
    timed = {row["tracker"]: row for row in cost}
    for name, (examples, every, refreshes) in trackers.items():
        errors = summary[name]
        line = [name, examples, str(every), str(refreshes)]
        line += [f"{errors[key]:.4f}" for key in ("chi full", "chi batch", "mean cos2", "cos2")]
        line += [_pair(errors, "directions", "exact directions", ".1f")]
        line += [f"{errors['eigenvalues']:.3f}"]
        line += [_pair(errors, "residual held", "residual", ".3f")]
        line += [f"{errors['orthogonality']:.0e}"]
        if name in timed:
            row = timed[name]
            share = row["linear algebra"]
            ratio = tables.quartiles(row["ratio"], "{:.2f}".format)
            line += [f"{row['products per step']:.2g}", ratio]
            line += [f"{row['against ARPACK']:.0f}", "" if share is None else f"{share:.0%}"]
        view.add_row(*line)
    return view


def _pair(errors: Mapping[str, Any], first: str, second: str, form: str) -> str:
    """Two numbers, each a dash where there is none; nothing for a record without them."""
    if first not in errors:
        return ""
    values = (errors[first], errors[second])
    return " / ".join("–" if value is None else format(value, form) for value in values)
