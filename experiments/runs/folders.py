"""A run's folder: its lock, its settings, its metrics and what happened to it.

    run.lock                held while a process works in the folder
    config.json             the command line, the options, what they came to, the machine, the
                            versions used, the commit of the source code
    source.diff             what the source code had besides that commit, if anything and no more
                            than 1 MiB
    metrics.jsonl, .csv     one line per step: loss, learning rate, norms of gradient and update,
                            the scalars of the optimizer's state, validation, times
    tensorboard/            the same as event files
    remote.json             the same run in a service, see `experiments.runs.remote_runs`
    events.jsonl            steps that were not finite, and what was done about them

One process writes them; `experiments.runs.checkpoints` keeps the checkpoints beside them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from experiments import cli
from experiments.cli import UsageError

LOCK = "run.lock"


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
    """Takes a run's folder for this process, and makes it if it does not exist.

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
      folder: the command's folder, which need not exist.
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
