"""Demon: golden values of the schedule and both algorithms, limit cases."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import worked_example


def run(tx, steps, param=1.0):
    """Iterates of a method on theta**2 / 2, whose gradient is theta."""
    param = jnp.asarray(param)
    state = tx.init(param)
    update = jax.jit(tx.update)
    iterates = []
    for _ in range(steps):
        updates, state = update(param, state, param)
        param = optax.apply_updates(param, updates)
        iterates.append(float(param))
    return iterates, state


# -- the schedule ---------------------------------------------------------------------------------


def test_golden_schedule(x64):
    want = [
        0.9,
        0.8901098901,
        0.8780487805,
        0.8630136986,
        0.84375,
        0.8181818182,
        0.7826086957,
        0.7297297297,
        0.6428571429,
        0.4736842105,
        0.0,
    ]
    got = jax.vmap(oa.demon_schedule(0.9, 10))(jnp.arange(11))
    np.testing.assert_allclose(got, want, atol=5e-11)
    schedule = oa.demon_schedule(0.95, 10)
    np.testing.assert_allclose([schedule(5), schedule(9)], [0.9047619048, 0.6551724138], atol=5e-11)


def test_influence_of_a_gradient_falls_linearly(x64):
    beta = jax.vmap(oa.demon_schedule(0.9, 100))(jnp.arange(101))
    np.testing.assert_allclose(beta / (1 - beta), np.linspace(9, 0, 101), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [10, 11, 12, 10**6, np.iinfo(np.int32).max])
def test_schedule_stays_zero_after_the_end(count):
    # The bare formula turns negative and is singular at t / T = 1 / beta.
    assert oa.demon_schedule(0.9, 10)(jnp.asarray(count)) == 0


def test_delay_shifts_the_schedule(x64):
    delayed, plain = oa.demon_schedule(0.9, 14, delay_steps=4), oa.demon_schedule(0.9, 10)
    counts = jnp.arange(11)
    np.testing.assert_allclose(jax.vmap(delayed)(counts + 4), jax.vmap(plain)(counts), rtol=1e-14)
    np.testing.assert_array_equal(jax.vmap(delayed)(jnp.arange(5)), 0.9)


def test_one_step_of_decay_and_no_momentum():
    schedule = oa.demon_schedule(0.9, 1)
    assert (schedule(0), schedule(1)) == (pytest.approx(0.9), 0)
    assert oa.demon_schedule(0.0, 5)(2) == 0


# -- the algorithms -------------------------------------------------------------------------------


@pytest.mark.parametrize("learning_rate_in_momentum", [False, True])
def test_golden_demon_sgd(x64, learning_rate_in_momentum):
    iterates, state = run(
        oa.demon_sgd(0.1, decay_steps=4, learning_rate_in_momentum=learning_rate_in_momentum), 5
    )
    np.testing.assert_allclose(iterates, worked_example("demon_sgd"), atol=5e-11)
    buffer = optax.tree.get(state, "trace") * (1 if learning_rate_in_momentum else -0.1)
    np.testing.assert_allclose(buffer, -0.0304783284, atol=5e-11)


@pytest.mark.parametrize(
    ("nu_bias_correction", "want"),
    [
        (None, [0.6837738151, 0.2777899366, -0.1168595889, -0.3593711506]),
        (True, worked_example("demon_adam")),
    ],
)
def test_golden_demon_adam(x64, nu_bias_correction, want):
    tx = oa.demon_adam(0.01, decay_steps=4, nu_bias_correction=nu_bias_correction)
    iterates, state = run(tx, 4)
    np.testing.assert_allclose(iterates, want, atol=1e-10)
    if nu_bias_correction is None:
        np.testing.assert_allclose(optax.tree.get(state, "mu"), 0.9561143261, atol=1e-10)
    np.testing.assert_allclose(optax.tree.get(state, "momentum"), 0.6923076923, atol=1e-10)


def test_constant_momentum_gives_the_optax_methods(x64):
    constant = optax.constant_schedule(0.9)
    for ours, theirs in (
        (oa.with_schedules(optax.sgd, momentum=constant)(0.1), optax.sgd(0.1, 0.9)),
        (oa.demon_adam(0.1, constant, decay_steps=1, form="ema"), optax.adam(0.1)),
        # In the paper's form a constant momentum is Adam at 1 / (1 - beta) times the rate, without
        # the bias correction of the first moment.
        (
            oa.demon_adam(0.01, constant, decay_steps=1, nu_bias_correction=True),
            optax.chain(
                optax.trace(0.9),
                _adam_denominator(),
                optax.scale_by_learning_rate(0.01),
            ),
        ),
    ):
        np.testing.assert_allclose(run(ours, 10)[0], run(theirs, 10)[0], rtol=1e-10)


def _adam_denominator():
    """Divides by Adam's corrected second moment of the *raw* gradient, for a gradient theta."""

    def init(params):
        return (jnp.zeros(()), jnp.zeros(()))

    def update(updates, state, params):
        count, nu = state[0] + 1, 0.999 * state[1] + 0.001 * params**2
        return updates / (jnp.sqrt(nu / (1 - 0.999**count)) + 1e-8), (count, nu)

    return optax.GradientTransformation(init, update)


def test_ema_form_is_unbiased_for_a_constant_gradient(x64):
    # With gradient 1 throughout, the corrected first moment is exactly 1 at every step.
    tx = oa.scale_by_demon_adam(decay_steps=5, form="ema", eps=0.0)
    state = tx.init(jnp.zeros(()))
    for _ in range(8):
        update, state = tx.update(jnp.ones(()), state)
        np.testing.assert_allclose(update, 1, rtol=1e-12)


def test_momentum_of_the_last_step_is_plain_sgd(x64):
    iterates, _ = run(oa.demon_sgd(0.1, decay_steps=1), 2)
    # First step with momentum 0.9 (an empty buffer), then without any.
    np.testing.assert_allclose(iterates, [0.9, 0.81], rtol=1e-12)


def test_nesterov_is_optax_nesterov(x64):
    got = run(oa.demon_sgd(0.1, nesterov=True, decay_steps=10**9), 5)[0]
    want = run(optax.sgd(0.1, 0.9, nesterov=True), 5)[0]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_state_can_be_read():
    tx = oa.demon_sgd(0.1, decay_steps=4)
    state = tx.init(jnp.zeros(2))
    assert optax.tree.get(state, "momentum") == pytest.approx(0.9)
    assert (
        optax.tree.get(oa.demon_adam(0.1, decay_steps=4).init(jnp.zeros(2)), "momentum_product")
        == 1
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oa.demon_schedule(1.0, 10), r"`init_value` must lie in \[0, 1\), got 1.0"),
        (lambda: oa.demon_schedule(-0.1, 10), "`init_value` must lie in"),
        (lambda: oa.demon_schedule(float("nan"), 10), "`init_value` must lie in"),
        (lambda: oa.demon_schedule(0.9, 0), "`decay_steps` must be at least 1, got 0"),
        (lambda: oa.demon_schedule(0.9, 5, 5), "`delay_steps` must be less than `decay_steps`"),
        (lambda: oa.demon_sgd(0.1, momentum=2, decay_steps=10), "must lie in"),
        (lambda: oa.demon_adam(0.1, decay_steps=10, b2=1.0), r"`b2` must lie in \[0, 1\), got 1.0"),
        (lambda: oa.demon_adam(0.1, decay_steps=10, eps=-1), r"`eps` must lie in"),
        (
            lambda: oa.demon_adam(0.1, decay_steps=10, form="box"),
            "`form` must be one of 'paper', 'ema'",
        ),
    ],
)
def test_bad_hyperparameters_raise_at_construction(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_fraction_of_steps_is_a_type_error():
    with pytest.raises(TypeError, match=r"`decay_steps` must be an integer, got 10\.5"):
        oa.demon_schedule(0.9, 10.5)


def test_rivals_are_one_line_each():
    for schedule in (
        optax.cosine_decay_schedule(0.9, 10),
        optax.linear_schedule(0.9, 0.0, 10),
        optax.exponential_decay(0.9, 10, 0.01),
        oa.demon_schedule(0.9, 10),
    ):
        for factory, name in (
            (optax.sgd, "momentum"),
            (optax.adam, "b1"),
            (optax.adamw, "b1"),
            (functools.partial(optax.lion, b2=0.99), "b1"),
        ):
            tx = oa.with_schedules(factory, **{name: schedule})(learning_rate=0.01)
            iterates, state = run(tx, 4)
            assert np.isfinite(iterates).all()
            np.testing.assert_allclose(optax.tree.get(state, name), schedule(3), rtol=1e-6)
