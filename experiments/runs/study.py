"""The folder of a study: whose it is, what its settings are, how it continues or is replaced.

There are two kinds. A `StudyFolder` keeps each piece of work when it is finished, beside its
`config.json`: the same command continues it, one with other settings is refused. A command that
writes `results.json` at its very end takes its folder by `claim_results`, and replaces what it
wrote there before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.cli import UsageError
from experiments.runs import folders
from experiments.runs.records import (
    CONFIG,
    RESULTS,
    first_difference,
    plain_options,
    provenance,
    read_json,
)


@dataclasses.dataclass(frozen=True)
class StudyFolder:
    """A study whose finished pieces of work are kept in one folder.

    Attributes:
      folder: where it is kept.
      config: all that decides the numbers, as plain JSON; `config.json` holds it.
      kind: what messages call it, such as ``"a comparison"``.
      mark: a key that the `config.json` of this kind of study has, and others have not.
      files: names of the files that it writes there besides `config.json`.
      folders: names of the folders that it makes there.
      overwrite: whether to replace another study of this kind there; ``None`` for a command that
        has no such option.
    """

    folder: Path
    config: dict[str, Any]
    kind: str
    mark: str
    files: Sequence[str]
    folders: Sequence[str]
    overwrite: bool | None = None

    def check(self) -> None:
        """Checks that the folder is new, or holds a study that this one continues or replaces.

        Raises:
          UsageError: it belongs to a study with other settings, or to something else.
        """
        if folders.is_new(self.folder):
            return
        path = self.folder / CONFIG
        saved = read_json(path) if os.path.lexists(path) else None
        if not isinstance(saved, dict) or self.mark not in saved:
            raise UsageError(f"{self.folder} is not {self.kind}'s folder; give another --name")
        if not self.overwrite:
            check_same_settings(self.folder, self.kind, saved, self.config, self.overwrite)
            folders.check_files(self.folder, (CONFIG, *self.files), self.folders)

    def open(self) -> None:
        """Prepares the folder, which `check` has passed: empties it if it is to be replaced."""
        for name in (CONFIG, *self.files, *self.folders) if self.overwrite else ():
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for name in self.folders:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        cli.write_atomic(self.folder / CONFIG, cli.to_json(self.config))

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Keeps the folder, checked and prepared, for this process while a block runs.

        Raises:
          UsageError: the folder holds something else, or another process has it.
          Interrupted: Ctrl-C.
        """
        with folders.claim(self.folder, self.check), kept(self.folder):
            self.open()
            yield


def check_same_settings(
    folder: Path,
    kind: str,
    saved: dict[str, Any],
    config: dict[str, Any],
    overwrite: bool | None = None,
) -> None:
    """Checks that a study continues the one in its folder.

    Args:
      folder: its folder.
      kind: what messages call it, such as ``"a comparison"``.
      saved: the settings of the study in the folder.
      config: the settings of this one.
      overwrite: ``None`` for a command without the option to replace the study.

    Raises:
      UsageError: a setting differs.
    """
    if difference := first_difference(saved, config):
        replace = "" if overwrite is None else " --overwrite to replace it,"
        raise UsageError(
            f"{folder} holds {kind} with {difference}; give another --name,{replace} or the old "
            "settings to continue it"
        )


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Says after Ctrl-C that finished work is kept and that the same command continues.

    Args:
      folder: where it is kept.

    Raises:
      Interrupted: Ctrl-C while the block ran.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise cli.Interrupted(
            f"finished runs are kept in {folder}; the same command continues"
        ) from None


def check_results(folder: Path, command: str, files: Sequence[str]) -> None:
    """Checks that a folder is new, or holds what the same command wrote, which it replaces.

    Args:
      folder: the command's folder, which need not exist.
      command: its name; a `results.json` there has to have it as ``"command"``.
      files: the names of the files that it writes besides `results.json`.

    Raises:
      UsageError: the folder holds something else.
    """
    if folders.is_new(folder):
        return
    path = folder / RESULTS
    saved = read_json(path) if os.path.lexists(path) else None
    if not isinstance(saved, dict) or saved.get("command") != command:
        raise UsageError(f"{folder} holds something else than {command}; give another --name")
    folders.check_files(folder, files)


@contextlib.contextmanager
def claim_results(folder: Path, command: str, files: Sequence[str]) -> Iterator[None]:
    """Keeps a folder while a block runs that writes all it has at its end, by `write_results`.

    Args:
      folder: the command's folder, which need not exist.
      command: its name; a `results.json` there has to have it as ``"command"``.
      files: the names of the files that it writes besides `results.json`.

    Raises:
      UsageError: the folder holds something else, or another process has it.
      Interrupted: Ctrl-C.
    """
    with folders.claim(folder, lambda: check_results(folder, command, files)):
        try:
            yield
        except KeyboardInterrupt:
            raise cli.Interrupted("nothing is kept; the same command starts again") from None


def write_results(folder: Path, command: str, options: Any, results: dict[str, Any]) -> None:
    """Writes `results.json`, and where it comes from, in the folder that `claim_results` keeps.

    Args:
      folder: the command's folder.
      command: its name.
      options: its options, a dataclass.
      results: the rest, as plain JSON.
    """
    record = {"command": command, "options": plain_options(options)}
    record |= provenance(command, options) | results
    cli.write_atomic(folder / RESULTS, cli.to_json(record))
