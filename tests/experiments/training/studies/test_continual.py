"""What continual learning prunes and measures, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.training.studies import continual
from experiments.training.studies.continual import Runner, init


def test_the_matrices_of_the_trunk_are_pruned() -> None:
    chosen = continual.matrices_of_trunk(init(0, (3, 4)))
    assert chosen == {
        "trunk": [{"kernel": True, "bias": False}],
        "heads": {"kernel": False, "bias": False},
    }


def test_every_example_is_told_by_the_head_of_its_task() -> None:
    params = init(0, (3, 4))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    y = np.array([0, 3, 4, 7, 9])
    outputs = np.asarray(continual.logits(params, x))
    assert outputs.shape == (5, 5, 2)
    own = outputs[np.arange(5), y // 2]
    expected = np.log(np.exp(own).sum(axis=1)) - own[np.arange(5), y % 2]
    assert float(continual.loss(params, x, y)) == pytest.approx(expected.mean(), rel=1e-5)


def test_forgetting_is_what_is_lost_of_all_tasks_but_the_last(tmp_path) -> None:
    setting = {"task": "digits", "hidden_sizes": [4], "steps": 8, "batch_size": 8, "sparsity": 0.5}
    runner = Runner(setting, None, tmp_path)
    test = np.eye(5)  # each task at 100 % just after it, then at 0 ...
    test[4] = [1.0, 0.9, 0.8, 0.7, 1.0]  # ... but in the end
    curves = {name: np.zeros(5) for name in ("predicted", "real")}
    scores = runner._scores({"test": test, "validation": test, "sparsity": 0.5, **curves})
    assert scores["error"] == scores["validation"] == pytest.approx(0.12)
    assert scores["forgetting"] == pytest.approx((0.0 + 0.1 + 0.2 + 0.3) / 4)
    lost = runner._scores(
        {"test": test, "validation": test, "sparsity": 0.5, **curves, "real": np.full(5, np.nan)}
    )
    assert np.isnan([lost["validation"], lost["error"], lost["forgetting"]]).all()
    steps = {rule: runner.gradients({"rule": rule}) for rule in ("plain", "directed")}
    assert steps == {"plain": 40, "directed": 80}
    # All examples of a task, and no others.
    y = runner.task.train.y
    assert all((y[rows] // 2 == task).all() for task, rows in enumerate(runner.rows))
    assert runner.counts.sum() == len(y)
