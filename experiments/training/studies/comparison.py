"""Trains every run of a comparison: methods x learning rates x seeds, with one budget for all.

The folder of a comparison then holds

    metrics/<method>.jsonl  one line per evaluation: rate, seed, step, cost, losses, accuracy
    timing.json             seconds per step, measured for all methods in alternation

and what is finished there is not trained again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import models
from experiments import cli, data, progress, timing
from experiments.cli import UsageError
from experiments.methods import METHODS, Method, get_methods
from experiments.runs.records import is_number, read_file, read_record, write_record
from experiments.training.replicas import Plan, Record, Replica, Runs, Trainer

# Passes over the training split; 10 for any other task.
DEFAULT_EPOCHS = {"digits": 30, "mnist": 3, "mnist5k": 20, "cifar10": 5, "cifar10_5k": 20}
DEFAULT_EPOCHS |= {"sst2": 1, "sst2_1k": 10}
# The time per step is measured in at least 9 rounds, and in up to 50 while they take fewer seconds.
LEAST_TIMING_ROUNDS, MOST_TIMING_ROUNDS = 9, 50
TIMING_SECONDS = 5.0


def plan(
    task_name: str,
    method_names: Sequence[str],
    *,
    learning_rates: Sequence[float] | None = None,
    data_dir: Path | None = None,
    files: Mapping[str, Any] = MappingProxyType({}),
    model: str | None = None,
    loss: str = "cross_entropy",
    seeds: int = 3,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    curvature_batch_size: int | None = None,
    eval_every: int | None = None,
    target: float | None = None,
    kinds: Sequence[str] = ("classification",),
    examples: int | None = None,
) -> Plan:
    """Checks the settings of a comparison and fills in the defaults.

    Args:
      task_name: data set; its labels are of one of the `kinds`.
      method_names: entries of the catalogue.
      learning_rates: the rates that each of them is tuned on; ``None`` for the grid that the
        catalogue has for it.
      data_dir: folder with the data files; ``None`` for the one that OPTAX_ACCEL_DATA names.
      files: how files of one's own are read, by option; see `data.FilesOptions`.
      model: name of the model; ``None`` for the task's own.
      loss: name of the loss.
      seeds: number of seeds per method and learning rate.
      epochs: passes over the training split; ``None`` for the task's usual number.
      steps: number of steps, which goes before `epochs`.
      batch_size: examples per step.
      curvature_batch_size: examples, fixed per seed, for Hessian-vector products; ``None`` for
        twice the batch size.
      eval_every: steps between validations; ``None`` for up to 75 points per curve.
      target: validation accuracy to count the steps to; ``None`` for the task's own.
      kinds: kinds of tasks that are accepted, of those in `data.LOSSES` whose scores have an
        accuracy: ``"classification"``, ``"segmentation"``, ``"language"`` or ``"translation"``.
      examples: number of training examples that are used, the first ones; ``None`` for all.

    Returns:
      The plan.

    Raises:
      ValueError: one line that says which setting is wrong and what is allowed.
    """
    methods = get_methods(method_names, per_worker=False)
    if learning_rates is not None:
        methods = [dataclasses.replace(m, learning_rates=tuple(learning_rates)) for m in methods]
    if tuple(kinds) == ("classification",):
        data.check_classification(task_name)
    kind = data.find_task(task_name).kind
    cli.check_known("kind of task", kind, tuple(kinds))
    cli.check_known("model", model, models.list())
    cli.check_known("loss", loss, data.LOSSES[kind])
    load = data.load_classification if kind == "classification" else data.load_task
    task = load(task_name, data_dir=data_dir, **files)
    if examples is not None:
        if not 0 < examples <= len(task.train):
            raise UsageError(
                f"task {task.name} has {len(task.train)} training examples, of which 1 or more can "
                f"be used, got {examples}"
            )
        task = dataclasses.replace(task, train=task.train[:examples])
    examples = len(task.train.y)
    curvature_batch_size = curvature_batch_size or min(2 * batch_size, examples)
    for name, value in (
        ("batch-size", batch_size),
        ("curvature-batch-size", curvature_batch_size),
    ):
        if value > examples:
            raise UsageError(
                f"--{name} {value} is more than the {examples} training examples of {task.name}"
            )
    epochs = epochs or DEFAULT_EPOCHS.get(task.name) or data.default_epochs(task, batch_size)
    steps = steps or epochs * (examples // batch_size)
    if steps > cli.COUNT.high:
        raise UsageError(f"--epochs {epochs} are {steps} steps, more than {cli.COUNT.high}")
    order = 4 * seeds * steps * batch_size
    cli.check_memory(order, f"the order of the examples over {seeds} x {steps} steps")
    # Never look at more validation examples than training examples: at most a third of the time.
    enough = math.ceil(len(task.validation.y) / batch_size)
    return Plan(
        task=task,
        model=model or task.default_model,
        loss=loss,
        methods=methods,
        seeds=seeds,
        steps=steps,
        batch_size=batch_size,
        curvature_batch_size=curvature_batch_size,
        eval_every=min(steps, eval_every or max(round(steps / 75), enough)),
        target=task.target_accuracy if target is None else target,
    )


class Outcome(NamedTuple):
    """What a comparison measured.

    Attributes:
      records: of the runs of each method, by the method's name.
      costs: what each method takes, by its name: parameters of the model, bytes of state over
        those of the parameters, seconds per step, and these over its base's.
      timing: how the time was measured: runs trained together, rounds.
    """

    records: dict[str, list[Record]]
    costs: dict[str, dict[str, Any]]
    timing: dict[str, int]


def train(plan: Plan, folder: Path, trainer: Trainer, console: Console) -> Outcome:
    """Trains what is not finished yet and measures the time per step.

    Args:
      plan: the comparison.
      folder: its folder.
      trainer: the trainer of this plan.
      console: where to show progress.

    Returns:
      The records of all runs, those that were finished before included, and the costs.
    """
    records: dict[str, list[Record]] = {}
    left = find_missing(plan, folder, trainer)
    with progress.show(console, "compare", sum(missing.work for missing in left.values())):
        for method in plan.methods:
            path = records_file(folder, method)
            missing = left[method.name]
            records[method.name] = train_missing(plan, method, path, trainer, missing, console)
        path = folder / "timing.json"
        times = read_record(path)
        if times is None:
            progress.tell("measuring the time per step of all methods")
            begin = time.perf_counter()
            times = measure_time(trainer)
            write_record(path, times)
            seconds = time.perf_counter() - begin
            console.print(f"  {'time per step':<18} {times['rounds']} rounds: {seconds:.1f} s")
    costs = {}
    for method in plan.methods:
        parameters, opt_state = trainer.state_bytes(method)
        costs[method.name] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainer.weights[0][0])),
            "state_relative_to_parameters": opt_state / parameters,
            "seconds_per_step": times["seconds_per_step"][method.name],
            "time_relative_to_base": times["relative_to_base"].get(method.name),
        }
    return Outcome(records, costs, {key: times[key] for key in ("runs_together", "rounds")})


class Missing(NamedTuple):
    """What there is of a method's runs, and what is to be done.

    Attributes:
      records: of the finished runs.
      todo: the others.
      size: how many of them are trained together.
      work: what they take, in mini-batch gradients, see `Trainer.work`.
    """

    records: list[Record]
    todo: list[Replica]
    size: int
    work: float

    @classmethod
    def of(cls, plan: Plan, method: Method, path: Path, trainer: Trainer) -> Missing:
        """Reads the file of a method."""
        records = read_records(plan, method, path)
        finished = {(record["learning_rate"], record["seed"]) for record in records}
        todo = [replica for replica in plan.replicas(method) if replica not in finished]
        size = trainer.chunk_size(method, len(todo)) if todo else 1
        whole_chunks = size * math.ceil(len(todo) / size)
        return cls(records, todo, size, trainer.work(method, whole_chunks))


def records_file(folder: Path, method: Method) -> Path:
    """The file of a method's records in the folder of a comparison."""
    return folder / "metrics" / f"{method.name}.jsonl"


def find_missing(plan: Plan, folder: Path, trainer: Trainer) -> dict[str, Missing]:
    """What there is of each method's runs in a folder, which need not exist, and what is to do."""
    return {
        method.name: Missing.of(plan, method, records_file(folder, method), trainer)
        for method in plan.methods
    }


def train_missing(
    plan: Plan, method: Method, path: Path, trainer: Trainer, missing: Missing, console: Console
) -> list[Record]:
    """Trains the runs of a method that its file lacks, a chunk at a time; returns all records."""
    records, todo, size, _ = missing
    if not todo:
        console.print(f"  {method.name:<18} already done")
        return records
    if path.exists() and len(read_file(path).splitlines()) > len(records):
        console.print(f"  {method.name:<18} damaged runs in {path} are trained again")
    begin = time.perf_counter()
    for first in range(0, len(todo), size):
        chunk = todo[first : first + size]
        # The last chunk is filled up with copies, so that the compiled program fits.
        padded = chunk + [chunk[-1]] * (size - len(chunk))
        new = trainer.train(method, padded)
        records.extend({(r["learning_rate"], r["seed"], r["step"]): r for r in new}.values())
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        cli.write_atomic(path, "".join(lines))
    together = "" if size == len(todo) else f", {size} at a time"
    seconds = time.perf_counter() - begin
    console.print(
        f"  {method.name:<18} {cli.plural(len(todo), 'run')} of "
        f"{cli.plural(plan.steps, 'step')}{together}: {seconds:.1f} s"
    )
    return records


def read_records(plan: Plan, method: Method, path: Path) -> list[Record]:
    """The records of one method's finished runs, from its file.

    A run with a damaged or a missing line counts as not finished.

    Args:
      plan: the comparison that the runs belong to.
      method: the method.
      path: its file; it need not exist.

    Returns:
      The records, in the order of the file.

    Raises:
      UsageError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return []
    points = [*range(0, plan.steps, plan.eval_every), plan.steps]
    runs: dict[Replica, list[Record]] = {replica: [] for replica in plan.replicas(method)}
    records = []
    for line in read_file(path).splitlines():
        try:
            record = cli.parse_json(line)
            runs[record["learning_rate"], record["seed"]].append(record)
        except (ValueError, KeyError, TypeError):
            continue
        records.append(record)
    finished = {
        replica
        for replica, run in runs.items()
        if [record.get("step") for record in run] == points
        and all(_is_valid(record, method, plan.steps) for record in run)
    }
    return [record for record in records if (record["learning_rate"], record["seed"]) in finished]


def _is_valid(record: Record, method: Method, steps: int) -> bool:
    """Whether a record holds all that `Trainer.train` writes, within its range."""
    scores = ["validation_loss", "validation_accuracy"]
    if record["step"] > 0:
        scores.append("train_loss")
    if record["step"] == steps:
        scores += ["test_loss", "test_accuracy"]
    numbers = ("learning_rate", "seed", "step", "gradient_evaluations")
    return (
        record.get("method") == method.name
        and all(is_number(record.get(name)) for name in numbers)
        and record["gradient_evaluations"] >= 0
        and all(
            name in record and (record[name] is None or is_number(record[name])) for name in scores
        )
        and all(0 <= (record[name] or 0) <= 1 for name in scores if name.endswith("accuracy"))
    )


def measure_time(trainer: Trainer) -> dict[str, Any]:
    """Seconds per training step of every method and base.

    They run in alternation, so that a busy moment of the machine slows all alike. What is timed is
    the compiled step of many runs together (batch gather, gradients, curvature refreshes at their
    usual rhythm, update). Compilation, cold starts and evaluation are excluded.

    Args:
      trainer: the trainer of a comparison.

    Returns:
      ``runs_together``, ``rounds``, and by method ``seconds_per_step`` and ``relative_to_base``,
      the medians over the rounds.
    """
    plan = trainer.plan
    timed = {method.name: method for method in plan.methods}
    for method in plan.methods:
        if method.base is not None:
            timed.setdefault(method.base, METHODS[method.base])
    everyone = plan.replicas(plan.methods[0])
    together = int(
        trainer.memory // sum(trainer.replica_bytes(method) for method in timed.values())
    )
    count = max(1, min(len(everyone), together, trainer.max_replicas or together))
    if any(map(trainer.alone, timed.values())):
        count = 1

    timers = []
    for method in timed.values():
        lowest = min(method.learning_rates)  # stays finite; the time does not depend on the rate
        runs = trainer.start(method, [(lowest, seed) for _, seed in everyone[:count]])
        period = method.period * math.ceil(5 / method.period)
        timer = timing.Case(method.name, method.base, functools.partial(_advance, runs), 0, period)
        # Warm-up compiles each form of the step: cold start, refresh, plain.
        for _ in range(3):  # past the ten sweeps that replace a cold start
            timer.time()
        timers.append(timer.time)
    rows = timing.interleave(
        timers, LEAST_TIMING_ROUNDS, seconds=TIMING_SECONDS, most_rounds=MOST_TIMING_ROUNDS
    )
    seconds = dict(zip(timed, rows, strict=True))
    return {
        "runs_together": count,
        "rounds": rows.shape[1],
        "seconds_per_step": {name: float(np.median(row)) for name, row in seconds.items()},
        "relative_to_base": {
            method.name: float(np.median(seconds[method.name] / seconds[method.base]))
            for method in plan.methods
            if method.base is not None
        },
    }


def _advance(runs: Runs, step: int, _: Any) -> jax.Array:
    return runs.advance(step)
