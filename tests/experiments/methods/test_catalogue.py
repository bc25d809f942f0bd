"""The catalogue's optimizers train; what the library promises of its own, the gauntlet tests."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from experiments.methods import METHODS
from tests.helpers import least_squares

PROBLEM = least_squares()
NUM_STEPS = 60


@pytest.mark.parametrize("name", METHODS)
def test_the_grid_of_rates_suits_a_convex_problem(name: str) -> None:
    """The lower rates make the loss fall, the best one makes it small; the highest may diverge."""
    method, objective = METHODS[name], PROBLEM.objective()

    def train(rate: Any) -> jax.Array:
        tx = method.build(
            rate,
            total_steps=NUM_STEPS,
            num_classes=PROBLEM.num_directions,
            objective=objective,
        )

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            value, grads = objective.value_and_grad(params)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=objective
            )
            return (optax.apply_updates(params, updates), state), None

        carry = PROBLEM.params, tx.init(PROBLEM.params)
        (params, _), _ = jax.lax.scan(step, carry, length=NUM_STEPS)
        return objective(params) / objective(PROBLEM.params)

    losses = jax.jit(jax.vmap(train))(np.float32(method.learning_rates))
    assert jnp.all(losses[:3] < 1), losses  # no comparison with NaN is true
    if method.tracker is None:  # those leave a part of the parameters where it is
        assert jnp.nanmin(losses) < 0.01, losses


def test_every_optimizer_of_the_library_is_in_the_catalogue() -> None:
    """`learning_rate` comes first in what trains by itself, and the name begins with the method."""
    ready = {
        name
        for name in oa.__all__
        if inspect.isfunction(function := getattr(oa, name))
        and next(iter(inspect.signature(function).parameters), None) == "learning_rate"
        and "GradientTransformation" in str(inspect.signature(function).return_annotation)
    }
    assert len(ready) > 10
    assert {name for name in ready if name not in METHODS} <= {"scale_by_adabound"}
