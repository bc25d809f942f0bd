"""Pictures of the curvature along a run: sharpness against its threshold, spectrum, alignment.

They take arrays, whoever measured them: the metrics of a run, the states of a monitor, a study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike

from experiments.reporting.figures import COLORS, LINES, styled

_BLACK, _BLUE, _ORANGE, _GREEN = COLORS[:4]


def of_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The pictures of what the monitor of a run recorded.

    >>> row = {"step": 1, "loss": 0.5, "monitor/sharpness": 2.0, "monitor/gradient_alignment": 0.3}
    >>> list(of_run([row, {"step": 2, "loss": 0.4}]))
    ['sharpness', 'alignment']

    Args:
      rows: the metrics of the run, each with its ``step``; those with ``monitor/sharpness`` hold a
        record.

    Returns:
      By the names of their files: ``sharpness``, ``effective_sharpness`` against its threshold
      where the optimizer has one, and ``alignment``; nothing where nothing was recorded.
    """
    recorded = [row for row in rows if row.get("monitor/sharpness") is not None]
    if not recorded:
        return {}

    def column(name: str) -> list[float]:
        return [np.nan if row.get(name) is None else row[name] for row in recorded]

    steps, loss = column("step"), column("loss")
    figures = {"sharpness": draw_sharpness(steps, column("monitor/sharpness"), loss=loss)}
    if "monitor/stability_threshold" in recorded[0]:
        figures["effective_sharpness"] = draw_sharpness(
            steps,
            column("monitor/effective_sharpness"),
            column("monitor/stability_threshold"),
            loss=loss,
            title="Effective sharpness",
        )
    alignments = {name: column(f"monitor/{name}_alignment") for name in ("gradient", "update")}
    return figures | {"alignment": draw_alignment(steps, alignments, k=1)}


def _columns(steps: ArrayLike, **columns: ArrayLike | None) -> tuple[np.ndarray, ...]:
    """The steps, and columns with an entry (or a row) for each; NaN where nothing was measured.

    Raises:
      ValueError: a column has another length, or there are no steps.
    """
    found = [np.asarray(steps, float)]
    if found[0].ndim != 1 or not found[0].size:
        raise ValueError(f"`steps` must be a sequence of numbers, got shape {found[0].shape}")
    for name, column in columns.items():
        values = np.asarray(np.nan if column is None else column, float)
        # One number, such as a threshold that does not change, stands for all steps.
        values = np.broadcast_to(values, found[0].shape) if values.ndim == 0 else values
        if len(values) != len(found[0]):
            raise ValueError(
                f"`{name}` must have one entry for each of the {len(found[0])} steps, got "
                f"{len(values)}"
            )
        found.append(np.where(np.isfinite(values), values, np.nan))
    return tuple(found)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@styled
def draw_sharpness(
    steps: ArrayLike,
    sharpness: ArrayLike,
    threshold: ArrayLike | None = None,
    *,
    loss: ArrayLike | None = None,
    title: str = "Sharpness",
    figure: Figure | None = None,
) -> Figure:
    """Sharpness over the steps, against the largest value that is stable, and the loss below.

    >>> figure = draw_sharpness([0, 10, 20], [1.0, 3.0, 4.1], 4.0)
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['largest eigenvalue', 'stability threshold']

    Args:
      steps: the steps at which it was measured, ``(steps,)``.
      sharpness: the largest eigenvalue, ``(steps,)``, or the k largest, ``(steps, k)``, the leading
        one first. Of the Hessian or of the preconditioned one: whichever the threshold is for.
      threshold: the largest eigenvalue at which the optimizer is stable on a quadratic, such as
        2 / learning rate for gradient descent: one number or ``(steps,)``; None for no such line.
      loss: the training loss at the same steps; None for no second picture.
      title: the heading.
      figure: a figure to draw into, e.g. one that a notebook shows and updates; default: a new one.

    Returns:
      The figure. Values that are not finite are left out.

    Raises:
      ValueError: a column has another length than the steps.
    """
    number, values, limit, losses = _columns(
        steps, sharpness=sharpness, threshold=threshold, loss=loss
    )
    figure = Figure(figsize=(8, 4.2 if loss is None else 6.4)) if figure is None else figure
    figure.clear()
    grid = figure.subplots(1 if loss is None else 2, 1, sharex=True, squeeze=False)[:, 0]
    curves = values if values.ndim == 2 else values[:, None]
    for i, curve in reversed([*enumerate(curves.T)]):
        label = "largest eigenvalue" if i == 0 else "following eigenvalues" if i == 1 else None
        color, width = (_BLUE, 1.8) if i == 0 else ("#9DC3DE", 1.0)
        grid[0].plot(number, curve, color=color, linewidth=width, label=label)
    if threshold is not None:
        grid[0].plot(number, limit, color=_ORANGE, linestyle=LINES[1], label="stability threshold")
    if np.nanmin(curves[:, 0], initial=np.inf) > 0:
        _log_scale(grid[0])
    grid[0].set_ylabel("eigenvalue")
    grid[0].set_title(title)
    grid[0].legend()
    if loss is not None:
        grid[1].plot(number, losses, color=_BLACK, linewidth=1.4)
        if np.nanmin(losses, initial=np.inf) > 0:
            _log_scale(grid[1])
        grid[1].set_ylabel("training loss")
    grid[-1].set_xlabel("step")
    return figure


@styled
def draw_spectrum(
    steps: ArrayLike,
    grid: ArrayLike,
    density: ArrayLike,
    *,
    title: str = "Spectral density",
    smallest: float = 1e-6,
) -> Figure:
    """The density of eigenvalues over the steps, as a heat map.

    >>> values = np.linspace(-1, 9, 6)
    >>> figure = draw_spectrum([0, 50], values, np.exp(-np.stack([values, values])))
    >>> figure.axes[0].get_ylabel()
    'eigenvalue (symmetric log scale)'

    Args:
      steps: the steps at which it was measured, ``(steps,)``.
      grid: eigenvalues, rising: ``(points,)``, or ``(steps, points)`` where each step has its own.
      density: the density there, ``(steps, points)``; what is not finite is left out.
      title: the heading.
      smallest: densities below this share of the highest one have the color of the lowest.

    Returns:
      The figure. The eigenvalues' axis is linear near zero and logarithmic beyond, so that the
      outliers are seen beside the bulk.

    Raises:
      ValueError: the shapes do not fit, or no density is positive.
    """
    number, dense = _columns(steps, density=density)
    values = np.asarray(grid, float)
    if dense.ndim != 2 or values.shape not in (dense.shape, dense.shape[1:]):
        raise ValueError(
            f"`density` must be (steps, points), and `grid` (points,) or (steps, points), got "
            f"{dense.shape} and {values.shape}"
        )
    highest = np.nanmax(dense, initial=0)
    if not highest > 0:
        raise ValueError("`density` must be positive somewhere, got no positive number")
    rows = np.broadcast_to(values, dense.shape)
    figure = Figure(figsize=(8.6, 4.6))
    axes = figure.subplots()
    # Columns as wide as the time from one measurement to the next.
    middles = (number[1:] + number[:-1]) / 2
    first = 2 * number[0] - middles[0] if len(middles) else number[0] - 0.5
    last = 2 * number[-1] - middles[-1] if len(middles) else number[0] + 0.5
    edges = np.concatenate([[first], middles, [last]])
    shown = np.log10(np.maximum(dense / highest, smallest))
    for left, right, row, column in zip(edges, edges[1:], rows, shown, strict=False):
        picture = axes.pcolormesh(
            [left, right],
            _edges(row),
            column[:, None],
            cmap="viridis",
            vmin=np.log10(smallest),
            vmax=0,
            rasterized=True,
        )
    far = np.abs(rows[np.isfinite(rows)]).max()
    axes.set_yscale("symlog", linthresh=max(far / 100, 1e-12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(visible=False)
    axes.set_xlabel("step")
    axes.set_ylabel("eigenvalue (symmetric log scale)")
    axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="density, powers of ten below the highest")
    return figure


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of cells around points: in the middle between them."""
    if len(values) == 1:
        return np.array([values[0] - 0.5, values[0] + 0.5])
    middles = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middles[0]], middles, [2 * values[-1] - middles[-1]]])


@styled
def draw_alignment(
    steps: ArrayLike,
    alignments: Mapping[str, ArrayLike],
    *,
    k: int | None = None,
    random: float | None = None,
    title: str = "Share in the dominant subspace",
) -> Figure:
    r"""chi_k of vectors over the steps: the share of their norm in the dominant subspace.

    >>> figure = draw_alignment([0, 5], {"gradient": [0.2, 0.9], "update": [0.1, 0.3]}, k=10)
    >>> figure.axes[0].get_ylabel()
    'chi_10, norm ratio'

    Args:
      steps: the steps at which it was measured, ``(steps,)``.
      alignments: chi_k by the name of the vector, such as gradient and update, each ``(steps,)``.
      k: dimension of the dominant subspace, for the label.
      random: what a random vector has on average, :math:`\sqrt{k / \text{parameters}}`; drawn as a
        line; None for no line.
      title: the heading.

    Returns:
      The figure.

    Raises:
      ValueError: there is nothing to draw, or a column has another length than the steps.
    """
    if not alignments:
        raise ValueError("`alignments` must name at least one vector, such as {'gradient': [...]}")
    number, *curves = _columns(steps, **dict(alignments))
    figure = Figure(figsize=(8, 4.2))
    axes = figure.subplots()
    for i, (name, curve) in enumerate(zip(alignments, curves, strict=True)):
        look: dict[str, Any] = {"color": COLORS[1 + i % (len(COLORS) - 1)], "linestyle": LINES[i]}
        axes.plot(number, curve, linewidth=1.8, label=name, **look)
    if random is not None:
        axes.axhline(random, color="#888888", linestyle=":", label="random vector")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel(f"chi_{k}, norm ratio" if k else "norm ratio")
    axes.set_title(title)
    axes.legend()
    return figure
