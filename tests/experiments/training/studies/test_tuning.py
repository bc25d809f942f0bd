"""Runs of tuned methods: batches and how a run ends."""

from __future__ import annotations

import math

import numpy as np

from experiments.training.studies.tuning import batches, final_loss


def test_batches_are_epochs_of_all_rows() -> None:
    rows = batches(10, 3, seed=0)
    epochs = [np.concatenate([next(rows) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 9
    assert epochs[0].tolist() != epochs[1].tolist()
    again = batches(10, 3, seed=0)
    np.testing.assert_array_equal(np.concatenate([next(again) for _ in range(3)]), epochs[0])


def test_a_run_that_diverged_is_not_chosen() -> None:
    curve = {"step": [0.0, 1.0, 2.0], "seconds": [0.0, 1.0, 2.0], "train": [2.0, 1.0, 0.1]}
    assert final_loss(curve, 2, 100.0) == 0.1
    assert final_loss(curve, 100, 2.0) == 0.1
    assert final_loss(curve, 3, 100.0) == math.inf
