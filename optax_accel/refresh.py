"""Refreshing estimates of curvature from the host: one vocabulary for all methods.

A method that keeps an estimate of the curvature, the eigenspace of a tracker or the factors of
K-FAC, or low-rank bases of the gradients, as GaLore does, refreshes it inside the compiled step by
default.  With the extra argument ``refresh``, a static Python value, the training loop decides
instead, so that it alternates compiled steps without conditionals: required for speed with
convolutions on a CPU, and under ``vmap``, where a conditional runs both its branches.  The argument
reaches every element of a chain; this is what it means to each:

===============  ==============================  ====================  ====================
``refresh``      trackers, low-rank bases        K-FAC and EKFAC       damping that adapts
===============  ==============================  ====================  ====================
``None``         decide in the graph             decide in the graph   decide in the graph
``False``        nothing                         nothing               nothing
``True``         refresh (the tracker says how)  factors and inverses  adapt
``"cold"``       start anew                      factors and inverses  adapt
``"warm"``       refresh the current basis       factors and inverses  adapt
``"factors"``    nothing                         factors               nothing
``"inverses"``   refresh (the tracker says how)  factors and inverses  adapt
``"sample"``     nothing                         nothing               nothing
:class:`Refresh`  its ``eigenspace``              its ``factors`` and   its ``damping``
                                                 ``inverses``
===============  ==============================  ====================  ====================

:func:`~optax_accel.monitor_curvature` records where trackers refresh, and with the ``monitor`` of a
:class:`Refresh`; it has a period of its own.

``"sample"`` is for the steps of the epochs that :func:`~optax_accel.gradsamp` samples instead of
training them: with it, it returns a sampled update, with ``None`` it decides in the graph, and with
any other value it trains.

:func:`refresh_at` gives the value for each step of a whole chain; :class:`RefreshSchedule` does so
where a tracker chooses its period on the way.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import chex
import jax
import numpy as np
import optax

from optax_accel._arguments import (
    check_count,
    check_flag,
    check_integer,
    known_integer,
    shown,
    static_integer,
)

EigenspaceRefresh: TypeAlias = bool | Literal["cold", "warm"] | None
FactorsRefresh: TypeAlias = Literal[False, "factors", "inverses"] | None
_WORDS = ("cold", "warm", "factors", "inverses", "sample")


class Refresh(NamedTuple):
    """What a step refreshes, where one word does not say it for all elements of a chain.

    Attributes:
      eigenspace: what trackers do: False (default) keeps the basis, True refreshes it, ``"cold"``
        starts anew, ``"warm"`` refreshes the current basis; None lets them decide in the graph.
      factors: whether K-FAC refreshes its factors, default False; None lets it decide in the graph,
        about the inverses too.
      inverses: whether K-FAC refreshes factors and inverses, default False.
      damping: whether damping and trust region adapt, default False; None lets them decide in the
        graph.
      monitor: whether :func:`~optax_accel.monitor_curvature` records, default False; None
        lets it decide in the graph.

    Example:
      >>> import optax_accel as oa
      >>> oa.Refresh(eigenspace="warm", factors=True)
      Refresh(eigenspace='warm', factors=True, inverses=False, damping=False, monitor=False)
    """

    eigenspace: EigenspaceRefresh = False
    factors: bool | None = False
    inverses: bool = False
    damping: bool | None = False
    monitor: bool | None = False


RefreshLike: TypeAlias = bool | str | Refresh | None


def of_eigenspace(refresh: Any) -> EigenspaceRefresh:
    """The meaning of the argument ``refresh`` for a tracker."""
    _check(refresh)
    if isinstance(refresh, Refresh):
        return refresh.eigenspace
    return {"factors": False, "inverses": True, "sample": False}.get(refresh, refresh)


def of_monitor(refresh: Any) -> bool | None:
    """The meaning of the argument ``refresh`` for a monitor of the curvature."""
    _check(refresh)
    if isinstance(refresh, Refresh):
        return refresh.monitor
    return None if refresh is None else refresh in (True, "cold", "warm")


def of_factors(refresh: Any) -> FactorsRefresh:
    """The meaning of the argument ``refresh`` for K-FAC."""
    _check(refresh)
    if isinstance(refresh, Refresh):
        if refresh.inverses:
            return "inverses"
        return "factors" if refresh.factors else (None if refresh.factors is None else False)
    if refresh is None or refresh is False:
        return refresh
    if refresh == "sample":
        return False
    return "factors" if refresh == "factors" else "inverses"


def of_damping(refresh: Any) -> bool | None:
    """The meaning of the argument ``refresh`` for damping that adapts."""
    _check(refresh)
    if isinstance(refresh, Refresh):
        return refresh.damping
    return None if refresh is None else refresh not in (False, "factors", "sample")


def of_sampling(refresh: Any) -> bool | None:
    """The meaning of the argument ``refresh`` for epochs that are sampled instead of trained."""
    _check(refresh)
    return None if refresh is None else refresh == "sample"


def _check(refresh: Any) -> None:
    values = refresh if isinstance(refresh, Refresh) else (refresh,)
    if any(isinstance(value, jax.Array | np.ndarray | np.generic) for value in values):
        raise TypeError(
            f"`refresh` must be a static Python value, got {shown(refresh)}: give bool(...) of a "
            'NumPy value, and mark the argument with jax.jit(step, static_argnames="refresh").'
        )
    if isinstance(refresh, Refresh):
        optional = (refresh.factors, refresh.damping, refresh.monitor)
        flags = all(_is_one_of(flag, ()) for flag in optional)
        flags = flags and isinstance(refresh.inverses, bool)
        if flags and _is_one_of(refresh.eigenspace, ("cold", "warm")):
            return
    elif _is_one_of(refresh, _WORDS):
        return
    raise ValueError(
        "`refresh` must be None, True, False, one of 'cold', 'warm', 'factors', 'inverses', "
        f"'sample', or an optax_accel.Refresh of the first four; got {refresh!r}."
    )


def _is_one_of(value: Any, words: tuple[str, ...]) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value in words)


# -- when ------------------------------------------------------------------------------------------


class _EigenspacePeriods(NamedTuple):
    refresh_every: int | Literal["adaptive"]
    start_step: int
    starts_anew: bool = True  # otherwise the first refresh is like all others: no further program


class _FactorsPeriods(NamedTuple):
    factors_every: int
    inverses_every: int


class _DampingPeriod(NamedTuple):
    every: int


class _MonitorPeriods(NamedTuple):
    every: int
    start_step: int


class SampledEpochs(NamedTuple):
    """Which steps belong to epochs that are sampled instead of trained.

    Attributes:
      steps_per_epoch: number of steps in an epoch.
      is_sampled: whether the epoch of a zero-based number is sampled.
    """

    steps_per_epoch: int
    is_sampled: Callable[[int], bool]

    def trained_before(self, step: int) -> int:
        """The number of steps before one that train."""
        epoch, within = divmod(step, self.steps_per_epoch)
        trained = sum(not self.is_sampled(number) for number in range(epoch))
        return trained * self.steps_per_epoch + within

    def __str__(self) -> str:
        return f"SampledEpochs(steps_per_epoch={self.steps_per_epoch})"


class Cost(NamedTuple):
    """What a method evaluates in a step, as it tells :func:`~optax_accel.describe`.

    Attributes:
      words: what that is, besides the gradient that it is given.
      further_gradients: their number, if that is all; None if it is not counted in gradients.
      requires: the extra arguments that ``update`` needs for it.
    """

    words: str
    further_gradients: int | None = None
    requires: tuple[str, ...] = ("value_fn",)


_Periods: TypeAlias = (
    _EigenspacePeriods | _FactorsPeriods | _DampingPeriod | _MonitorPeriods | SampledEpochs
)
# What methods announce while somebody calls the `init` of an optimizer to learn of it.
_announced: contextvars.ContextVar[list[_Periods | Cost] | None] = contextvars.ContextVar(
    "announced", default=None
)
_known: weakref.WeakKeyDictionary[Any, tuple[_Periods, ...]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def announcements() -> Iterator[list[_Periods | Cost]]:
    """Collects what the methods announce whose ``init`` is called in a block."""
    announced: list[_Periods | Cost] = []
    token = _announced.set(announced)
    try:
        yield announced
    finally:
        _announced.reset(token)


def announce_cost(cost: Cost) -> None:
    """Called by ``init`` of a method that evaluates the loss or its derivatives."""
    announced = _announced.get()
    if announced is not None:
        announced.append(cost)


def announce_eigenspace(
    refresh_every: int | Literal["adaptive"], start_step: Any, *, starts_anew: bool = True
) -> None:
    """Called by ``init`` of a method that follows an eigenspace."""
    announced = _announced.get()
    if announced is not None:
        announced.append(_EigenspacePeriods(refresh_every, int(start_step), starts_anew))


def announce_factors(factors_every: int, inverses_every: int) -> None:
    """Called by ``init`` of a method that keeps factors and their inverses."""
    announced = _announced.get()
    if announced is not None:
        periods = {"factors_every": factors_every, "inverses_every": inverses_every}
        announced.append(
            _FactorsPeriods(*(static_integer(name, value, 1) for name, value in periods.items()))
        )


def announce_damping(every: int) -> None:
    """Called by ``init`` of a method whose damping adapts every few steps."""
    announced = _announced.get()
    if announced is not None:
        announced.append(_DampingPeriod(static_integer("every", every, 1)))


def announce_monitor(every: int, start_step: int) -> None:
    """Called by ``init`` of a monitor of the curvature."""
    announced = _announced.get()
    if announced is not None:
        announced.append(
            _MonitorPeriods(
                static_integer("every", every, 1), static_integer("start_step", start_step, 0)
            )
        )


def announce_sampled_epochs(epochs: Callable[[], SampledEpochs]) -> None:
    """Called by ``init`` of a method that samples epochs; ``epochs`` is called if anybody asks."""
    announced = _announced.get()
    if announced is not None:
        announced.append(epochs())


@overload
def refresh_at(
    step: int,
    tx: int | None = None,
    start_step: int = 0,
    *,
    refresh_every: int | None = None,
    cold_start: bool = True,
) -> bool | Literal["cold", "warm"]: ...
@overload
def refresh_at(
    step: int, tx: optax.GradientTransformation | optax.MultiSteps, *, cold_start: bool = True
) -> RefreshLike: ...
def refresh_at(
    step: int,
    tx: optax.GradientTransformation | optax.MultiSteps | int | None = None,
    start_step: int = 0,
    *,
    refresh_every: int | None = None,
    cold_start: bool = True,
) -> RefreshLike:
    """The ``refresh`` argument for a training loop that drives curvature from the host.

    Args:
      step: zero-based count of updates, a Python integer. With ``optax.MultiSteps`` this is the
        number of whole updates, not of micro-batches.
      tx: the optimizer, chained, masked or wrapped in any way. The periods and start steps of its
        trackers and of its K-FAC are read from it, once: its ``init`` is called with the
        placeholder of ``optax.tree.map_params``.  An integer is the period of a tracker instead,
        the same as ``refresh_every``.
      start_step: the step at which the eigenspace is first needed, if no optimizer is given.
      refresh_every: the period of the tracker, if no optimizer is given; default 20, as that of
        ``BlockTracker``.
      cold_start: whether the estimate starts with Lanczos; default True.  Give False for
        convolutional networks on a CPU, where the loop of Lanczos runs many times slower than the
        same products outside it (jax#12868): the estimate then grows from a random basis by a sweep
        in each of the first ten steps.

    Returns:
      For trackers ``"cold"`` at the first step, ``"warm"`` when a refresh is due, else False; for
      low-rank bases the same without ``"cold"``, which would be a further program to compile; for
      K-FAC ``"inverses"`` when factors and inverses are due, ``"factors"`` when only these are,
      else False; for damping that adapts whether it does; for a chain of several of these a
      :class:`Refresh`; None if ``tx`` has none of them. Around all that, ``"sample"`` in the epochs
      that :func:`~optax_accel.gradsamp` samples, else what the optimizer inside of it gets at the
      number of steps that trained, or False.

    Raises:
      ValueError: ``step`` below 0; ``tx`` has two trackers, or K-FAC twice, at different periods or
        start steps, which one value cannot drive; a tracker of ``tx`` has
        ``refresh_every="adaptive"``, which takes a :class:`RefreshSchedule`; its ``init`` does not
        accept a placeholder.

    Example:
      >>> import optax, optax_accel as oa
      >>> [oa.refresh_at(step, refresh_every=2) for step in range(5)]
      ['cold', False, 'warm', False, 'warm']
      >>> tracker = oa.BlockTracker(refresh_every=3)
      >>> tx = optax.chain(optax.adam(1e-3), oa.project_to_bulk(10, tracker=tracker, start_step=1))
      >>> [oa.refresh_at(step, tx) for step in range(5)]
      [False, 'cold', False, False, 'warm']
    """
    step = static_integer("step", step, 0)
    check_flag("cold_start", cold_start)
    if tx is None or not isinstance(tx, optax.GradientTransformation | optax.MultiSteps):
        if tx is not None and refresh_every is not None:
            raise ValueError(
                f"the period is given twice to refresh_at, as {tx!r} and as `refresh_every` "
                f"{refresh_every!r}: leave one out."
            )
        every = (20 if refresh_every is None else refresh_every) if tx is None else tx
        check_integer("refresh_every", every, 1)
        check_integer("start_step", start_step, 0)
        return _eigenspace_at(step, _EigenspacePeriods(int(every), start_step), cold_start)
    if refresh_every is not None or start_step:
        raise ValueError(
            "give refresh_at either the optimizer or `refresh_every` and `start_step`: they are "
            "read from the optimizer."
        )
    return _joined(step, _periods_of(tx), functools.partial(_eigenspace_at, cold_start=cold_start))


def _joined(
    step: int,
    all_periods: tuple[_Periods, ...],
    eigenspace_at: Callable[[int, _EigenspacePeriods], EigenspaceRefresh],
) -> RefreshLike:
    """One value for all that an optimizer keeps; None if that is nothing."""
    for periods in all_periods:
        if isinstance(periods, SampledEpochs):
            if periods.is_sampled(step // periods.steps_per_epoch):
                return "sample"
            step = periods.trained_before(step)
            others = tuple(other for other in all_periods if other is not periods)
            return _joined(step, others, eigenspace_at) if others else False
    eigenspace: Any = None
    factors: Any = None
    damping: Any = None
    monitor: Any = None
    for periods in all_periods:
        if isinstance(periods, _EigenspacePeriods):
            eigenspace = eigenspace_at(step, periods)
        elif isinstance(periods, _MonitorPeriods):
            elapsed = step - periods.start_step
            monitor = elapsed >= 0 and elapsed % periods.every == 0
        elif isinstance(periods, _FactorsPeriods):
            factors = _factors_at(step, periods)
        else:
            assert isinstance(periods, _DampingPeriod)
            damping = step % periods.every == 0
    present = [value for value in (eigenspace, factors, damping, monitor) if value is not None]
    if len(present) < 2:
        return present[0] if present else None
    return Refresh(
        False if eigenspace is None else eigenspace,
        factors=bool(factors),
        inverses=factors == "inverses",
        damping=bool(damping),
        monitor=bool(monitor),
    )


class RefreshSchedule:
    """The ``refresh`` argument for a loop whose tracker chooses its period on the way.

    A tracker with ``refresh_every="adaptive"`` writes the step of its next refresh into the state.
    The schedule reads it once after each refresh, which waits for that step to end; the steps
    between are queued without waiting. For an optimizer without such a tracker it gives what
    :func:`refresh_at` gives, and reads nothing.

    It keeps no more than what it read: made anew, as after a checkpoint was restored, or asked for
    another step than the one that follows, it reads again.

    Args:
      tx: the optimizer, chained, masked or wrapped in any way, as for :func:`refresh_at`.
      cold_start: whether the estimate starts with Lanczos; default True.  With False it grows from
        a random basis by a sweep in each of the first ten steps: for convolutional networks on a
        CPU, where the loop of Lanczos runs many times slower (jax#12868).

    Raises:
      ValueError: ``tx`` has two trackers, or K-FAC twice, at different periods or start steps, or
        its ``init`` does not accept a placeholder.
      TypeError: ``tx`` is not an optimizer.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.bulk_sgd(0.1, 1, tracker=oa.BlockTracker(refresh_every="adaptive"))
      >>> @functools.partial(jax.jit, static_argnames="refresh")
      ... def train_step(params, state, refresh):
      ...     updates, state = tx.update(
      ...         jax.grad(loss)(params), state, params, value_fn=loss, refresh=refresh)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.ones(3)
      >>> state, schedule, refreshed = tx.init(params), oa.RefreshSchedule(tx), []
      >>> for step in range(40):
      ...     if refresh := schedule(step, state):
      ...         refreshed.append(step)
      ...     params, state = train_step(params, state, refresh)
      >>> refreshed  # the Hessian is constant, so the periods double
      [0, 5, 15, 35]
    """

    def __init__(
        self, tx: optax.GradientTransformation | optax.MultiSteps, *, cold_start: bool = True
    ):
        check_flag("cold_start", cold_start)
        self._cold_start = cold_start
        self._periods = _periods_of(tx)
        self._next_refresh = 0
        self._stale = True  # what was read is not of the state at hand
        self._expected_step = -1

    def __call__(self, step: int, state: chex.ArrayTree) -> RefreshLike:
        """The value for a step.

        Args:
          step: zero-based count of updates, a Python integer.
          state: the optimizer's state before the step, or any pytree that contains it.

        Returns:
          The argument ``refresh`` of the step's ``update``; see :func:`refresh_at`.

        Raises:
          ValueError: ``step`` below 0, or ``state`` holds no step of a next refresh.
        """
        step = static_integer("step", step, 0)
        at = functools.partial(self._eigenspace_at, state=state)
        return _joined(step, self._periods, at)

    def _eigenspace_at(
        self, step: int, periods: _EigenspacePeriods, state: chex.ArrayTree
    ) -> bool | Literal["cold", "warm"]:
        if periods.refresh_every != "adaptive":
            return _eigenspace_at(step, periods, self._cold_start)
        start_step = periods.start_step
        known = step == self._expected_step and not self._stale
        self._expected_step = step + 1
        elapsed = step - start_step
        if elapsed < 0:
            return False
        if elapsed == 0 or (elapsed < 10 and not self._cold_start):
            self._stale = True
            return "cold" if self._cold_start else "warm"
        if not known:
            found = optax.tree.get_all_with_path(state, "next_refresh")
            if not found:
                raise ValueError(
                    "RefreshSchedule found no `next_refresh` in `state`: pass the state of the "
                    "optimizer that it was made for."
                )
            values = jax.device_get([value for _, value in found])  # explicit: guards allow it
            self._next_refresh = min(int(np.min(value)) for value in values)
        due = step >= self._next_refresh
        self._stale = due
        return "warm" if due else False


def _eigenspace_at(
    step: int, periods: _EigenspacePeriods, cold_start: bool
) -> bool | Literal["cold", "warm"]:
    if periods.refresh_every == "adaptive":
        raise ValueError(
            "the step alone does not tell when a tracker with `refresh_every='adaptive'` is due: "
            "make schedule = optax_accel.RefreshSchedule(tx) before the loop and pass "
            "refresh=schedule(step, state), or leave `refresh` out, so that it is decided in the "
            "graph."
        )
    elapsed = step - periods.start_step
    if not periods.starts_anew:
        return "warm" if elapsed >= 0 and elapsed % periods.refresh_every == 0 else False
    if cold_start and elapsed == 0:
        return "cold"
    due = elapsed % periods.refresh_every == 0 or (elapsed < 10 and not cold_start)
    return "warm" if elapsed >= 0 and due else False


def _factors_at(step: int, periods: _FactorsPeriods) -> Literal[False, "factors", "inverses"]:
    if step % periods.inverses_every == 0:
        return "inverses"
    return "factors" if step % periods.factors_every == 0 else False


def _periods_of(tx: Any) -> tuple[_Periods, ...]:
    """The periods of the estimates in an optimizer, at most one of each kind."""
    if not isinstance(tx, optax.GradientTransformation | optax.MultiSteps):
        raise TypeError(
            f"RefreshSchedule takes an Optax optimizer, got {tx!r}. For a fixed period call "
            "refresh_at(step, refresh_every=...) in each step."
        )
    owner = getattr(tx.init, "__self__", tx.init)  # a bound method would not outlive this call
    if owner in _known:
        return _known[owner]

    def record(placeholder: Any) -> tuple[()]:
        tx.init(placeholder)
        return ()

    try:
        # The question may come from a guarded training loop.
        with announcements() as announced, jax.transfer_guard("allow"):
            optax.tree.map_params(record, lambda leaf: leaf, ())
    except Exception as error:
        raise ValueError(
            "refresh_at reads the periods from `tx.init`, which does not accept the placeholder of "
            f"optax.tree.map_params ({type(error).__name__}: {error}). For a tracker give the "
            "period instead, refresh_at(step, refresh_every=..., start_step=...); for K-FAC choose "
            "'inverses', 'factors' or False yourself."
        ) from error
    periods = dict.fromkeys(a for a in announced if not isinstance(a, Cost))
    distinct = tuple(  # beside a tracker low-rank bases start anew as it does
        each
        for each in periods
        if not isinstance(each, _EigenspacePeriods)
        or each.starts_anew
        or each._replace(starts_anew=True) not in periods
    )
    if len({type(periods) for periods in distinct}) < len(distinct):
        raise ValueError(
            "one value of `refresh` drives all trackers and all K-FAC of an optimizer, but these "
            f"have different periods: {', '.join(str(p).lstrip('_') for p in distinct)}. Give them "
            "equal periods and start steps, or leave `refresh` out, so that each decides in the "
            "graph."
        )
    _known[owner] = distinct
    return distinct


def check_factor_periods(factors_every: Any, inverses_every: Any) -> None:
    """Raises if the periods of factors and inverses are not counts or not multiples."""
    check_count("factors_every", factors_every, 1)
    check_count("inverses_every", inverses_every, 1)
    known = known_integer(factors_every), known_integer(inverses_every)
    if None not in known and known[1] % known[0]:  # type: ignore[operator]
        raise ValueError(
            f"`inverses_every` must be a multiple of `factors_every`, {factors_every}, got "
            f"{inverses_every}: inverses are made of new factors."
        )
