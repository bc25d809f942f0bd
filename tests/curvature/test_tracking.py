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
from optax_accel.curvature import blocks
from tests.helpers import tree_allclose, tree_equal

K = 3
TRACKERS: dict[str, oa.Tracker] = {
    "block": oa.BlockTracker(refresh_every=2, cold_start_products=9, oversampling=1),
    "round_robin": oa.RoundRobinTracker(cold_start_products=9),
    "gradient": oa.GradientTracker(refresh_every=2),
    "gradient_rows": oa.GradientTracker(rows="gradient", refresh_every=1, buffer=4, decay=0.9),
    "exact": oa.ExactTracker(refresh_every=4, cold_start_products=30),
}
each_tracker = pytest.mark.parametrize("tracker", TRACKERS.values(), ids=TRACKERS)


def network(size: int = 6) -> tuple[Any, Any, Any]:
    """Inputs, targets and parameters of a network with one curvature outlier per output."""
    rng = np.random.default_rng(0)
    x = np.float32(0.5 * rng.normal(size=(64, size)) + 1)
    y = np.eye(K, dtype=np.float32)[np.argmax(x @ rng.normal(size=(size, K)), axis=1)]
    params = {
        "w": jnp.asarray(rng.normal(size=(size, 8)) / 3, jnp.float32),
        "v": jnp.asarray(rng.normal(size=(8, K)) / 4, jnp.float32),
    }
    return x, y, params


X, Y, PARAMS = jax.tree.map(jnp.asarray, network())
SIZE = optax.tree.size(PARAMS)


def objective(x: Any = X, y: Any = Y) -> oa.Objective:
    return oa.Objective(
        lambda p: jnp.tanh(x @ p["w"]) @ p["v"],
        lambda out: 0.5 * jnp.mean(jnp.sum((out - y) ** 2, axis=-1)),
    )


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


@jax.jit
def hessian(params: Any) -> jax.Array:
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda p: objective()(unravel(p)))(flat)


def exact(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenvalues and eigenvectors (rows) of the Hessian."""
    values, vectors = np.linalg.eigh(np.asarray(hessian(params), np.float64))
    return values[::-1][:K], vectors[:, ::-1][:, :K].T


def as_matrix(block: Any) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(block)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


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


def test_round_robin_is_a_block_sweep_when_parameters_rest() -> None:
    block, robin = oa.BlockTracker(), oa.RoundRobinTracker()
    want, got = jax.jit(lambda p: (block.init(p, K), robin.init(p, K)))(PARAMS)
    tree_equal(got.basis, want.basis)
    want = jax.jit(lambda s: block.refresh(s, objective(), PARAMS, PARAMS, cold=False))(want)
    one = jax.jit(lambda s: robin.refresh(s, objective(), PARAMS, PARAMS, cold=False))
    for i in range(K):
        assert got.memory.position == i
        assert not got.ready
        got = one(got)
    assert got.memory.position == 0
    tree_allclose(got.basis, want.basis, rtol=1e-5)
    tree_allclose(got.eigenvalues, want.eigenvalues, rtol=1e-5)


@each_tracker
def test_counts_products(tracker: oa.Tracker) -> None:
    """As many as are traced or, with a tolerance, at most as many."""
    want = {
        oa.BlockTracker: (9, K + 1),
        oa.RoundRobinTracker: (9 + 1, 1),
        oa.GradientTracker: (0, 0),
        oa.ExactTracker: (30, 30),
    }[type(tracker)]
    got = tuple(tracker.num_products(PARAMS, K, cold=cold) for cold in (True, False))
    assert got == want
    assert oa.BlockTracker().num_products(PARAMS, SIZE, cold=True) == SIZE
    assert oa.BlockTracker().num_products(PARAMS, 0, cold=True) == 0


def test_exact_says_what_it_took() -> None:
    tracker = oa.ExactTracker(tolerance=1e-3)
    space = jax.jit(lambda p: tracker.refresh(tracker.init(p, K), objective(), p, p))(PARAMS)
    assert K < space.memory.num_products <= 20 * K
    np.testing.assert_allclose(space.eigenvalues, exact(PARAMS)[0], rtol=1e-3)


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
