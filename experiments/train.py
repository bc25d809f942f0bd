"""Train one model on one task with one method.

    python -m experiments.train --task digits --method demon_sgd
    python -m experiments.train --task digits --method demon_sgd --resume

A run is decided by its options alone: the same ones give the same numbers, and a run that was
interrupted or killed ends, after `--resume`, bit by bit where it would have ended (on another
number of devices: up to rounding). Its folder, `runs/<name>/`, holds what
`experiments.runs` lists, and

    checkpoints/            the latest checkpoints
    result.json             scores of the test split, at the end
    samples.png             images drawn from the model, for tasks that train a generative one
    detections.png          the boxes found in some test pictures, for tasks that train a detector
    sharpness.png, ...      what --monitor recorded, as pictures (PNG and SVG), at the end

SIGTERM, with which clusters announce that they take a machine back, saves a checkpoint and ends the
run with exit code 0; Ctrl-C does the same with exit code 130. Of several processes (see
`experiments.training.cluster`) all compute and the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import optax_accel as oa
from experiments import cli, data, progress
from experiments.cli import UsageError
from experiments.runs import folders
from experiments.runs.metric_files import METRICS
from experiments.runs.records import CONFIG, check_same, read_config, versions, write_config
from experiments.runs.source import read_source, same_source, write_source
from experiments.training import cluster
from experiments.training.non_finite import NonFiniteError
from experiments.training.options import Options, from_record, listing
from experiments.training.plan import Plan, prepare
from experiments.training.program import Program, build
from experiments.training.studies import forecast

PROG = "python -m experiments.train"
# Options that do not belong to a run, and so not into its folder.
UNKEPT = ("resume", "distributed", "coordinator", "processes", "process_id", "list", "dry_run")


# Options ----------------------------------------------------------------------------------------


def check_same_data(task: data.Task) -> None:
    """Compares the data of all processes, each of which reads files of its own.

    Args:
      task: the task as this process has it.

    Raises:
      UsageError: a process has other data than process 0; raised on all processes.
    """
    names = [
        f"{kind} of the {split} split"
        for split in task.checksums
        for kind in ("examples", "labels")
    ]
    numbers = [number for split in task.checksums.values() for number in split.values()]
    everywhere = cluster.gather(np.array(numbers, np.uint32))
    for process, checksums in enumerate(everywhere):
        for name, differs in zip(names, checksums != everywhere[0], strict=True):
            if differs:
                raise UsageError(
                    f"process {process} has other {name} than process 0; give all processes a "
                    "--data-dir with the same files"
                )


def read_folder(typed: Options, stack: contextlib.ExitStack) -> dict[str, Any] | None:
    """The record of the run to resume, whose folder is locked from then on; None for a new run.

    Raises:
      UsageError: there is no run to resume, one that would be overwritten, or one under way.
    """
    folder = typed.folder
    if typed.resume:
        record = read_config(folder)
        if not typed.dry_run:
            stack.callback(folders.lock(folder).release)
        return record
    if (folder / CONFIG).exists():
        if not typed.dry_run:
            folders.lock(folder).release()  # says so if it is under way
        raise UsageError(
            f"{folder} holds a run; add --resume to continue it, or give another --name"
        )
    if not folders.is_new(folder):
        raise UsageError(f"{folder} exists and holds no run; give another --name")
    return None


def read_options(argv: Sequence[str] | None, typed: Options, record: Any) -> Options:
    """The options typed, over those of the run to resume.

    Raises:
      UsageError: the record is not one of these options.
    """
    if record is None:
        return typed
    default = dataclasses.replace(
        from_record(record["options"], typed.folder), name=typed.name, runs_dir=typed.runs_dir
    )
    return cli.parse(default, argv, PROG)


def open_folder(
    argv: Sequence[str] | None,
    options: Options,
    plan: Plan,
    record: dict[str, Any] | None,
    stack: contextlib.ExitStack,
) -> list[str]:
    """Makes and locks the folder of a new run, or checks that the one to resume is of this run.

    Returns:
      What to tell the person at the keyboard, e.g. that the run began on other devices.

    Raises:
      UsageError: it is of another run; the message names the first difference.
    """
    folder, machine = plan.folder, plan.machine()
    if record is None:
        stack.callback(folders.lock(folder).release)
        if (folder / CONFIG).exists():  # another process was faster
            raise UsageError(
                f"{folder} holds a run; add --resume to continue it, or give another --name"
            )
        kept = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(options).items()
            if name not in UNKEPT
        }
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        command, written = f"{PROG} {words}", write_source(folder)
        write_config(folder, kept, plan.config(), machine, command=command, source=written)
        return []
    check_same(folder, record["run"], plan.config())
    now = {**machine, **versions()}
    before = {**record["machine"], **record["versions"]}
    changes = [
        f"{name} {before.get(name)}, now {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    notes = [f"the run began with {'; '.join(changes)}: equal up to rounding"] if changes else []
    source = read_source()
    if record["source"] and source and not same_source(record["source"], source):
        notes.append(
            f"the run began with other source code, of commit {record['source'].get('commit')}: "
            "its numbers may differ from here on"
        )
    return notes


# The run ----------------------------------------------------------------------------------------


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    typed = cli.parse(Options(), argv, PROG)
    if typed.list is not None:
        print(listing(typed.list))
        return 0
    with contextlib.ExitStack() as stack:
        try:
            cluster.initialize(
                distributed=typed.distributed,
                coordinator=typed.coordinator,
                processes=typed.processes,
                process_id=typed.process_id,
                devices=typed.devices,
            )
            record = cluster.from_main(lambda: read_folder(typed, stack))
            options = read_options(argv, typed, record)
            plan = prepare(options)
            check_same_data(plan.task)
            program = build(plan)
            if options.dry_run:
                return dry_run(plan, program)
            notes = cluster.from_main(lambda: open_folder(argv, options, plan, record, stack))
        except ValueError as error:
            return cli.fail(error)
        # Room for the metrics where the output goes to a file.
        console = cli.console(120, quiet=not cluster.is_main())
        command = resume_command(
            plan.folder,
            devices=options.devices,
            distributed=typed.distributed,
            coordinator=typed.coordinator,
            processes=typed.processes,
            process_id=typed.process_id,
        )
        to_continue = f"to continue: {command}"
        cluster.advise(to_continue)
        console.print(heading(plan), plan.task.describe(), *notes, sep="\n", soft_wrap=True)
        return run_and_report(plan, program, console, to_continue)


def heading(plan: Plan) -> str:
    """What is run, in one line."""
    return (
        f"{plan.task.name}, {plan.model}, {plan.method.name} at learning rate "
        f"{plan.learning_rate:g}: {plan.steps} steps of {plan.batch_size} examples on "
        f"{len(plan.devices)} {plan.devices[0].platform} device(s) -> {plan.folder}"
    )


def dry_run(plan: Plan, program: Program) -> int:
    """Prints what a run would take; returns the exit code."""
    console = cli.console(120, quiet=not cluster.is_main())
    console.print(plan.task.describe(), soft_wrap=True)
    with progress.show(console, "train"):
        found, _ = forecast.of_run(plan, program)
    console.print(
        f"{oa.describe(program.tx, program.shapes.params)}\n", markup=False, soft_wrap=True
    )
    return cli.print_forecast(console, {"plan": heading(plan), "runs": "1"} | found)


def run_and_report(plan: Plan, program: Program, console: Console, to_continue: str) -> int:
    """Runs a plan; returns the exit code."""
    # Here, because they need Orbax, whose import `--help` and wrong options should not wait for.
    from experiments.runs.checkpoints import CheckpointError
    from experiments.training.loop import train

    try:
        stopped_by = train(plan, program, console)
    except (UsageError, CheckpointError) as error:
        return fail(f"error: {error}", 2)
    except (NonFiniteError, data.DataError) as error:
        return fail(f"error: {error}", 1)
    except OSError as error:
        reason = error.strerror or error
        return fail(f"error: cannot write to {plan.folder}: {reason}\n{to_continue}", 1)
    except KeyboardInterrupt:  # the second Ctrl-C
        stopped_by = signal.SIGINT
    if stopped_by is None:
        if plan.options.monitor and cluster.is_main():
            draw_curvature(plan.folder)
        return 0
    print(cli.printable(to_continue), file=sys.stderr)
    # A machine that is taken back is not a failure.
    return 0 if stopped_by == signal.SIGTERM else 128 + stopped_by


def draw_curvature(folder: Path) -> None:
    """Draws what the monitor of a finished run recorded into its folder."""
    # Here, because Matplotlib takes long to import.
    from experiments.reporting import curvature_pictures, figures

    lines = (folder / METRICS[0]).read_text().splitlines()
    for name, figure in curvature_pictures.of_run([json.loads(line) for line in lines]).items():
        figures.write(folder, name, figure)


def fail(message: str, code: int) -> int:
    """Tells what went wrong and returns the exit code; of several processes none waits for it."""
    if jax.process_count() > 1:
        cluster.abort(message, code)
    print(cli.printable(message), file=sys.stderr)
    return code


def resume_command(
    folder: Path,
    *,
    devices: int | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> str:
    """The command that continues a run; all options that are not given here are in its folder.

    The number of devices is there, too, but virtual ones are made before the folder is read.

    >>> resume_command(Path("runs/a"), devices=4)
    'python -m experiments.train --runs-dir runs --name a --resume --devices 4'
    >>> resume_command(Path("runs/a"), coordinator="127.0.0.1:80", processes=2, process_id=1)
    'python -m experiments.launch --processes 2 -- train --runs-dir runs --name a --resume'

    Args:
      folder: the run's folder.
      devices: number of devices over all processes.
      distributed: whether the process found the others by itself.
      coordinator: address of process 0. Processes that reach it at this machine's own address are
        started again by `experiments.launch`, at a new one.
      processes: number of processes.
      process_id: number of this process.
    """
    program, words = PROG, ["--runs-dir", str(folder.parent), "--name", folder.name, "--resume"]
    if devices is not None:
        words += ["--devices", str(devices)]
    if distributed:
        words.append("--distributed")
    elif coordinator is not None and coordinator.startswith("127.0.0.1:"):
        program = f"python -m experiments.launch --processes {processes} -- train"
    elif coordinator is not None:
        words += ["--coordinator", coordinator, "--processes", str(processes)]
        words += ["--process-id", str(process_id)]
    return f"{program} {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
