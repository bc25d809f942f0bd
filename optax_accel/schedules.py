r"""Schedules that Optax lacks: cyclical rates, the momentum of 1cycle, trapezoids, snapshots.

What Optax has is used: :func:`onecycle` takes its rate from ``optax.linear_onecycle_schedule`` or
``optax.cosine_onecycle_schedule``, :func:`snapshot_schedule` repeats
``optax.cosine_decay_schedule``; for warm restarts of different lengths see
``optax.sgdr_schedule``.

Step counts are reduced as integers before they become floats: a 32-bit float cannot hold odd counts
above :math:`2^{24}`.

References:
  Smith, `Cyclical learning rates for training neural networks
  <https://arxiv.org/abs/1506.01186>`_, WACV 2017.

  Smith and Topin, `Super-convergence: very fast training of neural networks using large learning
  rates <https://arxiv.org/abs/1708.07120>`_, 2017.

  Huang et al., `Snapshot ensembles: train 1, get M for free <https://arxiv.org/abs/1704.00109>`_,
  ICLR 2017.

  Lin et al., VTPC (variable trapezoidal parity cycle), 2022, `doi 10.1145/3518781.3519183
  <https://doi.org/10.1145/3518781.3519183>`_.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_accel._arguments import check_choice, check_integer, check_number

Interpolation = Literal["linear", "cosine"]

_LAST_COUNT = np.iinfo(np.int32).max


def cyclical_schedule(
    base_value: float,
    peak_value: float,
    step_size: int,
    *,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: float | None = None,
) -> optax.Schedule:
    r"""Cyclical learning rate: up and down between two bounds, linearly, without end.

    With :math:`\Lambda(t)` the triangle wave of period :math:`2s`, 0 at multiples of :math:`2s` and
    1 half-way between them, and :math:`c = \lfloor t / 2s \rfloor`, the rate is ``base_value +
    (peak_value - base_value) * height`` with

    ===============  ==============================
    ``triangular``   :math:`\Lambda(t)`
    ``triangular2``  :math:`\Lambda(t) \, 2^{-c}`
    ``exp_range``    :math:`\Lambda(t) \, \gamma^t`
    ===============  ==============================

    In the paper's text both bounds of ``exp_range`` decline; in its public implementations, and in
    this one, only the height above ``base_value`` does.  With a ``base_value`` above the
    ``peak_value`` the cycle is upside down, as a momentum that follows the rate needs it.

    Args:
      base_value: the rate at step 0 and at the end of each cycle, at least 0.  Either where the
        accuracy starts to rise in a range test, or a third or a quarter of ``peak_value`` (Smith,
        section 3.3).
      peak_value: the rate in the middle of the (first) cycle: the largest one that trains stably.
      step_size: s, half a cycle, in steps; 2 to 10 epochs (section 3.2).  Stop training at the end
        of a cycle, a multiple of ``2 * step_size``.
      mode: the scale of the cycles: ``"triangular"`` (default), all alike; ``"triangular2"``, each
        half as high as the one before; ``"exp_range"``, decaying by ``gamma`` in every step.
      gamma: the factor of the height in each step, in (0, 1]; for mode ``"exp_range"`` only, which
        requires it.

    Returns:
      A schedule: a function of the zero-based step count, traceable.

    Raises:
      ValueError: an argument outside its range.
      TypeError: an argument of the wrong kind.

    Example:
      >>> import optax_accel as oa
      >>> schedule = oa.cyclical_schedule(0.1, 0.5, step_size=4, mode="triangular2")
      >>> [round(float(schedule(t)), 3) for t in (0, 1, 4, 6, 8, 12, 16, 20)]
      [0.1, 0.2, 0.5, 0.3, 0.1, 0.3, 0.1, 0.2]

    References:
      Smith, `Cyclical learning rates for training neural networks
      <https://arxiv.org/abs/1506.01186>`_, section 3.
    """
    check_number("base_value", base_value, 0)
    check_number("peak_value", peak_value, 0)
    check_integer("step_size", step_size, 1)
    _check_fits("a cycle of `2 * step_size`", 2 * step_size)
    check_choice("mode", mode, ("triangular", "triangular2", "exp_range"))
    if (gamma is not None) != (mode == "exp_range"):
        raise ValueError(f"`gamma` belongs to mode 'exp_range'; got {gamma!r} with mode {mode!r}.")
    log_gamma: Any = 0.0
    if gamma is not None:
        check_number("gamma", gamma, 0, 1, open_low=True)
        # Taken here, in double precision: in single precision 1 - gamma has few digits.
        log_gamma = jnp.log(gamma) if isinstance(gamma, jax.Array) else math.log(gamma)
    period = 2 * step_size

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count)
        cycle, place = jnp.divmod(count, period)
        height = _wide(jnp.minimum(place, period - place)) / step_size
        if mode == "triangular2":
            height = jnp.ldexp(height, -cycle.astype(jnp.int32))
        elif mode == "exp_range":
            height *= jnp.exp(log_gamma * _wide(count))
        return _between(base_value, peak_value, height)

    return schedule


def momentum_onecycle_schedule(
    transition_steps: int,
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
    *,
    rise_fraction: float = 0.3,
    cycle_fraction: float = 0.85,
    interpolation: Interpolation = "linear",
) -> optax.Schedule:
    """The momentum of 1cycle: high while the rate is low, and low while it is high.

    ``interpolation="linear"``, as in the paper, has three phases: from ``max_momentum`` to
    ``min_momentum``, back, and constant while the rate is annihilated.  ``"cosine"`` has two: down
    and back.  The corners are those of the rate's schedule in Optax,
    ``int(rise_fraction * transition_steps)`` and so on.

    Args:
      transition_steps: length of the whole cycle, in steps.
      max_momentum: the momentum at both ends, in [0, 1); 0.95 in the paper.
      min_momentum: the momentum where the rate peaks, in [0, 1); 0.85 in the paper.
      rise_fraction: fraction of the steps in which the rate rises and the momentum falls; default
        0.3, as ``pct_start`` in Optax.
      cycle_fraction: fraction of the steps after which the momentum is back at its start; default
        0.85, as ``pct_final`` in Optax.  For ``"linear"`` only: the two phases of ``"cosine"`` end
        with the cycle.
      interpolation: shape of the phases, ``"linear"`` (default) or ``"cosine"``.

    Returns:
      A schedule: a function of the zero-based step count, traceable; ``max_momentum`` after the
      cycle.

    Raises:
      ValueError: an argument outside its range.
      TypeError: an argument of the wrong kind.

    Example:
      >>> import optax_accel as oa
      >>> schedule = oa.momentum_onecycle_schedule(100, rise_fraction=0.4, cycle_fraction=0.8)
      >>> [round(float(schedule(t)), 3) for t in (0, 20, 40, 60, 80, 100)]
      [0.95, 0.9, 0.85, 0.9, 0.95, 0.95]

    References:
      Smith and Topin, `Super-convergence <https://arxiv.org/abs/1708.07120>`_.
    """
    check_integer("transition_steps", transition_steps, 1)
    _check_fits("a cycle of `transition_steps`", transition_steps)
    check_number("max_momentum", max_momentum, 0, 1, open_high=True)
    check_number("min_momentum", min_momentum, 0, 1, open_high=True)
    known = not any(isinstance(value, jax.Array) for value in (max_momentum, min_momentum))
    if known and min_momentum > max_momentum:
        raise ValueError(
            "`min_momentum` must be at most `max_momentum`, got "
            f"{min_momentum!r} and {max_momentum!r}."
        )
    _check_static_fraction("rise_fraction", rise_fraction, 1)
    _check_static_fraction("cycle_fraction", cycle_fraction, 1)
    check_choice("interpolation", interpolation, ("linear", "cosine"))
    back = int(cycle_fraction * transition_steps) if interpolation == "linear" else transition_steps
    low = int(rise_fraction * transition_steps)
    if low > back:
        raise ValueError(
            "`rise_fraction` must be at most `cycle_fraction`, got "
            f"{rise_fraction} and {cycle_fraction}."
        )
    return _piecewise([0, low, back], [max_momentum, min_momentum, max_momentum], interpolation)


class OneCycle(NamedTuple):
    """The two schedules of :func:`onecycle`.

    Attributes:
      learning_rate: schedule of the learning rate.
      momentum: schedule of the momentum, high where the rate is low.
    """

    learning_rate: optax.Schedule
    momentum: optax.Schedule


def onecycle(
    transition_steps: int,
    peak_value: float,
    *,
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
    rise_fraction: float = 0.3,
    cycle_fraction: float = 0.85,
    initial_divisor: float = 25.0,
    final_divisor: float = 1e4,
    interpolation: Interpolation = "linear",
) -> OneCycle:
    """1cycle (super-convergence): one cycle of the learning rate and an opposite one of momentum.

    The rate is ``optax.linear_onecycle_schedule`` (three phases, as in the paper) or
    ``optax.cosine_onecycle_schedule`` (two); the momentum is :func:`momentum_onecycle_schedule`.
    They fit any optimizer that has both::

      cycle = onecycle(1000, peak_value=0.5)
      oa.with_schedules(optax.sgd, **cycle._asdict())()
      oa.with_schedules(optax.adamw, b1=cycle.momentum)(cycle.learning_rate)

    Args:
      transition_steps: length of the training, in steps.
      peak_value: largest rate; a range test shows how large it may be.
      max_momentum: the momentum at both ends, in [0, 1).
      min_momentum: the momentum where the rate peaks, in [0, 1).
      rise_fraction: fraction of the steps in which the rate rises; default 0.3, as ``pct_start`` in
        Optax.
      cycle_fraction: fraction of the steps after which the rate is back at its start and begins to
        be annihilated; default 0.85, as ``pct_final`` in Optax.  For ``"linear"`` only.
      initial_divisor: ``peak_value`` divided by the first rate (``div_factor`` in Optax).
      final_divisor: the first rate divided by the last one (``final_div_factor`` in Optax).
      interpolation: shape of the phases, ``"linear"`` (default) or ``"cosine"``.

    Returns:
      The schedules of the rate and of the momentum.

    Raises:
      ValueError: an argument outside its range, or so few steps that two corners coincide.
      TypeError: an argument of the wrong kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> cycle = oa.onecycle(100, peak_value=0.5)
      >>> [round(float(cycle.learning_rate(t)), 3) for t in (0, 30, 85, 100)]
      [0.02, 0.5, 0.02, 0.0]
      >>> [round(float(cycle.momentum(t)), 3) for t in (0, 30, 85, 100)]
      [0.95, 0.85, 0.95, 0.95]
      >>> tx = oa.with_schedules(optax.sgd, **cycle._asdict())()
      >>> state = tx.init(jnp.zeros(2))
      >>> {name: round(float(value), 3) for name, value in sorted(state.scheduled.items())}
      {'learning_rate': 0.02, 'momentum': 0.95}

    References:
      Smith and Topin, `Super-convergence <https://arxiv.org/abs/1708.07120>`_.
    """
    momentum = momentum_onecycle_schedule(
        transition_steps,
        max_momentum,
        min_momentum,
        rise_fraction=rise_fraction,
        cycle_fraction=cycle_fraction,
        interpolation=interpolation,
    )
    check_number("peak_value", peak_value, 0)
    check_number("initial_divisor", initial_divisor, 0, open_low=True)
    check_number("final_divisor", final_divisor, 0, open_low=True)
    corners = [int(rise_fraction * transition_steps), transition_steps]
    if interpolation == "linear":
        corners.insert(1, int(cycle_fraction * transition_steps))
    if len({*corners}) < len(corners):  # Optax would drop one of them
        raise ValueError(
            f"the corners of the cycle must be different steps, got {corners}: give more "
            "`transition_steps`, or `rise_fraction` < `cycle_fraction` < 1."
        )
    if interpolation == "linear":
        rate = optax.linear_onecycle_schedule(
            transition_steps,
            peak_value,
            rise_fraction,
            cycle_fraction,
            initial_divisor,
            final_divisor,
        )
    else:
        rate = optax.cosine_onecycle_schedule(
            transition_steps, peak_value, rise_fraction, initial_divisor, final_divisor
        )

    def learning_rate(count: Any) -> jax.Array:
        count = jnp.asarray(count)  # in the widest integer, see `_wide`
        return rate(count.astype(jnp.promote_types(count.dtype, jnp.result_type(int))))

    return OneCycle(learning_rate, momentum)


def vtpc_schedule(
    base_value: float,
    peak_value: float,
    cycle_steps: int,
    num_cycles: int,
    *,
    floor_value: float = 0.0,
    cycle_factor: float = 1.0,
    peak_decay: float = 1.0,
    rise_fraction: float = 0.25,
    hold_fraction: float = 0.5,
) -> optax.Schedule:
    """VTPC, variable trapezoidal parity cycle: our reading of the name.

    Only the name and the family (cyclic, with restarts) are public.  In our reading each cycle is a
    trapezoid: it rises linearly, holds its peak and falls linearly.  The lengths of the cycles
    vary, each ``cycle_factor`` times the one before.  By parity the first, third, ... cycle falls
    to ``base_value``, the second, fourth, ... to ``floor_value``.  A cycle rises from where the one
    before it ended, the first from ``base_value``.  All defaults are ours.

    Args:
      base_value: the rate at step 0 and at the end of odd cycles, at least 0.
      peak_value: the rate that the first cycle holds.
      cycle_steps: length of the first cycle, in steps.
      num_cycles: number of cycles; after them the rate stays where the last one ended.
      floor_value: the rate at the end of even cycles.
      cycle_factor: length of a cycle divided by that of the one before, rounded to whole steps.
      peak_decay: peak of a cycle divided by that of the one before, in (0, 1].
      rise_fraction: fraction of a cycle in which the rate rises.
      hold_fraction: fraction of a cycle in which the rate holds its peak; it falls in the rest.

    Returns:
      A schedule: a function of the zero-based step count, traceable.

    Raises:
      ValueError: an argument outside its range.
      TypeError: an argument of the wrong kind.

    Example:
      >>> import optax_accel as oa
      >>> schedule = oa.vtpc_schedule(0.1, 0.5, cycle_steps=4, num_cycles=2, cycle_factor=2)
      >>> [round(float(schedule(t)), 2) for t in range(0, 13)]
      [0.1, 0.5, 0.5, 0.5, 0.1, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.0]

    References:
      Lin et al., 2022, `doi 10.1145/3518781.3519183 <https://doi.org/10.1145/3518781.3519183>`_.
    """
    check_number("base_value", base_value, 0)
    check_number("peak_value", peak_value, 0)
    check_integer("cycle_steps", cycle_steps, 1)
    check_integer("num_cycles", num_cycles, 1)
    check_number("floor_value", floor_value, 0)
    _check_static_fraction("cycle_factor", cycle_factor, math.inf, open_low=True)
    check_number("peak_decay", peak_decay, 0, 1, open_low=True)
    _check_static_fraction("rise_fraction", rise_fraction, 1)
    _check_static_fraction("hold_fraction", hold_fraction, 1)
    if rise_fraction + hold_fraction > 1:
        raise ValueError(
            "`rise_fraction` and `hold_fraction` must be at most 1 together, got "
            f"{rise_fraction} and {hold_fraction}."
        )
    steps, values, peak = [0], [base_value], peak_value
    for cycle in range(num_cycles):
        start = steps[-1]
        length = max(1, round(min(cycle_steps * cycle_factor**cycle, 2.0 * _LAST_COUNT)))
        _check_fits(f"the first {cycle + 1} cycles", start + length)
        steps += [
            start + round(part * length) for part in (rise_fraction, rise_fraction + hold_fraction)
        ]
        steps += [start + length]
        values += [peak, peak, floor_value if cycle % 2 else base_value]
        peak = peak * peak_decay
    return _piecewise(steps, values)


def snapshot_schedule(init_value: float, total_steps: int, num_snapshots: int) -> optax.Schedule:
    r"""The cyclic cosine of snapshot ensembles.

    :math:`\frac{\alpha_0}{2} (\cos(\pi \, (t \bmod L) / L) + 1)` with :math:`L = \lceil T / M
    \rceil`.  A snapshot of the parameters is taken after every L steps, just before the rate jumps
    back, and after the last step.

    Args:
      init_value: :math:`\alpha_0`, the rate at the start of each cycle; 0.1 or 0.2 in the paper.
      total_steps: T, the length of the training, in steps.
      num_snapshots: M, the number of cycles, at most ``total_steps``.

    Returns:
      A schedule: a function of the zero-based step count, traceable.

    Raises:
      ValueError: an argument outside its range.
      TypeError: an argument of the wrong kind.

    Example:
      >>> import optax_accel as oa
      >>> schedule = oa.snapshot_schedule(0.1, total_steps=12, num_snapshots=3)
      >>> [round(float(schedule(t)), 4) for t in range(0, 6)]
      [0.1, 0.0854, 0.05, 0.0146, 0.1, 0.0854]

    References:
      Huang et al., `Snapshot ensembles <https://arxiv.org/abs/1704.00109>`_, equation 2.
    """
    check_number("init_value", init_value, 0)
    check_integer("total_steps", total_steps, 1)
    check_integer("num_snapshots", num_snapshots, 1)
    if num_snapshots > total_steps:
        raise ValueError(
            f"`num_snapshots` must be at most `total_steps`, got {num_snapshots} and {total_steps}."
        )
    cycle_steps = -(-total_steps // num_snapshots)
    _check_fits("a cycle", cycle_steps)
    cosine = optax.cosine_decay_schedule(init_value, cycle_steps)
    return lambda count: cosine(_wide(jnp.asarray(count) % cycle_steps))


def _piecewise(
    steps: Sequence[int], values: Sequence[Any], interpolation: Interpolation = "linear"
) -> optax.Schedule:
    """Through the corners ``(steps[i], values[i])``, exactly, and constant after the last one.

    Of corners at the same step the last one counts.
    """
    starts = np.asarray(steps, np.int32)
    lengths = np.maximum(np.diff(starts, append=starts[-1:]), 1)  # the last piece has no end

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count)
        piece = jnp.searchsorted(jnp.asarray(starts), count, side="right") - 1
        piece = jnp.maximum(piece, 0)
        elapsed = _wide(count - jnp.asarray(starts)[piece])
        fraction = jnp.clip(elapsed / _wide(jnp.asarray(lengths)[piece]), 0, 1)
        if interpolation == "cosine":
            fraction = (1 - jnp.cos(jnp.pi * fraction)) / 2
        corners = jnp.stack([_wide(jnp.asarray(value)) for value in (*values, values[-1])])
        return _between(corners[piece], corners[piece + 1], fraction)

    return schedule


def _between(start: Any, end: Any, fraction: jax.Array) -> jax.Array:
    # Not `start + (end - start) * fraction`, which misses `end` by a rounding error.
    return start * (1 - fraction) + end * fraction


def _wide(count: jax.Array) -> jax.Array:
    """In the widest float: a 32-bit count divided by an integer is a 32-bit float even in x64."""
    return count.astype(jnp.result_type(float))


def _check_fits(what: str, steps: int) -> None:
    if steps > _LAST_COUNT:
        raise ValueError(
            f"{what} must fit into a 32-bit step count: {_LAST_COUNT} steps, got {steps}."
        )


def _check_static_fraction(name: str, value: Any, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, jax.Array):
        raise TypeError(f"`{name}` decides where corners lie: give a Python number, not an array.")
    check_number(name, value, 0, high, open_low=open_low)
