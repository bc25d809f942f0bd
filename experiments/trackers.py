"""Trackers of the dominant Hessian subspace: how accurate, at which cost, in one run.

    python -m experiments.trackers --task mnist5k --data-dir data

Plain SGD trains the task's network on the squared error, as Song et al., "Does SGD really happen in
tiny subspaces?" (2024). Every tracker follows the same path. At ten checkpoints, one drawn from
each tenth of the run, ARPACK (`scipy.sparse.linalg.eigsh`, relative accuracy 1e-6) solves for the
Hessian of the whole training split: for the largest algebraic eigenvalues, and for the smallest or
both ends where a tracker follows these. With its eigenvectors the basis of a Bulk-SGD step there is
compared:

* `chi`: |chi_k of the tracked basis - chi_k of the exact one|, of the gradient of the whole split
  and of the mini-batch;
* `cos2`: mean squared cosine of the two subspaces, |U^T V|^2 / k (Frobenius norm);
* `eigenvalues`: largest relative error;
* `residual`: largest |H u - theta u| that the state holds, on the examples that it saw, and in its
  place on the whole split; both relative to the largest exact eigenvalue;
* `directions`: how many count, beside how many should: with `sharpness_factor=c`, those with an
  eigenvalue above c / learning rate, of which all errors of that tracker are.

Trackers in the metric of a preconditioner (`metric="preconditioned"`) follow a path of Adam at rate
0.001 from the same start, on the same batches, and are held against the eigenpairs of the
preconditioned Hessian there.

`used` is the basis that the step at the checkpoint projects with. `before` is the one before that
step's refresh: where a refresh falls on the checkpoint, the oldest that any step projects with.

Then Bulk-SGD steps are timed beside plain SGD steps, both as a user runs them: compiled, with
donated buffers, the batch gathered by index, refreshes driven from the host at their usual rhythm.
The cold start is left out. A tracker that chooses its periods is timed at their mean; those in
Adam's metric are not timed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console

from experiments import cli, data, progress, timing
from experiments.reporting import pages
from experiments.reporting import trackers as report
from experiments.runs import folders
from experiments.runs.records import to_csv
from experiments.runs.study import check_results, claim_results, write_results
from experiments.training.studies import forecast, tracking
from experiments.training.studies.hessians import Reference
from experiments.training.studies.tracking import CHECKPOINTS, ENTRIES, Entry

PROG = "python -m experiments.trackers"
FILES = ("accuracy.csv", "report.html")


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Measure the trackers of the dominant Hessian subspace against ARPACK."""

    limits: ClassVar = {"steps": cli.Range(CHECKPOINTS, 10**6), "repeats": cli.Range(0, 10**6)}
    limits |= {"directions": cli.Range(1, 1_000)}

    task: str = "mnist5k"
    """Data set: a task of images, such as digits, mnist5k, cifar10_5k."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    trackers: str | None = None
    """Trackers, separated by commas; default: all of the largest eigenvalues."""
    steps: int = 500
    """Steps of SGD, at least 10."""
    learning_rate: float = 0.01
    """Learning rate of SGD; 0.01 for MNIST in Song et al."""
    batch_size: int = 50
    """Examples in a mini-batch."""
    curvature_batch: int = 500
    """Number of fixed examples for curvature products."""
    directions: int | None = None
    """Dimension of the subspace; default: the number of classes."""
    repeats: int = 20
    """Rounds of the timing; 0 for no timing."""
    seed: int = 0
    """Seed of the weights, the batches, the fixed examples and the checkpoints."""
    name: str | None = None
    """Name of the folder for results; default: trackers, task and learning rate."""
    runs_dir: Path = Path("runs")
    """Folder in which that folder is made."""


def _check(options: Options) -> tuple[data.Task, dict[str, Entry]]:
    """The task and the trackers that the options name.

    Raises:
      UsageError: an option is wrong.
    """
    data.check_classification(options.task)
    # ARPACK needs many products to tell the smallest eigenvalues apart, so that is asked for.
    names = [name for name, entry in ENTRIES.items() if entry.order == "algebraic"]
    if options.trackers is not None:
        names = [name.strip() for name in options.trackers.split(",")]
    for name in names:
        cli.check_known("tracker", name, list(ENTRIES))
    task = data.load_classification(options.task, data_dir=options.data_dir, **options.files)
    if max(options.batch_size, options.curvature_batch) > len(task.train):
        raise cli.UsageError(
            f"--batch-size and --curvature-batch can be at most {len(task.train)}, the size of the "
            f"training split, got {options.batch_size} and {options.curvature_batch}"
        )
    return task, {name: ENTRIES[name] for name in dict.fromkeys(names)}


def run(
    options: Options, task: data.Task, entries: dict[str, Entry], console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures accuracy and cost; prints the tables.

    Args:
      options: the command's options.
      task: the data.
      entries: the trackers by name.
      console: where the tables are printed.

    Returns:
      The results as plain JSON, and the rows of accuracy.csv.
    """
    # Always the path of SGD, with which the costs are measured.
    metrics = {"euclidean", *(entry.metric for entry in entries.values())}
    paths = {
        metric: tracking.SgdPath(
            task,
            steps=options.steps,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            curvature_batch=options.curvature_batch,
            k=options.directions,
            seed=options.seed,
            metric=metric,
        )
        for metric in sorted(metrics)
    }
    path = paths["euclidean"]
    machine = timing.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    console.print(
        f"{options.task}, {len(task.train):,} examples, {task.default_model} with "
        f"{path.dimension:,} parameters, squared error, SGD {options.learning_rate:g}, "
        f"batch {options.batch_size}, k = {path.k}; subset of {options.curvature_batch} examples"
    )
    rows: list[dict[str, Any]] = []
    solved, refreshes = dict[str, list[Reference]](), dict[str, int]()
    for metric, each in paths.items():
        followed = {name: entry for name, entry in entries.items() if entry.metric == metric}
        if followed:
            if metric == "preconditioned":
                console.print(f"Adam {each.learning_rate:g}, in whose metric trackers follow")
            with progress.show(console, "trackers", options.steps):
                found = tracking.accuracy(each, followed, console.print)
            rows += found[0]
            solved[metric] = found[1]
            refreshes |= found[2]
    references = next(iter(solved.values()))
    arpack_seconds = float(np.median([reference.seconds for reference in references]))
    cost = []
    if options.repeats:
        with progress.show(console, "timing"):
            cost = tracking.costs(path, entries, refreshes, arpack_seconds, options.repeats)
    summary = {name: report.summarize(rows, name) for name in entries}
    checks = report.checks(summary, cost)
    trackers = {
        name: (entry.examples, entry.tracker.refresh_every, refreshes[name])
        for name, entry in entries.items()
    }
    for table in (*report.checkpoint_tables(rows), report.summary_table(trackers, summary, cost)):
        console.print()
        console.print(table)
    for check in checks:
        console.print(report.verdict(check))
    results = {
        "machine": machine,
        "arpack": {
            "seconds": arpack_seconds,
            "products": [reference.products for reference in references],
        },
        "summary": summary,
        "refreshes": refreshes,
        "cost": cost,
        "checks": [check._asdict() for check in checks],
    }
    return results, rows


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        task, entries = _check(options)
    except data.DataError as error:
        return cli.fail(error)
    default = (
        f"trackers-{data.short_name(options.task, options.data_dir)}-{options.learning_rate:g}"
    )
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(220)
    if options.dry_run:
        check_results(folder, PROG, FILES)
        steps, number = cli.plural(options.steps, "step"), cli.plural(len(entries), "tracker")
        lines = {
            "plan": f"{options.task}, {task.default_model}: {number} along {steps} of SGD, "
            f"{CHECKPOINTS} checkpoints -> {folder}",
            "runs": "1, which all trackers follow",
            **forecast.of_shapes(task, task.default_model, options.batch_size),
            "time": cli.TIME_NOT_KNOWN,
        }
        return cli.print_forecast(console, lines)
    with claim_results(folder, PROG, FILES):
        results, rows = run(options, task, entries, console)
        write_results(folder, PROG, options, results)
        cli.write_atomic(folder / "accuracy.csv", to_csv(rows))
        title = f"Trackers of the dominant Hessian subspace on {options.task}"
        pages.write_study(folder / "report.html", title, PROG, options, printed=console.printed)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
