"""The ledger of evidence: one line for each verdict ever reached, in files that only grow.

    evidence/<study>.jsonl

A later run may come to another verdict on the same claim: then both stand there.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.cli import UsageError
from experiments.runs.records import read_file

Entry = dict[str, Any]
# What every entry says.
FIELDS = (
    *("study", "scale", "claim", "text", "source", "criterion", "verdict", "estimate", "low"),
    *("high", "note", "seeds", "needed_seeds", "needed_settings", "runs", "diverged", "unit"),
    *("budget", "command", "run", "versions", "date"),
)
FOLDER = Path("evidence")
_HEAD = """# Verdicts

What `python -m experiments.referee STUDY`, `python -m experiments.protocols STUDY` and the commands
`survey` and `brief_review` found, from the files in `evidence/`: lines are only ever added, so an
earlier verdict that a later run refutes stays here. An ellipsis stands for the end of an interval
that has none.
"""


def read(path: Path) -> list[Entry]:
    """The entries of one file of the ledger, the oldest first; none if there is no such file.

    Raises:
      UsageError: a line is not an entry.
    """
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        try:
            entry = cli.parse_json(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not set(FIELDS) <= set(entry):
            raise UsageError(
                f"{path}, line {number}, is not a verdict; restore the file, to which lines are "
                "only ever added"
            )
        entries.append(entry)
    return entries


def today() -> str:
    """The date of an entry that is made now, in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def append(path: Path, entries: Sequence[Entry]) -> int:
    """Adds what is new to the ledger.

    Args:
      path: the study's file.
      entries: verdicts with all of `FIELDS`; those of a run that are there already, whatever their
        date and command, are left out.

    Returns:
      The number of entries that were added.

    Raises:
      UsageError: a line of the file is not an entry.
    """

    def identity(entry: Entry) -> str:
        same = {key: entry[key] for key in FIELDS if key not in ("date", "command", "versions")}
        return json.dumps(same, sort_keys=True)

    known = {identity(entry) for entry in read(path)}
    new = [entry for entry in entries if identity(entry) not in known]
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = read_file(path).decode() if path.exists() else ""
        lines = (json.dumps(entry, allow_nan=False) + "\n" for entry in new)
        cli.write_atomic(path, before + "".join(lines))
    return len(new)


def standing(entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """Entries with what a later one about the same claim says of them.

    Args:
      entries: of one study, the oldest first.

    Returns:
      Each with ``"refuted later"`` where a later decision differs from it, or an empty text.
    """
    decided = ("holds", "does not hold here")

    def remark(number: int, entry: Entry) -> str:
        later = {
            other["verdict"]
            for other in entries[number + 1 :]
            if other["claim"] == entry["claim"] and other["verdict"] in decided
        }
        contradicted = entry["verdict"] in decided and bool(later - {entry["verdict"]})
        return "refuted later" if contradicted else ""

    return [(entry, remark(number, entry)) for number, entry in enumerate(entries)]


def what_would_decide(entry: Entry) -> str:
    """How many seeds or settings would decide a verdict, in words; nothing if it is not known."""
    for unit in ("seeds", "settings"):
        if (needed := entry[f"needed_{unit}"]) is not None:
            return f"{needed} {unit} would decide"
    return ""


def page(folder: Path) -> str:
    """The page of the documentation that shows the ledger, as Markdown.

    Args:
      folder: the ledger; it need not exist.

    Returns:
      A table for each study, with the latest verdict first.
    """
    parts = [_HEAD]
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        parts.append("No verdict is recorded yet.\n")
    for path in files:
        entries = standing(read(path))
        parts.append(
            f"## {path.stem}\n\n"
            "| date | scale | claim | criterion | verdict | estimate [interval] | runs |\n"
            "|---|---|---|---|---|---|---|"
        )
        parts += [_row(entry, remark) for entry, remark in reversed(entries)]
        parts.append("")
    return "\n".join(parts)


def _row(entry: Entry, remark: str) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    low, high = ("…" if (x := entry[key]) is None else f"{x:.3g}" for key in ("low", "high"))
    estimate = "…" if entry["estimate"] is None else f"{entry['estimate']:.3g}"
    verdict = entry["verdict"] + (f" ({remark})" if remark else "")
    runs = f"{entry['runs']}, {entry['seeds']} seeds"
    if needed := what_would_decide(entry):
        runs += f"; {needed}"
    if entry["note"]:
        runs += f"; {entry['note']}"
    cells = (
        *(entry["date"], entry["scale"], f"({entry['claim']}) {entry['text']}: {entry['source']}"),
        *(entry["criterion"], verdict, f"{estimate} [{low}, {high}]", runs),
    )
    return f"| {' | '.join(map(cell, cells))} |"
