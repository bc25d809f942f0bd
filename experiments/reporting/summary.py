"""The results of a comparison: each method at the learning rate that was best for it."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.methods import Method
from experiments.reporting import comparison
from experiments.reporting.statistics import grid_edge, mean_and_error
from experiments.runs.records import RESULTS, environment
from experiments.runs.study import StudyFolder

Record = dict[str, Any]

# A comparison as a study: what its folder holds.
COMPARISON = functools.partial(
    StudyFolder,
    kind="a comparison",
    mark="methods",
    files=("timing.json", RESULTS, *comparison.FILES),
    folders=("metrics",),
)


def summarize(
    config: Mapping[str, Any],
    methods: Sequence[Method],
    records: Mapping[str, Sequence[Record]],
    costs: Mapping[str, dict[str, Any]],
    timing: Mapping[str, Any],
) -> dict[str, Any]:
    """The results of a comparison as plain JSON: what `results.json` holds.

    Args:
      config: the settings of the comparison.
      methods: the methods, in the order of the rows.
      records: of the runs of each method, by the method's name: one per run and evaluation.
      costs: what each method takes, by its name; these columns are added to its row.
      timing: how the time was measured.

    Returns:
      The settings, versions and hardware, the timing, and one row per method.
    """
    rows = [
        summarize_method(
            method, records[method.name], seeds=config["seeds"], target=config["target"]
        )
        | costs[method.name]
        for method in methods
    ]
    return {"config": config, "environment": environment(), "timing": timing, "rows": rows}


def diverged(run: Sequence[Record]) -> bool:
    """Whether a run ended without finite losses."""
    return run[-1]["validation_loss"] is None or run[-1]["train_loss"] is None


def summarize_method(
    method: Method, records: Sequence[Record], *, seeds: int, target: float
) -> dict[str, Any]:
    """Chooses the learning rate on the validation split and reads the results there.

    A diverged run is a failure: accuracy 0, loss infinite.

    Args:
      method: the method.
      records: one per run (learning rate x seed) and evaluation.
      seeds: number of seeds.
      target: validation accuracy to count the steps to.

    Returns:
      One row of the table, with all rates and the curves at the chosen one.
    """
    runs: dict[tuple[float, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        runs.setdefault((record["learning_rate"], record["seed"]), []).append(record)
    by_rate = {rate: [runs[rate, seed] for seed in range(seeds)] for rate in method.learning_rates}
    rates = [_validation(rate, group) for rate, group in by_rate.items()]
    best = max(rates, key=_quality)
    rate = best["learning_rate"]
    chosen = by_rate[rate]
    test = mean_and_error([_final(run, "test_accuracy") for run in chosen])
    reached = [
        next((r for r in run if (r["validation_accuracy"] or 0.0) >= target), None)
        for run in chosen
    ]
    hits = [record for record in reached if record is not None]
    # A mean over only the seeds that got there would flatter a method that often does not.
    first_hits = {
        key: statistics.fmean(record[key] for record in hits) if len(hits) == seeds else None
        for key in ("step", "gradient_evaluations")
    }
    return {
        "method": method.name,
        "family": method.family,
        "summary": method.summary,
        "paper": method.paper.authors,
        "link": method.paper.link,
        "fidelity": method.fidelity,
        "base": method.base,
        "learning_rate": rate,
        "grid_edge": grid_edge(rate, method.learning_rates),
        "test_accuracy": test[0],
        "test_accuracy_error": test[1],
        "validation_accuracy": best["validation_accuracy"],
        "validation_loss": best["validation_loss"],
        "diverged_at_rate": best["diverged"],
        "diverged": sum(row["diverged"] for row in rates),
        "seeds_at_target": len(hits),
        "steps_to_target": first_hits["step"],
        "gradient_evaluations_to_target": first_hits["gradient_evaluations"],
        "gradient_evaluations": chosen[0][-1]["gradient_evaluations"],
        "rates": rates,
        "curve": _curve(chosen),
    }


def _final(run: Sequence[Record], key: str) -> float:
    """A score at the end of a run; the worst one if it diverged."""
    return (math.inf if key.endswith("loss") else 0.0) if diverged(run) else run[-1][key]


def _validation(rate: float, group: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """The final validation scores at one learning rate, over its seeds."""
    accuracy, error = mean_and_error([_final(run, "validation_accuracy") for run in group])
    loss = statistics.fmean(_final(run, "validation_loss") for run in group)
    return {
        "learning_rate": rate,
        "validation_accuracy": accuracy,
        "validation_accuracy_error": error,
        "validation_loss": loss if math.isfinite(loss) else None,
        "diverged": sum(map(diverged, group)),
    }


def _quality(row: dict[str, Any]) -> tuple[float, float]:
    """What makes one learning rate better than another: accuracy, and of equal ones the loss."""
    loss = row["validation_loss"]
    return row["validation_accuracy"], -math.inf if loss is None else -loss


def _curve(group: Sequence[Sequence[Record]]) -> dict[str, list[Any]]:
    """Means over the seeds at each evaluation, with their standard errors."""
    curve: dict[str, list[Any]] = {
        key: [record[key] for record in group[0]] for key in ("step", "gradient_evaluations")
    }
    for key in ("train_loss", "validation_accuracy"):
        curve[key], curve[f"{key}_error"] = [], []
        for points in zip(*group, strict=True):
            values = [record.get(key) for record in points]
            mean, error = (None, None) if None in values else mean_and_error(values)
            curve[key].append(mean)
            curve[f"{key}_error"].append(error)
    return curve
