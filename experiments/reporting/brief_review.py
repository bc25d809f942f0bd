"""What the brief review shows: speed, memory and accuracy of the variants of each model.

Its claims are judged by the referee's functions, over the seeds of all models together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments.reporting import figures, tables
from experiments.reporting.referee import report as referee
from experiments.reporting.referee.judging import ByBootstrap, LowerError
from experiments.reporting.referee.study import Claim, Results
from experiments.reporting.statistics import mean_and_error

Record = dict[str, Any]

_TIME, _MEMORY, _ERROR = "logarithm of the time", "logarithm of the memory", "test error"
# What is to be low, from a record. A run that diverged has answered wrongly.
VALUES: Mapping[str, Callable[[Record], float]] = {
    _TIME: lambda record: -math.log(record["examples_per_second"]),
    _MEMORY: lambda record: math.log(record["bytes"]),
    _ERROR: lambda record: 1.0 - (record["accuracy"] or 0.0),
}
_REVIEW = "Nokhwal et al., 2023, title"
# Name, text, source, value, variant, slack.
_CLAIMS = (
    ("a", "accumulation trains faster", _REVIEW, _TIME, "accumulation", 0.0),
    ("b", "mixed precision trains faster", _REVIEW, _TIME, "precision", 0.0),
    ("c", "prefetching trains faster", _REVIEW, _TIME, "prefetching", 0.0),
    ("d", "all three together train faster", _REVIEW, _TIME, "all", 0.0),
    ("e", "accumulation takes less memory", "ours", _MEMORY, "accumulation", 0.0),
    ("f", "mixed precision takes less memory", "ours", _MEMORY, "precision", 0.0),
    ("g", "all three cost at most a point of accuracy", "ours", _ERROR, "all", 0.01),
)


def entries(records: Sequence[Record], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the ledger.

    Args:
      records: as many runs of each variant of each model, with the same seeds.
      about: the fields ``scale``, ``budget``, ``command``, ``run``, ``versions`` and ``date``.

    Returns:
      One entry for each claim whose variant was trained, and none without a baseline.
    """
    models, variants, seeds = (
        list(dict.fromkeys(record[key] for record in records))
        for key in ("model", "variant", "seed")
    )
    by_run = {(r["model"], r["variant"], r["seed"]): r for r in records}
    results = {
        name: Results.of_errors(
            models,
            variants,
            np.array([[[value(by_run[m, v, s]) for s in seeds] for v in variants] for m in models]),
            "seconds",
        )
        for name, value in VALUES.items()
    }
    shared = {
        "study": "brief_review",
        "unit": "seconds",
        "runs": len(records),
        "diverged": sum(record["accuracy"] is None for record in records),
    }
    lines = []
    for name, text, source, value, variant, slack in _CLAIMS:
        if {variant, "baseline"} <= set(variants):
            margin = LowerError(method=variant, rival="baseline", slack=slack)
            claim = Claim(
                name=name,
                text=text,
                source=source,
                criterion=f"{value} of the baseline, less that with {variant}, > {0 - slack:g}: "
                "all of the 95 % bootstrap interval over seeds, in these networks",
                judge=ByBootstrap(margin, settings=False),
            )
            judged = {name: claim.judge(results[value])}
            lines += referee.entries([claim], judged, {**shared, **about})
    return lines


def summarize(records: Sequence[Record]) -> list[Record]:
    """Summarizes the runs of each model and variant.

    Args:
      records: one per run: `model`, `variant`, `seed`, `examples_per_second`, `bytes`, `accuracy`.

    Returns:
      One row per model and variant: the median speed, the memory, the mean accuracy (None if a run
      diverged) with its standard error, and the ratios of speed and memory to the baseline.
    """
    rows: list[Record] = []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["model"], record["variant"]), []).append(record)
    for (model, variant), group in groups.items():
        speed = statistics.median(record["examples_per_second"] for record in group)
        accuracies = [record["accuracy"] for record in group]
        finite = None not in accuracies
        mean, error = mean_and_error(accuracies) if finite else (None, None)
        rows.append(
            {
                "model": model,
                "variant": variant,
                "examples_per_second": speed,
                "bytes": group[0]["bytes"],
                "accuracy": mean,
                "accuracy_error": error,
            }
        )
    bases = {row["model"]: row for row in rows if row["variant"] == "baseline"}
    for row in rows:
        base = bases.get(row["model"])
        for key in ("examples_per_second", "bytes"):
            row[f"{key}_ratio"] = None if base is None else row[key] / base[key]
    return rows


def table(rows: Sequence[Record]) -> Table:
    """The variants of each model, one below the other."""
    view = tables.table(
        ["model", "variant", "examples / s", "x", "memory MB", "x", "test accuracy %"], left=2
    )
    shown = None
    for row in rows:
        ratios = [row["examples_per_second_ratio"], row["bytes_ratio"]]
        speed, memory = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        accuracy = row["accuracy"]
        view.add_row(
            "" if row["model"] == shown else row["model"],
            row["variant"],
            f"{row['examples_per_second']:.1f}",
            speed,
            f"{row['bytes'] / 1e6:.0f}",
            memory,
            "diverged" if accuracy is None else tables.percent(accuracy, row["accuracy_error"]),
        )
        shown = row["model"]
    return view


@figures.styled
def picture(rows: Sequence[Record], title: str) -> Figure:
    """Speed, memory and accuracy as bars, the variants of a model side by side."""
    figure = Figure(figsize=(12, 4.2))
    models = list(dict.fromkeys(row["model"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    width = 0.8 / len(variants)
    panels: dict[str, Callable[[Record], float]] = {
        "examples per second": lambda row: row["examples_per_second"],
        "memory of a step in MB": lambda row: row["bytes"] / 1e6,
        "test accuracy in %": lambda row: 100 * (row["accuracy"] or 0.0),
    }
    for axes, (label, value) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for i, variant in enumerate(variants):
            shown = [row for row in rows if row["variant"] == variant]
            axes.bar(
                [models.index(row["model"]) + (i + 0.5) * width - 0.4 for row in shown],
                [value(row) for row in shown],
                width,
                color=figures.COLORS[i],
                label=variant,
            )
        axes.set_xticks(range(len(models)), models)
        axes.set_ylabel(label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(title, x=0.01, ha="left")
    return figure
