"""What a study of ensembles shows: its tables and its picture, from its plain records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from experiments.reporting import figures
from experiments.reporting.statistics import grid_edge, mean_and_error
from experiments.reporting.tables import percent, table

Record = dict[str, Any]
COLORS = dict(zip(("single", "independent", "snapshot"), figures.COLORS, strict=False))


def _values(record: Record, key: str, what: str, place: int | None = None) -> list[float]:
    """A test score of each seed: that of one member or average, or by default their mean."""
    by_seed = [[row[key] for row in seed["test"][what]] for seed in record["seeds"]]
    return [statistics.fmean(values) if place is None else values[place] for values in by_seed]


def on_edge(record: Record, rates: Sequence[float]) -> bool:
    """Whether the chosen rate is the lowest or the highest one that was tried."""
    return grid_edge(record["learning_rate"], rates) is not None


def _percent(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    return percent(*mean_and_error(values))


def tables(records: Sequence[Record], rates: Sequence[float]) -> list[Table]:
    """The kinds one below the other, on the test split, and the ensembles member by member.

    Args:
      records: one per kind, as the command `ensembles` stores them.
      rates: the learning rates that were tried.

    Returns:
      One table, or two where there are several members.
    """
    view = table(
        [
            *("kind", "rate", "steps", "gradients", "member's\naccuracy %", "average's"),
            *("member's\nNLL", "average's", "member's\nECE %", "average's"),
        ]
    )
    for record in records:
        rate = record["learning_rate"]
        cells = [f"{rate:g}" + ("*" if on_edge(record, rates) else "")]
        cells += [f"{record['steps']:,}", f"{record['gradient_evaluations']:,.0f}"]
        for key in ("accuracy", "nll", "calibration_error"):
            for what, place in (("members", None), ("averages", -1)):
                values = _values(record, key, what, place)
                nll = f"{statistics.fmean(values):.4f}"
                cells.append(nll if key == "nll" else _percent(values))
        view.add_row(record["kind"], *cells)
    several = [record for record in records if record["members"] > 1]
    if not several:
        return [view]
    columns = [
        f"{record['kind']}:\n{what}" for record in several for what in ("member m", "last m")
    ]
    detail = table(["m", *columns], title="accuracy %")
    for m in range(1, several[0]["members"] + 1):
        cells = []
        for record in several:
            cells.append(_percent(_values(record, "accuracy", "members", m - 1)))
            cells.append(_percent(_values(record, "accuracy", "averages", m - 1)))
        detail.add_row(str(m), *cells)
    return [view, detail]


@figures.styled
def picture(records: Sequence[Record], title: str) -> Figure:
    """Accuracy and calibration error of the averages over the last 1, 2, ... all members."""
    figure = Figure(figsize=(11, 4.2))
    panels = {"accuracy": "test accuracy in %", "calibration_error": "test calibration error in %"}
    for axes, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for record in records:
            color = COLORS[record["kind"]]
            numbers = range(1, record["members"] + 1)
            means = [
                100 * statistics.fmean(_values(record, key, "averages", m - 1)) for m in numbers
            ]
            if record["kind"] == "single":
                axes.axhline(means[0], color=color, linestyle="--", label="single")
                continue
            axes.plot(numbers, means, color=color, marker="o", label=f"{record['kind']}: average")
            members = [100 * statistics.fmean(_values(record, key, "members", -m)) for m in numbers]
            axes.scatter(numbers, members, color=color, marker="x", alpha=0.6, label="its members")
        axes.set_xlabel("m, the number of members averaged (x: the m-th last member)")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(title, x=0.01, ha="left")
    return figure
