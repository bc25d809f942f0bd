"""The learning-rate range test on losses that are known."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa


def range_test(
    advance: Any, rates: Any, *, spacing: str = "exponential", **settings: Any
) -> oa.LearningRateCurve:
    """The test on a function of the rate."""
    return oa.learning_rate_range_test(
        lambda rate, _: (rate, advance(rate)),
        0.0,
        range(len(rates)),
        minimum=rates[0],
        maximum=rates[-1],
        num_steps=len(rates),
        spacing=spacing,
        set_learning_rate=lambda _, rate: rate,
        **settings,
    )


def replay(losses: Any) -> Any:
    """A training that meets the given losses, whatever the rates."""
    sequence = iter(losses)
    return lambda rate: next(sequence)


def test_a_quadratic_diverges_where_theory_says() -> None:
    """Gradient descent on c w**2 / 2 diverges beyond 2 / c: a rate for every curvature."""
    rates = np.geomspace(1e-6, 1e4, 400)
    for curvature in (0.1, 1.0, 100.0):
        w = 1.0

        def advance(rate: float, curvature: float = curvature) -> float:
            nonlocal w
            loss = curvature * w**2 / 2
            w -= rate * curvature * w
            return loss

        result = range_test(advance, rates, smoothing=0.3)
        assert result.suggestion is not None
        assert result.stopped_at is not None
        assert 0.01 / curvature < result.suggestion < 1 / curvature
        assert result.suggestion < result.lowest < result.stopped_at
        assert 2 / curvature < result.stopped_at
        assert len(result.rates) == len(result.losses) == len(result.smoothed) < 400


def test_the_suggestion_does_not_lag() -> None:
    """The middle of a smooth fall is found however strong the average."""
    rates = np.geomspace(1e-4, 1.0, 201)
    losses = 1 - np.tanh((np.arange(201) - 100) / 20) / 2
    for smoothing in (0.0, 0.5, 0.9):
        result = range_test(replay(losses), rates, smoothing=smoothing)
        assert result.suggestion == pytest.approx(rates[100])
        assert result.stopped_at is None


def test_noise_is_averaged() -> None:
    rates = np.geomspace(1e-4, 1.0, 201)
    smooth = 1 - np.tanh((np.arange(201) - 100) / 20) / 2
    noise = 0.05 * np.random.default_rng(0).standard_normal(201)

    def error(smoothing: float) -> float:
        result = range_test(replay(smooth + noise), rates, smoothing=smoothing)
        assert result.suggestion is not None
        return abs(math.log(result.suggestion / rates[100]))

    assert error(0.9) < 20 * math.log(rates[1] / rates[0]) < error(0.0)


def test_a_huge_last_loss_does_not_spoil_what_came_before() -> None:
    rates = np.geomspace(1e-4, 1.0, 41)
    losses = 1 - np.tanh((np.arange(41) - 20) / 4) / 2
    calm = range_test(replay(losses), rates)
    losses[-1] = 1e9
    wild = range_test(replay(losses), rates)
    assert wild.stopped_at == rates[-1]
    assert wild.suggestion == calm.suggestion == pytest.approx(rates[20], rel=0.3)


def test_the_average_has_no_bias() -> None:
    result = range_test(replay([3.0] * 10), np.arange(1.0, 11.0), spacing="linear", smoothing=0.99)
    np.testing.assert_allclose(result.smoothed, 3.0, rtol=1e-12)
    assert (result.suggestion, result.lowest, result.stopped_at) == (None, 1.0, None)


def test_the_end_is_where_the_average_leaves() -> None:
    # Averages with weight 1/2 and bias correction: 1, 1, 1, 29/15, 117/31 and 245/63 < 4, 501/127.
    losses = [1.0] * 3 + [2.75, 5.5, 4.0, 4.0] + [9.0] * 3
    result = range_test(replay(losses), np.arange(1.0, 11.0), spacing="linear", smoothing=0.5)
    average, weight, expected = 0.0, 0.0, None
    for rate, loss in enumerate(losses, 1):
        average, weight = 0.5 * average + 0.5 * loss, 0.5 * weight + 0.5
        if average / weight > 4:
            expected = float(rate)
            break
    assert expected == 8.0
    assert result.stopped_at == expected
    assert len(result.losses) == 8  # the one that showed it is kept
    assert (
        range_test(
            replay(losses), np.arange(1.0, 11.0), spacing="linear", smoothing=0.5, stop_factor=9
        ).stopped_at
        is None
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_ends_the_test(bad: float) -> None:
    result = range_test(
        replay([3.0, 2.0, 1.0, bad, 0.0]), np.arange(1.0, 6.0), spacing="linear", smoothing=0.0
    )
    assert result.stopped_at == 4.0
    np.testing.assert_array_equal(result.losses, [3, 2, 1])
    with pytest.raises(ValueError, match="not finite before the first step"):
        range_test(replay([bad, 1.0]), [0.1, 0.2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 1}, "`num_steps` must be at least 2"),
        ({"minimum": 0.0}, r"`minimum` must lie in \(0, inf\), got 0.0"),
        ({"maximum": 1e-6}, r"`maximum` must lie in \(1e-05, inf\), got 1e-06"),
        ({"spacing": "log"}, "`spacing` must be 'exponential' or 'linear', got 'log'"),
        ({"smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\), got 1.0"),
        ({"stop_factor": 1.0}, r"`stop_factor` must lie in \(1, inf\), got 1.0"),
        ({}, "no injected learning rate: build the optimizer with inject_hyperparams"),
    ],
)
def test_wrong_arguments(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oa.learning_rate_range_test(lambda state, _: (state, 1.0), {}, range(9), **settings)


def make_step(learning_rate: Any, **jit: Any) -> tuple[Any, Any]:
    """SGD with momentum on w ** 2, and its state."""
    tx = oa.inject_hyperparams(optax.sgd)(learning_rate=learning_rate, momentum=0.5)

    def step(state: Any, batch: Any) -> Any:
        w, opt_state = state
        loss, grads = jax.value_and_grad(lambda w: batch * jnp.sum(w**2))(w)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(w, updates), opt_state), loss

    w = jnp.ones(2)
    return jax.jit(step, **jit), (w, tx.init(w))


def test_the_rate_is_injected_and_the_state_stays() -> None:
    step, state = make_step(0.25, donate_argnums=0)
    curve = oa.learning_rate_range_test(step, state, [1.0] * 60, num_steps=60, smoothing=0.5)
    # Heavy ball on a curvature of 2 diverges beyond 2 (1 + momentum) / 2.
    assert curve.suggestion is not None
    assert curve.stopped_at is not None
    assert 0.01 < curve.suggestion < 1.5 < curve.stopped_at
    assert curve.conservative_suggestion == curve.lowest / 10
    assert step._cache_size() == 1
    np.testing.assert_array_equal(state[0], np.ones(2))
    assert float(state[1].hyperparams["learning_rate"]) == 0.25


def test_what_a_step_may_not_do() -> None:
    step, state = make_step(optax.linear_schedule(0.1, 0.0, 10))
    with pytest.raises(ValueError, match="constant learning rate in place of a schedule"):
        oa.learning_rate_range_test(step, state, [1.0] * 9, num_steps=9)
    step, state = make_step(0.1)
    with pytest.raises(ValueError, match="`batches` has fewer than num_steps=9"):
        oa.learning_rate_range_test(step, state, [1.0] * 3, num_steps=9)
    with pytest.raises(ValueError, match=r"the loss, a scalar; got shape \(2,\)"):
        oa.learning_rate_range_test(lambda s, b: (s, jnp.ones(2)), state, [1.0] * 9, num_steps=9)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda state, _: 1.0, "and the loss, a scalar; got float"),
        (lambda state, _: (state, 1.0, {}), "and the loss, a scalar; got tuple of 3"),
        (lambda state, _: (1.0, state), "in this order; the second is of type tuple"),
        (3, "`step` must be a function of state and batch, got 3"),
    ],
)
def test_what_a_step_has_to_return(step: Any, message: str) -> None:
    _, state = make_step(0.1)
    with pytest.raises(TypeError, match=message):
        oa.learning_rate_range_test(step, state, [1.0] * 9, num_steps=9)
    with pytest.raises(TypeError, match="`batches` must be a sequence of mini-batches, got 9"):
        oa.learning_rate_range_test(lambda state, _: (state, 1.0), state, 9)  # type: ignore[arg-type]
