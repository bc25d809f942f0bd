"""How much of a slow input prefetching hides.

    python -m experiments.input_overlap --task cifar10_5k --trace overlap.json

Reading a batch is made slower by a delay, by default as long as a training step: then reading and
computing one after the other take twice the time of a step, and at best, one beside the other, once
that time. Measured in interleaved rounds are a step without delay, and with it, each batch read
when it is asked for (`--prefetch 0` of `train`) or ahead in the background, by two threads
(`--data-workers 2`), so that one late batch does not stop all. The share that is hidden is
1 - (prefetched - no delay) / (in turn - no delay).

Every step is waited for. A loop that does not wait, as `train` between its looks at the metrics,
hides some of the delay without prefetching too, since JAX computes in the background; that is the
row "queued".

The trace is a timeline of a prefetched round, one row for the steps and one for each thread that
reads; Perfetto (ui.perfetto.dev) and chrome://tracing open it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from experiments import cli, data, timing
from experiments.reporting import tables
from experiments.training.options import Options as TrainingOptions
from experiments.training.plan import prepare
from experiments.training.program import build

PROG = "python -m experiments.input_overlap"


class Event(NamedTuple):
    """One piece of work: "input" or "step", from start to end in seconds, and its thread."""

    name: str
    thread: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Seconds per step, medians over the rounds.

    Attributes:
      delay: the artificial one of each batch.
      no_delay: without it.
      in_turn: with it, reading and computing one after the other.
      queued: with it, without prefetching, but steps are not waited for one by one.
      prefetched: with it, read ahead.
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
    """Examples that are read late."""

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
      step: trains on a batch on the device; returns arrays to wait for. It is called once before
        the clock runs.
      split: the examples.
      put: places a batch, as for `data.prefetch_to_device`.
      batch_size: examples per step.
      delay: seconds by which each batch is late; None: the time of a step without.
      steps: steps of a round.
      rounds: rounds of each way, interleaved.
      workers: threads that read, when batches are prefetched.
      prefetch: batches that wait on the device then.

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
    """A timeline as JSON in the format of Chrome's trace viewer, which Perfetto opens too."""
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


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Measure how much of a slow input prefetching hides."""

    limits: ClassVar = {"workers": cli.Range(1, 1_000), "prefetch": cli.Range(1, 1_000)}

    task: str = "digits"
    """Data set; an unknown name lists all."""
    data_dir: Path | None = None
    """As in train."""
    model: str | None = None
    """Model; default: the task's own."""
    model_options: str | None = None
    """As in train."""
    batch_size: int | None = None
    """Examples per step; default: the task's own."""
    delay: float | None = None
    """Seconds by which each batch is late; default: as long as a step."""
    steps: int = 20
    """Steps of a round."""
    rounds: int = 5
    """Interleaved rounds; medians are reported."""
    workers: int = 2
    """Threads that read ahead."""
    prefetch: int = 2
    """Batches that wait on the device."""
    trace: Path | None = None
    """File for the timeline."""


def run(options: Options) -> Overlap:
    """Measures what the options say, on one device.

    Raises:
      ValueError: an option is wrong.
    """
    options.check()
    cli.check_file("--trace", options.trace)
    plan = prepare(
        TrainingOptions(
            task=options.task,
            data_dir=options.data_dir,
            model=options.model,
            model_options=options.model_options,
            batch_size=options.batch_size,
            devices=1,
        )
    )
    program = build(plan)
    state = program.runner.init(program.make_state)

    def step(batch: Any) -> Any:
        nonlocal state
        state, metrics = program.runner.step(state, batch, None, None)
        return metrics

    return measure(
        step,
        plan.task.train,
        program.runner.put_batch,
        batch_size=plan.batch_size,
        delay=options.delay,
        steps=options.steps,
        rounds=options.rounds,
        workers=options.workers,
        prefetch=options.prefetch,
    )


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        result = run(options)
    table = tables.table(("milliseconds per step", "time", "delay hidden"))
    table.add_row("no delay", f"{1e3 * result.no_delay:.2f}", "")
    table.add_row(
        f"delay of {1e3 * result.delay:.2f}, in turn", f"{1e3 * result.in_turn:.2f}", "0 %"
    )
    table.add_row("queued", f"{1e3 * result.queued:.2f}", f"{result.hidden_by_queue:.0%}")
    table.add_row("prefetched", f"{1e3 * result.prefetched:.2f}", f"{result.hidden:.0%}")
    cli.console(80).print(table)
    if options.trace is not None:
        cli.write_atomic(options.trace, trace(result.events))
        print(f"timeline: {options.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
