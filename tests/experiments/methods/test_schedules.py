"""Demon's rivals: the exact forms of their schedules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.methods.schedules import FACTORS, scheduled

T = 10
# 0.9 times the factor, from NumPy in float64.
COSINE = [0.9, 0.877975, 0.814058, 0.714503, 0.589058, 0.45, 0.310942, 0.185497, 0.085942, 0.022025]
EXPONENTIAL = [0.9, 0.545878, 0.331091, 0.200817, 0.121802, 0.073876, 0.044808, 0.027178, 0.016484]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [*COSINE, 0.0]),
        ("exponential", [*EXPONENTIAL, 0.009998, 0.006064]),
        ("linear", [0.9 * (1 - t / T) for t in range(T + 1)]),
        ("onecycle", [0.9 * (1 - 0.9 * abs(t / 5 - 1)) for t in range(T + 1)]),
    ],
)
def test_factors(name: str, expected: list[float]) -> None:
    factor = FACTORS[name](T)
    np.testing.assert_allclose([0.9 * factor(t) for t in range(T + 1)], expected, atol=1e-6)


def rates(values: list[float] | None = None, **settings: Any) -> list[float]:
    """The lengths of the steps along a gradient of 1, without momentum."""
    tx = scheduled(1.0, total_steps=T, optimizer="sgd", peak=0.0, **settings)
    state, lengths = tx.init(jnp.zeros(())), []
    for value in values or [1.0] * T:
        update, state = tx.update(jnp.ones(()), state, jnp.zeros(()), value=jnp.float32(value))
        lengths.append(-float(update))
    return lengths


def test_step_and_plateau() -> None:
    np.testing.assert_allclose(rates(rate="step"), [1] * 5 + [0.1] * 2 + [0.01] * 3, rtol=1e-6)
    later = rates(rate="step", drops=(0.33, 0.66))
    np.testing.assert_allclose(later, [1] * 3 + [0.1] * 3 + [0.01] * 4, rtol=1e-6)
    # The loss falls until step 4, then stays for two steps, a fifth of the run.
    losses = [5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.5, 0.4, 0.3]
    found = rates(losses, rate="plateau", patience=0.2)
    np.testing.assert_allclose(found[:5], 1)
    np.testing.assert_allclose(found[6:], 0.1, rtol=1e-6)


def test_momentum_and_weight_decay_are_optax() -> None:
    tx = scheduled(0.1, total_steps=T, optimizer="adam", peak=0.95, weight_decay=0.01)
    expected = optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.1, b1=0.95))
    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    found, wanted = (each.update(grads, each.init(params), params)[0] for each in (tx, expected))
    np.testing.assert_array_equal(found, wanted)
