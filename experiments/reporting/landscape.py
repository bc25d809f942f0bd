"""What a person reads of a landscape: the table of its lines, pictures, data of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console

from experiments.reporting import tables
from experiments.reporting.figures import COLORS, LINES, styled

Record = Mapping[str, Any]
COLOR_MAP = "viridis"
# Losses above so many times the lowest one have the same color; they would hide the rest.
HIGHEST = 1e4


# The table --------------------------------------------------------------------------------------


def difference(line: Record) -> float | None:
    """By how much two curvatures differ, relative to the larger one.

    >>> difference({"curvature": 9.0, "product": 10.0})
    0.1

    Args:
      line: a line of the record: `curvature` of the slice, `product` from derivatives.

    Returns:
      The share; None where the loss is not finite.
    """
    measured, expected = line["curvature"], line["product"]
    if measured is None or expected is None:
        return None
    largest = max(abs(measured), abs(expected))
    return abs(measured - expected) / largest if largest else 0.0


def tell(record: Record, console: Console) -> None:
    """Prints what was found.

    Args:
      record: what `experiments.training.studies.landscape.measure` returns, with a title.
      console: where.
    """
    console.print(f"{record['title']}: loss {tables.short(record['loss'])}", soft_wrap=True)
    if record["eigenvalues"]:
        values = ", ".join(f"{value:.4g}" for value in record["eigenvalues"])
        doubt = "" if record["converged"] else " (not all converged)"
        console.print(f"largest eigenvalues of the Hessian: {values}{doubt}", soft_wrap=True)
    if record["shares"]:
        first, second = (tables.percent(share) for share in record["shares"])
        console.print(
            f"of the path's variance over {len(record['steps'])} points of the training, "
            f"{first} % lie along trajectory 1 and {second} % along trajectory 2"
        )
    headers = ["direction", "slope", "curvature\nof the slice", "d^T H d\n/ |d|^2", "differ by\n%"]
    view = tables.table([*headers, "loss at\n-reach", "loss at\n+reach", "reach"])
    for line in record["lines"]:
        differ = difference(line)
        numbers = (line["slope"], line["curvature"], line["product"])
        ends = (line["losses"][0], line["losses"][-1])
        view.add_row(
            line["name"],
            *(_number(value) for value in numbers),
            "not finite" if differ is None else f"{100 * differ:.2g}",
            *(_number(value, 3) for value in ends),
            f"{line['alphas'][-1]:.3g}",
        )
    console.print(view)
    console.print(
        f"slope and curvature are per unit of length; the reach counts lengths of the weights, "
        f"{record['length']:.4g} each",
        soft_wrap=True,
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


# The pictures -----------------------------------------------------------------------------------


def _array(losses: Any) -> np.ndarray:
    """Losses as floats, NaN where they are not finite."""
    return np.array(losses, float)


def _limits(record: Record) -> tuple[float, float]:
    """Lowest loss of all planes, and the highest one that has a color of its own."""
    losses = np.concatenate([_array(plane["losses"]).ravel() for plane in record["planes"]])
    losses = losses[np.isfinite(losses)]
    low, high = float(losses.min()), float(losses.max())
    low = max(low, 1e-12 * max(high, 1e-30))  # a loss may be 0
    return low, max(min(high, HIGHEST * low), low * (1 + 1e-6))


def _panels(number: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels, two in a row."""
    columns = min(number, 2)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows))
    grid = [*np.atleast_1d(figure.subplots(rows, columns, **shared)).ravel()]
    for axes in grid[number:]:
        axes.remove()
    return figure, grid[:number]


@styled
def draw_lines(record: Record) -> Figure:
    """The loss along each direction.

    Args:
      record: as for `tell`.
    """
    kinds = list(dict.fromkeys(line["name"].split()[0] for line in record["lines"]))
    figure, grid = _panels(len(kinds), (5.4, 3.8), sharey=True)
    for axes, kind in zip(grid, kinds, strict=True):
        of_kind = [line for line in record["lines"] if line["name"].split()[0] == kind]
        for i, line in enumerate(of_kind):
            curvature = "not finite" if line["product"] is None else f"{line['product']:.3g}"
            axes.plot(
                line["alphas"],
                _array(line["losses"]),
                color=COLORS[1 + i],
                linestyle=LINES[i],
                linewidth=1.8,
                label=f"{line['name']}: curvature {curvature}",
            )
        axes.plot([0], [record["loss"]], "o", color=COLORS[0], markersize=4)
        values = np.concatenate([_array(line["losses"]) for line in of_kind])
        if np.nanmin(values, initial=np.inf) > 0:
            axes.set_yscale("log")
        axes.set_title(kind.capitalize())
        axes.set_xlabel("distance, lengths of the weights")
        axes.legend(fontsize=9)
        axes.set_ylabel("loss")
    return figure


@styled
def draw_planes(record: Record) -> Figure:
    """The loss on each plane, with the path of the training.

    Args:
      record: as for `tell`.
    """
    planes = record["planes"]
    figure, grid = _panels(len(planes), (5.2, 4.4))
    low, high = _limits(record)
    norm = LogNorm(low, high)
    for axes, plane in zip(grid, planes, strict=True):
        losses = np.clip(_array(plane["losses"]), low, high)
        picture = axes.pcolormesh(
            plane["alphas"],
            plane["betas"],
            losses,
            cmap=COLOR_MAP,
            norm=norm,
            shading="nearest",
            rasterized=True,
        )
        levels = np.geomspace(low, high, 12)[1:-1]
        with np.errstate(invalid="ignore"):
            axes.contour(
                plane["alphas"], plane["betas"], losses, levels, colors="white", linewidths=0.6
            )
        if plane["path"]:
            _draw_path(axes, plane)
        axes.plot([0], [0], "*", color="white", markeredgecolor=COLORS[0], markersize=11)
        axes.set_xlabel(plane["x"])
        axes.set_ylabel(plane["y"])
        axes.set_title(f"{plane['x']} and {plane['y']}", fontsize=11)
        axes.grid(visible=False)
    bar = figure.colorbar(picture, ax=list(grid), label="loss (log scale)", pad=0.01)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _draw_path(axes: Axes, plane: Record) -> None:
    """The path of the training, where it lies within the plane's limits."""
    path = np.array(plane["path"], float)
    axes.plot(*path.T, color=COLORS[2], marker=".", markersize=5, linewidth=1.2)
    axes.set_xlim(plane["alphas"][0], plane["alphas"][-1])
    axes.set_ylim(plane["betas"][0], plane["betas"][-1])


# The page ---------------------------------------------------------------------------------------


def for_page(record: Record) -> dict[str, Any]:
    """What `landscape.html` draws.

    Args:
      record: as for `tell`.

    Returns:
      Plain JSON.
    """
    colors = mpl.colormaps[COLOR_MAP](np.linspace(0, 1, 64))
    low, high = _limits(record) if record["planes"] else (record["loss"], record["loss"])
    return {
        "loss": record["loss"],
        "lines": [
            {key: line[key] for key in ("name", "alphas", "losses", "product")}
            for line in record["lines"]
        ],
        "planes": record["planes"],
        "steps": record["steps"],
        "colors": [mpl.colors.to_hex(color) for color in colors],
        "palette": list(COLORS),
        "low": low,
        "high": high,
        "decades": max(math.log10(high / low), 1e-6) if high > low else 1.0,
    }
