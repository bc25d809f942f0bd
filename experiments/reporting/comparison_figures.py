"""The pictures of a comparison: curves at the chosen learning rates, and all rates of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.reporting.figures import style, styled

Row = dict[str, Any]

_STRETCHED = " (stretched towards 100%)"


@styled
def curves(results: dict[str, Any]) -> Figure:
    """Training loss and validation accuracy, over steps and over gradient evaluations.

    Args:
      results: the results of a comparison, as `results.json` holds them.
    """
    config, rows = results["config"], results["rows"]
    figure = Figure(figsize=(12, 9))
    grid = figure.subplots(2, 2, sharey="row")
    for column, cost in enumerate(("step", "gradient_evaluations")):
        for row in rows:
            _draw_curve(grid[0, column], row, cost, "train_loss", with_label=column == 0)
            _draw_curve(grid[1, column], row, cost, "validation_accuracy")
    for axes, title in zip(grid[0], ("Training loss", "Training loss against cost"), strict=True):
        axes.set_title(title)
        _scale_losses(axes, rows)
    titles = ("Validation accuracy", "Validation accuracy against cost")
    for axes, title in zip(grid[1], titles, strict=True):
        axes.set_title(title)
        _scale_curve_accuracies(axes, rows, config)
        _mark_target(axes, config["target"])
    costs = [cost for row in rows for cost in row["curve"]["gradient_evaluations"][1:]]
    for over_steps, over_cost in grid:
        over_steps.set_xlabel("step")
        over_steps.set_xlim(0, config["steps"])
        over_steps.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        over_cost.set_xlabel("gradient evaluations")
        over_cost.set_xscale("log")
        over_cost.set_xlim(min(costs), max(costs) * 1.1)
        _label_ones_and_threes(over_cost.xaxis, "{:,.0f}")
    grid[0, 0].set_ylabel("mean mini-batch loss")
    grid[1, 0].set_ylabel(f"validation accuracy{_STRETCHED}")
    _add_legend(figure, rows, handlelength=2.6)
    return figure


@styled
def rates(results: dict[str, Any]) -> Figure:
    """Final validation accuracy of every method at every learning rate of its grid.

    Args:
      results: the results of a comparison, as `results.json` holds them.
    """
    config, rows = results["config"], results["rows"]
    figure = Figure(figsize=(12, 5))
    axes = figure.subplots()
    shown = [accuracy for row in rows for accuracy in _draw_rates(axes, row, config["seeds"])]
    tried = [entry["learning_rate"] for row in rows for entry in row["rates"]]
    axes.set_xscale("log")
    axes.set_xlim(min(tried) / 1.5, max(tried) * 1.5)
    _label_ones_and_threes(axes.xaxis, "{:g}", numticks=20)
    axes.set_xlabel(
        "learning rate (circle: chosen; rates at which all seeds diverged are left out)"
    )
    axes.set_ylabel(f"validation accuracy{_STRETCHED if shown else ''}")
    if shown:
        _scale_accuracies(axes, min(shown), max(shown), config["validation_examples"])
    axes.set_title("Final validation accuracy over the grid")
    _add_legend(figure, rows)
    return figure


def _draw_curve(axes: Axes, row: Row, cost: str, key: str, *, with_label: bool = False) -> None:
    """Draws the mean of a curve with a band of its standard error."""
    curve = row["curve"]
    # The first point is the untrained model: it has no training loss, and cost 0 has no logarithm.
    x, mean, error = (np.array(curve[name][1:], float) for name in (cost, key, f"{key}_error"))
    look = style(row["method"])
    axes.plot(
        x,
        mean,
        color=look["color"],
        linestyle=look["linestyle"],
        linewidth=1.8,
        label=row["method"] if with_label else None,
    )
    error = np.nan_to_num(error)
    low, high = mean - error, mean + error
    if key == "train_loss":  # a log axis cannot show a band below zero
        low = np.maximum(low, 0.2 * mean)
    else:
        high = np.minimum(high, 1.0)
    axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)


def _draw_rates(axes: Axes, row: Row, seeds: int) -> list[float]:
    """Draws one method's final accuracies over its learning rates, and returns them."""
    look = style(row["method"])
    tried = sorted(row["rates"], key=lambda entry: entry["learning_rate"])
    entries = [entry for entry in tried if entry["diverged"] < seeds]
    accuracies = [entry["validation_accuracy"] for entry in entries]
    axes.errorbar(
        [entry["learning_rate"] for entry in entries],
        accuracies,
        yerr=[entry["validation_accuracy_error"] or 0.0 for entry in entries],
        label=row["method"],
        linewidth=1.6,
        markersize=5,
        elinewidth=1,
        **look,
    )
    if entries:
        axes.plot(
            row["learning_rate"],
            row["validation_accuracy"],
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=look["color"],
            markeredgewidth=1.5,
        )
    return accuracies


def _scale_losses(axes: Axes, rows: Sequence[Row]) -> None:
    """Gives the losses a log axis if all are positive."""
    losses = [loss for row in rows for loss in row["curve"]["train_loss"] if loss]
    if losses and min(losses) > 0:
        axes.set_yscale("log")
        _label_ones_and_threes(axes.yaxis, "{:g}")


def _scale_curve_accuracies(axes: Axes, rows: Sequence[Row], config: dict[str, Any]) -> None:
    """Scales the axis to the accuracies of all curves and the target."""
    points = [value for row in rows for value in row["curve"]["validation_accuracy"][1:]]
    accuracies = [value for value in points if value is not None]
    if accuracies:
        shown = [*accuracies, config["target"]]
        _scale_accuracies(axes, min(shown), max(shown), config["validation_examples"])


def _scale_accuracies(axes: Axes, lowest: float, highest: float, examples: int) -> None:
    """Stretches the axis towards 1, so that 98% and 99% are as far apart as 80% and 90%."""
    floor = 0.5 / examples  # keeps an accuracy of 1 in the picture

    def forward(accuracy: Any) -> Any:
        return -np.log10(np.maximum(1 - np.asarray(accuracy, float), 0) + floor)

    def inverse(height: Any) -> Any:
        return 1 - (10.0 ** -np.asarray(height, float) - floor)

    axes.set_yscale("function", functions=(forward, inverse))
    ticks = [0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0]
    top = forward(highest)
    bottom = min(forward(lowest), top - 0.3)
    margin = 0.05 * (top - bottom)
    low = max(0.0, float(inverse(bottom - margin)))
    high = min(1.0, float(inverse(top + margin)))
    axes.set_ylim(low, high)
    heights = [(tick, forward(tick)) for tick in ticks if low <= tick <= high]
    kept: list[float] = []
    for tick, height in reversed(heights):  # leaves out labels that would overlap
        if all(abs(height - forward(other)) > 0.055 * (top - bottom) for other in kept):
            kept.append(tick)
    axes.set_yticks(kept)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([], minor=True)


def _mark_target(axes: Axes, target: float) -> None:
    """Draws a horizontal line at the target accuracy, with a label at its right end."""
    axes.axhline(target, color="#666666", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        f"target {100 * target:g}%",
        (0.995, target),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color="#555555",
    )


def _label_ones_and_threes(axis: Axis, form: str, numticks: int = 12) -> None:
    """Labels 1, 3, 10, 30, ... on a log axis."""
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=numticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    axis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Figure, rows: Sequence[Row], **options: Any) -> None:
    """Puts a legend of at most five columns, filled evenly, above the axes."""
    columns = math.ceil(len(rows) / math.ceil(len(rows) / 5))
    figure.legend(loc="outside upper center", ncols=columns, fontsize=11, **options)
