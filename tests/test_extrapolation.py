"""Extragradient: golden values of the local method, directions, equivalences."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import WORKER_MODES, over_workers, worked_example

TARGETS = np.array([1.0, -3.0])


def quadratic(x, target):
    return 0.5 * (x - target) ** 2


def quartic(x, target):
    return x**4 / 4 - target * x


def quartic_sum(x, target):
    return jnp.sum(quartic(x, target))


def run_workers(tx, loss, x0, steps, *, average_gradients):
    """Two workers as a vmapped axis; returns their common iterates."""
    objective = oa.Objective.from_value_fn(loss, axis_name="workers")

    def worker(state, x, target):
        own = objective.bind(target=target)
        grads = (own if average_gradients else own.local).grad(x)
        updates, state = tx.update(grads, state, x, value_fn=objective, target=target)
        return optax.apply_updates(x, updates), state

    step = jax.jit(jax.vmap(worker, in_axes=(0, 0, 0), axis_name="workers"))
    x = jnp.full(2, x0)
    state = jax.vmap(tx.init)(x)
    iterates = []
    for _ in range(steps):
        x, state = step(state, x, jnp.asarray(TARGETS))
        assert x[0] == x[1]
        iterates.append(float(x[0]))
    return iterates, state


# -- golden values --------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_name", ["workers", None])
def test_golden_w1(x64, axis_name):
    """Quadratics with equal Hessians: local and global extrapolation agree."""
    tx = oa.extragradient(optax.sgd(0.1), 0.2, axis_name=axis_name)
    iterates, _ = run_workers(tx, quadratic, 2.0, 1, average_gradients=True)
    np.testing.assert_allclose(iterates, [1.76], rtol=1e-12)


@pytest.mark.parametrize(("axis_name", "want"), [("workers", 0.8496), (None, 0.8784)])
def test_golden_q_tells_local_from_global(x64, axis_name, want):
    tx = oa.extragradient(optax.sgd(0.1), 0.2, axis_name=axis_name)
    iterates, _ = run_workers(tx, quartic, 1.0, 1, average_gradients=True)
    np.testing.assert_allclose(iterates, [want], rtol=1e-12)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_local_extrapolation_on_two_devices(mode):
    """The golden values of Q, from incoming gradients that are averaged, hence not usable."""
    tx = oa.extragradient(optax.sgd(0.1), 0.2, axis_name="workers")
    objective = oa.Objective.from_value_fn(quartic_sum, axis_name="workers")
    devices = jax.devices()[:2]

    def worker(x, state, target):
        bound = objective.bind(target=target.ravel())
        updates, state = tx.update(bound.grad(x), state, x, value_fn=bound)
        return optax.apply_updates(x, updates), state

    x = jnp.ones(1)
    targets = jnp.asarray(TARGETS, jnp.float32)[:, None]
    if mode == "pmap":
        step = jax.pmap(worker, "workers", in_axes=(None, None, 0), out_axes=None, devices=devices)
    else:
        mesh = jax.make_mesh(
            (2,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        specs = (jax.P(), jax.P(), jax.P("workers"))
        step = jax.jit(
            jax.shard_map(worker, mesh=mesh, in_specs=specs, out_specs=(jax.P(), jax.P()))
        )
    np.testing.assert_allclose(step(x, tx.init(x), targets)[0], [0.8496], rtol=1e-6)


def test_golden_w3_nesterov_and_its_look_ahead_form(x64):
    tx = oa.extrap_sgd(0.1, extrapolation_rate=0.2, axis_name="workers")
    iterates, state = run_workers(tx, quadratic, 2.0, 2, average_gradients=True)
    np.testing.assert_allclose(iterates, [1.544, 0.962912], rtol=1e-12)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), [4.1952] * 2, rtol=1e-12)
    # The look-ahead form x_{t+1} = y_{t+1} - u v_{t+1} with y the stored point, v = -rate * trace.
    velocities = [-0.1 * 2.4, -0.1 * 4.1952]
    np.testing.assert_allclose(velocities, [-0.24, -0.41952], rtol=1e-12)
    ahead = [y - 0.9 * v for y, v in zip(iterates, velocities, strict=True)]
    np.testing.assert_allclose(ahead, [1.76, 1.34048], rtol=1e-12)


def test_golden_extra_adam(x64):
    halves = []

    def loss(x):
        jax.debug.callback(lambda v: halves.append(float(v)), x, ordered=True)
        return 0.5 * x**2

    tx = oa.extra_adam(0.1)
    x = jnp.ones(())
    state = tx.init(x)
    for half, full in zip((0.9000000316, 0.8009023330), worked_example("extra_adam"), strict=True):
        updates, state = tx.update(x, state, x, value_fn=loss)
        x = x + updates
        jax.effects_barrier()
        np.testing.assert_allclose([halves[-1], x], [half, full], atol=1e-10)
        if len(halves) == 1:
            np.testing.assert_allclose(optax.tree.get(state, "mu"), 0.1800000032, atol=1e-10)
            np.testing.assert_allclose(optax.tree.get(state, "nu"), 0.001809000057, atol=1e-12)
    assert optax.tree.get(state.inner_state[0], "count") == 4


# -- communication of the local form --------------------------------------------------------------

REDUCED = re.compile(r'"stablehlo.all_reduce".*?\) -> tensor<([0-9x]*)f32>', re.DOTALL)


@pytest.mark.parametrize("with_value", [False, True])
@pytest.mark.parametrize(
    ("direction", "incoming"),
    [
        *((direction, "own") for direction in ("gradient", "past", "gaussian", "none")),
        ("gradient", "averaged"),
        ("past", "averaged"),
    ],
)
def test_a_step_communicates_one_all_reduce(direction, incoming, with_value):
    """Of the parameters' size: a pair of gradients, but only the one that moves is averaged.

    JAX writes the mean of a tree as one all-reduce for each leaf, which XLA makes one operation.
    """
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(5)}
    tx = oa.extrap_sgd(0.1, direction=direction, axis_name="workers")

    def loss(p, x):
        return jnp.sum(jnp.cosh(x * p["a"])) + jnp.sum(p["b"] ** 4) * x

    def worker(params, state, x):
        objective = oa.Objective.from_value_fn(loss, axis_name="workers").bind(x=x)
        value, grads = (objective.local if incoming == "own" else objective).value_and_grad(params)
        extra = {"value": value, "grad": grads} if with_value else {}
        updates, state = tx.update(grads, state, params, value_fn=objective, **extra)
        moved = optax.apply_updates(params, updates), state.inner_state, state.past
        return (*moved, state.objective_value) if with_value else moved

    everywhere = jax.tree.map(lambda a: jnp.broadcast_to(a, (8, *a.shape)), params)
    state = jax.vmap(tx.init)(everywhere)
    x = jnp.linspace(0.5, 1.5, 8)
    lowered = over_workers("shard_map", worker, 8).lower(everywhere, state, x)
    text, compiled = lowered.as_text(), lowered.compile().as_text()
    expected = ["3x2x", "5x", *([""] if with_value else [])]  # the loss adds a single number
    assert sorted(REDUCED.findall(text)) == sorted(expected)
    assert len(re.findall(r" all-reduce(?:-start)?\(", compiled)) == 1
    for other in ("all-gather", "collective-permute", "all-to-all", "reduce-scatter"):
        assert other not in compiled


def test_global_extrapolation_communicates_twice():
    """What the local form saves."""
    tx = oa.extrap_sgd(0.1)

    def worker(x, state, target):
        objective = oa.Objective.from_value_fn(quartic, axis_name="workers").bind(target=target)
        return tx.update(objective.grad(x), state, x, value_fn=objective)[0]

    x = jnp.ones(2)
    step = over_workers("shard_map", worker, 2)
    text = step.lower(x, jax.vmap(tx.init)(x), jnp.asarray(TARGETS)).as_text()
    assert text.count('"stablehlo.all_reduce"') == 2


@pytest.mark.parametrize("mode", WORKER_MODES)
@pytest.mark.parametrize("direction", ["gradient", "past", "none"])
def test_workers_follow_the_simulation(x64, direction, mode):
    """Four workers with quartic losses, each given its own gradient, in NumPy."""
    centers, rate, ahead, momentum = np.array([1.0, -3.0, 0.5, 2.0]), 0.05, 0.1, 0.9
    tx = oa.extrap_sgd(
        rate, momentum, extrapolation_rate=ahead, direction=direction, axis_name="workers"
    )

    def worker(x, state, target):
        own = oa.Objective.from_value_fn(quartic).bind(target=target)
        updates, state = tx.update(own.grad(x), state, x, value_fn=own)
        return optax.apply_updates(x, updates), state

    step = over_workers(mode, worker, 4)
    x, state = np.ones(4), jax.vmap(tx.init)(jnp.ones(4))
    y, past, trace = 1.0, np.zeros(4), 0.0
    for _ in range(5):
        x, state = step(x, state, centers)
        direction_of = {"gradient": y**3 - centers, "past": past, "none": np.zeros(4)}[direction]
        past = (y - ahead * direction_of) ** 3 - centers  # each worker's own
        mean = past.mean()
        trace = momentum * trace + mean
        y = y - rate * (mean + momentum * trace)
        np.testing.assert_allclose(x, np.full(4, y), rtol=1e-12)
        if direction == "past":
            np.testing.assert_allclose(state.past, past, rtol=1e-12)


# -- equivalences ---------------------------------------------------------------------------------


def loss_fn(p):
    return jnp.sum(jnp.cosh(p["w"])) + 0.5 * jnp.sum((p["w"] @ p["v"]) ** 2)


PARAMS = {"w": jnp.linspace(-1.0, 1, 12).reshape(4, 3), "v": jnp.array([0.3, -0.2, 1.0])}


def iterate(tx, steps=5, params=PARAMS, loss=loss_fn, extra=True):
    state = tx.init(params)
    kwargs = {"value_fn": loss} if extra else {}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, **kwargs)
        return optax.apply_updates(params, updates), state

    seen = []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(params)
    return seen, state


def assert_same(a, b, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda x, y: compare(x, y, **tolerance), a, b)


@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, 0.9, nesterov=True)])
def test_no_direction_is_the_inner_method_bit_for_bit(inner):
    ours, _ = iterate(oa.extragradient(inner, 0.1, "none"), extra=False)
    assert_same(ours, iterate(inner, extra=False)[0])


@pytest.mark.parametrize("direction", ["gradient", "past", "gaussian", "filter_uniform"])
def test_rate_zero_is_the_inner_method(direction):
    ours, _ = iterate(oa.extragradient(optax.adam(0.1), 0.0, direction))
    # Adam divides by moments that nearly vanish where the loss is flat: hence the absolute part.
    assert_same(ours, iterate(optax.adam(0.1), extra=False)[0], rtol=1e-5, atol=1e-6)


def test_past_direction_is_optimistic_gradient_descent(x64):
    """Extrapolated points with gamma = gamma_hat obey Optax's optimistic recursion.

    Optax takes the first gradient for the past one; the same start here is the past gradient of
    the first extrapolated point, stored, and that point plus rate times it.
    """
    rate, start = 0.05, jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS)
    tx = oa.extragradient(optax.sgd(rate), rate, "past")
    past = jax.grad(loss_fn)(start)
    params = jax.tree.map(lambda x, g: x + rate * g, start, past)
    state = tx.init(params)._replace(past=past)
    halves = []
    for _ in range(6):
        updates, state = tx.update(params, state, params, value_fn=loss_fn)
        params = optax.apply_updates(params, updates)
        # The next extrapolated point, from the stored one and the last gradient.
        halves.append(jax.tree.map(lambda x, g: x - rate * g, params, state.past))
    want, _ = iterate(optax.optimistic_gradient_descent(rate), 6, start, extra=False)
    assert_same(halves, want, rtol=1e-12)


def test_first_past_step_is_a_plain_step():
    ours, _ = iterate(oa.extragradient(optax.sgd(0.1), 0.3, "past"), 1)
    assert_same(ours, iterate(optax.sgd(0.1), 1, extra=False)[0], rtol=1e-6)


def test_other_batch_extrapolates_with_its_gradient(x64):
    tx = oa.extragradient(optax.sgd(0.1), 0.2)
    x = jnp.asarray(2.0)
    value_fn = functools.partial(quadratic, target=1.0)
    other = functools.partial(quadratic, target=-3.0)
    want = -0.1 * ((2.0 - 0.2 * 5.0) - 1.0)
    by_argument, _ = tx.update(
        jnp.nan, tx.init(x), x, value_fn=value_fn, extrapolation_value_fn=other
    )
    by_gradient, _ = tx.update(jax.grad(other)(x), tx.init(x), x, value_fn=value_fn)
    np.testing.assert_allclose([by_argument, by_gradient], want, rtol=1e-12)


def test_extragradient_converges_where_gradient_descent_cycles():
    """The bilinear game min_x max_y x y, through its sign-flipped gradient field."""

    def field(p):
        stop = jax.lax.stop_gradient
        return p["x"] * stop(p["y"]) - p["y"] * stop(p["x"])

    start = {"x": jnp.ones(()), "y": jnp.ones(())}
    extra, _ = iterate(oa.extragradient(optax.sgd(0.3), 0.3), 200, start, field)
    plain, _ = iterate(optax.sgd(0.3), 200, start, field, extra=False)

    def norm(p):
        return float(jnp.hypot(p["x"], p["y"]))

    assert norm(extra[-1]) < 1e-3 < 1 < norm(plain[-1])


# -- noise ----------------------------------------------------------------------------------------


def noise_of(direction, params, **kwargs):
    """The direction taken, read off the gradient of a quadratic at the extrapolated point."""
    tx = oa.extragradient(optax.sgd(1.0), 1.0, direction, **kwargs)

    def square(p):
        return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    updates, state = tx.update(params, tx.init(params), params, value_fn=square)
    return jax.tree.map(lambda p, u: p + u, params, updates), state


def test_noise_has_the_stated_distribution():
    params = {"a": jnp.ones((200, 300)), "b": jnp.zeros(())}
    gaussian, _ = noise_of("gaussian", params)
    uniform, _ = noise_of("uniform", params)
    assert abs(float(gaussian["a"].mean())) < 0.02
    assert abs(float(gaussian["a"].std()) - 1) < 0.02
    assert float(jnp.abs(uniform["a"]).max()) <= 1
    assert abs(float(uniform["a"].std()) - 3**-0.5) < 0.02


@pytest.mark.parametrize("direction", ["filter_gaussian", "filter_uniform"])
def test_filter_noise_has_the_norm_of_each_filter(direction):
    params = {
        "conv": jax.random.normal(jax.random.key(0), (3, 3, 4, 5)),
        "bias": jnp.array([0.5, -2.0, 0.0]),
    }
    noise, _ = noise_of(direction, params)
    norms = [np.linalg.norm(np.reshape(t["conv"], (-1, 5)), axis=0) for t in (noise, params)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    np.testing.assert_allclose(np.abs(noise["bias"]), np.abs(params["bias"]), rtol=1e-3, atol=1e-6)


def test_replicas_draw_their_own_noise():
    def values(axis_name, params):
        tx = oa.extragradient(optax.sgd(1.0), 0.5, "gaussian", axis_name=axis_name)

        def worker(x):
            return tx.update(x, tx.init(x), x, value_fn=jnp.sum)[1].objective_value

        return jax.vmap(worker, axis_name="workers")(params)

    params = jnp.zeros((4, 3))
    local, shared = values("workers", params), values(None, params)
    # Without an axis all draw the same noise; with one, the mean over four different draws.
    assert jnp.all(shared == shared[0])
    assert jnp.all(local == local[0])
    assert abs(float(local[0] - shared[0])) > 1e-3


# -- options --------------------------------------------------------------------------------------


def test_trust_ratio_scales_matrices_to_their_norm(x64):
    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.ones(2), "zero": jnp.zeros((2, 2))}
    grads = {"w": jnp.full((2, 2), 0.01), "b": jnp.ones(2), "zero": jnp.ones((2, 2))}
    tx = oa.extragradient(optax.sgd(1.0), 0.1, trust_ratio=True)

    def square(p):
        return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    updates, _ = tx.update(grads, tx.init(params), params, value_fn=square)
    halves = jax.tree.map(jnp.negative, updates)  # the gradient is the point itself
    np.testing.assert_allclose(halves["w"], 3 - 0.1 * 3)
    np.testing.assert_allclose(halves["b"], 0.9)
    np.testing.assert_allclose(halves["zero"], -0.1)


@pytest.mark.parametrize(
    "mask", [{"w": True, "v": False}, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)]
)
def test_mask_extrapolates_only_what_it_selects(mask):
    tx = oa.extragradient(optax.sgd(1.0), 0.5, mask=mask)

    def square(p):
        return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=square)
    np.testing.assert_allclose(updates["w"], -0.5 * PARAMS["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["v"], -PARAMS["v"], rtol=1e-6)


def test_value_is_the_loss_at_the_extrapolated_point(x64):
    tx = oa.extragradient(optax.sgd(0.1), 0.5)
    x = jnp.asarray(2.0)
    state = tx.init(x)
    assert state.objective_value == jnp.inf
    _, state = tx.update(x, state, x, value_fn=lambda p: 0.5 * p**2)
    np.testing.assert_allclose(state.objective_value, 0.5, rtol=1e-6)


def test_curvature_methods_work_inside():
    inner = oa.bulk_sgd(0.1, 1)
    tx = oa.extragradient(inner, 0.0)
    params = jnp.ones(3)

    def loss(p):
        return 0.5 * jnp.sum(jnp.array([10.0, 1, 0.1]) * p**2)

    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    np.testing.assert_allclose(updates, [0, -0.1, -0.01], atol=1e-5)


def test_fresh_gradients_are_the_only_cost_of_past_extrapolation():
    """Under jit the unused incoming gradient is not computed."""
    weights = jnp.ones((64, 64))

    def loss(p):
        return jnp.sum(jnp.tanh(weights @ p))

    def flops(tx):
        params = jnp.ones((64, 8))
        state = tx.init(params)

        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
            return optax.apply_updates(params, updates), state

        return jax.jit(step).lower(params, state).compile().cost_analysis()["flops"]

    base = flops(oa.extragradient(optax.sgd(0.1), 0.1, "none"))
    assert flops(oa.extragradient(optax.sgd(0.1), 0.1, "past")) < 1.1 * base
    assert flops(oa.extragradient(optax.sgd(0.1), 0.1, "gradient")) < 2.1 * base


def test_errors_teach():
    with pytest.raises(ValueError, match="`direction` must be one of 'gradient', 'past'"):
        oa.extragradient(optax.sgd(0.1), 0.1, "sideways")
    with pytest.raises(TypeError, match="`inner` must be an Optax transformation, got None"):
        oa.extragradient(None, 0.1)
    with pytest.raises(TypeError, match="`learning_rate` must be a number or a schedule, got 'x'"):
        oa.extrap_sgd("x")
    with pytest.raises(TypeError, match="has dtype complex64"):
        oa.extrap_sgd(0.1).init(jnp.ones(2, jnp.complex64))
    with pytest.raises(ValueError, match="`extrapolation_rate` must lie in"):
        oa.extragradient(optax.sgd(0.1), -0.1)
    with pytest.raises(ValueError, match="leave `axis_name` out"):
        oa.extragradient(optax.sgd(0.1), 1.0, "inner_update", axis_name="batch")
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\)"):
        oa.extrap_sgd(0.1, momentum=1.0)
    tx = oa.extrap_sgd(0.1)
    with pytest.raises(ValueError, match=r"needs the extra argument `value_fn`"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
