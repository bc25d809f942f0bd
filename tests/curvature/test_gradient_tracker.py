"""The tracker of gradients: what its rows find, and what they need."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel.curvature import blocks
from tests.curvature.outlier_network import (
    PARAMS,
    SIZE,
    K,
    X,
    as_matrix,
    objective,
)
from tests.helpers import tree_allclose, tree_equal


def test_gradient_rows_find_the_noise_of_gradients() -> None:
    """Centered rows span the leading principal directions, whatever their mean."""
    rng = np.random.default_rng(0)
    spread = np.concatenate([np.diag([9.0, 6.0, 4.0]), np.zeros((3, SIZE - 3))], axis=1)
    gradients = np.float32(100 + rng.normal(size=(200, 3)) @ spread + 0.1 * rng.normal(size=SIZE))
    _, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    tracker = oa.GradientTracker(rows="gradient", refresh_every=1, decay=0.95, buffer=10)
    space = tracker.init(PARAMS, K)
    refresh = jax.jit(lambda space, g: tracker.refresh(space, None, PARAMS, g))
    assert not tracker.needs_objective
    for gradient in gradients:
        space = refresh(space, unravel(jnp.asarray(gradient)))
    basis = as_matrix(space.basis)
    # The average starts at the first gradient, and what it then moves is noise as well.
    assert np.linalg.norm(basis[:, :3]) ** 2 / K > 0.95
    assert optax.tree.get(space, "seen") == 200


def test_outputs_alike_in_all_examples_give_the_gauss_newton_space() -> None:
    x = np.broadcast_to(X[:1], X.shape)
    tracker = oa.GradientTracker(decay=0.0)

    @jax.jit
    def refresh(params: Any) -> Any:
        space = tracker.refresh(tracker.init(params, K), objective(x), params, params)
        return space, objective(x).ggn_vp_block(params, space.basis)

    space, products = refresh(PARAMS)
    scaled = jax.tree.map(
        lambda b: space.eigenvalues.reshape(-1, *[1] * (b.ndim - 1)) * b, space.basis
    )
    tree_allclose(products, scaled, rtol=1e-4)


def test_more_directions_than_outputs_need_other_rows() -> None:
    tracker = oa.GradientTracker()
    with pytest.raises(ValueError, match=r"num_directions=4 needs outputs of shape \(\.\.\., 4\)"):
        tracker.refresh(tracker.init(PARAMS, 4), objective(), PARAMS, PARAMS)
    closure = oa.Objective.from_value_fn(lambda p: optax.tree.norm(p))
    with pytest.raises(ValueError, match="build it with Objective"):
        tracker.refresh(tracker.init(PARAMS, 3), closure, PARAMS, PARAMS)


def test_gradients_need_no_objective() -> None:
    tx = oa.bulk_sgd(0.1, 1, tracker=oa.GradientTracker(rows="gradient", refresh_every=1, buffer=2))
    state = tx.init(jnp.ones(3))
    update = jax.jit(tx.update)
    for i in range(4):
        _, state = update(jnp.array([1.0, 0, 0]) * i, state, jnp.ones(3))
    np.testing.assert_allclose(np.abs(state[1].space.basis), [[1, 0, 0]], atol=1e-6)
    updates, _ = tx.update(jnp.array([1.0, 2.0, 0]), state, jnp.ones(3), refresh=False)
    np.testing.assert_allclose(updates, [0, -0.2, 0], atol=1e-6)


def test_a_basis_without_gradients_is_zero_not_noise() -> None:
    tracker = oa.GradientTracker(rows="gradient", refresh_every=1, buffer=1)
    space = jax.jit(lambda p: tracker.init(p, 2))(jnp.ones(5))
    refresh = jax.jit(lambda s, row: tracker.refresh(s, None, jnp.ones(5), row))
    for i in range(5):
        space = refresh(space, jnp.array([1.0, 0, 0, 0, 0]) * i)
    gram = blocks.inner(space.basis, space.basis)
    np.testing.assert_allclose(gram, [[1, 0], [0, 0]], atol=1e-6)
    assert space.eigenvalues[1] == 0


def test_a_gradient_whose_energy_overflows_is_rejected_alone() -> None:
    """It reaches neither the buffer nor the mean, so the estimate is the one without it."""
    tracker = oa.GradientTracker(rows="gradient", refresh_every=1, buffer=4, decay=0.9)
    refresh = jax.jit(
        lambda space, factor: tracker.refresh(space, None, PARAMS, optax.tree.scale(factor, PARAMS))
    )
    spaces = []
    for spike in ([], [1e20]):
        space = tracker.init(PARAMS, K)
        for factor in (1.0, 0.5, *spike, 0.7, -0.2, 0.9, 0.1):
            space = refresh(space, jnp.float32(factor))
            assert space.accepted == (factor < 1e20)
        assert space.rejected == len(spike)
        spaces.append(space)
    tree_equal(*((space.basis, space.eigenvalues, space.memory) for space in spaces))
