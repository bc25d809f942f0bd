"""The tables of the evidence, made from the files that commands wrote.

A file in `docs/evidence/records/` is what a command wrote (`results.json`, or the file of its
`--json`), or was typed from what a command had printed; then it has `"transcribed": true`, and the
line below the table says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments import protocols, step_cost
from experiments.reporting import comparison, solvers, survey, tables, trackers
from experiments.reporting.referee.protocols import scores_table
from experiments.training.studies.tracking import ENTRIES

Record = dict[str, Any]


def write(records: Path, folder: Path) -> None:
    """Writes a page with the table, or tables, of every record.

    Args:
      records: the folder with the records.
      folder: where the pages are written, under the names of the records.
    """
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        make = _typed if record.get("transcribed") else KINDS.get(path.stem, _protocols)
        text = f"{make(record)}\n{_source(record)}"
        (folder / f"{path.stem}.md").write_text(text, encoding="utf-8")


def _source(record: Record) -> str:
    """The line below a table that says where it comes from, if the record does."""
    if "command_line" not in record:
        return ""
    command, environment = record["command_line"], record["environment"]
    machine = f"on {environment['cores']} cores of a {environment['device'].upper()}"
    if record.get("transcribed"):
        return (
            f"\nTyped from what `{command}` printed {machine} on or before {record['date']}; the "
            "files of that run were not kept.\n"
        )
    return (
        f"\n`{command}`, {record['date']}, JAX {environment['jax']} {machine}, load "
        f"{record['load']:.1f}.\n"
    )


def _typed(record: Record) -> str:
    return _markdown(record["headers"], record["rows"])


def _comparison(record: Record) -> str:
    config, rows = record["config"], record["rows"]
    names = [name.replace("\n", " ") for _, name in comparison.headers(config)]
    lines = []
    for row in rows:
        bold = "**" if row["test_accuracy"] == comparison.best(rows) else ""
        lines.append([f"{bold}{cell}{bold}" for cell in comparison.cells(row, config)])
    notes = "\n".join(f"- {note}" for note in comparison.footnotes(record))
    return f"{_markdown(names, lines)}\n\n{notes}"


def _protocols(record: Record) -> str:
    """A table for each setting of a study of whole procedures, with its budget in front of it."""
    study, _ = protocols.STUDIES[record["config"]["protocols"]]
    settings = {each.name: each for each in study.scales[record["config"]["scale"]].settings}
    parts = []
    for name in record["final"]:
        view = scores_table(study, settings[name], record["chosen"][name], record["final"][name])
        parts += [f"`{name}`: {settings[name].budget}", _printed(view)]
    return "\n\n".join(parts)


def _edge_of_stability(record: Record) -> str:
    """The tables of a study of whole procedures, and what it says about each claim."""
    lines = [
        [line["claim"].partition(",")[0], line["text"], line["source"], line["verdict"],
         line["note"]]
        for line in record["verdicts"]
    ]  # fmt: skip
    verdicts = _markdown(["", "claim", "source", "here", "seeds"], lines)
    return f"{_protocols(record)}\n\n{verdicts}"


def _step_cost(record: Record) -> str:
    return _markdown(step_cost.HEADERS, step_cost.rows(record))


def _solvers(record: Record) -> str:
    views = (
        solvers.table(record["solvers"], record["product_milliseconds"]),
        solvers.density_table(record["densities"]),
    )
    return "\n\n".join(map(_printed, views))


def _survey(record: Record) -> str:
    return "\n\n".join(
        _printed(view) for view in (survey.table(record), survey.claims_table(record))
    )


def _trackers(record: Record) -> str:
    columns = ["tracker", "every", "chi full", "chi batch", "cos2", "step / SGD step"]
    return _of_trackers(record, [*columns, "ARPACK / step"])


def _trackers_without_times(record: Record) -> str:
    return _of_trackers(record, ["tracker", "every", "refreshes", "chi full", "chi batch", "cos2"])


def _trackers_with_residuals(record: Record) -> str:
    columns = ["tracker", "every", "refreshes", "directions", "chi full", "cos2", "lowest"]
    return _of_trackers(record, [*columns, "eigenvalues", "residual"])


def _of_trackers(record: Record, columns: Sequence[str]) -> str:
    shown = {
        f"{name}: {ENTRIES[name].note}": (
            ENTRIES[name].examples,
            ENTRIES[name].tracker.refresh_every,
            refreshes,
        )
        for name, refreshes in record["refreshes"].items()
    }
    summary = {label: record["summary"][label.partition(":")[0]] for label in shown}
    labels = {label.partition(":")[0]: label for label in shown}
    cost = [row | {"tracker": labels[row["tracker"]]} for row in record["cost"]]
    return _printed(trackers.summary_table(shown, summary, cost), columns)


def _printed(view: Table, columns: Sequence[str] | None = None) -> str:
    """A table that a command prints, or some of its columns."""
    names, rows = tables.plain(view)
    kept = [names.index(name) for name in columns or names]
    return _markdown([names[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


KINDS: dict[str, Callable[[Record], str]] = {
    "digits": _comparison,
    "edge_of_stability_cnn": _edge_of_stability,
    "edge_of_stability_gpt": _edge_of_stability,
    "edge_of_stability_long": _edge_of_stability,
    "edge_of_stability_mlp": _edge_of_stability,
    "mnist5k": _comparison,
    "solvers_digits": _solvers,
    "step_cost": _step_cost,
    "survey": _survey,
    "trackers": _trackers,
    "trackers_fast": _trackers_without_times,
    "trackers_metric": _trackers_with_residuals,
}
