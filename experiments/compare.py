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
    curves.png, rates.png   curves at the chosen rates; validation accuracy over the rates
    report.html             all of it in one file
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import models
from experiments import cli, data, methods
from experiments.cli import UsageError
from experiments.methods.listing import catalogue
from experiments.reporting import comparison, figures
from experiments.reporting.summary import summarize_method
from experiments.runs import folders
from experiments.runs.records import (
    CONFIG,
    RESULTS,
    environment,
    first_difference,
    is_number,
    read_file,
    read_json,
    read_record,
    write_record,
)
from experiments.training.replicas import Plan, Record, Replica, Trainer, measure_time

PROG = "python -m experiments.compare"
DEFAULT_EPOCHS = {"digits": 30, "mnist": 3, "mnist5k": 20, "cifar10": 5, "cifar10_5k": 20}
DEFAULT_EPOCHS |= {"sst2": 1, "sst2_1k": 10}


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Compare training methods on real data, each at the best learning rate of its own grid."""

    task: str = "digits"
    """Data set; --list shows all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own. --list shows all."""
    loss: str = "cross_entropy"
    """Loss: cross_entropy, or mse (half the squared distance to the one-hot label)."""
    methods: str = ",".join(figures.PRINCIPAL)
    """Methods, separated by commas; --list shows all."""
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
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace an earlier run of the same name."""
    max_replicas: int | None = None
    """Most runs to train together."""
    memory_gib: float | None = None
    """Memory that the runs trained together may take; default: half of what is free."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the methods (paper, fidelity, learning rates), tasks and models, then stop."""


def resolve(options: Options) -> Plan:
    """Checks the options and fills in the defaults.

    Raises:
      UsageError, data.DataError, ValueError: with one line that says what is allowed.
    """
    options.check()
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--methods names no method; valid: {', '.join(methods.METHODS)}")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--methods names {', '.join(duplicates)} more than once")
    chosen = methods.get_methods(names, per_worker=False)
    data.check_classification(options.task)
    cli.check_known("model", options.model, models.list())
    cli.check_known("loss", options.loss, data.LOSSES["classification"])
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--epochs and --steps exclude each other; give one")
    task = data.load_task(options.task, data_dir=options.data_dir)
    examples = len(task.train.y)
    curvature_batch_size = options.curvature_batch_size or min(2 * options.batch_size, examples)
    for name, value in (
        ("batch-size", options.batch_size),
        ("curvature-batch-size", curvature_batch_size),
    ):
        if value > examples:
            raise UsageError(
                f"--{name} {value} is more than the {examples} training examples of {task.name}"
            )
    epochs = options.epochs or DEFAULT_EPOCHS.get(task.name, 10)
    steps = options.steps or epochs * (examples // options.batch_size)
    if steps > cli.COUNT.high:
        raise UsageError(f"--epochs {epochs} are {steps} steps, more than {cli.COUNT.high}")
    order = 4 * options.seeds * steps * options.batch_size
    cli.check_memory(order, f"the order of the examples over {options.seeds} x {steps} steps")
    # Never look at more validation examples than training examples: at most a third of the time.
    enough = math.ceil(len(task.validation.y) / options.batch_size)
    return Plan(
        task=task,
        model=options.model or task.default_model,
        loss=options.loss,
        methods=chosen,
        seeds=options.seeds,
        steps=steps,
        batch_size=options.batch_size,
        curvature_batch_size=curvature_batch_size,
        eval_every=min(steps, options.eval_every or max(round(steps / 75), enough)),
        target=task.target_accuracy if options.target is None else options.target,
    )


# Files ------------------------------------------------------------------------------------------


# What a comparison's folder holds, files and folders.
FILES = (CONFIG, "timing.json", RESULTS, *comparison.FILES)
FOLDERS = ("metrics",)


def check_folder(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Checks that a folder is new, or belongs to the same comparison.

    Args:
      folder: the comparison's folder.
      config: what decides its numbers, from `Plan.config`.
      overwrite: whether another comparison there is to be replaced.

    Raises:
      UsageError: the folder belongs to another run or is not a comparison's folder at all.
    """
    if folders.is_new(folder):
        return
    path = folder / CONFIG
    old = read_json(path) if os.path.lexists(path) else None
    if not isinstance(old, dict) or not isinstance(old.get("methods"), dict):
        raise UsageError(f"{folder} is not a comparison's folder; give another --name")
    if not overwrite:
        if difference := first_difference(old, config):
            raise UsageError(
                f"{folder} holds a run with {difference}; give another --name, --overwrite "
                "to replace it, or the old settings to continue it"
            )
        folders.check_files(folder, FILES, FOLDERS)


def open_folder(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Prepares a folder that `check_folder` has passed: empties it if need be.

    Args:
      folder: the comparison's folder.
      config: what decides its numbers.
      overwrite: whether to remove what an earlier comparison has written there.
    """
    for name in (*FILES, *FOLDERS) if overwrite else ():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    cli.write_atomic(folder / CONFIG, cli.to_json(config))


def read_records(plan: Plan, method: methods.Method, path: Path) -> list[Record]:
    """The records of one method's runs that are complete, from its file.

    A line that is damaged, or one that is missing, makes a run incomplete.

    Args:
      plan: what the runs are.
      method: the method.
      path: its file; it need not exist.

    Returns:
      The records, in the order of the file.

    Raises:
      UsageError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return []
    points = [*range(0, plan.steps, plan.eval_every), plan.steps]
    runs: dict[Replica, list[Record]] = {
        (rate, seed): [] for rate in method.learning_rates for seed in range(plan.seeds)
    }
    records = []
    for line in read_file(path).splitlines():
        try:
            record = cli.parse_json(line)
            runs[record["learning_rate"], record["seed"]].append(record)
        except (ValueError, KeyError, TypeError):
            continue
        records.append(record)
    complete = {
        replica
        for replica, own in runs.items()
        if [record.get("step") for record in own] == points
        and all(_is_valid(record, method, plan.steps) for record in own)
    }
    return [record for record in records if (record["learning_rate"], record["seed"]) in complete]


def _is_valid(record: Record, method: methods.Method, steps: int) -> bool:
    """Whether a record holds all that `Trainer.train` writes, within its range."""
    scores = ["validation_loss", "validation_accuracy"]
    if record["step"] > 0:
        scores.append("train_loss")
    if record["step"] == steps:
        scores += ["test_loss", "test_accuracy"]
    numbers = ("learning_rate", "seed", "step", "gradient_evaluations")
    return (
        record.get("method") == method.name
        and all(is_number(record.get(name)) for name in numbers)
        and record["gradient_evaluations"] >= 0
        and all(
            name in record and (record[name] is None or is_number(record[name])) for name in scores
        )
        and all(0 <= (record[name] or 0) <= 1 for name in scores if name.endswith("accuracy"))
    )


# Results ----------------------------------------------------------------------------------------


def train_missing(
    plan: Plan, method: methods.Method, path: Path, trainer: Trainer, progress: Progress
) -> list[Record]:
    """Trains the runs of a method that its file lacks, a chunk at a time; returns all records."""
    records = read_records(plan, method, path)
    finished = {(record["learning_rate"], record["seed"]) for record in records}
    everyone = [(rate, seed) for rate in method.learning_rates for seed in range(plan.seeds)]
    todo = [replica for replica in everyone if replica not in finished]
    if not todo:
        progress.console.print(f"  {method.name:<18} already done")
        return records
    if path.exists() and len(read_file(path).splitlines()) > len(records):
        progress.console.print(f"  {method.name:<18} damaged runs in {path} are trained again")
    size = trainer.chunk_size(method, len(todo))
    bar = progress.add_task(
        f"{method.name}: {len(todo)} runs", total=plan.steps * math.ceil(len(todo) / size)
    )
    begin = time.perf_counter()
    for first in range(0, len(todo), size):
        chunk = todo[first : first + size]
        # The last chunk is filled up with copies, so that the compiled program fits.
        padded = chunk + [chunk[-1]] * (size - len(chunk))
        new = trainer.train(method, padded, functools.partial(progress.advance, bar))
        records.extend({(r["learning_rate"], r["seed"], r["step"]): r for r in new}.values())
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        cli.write_atomic(path, "".join(lines))
    progress.remove_task(bar)
    together = "" if size == len(todo) else f", {size} at a time"
    seconds = time.perf_counter() - begin
    progress.console.print(
        f"  {method.name:<18} {cli.plural(len(todo), 'run')} of "
        f"{cli.plural(plan.steps, 'step')}{together}: {seconds:.1f} s"
    )
    return records


def run(plan: Plan, folder: Path, trainer: Trainer, console: Console) -> dict[str, Any]:
    """Trains what is not finished yet, measures the time; returns the results."""
    everything: dict[str, list[Record]] = {}
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    terminal = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not terminal) as progress:
        for method in plan.methods:
            path = folder / "metrics" / f"{method.name}.jsonl"
            everything[method.name] = train_missing(plan, method, path, trainer, progress)
        path = folder / "timing.json"
        timing = read_record(path)
        if timing is None:
            progress.add_task("time per step", total=None)
            begin = time.perf_counter()
            timing = measure_time(trainer)
            write_record(path, timing)
            seconds = time.perf_counter() - begin
            console.print(f"  {'time per step':<18} {timing['rounds']} rounds: {seconds:.1f} s")

    rows = []
    for method in plan.methods:
        parameters, opt_state = trainer.state_bytes(method)
        row = summarize_method(plan, method, everything[method.name])
        row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(trainer.weights[0][0]))
        row["state_relative_to_parameters"] = opt_state / parameters
        row["seconds_per_step"] = timing["seconds_per_step"][method.name]
        row["time_relative_to_base"] = timing["relative_to_base"].get(method.name)
        rows.append(row)
    return {
        "config": plan.config(),
        "environment": environment(),
        "timing": {key: timing[key] for key in ("runs_together", "rounds")},
        "rows": rows,
    }


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    if options.list:
        print(catalogue(list(methods.METHODS.values())))
        print(f"tasks: {', '.join(data.CLASSIFICATION)}\nmodels: {', '.join(models.list())}")
        return 0
    try:
        plan = resolve(options)
        trainer = Trainer(
            plan,
            max_replicas=options.max_replicas,
            memory=None if options.memory_gib is None else options.memory_gib * 2**30,
        )
        config = plan.config()
        digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
        folder = folders.locate(options.runs_dir, options.name, f"{plan.task.name}-{digest}")
    except ValueError as error:
        return cli.fail(error)

    console = cli.console(100)
    with folders.claim(folder, lambda: check_folder(folder, config, options.overwrite)):
        open_folder(folder, config, options.overwrite)
        console.print(
            f"{plan.task.name}, {plan.model}: {cli.plural(len(plan.methods), 'method')} x "
            f"{len(plan.methods[0].learning_rates)} learning rates x "
            f"{cli.plural(plan.seeds, 'seed')}, {cli.plural(plan.steps, 'step')} of "
            f"{cli.plural(plan.batch_size, 'example')} -> {folder}",
            soft_wrap=True,
        )
        try:
            results = run(plan, folder, trainer, console)
            cli.write_atomic(folder / RESULTS, cli.to_json(results))
            comparison.write_all(folder, results)
        except KeyboardInterrupt:
            return interrupted(folder)
    console.print()
    console.print(comparison.table(results))
    console.print()
    for note in comparison.footnotes(results):
        console.print(note)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


def interrupted(folder: Path) -> int:
    """Tells how to go on after Ctrl-C; returns the exit code."""
    what = f"interrupted: finished runs are kept in {folder}; the same command continues"
    print(cli.printable(what), file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
