"""How the learning rate of a method is chosen and its results are read."""

from __future__ import annotations

import json

import pytest

from experiments.reporting.summary import summarize_method
from experiments.training import replicas
from experiments.training.studies import comparison


def record(rate: float, seed: int, step: int, **values: float | None) -> replicas.Record:
    point = {"train_loss": 0.5, "validation_loss": 0.4, "validation_accuracy": 0.9}
    point |= {"test_loss": 0.4, "test_accuracy": 0.8}
    return {
        "learning_rate": rate,
        "seed": seed,
        "step": step,
        "gradient_evaluations": 2.0 * step,
        **point,
        **values,
    }


@pytest.fixture
def plan() -> replicas.Plan:
    return comparison.plan("digits", ["sgd"], seeds=2, steps=10, target=0.95)


def test_selection(plan: replicas.Plan) -> None:
    method = plan.methods[0]
    last: dict[float, list[dict[str, float | None]]] = {
        rate: [{}, {}] for rate in method.learning_rates
    }
    low, _, middle, high, highest = method.learning_rates
    # The best mean counts, not the best seed, and not the test split.
    last[low] = [{"test_accuracy": 1.0}, {"test_accuracy": 1.0}]
    last[middle] = [{"validation_accuracy": 0.96, "test_accuracy": 0.7}] * 2
    # Equal in accuracy, better in loss.
    last[high] = [
        {"validation_accuracy": 0.97, "validation_loss": 0.2, "test_accuracy": 0.90},
        {"validation_accuracy": 0.95, "validation_loss": 0.3, "test_accuracy": 0.94},
    ]
    # Fails half of the time, however good the other half.
    last[highest] = [
        {"validation_accuracy": 1.0, "validation_loss": 0.0},
        {"validation_accuracy": 0.1, "validation_loss": None, "train_loss": None},
    ]
    records = [
        record(rate, seed, step, **(values if step == 10 else {}))
        for rate, seeds in last.items()
        for seed, values in enumerate(seeds)
        for step in (0, 5, 10)
    ]
    row = summarize_method(method, records, seeds=plan.seeds, target=plan.target)
    assert row["learning_rate"] == high
    assert row["grid_edge"] is None
    assert row["test_accuracy"] == pytest.approx(0.92)
    assert row["test_accuracy_error"] == pytest.approx(0.02)
    assert (row["diverged"], row["diverged_at_rate"]) == (1, 0)
    assert (row["steps_to_target"], row["gradient_evaluations_to_target"]) == (10, 20)
    assert row["rates"][-1]["validation_accuracy"] == 0.5
    assert row["rates"][-1]["validation_loss"] is None
    assert row["curve"]["step"] == [0, 5, 10]


def test_everything_diverged(plan: replicas.Plan) -> None:
    method = plan.methods[0]
    failed = {"train_loss": None, "validation_loss": None, "test_loss": None}
    records = [
        record(rate, seed, step, **failed)
        for rate in method.learning_rates
        for seed in range(2)
        for step in (0, 10)
    ]
    row = summarize_method(method, records, seeds=plan.seeds, target=plan.target)
    assert row["diverged_at_rate"] == 2
    assert row["test_accuracy"] == 0.0
    assert row["steps_to_target"] is None
    assert row["curve"]["train_loss"] == [None, None]
    json.dumps(row, allow_nan=False)
