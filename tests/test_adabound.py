"""AdaBound: a simulation, golden values, limit cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import tree_allclose, tree_equal

# Elements whose gradients differ by orders of magnitude, so that some rates are clipped from below
# and some from above, and gradients that shrink, so that the maximum of AMSBound differs.
START = np.array([1.0, -0.3, 1e-3])
SCALES = np.array([30.0, 1.0, 1e-2])


def gradient(p, t):
    return SCALES * np.asarray(p) / (1 + 0.3 * t)


def simulate(steps, rate, *, f=0.1, b1=0.9, b2=0.999, gamma=1e-3, eps=1e-8, amsbound=False):
    """The rule in NumPy; `rate` is a function of the zero-based step."""
    p, m, v, top = START.copy(), np.zeros(3), np.zeros(3), np.zeros(3)
    points, clipped = [], set()
    for t in range(1, steps + 1):
        g = gradient(p, t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        top = np.maximum(top, v)
        root = np.sqrt(top if amsbound else v)
        free = rate(t - 1) * np.sqrt(1 - b2**t) / (1 - b1**t) / (root + eps)
        final = f * rate(t - 1) / rate(0)
        low, high = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
        clipped |= {("low", "free", "high")[int(x >= low) + int(x > high)] for x in free}
        p = p - np.clip(free, low, high) * m
        points.append(p)
    return points, clipped


def run(tx, steps):
    p = jnp.asarray(START)
    state = tx.init(p)
    points = []
    for t in range(1, steps + 1):
        updates, state = tx.update(jnp.asarray(gradient(p, t)), state, p)
        p = optax.apply_updates(p, updates)
        points.append(np.asarray(p))
    return points, state


@pytest.mark.parametrize("amsbound", [False, True])
@pytest.mark.parametrize(
    ("rate", "settings"),
    [
        (0.003, {"gamma": 0.5}),
        (0.003, {"gamma": 0.02, "b1": 0.0, "eps": 1e-3}),
        (optax.exponential_decay(0.003, 1, 0.8), {"gamma": 0.05, "b2": 0.9, "f": 0.02}),
    ],
)
def test_steps_are_those_of_the_simulation(x64, rate, settings, amsbound):
    arguments = {
        "final_learning_rate" if name == "f" else name: value for name, value in settings.items()
    }
    points, state = run(oa.adabound(rate, amsbound=amsbound, **arguments), 20)
    as_schedule = (lambda t: float(rate(t))) if callable(rate) else lambda t: rate
    want, clipped = simulate(20, as_schedule, amsbound=amsbound, **settings)
    assert clipped == {"low", "free", "high"}
    # Optax's schedules divide 32-bit counts into 32-bit rates.
    np.testing.assert_allclose(points, want, rtol=1e-6 if callable(rate) else 1e-12)
    assert (optax.tree.get(state, "nu_max") is not None) == amsbound


def test_golden_first_step(x64):
    """By hand, the defaults: m = 0.1 g and rate 10 / |g|, within [0.0999, 1.001e5]."""
    tx = oa.scale_by_adabound(eps=0.0)
    grads = jnp.array([1.0, 1000.0, 1e-5])
    steps, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(steps, [1.0, 1e4 * (1 - 1 / 1.001), 1e-6 * 1.001e5])
    np.testing.assert_allclose(state.nu, [1e-3, 1e3, 1e-13])


def adam_rate(rate, b2):
    """Our eps is added before the bias correction of the second moment: it is part of the rate."""
    return lambda count: rate * jnp.sqrt(1 - b2 ** (count + 1.0))


def test_without_bounds_it_is_adam(x64):
    """For gamma near 0 the bounds stay at 0 and infinity."""
    ours, _ = run(oa.adabound(0.01, gamma=1e-30, eps=0.0), 20)
    theirs, _ = run(optax.adam(0.01, eps=0.0), 20)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-16)


def test_without_bounds_amsbound_is_amsgrad(x64):
    """With an eps that matters; Optax's AMSGrad without the correction of the second moment."""
    ours, _ = run(oa.adabound(0.01, gamma=1e-30, eps=0.1, b2=0.9, amsbound=True), 20)
    amsgrad = optax.amsgrad(adam_rate(0.01, 0.9), b2=0.9, eps=0.1, bias_correction_nu=False)
    theirs, _ = run(amsgrad, 20)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    adam, _ = run(oa.adabound(0.01, gamma=1e-30, eps=0.1, b2=0.9), 20)
    assert np.max(np.abs(np.subtract(ours, adam))) > 1e-3


@pytest.mark.parametrize("amsbound", [False, True])
def test_with_closed_bounds_it_is_sgd_with_averaging_momentum(x64, amsbound):
    schedule = optax.linear_schedule(0.003, 0.0, 20)  # the final rate goes with it
    ours, _ = run(
        oa.adabound(schedule, final_learning_rate=0.02, gamma=1e30, amsbound=amsbound), 20
    )
    sgd = optax.chain(
        optax.ema(0.9, debias=False),
        optax.sgd(lambda t: 0.02 * jnp.float64(schedule(t)) / jnp.float64(schedule(0))),
    )
    np.testing.assert_allclose(ours, run(sgd, 20)[0], rtol=1e-12)


def test_base_learning_rate(x64):
    """What the bounds are scaled by: given, it serves schedules from 0 and injected ones."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.003, 5, 20)
    tx = oa.adabound(schedule, gamma=0.5, base_learning_rate=0.003)
    points, _ = run(tx, 10)
    np.testing.assert_array_equal(points[0], START)  # the rate is 0: so are the bounds
    injected = oa.inject_hyperparams(oa.adabound)(schedule, gamma=0.5, base_learning_rate=0.003)
    np.testing.assert_allclose(run(injected, 10)[0], points, rtol=1e-6)
    unscaled, _ = run(oa.inject_hyperparams(oa.adabound)(schedule, gamma=0.5), 10)
    constant, _ = run(oa.adabound(0.003, gamma=0.5, base_learning_rate=0.006), 10)
    halved, _ = run(oa.adabound(0.003, final_learning_rate=0.05, gamma=0.5), 10)
    assert np.max(np.abs(np.subtract(unscaled, points))) > 1e-3
    np.testing.assert_allclose(constant, halved, rtol=1e-12)


@pytest.mark.parametrize("amsbound", [False, True])
def test_pytrees_and_dtypes(amsbound):
    """bf16 beside float32, complex numbers, empty leaves, a zero gradient; under jit and vmap."""
    params = {
        "bf16": jnp.ones(3, jnp.bfloat16),
        "f32": jnp.array(-2.0),
        "complex": jnp.array([1 + 2j, -1j]),
        "empty": jnp.zeros((0, 2)),
        "zero": jnp.zeros(2),
        "none": None,
        "nothing": {},
    }
    tx = oa.adabound(0.01, amsbound=amsbound)

    def step(params, state):
        updates, state = tx.update(params, state, params, unknown=None)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    assert optax.tree.get(state, "nu")["complex"].dtype == jnp.float32
    want, after = step(params, state)
    first, _ = tx.update(params, state, params)
    assert jax.tree.map(jnp.result_type, (want, after)) == jax.tree.map(
        jnp.result_type, (params, state)
    )
    # The first step has the learning rate's length, against the gradient's direction.
    for name, rtol in (("bf16", 2**-8), ("f32", 1e-5), ("complex", 1e-5), ("zero", 0)):
        direction = params[name] / jnp.maximum(abs(params[name]), 1e-30)
        np.testing.assert_allclose(
            first[name].astype(jnp.complex64), -0.01 * direction.astype(jnp.complex64), rtol=rtol
        )
    jitted, _ = jax.jit(step)(params, state)
    tree_allclose(jitted, want, rtol=1e-6)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (params, state))
    several, _ = jax.vmap(step)(*stacked)
    tree_equal(jax.tree.map(lambda x: x[1], several), want)


def test_mu_dtype():
    state = oa.adabound(1e-3, mu_dtype=jnp.bfloat16).init(jnp.ones(3))
    assert optax.tree.get(state, "mu").dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.int32, "bool", "no_dtype"])
def test_a_moment_that_cannot_hold_fractions_is_an_error(dtype: object) -> None:
    with pytest.raises(TypeError, match="`mu_dtype` must be a"):
        oa.adabound(0.1, mu_dtype=dtype)
