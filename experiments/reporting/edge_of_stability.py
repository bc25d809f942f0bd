"""The pictures of the edge of stability: sharpness against its threshold, flows against iterates.

They are drawn from the runs as `experiments.protocols` keeps them, whose scores include curves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.reporting.figures import COLORS, LINES, styled

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # of each contestant of one setting
_BLACK, _BLUE, _ORANGE = COLORS[:3]
_FLOWS = "steps of flows"  # the curve that tells a run with flows
# Of the flows' panels: what is drawn, its label, color and width.
_PANELS = {
    "training loss": {
        "loss, averaged": ("iterates, averaged", _BLACK, 2.0),
        "loss, predicted": ("predicted", _BLUE, 1.2),
        "loss of the stable flow": ("stable flow", _ORANGE, 1.2),
    },
    "distance of the midpoints": {
        "distance from the central flow": ("central flow", _BLUE, 1.6),
        "distance from the stable flow": ("stable flow", _ORANGE, 1.6),
    },
    "variance of the oscillation": {
        "variance, measured": ("iterates", _BLACK, 2.0),
        "variance, predicted": ("predicted", _BLUE, 1.2),
    },
}


def pictures(final: Mapping[str, Runs]) -> Iterator[tuple[str, Figure]]:
    """All pictures of a study.

    Args:
      final: its final runs, by setting and contestant.

    Yields:
      The name of a picture, without a suffix, and the picture.
    """
    for setting, runs in final.items():
        yield f"sharpness_{setting}", sharpness(runs)
        if any(_FLOWS in run["scores"] for each in runs.values() for run in each):
            yield f"flows_{setting}", flows(runs)


def names(settings: Sequence[str]) -> list[str]:
    """The names that the pictures of some settings may have, without a suffix.

    >>> names(["digits_mlp"])
    ['sharpness_digits_mlp', 'flows_digits_mlp']

    Args:
      settings: names of settings.
    """
    return [f"{kind}_{name}" for name in settings for kind in ("sharpness", "flows")]


@styled
def sharpness(runs: Runs) -> Figure:
    """Sharpness over its threshold along the runs, a panel for each contestant.

    Args:
      runs: the runs of each contestant of one setting.

    Returns:
      The picture. The threshold is the line at 1; a thin line is the sharpness without
      preconditioner over 2 / learning rate, where that is another number.
    """
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    for axes, (name, of_name) in zip(grid, runs.items(), strict=False):
        axes.set_title(f"{name}, rate {of_name[0]['learning_rate']:g}")
        axes.axhline(1, color=_BLACK, linewidth=1, linestyle=LINES[1])
        for number, run in enumerate(of_name):
            scores = run["scores"]
            ratios, raw = (scores[f"{kind} along the run"] for kind in ("ratio", "raw ratio"))
            label = None if number else "over its threshold"
            _line(axes, scores["steps of curves"], ratios, color=_BLUE, label=label)
            if not np.allclose(_numbers(raw), _numbers(ratios), equal_nan=True):
                label = None if number else "plain, over 2 / rate"
                _line(axes, scores["steps of curves"], raw, color=_ORANGE, linewidth=1, label=label)
        axes.set_ylim(0, _top(of_name))
        axes.set_xlabel("step")
        axes.set_ylabel("sharpness")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.legend(fontsize=8)
    return figure


def _top(runs: Sequence[Mapping[str, Any]]) -> float:
    """The upper end of a panel: room for all but the first readings, which may be far above."""
    later = [
        value
        for run in runs
        for value in run["scores"]["ratio along the run"][2:]
        if value is not None
    ]
    return max(1.3, 1.15 * max(later, default=0.0))


@styled
def flows(runs: Runs) -> Figure:
    """Time averages of optimizers against their flows: loss, distance, variance.

    Args:
      runs: the runs of each contestant of one setting; those that have flows are drawn.

    Returns:
      The picture, with a row for each of them.
    """
    drawn = {
        name: found
        for name, of_name in runs.items()
        if (found := [run["scores"] for run in of_name if _FLOWS in run["scores"]])
    }
    figure = Figure(figsize=(11.5, 3.2 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), 3, squeeze=False)
    for row, (name, of_name) in zip(grid, drawn.items(), strict=True):
        for axes, (title, curves) in zip(row, _PANELS.items(), strict=True):
            for number, scores in enumerate(of_name):
                for key, (label, color, width) in curves.items():
                    look = {"color": color, "linewidth": width}
                    look["label"] = None if number else label
                    _line(axes, scores[_FLOWS], scores[key], **look)
            axes.set_title(name)
            axes.set_ylabel(title)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.legend(fontsize=9)
        row[0].set_yscale("log")
    return figure


def _line(axes: Axes, steps: Sequence[float], values: Sequence[float | None], **look: Any) -> None:
    """A curve; values that were not finite, stored as None, are left out."""
    axes.plot(steps, _numbers(values), **{"linewidth": 1.5, **look})


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])
