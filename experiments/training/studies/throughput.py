"""Trains one network and measures what its steps take: examples per second and memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from experiments import hlo
from experiments.runs.records import number
from experiments.training import parallel
from experiments.training.loop import open_batches
from experiments.training.plan import Plan
from experiments.training.program import build

# Steps that are not timed: compilation, and the first batches under way.
WARM_UP = 5


def measure(plan: Plan) -> dict[str, Any]:
    """Trains one network and measures it.

    Args:
      plan: the run; more than `WARM_UP` steps.

    Returns:
      ``examples_per_second``, ``bytes`` of a step, ``accuracy`` and ``loss`` on the test split.
    """
    program = build(plan)
    runner = program.runner
    state = runner.init(program.make_state)
    windows = []
    with open_batches(plan, program) as batches:
        timed, began = 0, time.perf_counter()
        for done, batch in enumerate(batches, start=1):
            if done == 1:
                memory = hlo.memory(runner.lower(state, batch).compile())
            state, metrics = runner.step(state, batch)
            # As `train` does it: the loop waits now and then, not for every step.
            if done in (WARM_UP, plan.steps) or (done - WARM_UP) % parallel.FETCH_EVERY == 0:
                jax.block_until_ready(metrics)
                now = time.perf_counter()
                if done > WARM_UP:
                    windows.append((done - timed) * plan.batch_size / (now - began))
                timed, began = done, now
            if done == plan.steps:
                break
    scores = program.evaluate(state, plan.task.test)
    return {
        "examples_per_second": statistics.median(windows),
        "bytes": memory.total,
        "accuracy": number(scores["accuracy"]),
        "loss": number(scores["loss"]),
    }
