"""YellowFin: golden values, properties of what it tunes, clipping, gradients that are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import optax_accel as oa
from optax_accel.momentum.yellowfin import _root_of_momentum, _tuned
from tests.helpers import tree_allclose, worked_example
from tests.momentum.test_quasi_hyperbolic import iterates

SCALES = jnp.array([1.0, 10.0])


def slope(params):
    return SCALES * params


def test_golden(x64):
    tx = oa.yellowfin(initial_learning_rate=0.01)
    want = [
        (101.000002, 0.09950371804, 0, 0.01),
        (90.98970433, 0.1019572792, 0.0006805640817, 0.0001042431464),
        (87.81795191, 0.1034098893, 0.001221461099, 0.0001590772641),
        (86.20568872, 0.1043973526, 0.001566213127, 0.0002140033668),
    ]
    params = jnp.ones(2)
    state = tx.init(params)
    after = worked_example("yellowfin")
    for step, (low, distance, momentum, rate) in enumerate(want):
        updates, state = tx.update(slope(params), state, params)
        params = optax.apply_updates(params, updates)
        inner = state[0]
        np.testing.assert_allclose(inner.curvature_range, [low, 101.000002], rtol=1e-9)
        np.testing.assert_allclose(
            inner.mean_distance / (1 - 0.999 ** (step + 1)), distance, rtol=1e-9
        )
        np.testing.assert_allclose(inner.tuned_momentum, momentum, rtol=1e-9)
        np.testing.assert_allclose(inner.tuned_learning_rate, rate, rtol=1e-9)
        np.testing.assert_allclose(params, after[step], rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_cubic_equation(x64, dtype):
    p = jnp.logspace(-12, 12, 49, dtype=dtype)
    got = _root_of_momentum(p)
    want = [
        scipy.optimize.brentq(lambda x, q=q: q * x - (1 - x) ** 3, 0, 1, xtol=1e-18)
        for q in np.float64(p)
    ]
    eps = jnp.finfo(dtype).eps
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=8 * eps)
    assert jnp.all(got > -8 * eps)
    one = _root_of_momentum(jnp.asarray(1.0, dtype))
    np.testing.assert_allclose(one, 0.3176721962, rtol=max(1e-9, 8 * eps))


def test_the_range_decides_without_noise(x64):
    """A tiny variance makes the first term 0; without a range, too, there is no momentum."""
    momentum, rate = _tuned(jnp.array([1.0, 100.0]), jnp.asarray(1e-12), jnp.asarray(1e6))
    np.testing.assert_allclose(momentum, (9 / 11) ** 2, rtol=1e-5)
    np.testing.assert_allclose(rate, (1 - 9 / 11) ** 2, rtol=1e-5)
    momentum, rate = _tuned(jnp.array([4.0, 4.0]), jnp.asarray(1e-12), jnp.asarray(1e6))
    assert momentum < 1e-9
    np.testing.assert_allclose(rate, 0.25, rtol=1e-5)


def test_a_larger_loss_gets_a_rate_smaller_by_its_square(x64):
    # Constants of the code are small against these gradients.
    states = [
        iterates(oa.yellowfin(1e-30), lambda p, c=c: c * slope(p), jnp.full(2, 1e3), 5)[1]
        for c in (1.0, 10.0)
    ]
    once, tenfold = (state[0] for state in states)
    np.testing.assert_allclose(tenfold.tuned_momentum, once.tuned_momentum, rtol=1e-3)
    np.testing.assert_allclose(
        100 * tenfold.tuned_learning_rate, once.tuned_learning_rate, rtol=1e-3
    )


def test_float32_follows_float64():
    def run(dtype):
        tx = oa.yellowfin(initial_learning_rate=0.01)
        return iterates(tx, lambda p: slope(p).astype(dtype), jnp.ones(2, dtype), 100)

    single, _ = run("float32")
    with jax.enable_x64(True):
        double, _ = run("float64")
    np.testing.assert_allclose(single, double, rtol=2e-4)


def test_exploding_gradients_are_clipped():
    tx = oa.scale_by_yellowfin()
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(jnp.array([3.0, 4.0]), state)
    before = state
    _, after = tx.update(jnp.array([3e6, 4e6]), before)
    # The statistics see ten times the largest norm of before, which was 5, the step sees that norm.
    np.testing.assert_allclose(after.recent_squared_norms[3], 50.0**2, rtol=1e-5)
    added = after.velocity - after.tuned_momentum * before.velocity
    np.testing.assert_allclose(added, [3, 4], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("after", [0, 3])
def test_what_is_not_finite_is_refused(bad, after):
    """Also a gradient whose square overflows float32."""
    tx = oa.yellowfin()
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    good = jax.tree.map(lambda p: p + 1, params)
    state = tx.init(params)
    for _ in range(after):
        _, state = tx.update(good, state, params)
    wrong = {**good, "b": jnp.asarray(bad, jnp.float32)}
    updates, refused = tx.update(wrong, state, params)
    tree_allclose(updates, optax.tree.zeros_like(params), rtol=0)
    assert refused[0].rejected == 1
    kept = refused[0]._replace(rejected=state[0].rejected)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), kept, state[0]))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"window": 0}, ValueError, "`window` must be at least 1"),
        ({"window": 2.5}, TypeError, "`window` must be an integer"),
        ({"decay": 1.0}, ValueError, r"`decay` must lie in \[0, 1\)"),
        ({"initial_learning_rate": 0.0}, ValueError, r"must lie in \(0, inf\), got 0.0"),
        ({"initial_momentum": -0.1}, ValueError, r"`initial_momentum` must lie in \[0, 1\)"),
    ],
)
def test_wrong_values(kwargs, error, message):
    with pytest.raises(error, match=message):
        oa.yellowfin(**kwargs)
