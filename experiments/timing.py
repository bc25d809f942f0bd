"""Times compiled calls side by side, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax


@dataclasses.dataclass
class Case:
    """One thing to time.

    Attributes:
      name: what is shown.
      base: name of the case it is compared with; None for a base.
      call: makes one call from the step number and the carried buffers, which it may donate.
      carry: the buffers.
      period: calls per timing, a multiple of the method's refresh period.
      target: highest acceptable ratio.
    """

    name: str
    base: str | None
    call: Callable[[int, Any], Any]
    carry: Any
    period: int
    target: float | None = None
    step: int = 0

    def time(self) -> float:
        """Seconds per call, over one period."""
        begin = time.perf_counter()
        for _ in range(self.period):
            self.carry = self.call(self.step, self.carry)
            self.step += 1
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - begin) / self.period


def measure(cases: Sequence[Case], repeats: int, warm_ups: int = 2) -> list[dict[str, Any]]:
    """Times a base and its methods, each method right beside the base.

    Args:
      cases: the base, then its methods.
      repeats: number of rounds.
      warm_ups: rounds before, whose times do not count.

    Returns:
      Per case: name, base, target, quartiles of milliseconds and of the ratio to the base.
    """
    for case in cases:  # compiles every form of the call, and lets the caches settle
        for _ in range(warm_ups):
            case.time()
    base, *others = cases
    own: dict[str, list[float]] = {case.name: [] for case in cases}
    ratios: dict[str, list[float]] = {case.name: [] for case in others}
    for i in range(repeats):
        for case in others:
            pair = (base, case) if i % 2 == 0 else (case, base)
            seconds = {member.name: member.time() for member in pair}
            for name, value in seconds.items():
                own[name].append(value)
            ratios[case.name].append(seconds[case.name] / seconds[base.name])
    return [
        {
            "name": case.name,
            "base": case.base,
            "milliseconds": [1000 * value for value in _quartiles(own[case.name])],
            "ratio": None if case is base else _quartiles(ratios[case.name]),
            "target": case.target,
        }
        for case in cases
    ]


def _quartiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])]


def machine() -> dict[str, Any]:
    """What a timing depends on besides the program."""
    return {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
    }
