"""What is done in place of an epoch, and which epochs these are."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import UsageError
from experiments.training.studies.skipped_epochs import Runner, move

SETTING = {
    "task": "digits",
    "model": "mlp",
    "model_options": {"hidden_sizes": [4]},
    "optimizer": "sgd",
    "epochs": 30,
    "batch_size": 64,
    "period": 3,
    "start": 5,
}


def test_moves() -> None:
    previous = {"a": jnp.zeros((20, 5)), "b": jnp.ones(3)}
    params = {"a": jnp.full((20, 5), 0.5), "b": jnp.array([1.0, 2.0, 3.0])}
    key = jax.random.key(0)
    moved = move("increment", key, params, previous)
    np.testing.assert_allclose(moved["a"], 1.0)
    np.testing.assert_allclose(moved["b"], [1.0, 3.0, 5.0])
    moved = move("isotropic", key, params, previous)
    by = np.concatenate([np.ravel(moved[name] - params[name]) for name in params])
    np.testing.assert_allclose(np.linalg.norm(by), np.sqrt(100 * 0.25 + 5), rtol=1e-5)
    assert np.abs(by[:100]).std() > 0.1  # in no special direction
    # All entries of "a" moved alike: the standard deviation of that tensor is zero.
    np.testing.assert_allclose(move("tensor", key, params, previous)["a"], 1.0, rtol=1e-5)


def test_equal_gradients() -> None:
    runner = Runner(SETTING, None, Path("nowhere"))
    assert runner.skipped == [7, 10, 13, 16, 19, 22, 25, 28]
    epochs = {
        name: runner.trained_epochs({"instead": name}) for name in ("training", "nothing", "model")
    }
    assert epochs == {"training": 30, "nothing": 22, "model": 22}
    assert runner.gradients({"instead": "model"}) == 22 * (1077 // 64)
    with pytest.raises(UsageError, match="unknown what is done instead 'nohting'"):
        runner.trained_epochs({"instead": "nohting"})
