"""A run's folder: its lock, its settings, its metrics and what happened to it.

    run.lock                held while a process works in the folder
    config.json             the options, what they came to, the machine and the versions used
    metrics.jsonl, .csv     one line per step: loss, statistics of the method, validation
    tensorboard/            the same as event files
    events.jsonl            steps that were not finite, and what was done about them

One process writes them; `experiments.checkpoints` keeps the checkpoints beside them.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import re
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
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
RESULTS = "results.json"
METRICS = ("metrics.jsonl", "metrics.csv")


def locate(runs_dir: Path, name: str | None, default: str) -> Path:
    """Where a run's folder is.

    Args:
      runs_dir: the folder of all runs.
      name: what `--name` says.
      default: the name where it says nothing.

    Returns:
      The folder, which need not exist.

    Raises:
      UsageError: the name is not a plain one, or a link there leads elsewhere.
    """
    name = default if name is None else name
    cli.check_folder_name(name)
    folder = runs_dir / name
    try:
        place = folder.resolve()
        inside = place.parent == runs_dir.resolve()
    except (OSError, RuntimeError):  # links that lead to each other
        place, inside = folder, False
    if not inside:
        raise UsageError(
            f"--name {name!r}: {folder} leads to {place}, which is not a folder in {runs_dir}; "
            "give another --name"
        )
    return folder


def lock(folder: Path) -> filelock.FileLock:
    """Takes a run's folder, which is made if need be, for this process.

    The operating system lets go of it when the process ends, however it ends. What earlier
    processes left half written is removed.

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
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is not a file; remove it or give another --name")
    try:
        held = filelock.FileLock(path, timeout=0)
        held.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        for partial in folder.rglob(f"*{cli.PARTIAL}"):
            partial.unlink()
    except filelock.Timeout:
        owner = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise UsageError(
            f"{folder} is in use by {cli.shortened(owner)}; wait until it ends, or give another "
            "--name"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write to the folder {folder}: {error.strerror}") from None
    return held


@contextlib.contextmanager
def claim(folder: Path, check: Callable[[], Any]) -> Iterator[None]:
    """Keeps a folder for this process while a block runs.

    Args:
      folder: the command's folder; made if need be.
      check: raises `UsageError` if what is there is not the command's. Called before the lock,
        which writes a file, and again under it.

    Raises:
      UsageError: that of the check, or another process has the folder.
    """
    check()
    held = lock(folder)
    try:
        check()
        yield
    finally:
        held.release()


def is_new(folder: Path) -> bool:
    """Whether a folder does not exist or holds nothing, but for the lock.

    Raises:
      UsageError: it is not a folder, or cannot be read.
    """
    if folder.is_symlink() or folder.exists():
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; give another --name")
        try:
            return all(p.name == LOCK or p.suffix == cli.PARTIAL for p in folder.iterdir())
        except OSError as error:
            raise UsageError(f"cannot read the folder {folder}: {error.strerror}") from None
    return True


def check_files(folder: Path, files: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Raises `UsageError` where a folder stands in place of a file, or the other way round.

    A link is neither: what is written through it would change something outside the folder.

    Args:
      folder: the command's folder.
      files: the names of the files that it writes there.
      folders: the names of the folders that it makes there.
    """
    for name in (*files, *folders):
        path, wanted = folder / name, "file" if name in files else "folder"
        fits = path.is_file() if name in files else path.is_dir()
        if os.path.lexists(path) and (path.is_symlink() or not fits):
            raise UsageError(f"{path} is not a {wanted}; remove it or give another --name")


@contextlib.contextmanager
def claim_results(folder: Path, command: str, files: Sequence[str]) -> Iterator[None]:
    """The same for a command that writes all it has at its end, and may replace what it wrote.

    Args:
      folder: the command's folder; made if need be.
      command: its name; `results.json` there has to have it as ``"command"``.
      files: the names of the files that it writes besides `results.json`.

    Raises:
      UsageError: the folder holds something else, or another process has it.
    """

    def check() -> None:
        if is_new(folder):
            return
        path = folder / RESULTS
        found = read_json(path) if os.path.lexists(path) else None
        if not isinstance(found, dict) or found.get("command") != command:
            raise UsageError(f"{folder} holds something else than {command}; give another --name")
        check_files(folder, files)

    with claim(folder, check):
        yield


def write_results(folder: Path, command: str, options: Any, results: dict[str, Any]) -> None:
    """Writes `results.json` of a command in the folder that `claim_results` keeps for it.

    Args:
      folder: the command's folder.
      command: its name.
      options: its options, a dataclass.
      results: the rest, as plain JSON.
    """
    record = {"command": command, "options": plain_options(options)} | results
    cli.write_atomic(folder / RESULTS, cli.to_json(record))


def plain_options(options: Any) -> dict[str, Any]:
    """The options of a command, a dataclass, as plain JSON."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }


def read_file(path: Path) -> bytes:
    """The content of a file in a run's folder.

    Raises:
      UsageError: it is not a file or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file; remove it or give another --name")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path, remedy: str = "give another --name") -> Any:
    """The JSON value in a file of a run's folder.

    Args:
      path: the file.
      remedy: what to do if it is damaged, for the message.

    Returns:
      The value.

    Raises:
      UsageError: it cannot be read, or is damaged.
    """
    try:
        return cli.parse_json(read_file(path))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); {remedy}") from None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Stores numbers that took time to compute, with a checksum.

    Args:
      path: the file.
      record: plain JSON.
    """
    cli.write_atomic(path, cli.to_json(record | {"crc32": _checksum(record)}))


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` stored.

    Args:
      path: the file.

    Returns:
      The record; ``None`` if there is no such file.

    Raises:
      UsageError: it cannot be read, or something in it has changed.
    """
    if not os.path.lexists(path):
        return None
    remedy = "delete it, so that it is made again"
    record = read_json(path, remedy)
    checksum = record.pop("crc32", None) if isinstance(record, dict) else None
    if checksum is None or checksum != _checksum(record):
        raise UsageError(f"{path} is damaged (it is not what was written there); {remedy}")
    return record


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


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
    record = read_json(path)
    try:
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
        return f"{key} {cli.shortened(str(before))}, now {cli.shortened(str(now))}"
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
        check_files(folder, (*METRICS, "events.jsonl", "result.json"), ("tensorboard",))
        jsonl, table = (folder / name for name in METRICS)
        header = ",".join(columns) + "\n"
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


def is_number(value: Any) -> bool:
    """Whether a value that was read from JSON is a finite number."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def number(value: Any) -> float | None:
    """A float for JSON: the digits that float32 carries, None for infinities and NaN."""
    value = float(value)
    return float(f"{value:.9g}") if math.isfinite(value) else None
