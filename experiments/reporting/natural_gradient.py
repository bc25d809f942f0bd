"""What a comparison of tuned methods shows: in how many steps and seconds each gets to a loss.

A row of the results holds a method, its settings and the curve of the chosen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from experiments.reporting import figures, tables

Curve = dict[str, list[float]]


def reached(curve: Curve, target: float) -> tuple[int, float] | None:
    """Steps and seconds to a training loss, from the first point of the curve that is as low.

    >>> reached({"step": [0, 5], "seconds": [0.0, 0.1], "train": [2.0, 1.0]}, 1.5)
    (5, 0.1)

    Args:
      curve: a run: steps, seconds and losses, in lists of equal length.
      target: the loss.

    Returns:
      Both numbers; None if the run never gets there.
    """
    for step, seconds, loss in zip(curve["step"], curve["seconds"], curve["train"], strict=True):
        if loss <= target:
            return int(step), seconds
    return None


def conclusion(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences, with the first method as the base."""
    base, target = rows[0], rows[0]["curve"]["train"][-1]
    steps, seconds = base["reached"]
    name = base["method"]
    lines = [f"{name} gets to a training loss of {target:.4g} in {steps} steps, {seconds:.3g} s"]
    for row in rows[1:]:
        if row["reached"] is None:
            loss, end = min(row["curve"]["train"]), row["curve"]["seconds"][-1]
            lines.append(f"{row['method']} does not get there in {end:.3g} s (lowest: {loss:.4g})")
            continue
        its_steps, its_seconds = row["reached"]
        fewer, less = _times(steps, its_steps, "fewer"), _times(seconds, its_seconds, "less")
        lines.append(
            f"{row['method']} gets there in {its_steps} steps, {fewer}, and {its_seconds:.3g} s, "
            f"{less}"
        )
    there = [row for row in rows if row["reached"] is not None]
    fewest = min(there, key=lambda row: row["reached"][0])["method"]
    fastest = min(there, key=lambda row: row["reached"][1])["method"]
    lowest = min(rows, key=lambda row: row["curve"]["train"][-1])["method"]
    lines.append(
        f"fewest steps: {fewest}; least time: {fastest}; lowest training loss at the end: {lowest}"
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
        ("steps", "seconds of steps"),
        strict=True,
    ):
        for i, row in enumerate(rows):
            color = figures.COLORS[i % len(figures.COLORS)]
            curve = row["curve"]
            axes.plot(curve[key], curve["train"], color=color, label=row["method"])
        axes.axhline(rows[0]["curve"]["train"][-1], color="#888888", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend()
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The methods at their chosen settings, one below the other."""
    columns = ["method", "setting", "steps", "ms/step", "compile s", "train", "test"]
    view = tables.table([*columns, "steps there", "seconds there"], left=2)
    for row in rows:
        curve, there = row["curve"], row["reached"]
        view.add_row(
            row["method"],
            ", ".join(f"{name} {value:g}" for name, value in row["chosen"].items()),
            str(curve["step"][-1]),
            f"{row['milliseconds_per_step']:.3g}",
            f"{row['compile_seconds']:.2g}",
            f"{curve['train'][-1]:.4g}",
            f"{curve['test'][-1]:.4g}",
            *(("never", "never") if there is None else (str(there[0]), f"{there[1]:.3g}")),
        )
    return view
