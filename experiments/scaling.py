"""What the methods send between devices: read from compiled steps, on paper, and timed.

    python -m experiments.scaling --task digits

1. Every method's training step is compiled for virtual devices, and its collectives are counted:
   in a step and, for methods that follow the Hessian's dominant subspace, in a refresh of it.
2. From those counts and the usual models of cost it computes how much a worker sends in a step
   among 1 to 1024 workers, and in how many messages one after the other.
3. Steps are timed on 1, 2, 4, ... of the devices with the same global batch. Virtual devices share
   the cores of the machine, so this measures what the devices cost, not what they gain.

The counts do not contain the metrics of a run (loss and finiteness, a few bytes): the steps here
return none, so that the compiler removes what only they need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
from rich.console import Console

import models
from experiments import cli, data, progress, timing
from experiments.methods import METHODS, Method, get_methods
from experiments.reporting import pages
from experiments.reporting import scaling as report
from experiments.runs.records import plain_options
from experiments.training import cluster, parallel
from experiments.training.studies import communication, forecast
from experiments.training.studies.communication import MODES, Programs

PROG = "python -m experiments.scaling"
WORKERS = tuple(2**k for k in range(11))


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Count what the methods send between devices, and time it."""

    limits: ClassVar = {"rounds": cli.Range(0, 10**6)}

    task: str = "digits"
    """Data set: digits, mnist5k, cifar10_5k, ..."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's. An unknown name lists all."""
    methods: str | None = None
    """Methods to count, separated by commas; default: all."""
    modes: str = "jit,fsdp,shard_map"
    """Parallel modes, separated by commas."""
    batch_size: int = 64
    """Examples per step over all devices."""
    devices: int = 8
    """Number of devices, a power of two; on a CPU they are virtual."""
    timed: str = "sgd,bulk_sgd_gradient,decentlam"
    """Methods to time, separated by commas."""
    rounds: int = 20
    """Rounds of the timing; 0 for no timing."""
    json: Path | None = None
    """Also write the numbers to this file."""
    html: Path | None = None
    """Also write the tables to this file, as a page for the browser."""


def _check(options: Options) -> tuple[Programs, list[Method], list[str], list[Method]]:
    """The programs, and the methods, modes and timed methods that the options name.

    Raises:
      UsageError, DataError: an option is wrong.
    """
    cli.check_files({"--json": options.json, "--html": options.html})
    cluster.check_virtual_devices(options.devices)
    data.check_classification(options.task)
    cli.check_known("model", options.model, models.list())
    modes = [mode.strip() for mode in options.modes.split(",")]
    for mode in modes:
        cli.check_known("parallel mode", mode, MODES)
    if options.devices < 2 or options.devices & (options.devices - 1):
        raise cli.UsageError(f"--devices must be a power of two from 2 on, got {options.devices}")
    try:
        names = METHODS if options.methods is None else options.methods.split(",")
        methods = get_methods([name.strip() for name in names])
        timed = get_methods([name.strip() for name in options.timed.split(",")])
        parallel.check_divisible(options.batch_size, options.devices, "--batch-size")
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    task = data.load_classification(options.task, data_dir=options.data_dir, **options.files)
    if not 1 <= options.batch_size <= len(task.train):
        raise cli.UsageError(
            f"--batch-size must be between 1 and the {len(task.train)} training examples, got "
            f"{options.batch_size}"
        )
    # Only possible before JAX starts its backends; afterwards the existing devices have to do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", options.devices)
    devices = jax.devices()[: options.devices]
    if len(devices) < options.devices:
        raise cli.UsageError(
            f"--devices {options.devices}: there are only {len(devices)} of kind "
            f"{devices[0].platform}; set JAX_PLATFORMS=cpu to use virtual ones"
        )
    try:
        programs = Programs(task, options.model or task.default_model, options.batch_size, devices)
    except ValueError as error:  # the model does not take such examples
        raise cli.UsageError(str(error)) from None
    return programs, methods, modes, timed


def _with_modes(methods: Sequence[Method], modes: Sequence[str]) -> list[tuple[Method, str]]:
    """Every method in every mode that it has: workers with separate states have no fsdp."""
    return [
        (method, mode)
        for method in methods
        for mode in modes
        if not (method.per_worker and mode == "fsdp")
    ]


def _counted(entry: tuple[Method, str]) -> str:
    return f"counting {entry[0].name}, {entry[1]}"


def _timed(entry: tuple[Method, str]) -> str:
    return f"timing {entry[0].name}, {entry[1]}"


def run(options: Options, console: Console) -> dict[str, Any]:
    """Counts, computes and times; prints the tables.

    Args:
      options: the command's options.
      console: where the tables are printed.

    Returns:
      The results as plain JSON.

    Raises:
      UsageError, DataError: an option is wrong.
    """
    programs, methods, modes, timed = _check(options)
    copy = programs.copy
    machine = timing.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    console.print(
        f"{options.task}, batch {options.batch_size}; a copy of the parameters has "
        f"{copy:,} bytes, and all amounts are in such copies"
    )
    counted = _with_modes(methods, modes)
    compared = _with_modes(timed, modes) if options.rounds else []
    progress.expect(len(counted) + len(compared))
    counts = [
        row
        for method, mode in progress.each(counted, _counted, expected=True)
        for row in communication.counts(programs, method, mode)
    ]
    view, notes = report.counts_table(counts, len(programs.devices), copy)
    console.print()
    console.print(view)
    for note in (*notes, report.ON_COUNTS):
        console.print(note)

    paper = {
        entry.name: [communication.on_paper(programs, entry, workers) for workers in WORKERS]
        for entry in communication.entries([method.name for method in methods])
    }
    if paper:
        sent = {name: [cost.sent / copy for cost in costs] for name, costs in paper.items()}
        hops = {name: [cost.hops for cost in costs] for name, costs in paper.items()}
        for title, rows in (("copies sent per worker and step", sent), ("hops per step", hops)):
            console.print()
            console.print(report.paper_table(f"on paper: {title}", WORKERS, rows))
        console.print(report.ON_PAPER)

    times = []
    if options.rounds:
        for method, mode in progress.each(compared, _timed, expected=True):
            rows_by_devices = communication.time_steps(programs, method, mode, options.rounds)
            times.append({"method": method.name, "mode": mode, "devices": rows_by_devices})
        console.print()
        console.print(report.timing_table(times))
        console.print(
            f"Medians (quartiles) of {options.rounds} interleaved rounds, the global batch the "
            "same, each step waited for. The virtual devices share the cores of one machine: this "
            "is the overhead of the devices, not a speed-up."
        )
    return {
        "machine": machine,
        "options": plain_options(options),
        "copy_bytes": copy,
        "counts": counts,
        "workers": WORKERS,
        "paper": {name: [cost._asdict() for cost in costs] for name, costs in paper.items()},
        "times": times,
    }


def dry_run(options: Options, console: Console) -> int:
    """Prints what the study would take; returns the exit code."""
    programs, methods, modes, timed = _check(options)
    counted = len(_with_modes(methods, modes))
    compared = len(_with_modes(timed, modes)) if options.rounds else 0
    batch = sum(part.nbytes for part in programs.batch.values())
    lines = {
        "plan": f"{options.task}: {cli.plural(len(methods), 'method')} in the modes "
        f"{', '.join(modes)} on {len(programs.devices)} devices",
        "runs": f"{cli.plural(counted, 'program')} counted, {compared} timed over "
        f"{cli.plural(options.rounds, 'round')}",
        "parameters": f"{forecast.parameters(programs.params):,}",
        "memory": f"parameters {forecast.size(programs.copy)}, batch {forecast.size(batch)}, from "
        "shapes; intermediate results are not counted",
        "time": cli.TIME_NOT_KNOWN,
    }
    return cli.print_forecast(console, lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        console = cli.console(150)
        if options.dry_run:
            return dry_run(options, console)
        with progress.show(console, "scaling"):
            results = run(options, console)
    except (cli.UsageError, data.DataError) as error:
        return cli.fail(error)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(options.json, cli.to_json(results))
    if options.html is not None:
        title = f"What the methods send between devices: {options.task}"
        pages.write_study(options.html, title, PROG, options, printed=console.printed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
