"""The learning-rate range test on losses that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from experiments.training.studies.range_test import range_test


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
    result = range_test(replay([3.0] * 10), np.arange(1.0, 11.0), smoothing=0.99)
    np.testing.assert_allclose(result.smoothed, 3.0, rtol=1e-12)
    assert (result.suggestion, result.lowest, result.stopped_at) == (None, 1.0, None)


def test_the_end_is_where_the_average_leaves() -> None:
    # Averages with weight 1/2 and bias correction: 1, 1, 1, 29/15, 117/31 and 245/63 < 4, 501/127.
    losses = [1.0] * 3 + [2.75, 5.5, 4.0, 4.0] + [9.0] * 3
    result = range_test(replay(losses), np.arange(1.0, 11.0), smoothing=0.5)
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
        range_test(replay(losses), np.arange(1.0, 11.0), smoothing=0.5, stop_factor=9).stopped_at
        is None
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_ends_the_test(bad: float) -> None:
    result = range_test(replay([3.0, 2.0, 1.0, bad, 0.0]), np.arange(1.0, 6.0), smoothing=0.0)
    assert result.stopped_at == 4.0
    np.testing.assert_array_equal(result.losses, [3, 2, 1])
    with pytest.raises(ValueError, match="not finite before the first step"):
        range_test(replay([bad, 1.0]), [0.1, 0.2])


@pytest.mark.parametrize(
    ("rates", "settings", "message"),
    [
        ([0.1], {}, "at least two positive numbers that rise"),
        ([0.0, 0.1], {}, "at least two positive numbers that rise"),
        ([0.2, 0.1], {}, "at least two positive numbers that rise"),
        ([0.1, math.inf], {}, "`rates` must be finite"),
        ([0.1, 0.2], {"smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\), got 1.0"),
        ([0.1, 0.2], {"stop_factor": 1.0}, "`stop_factor` must be more than 1, got 1.0"),
    ],
)
def test_wrong_arguments(rates: list[float], settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        range_test(replay([1.0] * 9), rates, **settings)
