"""SIFT: golden values, limit cases, which entries are trained, memory, sharding, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import tree_allclose, tree_equal

RNG = np.random.default_rng(0)
SIZES = jnp.array([0.1, -0.9, 0.3, 0.05, -0.2, 0.8, 0, 0.4, -0.6, 0.7])


def run(tx, gradients, params):
    step, state, trajectory = jax.jit(tx.update), tx.init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def test_golden_entries():
    _, state = run(oa.sparse_increments(optax.sgd(0.1), 0.2), [SIZES], jnp.zeros(10))
    assert state.selected_indices.tolist() == [1, 5, 9]


def test_golden_trajectory(x64):
    gradients = [jnp.array(g) for g in ((0.1, -0.5, 0.2, 0.4), (1.0, 1, 1, 1), (0.0, 2, 0, -2))]
    tx = oa.sparse_increments(optax.sgd(0.1), 0.25)
    trajectory, _ = run(tx, gradients, jnp.array([1.0, 2, 3, 4]))
    expected = [[1, 2, 3, 4], [1, 1.9, 3, 3.9], [1, 1.7, 3, 4.1]]
    np.testing.assert_allclose(trajectory, expected, rtol=1e-9)


def test_all_entries_are_the_inner_optimizer_after_the_first_gradient(x64):
    gradients = [{"w": RNG.normal(size=(4, 3)), "b": RNG.normal(size=())} for _ in range(5)]
    params = jax.tree.map(jnp.ones_like, gradients[0])
    for kwargs in ({"rate": 1.0}, {"rate": 0.1, "dense": True}):
        ours, _ = run(oa.sift(0.1, **kwargs), gradients, params)
        theirs, _ = run(optax.adam(0.1), gradients[1:], params)
        tree_allclose(ours[1:], theirs, rtol=1e-9)
        tree_equal(ours[0], params)


def test_what_chooses_the_entries():
    """Equal values: the lower index. Several gradients: their mean size."""
    weights, ones = jnp.arange(4.0) - 2, jnp.ones(4)

    def entries(gradients, rate=0.25, **kwargs):
        tx = oa.sparse_increments(optax.sgd(0.1), rate, **kwargs)
        return run(tx, gradients, weights)[1].selected_indices.tolist()

    assert entries([ones, SIZES[:4]]) == [0, 1]
    assert entries([ones], selection="magnitude") == [0, 1]
    several = [jnp.array([0.0, 3, 0, 1]), jnp.array([0.0, -0.5, 4, 1])]
    assert entries([*several, ones], warmup_gradients=2, rate=0.1) == [2]
    assert entries([*several, ones], warmup_gradients=1, rate=0.1) == [1]
    draws = {tuple(entries([ones], selection="random", key=seed)) for seed in range(8)}
    assert len(draws) > 1
    assert all(len(set(draw)) == 2 for draw in draws)


def test_a_gradient_that_is_not_finite_does_not_choose():
    gradients = [SIZES.at[3].set(np.nan), SIZES, jnp.ones(10)]
    trajectory, state = run(oa.sift(0.1, 0.2), gradients, jnp.zeros(10))
    assert state.selected_indices.tolist() == [1, 5, 9]
    assert np.flatnonzero(trajectory[-1]).tolist() == [1, 5, 9]
    assert not trajectory[1].any()


def test_decay():
    gradients, params = [SIZES, jnp.zeros(10)], jnp.ones(10)
    for decay_selected, expected in ((False, 1.0), (True, 0.99)):
        tx = oa.sift(0.1, 0.2, weight_decay=0.1, decay_selected=decay_selected)
        (_, last), _ = run(tx, gradients, params)
        np.testing.assert_allclose(last[jnp.array([1, 5, 9])], expected, rtol=1e-6)
        np.testing.assert_array_equal(last[jnp.array([0, 2, 3])], 1)


def test_memory():
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

    def size(tx):
        shapes = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)

    assert size(oa.sift(0.1, 0.01)) < 0.016 * size(optax.adam(0.1))


def test_entries_belong_to_the_whole_of_a_sharded_tensor():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    gradients = [jnp.float32(RNG.normal(size=(16, 4))) for _ in range(3)]
    place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("data")))
    tx, params = oa.sift(0.1, 0.1), jnp.ones((16, 4))
    one, state = run(tx, gradients, params)
    eight, sharded_state = run(tx, [place(g) for g in gradients], place(params))
    tree_allclose(eight, one, rtol=1e-6)
    tree_equal(sharded_state.selected_indices, state.selected_indices)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rate": 0.0}, r"`rate` must lie in \(0, 1\], got 0.0"),
        ({"rate": 1.5}, r"`rate` must lie in \(0, 1\], got 1.5"),
        ({"rate": 0.1, "selection": "loss"}, "`selection` must be one of"),
        ({"rate": 0.1, "warmup_gradients": 0}, "`warmup_gradients` must be at least 1"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        oa.sift(0.1, **kwargs)


def test_tensors_have_fewer_entries_than_int32_can_number():
    params = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="numbers entries by int32"):
        jax.eval_shape(oa.sift(0.1, 0.1).init, params)
