"""The learning-rate range test: a short training while the rate rises, and what it suggests.

References:
  Smith, `Cyclical learning rates for training neural networks <https://arxiv.org/abs/1506.01186>`_,
  section 3.3: the range test (the rate rises linearly; there the accuracy is looked at).

  Gugger, `How do you find a good learning rate
  <https://sgugger.github.io/how-do-you-find-a-good-learning-rate.html>`_, 2018: rates that rise
  exponentially, the average with bias correction, the end at four times the lowest loss, and the
  rule of a tenth of the rate with the lowest loss. The steepest point is the first guess of fastai.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The outcome of `range_test`.

    Attributes:
      rates: learning rates used, one per step, up to the end of the test.
      losses: mini-batch losses met at them, before the step.
      smoothed: their averages.
      suggestion: the rate at which the average falls fastest; None if it never falls.
      lowest: the rate at which the average is lowest: beyond it training begins to fail.
      stopped_at: the rate at which the loss had left or was not finite; None if that never came.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    lowest: float
    stopped_at: float | None


def range_test(
    advance: Callable[[float], Any],
    rates: Sequence[float] | np.ndarray,
    *,
    smoothing: float = 0.9,
    stop_factor: float = 4.0,
) -> RangeTest:
    """Trains with rising learning rates until the loss leaves.

    The end is decided by the exponential moving average of the losses so far, with bias correction.
    An average of the past alone lags, and a lag of ten steps is a factor of the rate; so what is
    reported is the mean of that average and of the same one taken backwards (of losses that are
    capped at where they stood before they fell).

    Example:
      >>> w = [1.0]
      >>> def advance(rate):  # gradient descent on w ** 2: diverges beyond a rate of 1
      ...     loss = w[0] ** 2
      ...     w[0] -= rate * 2 * w[0]
      ...     return loss
      >>> result = range_test(advance, np.geomspace(1e-4, 10, 100), smoothing=0.5)
      >>> 0.01 < result.suggestion < 1 < result.stopped_at
      True
      >>> len(result.rates) < 100
      True

    Args:
      advance: makes one training step at a learning rate and returns the mini-batch loss before it.
      rates: rising learning rates.
      smoothing: weight of the past in the average, in [0, 1). Gugger takes 0.98 for some hundred
        steps.
      stop_factor: the test ends where the average exceeds this many times its lowest value; more
        than 1, and 4 in Gugger's.

    Returns:
      Rates, losses and what they suggest.

    Raises:
      ValueError: wrong rates or settings, or the loss was never finite.
    """
    rates = np.asarray(rates, float)
    if rates.ndim != 1 or len(rates) < 2 or not (rates[0] > 0 and np.all(np.diff(rates) > 0)):
        raise ValueError("`rates` must be at least two positive numbers that rise.")
    if not np.all(np.isfinite(rates)):
        raise ValueError("`rates` must be finite.")
    if not 0 <= smoothing < 1:
        raise ValueError(f"`smoothing` must lie in [0, 1), got {smoothing}.")
    if not stop_factor > 1:
        raise ValueError(f"`stop_factor` must be more than 1, got {stop_factor}.")
    losses: list[float] = []
    best, stopped_at = math.inf, None
    average = weight = 0.0
    for rate in rates:
        loss = float(advance(float(rate)))
        if not math.isfinite(loss):
            stopped_at = float(rate)
            break
        losses.append(loss)
        average, weight = (
            smoothing * average + (1 - smoothing) * loss,
            smoothing * weight + (1 - smoothing),
        )
        best = min(best, average / weight)
        if average / weight > stop_factor * best:
            stopped_at = float(rate)
            break
    if not losses:
        raise ValueError("the loss is not finite before the first step: look at data and model.")
    used, met = rates[: len(losses)], np.asarray(losses)
    # Where the loss leaves it may be huge; capped, it does not spoil what came before.
    forward = _average(met, smoothing)
    capped = np.minimum(met, forward[: np.argmin(forward) + 1].max())
    smoothed = (_average(capped, smoothing) + _average(capped[::-1], smoothing)[::-1]) / 2
    lowest = int(np.argmin(smoothed))
    suggestion = None
    if lowest > 0:
        suggestion = float(used[np.argmin(np.gradient(smoothed)[: lowest + 1])])
    return RangeTest(used, met, smoothed, suggestion, float(used[lowest]), stopped_at)


def _average(values: np.ndarray, smoothing: float) -> np.ndarray:
    """Exponential moving average with bias correction."""
    result, total, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        total = smoothing * total + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)
        result[i] = total / weight
    return result
