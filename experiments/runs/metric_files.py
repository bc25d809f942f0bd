"""The metrics of a run as JSONL, CSV and TensorBoard event files."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX.summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from experiments import cli
from experiments.cli import UsageError
from experiments.runs.folders import check_files
from experiments.runs.records import is_number, read_file, to_csv

Row = dict[str, float | int | None]
METRICS = ("metrics.jsonl", "metrics.csv")
# The columns of clocks, which differ from run to run.
TIMES = ("step_seconds", "examples_per_second", "seconds")
# Seconds after which TensorBoard can show what has been written.
FLUSH_EVENTS = 10.0


class MetricFiles:
    """The metrics of a run as JSONL, CSV and TensorBoard event files, one row per step.

    Args:
      folder: the run's folder.
      columns: names of all numbers that a row can hold.
      step: rows up to this step are kept, later ones (of a run that was killed after its last
        checkpoint) are dropped.

    Raises:
      UsageError: the files hold fewer rows than that.
    """

    def __init__(self, folder: Path, columns: Sequence[str], step: int):
        self.columns = columns
        self._folder = folder
        check_files(folder, (*METRICS, "events.jsonl", "result.json"), ("tensorboard",))
        jsonl, table = (folder / name for name in METRICS)
        header = to_csv([], columns)
        lines = self._first_lines(jsonl, step, None)
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(_checked_row(cli.parse_json(line), number, columns))
            except ValueError as error:
                raise UsageError(
                    f"{jsonl} is damaged (line {number}: {error}); give another --name to start "
                    "again"
                ) from None
        cli.write_atomic(table, header + "".join(self._first_lines(table, step, header)))
        cli.write_atomic(jsonl, "".join(lines))
        self.seconds = float(rows[-1]["seconds"] or 0) if rows else 0.0
        self._jsonl = jsonl.open("a", encoding="utf-8")
        self._csv = table.open("a", encoding="utf-8", newline="")
        # A killed run may have lost events that were not flushed, so the event files are made anew
        # from the rows.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "tensorboard").mkdir()
        # A `SummaryWriter` writes in a thread, which dies when a disk is full and then lets the
        # run wait for ever.
        self._events = EventsWriter(str(folder / "tensorboard" / "events"))
        self._events_flushed = time.monotonic()
        for row in rows:
            self._add_events(row)

    @staticmethod
    def _first_lines(path: Path, number: int, header: str | None) -> list[str]:
        if number == 0:
            return []
        lines = []
        if path.exists():
            try:
                lines = re.findall(".*\n", read_file(path).decode())
            except UnicodeDecodeError:
                raise UsageError(
                    f"{path} is damaged (not UTF-8); give another --name to start again"
                ) from None
        if header is not None:
            lines = lines[1:] if lines[:1] == [header] else []
        if len(lines) < number:
            raise UsageError(
                f"{path} holds {len(lines)} of the {number} steps of the checkpoint; "
                "give another --name to start again"
            )
        return lines[:number]

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows and hands them to the operating system, so that a killed run leaves them."""
        for row in rows:
            self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
            self._add_events(row)
        self._csv.write(to_csv(rows, self.columns, header=False))
        self._jsonl.flush()
        self._csv.flush()
        # Flushing events waits for the disk, and events can be made anew.
        if time.monotonic() - self._events_flushed > FLUSH_EVENTS:
            self._events.flush()
            self._events_flushed = time.monotonic()

    def add_event(self, event: dict[str, Any]) -> None:
        """Adds a line to `events.jsonl`, which nothing ever takes back."""
        with (self._folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, allow_nan=False) + "\n")

    def _add_events(self, row: Row) -> None:
        values = [tensorboardX.summary.scalar(*item).value[0] for item in tagged(row).items()]
        eigenvalues = [
            value
            for name, value in row.items()
            if name.startswith("monitor/eigenvalue_") and value is not None
        ]
        if eigenvalues:
            histogram = tensorboardX.summary.histogram(
                "monitor/eigenvalues", np.array(eigenvalues), "auto"
            )
            values.append(histogram.value[0])
        event = Event(wall_time=time.time(), step=row["step"])
        event.summary.value.extend(values)
        self._events.write_event(event)

    def close(self) -> None:
        """Closes all files."""
        self._jsonl.close()
        self._csv.close()
        self._events.close()


def tagged(row: Row) -> dict[str, float]:
    """The numbers of a row that are curves, by the names under which TensorBoard groups them.

    >>> tagged({"step": 2, "loss": 0.5, "validation_loss": 0.7, "state/count": 2, "seconds": 9.0})
    {'train/loss': 0.5, 'validation/loss': 0.7, 'state/count': 2}

    Args:
      row: a row of the metrics.

    Returns:
      What there is of it but step, epoch and the seconds since the start.
    """

    def tag(name: str) -> str:
        split, _, short = name.partition("_")
        if split == "validation":
            return f"validation/{short}"
        return name if name.startswith(("state/", "monitor/")) else f"train/{name}"

    left_out = ("step", "epoch", "seconds")
    return {
        tag(name): value
        for name, value in row.items()
        if value is not None and name not in left_out
    }


def _checked_row(row: Any, step: int, columns: Sequence[str]) -> Row:
    """A row of the metrics as `MetricFiles` wrote it.

    Raises:
      ValueError: it is not the row of that step.
    """
    if not isinstance(row, dict) or not set(row) <= set(columns):
        raise ValueError("not a row of this run")
    for name, value in row.items():
        if not (value is None or is_number(value)):
            raise ValueError(f"{name} is not a number")
    if row.get("step") != step or (row.get("seconds") or 0) < 0:
        raise ValueError("step or seconds are wrong")
    return row
