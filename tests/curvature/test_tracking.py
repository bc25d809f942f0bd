"""Trackers: what each follows, what it costs, what numbers that are not finite do to it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.curvature.outlier_network import (
    PARAMS,
    SIZE,
    K,
    X,
    Y,
    as_matrix,
    exact,
    network,
    objective,
)
from tests.helpers import tree_allclose, tree_equal

TRACKERS: dict[str, oa.Tracker] = {
    "block": oa.BlockTracker(refresh_every=2, cold_start_products=9, oversampling=1),
    "round_robin": oa.RoundRobinTracker(cold_start_products=9),
    "gradient": oa.GradientTracker(refresh_every=2),
    "gradient_rows": oa.GradientTracker(rows="gradient", refresh_every=1, buffer=4, decay=0.9),
    "both": oa.BlockTracker(
        refresh_every=2, cold_start_products=24, oversampling=1, order="both", residuals=True
    ),
    "exact": oa.ExactTracker(refresh_every=4, cold_start_products=30),
}
each_tracker = pytest.mark.parametrize("tracker", TRACKERS.values(), ids=TRACKERS)


@functools.cache
def trainer(tracker: oa.Tracker) -> Any:
    """A compiled step of SGD that only measures, so that all trackers see the same parameters."""
    tx = oa.interpolated_sgd(0.1, K, 1.0, 1.0, tracker=tracker)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params: Any, state: Any, x: Any, refresh: Any) -> Any:
        value_fn = objective(x)
        batch = jax.random.permutation(jax.random.key(optax.tree.get(state, "count")), 64)[:16]
        grads = objective(X[batch], Y[batch]).grad(params)
        updates, state = tx.update(
            grads, state, params, curvature_value_fn=value_fn, grad=grads, refresh=refresh
        )
        return optax.apply_updates(params, updates), state

    return tx, step


@pytest.mark.parametrize(
    ("name", "cosine"),
    # Nine out of ten of the space is what the product-free estimates are good for here.
    [("block", 0.99), ("round_robin", 0.99), ("gradient", 0.9), ("exact", 0.9999)],
)
def test_follows_the_dominant_subspace(name: str, cosine: float) -> None:
    tracker = TRACKERS[name]
    tx, step = trainer(tracker)
    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    for i in range(41):
        before = params
        params, state = step(params, state, X, oa.refresh_at(i, tracker.refresh_every))
    space = optax.tree.get(state, "space")
    values, vectors = exact(before)
    basis = as_matrix(space.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(K), atol=1e-5)
    assert np.linalg.norm(basis @ vectors.T) ** 2 / K > cosine
    np.testing.assert_allclose(space.eigenvalues, values, rtol=0.3 if name == "gradient" else 0.02)
    assert space.ready
    assert space.rejected == 0


@each_tracker
def test_counts_products(tracker: oa.Tracker) -> None:
    """As many as are traced or, with a tolerance, at most as many."""
    want = {
        oa.BlockTracker: (9, K + 1),
        oa.RoundRobinTracker: (9 + 1, 1),
        oa.GradientTracker: (0, 0),
        oa.ExactTracker: (30, 30),
    }[type(tracker)]
    if getattr(tracker, "order", None) == "both":
        want = (24, 4 * (K + 1))
    got = tuple(tracker.num_products(PARAMS, K, cold=cold) for cold in (True, False))
    assert got == want
    assert oa.BlockTracker().num_products(PARAMS, SIZE, cold=True) == SIZE
    assert oa.BlockTracker().num_products(PARAMS, 0, cold=True) == 0


@each_tracker
@pytest.mark.parametrize("driven", [False, True], ids=["in_graph", "host_driven"])
def test_a_poisoned_step_is_rejected_and_survived(tracker: oa.Tracker, driven: bool) -> None:
    """NaN at one refresh: base update, old basis, and the state says so until the next refresh."""
    tx, step = trainer(tracker)
    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    from_gradients = not tracker.needs_objective
    poisoned = 2 * tracker.refresh_every
    bulk = oa.interpolate_subspaces(K, 0.0, 0.5, tracker=tracker)
    for i in range(poisoned + tracker.refresh_every + 1):
        refresh = oa.refresh_at(i, tracker.refresh_every) if driven else None
        x = X
        if i == poisoned:
            old = optax.tree.get(state, "space")
            x = X * np.nan
            if from_gradients:
                nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
                space = jax.jit(lambda s, g: tracker.refresh(s, None, PARAMS, g))(old, nan)
            else:
                space = step(params, state, x, refresh)[1][1].space
            tree_equal((space.basis, space.eigenvalues), (old.basis, old.eigenvalues))
            assert not space.accepted
            assert space.rejected == 1
            assert all(
                jnp.all(jnp.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(space)
            )
            # Whoever projects with it leaves the update as it is, although the basis is there.
            inner = jax.jit(bulk.init)(params)._replace(space=space, active=jnp.array(True))
            project = jax.jit(lambda p, s: bulk.update(p, s, p, refresh=False))
            updates, _ = project(params, inner)
            tree_equal(updates, params)
            state = (state[0], state[1]._replace(space=space))
            x = X
            if not from_gradients:
                continue
        params, state = step(params, state, x, refresh)
    space = optax.tree.get(state, "space")
    assert space.accepted
    assert space.rejected == 1
    assert optax.tree.get(state, "rejected") == 1
    assert np.all(np.isfinite(as_matrix(space.basis)))


@pytest.mark.parametrize("size", [1e-25, 1e20])
@pytest.mark.parametrize("name", ["block", "round_robin", "gradient", "exact"])
def test_squares_neither_overflow_nor_underflow(name: str, size: float) -> None:
    """Except for rows of gradients, whose energies are squares themselves."""
    tracker, plain = TRACKERS[name], objective()

    @functools.partial(jax.jit, static_argnames="cold")
    def refresh(space: Any, factor: jax.Array, cold: bool) -> Any:
        scaled = plain.scaled(factor)
        return tracker.refresh(space, scaled, PARAMS, scaled.grad(PARAMS), cold=cold)

    spaces = []
    for factor in (jnp.float32(1), jnp.float32(size)):
        space = tracker.init(PARAMS, K)
        for i in range(7):
            space = refresh(space, factor, cold=i == 0)
            assert space.accepted
        spaces.append(space)
    small, large = spaces
    unit = 1 if name == "gradient" else size
    np.testing.assert_allclose(large.eigenvalues / unit, small.eigenvalues, rtol=1e-3)
    overlap = as_matrix(large.basis) @ as_matrix(small.basis).T
    np.testing.assert_allclose(np.abs(overlap), np.eye(K), atol=5e-3)


@each_tracker
def test_bfloat16_storage(tracker: Any) -> None:
    """Basis and images take half of the memory; the linear algebra stays in float32."""
    narrow = dataclasses.replace(tracker, storage_dtype=jnp.bfloat16)
    spaces = []
    for each in (tracker, narrow):
        space = jax.jit(lambda p, each=each: each.init(p, K))(PARAMS)
        assert {leaf.dtype for leaf in jax.tree.leaves(space.basis)} == {
            jnp.dtype(each.storage_dtype or jnp.float32)
        }
        refresh = jax.jit(
            lambda space, i, each=each: each.refresh(
                space, objective(), PARAMS, optax.tree.scale(jnp.sin(i), PARAMS), cold=False
            )
        )
        for i in range(6):
            space = refresh(space, 1.0 + i)
        spaces.append(space)
    wide, small = spaces
    assert small.eigenvalues.dtype == jnp.float32
    assert optax.tree.size(small) == optax.tree.size(wide)
    np.testing.assert_allclose(small.eigenvalues, wide.eigenvalues, rtol=0.02, atol=1e-3)
    if tracker.needs_objective:
        # Rounding turns each vector by about 2 ** -9.
        overlap = as_matrix(small.basis) @ as_matrix(wide.basis).T
        assert np.linalg.norm(overlap) ** 2 / K > 0.999


@pytest.mark.parametrize(
    "tracker",
    [
        # Its Lanczos is the cold start of the block tracker.
        pytest.param(tracker, id=name, marks=[pytest.mark.slow] if name == "exact" else [])
        for name, tracker in TRACKERS.items()
    ],
)
def test_sharded_is_unsharded(tracker: oa.Tracker) -> None:
    """Parameters sharded over eight devices: the basis is sharded like them, the numbers agree."""
    x, _, params = network(size=16)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": jax.P("model", None), "v": jax.P("model", None)}
    shardings = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}

    def two(params: Any) -> Any:
        space = tracker.init(params, K)
        for i in range(2):
            space = tracker.refresh(
                space, objective(x), params, optax.tree.scale(1.0 + i, params), cold=i == 0
            )
        return space

    alone = jax.jit(two)(params)
    out = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), jax.eval_shape(two, params))
    blocks_of = {name: jax.NamedSharding(mesh, jax.P(None, *spec)) for name, spec in specs.items()}
    out = out._replace(basis=blocks_of)
    together = jax.jit(two, out_shardings=out)(jax.device_put(params, shardings))
    assert together.basis["w"].sharding == blocks_of["w"]
    tree_allclose(together.eigenvalues, alone.eigenvalues, rtol=1e-4)
    projector = [np.einsum("ki,kj->ij", m, m) for m in map(as_matrix, (together[0], alone[0]))]
    np.testing.assert_allclose(projector[0], projector[1], atol=1e-3)
