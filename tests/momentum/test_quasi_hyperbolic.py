"""QHM and QHAdam: golden values, the methods that they contain, long runs in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import tree_allclose, worked_example


def iterates(tx, gradient, params, steps):
    """What a method makes of a gradient function, step after step."""
    state, result = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        result.append(params)
    return result, state


def slope(params):
    """The gradient of a quadratic of curvatures 1, 3 and 10 with another slope at the origin."""
    return jax.tree.map(lambda x, c: c * x + 0.1, params, CURVATURES)


CURVATURES = {"a": jnp.array([1.0, 3.0]), "b": jnp.array(10.0)}
START = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}


def both(left, right, steps=20, rtol=1e-13):
    start = jax.tree.map(lambda x: jnp.asarray(x, float), START)
    ours, theirs = (iterates(tx, slope, start, steps)[0] for tx in (left, right))
    tree_allclose(ours, theirs, rtol=rtol, atol=1e-15)


def test_golden_qhm(x64):
    params, state = iterates(oa.qhm(0.1, 0.9, 0.7), lambda p: p, jnp.asarray(1.0), 4)
    np.testing.assert_allclose(params, worked_example("qhm"), rtol=1e-9)
    np.testing.assert_allclose(optax.tree.get(state, "mu"), 0.3213244647, rtol=1e-9)


def test_golden_qh_adam(x64):
    gradients = iter([1.0, -1.998, 0.9996020652])
    tx = oa.qh_adam(1e-3)
    param = jnp.asarray(1.0)
    state, got = tx.init(param), []
    for gradient in gradients:
        update, state = tx.update(jnp.asarray(gradient), state, param)
        param = param + update
        got.append([optax.tree.get(state, "mu"), optax.tree.get(state, "nu"), param])
    want = [
        [1.0, 1.0, 0.999],
        [-0.5027568922, 2.4967503752, 0.9996020652],
        [0.0005417259, 1.9970688314, 0.9993895937],
    ]
    # Ten decimal places, of the gradients too.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


def test_methods_that_qhm_contains(x64):
    both(oa.qhm(0.05, 0.9, 0.0), optax.sgd(0.05), rtol=1e-15)
    dampened = optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(0.05))
    both(oa.qhm(0.05, 0.9, 1.0), dampened, rtol=1e-14)
    both(oa.qhm(0.05 / (1 - 0.9), 0.9, 0.9), optax.sgd(0.05, 0.9, nesterov=True))


def test_qh_adam_contains_adam(x64):
    both(oa.qh_adam(0.05, 0.9, 0.99, 1.0, 1.0), optax.adam(0.05, 0.9, 0.99), rtol=1e-12)


def test_no_mean_at_all_is_the_sign(x64):
    updates, _ = iterates(oa.qh_adam(0.1, nu1=0.0, nu2=0.0), lambda p: p, jnp.asarray(-3.0), 1)
    np.testing.assert_allclose(updates, [-2.9], rtol=1e-8)


@pytest.mark.parametrize("decay", [0.999, 0.99999])
def test_means_keep_their_digits_in_float32(decay):
    """Of equal gradients the corrected moments are those gradients, after any number of steps."""
    tx = oa.scale_by_qh_adam(decay, decay)
    state = tx.init(jnp.zeros(()))
    for count in (0, 1, 1_000, 10_000_000):
        at = state._replace(count=jnp.int32(count), mu=jnp.float32(2), nu=jnp.float32(4))
        _, new = tx.update(jnp.float32(2), at)
        assert (float(new.mu), float(new.nu)) == (2, 4)
        # The weight of another gradient is (1 - b) / (1 - b ** t), here in float64.
        _, new = tx.update(jnp.float32(3), at)
        weight = (1 - decay) / -np.expm1((count + 1) * np.log(decay))
        np.testing.assert_allclose(new.mu - 2, weight, rtol=1e-6, atol=2e-7)


def pid(proportional, integral, derivative):
    """``theta += -k_p g - k_i sum(g) - k_d (g - g_before)``, each filtered by QHM's beta."""
    beta = derivative / (derivative - proportional)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return {"error": zeros, "sum": zeros, "filtered": zeros, "signal": zeros}

    def update(updates, state, params=None):
        del params
        total = optax.tree.add(state["sum"], updates)
        change = optax.tree.sub(updates, state["error"])
        filtered = jax.tree.map(lambda d, c: beta * d + (1 - beta) * c, state["filtered"], change)
        signal = jax.tree.map(
            lambda e, s, d: proportional * e + integral * s + derivative * d,
            updates,
            total,
            filtered,
        )
        step = optax.tree.sub(state["signal"], signal)
        new = {"error": updates, "sum": total, "filtered": filtered, "signal": signal}
        return step, new

    return optax.GradientTransformation(init, update)


def test_pid(x64):
    both(oa.qhm(*oa.qhm_from_pid(-0.05, 0.04, 0.3)), pid(-0.05, 0.04, 0.3), rtol=1e-11)


def synthesized_nesterov(rate, b1, b2):
    """``y = x + b2 (x - x_before); x_next = x + b1 (x - x_before) - rate grad(y)``, at y."""

    def init(params):
        return {"now": params, "before": params}

    def update(updates, state, params=None):
        now = jax.tree.map(
            lambda x, old, g: x + b1 * (x - old) - rate * g, state["now"], state["before"], updates
        )
        point = jax.tree.map(lambda x, old: x + b2 * (x - old), now, state["now"])
        return optax.tree.sub(point, params), {"now": now, "before": state["now"]}

    return optax.GradientTransformation(init, update)


def test_synthesized_nesterov(x64):
    ours = oa.qhm(*oa.qhm_from_synthesized_nesterov(0.05, 0.9, 0.6))
    both(ours, synthesized_nesterov(0.05, 0.9, 0.6), rtol=1e-11)


def accsgd(delta, kappa, xi, eps):
    """The authors' rule: a long step of the average, a short step of the point."""
    ratio = 1 - eps**2 * xi / kappa

    def init(params):
        return {"average": params}

    def update(updates, state, params=None):
        long = delta * kappa / eps
        average = jax.tree.map(
            lambda w, p, g: ratio * w + (1 - ratio) * (p - long * g),
            state["average"],
            params,
            updates,
        )
        share = eps / (eps + 1 - ratio)
        new = jax.tree.map(
            lambda w, p, g: share * (p - delta * g) + (1 - share) * w, average, params, updates
        )
        return optax.tree.sub(new, params), {"average": average}

    return optax.GradientTransformation(init, update)


def test_accsgd(x64):
    both(oa.qhm(*oa.qhm_from_accsgd(0.05, 100.0, 5.0)), accsgd(0.05, 100.0, 5.0, 0.7), rtol=1e-11)


def test_nadam():
    assert oa.qh_adam_from_nadam(0.1, 0.8, 0.9) == (0.1, 0.8, 0.9, 0.8, 1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: oa.qhm(0.1, beta=1.0), r"`beta` must lie in \[0, 1\), got 1.0"),
        (lambda: oa.qhm(0.1, nu=float("nan")), "`nu` must lie in"),
        (lambda: oa.qh_adam(0.1, nu2=1.5), r"`nu2` must lie in \[0, 1\], got 1.5"),
        (lambda: oa.qhm_from_pid(0.0, 0.1, 0.0), "`derivative` must be neither 0"),
        (lambda: oa.qhm_from_pid(0.1, 0.1, 0.9), r"beta.*must lie in \[0, 1\)"),
        (lambda: oa.qhm_from_accsgd(0.1, 4.0, 3.0), r"`xi` must lie in \(0, 2.0\], got 3.0"),
    ],
)
def test_wrong_values(build, message):
    with pytest.raises(ValueError, match=message):
        build()
