"""How much of a slow input prefetching hides, and a timeline of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import data, timing


class Event(NamedTuple):
    """One piece of work.

    Attributes:
      name: ``"input"`` or ``"step"``.
      thread: id of the thread that did it.
      start: when it began, in seconds.
      end: when it ended, in seconds.
    """

    name: str
    thread: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Seconds per step, medians over the rounds.

    Attributes:
      delay: the artificial delay of each batch.
      no_delay: time without the delay.
      in_turn: time with it, reading and computing one after the other.
      queued: time with it, without prefetching, when steps are not waited for one by one.
      prefetched: time with it when batches are read ahead.
      events: timeline of the last prefetched round.
    """

    delay: float
    no_delay: float
    in_turn: float
    queued: float
    prefetched: float
    events: tuple[Event, ...]

    @property
    def hidden(self) -> float:
        """Share of the delay that prefetching hides; 1 is all of it."""
        return 1 - (self.prefetched - self.no_delay) / (self.in_turn - self.no_delay)

    @property
    def hidden_by_queue(self) -> float:
        """The same without prefetching, by not waiting for each step."""
        return 1 - (self.queued - self.no_delay) / (self.in_turn - self.no_delay)


class _Slow:
    """Examples that take longer to read than they need to."""

    def __init__(self, x: Any, delay: float, events: list[Event]):
        self._x, self._delay, self._events = x, delay, events

    def __getitem__(self, rows: Any) -> Any:
        start = time.perf_counter()
        time.sleep(self._delay)
        x = self._x[rows]
        self._events.append(Event("input", threading.get_ident(), start, time.perf_counter()))
        return x


def measure(
    step: Callable[[Any], Any],
    split: data.Split,
    put: Callable[[Any], Any] = jax.device_put,
    *,
    batch_size: int,
    delay: float | None = None,
    steps: int = 20,
    rounds: int = 5,
    workers: int = 2,
    prefetch: int = 2,
) -> Overlap:
    """Times a training step with a slow input.

    >>> mean = jax.jit(lambda batch: batch["x"].mean())
    >>> split = data.load_task("digits").train
    >>> result = measure(mean, split, batch_size=64, delay=0.01, steps=5, rounds=1)
    >>> result.in_turn > result.prefetched > 0
    True

    Args:
      step: trains on a batch on the device and returns arrays to wait for. It is called once before
        the clock runs.
      split: the examples.
      put: places a batch on the device.
      batch_size: number of examples per step.
      delay: seconds by which each batch is late; None for the time of a step without delay.
      steps: number of steps in a round.
      rounds: number of interleaved rounds of each way.
      workers: number of threads that read when batches are prefetched.
      prefetch: number of batches that wait on the device then.

    Returns:
      The times.
    """
    jax.block_until_ready(step(put(next(iter(data.batches(split, batch_size=batch_size, seed=0))))))

    def run(delay: float, ahead: bool, wait: bool = True) -> tuple[float, list[Event]]:
        events: list[Event] = []
        outputs: Any = None
        slow = dataclasses.replace(split, x=_Slow(split.x, delay, events))
        batches = data.batches(slow, batch_size=batch_size, seed=0, workers=workers if ahead else 0)
        size = prefetch if ahead else 0
        with data.prefetch_to_device(iter(batches), put, size) as prefetched:
            next(prefetched)  # the first batch is always waited for
            begin = time.perf_counter()
            for _ in range(steps):
                batch = next(prefetched)
                start = time.perf_counter()
                outputs = step(batch)
                if wait:
                    jax.block_until_ready(outputs)
                events.append(Event("step", threading.get_ident(), start, time.perf_counter()))
            jax.block_until_ready(outputs)
            seconds = (time.perf_counter() - begin) / steps
        return seconds, events

    late = statistics.median(run(0.0, True)[0] for _ in range(3)) if delay is None else delay
    events: list[Event] = []

    def prefetched() -> float:
        nonlocal events
        seconds, events = run(late, True)
        return seconds

    timers = {
        "no_delay": lambda: run(0.0, True)[0],
        "in_turn": lambda: run(late, False)[0],
        "queued": lambda: run(late, False, wait=False)[0],
        "prefetched": prefetched,
    }
    seconds = timing.interleave(list(timers.values()), rounds)
    medians = {name: float(np.median(row)) for name, row in zip(timers, seconds, strict=True)}
    return Overlap(late, **medians, events=tuple(events))


def trace(events: Sequence[Event]) -> str:
    """A timeline as JSON in the format of Chrome's trace viewer, which Perfetto opens too.

    Args:
      events: the pieces of work, at least one.
    """
    begin = min(event.start for event in events)
    threads = {event.thread: event.name for event in events}
    named = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
        for thread, name in threads.items()
    ]
    spans = [
        {
            "name": event.name,
            "ph": "X",
            "pid": 1,
            "tid": event.thread,
            "ts": 1e6 * (event.start - begin),
            "dur": 1e6 * (event.end - event.start),
        }
        for event in events
    ]
    return json.dumps({"traceEvents": named + spans})
