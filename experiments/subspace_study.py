"""Sharp and flat directions: the experiments of two papers, re-run by one command.

    python -m experiments.subspace_study --task digits --loss mse

Song, Ahn, Yun, "Does SGD really happen in tiny subspaces?" (arXiv 2405.16002), and Zakarin, Singh,
"Accelerating neural network training along sharp and flat directions" (arXiv 2505.11972), split
every update into its part in the *dominant* subspace, spanned by the k leading eigenvectors of the
Hessian of the training loss (k: number of classes), and the rest, the *bulk*. The alignment of a
vector, chi_k(v) = |P v| / |v|, says how much of it lies in the dominant subspace.

Six panels, each a picture and a table:

    alignment                 SGD: loss, chi_k of the full and of mini-batch gradients, eigenvalues
    switch                    from one point on: SGD, Dom-SGD, Bulk-SGD, and two lines between them
    effective_learning_rates  in both subspaces, of SGD, SGD with momentum and Adam
    stability                 Bulk-SGD against SGD: learning rate, k, refresh, momentum, batch size
    energy                    share of H, Gauss-Newton and functional Hessian in the subspace
    noise                     whether the alignment survives a change to full-batch descent

A report compares every qualitative claim of the papers with a number; the criteria are part of the
code (`experiments.reporting.subspace.claims`). `runs/<name>/` then holds

    config.json            the settings: the same command continues, one with others is refused
    units/<panel>/*.json   raw results, one file per finished unit of work
    snapshots/*.npz        parameters along SGD, from which the other panels start
    <panel>.csv, .png, .svg  table and picture
    claims.json, report.md, report.html

Projections use a basis that the library tracks on a fixed part of the training set; measurements
(chi_k, eigenvalues, energies) use eigenvectors solved to a tolerance. The branches leave SGD where
the moving average (decay 0.9) of chi_k of the full gradient exceeds 0.95, as in public
replications, or at a fixed step. The replications average over all steps; here the average runs
over every `check_every`-th.

The default learning rates 0.01 (MLP), 0.001 (CNN) and 0.001 (Transformer) are those that a
replication quotes from the appendix of Song et al.; another replication uses 0.1 for MNIST. The
rate for digits is our choice.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments import cli, data, progress
from experiments.cli import UsageError
from experiments.reporting.figures import FORMATS
from experiments.reporting.subspace import claims
from experiments.reporting.subspace.report import PANELS, write_all
from experiments.runs import folders
from experiments.runs.records import environment
from experiments.runs.study import StudyFolder
from experiments.runs.units import Rows, Store, Unit
from experiments.training.studies import forecast, subspace_panels
from experiments.training.studies.subspace_runs import Plan, Scale, Study

PROG = "python -m experiments.subspace_study"

LEARNING_RATES = {"digits": 0.05, "mnist5k": 0.01, "cifar10_5k": 0.001, "sst2_1k": 0.001}
TASKS = tuple(LEARNING_RATES)

SUBSPACES = functools.partial(
    StudyFolder,
    kind="a study",
    mark="study",
    files=(
        *("claims.json", "report.md", "report.html"),
        *(f"{panel}.{kind}" for panel in PANELS for kind in ("csv", *FORMATS)),
    ),
    folders=("units", "snapshots"),
)


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Re-run the experiments on the dominant and the bulk subspace of the Hessian."""

    task: str = "digits"
    """Data set and model: digits or mnist5k (MLP), cifar10_5k (CNN), sst2_1k (Transformer)."""
    loss: str = "mse"
    """Training loss: mse or cross_entropy."""
    scale: str = "small"
    """small: under an hour on two cores (digits: minutes); full: the papers' 20,000 steps; tiny:
    minutes on digits, enough to see the files but too short for conclusions."""
    learning_rate: float | None = None
    """Learning rate of SGD; default: 0.05 (digits), 0.01 (mnist5k), 0.001 (cifar10_5k, sst2_1k)."""
    switch_step: int | None = None
    """Step at which the branches leave SGD; default: where the gradient is first aligned."""
    seeds: int | None = None
    """Number of seeds: initial weights and batch order; default: by task and scale."""
    panels: str = ",".join(PANELS)
    """Panels to compute now, separated by commas."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    name: str | None = None
    """Name of the run's folder; default: task, loss and a hash of the settings."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


# Each entry lists the fields of `Scale` in order.
TINY = Scale(1, 20, 10, 20, 10, 5, 2, 1, 50, 100, 5, 4)
SCALES = {
    "digits": {
        "tiny": TINY,
        "small": Scale(3, 1500, 10, 2000, 500, 80, 8, 3, 500, 1077, 5, 50),
        "full": Scale(5, 4000, 10, 16000, 2000, 200, 20, 6, 1077, 1077, 5, 200),
    },
    "mnist5k": {
        "tiny": TINY,
        "small": Scale(2, 4000, 20, 4000, 500, 80, 6, 3, 500, 5000, 10, 30),
        "full": Scale(3, 5000, 10, 15000, 2000, 200, 20, 6, 1000, 5000, 5, 100),
    },
    "cifar10_5k": {
        "tiny": TINY,
        "small": Scale(1, 800, 100, 800, 80, 20, 3, 1, 200, 500, 40, 5),
        "full": Scale(3, 5000, 10, 15000, 2000, 200, 20, 6, 1000, 5000, 5, 100),
    },
    "sst2_1k": {
        "tiny": TINY,
        "small": Scale(1, 200, 50, 200, 50, 8, 2, 1, 100, 250, 25, 5),
        "full": Scale(3, 5000, 10, 15000, 2000, 200, 20, 6, 1000, 1000, 5, 100),
    },
}


def resolve(options: Options) -> tuple[Plan, list[str]]:
    """Checks the options and fills in the defaults; also gives the panels to compute.

    Raises:
      UsageError, data.DataError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("task", options.task, TASKS)
    cli.check_known("loss", options.loss, data.LOSSES["classification"])
    cli.check_known("scale", options.scale, tuple(SCALES[options.task]))
    panels = [name.strip() for name in options.panels.split(",") if name.strip()]
    if not panels:
        raise UsageError(f"--panels names none; valid: {', '.join(PANELS)}")
    for panel in panels:
        cli.check_known("panel", panel, tuple(PANELS))
    scale = SCALES[options.task][options.scale]
    if options.seeds is not None:
        scale = dataclasses.replace(scale, seeds=options.seeds)
    plan = Plan(
        task=data.load_task(options.task, data_dir=options.data_dir),
        loss=options.loss,
        scale=scale,
        learning_rate=options.learning_rate or LEARNING_RATES[options.task],
        switch_step=options.switch_step,
    )
    return plan, panels


def run(plan: Plan, folder: Path, panels: Sequence[str], console: Console) -> dict[str, Rows]:
    """Computes the units that are not finished yet.

    Args:
      plan: the settings of the study.
      folder: the study's folder.
      panels: the panels to compute now; `alignment` is always computed, since the others need it.
      console: where progress is printed.

    Returns:
      The rows of every finished panel.
    """
    study, store = Study(plan), Store(folder)
    rows: dict[str, Rows] = {}
    unfinished = set()
    begin, computed = time.perf_counter(), 0
    units = all_units(study, store)
    progress.expect(sum(is_wanted(unit, panels) and store.load(unit) is None for unit in units))
    for unit in units:
        stored = store.load(unit)
        if stored is None and is_wanted(unit, panels):
            start = time.perf_counter()
            progress.tell(f"{unit.group} {unit.name}")
            store.save(unit, unit.work())
            stored = store.load(unit)
            computed += 1
            progress.advance()
            console.print(f"  {unit.group} {unit.name}: {time.perf_counter() - start:.1f} s")
        if stored is None:
            unfinished.add(unit.group)
        rows.setdefault(unit.group, []).extend(stored or [])
    console.print(
        f"  {cli.plural(computed, 'unit')} computed in {time.perf_counter() - begin:.0f} s"
    )
    return {name: content for name, content in rows.items() if name not in unfinished}


def is_wanted(unit: Unit, panels: Sequence[str]) -> bool:
    """Whether a unit belongs to the panels, or to the one that the others start from."""
    return unit.group in (*panels, "alignment")


def all_units(study: Study, store: Store) -> list[Unit]:
    """The units of all seeds."""
    seeds = range(study.plan.scale.seeds)
    return [unit for seed in seeds for unit in subspace_panels.units(study, store, seed)]


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan, panels = resolve(options)
    config = plan.config()
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    default = f"subspaces-{plan.task.name}-{plan.loss}-{digest}"
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(100)
    heading = (
        f"{plan.task.name}, {plan.task.default_model}, {plan.loss}, learning rate "
        f"{plan.learning_rate:g}, {cli.plural(plan.scale.seeds, 'seed')} -> {folder}"
    )
    study = SUBSPACES(folder, config)
    if options.dry_run:
        study.check()
        store = Store(folder)
        units = [unit for unit in all_units(Study(plan), store) if is_wanted(unit, panels)]
        done = sum(store.load(unit) is not None for unit in units)
        lines = {
            "plan": heading,
            "runs": f"{cli.plural(len(units), 'unit')} of work, of which {done} are finished",
            **forecast.of_shapes(plan.task, plan.task.default_model, plan.batch_size),
            "time": cli.TIME_NOT_KNOWN,
        }
        return cli.print_forecast(console, lines)
    with study.claim():
        console.print(heading, soft_wrap=True)
        with progress.show(console, "subspace_study"):
            rows = run(plan, folder, panels, console)
        results = {"config": config, "environment": environment(), "rows": rows}
        verdicts = write_all(folder, results)
    console.print()
    console.print(claims.table(verdicts))
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
