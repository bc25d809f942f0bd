"""Trains the runs of a study: trials on tuning seeds, then the chosen ones on fresh seeds.

The folder of a setting then holds

    tuning/metrics/<method>.jsonl   one line per evaluation of each trial, on the tuning seeds
    final/metrics/<method>.jsonl    the same of the chosen trial of each contestant
    seconds.json                    seconds per step, where these are the unit of cost

and what is finished there is not trained again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import progress
from experiments.methods import Method
from experiments.runs.records import read_record, write_record
from experiments.training.replicas import Plan, Record, Trainer
from experiments.training.studies import comparison, forecast


class Arena:
    """One setting of a study: its plan, and one trainer for all of its runs.

    Args:
      plan: the training of all trials; its `seeds` are those of the tuning.
      most_seeds: most seeds of the final runs, which follow those of the tuning.
      folder: where finished runs are kept.

    Attributes:
      plan: the same.
      folder: the same.
    """

    def __init__(self, plan: Plan, most_seeds: int, folder: Path):
        self.plan, self.folder = plan, folder
        self._most_seeds = most_seeds

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The trainer, made when it is first asked for."""
        return Trainer(dataclasses.replace(self.plan, seeds=self.plan.seeds + self._most_seeds))

    def release(self) -> None:
        """Gives back the trainer's memory, compiled programs included."""
        vars(self).pop("trainer", None)

    def train_trials(self, console: Console) -> dict[str, list[Record]]:
        """Trains the trials that are not finished; returns all records by the method's name."""
        return self._train(self.plan, self.folder / "tuning", console)

    def train_final(
        self, chosen: Sequence[Method], seeds: int, console: Console
    ) -> dict[str, list[Record]]:
        """Trains the chosen trials on fresh seeds.

        Args:
          chosen: methods with the one learning rate that was chosen.
          seeds: number of seeds.
          console: where to print what is done.

        Returns:
          The records of all final runs so far, by the method's name.
        """
        plan = dataclasses.replace(
            self.plan,
            methods=list(chosen),
            first_seed=self.plan.first_seed + self.plan.seeds,
            seeds=seeds,
        )
        return self._train(plan, self.folder / "final", console)

    def _train(self, plan: Plan, folder: Path, console: Console) -> dict[str, list[Record]]:
        paths = {method.name: comparison.records_file(folder, method) for method in plan.methods}
        left = comparison.find_missing(plan, folder, self.trainer)
        (folder / "metrics").mkdir(parents=True, exist_ok=True)
        records = {name: missing.records for name, missing in left.items()}
        with progress.show(console, "referee", sum(missing.work for missing in left.values())):
            for method in plan.methods:
                if (missing := left[method.name]).todo:
                    records[method.name] = comparison.train_missing(
                        plan, method, paths[method.name], self.trainer, missing, console
                    )
        return records

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

    def forecast(self, contestants: int, seeds: int) -> tuple[int, float, float]:
        """Number of runs that this setting takes, finished ones included, and their seconds.

        Steps, a validation and the compilation are measured on the first method; the others are
        taken to cost what their gradients say.

        Args:
          contestants: number of the final runs' methods.
          seeds: of the final runs.

        Returns:
          The number, the estimate, and the seconds of a single further run.
        """
        plan, trainer = self.plan, self.trainer
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


def config(plan: Plan) -> dict[str, Any]:
    """What of a setting decides the numbers, as plain JSON; the trials stand elsewhere."""
    full = plan.config()
    return {key: value for key, value in full.items() if key not in ("methods", "seeds")}
