"""JSON files in the folder of a run: its settings, records with a checksum, results."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import math
import os
import platform
import shlex
import sys
import zlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments import cli
from experiments.cli import UsageError

CONFIG = "config.json"
RESULTS = "results.json"
# Options that say where files lie, which decides nothing.
PLACES = ("data_dir", "runs_dir", "evidence_dir", "name", "json", "html", "trace")


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
        parts = {part: dict(record[part]) for part in ("options", "run", "machine", "versions")}
        return parts | {"source": record.get("source")}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not the config.json of a run; give another --name") from None


def write_config(
    folder: Path,
    options: dict[str, Any],
    run: dict[str, Any],
    machine: Any,
    *,
    command: str,
    source: dict[str, Any] | None,
) -> None:
    """Records a new run.

    Args:
      folder: the run's folder.
      options: the options it was started with.
      run: all that decides the numbers.
      machine: where it runs: decides them up to rounding only.
      command: the command line that began it.
      source: what `experiments.runs.source.read_source` tells of the code.
    """
    record = {"command": command, "options": options, "run": run, "machine": machine}
    record |= {"versions": versions(), "source": source}
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


def is_number(value: Any) -> bool:
    """Whether a value that was read from JSON is a finite number."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def number(value: Any, digits: int = 9) -> float | None:
    """A float for JSON, ``None`` for infinities and NaN.

    Args:
      value: a scalar.
      digits: significant digits that are kept: 9 tell all float32 numbers apart, 7 are those that
        float32 carries.
    """
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    return {
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in ("jax", "optax", "flax")},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def provenance(command: str, options: Any) -> dict[str, Any]:
    """Where numbers come from: the options that were given, versions, hardware, date and load.

    Args:
      command: what is typed before the options.
      options: the options of the command, a dataclass whose fields all have defaults.

    Returns:
      Plain JSON. The command line leaves out where files are read and written.
    """
    words = command.split()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in PLACES or value == field.default:
            continue
        words += [f"--{field.name.replace('_', '-')}"] + [str(value)] * (value is not True)
    return {
        "command_line": shlex.join(words),
        "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def to_csv(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, *, header: bool = True
) -> str:
    """Rows as CSV, with all digits.

    Args:
      rows: values by column; a missing value and ``None`` make an empty cell.
      columns: the order of the columns; by default that in which the rows first name them.
      header: whether the first line names the columns.

    Returns:
      The text, with one line per row.

    Raises:
      ValueError: a row has a value that is in none of the columns.

    Example:
      >>> print(to_csv([{"step": 1, "loss": 0.5}, {"step": 2}]), end="")
      step,loss
      1,0.5
      2,
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
