"""The metrics of a run: of the steps under way, of those that are finished, on disk, on screen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console

from experiments import progress
from experiments.runs.metric_files import TIMES, MetricFiles, Row
from experiments.runs.records import number
from experiments.runs.remote_runs import RemoteRun
from experiments.training import cluster, parallel

# Steps under way are waited for after this many seconds at the latest, so that the console and the
# files keep up with slow steps.
LONGEST_WAIT = 0.5
# What is shown of the monitor's latest record.
RECORDED = ("monitor/sharpness", "monitor/stability_ratio")


@dataclasses.dataclass(frozen=True)
class Bad:
    """A step whose loss, parameters or moments are not finite.

    Attributes:
      step: its number, from 1.
      metrics: what is known of it: the loss and the statistics of the method.
      last_loss: the last loss before it that is finite.
      position: where the batches stand behind it.
      where: first place in the state that is not finite, once somebody has looked.
    """

    step: int
    metrics: Row
    last_loss: float | int | None
    position: Any
    where: str | None = None

    def __str__(self) -> str:
        numbers = self.metrics | {"last_loss": self.last_loss}
        shown = (f"{name} {'nan' if x is None else x}" for name, x in numbers.items())
        place = f"; first in the state: {self.where}" if self.where else ""
        return f"step {self.step} is not finite ({', '.join(shown)}){place}"

    def event(self, policy: str, **more: Any) -> dict[str, Any]:
        """A line for `events.jsonl`."""
        event = {"step": self.step, "event": "not finite", "policy": policy}
        return event | self.metrics | {"last_loss": self.last_loss} | more


class History:
    """Collects the metrics of a run; a context manager.

    Args:
      folder: the run's folder; only the main process writes there.
      columns: names of all numbers that a row can hold; the first two are step and epoch.
      steps: number of steps of the run.
      steps_per_epoch: number of steps of an epoch.
      batch_size: examples per step.
      title: what the progress bar is called.
      console: where it is shown.
      open_remote: begins the run in a service, which gets the metrics, too; only the main process
        calls it. ``None``: no service.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        *,
        steps: int,
        steps_per_epoch: int,
        batch_size: int,
        title: str,
        console: Console,
        open_remote: Callable[[], RemoteRun] | None = None,
    ):
        self._folder, self._columns = folder, columns
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        # The loss and what the method tells of itself by name.
        files_only = ("step", "epoch", "learning_rate", "gradient_norm", "update_norm", *TIMES)
        self._shown = [
            name
            for name in columns
            if name not in files_only and not name.startswith(("validation_", "state/", "monitor/"))
        ]
        self._recorded: Row = {}  # the latest of RECORDED
        # Only the main process has them.
        self._files: MetricFiles | None = None
        self._remote: RemoteRun | None = None
        self._open_remote = open_remote
        # Steps under way: their row, their metrics, where the batches stand behind them.
        self._pending: list[tuple[Row, Mapping[str, jax.Array], Any]] = []
        self._rows: list[Row] = []  # finished and not yet written
        self._began = self._fetched = self._group_began = time.monotonic()
        self._line = progress.Line(console, title, steps, counted=True, hidden=console.quiet)
        self._line.tell("compiling")

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._line.stop()
        if self._files is not None:
            self._files.close()
        if self._remote is not None:
            self._remote.close()

    def begin(self, step: int) -> None:
        """Keeps the rows up to a step and goes on behind it; what is under way is forgotten.

        Args:
          step: number of steps done.

        Raises:
          UsageError: the files hold fewer rows.
        """
        self._pending.clear()
        self._rows.clear()
        cluster.from_main(lambda: self._open(step))
        self._began = self._fetched = time.monotonic()
        self._line.start(step)  # not before: what cannot be resumed shows no line

    def _open(self, step: int) -> None:
        if self._files is not None:
            self._files.close()
        self._files = MetricFiles(self._folder, self._columns, step)
        if self._open_remote is not None and self._remote is None:
            self._remote = self._open_remote()

    def tell(self, activity: str) -> None:
        """Shows what a step is busy with, until the next metrics are shown."""
        self._line.tell(activity)

    def begin_step(self) -> None:
        """Says that a step begins, with the wait for its batch; its time counts from here.

        Steps overlap, so that only groups of them can be timed: those that are waited for together.
        """
        if not self._pending:
            self._group_began = time.monotonic()

    def add(self, step: int, metrics: Mapping[str, jax.Array], position: Any) -> None:
        """Adds a step that was started.

        Args:
          step: its number, from 1.
          metrics: what it computes, ``finite`` among them; not waited for.
          position: where the batches stand behind it.
        """
        before = self._files.seconds if self._files else 0.0
        row: Row = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "seconds": round(before + time.monotonic() - self._began, 3),
        }
        self._pending.append((row, metrics, position))

    @property
    def is_due(self) -> bool:
        """Whether the steps under way are to be waited for: they are many, or took long."""
        # Several processes must do it at the same step: what they do then may need all of them.
        late = time.monotonic() - self._fetched > LONGEST_WAIT and jax.process_count() == 1
        return late or len(self._pending) >= parallel.FETCH_EVERY

    def fetch(self) -> list[Bad]:
        """Waits for the steps under way; returns those that are not finite."""
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics, _ in pending])
        # The mean over the group; that of the first step has the compilation in it.
        seconds = (time.monotonic() - self._group_began) / max(len(pending), 1)
        times = {
            "step_seconds": number(seconds, 4),
            "examples_per_second": number(self._batch_size / seconds, 4),
        }
        bad = []
        for (row, _, position), metrics in zip(pending, fetched, strict=True):
            finite = metrics.pop("finite")
            row |= {name: number(value) for name, value in metrics.items()} | times
            if not finite:
                known = {name: row[name] for name in self._shown if name in row}
                losses = (row["loss"] for row in reversed(self._rows) if row["loss"])
                bad.append(Bad(int(row["step"] or 0), known, next(losses, None), position))
            self._rows.append(row)
        self._fetched = time.monotonic()
        return bad

    def forget_after(self, step: int) -> None:
        """Drops the rows that are not yet written of later steps."""
        self._rows = [row for row in self._rows if (row["step"] or 0) <= step]

    def add_scores(self, scores: Mapping[str, float]) -> None:
        """Adds the scores of the validation split to the row of the latest step."""
        self._rows[-1] |= {f"validation_{name}": number(value) for name, value in scores.items()}

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Adds a line to `events.jsonl`."""
        if self._files is not None:
            self._files.add_event(dict(event))

    def write(self) -> None:
        """Writes the finished rows and shows the latest one."""
        # The monitor's numbers are there in the steps that record them.
        rows = [
            {
                name: row[name]
                for name in self._columns
                if name in row and not (name.startswith("monitor/") and row[name] is None)
            }
            for row in self._rows
        ]
        self._rows.clear()
        if self._files is None or not rows:
            return
        self._files.write(rows)
        if self._remote is not None:
            self._remote.write(rows)
        for row in rows:
            self._recorded |= {name: row[name] for name in RECORDED if name in row}
        latest = {name: rows[-1].get(name) for name in self._shown} | self._recorded
        shown = [f"{name} {value:.4g}" for name, value in latest.items() if value is not None]
        self._line.complete(rows[-1]["step"] or 0)
        self._line.tell("  ".join(shown))
