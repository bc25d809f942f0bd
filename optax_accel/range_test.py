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

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_accel._arguments import check_integer, check_number, shown


class LearningRateCurve(NamedTuple):
    """What :func:`learning_rate_range_test` has met.

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

    @property
    def conservative_suggestion(self) -> float:
        """A tenth of the rate with the lowest average (Gugger, 2018)."""
        return self.lowest / 10


def learning_rate_range_test(
    step: Callable[[Any, Any], tuple[Any, chex.Numeric]],
    state: Any,
    batches: Iterable[Any],
    *,
    minimum: float = 1e-5,
    maximum: float = 10.0,
    num_steps: int = 100,
    spacing: str = "exponential",
    smoothing: float = 0.9,
    stop_factor: float = 4.0,
    set_learning_rate: Callable[[Any, float], Any] | None = None,
) -> LearningRateCurve:
    """Trains with rising learning rates until the loss leaves, and suggests a rate.

    The end is decided by the exponential moving average of the losses so far, with bias correction.
    An average of the past alone lags, and a lag of ten steps is a factor of the rate; so what is
    reported is the mean of that average and of the same one taken backwards (of losses that are
    capped at where they stood before they fell).

    The rate gets into the step through the optimizer's state: build the optimizer with
    :func:`~optax_accel.inject_hyperparams` (or Optax's), with a constant learning rate. Before each
    step the test writes the next rate where ``hyperparams["learning_rate"]`` stands in the state,
    so that the step stays as it is and is compiled once.

    Args:
      step: your training step, compiled or not: ``step(state, batch)`` returns the next state and
        the loss of the batch, a scalar.
      state: where training starts, any pytree that contains the optimizer's state. It is copied, so
        that it stays as it is even where the step donates its buffers.
      batches: mini-batches, at least ``num_steps`` of them.
      minimum: the first learning rate, greater than 0.
      maximum: the last learning rate, greater than ``minimum``.
      num_steps: number of steps from the first rate to the last one, at least 2.
      spacing: how the rate rises: ``"exponential"``, by a factor per step (Gugger), or
        ``"linear"`` (Smith).
      smoothing: weight of the past in the average, in [0, 1). Gugger takes 0.98 for some hundred
        steps.
      stop_factor: the test ends where the average exceeds this many times its lowest value; more
        than 1, and 4 in Gugger's.
      set_learning_rate: for a state without injected hyperparameters a function of the state and a
        rate that returns the state with that rate. ``None``: the rate is injected.

    Returns:
      Rates, losses, their averages and what they suggest.

    Raises:
      ValueError: a wrong setting, no injected learning rate, a step that changes the rate itself
        (a schedule), too few batches, or a loss that is no scalar or never finite.
      TypeError: an argument of the wrong kind, or a step that returns something else.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.inject_hyperparams(optax.sgd)(learning_rate=0.1)
      >>> def step(state, batch):  # gradient descent on w ** 2: diverges beyond a rate of 1
      ...     w, opt_state = state
      ...     loss, grad = jax.value_and_grad(lambda w: w**2)(w)
      ...     updates, opt_state = tx.update(grad, opt_state)
      ...     return (optax.apply_updates(w, updates), opt_state), loss
      >>> w = jnp.array(1.0)
      >>> curve = oa.learning_rate_range_test(
      ...     jax.jit(step), (w, tx.init(w)), range(100), minimum=1e-4, smoothing=0.5
      ... )
      >>> 0.01 < curve.suggestion < 1 < curve.stopped_at
      True
      >>> len(curve.rates) < 100
      True

    References:
      Smith, `Cyclical learning rates for training neural networks
      <https://arxiv.org/abs/1506.01186>`_, section 3.3.
    """
    if not callable(step):
        raise TypeError(f"`step` must be a function of state and batch, got {shown(step)}.")
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be a sequence of mini-batches, got {shown(batches)}.")
    check_integer("num_steps", num_steps, 2)
    check_number("minimum", minimum, 0, open_low=True)
    check_number("maximum", maximum, minimum, open_low=True)
    spacings: dict[str, Callable[..., np.ndarray]] = {
        "exponential": np.geomspace,
        "linear": np.linspace,
    }
    if spacing not in spacings:
        raise ValueError(f"`spacing` must be 'exponential' or 'linear', got {spacing!r}.")
    check_number("smoothing", smoothing, 0, 1, open_high=True)
    check_number("stop_factor", stop_factor, 1, open_low=True)
    rates = spacings[spacing](minimum, maximum, num_steps)
    injected = set_learning_rate is None
    put = _put_injected if set_learning_rate is None else set_learning_rate
    state = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, state)
    remaining = iter(batches)

    def advance(rate: float) -> float:
        nonlocal state
        state = put(state, rate)
        try:
            batch = next(remaining)
        except StopIteration:
            raise ValueError(
                f"`batches` has fewer than num_steps={num_steps} batches; give more, or fewer "
                "steps."
            ) from None
        result = step(state, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            size = f" of {len(result)}" if isinstance(result, tuple) else ""
            raise TypeError(
                "`step` must return the new state and the loss, a scalar; got "
                f"{type(result).__name__}{size}."
            )
        state, loss = result
        if isinstance(loss, tuple | list | dict):
            raise TypeError(
                "`step` must return the new state and the loss, a scalar, in this order; the "
                f"second is of type {type(loss).__name__}."
            )
        if np.shape(loss) != ():
            raise ValueError(
                f"`step` must return the new state and the loss, a scalar; got shape "
                f"{np.shape(loss)}."
            )
        if injected and not np.allclose(_injected(state), rate, rtol=1e-2):
            raise ValueError(
                "`step` changes the learning rate itself: build the optimizer with a constant "
                "learning rate in place of a schedule."
            )
        return float(loss)

    return _curve(advance, rates, smoothing, stop_factor)


def _is_injected(path: tuple[Any, ...], _: Any) -> bool:
    return len(path) > 1 and getattr(path[-2], "name", None) == "hyperparams"


def _injected(state: Any) -> list[Any]:
    found = optax.tree_utils.tree_get_all_with_path(state, "learning_rate", filtering=_is_injected)
    return [value for _, value in found]


def _put_injected(state: Any, rate: float) -> Any:
    found = _injected(state)
    if not found:
        raise ValueError(
            "`state` has no injected learning rate: build the optimizer with "
            "inject_hyperparams(factory)(learning_rate=0.1, ...), or give `set_learning_rate`."
        )
    # Of the same dtype, so that the step is not compiled again.
    value = jnp.full_like(found[0], rate)
    return optax.tree_utils.tree_set(state, _is_injected, learning_rate=value)


def _curve(
    advance: Callable[[float], float], rates: np.ndarray, smoothing: float, stop_factor: float
) -> LearningRateCurve:
    losses: list[float] = []
    best, stopped_at = math.inf, None
    average = weight = 0.0
    for rate in rates:
        loss = advance(float(rate))
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
    return LearningRateCurve(used, met, smoothed, suggestion, float(used[lowest]), stopped_at)


def _average(values: np.ndarray, smoothing: float) -> np.ndarray:
    """Exponential moving average with bias correction."""
    result, total, weight = np.empty_like(values), 0.0, 0.0
    for i, value in enumerate(values):
        total = smoothing * total + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)
        result[i] = total / weight
    return result
