"""What the methods cost on this machine's GPU or TPU, in one report of at most eight minutes.

    python -m experiments.accelerator_report
    python -m experiments.accelerator_report --quick

Without data and without network, on the first device: the update of every method on 100 million
parameters, against the time that its bytes need at the bandwidth of a copy; training steps, time
to the first step and memory of GPT-2 (124M), ResNet-50 and ViT-S on synthetic batches, in bf16 and
in f32, with Adam, Bulk-SGD, K-FAC, Muon, StochGradAdam, Extrap-SGD and GNP; the price of
micro-batches; how much of a slow input prefetching hides. Each ratio is measured in one run, beside
Adam.

The most important rows come first. One begins only if the time that it is expected to take is left,
and is stopped where it takes much longer; the report names what was left out, and why. Each row is
kept as soon as it is finished: the same command continues, after Ctrl-C as well. A row that runs
out of memory, or crashes the process in which all rows are measured, is recorded as such, and the
next one begins in a new process; one that cannot fit is not begun.

`--quick` takes small networks and a small tree, for a CPU and two minutes. `runs/<name>/` holds
`results.json` and `report.md`, whose heading is the device's name.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from experiments import cli, progress
from experiments.reporting import accelerator as report
from experiments.runs import folders
from experiments.runs.records import RESULTS
from experiments.runs.study import StudyFolder
from experiments.runs.units import Store
from experiments.training.studies import accelerator
from experiments.training.studies.accelerator import FULL, QUICK, Row, Scale
from experiments.training.studies.isolation import Isolated, Outcome

PROG = "python -m experiments.accelerator_report"
REPORT = "report.md"
# A row is stopped after this many times what it is expected to take, which nobody knows well, and
# not before it has had a minute.
PATIENCE, LEAST_PATIENCE = 4, 60
# Rows with these outcomes stay as they are; others are tried again by the next call.
FINAL = ("measured", "does not fit")
START_SECONDS = 120  # for the process to import and open the device
Call = Callable[[str, float], Outcome]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Measure what the methods cost on this machine's GPU or TPU."""

    limits: ClassVar = {"budget_seconds": cli.Range(1, 86_400)}

    quick: bool = False
    """Small networks and a small tree, for a CPU and two minutes."""
    sections: str | None = None
    """Some of update,step,micro-batches,input; default: all four."""
    methods: str | None = None
    """Methods to measure beside Adam, separated by commas; default: all."""
    budget_seconds: float | None = None
    """When to end; default: 460, with --quick 100, to stay below 8 and 2 minutes."""
    name: str | None = None
    """Name of the folder; default: accelerator-<device>, with -quick."""
    runs_dir: Path = Path("runs")
    """Where the folder is made."""
    overwrite: bool = False
    """Replace an earlier report of the same name, rather than continue it."""


def resolve(options: Options) -> tuple[Scale, list[Row]]:
    """Checks the options; gives the scale and the rows that they name.

    Raises:
      UsageError: one line that says which option, what is allowed and how to fix it.
    """
    options.check()
    scale = QUICK if options.quick else FULL
    sections = _names(options.sections) or tuple(scale.estimates)
    for section in sections:
        cli.check_known("section", section, tuple(scale.estimates))
    methods = _names(options.methods)
    everything = accelerator.rows(scale, tuple(scale.estimates))
    known = tuple(dict.fromkeys(row.identity.get("method", accelerator.BASE) for row in everything))
    for method in methods or ():
        cli.check_known("method", method, known)
    return scale, accelerator.rows(scale, sections, methods)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def run(rows: Sequence[Row], store: Store, call: Call, end: float, console: Console) -> list[Row]:
    """Measures the rows that are not finished yet, for as long as there is time.

    Args:
      rows: the rows, the most important ones first.
      store: where finished rows are kept.
      call: measures a row, by its `Row.key`, within a number of seconds.
      end: the time, of `time.monotonic`, at which to end.
      console: where progress is printed.

    Returns:
      The rows for which there was no time.
    """
    before = {row.key: content[0] for row in rows if (content := store.load(row))}
    # What measured rows took over their estimates, by section: it corrects the next estimates.
    factors: dict[str, list[float]] = {}
    for row in rows:
        _learn(factors, row, before.get(row.key, {}))
    todo = [row for row in rows if before.get(row.key, {}).get("status") not in FINAL]
    # Those that went wrong before come last, so that they do not hold up the others again.
    todo.sort(key=lambda row: row.key in before)
    progress.expect(sum(row.estimate for row in todo))
    left_out, compiled = [], None  # the network and precision whose base is compiled now
    for row in todo:
        estimate = row.estimate + (row.base_estimate if row.place != compiled else 0.0)
        expected = estimate * statistics.median(factors.get(row.group, [1.0]))
        left = end - time.monotonic()
        progress.tell(f"{row.group} {row.name}")
        if expected > left:
            left_out.append(row)
            progress.advance(row.estimate)
            continue
        patience = max(PATIENCE * expected, LEAST_PATIENCE)
        outcome = call(row.key, min(left, patience))
        compiled = row.place if outcome.status == "done" else None
        failure = {"status": outcome.status, "reason": outcome.reason}
        record = {**(outcome.value or failure), "estimate": estimate}
        store.save(row, [record])
        progress.advance(row.estimate)
        _learn(factors, row, record)
        shown = f"{record['seconds']:.1f} s" if "seconds" in record else record["reason"]
        console.print(f"  {row.group} {row.name}: {record['status']}, {shown}", soft_wrap=True)
    return left_out


def _learn(factors: dict[str, list[float]], row: Row, record: Record) -> None:
    if record.get("status") == "measured":
        factors.setdefault(row.group, []).append(record["seconds"] / record["estimate"])


def write(
    rows: Sequence[Row],
    left_out: Sequence[Row],
    reason: str,
    store: Store,
    machine: Record,
    console: Console,
) -> None:
    """Prints the report, and writes its two files.

    Args:
      rows: the rows that were asked for.
      left_out: those of them that were left out.
      reason: why they were.
      store: where finished rows are kept.
      machine: the device and the versions.
      console: where the tables are printed.
    """
    records: dict[str, list[Record]] = {}
    for row in rows:
        records.setdefault(row.group, []).extend(store.load(row) or [])
    missing: dict[str, list[Record]] = {}
    for row in left_out:
        missing.setdefault(row.group, []).append(row.identity)
    shown, gaps = report.sections(records, machine), report.gaps(records, missing, reason)
    results = {"command": PROG, "machine": machine, "records": records, "left_out": missing}
    cli.write_atomic(store.folder / RESULTS, cli.to_json(results))
    notes = report.notes(records)
    cli.write_atomic(store.folder / REPORT, report.markdown(shown, gaps, notes, machine))
    for section in (*shown, *([gaps] if gaps.rows else [])):
        console.print()
        console.print(report.view(section))
    console.print(f"\n{report.legend(machine)}")
    for note in notes:
        console.print(f"  {note}")
    console.print(f"report: {store.folder / REPORT}", soft_wrap=True)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    began = time.monotonic()
    options = cli.parse(Options(), argv, PROG)
    scale, rows = resolve(options)
    console = cli.console(120)
    if options.dry_run:
        return dry_run(options, scale, rows, console)
    # This process leaves the device alone: only one at a time can have a TPU.
    with Isolated(accelerator.worker, scale) as isolated:
        opened = isolated.call("machine", START_SECONDS)
        if opened.status != "done":
            return cli.fail(f"the device could not be opened: {opened.reason}", 1)
        machine: Record = opened.value | {
            "base": accelerator.BASE,
            "parameters": scale.parameters,
            "curvature_share": accelerator.CURVATURE_SHARE,
            "matmul_precision": accelerator.F32_MATMUL_PRECISION,
        }
        study = folder_of(options, machine)
        with study.claim():
            for line in report.heading(machine):
                console.print(line)
            console.print(f"{cli.plural(len(rows), 'row')} -> {study.folder}", soft_wrap=True)
            store = Store(study.folder)
            end = began + (options.budget_seconds or scale.seconds)
            try:
                with progress.show(console, "accelerator_report"):
                    left_out = run(rows, store, isolated.call, end, console)
            except KeyboardInterrupt:
                left_out = [row for row in rows if store.load(row) is None]
                write(rows, left_out, "interrupted", store, machine, console)
                raise
            write(rows, left_out, "no time left", store, machine, console)
    return 0


def dry_run(options: Options, scale: Scale, rows: Sequence[Row], console: Console) -> int:
    """Prints what the report would take, without opening the device; returns the exit code."""
    sections = ", ".join(dict.fromkeys(row.group for row in rows))
    estimate = sum(row.estimate for row in rows)
    budget = options.budget_seconds or scale.seconds
    lines = {
        "plan": f"{sections} on the first device -> a folder with its name in {options.runs_dir}",
        "runs": cli.plural(len(rows), "row"),
        "parameters": f"{scale.parameters:,} of the tree that is updated",
        "memory": "not known before the device is opened; a row that cannot fit is left out",
        "time": f"at most {cli.duration(budget)}, the budget; the rows are expected to take "
        f"{cli.duration(estimate)} on the machine they were estimated for",
    }
    return cli.print_forecast(console, lines)


def folder_of(options: Options, machine: Record) -> StudyFolder:
    """Where the report is kept: one folder for each device.

    Args:
      options: the command's options.
      machine: the device and the versions; other ones are not mixed with them.
    """
    device = "-".join("".join(c if c.isalnum() else " " for c in machine["device"]).lower().split())
    default = f"accelerator-{device}" + ("-quick" if options.quick else "")
    return StudyFolder(
        folders.locate(options.runs_dir, options.name, default),
        {
            "accelerator": machine["device"],
            **machine,
            "scale": "quick" if options.quick else "full",
        },
        "an accelerator report",
        "accelerator",
        files=(RESULTS, REPORT),
        folders=("units",),
        overwrite=options.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
