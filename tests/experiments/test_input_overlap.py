"""What is measured of an input that is slow; not how fast this machine is."""

from __future__ import annotations

import json
import time

import jax
import numpy as np
import pytest

from experiments import data, input_overlap


@pytest.fixture(autouse=True)
def backend():
    """Starts JAX before a command in this process can change its devices."""
    assert len(jax.devices()) == 8


SPLIT = data.Split(np.arange(8), np.zeros(8, np.int32))


def test_every_batch_is_late_and_every_step_is_timed():
    seen = []

    def step(batch):
        seen.append(int(batch["x"][0]))
        return batch

    result = input_overlap.measure(step, SPLIT, batch_size=1, delay=0.02, steps=5, rounds=2)
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
    result = input_overlap.Overlap(**times, events=())
    assert result.hidden == pytest.approx(0.9)
    assert result.hidden_by_queue == pytest.approx(0.5)


def test_input_overlaps_with_steps_when_prefetched():
    """While a step sleeps, the next batch is made: seen in the timeline, not in the total time."""

    def step(batch):
        time.sleep(0.03)
        return batch

    result = input_overlap.measure(step, SPLIT, batch_size=1, delay=0.03, steps=5, rounds=1)
    steps = [event for event in result.events if event.name == "step"]
    inputs = [event for event in result.events if event.name == "input"]
    assert any(i.start < s.end and s.start < i.end for i in inputs for s in steps)


def test_command_writes_a_timeline(tmp_path, capsys):
    path = tmp_path / "trace.json"
    arguments = ["--steps", "2", "--rounds", "1", "--delay", "0.01", "--trace", str(path)]
    assert input_overlap.main(arguments) == 0
    out = capsys.readouterr().out
    assert "delay of 10.00, in turn" in out
    assert f"timeline: {path}" in out
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans} == {"input", "step"}
    assert 2 <= len({event["tid"] for event in spans}) <= 3
    assert min(event["ts"] for event in spans) == 0
    assert all(event["dur"] > 0 for event in spans)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--delay", "0"], "--delay must be more than 0 and below 60, got 0.0"),
        (["--task", "foo"], "unknown task 'foo'"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert input_overlap.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
