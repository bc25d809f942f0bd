"""A run's folder: its lock, its settings, its metrics and what happened to it.

    run.lock                held while a process works in the folder
    config.json             the options, what they came to, the machine and the versions used
    metrics.jsonl, .csv     one line per step: loss, statistics of the method, validation
    tensorboard/            the same as event files
    events.jsonl            steps that were not finite, and what was done about them

One process writes them; `experiments.checkpoints` keeps the checkpoints beside them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
import socket
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import tensorboardX

from experiments import cli
from experiments.cli import UsageError

Row = dict[str, float | int | None]

CONFIG = "config.json"
LOCK = "run.lock"


def lock(folder: Path) -> filelock.FileLock:
    """Takes a run's folder, which is made if need be, for this process.

    The operating system lets go of it when the process ends, however it ends.

    Args:
      folder: the run's folder.

    Returns:
      The lock; its ``release`` gives the folder back.

    Raises:
      UsageError: another process has it, or it cannot be written to.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from None
    try:
        held = filelock.FileLock(path, timeout=0)
        held.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except filelock.Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "another process"
        raise UsageError(
            f"{folder} is in use by {owner}; wait until it ends, or give another --name"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write to the folder {folder}: {error.strerror}") from None
    return held


def read_config(folder: Path) -> dict[str, Any]:
    """The record of the run in a folder, as `write_config` wrote it.

    Raises:
      UsageError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UsageError(
            f"nothing to resume: there is no {path}; leave out --resume to start a run"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {part: dict(record[part]) for part in ("options", "run", "machine", "versions")}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not the config.json of a run; give another --name") from None


def write_config(folder: Path, options: dict[str, Any], run: dict[str, Any], machine: Any) -> None:
    """Records a new run.

    Args:
      folder: the run's folder.
      options: the options it was started with.
      run: all that decides the numbers.
      machine: where it runs: decides them up to rounding only.
    """
    record = {"options": options, "run": run, "machine": machine, "versions": versions()}
    cli.write_atomic(folder / CONFIG, cli.to_json(record))


def check_same(folder: Path, saved: dict[str, Any], run: dict[str, Any]) -> None:
    """Raises `UsageError`, naming the first difference, if a run is not the one in the folder."""
    if difference := first_difference(saved, run):
        raise UsageError(
            f"{folder} is a run with {difference}; resume it with the options and data it was "
            "started with, or give another --name"
        )


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Names the first setting in which two runs differ, with both values.

    Args:
      old: all that decided the numbers of the run in a folder.
      new: the same of the run that is to continue it; its ``data`` are `Task.checksums`.
    """
    for key in dict.fromkeys([*new, *old]):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key == "data" and isinstance(now, dict):
            return _other_data(before, now)
        if key == "methods" and isinstance(before, dict) and list(before) != list(now or ()):
            return f"methods {','.join(before)}, now {','.join(now or ())}"
        return f"{key} {before}, now {now}"
    return None


def _other_data(before: Any, now: dict[str, dict[str, int]]) -> str:
    """What of the data differs, by their checksums."""
    try:
        parts = [
            f"{kind} of the {split} split"
            for split, numbers in now.items()
            for kind, number in numbers.items()
            if before[split][kind] != number
        ]
    except (KeyError, TypeError):
        return "no checksums of all its data, because an older version of this project made it"
    return f"other {' and '.join(parts)}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    names = ("jax", "jaxlib", "optax", "flax", "grain", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


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
        jsonl, table = folder / "metrics.jsonl", folder / "metrics.csv"
        header = ",".join(columns) + "\n"
        lines = self._first_lines(jsonl, step, None)
        try:
            rows: list[Row] = [json.loads(line) for line in lines]
        except ValueError:
            raise UsageError(f"{jsonl} is damaged; give another --name to start again") from None
        cli.write_atomic(table, header + "".join(self._first_lines(table, step, header)))
        cli.write_atomic(jsonl, "".join(lines))
        self.seconds = float(rows[-1]["seconds"] or 0) if rows else 0.0
        self._jsonl = jsonl.open("a", encoding="utf-8")
        self._csv = table.open("a", encoding="utf-8", newline="")
        # A killed run may have lost events that its writer still held in a queue, so the event
        # files are made anew from the rows.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
        for row in rows:
            self._add_events(row)

    @staticmethod
    def _first_lines(path: Path, number: int, header: str | None) -> list[str]:
        if number == 0:
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
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
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, restval="", lineterminator="\n")
        for row in rows:
            writer.writerow(row)
            self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
            self._add_events(row)
        self._csv.write(table.getvalue())
        self._jsonl.flush()
        self._csv.flush()

    def add_event(self, event: dict[str, Any]) -> None:
        """Adds a line to `events.jsonl`, which nothing ever takes back."""
        with (self._folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, allow_nan=False) + "\n")

    def _add_events(self, row: Row) -> None:
        for name, value in row.items():
            if value is not None and name not in ("step", "epoch", "seconds"):
                split, _, short = name.partition("_")
                tag = f"validation/{short}" if split == "validation" else f"train/{name}"
                self._events.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Closes all files."""
        self._jsonl.close()
        self._csv.close()
        self._events.close()


def number(value: Any) -> float | None:
    """A float for JSON: the digits that float32 carries, None for infinities and NaN."""
    value = float(value)
    return float(f"{value:.9g}") if math.isfinite(value) else None
