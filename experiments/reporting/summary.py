"""Chooses the learning rate of each method of a comparison and reads its results there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.methods import Method
from experiments.reporting.statistics import mean_and_error
from experiments.training.replicas import Plan, Record, Replica


def diverged(run: Sequence[Record]) -> bool:
    """Whether a run ended without finite losses."""
    return run[-1]["validation_loss"] is None or run[-1]["train_loss"] is None


def summarize_method(plan: Plan, method: Method, records: Sequence[Record]) -> dict[str, Any]:
    """Chooses the learning rate on the validation split and reads the results there.

    A diverged run is a failure: accuracy 0, loss infinite.
    """
    runs: dict[Replica, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        runs.setdefault((record["learning_rate"], record["seed"]), []).append(record)

    def final(run: list[Record], key: str) -> float:
        return (math.inf if key.endswith("loss") else 0.0) if diverged(run) else run[-1][key]

    rates: list[dict[str, Any]] = []
    for rate in method.learning_rates:
        own = [runs[rate, seed] for seed in range(plan.seeds)]
        validation = mean_and_error([final(run, "validation_accuracy") for run in own])
        loss = statistics.fmean(final(run, "validation_loss") for run in own)
        rates.append(
            {
                "learning_rate": rate,
                "validation_accuracy": validation[0],
                "validation_accuracy_error": validation[1],
                "validation_loss": loss if math.isfinite(loss) else None,
                "diverged": sum(map(diverged, own)),
            }
        )

    def quality(row: dict[str, Any]) -> tuple[float, float]:
        loss = row["validation_loss"]
        return row["validation_accuracy"], -math.inf if loss is None else -loss

    best = max(rates, key=quality)
    rate = best["learning_rate"]
    own = [runs[rate, seed] for seed in range(plan.seeds)]
    test = mean_and_error([final(run, "test_accuracy") for run in own])

    reached = [
        next((r for r in run if (r["validation_accuracy"] or 0.0) >= plan.target), None)
        for run in own
    ]
    hits = [record for record in reached if record is not None]
    curve: dict[str, list[Any]] = {
        "step": [record["step"] for record in own[0]],
        "gradient_evaluations": [record["gradient_evaluations"] for record in own[0]],
    }
    for key in ("train_loss", "validation_accuracy"):
        curve[key], curve[f"{key}_error"] = [], []
        for points in zip(*own, strict=True):
            values = [record.get(key) for record in points]
            point = (None, None) if None in values else mean_and_error(values)
            curve[key].append(point[0])
            curve[f"{key}_error"].append(point[1])

    grid = sorted(method.learning_rates)
    return {
        "method": method.name,
        "family": method.family,
        "summary": method.summary,
        "paper": method.paper,
        "link": method.link,
        "fidelity": method.fidelity,
        "base": method.base,
        "learning_rate": rate,
        "grid_edge": "lowest" if rate == grid[0] else "highest" if rate == grid[-1] else None,
        "test_accuracy": test[0],
        "test_accuracy_error": test[1],
        "validation_accuracy": best["validation_accuracy"],
        "validation_loss": best["validation_loss"],
        "diverged_at_rate": best["diverged"],
        "diverged": sum(row["diverged"] for row in rates),
        "seeds_at_target": len(hits),
        # A mean over only the seeds that got there would flatter a method that often does not.
        "steps_to_target": statistics.fmean(r["step"] for r in hits)
        if len(hits) == plan.seeds
        else None,
        "gradient_evaluations_to_target": (
            statistics.fmean(r["gradient_evaluations"] for r in hits)
            if len(hits) == plan.seeds
            else None
        ),
        "gradient_evaluations": own[0][-1]["gradient_evaluations"],
        "rates": rates,
        "curve": curve,
    }
