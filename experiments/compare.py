"""Compare training methods side by side on real data, each at its own best learning rate.

    python -m experiments.compare --task digits --methods sgd,adam,demon_sgd,bulk_sgd --seeds 3

Every method gets the same budget: as many learning rates, seeds, steps and batches as any other.
All runs of a method (learning rate x seed) train together in one compiled program, as many at a
time as memory allows. The learning rate is chosen on the validation split; the test split is read
once, at the end of each run. `runs/<name>/` then holds

    config.json             what was run: the same command continues it, another one is refused
    metrics/<method>.jsonl  one line per evaluation: rate, seed, step, cost, losses, accuracy
    timing.json             seconds per step, measured for all methods in alternation
    results.json, .csv      the table
    curves.png, .svg        curves at the chosen rates
    rates.png, .svg         validation accuracy over the rates
    report.html             all of it in one file
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments import cli, data, methods, progress
from experiments.cli import UsageError
from experiments.reporting import comparison, figures, tables
from experiments.reporting.summary import COMPARISON, summarize
from experiments.runs import folders
from experiments.runs.records import RESULTS
from experiments.training.options import listing
from experiments.training.replicas import Plan, Trainer
from experiments.training.studies import comparison as training
from experiments.training.studies import forecast

PROG = "python -m experiments.compare"


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Compare training methods on real data, each at its own best learning rate."""

    task: str = "digits"
    """Data set; --list tasks shows all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own. --list models shows all."""
    loss: str = "cross_entropy"
    """Loss: cross_entropy, or mse (half the squared distance to the one-hot label)."""
    methods: str = ",".join(figures.PRINCIPAL)
    """Methods, separated by commas; --list methods shows all."""
    learning_rates: str | None = None
    """Rates that every method is tuned on, separated by commas, such as 0.01,0.1; default: the grid
    of each method."""
    seeds: int = 3
    """Seeds per method and learning rate: initial weights and batch order."""
    epochs: int | None = None
    """Passes over the training split; default: the task's own."""
    steps: int | None = None
    """Steps, instead of --epochs."""
    batch_size: int = 64
    """Examples per step."""
    curvature_batch_size: int | None = None
    """Examples (fixed per seed) for Hessian-vector products; default: twice the batch size."""
    eval_every: int | None = None
    """Steps between validations; default: up to 75 points per curve."""
    target: float | None = None
    """Validation accuracy to count the steps to, between 0 and 1; default: the task's own."""
    name: str | None = None
    """Name of the run's folder; default: the task and a hash of the settings."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    overwrite: bool = False
    """Replace an earlier run of the same name."""
    max_replicas: int | None = None
    """Most runs to train together."""
    memory_gib: float | None = None
    """Memory that the runs trained together may take; default: half of what is free."""
    list: str | None = None
    """tasks, models or methods: print all of them with a few words on each, then stop; without a
    word all three."""


def resolve(options: Options) -> Plan:
    """Checks the options and fills in the defaults.

    Raises:
      ValueError: one line that says what is allowed.
    """
    options.check()
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--methods names no method; valid: {', '.join(methods.METHODS)}")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--methods names {', '.join(duplicates)} more than once")
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--epochs and --steps exclude each other; give one")
    return training.plan(
        options.task,
        names,
        learning_rates=cli.read_rates("--learning-rates", options.learning_rates),
        data_dir=options.data_dir,
        files=options.files,
        model=options.model,
        loss=options.loss,
        seeds=options.seeds,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        curvature_batch_size=options.curvature_batch_size,
        eval_every=options.eval_every,
        target=options.target,
    )


def dry_run(heading: str, folder: Path | None, trainer: Trainer, console: Console) -> int:
    """Prints what a comparison would take; returns the exit code.

    Args:
      heading: what is compared.
      folder: where finished runs are; ``None`` if they do not count.
      trainer: the trainer of the comparison.
      console: where to print.
    """
    plan = trainer.plan
    console.print(plan.task.describe(), soft_wrap=True)
    replicas = {method.name: plan.replicas(method) for method in plan.methods}
    if folder is not None:
        left = training.find_missing(plan, folder, trainer)
        replicas = {name: missing.todo for name, missing in left.items()}
    todo = [method for method in plan.methods if replicas[method.name]]
    with progress.show(console, "compare"):
        shares = [
            forecast.of_method(trainer, method, replicas[method.name])
            for method in progress.each(todo, "{0.name}: compiling".format)
        ]
    runs = sum(len(plan.replicas(method)) for method in plan.methods)
    done = runs - sum(map(len, replicas.values()))
    lines = {"plan": heading, "runs": f"{runs}, of which {done} are finished"}
    if shares:
        table = tables.table(["method", "runs", "together", "memory", "ms per step", "time"])
        for share in shares:
            numbers = (f"{share.runs}", f"{share.together}", forecast.size(share.bytes))
            times = (tables.short(1e3 * share.step), cli.duration(share.seconds))
            table.add_row(share.method, *numbers, *times)
        console.print(table)
        console.print()
        lines |= forecast.of_shares(trainer, shares)
    return cli.print_forecast(console, lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    if options.list is not None:
        print(listing(options.list, data.CLASSIFICATION))
        return 0
    with cli.usage():
        plan = resolve(options)
        trainer = Trainer(
            plan,
            max_replicas=options.max_replicas,
            memory=None if options.memory_gib is None else options.memory_gib * 2**30,
        )
    config = plan.config()
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    folder = folders.locate(options.runs_dir, options.name, f"{plan.task.name}-{digest}")
    console = cli.console(100)
    heading = (
        f"{plan.task.name}, {plan.model}: {cli.plural(len(plan.methods), 'method')} x "
        f"{cli.plural(len(plan.methods[0].learning_rates), 'learning rate')} x "
        f"{cli.plural(plan.seeds, 'seed')}, {cli.plural(plan.steps, 'step')} of "
        f"{cli.plural(plan.batch_size, 'example')} -> {folder}"
    )
    study = COMPARISON(folder, config, overwrite=options.overwrite)
    if options.dry_run:
        study.check()
        return dry_run(heading, None if options.overwrite else folder, trainer, console)
    with study.claim():
        console.print(heading, plan.task.describe(), sep="\n", soft_wrap=True)
        outcome = training.train(plan, folder, trainer, console)
        results = summarize(config, plan.methods, *outcome)
        cli.write_atomic(folder / RESULTS, cli.to_json(results))
        comparison.write_all(folder, results)
    console.print()
    console.print(comparison.table(results))
    console.print()
    for note in comparison.footnotes(results):
        console.print(note)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
