"""The source code of a run: its commit, and what was changed since, from git.

`source.diff` in the run's folder turns that commit into what ran: ``git apply source.diff``.
"""

from __future__ import annotations

import functools
import os
import subprocess
import zlib
from pathlib import Path
from typing import Any

from experiments import cli

DIFF = "source.diff"
ROOT = Path(__file__).parents[2]
# Bytes of a difference that are kept: a cut one could not be applied, so a longer one is left out.
MOST_BYTES = 2**20
MOST_NAMES = 100


def write_source(folder: Path, root: Path = ROOT) -> dict[str, Any] | None:
    """Describes the checkout, and writes what was changed since its commit into a run's folder.

    Args:
      folder: the run's folder.
      root: the checkout.

    Returns:
      The record of `read_source`.
    """
    record, diff = _read(root)
    if diff and len(diff) <= MOST_BYTES:
        cli.write_atomic(folder / DIFF, diff)
    return record


def read_source(root: Path = ROOT) -> dict[str, Any] | None:
    """What tells the source code apart, as plain JSON.

    Args:
      root: the checkout.

    Returns:
      ``commit``; of the difference to it ``diff_bytes`` and ``diff_crc32``; ``untracked``, the
      first names of files that git does not know and so are not in the difference. ``None`` where
      there is no git, no repository or no commit.
    """
    return _read(root)[0]


def same_source(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records tell of the same commit with the same changes to its files."""
    return all(one.get(name) == other.get(name) for name in ("commit", "diff_bytes", "diff_crc32"))


@functools.cache
def _read(root: Path) -> tuple[dict[str, Any] | None, bytes]:
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        # Whatever a person's own settings make of differences, this one can be applied.
        options = (
            *("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--relative"),
            *("--src-prefix=a/", "--dst-prefix=b/"),
        )
        diff = _git(root, "diff", *options, "HEAD", "--", ".")
        names = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None, b""
    untracked = [name for name in names.decode(errors="replace").split("\0") if name]
    record = {
        "commit": commit,
        "diff_bytes": len(diff),
        "diff_crc32": zlib.crc32(diff),
        "untracked": untracked[:MOST_NAMES],
    }
    return record, diff


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        check=True,
        capture_output=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
    ).stdout
