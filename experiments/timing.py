"""Times compiled calls side by side, so that a busy moment of the machine slows all of them."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Calls a function and waits until the arrays that it returns are computed.

    >>> total, seconds = timed(lambda: jax.numpy.arange(4).sum())
    >>> int(total), seconds > 0
    (6, True)

    Args:
      call: the function.

    Returns:
      What it returned, and the seconds that this took.
    """
    begin = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - begin


def timed_cpu(call: Callable[[], T]) -> tuple[T, float, float]:
    """As `timed`, with the seconds of processor time, of all cores, that this process took.

    What else runs on a busy machine makes a call wait, but hardly adds to its processor time.

    Args:
      call: the function.

    Returns:
      What it returned, the seconds and the seconds of processor time.
    """
    begin = time.process_time()
    result, seconds = timed(call)
    return result, seconds, time.process_time() - begin


def interleave(
    timers: Sequence[Callable[[], float]],
    rounds: int,
    *,
    seconds: float = 0.0,
    most_rounds: int | None = None,
) -> np.ndarray:
    """Calls every timer once per round, forwards and backwards in turn.

    >>> interleave([lambda: 1.0, lambda: 2.0], rounds=3)
    array([[1., 1., 1.],
           [2., 2., 2.]])

    Args:
      timers: functions that do a piece of work and return the seconds that it took.
      rounds: number of rounds, at least.
      seconds: more rounds follow for as long as all of them have taken less time than this.
      most_rounds: number of rounds, at most; by default no more than `rounds`.

    Returns:
      The seconds, with one row per timer and one column per round.
    """
    end = time.perf_counter() + seconds
    columns: list[np.ndarray] = []
    while len(columns) < rounds or (
        len(columns) < (most_rounds or rounds) and time.perf_counter() < end
    ):
        column = np.empty(len(timers))
        order = range(len(timers))
        for j in order if len(columns) % 2 == 0 else reversed(order):
            column[j] = timers[j]()
        columns.append(column)
    return np.stack(columns, axis=1)


def quartiles(values: Any) -> list[float]:
    """The lower quartile, the median and the upper quartile of all elements of an array."""
    return [float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])]


def cpu_quartiles(times: Sequence[float], base: Sequence[float]) -> dict[str, list[float]]:
    """Quartiles of processor times, and of their ratios to those of the base in the same rounds.

    >>> cpu_quartiles([0.5, 0.5], [1.0, 1.0])["cpu_ratio"]
    [0.5, 0.5, 0.5]

    Args:
      times: seconds, one per round.
      base: seconds of what it is compared with, one per round.
    """
    seconds = np.asarray(times)
    return {
        "cpu_milliseconds": quartiles(1000 * seconds),
        "cpu_ratio": quartiles(seconds / np.asarray(base)),
    }


@dataclasses.dataclass
class Case:
    """A repeated call to time, such as a training step.

    Attributes:
      name: what tables show.
      base: name of the case that it is compared with; None for a base.
      call: takes the number of the step and the carried buffers, which it may donate; returns new
        buffers.
      carry: the buffers.
      period: calls per timing, a multiple of the method's refresh period.
      target: highest acceptable ratio to the base; None for no target.
      step: number of calls so far.
      bytes: bytes that a call has to read and write; None where they are not counted.
      clock: gives seconds, `time.process_time` for those of the CPU.
    """

    name: str
    base: str | None
    call: Callable[[int, Any], Any]
    carry: Any
    period: int
    target: float | None = None
    step: int = 0
    bytes: int | None = None
    clock: Callable[[], float] = time.perf_counter

    def time(self) -> float:
        """Seconds per call, over one period."""
        begin = self.clock()
        for _ in range(self.period):
            self.carry = self.call(self.step, self.carry)
            self.step += 1
        jax.block_until_ready(self.carry)
        return (self.clock() - begin) / self.period


def measure(cases: Sequence[Case], repeats: int, warm_ups: int = 2) -> list[dict[str, Any]]:
    """Times a base and its methods, each method right beside the base.

    Args:
      cases: the base, then its methods.
      repeats: number of rounds.
      warm_ups: rounds before, whose times do not count.

    Returns:
      Per case: name, base, target, quartiles of milliseconds and of the ratio to the base, also of
      CPU time, which other programs disturb less.
    """
    for case in cases:  # compiles every form of the call, and lets the caches settle
        for _ in range(warm_ups):
            case.time()
    base, *others = cases
    pairs = [case for other in others for case in (base, other)] or [base]
    cpu: list[list[float]] = [[] for _ in pairs]

    def timer(i: int) -> float:
        begin = time.process_time()
        seconds = pairs[i].time()
        cpu[i].append((time.process_time() - begin) / pairs[i].period)
        return seconds

    seconds = interleave([functools.partial(timer, i) for i in range(len(pairs))], repeats)
    base_seconds, other_seconds = seconds[::2], seconds[1::2]
    base_cpu, other_cpu = np.array(cpu[::2]), np.array(cpu[1::2])
    rows = []
    for i, case in enumerate(cases):
        times = other_seconds[i - 1] if i else base_seconds
        rows.append(
            {
                "name": case.name,
                "base": case.base,
                "milliseconds": quartiles(1000 * times),
                "ratio": quartiles(times / base_seconds[i - 1]) if i else None,
                "cpu_ratio": quartiles(other_cpu[i - 1] / base_cpu[i - 1]) if i else None,
                "target": case.target,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """What a timing depends on besides the program."""
    return {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
    }
