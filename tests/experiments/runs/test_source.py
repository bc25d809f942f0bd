"""Commit and changes of a checkout, in repositories made for the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

from experiments.runs import source


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_changes_make_what_ran(tmp_path: Path) -> None:
    root, run, clone = (tmp_path / name for name in ("root", "run", "clone"))
    root.mkdir()
    run.mkdir()
    git(root, "init", "-q")
    assert source.write_source(run, root) is None  # no commit yet
    source._read.cache_clear()
    (root / "a.py").write_text("x = 1\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    (root / "a.py").write_text("x = 2\n")
    (root / "new.py").write_text("y = 1\n")
    record = source.write_source(run, root)
    assert record is not None
    assert (record["commit"], record["untracked"]) == (git(root, "rev-parse", "HEAD"), ["new.py"])
    assert record["diff_bytes"] == (run / "source.diff").stat().st_size
    git(tmp_path, "clone", "-q", str(root), str(clone))
    git(clone, "apply", str(run / "source.diff"))
    assert (clone / "a.py").read_text() == "x = 2\n"

    source._read.cache_clear()
    (root / "a.py").write_text("x = 3\n")
    other = source.read_source(root)
    assert other is not None
    assert not source.same_source(record, other)

    source._read.cache_clear()
    (root / "a.py").write_text("x" * (source.MOST_BYTES + 1))
    (run / "source.diff").unlink()
    long = source.write_source(run, root)
    assert long is not None
    assert long["diff_bytes"] > source.MOST_BYTES
    assert not (run / "source.diff").exists()


def test_no_repository_is_no_error(tmp_path: Path) -> None:
    assert source.read_source(tmp_path) is None
