"""Runs of whole training protocols: what a runner is, and how its runs are kept.

The folder of a setting then holds

    tuning/<contestant>.json   the scores of each rate on the tuning seeds
    final/<contestant>.json    those of the chosen rate on fresh seeds
    kept/                      what the runner keeps for itself, such as a pretrained network

and what is finished there is not trained again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments import progress
from experiments.runs.records import number, read_record, write_record
from experiments.training.replicas import Replica

TUNING, FINAL, KEPT = "tuning", "final", "kept"
# By the name of the score. Lists are curves, which nothing judges.
Scores = Mapping[str, float | Sequence[float]]
Run = dict[str, Any]  # "learning_rate", "seed" and "scores", which are None where not finite


class Runner(Protocol):
    """What trains the contestants of one setting of a study.

    A runner is made of the setting's options, the folder with the data files (None for the one that
    OPTAX_ACCEL_DATA names) and a folder of its own, which need not exist. It does not train before
    it is told to, and runs of equal seeds start from equal weights and see equal batches.
    """

    def config(self) -> dict[str, Any]:
        """What decides the numbers besides the options, as plain JSON: checksums of the data."""

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of mini-batch gradients that one run of a contestant takes.

        Args:
          options: the contestant's.
        """

    def seconds(self) -> float:
        """Seconds that one mini-batch gradient takes, measured, without the compilation."""

    def run(self, options: Mapping[str, Any], runs: Sequence[Replica]) -> Iterable[Scores]:
        """Trains one contestant.

        Args:
          options: the contestant's.
          runs: (learning rate, seed) of each run; they may be trained together.

        Returns:
          For each run, in their order, its scores: ``"validation"``, the lowest of which chooses
          the rate, the measures of the study under their names, read on the test split, and
          whatever else is worth keeping. A generator that trains the runs one by one loses no more
          than one of them when it is interrupted.
        """


class Ring:
    """One setting of a study: its runner, and the records of its runs.

    Args:
      runner: what trains.
      folder: where finished runs are kept.
    """

    def __init__(self, runner: Runner, folder: Path):
        self.runner, self.folder = runner, folder

    def train(
        self, kind: str, name: str, options: Mapping[str, Any], runs: Sequence[Replica]
    ) -> list[Run]:
        """Trains the runs of a contestant that are not finished.

        Args:
          kind: `TUNING` or `FINAL`.
          name: of the contestant's file, without its ending.
          options: the contestant's.
          runs: (learning rate, seed) of each run.

        Returns:
          The records of all of these runs, in their order.
        """
        path = self.folder / kind / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {_key(run): run for run in (read_record(path) or {"runs": []})["runs"]}
        todo = [(rate, seed) for rate, seed in runs if (rate, seed) not in known]
        if todo:
            progress.tell(f"{self.folder.name}: {name}, {kind}")
            for (rate, seed), scores in zip(todo, self.runner.run(options, todo), strict=True):
                known[rate, seed] = {
                    "learning_rate": rate,
                    "seed": seed,
                    "scores": {key: _plain(value) for key, value in scores.items()},
                }
                write_record(path, {"runs": list(known.values())})
        progress.advance(len(runs) * self.runner.gradients(options))
        return [known[rate, seed] for rate, seed in runs]


def _key(run: Run) -> Replica:
    return run["learning_rate"], run["seed"]


def _plain(value: Any) -> Any:
    """A score, or a curve of them, for JSON."""
    return [number(v, 7) for v in value] if isinstance(value, list | tuple) else number(value, 7)
