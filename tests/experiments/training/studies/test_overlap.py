"""What is measured of an input that is slow; not how fast this machine is."""

from __future__ import annotations

import time

import numpy as np
import pytest

from experiments import data
from experiments.training.studies import overlap

SPLIT = data.Split(np.arange(8), np.zeros(8, np.int32))


def test_every_batch_is_late_and_every_step_is_timed():
    seen = []

    def step(batch):
        seen.append(int(batch["x"][0]))
        return batch

    result = overlap.measure(step, SPLIT, batch_size=1, delay=0.02, steps=5, rounds=2)
    # The same batches in each of four ways and two rounds; the first of each is not timed.
    assert len(seen) == 1 + 4 * 2 * 5
    assert len({tuple(seen[i : i + 5]) for i in range(1, len(seen), 5)}) == 1
    assert seen[0] not in seen[1:6]
    assert result.delay == 0.02
    assert min(result.in_turn, result.queued) >= 0.02
    steps = [event for event in result.events if event.name == "step"]
    inputs = [event for event in result.events if event.name == "input"]
    assert len(steps) == 5
    assert len(inputs) >= 6
    assert all(event.end - event.start >= 0.02 for event in inputs)
    assert {event.thread for event in steps}.isdisjoint(event.thread for event in inputs)


def test_share_that_is_hidden():
    times = {"delay": 10.0, "no_delay": 10.0, "in_turn": 20.0, "queued": 15.0, "prefetched": 11.0}
    result = overlap.Overlap(**times, events=())
    assert result.hidden == pytest.approx(0.9)
    assert result.hidden_by_queue == pytest.approx(0.5)


def test_input_overlaps_with_steps_when_prefetched():
    """While a step sleeps, the next batch is made: seen in the timeline, not in the total time."""

    def step(batch):
        time.sleep(0.03)
        return batch

    result = overlap.measure(step, SPLIT, batch_size=1, delay=0.03, steps=5, rounds=1)
    steps = [event for event in result.events if event.name == "step"]
    inputs = [event for event in result.events if event.name == "input"]
    assert any(i.start < s.end and s.start < i.end for i in inputs for s in steps)
