"""What the study of sharp and flat directions shows: claims, tables, pictures, one page.

Everything is made from the rows that `experiments.subspace_study` stores, so a report can be made
again without training. `CLAIMS` holds the papers' qualitative claims, each as a number that is
computed for every seed and the threshold that it has to reach, fixed before any result was seen
(the one exception says so).
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from rich.table import Table

from experiments import cli
from experiments.cli import plural
from experiments.reporting import tables
from experiments.reporting.figures import COLORS, frame, png
from experiments.reporting.html import PAGE_HEAD
from experiments.reporting.tables import percent

Row = dict[str, Any]
Rows = list[Row]
Results = dict[str, Any]

PANELS = {
    "alignment": "Alignment of the gradient with the dominant subspace",
    "switch": "Training inside, outside and between the subspaces",
    "effective_learning_rates": "Effective learning rates",
    "stability": "Stability of Bulk-SGD",
    "energy": "Curvature energy in the dominant subspace",
    "noise": "Where the alignment comes from",
}

# Selection --------------------------------------------------------------------------------------


def pick(rows: Rows, **identity: Any) -> Rows:
    """The rows that have all these values."""
    return [row for row in rows if all(row[key] == value for key, value in identity.items())]


def seeds(rows: Rows) -> list[int]:
    """The seeds that occur."""
    return sorted({row["seed"] for row in rows})


def column(rows: Rows, key: str) -> np.ndarray:
    """One column of numbers; NaN for None and for what a row lacks."""
    return np.array([row.get(key) for row in rows], float)


def final_loss(rows: Rows) -> float:
    """Mean training loss over the last tenth of a run's evaluations; infinite if it diverged."""
    losses = column(rows, "train_loss")
    last = losses[-max(1, len(losses) // 10) :]
    return float(last.mean()) if len(last) and np.isfinite(last).all() else math.inf


def final_accuracy(rows: Rows) -> float:
    """Mean test accuracy over the last tenth of a run's evaluations; 0 if it diverged."""
    accuracies = column(rows, "test_accuracy")
    last = accuracies[-max(1, len(accuracies) // 10) :]
    return float(last.mean()) if len(last) and np.isfinite(last).all() else 0.0


def is_stable(rows: Rows) -> bool:
    """Whether a run stayed finite and ended no higher than it began."""
    return final_loss(rows) <= rows[0]["train_loss"]


# Claims -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    """A qualitative claim of a paper, as a number and the threshold it has to reach.

    Attributes:
      name: short name.
      paper: whose claim it is.
      statement: the claim.
      quantity: what is computed, in words.
      panel: the panel whose rows it is computed from.
      measure: from one seed's rows of that panel to the number; infinite for what diverged, None
        if it is not defined.
      sign: ``"<="`` or ``">="``.
      threshold: what it is compared with.
      loss: the loss it is about; None: any.
    """

    name: str
    paper: str
    statement: str
    quantity: str
    panel: str
    measure: Callable[[Rows], float | None]
    sign: str
    threshold: float
    loss: str | None = None

    def holds(self, value: float) -> bool:
        """Whether the number reaches the threshold."""
        return value <= self.threshold if self.sign == "<=" else value >= self.threshold


def _best_average(rows: Rows) -> float:
    return float(np.nanmax(column(rows, "tracked_average")))


def _later_alignment(rows: Rows) -> float:
    later = [row for row in rows if row["step"] >= row["switch_step"]]
    return float(np.nanmean(column(later, "chi")))


def _progress(method: str) -> Callable[[Rows], float | None]:
    """The share of SGD's decrease of the training loss that a method makes, from one point."""

    def measure(rows: Rows) -> float | None:
        sgd = pick(rows, method="sgd")
        start = sgd[0]["train_loss"]
        decrease = start - final_loss(sgd)
        if decrease <= 0:
            return None
        return (start - final_loss(pick(rows, method=method))) / decrease

    return measure


def roughness(rows: Rows) -> float:
    """Median absolute second difference of the log training loss between evaluations."""
    return float(np.median(np.abs(np.diff(np.log(column(rows, "train_loss")), 2))))


def _relative_roughness(rows: Rows) -> float | None:
    sgd, bulk = (pick(rows, method=method) for method in ("sgd", "bulk"))
    if math.isinf(final_loss(bulk)) or len(sgd) < 3:
        return None
    return roughness(bulk) / roughness(sgd)


def _rise(rows: Rows) -> float:
    dom = pick(rows, method="dom")
    return final_loss(dom) / dom[0]["train_loss"]


def line(rows: Rows, name: str) -> Iterator[tuple[float, Rows]]:
    """The runs on the line between two methods, ends included: (alpha, rows), alpha ascending."""
    first, last = name.split("_to_")
    yield 0.0, pick(rows, method=first)
    for alpha in sorted({row["alpha"] for row in rows if row["method"] == name}):
        yield alpha, pick(rows, method=name, alpha=alpha)
    yield 1.0, pick(rows, method=last)


def _rank_correlation(rows: Rows) -> float:
    losses = [final_loss(run) for _, run in line(rows, "dom_to_bulk")]
    ranks = np.argsort(np.argsort(losses))
    return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def _effective_ratio(optimizer: str) -> Callable[[Rows], float | None]:
    """Effective learning rate in the bulk over that in the dominant subspace."""

    def measure(rows: Rows) -> float | None:
        # At step 0 momentum and moments are still empty.
        own = [row for row in pick(rows, optimizer=optimizer) if row["step"] > 0]
        if not own:
            return None
        bulk, dominant = (float(np.median(column(own, key))) for key in ("bulk", "dominant"))
        return bulk / dominant if dominant > 0 else math.inf if bulk > 0 else None

    return measure


def _ablation(rows: Rows, name: str) -> dict[float, dict[str, Rows]]:
    """Runs of an ablation by value and method; values ascending."""
    own = pick(rows, ablation=name)
    return {
        value: {method: pick(own, value=value, method=method) for method in ("sgd", "bulk")}
        for value in sorted({row["value"] for row in own})
    }


def highest_stable(rows: Rows, name: str, method: str) -> float | None:
    """The highest value of an ablation up to which every run of a method is stable."""
    highest = None
    for value, runs in _ablation(rows, name).items():
        if not is_stable(runs[method]):
            break
        highest = value
    return highest


def _speed(rows: Rows) -> float | None:
    ratios = [
        final_loss(runs["bulk"]) / final_loss(runs["sgd"])
        for runs in _ablation(rows, "learning_rate").values()
        if all(map(is_stable, runs.values()))
    ]
    return statistics.geometric_mean(ratios) if ratios else None


def _stability(name: str) -> Callable[[Rows], float | None]:
    """How far Bulk-SGD stays stable, relative to SGD."""

    def measure(rows: Rows) -> float | None:
        sgd, bulk = (highest_stable(rows, name, method) for method in ("sgd", "bulk"))
        return (bulk or 0.0) / sgd if sgd else None

    return measure


def _energy(operator: str) -> Callable[[Rows], float | None]:
    def measure(rows: Rows) -> float | None:
        later = [row for row in pick(rows, operator=operator) if row["step"] > 0]
        return float(np.mean(column(later, "frobenius_share")))

    return measure


def _remaining_alignment(rows: Rows) -> float | None:
    ends = {method: pick(rows, method=method) for method in ("sgd", "gd")}
    if not all(ends.values()):
        return None
    return ends["gd"][-1]["chi"] / ends["sgd"][-1]["chi"]


SONG = "Song, Ahn, Yun"
ZAKARIN = "Zakarin, Singh"
CLAIMS = (
    Claim(
        "gradient aligns early",
        SONG,
        "Early in training the gradient comes to lie in the dominant subspace.",
        "highest moving average of chi_k of the full gradient before the switch",
        "alignment",
        _best_average,
        ">=",
        0.95,
    ),
    Claim(
        "alignment stays",
        SONG,
        "From then on the gradient stays in the dominant subspace.",
        "mean chi_k of the full gradient from the switch on",
        "alignment",
        _later_alignment,
        ">=",
        0.9,
    ),
    Claim(
        "Dom-SGD stalls",
        SONG,
        "Projected onto the dominant subspace, SGD stops reducing the training loss.",
        "Dom-SGD's decrease of the training loss / SGD's, from the switch on",
        "switch",
        _progress("dom"),
        "<=",
        0.2,
    ),
    Claim(
        "Bulk-SGD tracks SGD",
        SONG,
        "Without its dominant part the update is as effective as the whole.",
        "Bulk-SGD's decrease of the training loss / SGD's, from the switch on",
        "switch",
        _progress("bulk"),
        ">=",
        0.9,
    ),
    Claim(
        "Bulk-SGD is less noisy",
        SONG,
        "The loss curve of Bulk-SGD is smoother than that of SGD.",
        "roughness of Bulk-SGD's loss curve / SGD's (median second difference of the log)",
        "switch",
        _relative_roughness,
        "<=",
        0.8,
    ),
    Claim(
        "Dom-SGD's loss rises",
        SONG,
        "With cross entropy the training loss of Dom-SGD can even rise.",
        "Dom-SGD's final training loss / its loss at the switch",
        "switch",
        _rise,
        ">=",
        1.01,
        "cross_entropy",
    ),
    Claim(
        "momentum favors the bulk",
        SONG,
        "Momentum raises the effective learning rate in the bulk above that in the dominant "
        "subspace.",
        "effective learning rate in the bulk / dominant, medians along SGD with momentum 0.9",
        "effective_learning_rates",
        _effective_ratio("momentum"),
        ">=",
        2.0,
    ),
    Claim(
        "Adam favors the bulk",
        SONG,
        "Adam does so too.",
        "effective learning rate in the bulk / dominant, medians along Adam",
        "effective_learning_rates",
        _effective_ratio("adam"),
        ">=",
        2.0,
    ),
    Claim(
        "noise makes the alignment",
        SONG,
        "The alignment comes from mini-batch noise: full-batch gradient descent removes it.",
        "chi_k of the full gradient at the end of gradient descent / of SGD, from the switch on",
        "noise",
        _remaining_alignment,
        "<=",
        0.5,
    ),
    Claim(
        "bulk is faster",
        ZAKARIN,
        "At the same learning rate updates in the bulk converge faster.",
        "Bulk-SGD's final training loss / SGD's, geometric mean over rates stable for both",
        "stability",
        _speed,
        "<=",
        0.95,
    ),
    Claim(
        "bulk is less stable",
        ZAKARIN,
        "Bulk-SGD becomes unstable at lower learning rates.",
        "highest stable learning rate of Bulk-SGD / SGD",
        "stability",
        _stability("learning_rate"),
        "<=",
        0.9,
    ),
    Claim(
        "bulk tolerates less momentum",
        ZAKARIN,
        "Bulk-SGD becomes unstable at lower momentum (criterion added after a look at digits).",
        "highest stable momentum of Bulk-SGD / SGD",
        "stability",
        _stability("momentum"),
        "<=",
        0.9,
    ),
    Claim(
        "more bulk, lower loss",
        ZAKARIN,
        "Interpolated methods pass from Dom-SGD to Bulk-SGD (our reading: monotonically).",
        "rank correlation of alpha and final training loss, Dom-SGD to Bulk-SGD",
        "switch",
        _rank_correlation,
        "<=",
        -0.9,
    ),
    Claim(
        "Hessian's energy is dominant",
        ZAKARIN,
        "The curvature energy of the Hessian is concentrated in the dominant subspace.",
        "Frobenius share of the Hessian, mean from the switch on",
        "energy",
        _energy("hessian"),
        ">=",
        0.5,
    ),
    Claim(
        "Gauss-Newton's energy is dominant",
        ZAKARIN,
        "So is that of the Gauss-Newton matrix.",
        "Frobenius share of the Gauss-Newton matrix, mean from the switch on",
        "energy",
        _energy("gauss_newton"),
        ">=",
        0.5,
    ),
    Claim(
        "functional Hessian's is not",
        ZAKARIN,
        "That of the functional Hessian is not (our reading).",
        "Frobenius share of the functional Hessian, mean from the switch on",
        "energy",
        _energy("functional_hessian"),
        "<=",
        0.5,
    ),
)


def judge(claim: Claim, rows: Rows) -> dict[str, Any]:
    """Holds a claim against the rows of its panel.

    Args:
      claim: the claim.
      rows: all seeds' rows.

    Returns:
      The claim with its numbers, as plain JSON: ``values`` by seed (None: not finite or not
      defined), their ``mean`` and ``deviation``, and the ``verdict``: ``"holds"`` (in every seed),
      ``"does not hold"`` (in none), ``"in 1 of 3 seeds"`` or ``"not measurable"``.
    """
    measured = {seed: claim.measure(pick(rows, seed=seed)) for seed in seeds(rows)}
    # A division that has no result decides nothing.
    values = [v for v in measured.values() if v is not None and not math.isnan(v)]
    held = sum(map(claim.holds, values))
    if not values:
        verdict = "not measurable"
    elif held in (0, len(values)):
        verdict = "holds" if held else "does not hold"
    else:
        verdict = f"in {held} of {len(values)} seeds"
    finite = [value for value in values if math.isfinite(value)]
    return {
        "claim": claim.name,
        "paper": claim.paper,
        "statement": claim.statement,
        "criterion": f"{claim.quantity} {claim.sign} {claim.threshold:g}",
        "panel": claim.panel,
        "values": [v if v is not None and math.isfinite(v) else None for v in measured.values()],
        "diverged": len(values) - len(finite),
        "mean": statistics.fmean(finite) if finite else None,
        "deviation": statistics.stdev(finite) if len(finite) > 1 else None,
        "verdict": verdict,
    }


def judge_all(results: Results) -> list[dict[str, Any]]:
    """All claims about this loss whose panels are there."""
    return [
        judge(claim, results["rows"][claim.panel])
        for claim in CLAIMS
        if results["rows"].get(claim.panel) and claim.loss in (None, results["config"]["loss"])
    ]


def number(verdict: dict[str, Any]) -> str:
    """The number of a claim: mean ± standard deviation over the seeds."""
    parts = []
    if verdict["mean"] is not None:
        spread = "" if verdict["deviation"] is None else f" ± {verdict['deviation']:.2g}"
        parts.append(f"{verdict['mean']:.3g}{spread}")
    if verdict["diverged"]:
        parts.append(f"{verdict['diverged']} without bound")
    return ", ".join(parts) or "–"


def table(verdicts: Sequence[dict[str, Any]]) -> Table:
    """The claims for a terminal; the criteria are in the report."""
    view = tables.table(["claim", "here", "number", "paper"], "Claims of the papers", left=4)
    for verdict in verdicts:
        view.add_row(
            verdict["claim"],
            verdict["verdict"],
            number(verdict),
            verdict["paper"],
            style="bold" if verdict["verdict"] == "holds" else None,
        )
    return view


# Tables -----------------------------------------------------------------------------------------


def _mean_and_deviation(values: Sequence[float], form: Callable[[float], str]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged"
    text = form(statistics.fmean(finite))
    if len(finite) > 1:
        text += f" ± {form(statistics.stdev(finite))}"
    return text + (f" ({len(values) - len(finite)} diverged)" if len(finite) < len(values) else "")


def methods_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Final training loss and test accuracy of the branches: headers and cells."""
    lines = []
    for name, label in (("sgd", "SGD"), ("dom", "Dom-SGD"), ("bulk", "Bulk-SGD")):
        lines.append((label, pick(rows, method=name)))
    for name, label in (("sgd_to_bulk", "SGD to Bulk-SGD"), ("dom_to_bulk", "Dom- to Bulk-SGD")):
        for alpha, run in list(line(rows, name))[1:-1]:
            lines.append((f"{label}, alpha {alpha:g}", run))
    cells = []
    for label, runs in lines:
        single = [pick(runs, seed=seed) for seed in seeds(runs)]
        losses = [final_loss(run) for run in single]
        accuracies = [final_accuracy(run) for run in single]
        cells.append(
            [
                label,
                f"{runs[0]['a']:g}, {runs[0]['b']:g}",
                _mean_and_deviation(losses, lambda value: f"{value:.4g}"),
                _mean_and_deviation(accuracies, lambda value: percent(value, None)),
            ]
        )
    return ["method", "a, b", "training loss", "test accuracy %"], cells


def table_csv(rows: Rows) -> str:
    """Rows as CSV, numbers as stored; empty where a row lacks a column."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# Pictures ---------------------------------------------------------------------------------------

_BLACK, _BLUE, _ORANGE, _GREEN, _PINK = COLORS[:5]
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": _BLACK, "label": "SGD"},
    "dom": {"color": _ORANGE, "label": "Dom-SGD", "linestyle": (0, (5, 1.5))},
    "bulk": {"color": _BLUE, "label": "Bulk-SGD"},
    "gd": {"color": _GREEN, "label": "gradient descent"},
}


def _axes(figure: Figure, shape: tuple[int, int], titles: Sequence[str]) -> list[Axes]:
    grid = np.atleast_1d(figure.subplots(*shape)).ravel()
    for axes, title in zip(grid, titles, strict=True):
        frame(axes)
        axes.set_title(title, loc="left", fontsize=12)
    return list(grid)


def _plot(axes: Axes, runs: Rows, x: str, y: str, since: bool = False, **style: Any) -> None:
    """One line per seed; only the first goes into the legend."""
    label = style.pop("label", None)
    for i, seed in enumerate(seeds(runs)):
        own = [row for row in pick(runs, seed=seed) if row.get(y) is not None]
        if not own:
            continue
        places = column(own, x)
        values = column(own, y)
        look: dict[str, Any] = {"linewidth": 1.6 if i == 0 else 0.8, **style}
        axes.plot(places - places[0] * since, values, label=None if i else label, **look)


def _steps_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    if high < 30 * low:  # few powers of ten: label what lies between them
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.tick_params(axis="y", which="minor", labelsize=8)
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, framealpha=0.8, edgecolor="none")


def draw_alignment(rows: Rows, config: dict[str, Any]) -> Figure:
    """Loss, chi_k and eigenvalues along SGD."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    k = config["k"]
    loss, chi, values = _axes(
        figure,
        (1, 3),
        ("Training loss of SGD", "Share of the gradient in the subspace", "Hessian eigenvalues"),
    )
    _plot(loss, rows, "step", "train_loss", color=_BLACK)
    _log(loss)
    loss.set_ylabel("training loss")
    _plot(chi, rows, "step", "tracked_average", color=_GREEN, label="full gradient, average")
    _plot(chi, rows, "step", "chi", color=_BLUE, marker="o", markersize=4, label="full gradient")
    _plot(
        chi,
        rows,
        "step",
        "batch_chi",
        color=_ORANGE,
        marker="s",
        markersize=4,
        label="mini-batch gradients, mean",
    )
    chi.set_ylim(0, 1.02)
    chi.set_ylabel(f"chi_{k}, norm ratio")
    first = [row for row in pick(rows, seed=seeds(rows)[0]) if "eigenvalue_1" in row]
    count = sum(key.startswith("eigenvalue_") for key in first[0])
    for i in range(count, 0, -1):
        inside = i <= k
        values.plot(
            column(first, "step"),
            column(first, f"eigenvalue_{i}"),
            color=_BLUE if inside else _ORANGE,
            linestyle="-" if inside else "--",
            linewidth=1.4,
            label={1: f"1 to {k}", k + 1: f"{k + 1} to {count}"}.get(i),
        )
    positive = min(row[f"eigenvalue_{count}"] for row in first) > 0
    if positive:
        _log(values)
    values.set_ylabel(f"eigenvalue (seed {seeds(rows)[0]})")
    for axes in (loss, chi, values):
        _steps_axis(axes, "step")
        shown = seeds(rows) if axes is not values else seeds(rows)[:1]
        for seed in shown:
            switch = pick(rows, seed=seed)[0]["switch_step"]
            label = "switch point" if seed == shown[0] else None
            axes.axvline(switch, color="#888888", linestyle=":", linewidth=1.2, label=label)
        _legend(axes)
    return figure


def draw_switch(rows: Rows, config: dict[str, Any]) -> Figure:
    """The branches: loss and accuracy."""
    figure = Figure(figsize=(12, 8.6), layout="constrained")
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
            _plot(axes, runs, "step", key, since=True, **METHOD_STYLES[method])
    accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    for axes, name in ((first, "sgd_to_bulk"), (second, "dom_to_bulk")):
        for alpha, runs in line(rows, name):
            color = mpl.colormaps["cividis"](0.9 * alpha)
            one = pick(runs, seed=seeds(rows)[0])
            _plot(axes, one, "step", "train_loss", since=True, color=color, label=f"α = {alpha:g}")
    for axes in (loss, first, second):
        _log(axes)
        axes.set_ylabel("training loss" + ("" if axes is loss else f" (seed {seeds(rows)[0]})"))
    accuracy.set_ylabel("test accuracy")
    for axes in (loss, accuracy, first, second):
        _steps_axis(axes, "steps since the switch")
        _legend(axes)
    return figure


def draw_effective_learning_rates(rows: Rows, config: dict[str, Any]) -> Figure:
    """Effective learning rates in both subspaces."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    names = {"sgd": "SGD", "momentum": "SGD with momentum 0.9", "adam": "Adam"}
    grid = _axes(figure, (1, 3), list(names.values()))
    for axes, optimizer in zip(grid, names, strict=True):
        scaled = [
            row | {key: row[key] / row["learning_rate"] for key in ("dominant", "bulk")}
            for row in pick(rows, optimizer=optimizer)
        ]
        for key, color, marker in (("dominant", _ORANGE, "s"), ("bulk", _BLUE, "o")):
            _plot(axes, scaled, "step", key, color=color, marker=marker, markersize=4, label=key)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axhline(1, color="#888888", linestyle=":", linewidth=1.2)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0), max(high, 10))
        _steps_axis(axes, "step")
        _legend(axes)
    grid[0].set_ylabel("effective / nominal learning rate")
    return figure


def draw_stability(rows: Rows, config: dict[str, Any]) -> Figure:
    """Final loss over each hyperparameter."""
    names = {
        "learning_rate": "learning rate",
        "k": "directions removed",
        "refresh_every": "steps between refreshes",
        "momentum": "momentum",
        "batch_size": "batch size",
    }
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    grid = _axes(figure, (1, 5), [name.capitalize() for name in names.values()])
    stable_losses = []
    for axes, ablation in zip(grid, names, strict=True):
        runs = _ablation(rows, ablation)
        for offset, method in enumerate(("sgd", "bulk")):
            look = METHOD_STYLES[method]
            for i, seed in enumerate(seeds(rows)):
                own = {value: pick(runs[value][method], seed=seed) for value in runs}
                own = {value: run for value, run in own.items() if run}
                good = [value for value, run in own.items() if is_stable(run)]
                losses = [final_loss(own[value]) for value in good]
                stable_losses += losses
                axes.plot(
                    good,
                    losses,
                    color=look["color"],
                    marker="os"[offset],
                    markersize=5,
                    linewidth=1.6 if i == 0 else 0.9,
                    label=look["label"] if i == 0 else None,
                )
                bad = [value for value in own if value not in good]
                axes.plot(
                    bad,
                    [0.97 - 0.05 * offset] * len(bad),
                    linestyle="none",
                    marker="x",
                    markersize=8,
                    color=look["color"],
                    transform=axes.get_xaxis_transform(),
                    label=f"{look['label']}, unstable" if i == 0 and bad else None,
                )
        if ablation != "momentum":
            axes.set_xscale("log")
        axes.set_xticks(list(runs), [f"{value:g}" for value in runs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(names[ablation])
    for axes in grid:
        if stable_losses:
            low, high = min(stable_losses), max(stable_losses)
            room = (high / low) ** 0.2 if high > low else 1.1
            axes.set_ylim(low / room**0.5, high * room**2)  # unstable runs are marked above
            _log(axes)
    grid[0].set_ylabel(f"training loss after {config['short_steps']} steps")
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False
    )
    return figure


# Shares with a larger standard error are not drawn.
LARGEST_ERROR = 0.25
OPERATORS = {
    "hessian": ("Hessian", _BLACK, "o"),
    "gauss_newton": ("Gauss-Newton matrix", _BLUE, "s"),
    "functional_hessian": ("functional Hessian", _ORANGE, "D"),
}


def draw_energy(rows: Rows, config: dict[str, Any]) -> Figure:
    """Energy shares along SGD."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    grid = _axes(figure, (1, 2), ("Frobenius share", "Trace share"))
    for axes, kind in zip(grid, ("frobenius", "trace"), strict=True):
        for operator, (label, color, marker) in OPERATORS.items():
            own = pick(rows, operator=operator)
            for i, seed in enumerate(seeds(own)):
                # The trace of the functional Hessian can be nearly zero.
                run = [
                    row
                    for row in pick(own, seed=seed)
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
        _steps_axis(axes, "step")
    grid[0].set_ylim(0, 1.02)
    grid[0].set_ylabel("share of the sum of squared eigenvalues")
    grid[1].set_ylabel("share of the trace")
    low, high = grid[1].get_ylim()
    grid[1].set_ylim(min(low, 0), max(high, 1.02))
    _legend(grid[0])
    return figure


def draw_noise(rows: Rows, config: dict[str, Any]) -> Figure:
    """Alignment and loss after the change to full batches."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    chi, loss = _axes(figure, (1, 2), ("Share of the full gradient in the subspace", "Loss"))
    for method in ("sgd", "gd"):
        runs = pick(rows, method=method)
        look = METHOD_STYLES[method] | {"marker": "o", "markersize": 4}
        _plot(chi, runs, "step", "chi", since=True, **look)
        _plot(loss, runs, "step", "train_loss", since=True, **look)
    chi.set_ylim(0, 1.02)
    chi.set_ylabel(f"chi_{config['k']}, norm ratio")
    loss.set_ylabel("training loss")
    for axes in (chi, loss):
        _steps_axis(axes, "steps since the switch")
    _legend(chi)
    return figure


_DRAW: dict[str, Callable[[Rows, dict[str, Any]], Figure]] = {
    "alignment": draw_alignment,
    "switch": draw_switch,
    "effective_learning_rates": draw_effective_learning_rates,
    "stability": draw_stability,
    "energy": draw_energy,
    "noise": draw_noise,
}


# Page -------------------------------------------------------------------------------------------


def captions(config: dict[str, Any]) -> dict[str, str]:
    """What a reader has to know of each picture."""
    lines = "One line per seed." if config["seeds"] > 1 else "One seed."
    tracked = (
        f"The projected runs track the subspace on {config['curvature_examples']} fixed training "
        f"examples, refreshed every {config['refresh_every']} steps."
    )
    return {
        "alignment": (
            f"chi_k and eigenvalues from eigenvectors of the Hessian on "
            f"{config['measured_examples']} training examples, solved to a tolerance; the average "
            f"(every {config['check_every']} steps, decay 0.9) from the tracked basis. {lines}"
        ),
        "switch": f"All branches start from the same weights and see the same batches. {tracked}",
        "effective_learning_rates": (
            "From the untrained network on, each estimate pooled over 10 updates. Adam runs at a "
            f"tenth of SGD's learning rate. Dotted: the nominal rate. {lines}"
        ),
        "stability": (
            "From the switch point. The learning rate is varied first; every other ablation "
            f"changes one setting at {5 * config['learning_rate']:g}. Unstable: not finite, or "
            f"higher at the end than at the start. {lines}"
        ),
        "energy": (
            "In the span of the k leading eigenvectors of the Hessian. Frobenius: the sum of "
            "|A u|² over the basis / |A|²; trace: tr(UᵀAU) / tr(A), which for the functional "
            "Hessian can be negative or above 1. Bars: standard error of the estimate; where it is "
            f"above {LARGEST_ERROR:g}, the point is left out."
        ),
        "noise": (
            "From the switch point: SGD goes on, or full-batch gradient descent takes over, at the "
            f"same learning rate. {lines}"
        ),
    }


_MARKDOWN = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
    """# {{ title }}

{{ lead }}

| claim | paper | here | number | criterion |
|---|---|---|---|---|
{% for v in verdicts %}
| {{ v.statement }} | {{ v.paper }} | **{{ v.verdict }}** | {{ v.number }} | {{ v.criterion }} |
{% endfor %}

{{ note }}
{% for panel in panels %}

## {{ panel.title }}

![{{ panel.title }}]({{ panel.name }}.png)

{{ panel.caption }} Numbers: [{{ panel.name }}.csv]({{ panel.name }}.csv).
{% if panel.cells %}

| {{ panel.headers | join(" | ") }} |
|{{ "---|" * panel.headers | length }}
{% for line in panel.cells %}
| {{ line | join(" | ") }} |
{% endfor %}
{% endif %}
{% endfor %}

## Settings

{% for key, value in settings %}
- {{ key }}: {{ value }}
{% endfor %}
"""
)

_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    PAGE_HEAD
    + """  p { color: #444; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-size: .92rem; }
  th, td { padding: .4rem .65rem; border-bottom: 1px solid #e3e3e3; vertical-align: top;
           text-align: left; }
  th { border-bottom: 2px solid #555; font-weight: 600; }
  td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
  .holds { color: #00674a; font-weight: 700; }
  .fails { color: #a03a00; font-weight: 700; }
  img { width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<div class="scroll"><table>
<thead><tr><th>claim</th><th>paper</th><th>here</th><th>number</th><th>criterion</th></tr></thead>
<tbody>
{% for v in verdicts %}<tr><td>{{ v.statement }}</td><td>{{ v.paper }}</td>
<td class="{{ "holds" if v.verdict == "holds" else "fails" }}">{{ v.verdict }}</td>
<td class="number">{{ v.number }}</td><td>{{ v.criterion }}</td></tr>
{% endfor %}</tbody></table></div>
<p>{{ note }}</p>
{% for panel in panels %}<h2>{{ panel.title }}</h2>
<img alt="{{ panel.title }}" src="data:image/png;base64,{{ panel.image }}">
<p>{{ panel.caption }}</p>
{% if panel.cells %}<div class="scroll"><table>
<thead><tr>{% for name in panel.headers %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in panel.cells %}
<tr>{% for cell in line %}<td class="number">{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}{% endfor %}
<h2>Settings</h2>
<div class="scroll"><table><tbody>
{% for key, value in settings %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
</body>
</html>
"""
)


def content(results: Results, verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What both forms of the report show, pictures left out."""
    config, rows = results["config"], results["rows"]
    panels = []
    for name in PANELS:
        if rows.get(name):
            headers, cells = methods_table(rows[name]) if name == "switch" else ([], [])
            panels.append(
                {
                    "name": name,
                    "title": PANELS[name],
                    "caption": captions(config)[name],
                    "headers": headers,
                    "cells": cells,
                }
            )
    held = sum(verdict["verdict"] == "holds" for verdict in verdicts)
    settings = [(key.replace("_", " "), value) for key, value in config.items() if key != "study"]
    return {
        "title": f"Sharp and flat directions: {config['task']}, {config['loss']}",
        "lead": (
            f"{config['model']}, {config['train_examples']} training examples, k = {config['k']}, "
            f"batches of {config['batch_size']}, learning rate {config['learning_rate']:g}, "
            f"{plural(config['seeds'], 'seed')}. {held} of {len(verdicts)} claims hold."
        ),
        "note": (
            "Number: mean ± standard deviation over the seeds. A claim holds if every seed meets "
            "the criterion, and does not if none does. The criteria are ours: the papers show "
            "curves. Papers: Song, Ahn, Yun, arXiv 2405.16002; Zakarin, Singh, arXiv 2505.11972."
        ),
        "verdicts": [{**verdict, "number": number(verdict)} for verdict in verdicts],
        "panels": panels,
        "settings": [*settings, *results["environment"].items()],
    }


def write_all(folder: Path, results: Results) -> list[dict[str, Any]]:
    """Writes tables, pictures, claims and reports into the run's folder; returns the claims."""
    config, rows = results["config"], results["rows"]
    verdicts = judge_all(results)
    shown = content(results, verdicts)
    for panel in shown["panels"]:
        name = panel["name"]
        cli.write_atomic(folder / f"{name}.csv", table_csv(rows[name]))
        picture = png(_DRAW[name](rows[name], config))
        cli.write_atomic(folder / f"{name}.png", picture)
        panel["image"] = base64.b64encode(picture).decode()
    cli.write_atomic(folder / "claims.json", cli.to_json(verdicts))
    cli.write_atomic(folder / "report.md", _MARKDOWN.render(**shown))
    cli.write_atomic(folder / "report.html", _PAGE.render(**shown))
    return verdicts
