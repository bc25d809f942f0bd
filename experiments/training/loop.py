"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import models
from experiments import cli, data
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.metric_files import MetricFiles, Row
from experiments.runs.records import number
from experiments.training import cluster, parallel
from experiments.training.profiling import StepTrace
from experiments.training.program import Program, evaluate, statistics
from experiments.training.settings import Plan

PyTree = Any


# So many steps skipped in a row, or so many rollbacks without a new checkpoint, end the run: what
# is wrong is then not a batch.
MAX_SKIPPED = 10
MAX_ROLLBACKS = 3


class NonFiniteError(Exception):
    """The run met numbers that are not finite; the message is one line."""


class Run:
    """A plan under way in its folder, from the latest checkpoint there on; a context manager.

    Args:
      plan: what to run.
      program: from `build`.
      console: where progress is shown.

    Raises:
      UsageError, CheckpointError: what is in the folder does not fit; it is left as it is.
    """

    def __init__(self, plan: Plan, program: Program, console: Console):
        self.plan, self.program, self.console = plan, program, console
        self.runner = program.runner
        # XLA runs the convolutions of the Lanczos loop many times slower on a CPU (jax#12868).
        on_cpu = plan.devices[0].platform == "cpu"
        self._cold_start = not (on_cpu and models.is_convolutional(plan.model))
        self._target = self.runner.abstract_state(program.make_state)
        self._columns = [
            *(
                "step",
                "epoch",
                "loss",
                *jax.eval_shape(statistics, jax.eval_shape(program.make_state).opt_state),
            ),
            *(f"validation_{name}" for name in program.scores),
            "seconds",
        ]
        self._files: MetricFiles | None = None  # only the main process has them
        # Steps under way: a row to complete, their metrics, the position in the data behind them.
        self._pending: list[tuple[Row, dict[str, jax.Array], Any]] = []
        self._rows: list[Row] = []  # complete, not yet written
        self._skipped = self._rollbacks = 0
        # The lowest validation loss so far, and the validations since then.
        self._best, self._worse = math.inf, 0

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            self._load_data()
            self._checkpoints = stack.enter_context(
                Checkpoints(
                    self.plan.folder / "checkpoints", self.plan.keep, warn=self.console.print
                )
            )
            stack.callback(self._batches.close)
            position = self._restore()
            if position is not None:
                self._batches.set_state(position)
            stack.callback(self._close_files)
            self._trace = None
            if self.plan.profile and cluster.is_main():
                self._trace = stack.enter_context(StepTrace(self.plan.folder / "profile"))
            self._progress = stack.enter_context(
                Progress(
                    TextColumn(f"{self.plan.method.name} on {self.plan.task.name}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[metrics]}", markup=False),
                    console=self.console,
                )
            )
            self._bar = self._progress.add_task(
                "", total=self.plan.steps, completed=self.done, metrics="compiling"
            )
            if self.done:
                self.console.print(f"resuming at step {self.done}")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _load_data(self) -> None:
        plan, train = self.plan, self.plan.task.train
        shard = grain.sharding.ShardByJaxProcess()
        dataset = data.batches(
            train,
            batch_size=plan.batch_size,
            seed=plan.seed,
            shard=shard,
            augment=plan.augment,
            num_classes=plan.task.num_classes,
            workers=plan.data_workers,
        )
        self._batches = data.prefetch_to_device(iter(dataset), self.runner.put_batch, plan.prefetch)
        self._curvature = None
        if plan.curvature_batch_size is not None:
            # Fixed: redrawn at every refresh, its noise alone would move the subspace.
            order = np.random.default_rng(plan.seed).permutation(len(train))
            rows = np.split(order[: plan.curvature_batch_size], shard.shard_count)[
                shard.shard_index
            ]
            self._curvature = self.runner.put_batch({"x": train.x[rows], "y": train.y[rows]})

    def _restore(self) -> Any:
        """Goes to the latest checkpoint, or to the start; returns the position in the data."""
        if self._checkpoints.latest() is None:
            self.done, position = 0, None
            self._best, self._worse = math.inf, 0
            self.state = self.runner.init(self.program.make_state)
        else:
            self.done, state, kept = self._checkpoints.restore(self._target)
            position, self._worse = kept["batches"], kept["worse"]
            self._best = math.inf if kept["best"] is None else kept["best"]
            self.state = self.runner.put_state(state)
        cluster.from_main(self._open_files)
        self._began = self._fetched = time.monotonic()
        return position

    def _open_files(self) -> None:
        self._close_files()
        self._files = MetricFiles(self.plan.folder, self._columns, self.done)

    def _close_files(self) -> None:
        if self._files is not None:
            self._files.close()

    def advance(self) -> None:
        """Starts one step."""
        refresh = self.plan.method.refresh(self.done, cold_start=self._cold_start)
        batch = next(self._batches)
        with contextlib.nullcontext() if self._trace is None else self._trace.step():
            self.state, metrics = self.runner.step(
                self.state, batch, self._curvature if refresh else None, refresh
            )
        if self._trace is not None and self._trace.done(metrics):
            self.console.print(f"profile: {self._trace.file}", soft_wrap=True)
        self.done += 1
        before = self._files.seconds if self._files else 0.0
        row: Row = {
            "step": self.done,
            "epoch": round(self.done / (len(self.plan.task.train) // self.plan.batch_size), 4),
            "seconds": round(before + time.monotonic() - self._began, 3),
        }
        self._pending.append((row, metrics, self._batches.get_state()))

    def is_due(self, every: int) -> bool:
        """Whether something is to be done behind this step; the last one is always due."""
        return self.done % every == 0 or self.done == self.plan.steps

    def wants_fetch(self) -> bool:
        """Whether so many steps are under way, or so long, that they are to be waited for."""
        # Several processes must do it at the same step: what they do then may need all of them.
        late = jax.process_count() == 1 and time.monotonic() - self._fetched > 0.5
        return late or len(self._pending) >= parallel.FETCH_EVERY

    def fetch(self) -> bool:
        """Waits for the steps under way.

        Returns:
          False if one of them made the run go back to an earlier step.

        Raises:
          NonFiniteError: one of them is not finite, and the policy has no (further) help.
        """
        pending, self._pending = self._pending, []
        values = jax.device_get([metrics for _, metrics, _ in pending])
        for (row, _, position), metrics in zip(pending, values, strict=True):
            finite = metrics.pop("finite")
            row |= {name: number(value) for name, value in metrics.items()}
            self._rows.append(row)
            if finite:
                self._skipped = 0
            elif not self._handle_non_finite(self._rows[-1], position):
                return False
        self._fetched = time.monotonic()
        return True

    def _handle_non_finite(self, row: Row, position: Any) -> bool:
        """Does what the policy says; False if the run went back."""
        step, policy = row["step"], self.plan.non_finite
        known = {name: row[name] for name in self._columns[2:-3] if name in row}
        known["last_loss"] = next((r["loss"] for r in self._rows[-2::-1] if r["loss"]), None)
        event: dict[str, Any] = {"step": step, "event": "not finite", "policy": policy, **known}
        numbers = ", ".join(f"{name} {value}" for name, value in known.items())
        message = f"step {step} is not finite ({numbers})".replace("None", "nan")
        if policy == "skip":
            self._skipped += 1
            self._tell(f"{message}: skipped", event)
            if self._skipped < MAX_SKIPPED:
                return True
            message = f"{message}: {MAX_SKIPPED} steps in a row were"
        else:
            event["where"] = not_finite(self.state)
            message += f"; first in the state: {event['where']}" if event["where"] else ""
        if policy == "rollback" and self._rollbacks < MAX_ROLLBACKS:
            self._rollbacks += 1
            self._rows.clear()
            self._pending.clear()
            self.wait()
            self._restore()
            # The batches up to the one that did it are not seen again.
            self._batches.set_state(position)
            self._tell(f"{message}: back to step {self.done}", event | {"back_to": self.done})
            return False
        self.write()
        self._tell("", event)
        hint = {
            "raise": "--resume with --non-finite skip or rollback, or start with a lower rate",
            "skip": "start with a lower --learning-rate, or look at the data",
            "rollback": f"{MAX_ROLLBACKS} rollbacks did not help; start with a lower rate",
        }[policy]
        raise NonFiniteError(f"{message}; {hint}")

    def _tell(self, message: str, event: dict[str, Any]) -> None:
        if message:
            self.console.print(message, soft_wrap=True)
        if self._files is not None:
            self._files.add_event(event)

    def validate(self) -> None:
        """Scores the validation split and adds that to the row of the latest step."""
        scores = self._evaluate(self.plan.task.validation)
        self._rows[-1] |= {f"validation_{name}": number(score) for name, score in scores.items()}
        self._worse = 0 if scores["loss"] < self._best else self._worse + 1
        self._best = min(scores["loss"], self._best)  # never NaN
        self.console.print(f"step {self.done}: validation {show_scores(scores)}")

    @property
    def stops_early(self) -> bool:
        """Whether the validation loss has not become lower for too long."""
        return self.plan.early_stopping is not None and self._worse >= self.plan.early_stopping

    def _evaluate(self, split: data.Split) -> dict[str, float]:
        plan = self.plan
        return evaluate(
            self.program.evaluate, self.runner, self.state, plan.task, split, plan.data_workers
        )

    def write(self) -> None:
        """Writes the rows that are complete."""
        rows = [{name: row[name] for name in self._columns if name in row} for row in self._rows]
        self._rows.clear()
        if self._files is None or not rows:
            return
        self._files.write(rows)
        shown = [
            f"{name} {rows[-1][name]:.4g}"
            for name in self._columns[2:-3]
            if rows[-1].get(name) is not None
        ]
        self._progress.update(self._bar, completed=rows[-1]["step"], metrics="  ".join(shown))

    def save(self) -> None:
        """Starts to save a checkpoint; what it needs of the files is written before."""
        self._checkpoints.save(
            self.done,
            self.runner.get_state(self.state),
            data={
                "batches": self._batches.get_state(),
                "best": self._best if math.isfinite(self._best) else None,
                "worse": self._worse,
            },
        )
        self._rollbacks = 0

    def wait(self) -> None:
        """Waits until all that was saved is on disk."""
        self._checkpoints.wait()

    def test(self) -> dict[str, Any]:
        """Scores the test split and writes the result."""
        scores = self._evaluate(self.plan.task.test)
        result = {"steps": self.done} | {
            f"test_{name}": number(score) for name, score in scores.items()
        }
        if cluster.is_main():
            cli.write_atomic(self.plan.folder / "result.json", cli.to_json(result))
        return result


def not_finite(state: PyTree) -> str | None:
    """Where a state is not finite, e.g. ``params/head/kernel (3 of 40 entries)``."""

    def count(leaf: jax.Array) -> jax.Array | None:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return None
        return jnp.sum(~jnp.isfinite(leaf))

    counts = jax.jit(lambda tree: jax.tree.map(count, tree))(state)
    sizes = {path: leaf.size for path, leaf in jax.tree.leaves_with_path(state)}
    for path, wrong in jax.tree.leaves_with_path(counts):
        if wrong and sizes[path] > 1:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"{name} ({wrong} of {sizes[path]} entries)"
    return None


def train(plan: Plan, program: Program, console: Console) -> int | None:
    """Runs a plan in its folder, from the latest checkpoint there on.

    Args:
      plan: what to run.
      program: from `build`.
      console: where progress is shown.

    Returns:
      ``None`` at the end, or the number of the signal that interrupted the run.

    Raises:
      UsageError, CheckpointError: what is in the folder does not fit; it is left as it is.
      NonFiniteError: the run met numbers that are not finite and could not go on.
      DataError: an example cannot be read.
    """
    with Run(plan, program, console) as run, cluster.stop_signals() as requested, cluster.guard():
        stopped_by = None
        while run.done < plan.steps and stopped_by is None and not run.stops_early:
            run.advance()
            stopped_by = requested()
            validate = run.is_due(plan.eval_every)
            save = run.is_due(plan.checkpoint_every) or stopped_by is not None
            if not (validate or save or run.wants_fetch()) or not run.fetch():
                continue
            if validate:
                run.validate()
            run.write()
            if save or run.stops_early:
                run.save()
        run.wait()
        if run.stops_early:
            console.print(
                f"stopped early at step {run.done}: {plan.early_stopping} validations in a row "
                "without a lower loss"
            )
        elif run.done < plan.steps:
            console.print(f"interrupted: saved step {run.done} of {plan.steps}")
            return stopped_by
        result = run.test()
    scores = {name: result[f"test_{name}"] for name in program.scores}
    console.print(
        f"test {show_scores(scores)}; metrics and checkpoints are in {plan.folder}",
        soft_wrap=True,
    )
    return None


def show_scores(scores: Mapping[str, float | None]) -> str:
    """Scores as the console shows them."""
    return ", ".join(
        f"{name} nan" if value is None else f"{name} {value:.4f}" for name, value in scores.items()
    )
