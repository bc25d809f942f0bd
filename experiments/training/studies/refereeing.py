"""Trains the runs of a study: trials on tuning seeds, then the chosen ones on fresh seeds.

The folder of a setting then holds

    tuning/metrics/<method>.jsonl   one line per evaluation of each trial, on the tuning seeds
    final/metrics/<method>.jsonl    the same of the chosen trial of each contestant
    **/<method>.lock                held by the process that trains a method at the moment
    seconds.json                    seconds per step, where these are the unit of cost

and what is finished there is not trained again. Several processes may work on one folder: each
takes the next method that no other one trains, and at the end of a round waits for the rest. The
operating system lets go of the locks of a process that ends, however it ends, and another process
takes over what it left. All of them read the same files, so all come to the same results.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from rich.console import Console

from experiments import data, progress
from experiments.methods import Method
from experiments.runs.records import read_record, write_record
from experiments.training.replicas import Plan, Record, Replica, Trainer, free_memory
from experiments.training.studies import comparison, forecast

TUNING, FINAL = "tuning", "final"
_WAIT = 0.2  # seconds, before a process asks again for what others train


class Arena:
    """One setting of a study: its plan, and one trainer for all of its runs.

    Args:
      plan: the training of all trials; its `seeds` are the most that the tuning may need.
      most_seeds: most seeds of the final runs, which follow those of the tuning.
      folder: where finished runs are kept.
      processes: number of processes that share this machine's memory.

    Attributes:
      plan: the same.
      folder: the same.
    """

    def __init__(self, plan: Plan, most_seeds: int, folder: Path, processes: int = 1):
        self.plan, self.folder = plan, folder
        self._most_seeds, self._processes = most_seeds, processes
        self._announced: dict[str, float] = {}

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The trainer, made when it is first asked for."""
        return Trainer(
            dataclasses.replace(self.plan, seeds=self.plan.seeds + self._most_seeds),
            memory=free_memory() / 2 / self._processes,
        )

    def announce(self, contestants: int, tuned: int, seeds: int) -> None:
        """Tells `experiments.progress` what there will be to do, before it is known exactly.

        Args:
          contestants: number of the final runs' methods.
          tuned: number of seeds of every trial.
          seeds: of the final runs.
        """
        methods = self.plan.methods
        trials = tuned * sum(m.gradients_per_step * len(m.learning_rates) for m in methods)
        self._announced = {
            TUNING: float(self.plan.steps * trials),
            FINAL: float(self.plan.steps * contestants * seeds),
        }
        progress.expect(sum(self._announced.values()))

    def release(self) -> None:
        """Gives back the trainer's memory, compiled programs included."""
        vars(self).pop("trainer", None)

    def train_trials(
        self, methods: Sequence[Method], seeds: int, console: Console
    ) -> dict[str, list[Record]]:
        """Trains the trials that are not finished.

        Args:
          methods: those of the plan to train, with all of their learning rates.
          seeds: number of seeds of every trial.
          console: where to print what is done.

        Returns:
          The records of all of their runs on these seeds, by the method's name.
        """
        plan = dataclasses.replace(self.plan, methods=list(methods), seeds=seeds)
        return self._train(plan, TUNING, console)

    def train_final(
        self, chosen: Sequence[Sequence[Method]], console: Console
    ) -> dict[str, list[Record]]:
        """Trains the chosen trials on fresh seeds.

        Args:
          chosen: for each contestant and fresh seed the method with the one learning rate that was
            chosen.
          console: where to print what is done.

        Returns:
          The records of all final runs so far, by the method's name.
        """
        first = self.plan.first_seed + self.plan.seeds
        methods: dict[str, Method] = {}
        runs: dict[str, list[Replica]] = {}
        for of_contestant in chosen:
            for seed, method in enumerate(of_contestant, start=first):
                methods.setdefault(method.name, method)
                runs.setdefault(method.name, []).append((method.learning_rates[0], seed))
        plan = dataclasses.replace(self.plan, methods=list(methods.values()), runs=runs)
        return self._train(plan, FINAL, console)

    def _train(self, plan: Plan, kind: str, console: Console) -> dict[str, list[Record]]:
        folder = self.folder / kind
        (folder / "metrics").mkdir(parents=True, exist_ok=True)
        left = comparison.find_missing(plan, folder, self.trainer)
        records = {name: missing.records for name, missing in left.items()}
        todo = [method for method in plan.methods if left[method.name].todo]
        work = sum(missing.work for missing in left.values()) - self._announced.pop(kind, 0.0)
        with progress.show(console, "referee", work):
            while todo:
                taken = []
                for method in todo:
                    path = comparison.records_file(folder, method)
                    expected = left[method.name].work
                    try:
                        with filelock.FileLock(path.with_suffix(".lock"), timeout=0):
                            records[method.name] = self._finish(
                                plan, method, path, expected, console
                            )
                    except filelock.Timeout:
                        taken.append(method)
                if len(taken) == len(todo):
                    progress.tell(f"waiting for {taken[0].name}, which another process trains")
                    time.sleep(_WAIT)
                todo = taken
        return records

    def _finish(
        self, plan: Plan, method: Method, path: Path, expected: float, console: Console
    ) -> list[Record]:
        """Trains what another process has not trained since its work was expected."""
        missing = comparison.Missing.of(plan, method, path, self.trainer)
        progress.advance(expected - missing.work)
        return comparison.train_missing(plan, method, path, self.trainer, missing, console)

    def seconds_per_step(self, chosen: Sequence[Method]) -> Mapping[str, float]:
        """Seconds per step of methods, measured in alternation, once."""
        path = self.folder / "seconds.json"
        if (times := read_record(path)) is None:
            progress.tell("measuring the time per step of all methods")
            plan = dataclasses.replace(self.plan, methods=list(chosen))
            times = comparison.measure_time(Trainer(plan))
            write_record(path, times)
        seconds: Mapping[str, float] = times["seconds_per_step"]
        return seconds

    def costs(self, unit: str, chosen: Sequence[Method]) -> dict[str, dict[int, float]]:
        """The cost after each evaluation of a run, by the method's name and the step.

        Args:
          unit: ``"steps"``, ``"gradients"``, ``"passes"``, ``"seconds"`` or ``"bytes"``, which are
            those of the parameters and the optimizer's state, at any step.
          chosen: the methods.

        Returns:
          The costs; the last step of each method is the whole run.
        """
        plan, trainer = self.plan, self.trainer
        seconds = self.seconds_per_step(chosen) if unit == "seconds" else {}
        steps = [*range(plan.eval_every, plan.steps, plan.eval_every), plan.steps]
        share = plan.batch_size / len(plan.task.train.y)
        table: dict[str, dict[int, float]] = {}
        for method in chosen:
            if unit in ("gradients", "passes"):
                gradients = trainer.gradient_evaluations(method)
                scale = share if unit == "passes" else 1.0
                table[method.name] = {step: scale * float(gradients[step]) for step in steps}
            elif unit == "bytes":
                held = float(sum(trainer.state_bytes(method)))
                table[method.name] = dict.fromkeys(steps, held)
            else:
                each = seconds.get(method.name, 1.0)
                table[method.name] = {step: each * step for step in steps}
        return table

    def forecast(self, contestants: int, tuned: int, seeds: int) -> tuple[int, float, float]:
        """Number of runs that this setting takes, finished ones included, and their seconds.

        Steps, a validation and the compilation are measured on the first method; the others are
        taken to cost what their gradients say.

        Args:
          contestants: number of the final runs' methods.
          tuned: number of seeds of every trial.
          seeds: of the final runs.

        Returns:
          The number, the estimate, and the seconds of a single further run.
        """
        plan, trainer = dataclasses.replace(self.plan, seeds=tuned), self.trainer
        first, *_ = plan.methods
        replicas = plan.replicas(first)
        together = trainer.chunk_size(first, len(replicas))
        speed = forecast.of_runs(trainer, first, replicas[:together])
        evaluations = math.ceil(plan.steps / plan.eval_every) + 1
        work = {method.name: trainer.work(method, 1) for method in plan.methods}
        trials = sum(len(plan.replicas(method)) for method in plan.methods)
        tuning = sum(work[method.name] * len(plan.replicas(method)) for method in plan.methods)
        final = contestants * seeds * max(work.values())
        runs = trials + contestants * seeds
        compilation = (len(plan.methods) + contestants) * speed.first
        steps = (tuning + final) / work[first.name] * plan.steps * speed.step / together
        each = (plan.steps * speed.step + evaluations * speed.evaluation) / together
        return runs, compilation + steps + runs * evaluations * speed.evaluation / together, each


def corrupted(task: data.Task, label_noise: float, outliers: float) -> data.Task:
    """A task some of whose training examples are wrong; validation and test stay as they are.

    Args:
      task: a task of classes, one for each example, pixel or position.
      label_noise: share of the labels that become other ones, drawn uniformly.
      outliers: share of the examples whose input is drawn from a normal distribution with mean and
        standard deviation of all inputs.

    Returns:
      The task, whose wrong examples are the same in every call.
    """
    x, y = task.train.x, task.train.y
    rng = np.random.default_rng(0)
    if label_noise:
        labels, classes = y.reshape(-1).copy(), task.num_classes or task.vocabulary_size
        assert classes is not None
        wrong = rng.permutation(len(labels))[: round(label_noise * len(labels))]
        labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
        y = labels.reshape(y.shape)
    if outliers:
        wrong = rng.permutation(len(y))[: round(outliers * len(y))]
        x = x.copy()
        x[wrong] = rng.normal(x.mean(), x.std(), x[wrong].shape)
    train = dataclasses.replace(task.train, x=x, y=y)
    return dataclasses.replace(task, train=train) if label_noise or outliers else task


def config(plan: Plan) -> dict[str, Any]:
    """What of a setting decides the numbers, as plain JSON; the trials stand elsewhere."""
    full = plan.config()
    return {key: value for key, value in full.items() if key not in ("methods", "seeds")}
