"""What a comparison of tuned methods shows: in how many steps and seconds each gets to a loss.

A row of the results holds a method, its settings and the curves of the chosen one, one of each
seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from experiments.reporting import figures, tables

Curve = dict[str, list[float]]


class Reached(NamedTuple):
    """What it took to get to a loss.

    Attributes:
      steps: steps made.
      seconds: time that they took.
      gradients: what they were worth in gradients of one batch.
    """

    steps: int
    seconds: float
    gradients: float


def reached(curve: Curve, target: float) -> Reached | None:
    """What it took to get to a training loss, up to the first point of the curve that is as low.

    >>> curve = {"step": [0, 5], "seconds": [0.0, 0.1], "gradients": [0, 10], "train": [2.0, 1.0]}
    >>> reached(curve, 1.5)
    Reached(steps=5, seconds=0.1, gradients=10)

    Args:
      curve: a run: steps, seconds, gradients and losses, in lists of equal length.
      target: the loss.

    Returns:
      The numbers; None if the run never gets there.
    """
    points = zip(curve["step"], curve["seconds"], curve["gradients"], curve["train"], strict=True)
    for step, seconds, gradients, loss in points:
        if loss <= target:
            return Reached(int(step), seconds, gradients)
    return None


def final(row: dict[str, Any], split: str = "train") -> float:
    """The median over the seeds of the losses at the end."""
    return statistics.median(curve[split][-1] for curve in row["curves"])


def target(rows: Sequence[dict[str, Any]]) -> float:
    """The training loss that the first method gets to with every seed."""
    return max(curve["train"][-1] for curve in rows[0]["curves"])


def typical(row: dict[str, Any]) -> Reached | None:
    """The medians over the seeds of what it took; None if some run never gets there."""
    if None in row["reached"]:
        return None
    steps, seconds, gradients = map(statistics.median, zip(*row["reached"], strict=True))
    return Reached(round(steps), seconds, gradients)


def conclusion(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the medians over the seeds say, in sentences, with the first method as the base."""
    base = typical(rows[0])
    assert base is not None  # it sets the target
    loss = f"{rows[0]['method']} gets to a training loss of {target(rows):.4g}"
    effort = f"{base.steps} steps, {base.seconds:.3g} s, {base.gradients:.4g} gradients"
    lines = [f"{loss} in {effort}"]
    for row in rows[1:]:
        its = typical(row)
        if its is None:
            curves = row["curves"]
            lowest = min(min(curve["train"]) for curve in curves)
            end = statistics.median(curve["seconds"][-1] for curve in curves)
            number = sum(entry is not None for entry in row["reached"])
            often = f"in {number} of {len(curves)} runs only" if number else f"in {end:.3g} s"
            verb = "gets there" if number else "does not get there"
            lines.append(f"{row['method']} {verb} {often} (lowest: {lowest:.4g})")
        else:
            fewer = _times(base.steps, its.steps, "fewer")
            less = _times(base.seconds, its.seconds, "less")
            work = _times(base.gradients, its.gradients, "fewer")
            lines.append(
                f"{row['method']} gets there in {its.steps} steps, {fewer}, {its.seconds:.3g} s, "
                f"{less}, and {its.gradients:.4g} gradients, {work}"
            )
    there = [(row["method"], its) for row in rows if (its := typical(row)) is not None]
    fewest, fastest, least = (
        min(there, key=lambda entry, i=i: entry[1][i])[0]  # type: ignore[misc]
        for i in range(3)
    )
    lowest = min(rows, key=final)["method"]
    lines.append(
        f"fewest steps: {fewest}; least time: {fastest}; fewest gradients: {least}; lowest "
        f"training loss at the end: {lowest}"
    )
    return lines


def _times(base: float, other: float, better: str) -> str:
    if max(base, other) < 1.05 * min(base, other):
        return "about as many" if better == "fewer" else "about as much"
    if other <= base:
        return f"{base / max(other, 1e-9):.2g} times {better}"
    return f"{other / max(base, 1e-9):.2g} times more"


@figures.styled
def picture(title: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Training losses over steps and over seconds."""
    figure = Figure(figsize=(11, 4.8))
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("step", "seconds"),
        ("step", "time of the steps in seconds"),
        strict=True,
    ):
        for i, row in enumerate(rows):
            color = figures.COLORS[i % len(figures.COLORS)]
            style = "-" if i < len(figures.COLORS) else "--"
            for number, curve in enumerate(row["curves"]):
                axes.plot(
                    curve[key],
                    curve["train"],
                    style,
                    color=color,
                    alpha=0.4 if number else 1.0,
                    label=None if number else row["method"],
                )
        axes.axhline(target(rows), color="#888888", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend()
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The methods at their chosen settings: medians and ranges over the seeds."""
    columns = ["method", "setting", "steps", "ms/step", "compile s", "train", "test"]
    view = tables.table([*columns, "steps there", "s there", "gradients there"], left=2)
    for row in rows:
        curves = row["curves"]
        there = [entry for entry in row["reached"] if entry is not None]
        view.add_row(
            row["method"],
            ", ".join(f"{name} {value:g}" for name, value in row["chosen"].items()),
            _spread([curve["step"][-1] for curve in curves], "d"),
            f"{row['milliseconds_per_step']:.3g}",
            f"{row['compile_seconds']:.2g}",
            _spread([curve["train"][-1] for curve in curves]),
            _spread([curve["test"][-1] for curve in curves]),
            *_shown(there, len(curves)),
        )
    return view


def _shown(there: Sequence[Reached], number: int) -> list[str]:
    if not there:
        return ["never"] * 3
    steps, seconds, gradients = zip(*there, strict=True)
    often = "" if len(there) == number else f", {len(there)} of {number}"
    return [
        _spread(steps, "d") + often,
        _spread(seconds, ".3g") + often,
        _spread(gradients) + often,
    ]


def _spread(values: Sequence[float], digits: str = ".3g") -> str:
    """The median, and the range where it is more than a point.

    >>> _spread([0.2, 0.1, 0.3])
    '0.2 (0.1-0.3)'
    """

    def text(value: float) -> str:
        return format(round(value) if digits == "d" else value, digits)

    low, middle, high = (text(f(values)) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low}-{high})"
