"""The pictures of the subspace study, one function for each panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from experiments.reporting.figures import COLORS, styled
from experiments.reporting.subspace.rows import (
    ablation,
    column,
    final_loss,
    is_stable,
    line,
    pick,
    seeds,
)
from experiments.runs.units import Rows

_BLACK, _BLUE, _ORANGE, _GREEN, _PINK = COLORS[:5]
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": _BLACK, "label": "SGD"},
    "dom": {"color": _ORANGE, "label": "Dom-SGD", "linestyle": (0, (5, 1.5))},
    "bulk": {"color": _BLUE, "label": "Bulk-SGD"},
    "gd": {"color": _GREEN, "label": "gradient descent"},
}


def _axes(figure: Figure, shape: tuple[int, int], titles: Sequence[str]) -> list[Axes]:
    """One titled panel for each title, row by row."""
    grid = np.atleast_1d(figure.subplots(*shape)).ravel()
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(title)
    return list(grid)


def _plot(axes: Axes, runs: Rows, key: str, since: bool = False, **look: Any) -> None:
    """Draws a column over the steps, one line per seed; only the first is in the legend.

    `since` counts the steps from the first row on.
    """
    label = look.pop("label", None)
    for i, seed in enumerate(seeds(runs)):
        rows = [row for row in pick(runs, seed=seed) if row.get(key) is not None]
        if rows:
            steps = column(rows, "step")
            width = 1.6 if i == 0 else 0.8
            axes.plot(
                steps - steps[0] * since,
                column(rows, key),
                label=None if i else label,
                **{"linewidth": width, **look},
            )


def _label_steps(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    if high < 30 * low:  # few powers of ten: also label the ticks between them
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, frameon=True, framealpha=0.8, edgecolor="none")


@styled
def draw_alignment(rows: Rows, config: Mapping[str, Any]) -> Figure:
    """Loss, chi_k and eigenvalues along SGD.

    Args:
      rows: the rows of the panel `alignment`.
      config: the settings of the study.
    """
    figure = Figure(figsize=(13, 4.4))
    k = config["k"]
    loss, chi, values = _axes(
        figure,
        (1, 3),
        ("Training loss of SGD", "Share of the gradient in the subspace", "Hessian eigenvalues"),
    )
    _plot(loss, rows, "train_loss", color=_BLACK)
    _log_scale(loss)
    loss.set_ylabel("training loss")
    _plot(chi, rows, "tracked_average", color=_GREEN, label="full gradient, average")
    _plot(chi, rows, "chi", color=_BLUE, marker="o", markersize=4, label="full gradient")
    _plot(
        chi,
        rows,
        "batch_chi",
        color=_ORANGE,
        marker="s",
        markersize=4,
        label="mini-batch gradients, mean",
    )
    chi.set_ylim(0, 1.02)
    chi.set_ylabel(f"chi_{k}, norm ratio")
    first, *others = seeds(rows)
    _draw_eigenvalues(values, pick(rows, seed=first), k)
    values.set_ylabel(f"eigenvalue (seed {first})")
    for axes in (loss, chi, values):
        _label_steps(axes, "step")
        for seed in (first, *(others if axes is not values else ())):
            switch = pick(rows, seed=seed)[0]["switch_step"]
            label = "switch point" if seed == first else None
            axes.axvline(switch, color="#888888", linestyle=":", linewidth=1.2, label=label)
        _legend(axes)
    return figure


def _draw_eigenvalues(axes: Axes, rows: Rows, k: int) -> None:
    """Draws the measured eigenvalues of one seed, those of the dominant subspace in blue."""
    solved = [row for row in rows if "eigenvalue_1" in row]
    count = sum(key.startswith("eigenvalue_") for key in solved[0])
    for i in range(count, 0, -1):
        axes.plot(
            column(solved, "step"),
            column(solved, f"eigenvalue_{i}"),
            color=_BLUE if i <= k else _ORANGE,
            linestyle="-" if i <= k else "--",
            linewidth=1.4,
            label={1: f"1 to {k}", k + 1: f"{k + 1} to {count}"}.get(i),
        )
    if min(row[f"eigenvalue_{count}"] for row in solved) > 0:
        _log_scale(axes)


@styled
def draw_switch(rows: Rows, config: Mapping[str, Any]) -> Figure:
    """Loss and accuracy of the branches.

    Args:
      rows: the rows of the panel `switch`.
      config: the settings of the study.
    """
    figure = Figure(figsize=(12, 8.6))
    loss, accuracy, first, second = _axes(
        figure,
        (2, 2),
        (
            "Training loss",
            "Test accuracy",
            "From SGD to Bulk-SGD: (1 − α) dominant + bulk",
            "From Dom-SGD to Bulk-SGD: (1 − α) dominant + α bulk",
        ),
    )
    for method in ("sgd", "dom", "bulk"):
        runs = pick(rows, method=method)
        for axes, key in ((loss, "train_loss"), (accuracy, "test_accuracy")):
            _plot(axes, runs, key, since=True, **METHOD_STYLES[method])
    accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    for axes, name in ((first, "sgd_to_bulk"), (second, "dom_to_bulk")):
        for alpha, runs in line(rows, name):
            color = mpl.colormaps["cividis"](0.9 * alpha)
            first_seed = pick(runs, seed=seeds(rows)[0])
            _plot(axes, first_seed, "train_loss", since=True, color=color, label=f"α = {alpha:g}")
    for axes in (loss, first, second):
        _log_scale(axes)
        axes.set_ylabel("training loss" + ("" if axes is loss else f" (seed {seeds(rows)[0]})"))
    accuracy.set_ylabel("test accuracy")
    for axes in (loss, accuracy, first, second):
        _label_steps(axes, "steps since the switch")
        _legend(axes)
    return figure


@styled
def draw_effective_learning_rates(rows: Rows, config: Mapping[str, Any]) -> Figure:
    """Effective learning rates in both subspaces, relative to the nominal one.

    Args:
      rows: the rows of the panel `effective_learning_rates`.
      config: the settings of the study.
    """
    figure = Figure(figsize=(13, 4.4))
    names = {"sgd": "SGD", "momentum": "SGD with momentum 0.9", "adam": "Adam"}
    grid = _axes(figure, (1, 3), list(names.values()))
    for axes, optimizer in zip(grid, names, strict=True):
        scaled = [
            row | {key: row[key] / row["learning_rate"] for key in ("dominant", "bulk")}
            for row in pick(rows, optimizer=optimizer)
        ]
        for key, color, marker in (("dominant", _ORANGE, "s"), ("bulk", _BLUE, "o")):
            _plot(axes, scaled, key, color=color, marker=marker, markersize=4, label=key)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axhline(1, color="#888888", linestyle=":", linewidth=1.2)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0), max(high, 10))
        axes.set_ylabel("effective / nominal rate")
        _label_steps(axes, "step")
        _legend(axes)
    return figure


@styled
def draw_stability(rows: Rows, config: Mapping[str, Any]) -> Figure:
    """Final loss over each hyperparameter; unstable runs are marked at the top.

    Args:
      rows: the rows of the panel `stability`.
      config: the settings of the study.
    """
    names = {
        "learning_rate": "learning rate",
        "k": "directions removed",
        "refresh_every": "steps between refreshes",
        "momentum": "momentum",
        "batch_size": "batch size",
    }
    figure = Figure(figsize=(15, 4.4))
    grid = _axes(figure, (1, 5), [name.capitalize() for name in names.values()])
    stable_losses = []
    for axes, name in zip(grid, names, strict=True):
        runs = ablation(rows, name)
        for method, marker, height in (("sgd", "o", 0.97), ("bulk", "s", 0.92)):
            for seed in seeds(rows):
                of_seed = {value: pick(runs[value][method], seed=seed) for value in runs}
                look = METHOD_STYLES[method] | {"marker": marker}
                first = seed == seeds(rows)[0]
                stable_losses += _draw_ablation(axes, of_seed, look, height, first)
        if name != "momentum":
            axes.set_xscale("log")
        axes.set_xticks(list(runs), [f"{value:g}" for value in runs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(names[name])
    for axes in grid:
        if stable_losses:
            low, high = min(stable_losses), max(stable_losses)
            room = (high / low) ** 0.2 if high > low else 1.1
            axes.set_ylim(low / room**0.5, high * room**2)  # leaves room for the unstable runs
            _log_scale(axes)
    grid[0].set_ylabel(f"training loss after {config['short_steps']} steps")
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles))
    return figure


def _draw_ablation(
    axes: Axes, runs: dict[float, Rows], look: dict[str, Any], height: float, first: bool
) -> list[float]:
    """Draws the final losses of one method and seed, and returns those of the stable runs.

    Unstable runs are crosses at this height of the axes; the first seed is in the legend.
    """
    stable = {value: final_loss(run) for value, run in runs.items() if run and is_stable(run)}
    axes.plot(
        list(stable),
        list(stable.values()),
        color=look["color"],
        marker=look["marker"],
        markersize=5,
        linewidth=1.6 if first else 0.9,
        label=look["label"] if first else None,
    )
    unstable = [value for value, run in runs.items() if run and value not in stable]
    axes.plot(
        unstable,
        [height] * len(unstable),
        linestyle="none",
        marker="x",
        markersize=8,
        color=look["color"],
        transform=axes.get_xaxis_transform(),
        label=f"{look['label']}, unstable" if first and unstable else None,
    )
    return list(stable.values())


LARGEST_ERROR = 0.25
"""Shares with a larger standard error are left out of the picture."""

_OPERATOR_STYLES = {
    "hessian": ("Hessian", _BLACK, "o"),
    "gauss_newton": ("Gauss-Newton matrix", _BLUE, "s"),
    "functional_hessian": ("functional Hessian", _ORANGE, "D"),
}


@styled
def draw_energy(rows: Rows, config: Mapping[str, Any]) -> Figure:
    """Energy shares along SGD.

    Args:
      rows: the rows of the panel `energy`.
      config: the settings of the study.
    """
    figure = Figure(figsize=(12, 4.6))
    grid = _axes(figure, (1, 2), ("Frobenius share", "Trace share"))
    for axes, kind in zip(grid, ("frobenius", "trace"), strict=True):
        for operator, (label, color, marker) in _OPERATOR_STYLES.items():
            of_operator = pick(rows, operator=operator)
            for i, seed in enumerate(seeds(of_operator)):
                # The trace of the functional Hessian can be nearly zero, which makes large errors.
                run = [
                    row
                    for row in pick(of_operator, seed=seed)
                    if (row[f"{kind}_error"] or 0.0) <= LARGEST_ERROR
                ]
                axes.errorbar(
                    column(run, "step"),
                    column(run, f"{kind}_share"),
                    yerr=np.nan_to_num(column(run, f"{kind}_error")),
                    color=color,
                    marker=marker,
                    markersize=5,
                    linewidth=1.6 if i == 0 else 0.9,
                    elinewidth=0.9,
                    label=None if i else label,
                )
        _label_steps(axes, "step")
    grid[0].set_ylim(0, 1.02)
    grid[0].set_ylabel("share of the sum of squared eigenvalues")
    grid[1].set_ylabel("share of the trace")
    low, high = grid[1].get_ylim()
    grid[1].set_ylim(min(low, 0), max(high, 1.02))
    _legend(grid[0])
    return figure


@styled
def draw_noise(rows: Rows, config: Mapping[str, Any]) -> Figure:
    """Alignment and loss after the change to full batches.

    Args:
      rows: the rows of the panel `noise`.
      config: the settings of the study.
    """
    figure = Figure(figsize=(12, 4.6))
    chi, loss = _axes(figure, (1, 2), ("Share of the full gradient in the subspace", "Loss"))
    for method in ("sgd", "gd"):
        runs = pick(rows, method=method)
        look = METHOD_STYLES[method] | {"marker": "o", "markersize": 4}
        _plot(chi, runs, "chi", since=True, **look)
        _plot(loss, runs, "train_loss", since=True, **look)
    chi.set_ylim(0, 1.02)
    chi.set_ylabel(f"chi_{config['k']}, norm ratio")
    loss.set_ylabel("training loss")
    for axes in (chi, loss):
        _label_steps(axes, "steps since the switch")
    _legend(chi)
    return figure


DRAW: dict[str, Callable[[Rows, Mapping[str, Any]], Figure]] = {
    "alignment": draw_alignment,
    "switch": draw_switch,
    "effective_learning_rates": draw_effective_learning_rates,
    "stability": draw_stability,
    "energy": draw_energy,
    "noise": draw_noise,
}
