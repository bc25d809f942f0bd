"""AggMo: golden values, the methods that it contains, schedules, wrong values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import worked_example
from tests.momentum.test_quasi_hyperbolic import both, iterates


def test_golden(x64):
    params, state = iterates(oa.aggmo(0.1), lambda p: p, jnp.asarray(1.0), 4)
    np.testing.assert_allclose(params, worked_example("aggmo"), rtol=1e-9)
    buffers = optax.tree.get(state, "buffers")
    np.testing.assert_allclose(buffers, [0.55593, 2.68623, 3.147849], rtol=1e-9)


def test_methods_that_it_contains(x64):
    both(oa.aggmo(0.05, (0.9,)), optax.sgd(0.05, 0.9), rtol=1e-15)
    nesterov = oa.aggmo(0.05, (0.0, 0.9), factors=(2.0, 2 * 0.9))
    both(nesterov, optax.sgd(0.05, 0.9, nesterov=True))


def test_decays_may_be_schedules(x64):
    fading = optax.linear_schedule(0.9, 0.0, 10)
    decaying = oa.with_schedules(optax.sgd, momentum=fading)(0.05)
    both(oa.aggmo(0.05, (fading,)), decaying, rtol=1e-15)


def test_exponential_decays():
    np.testing.assert_allclose(oa.aggmo_betas(4, 0.5), [0, 0.5, 0.75, 0.875])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"betas": ()}, ValueError, "`betas` must have at least one entry"),
        ({"betas": 0.9}, TypeError, "`betas` must be a sequence of numbers, one for each buffer"),
        ({"betas": (0.0, 1.0)}, ValueError, r"`betas\[1\]` must lie in \[0, 1\), got 1.0"),
        ({"factors": (1.0,)}, ValueError, "got 1 for 3 decays"),
        ({"factors": (1.0, 2.0, "x")}, TypeError, r"`factors\[2\]` must be a number"),
    ],
)
def test_wrong_values(kwargs, error, message):
    with pytest.raises(error, match=message):
        oa.aggmo(0.1, **kwargs)
