"""How much of a slow input prefetching hides.

    python -m experiments.input_overlap --task cifar10_5k --trace overlap.json

A delay makes reading a batch slower, by default by the time of a training step. Reading and
computing then take twice the time of a step one after the other and, at best, that time once side
by side. Interleaved rounds measure a step without the delay and a step with it, where each batch is
read either when it is asked for (`--prefetch 0` of `train`) or ahead in the background, by two
threads (`--data-workers 2`), so that one late batch does not stop everything. The share that is
hidden is 1 - (prefetched - no delay) / (in turn - no delay).

Every step is waited for. A loop that does not wait, such as that of `train` between two looks at
the metrics, hides some of the delay even without prefetching, because JAX computes in the
background; the row "queued" shows that.

The trace is a timeline of a prefetched round, one row for the steps and one for each thread that
reads; Perfetto (ui.perfetto.dev) and chrome://tracing open it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from experiments import cli
from experiments.reporting import pages, tables
from experiments.training.options import Options as TrainingOptions
from experiments.training.plan import Plan, prepare
from experiments.training.program import Program, build
from experiments.training.studies import forecast
from experiments.training.studies.overlap import Overlap, measure, trace

PROG = "python -m experiments.input_overlap"


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Measure how much of a slow input prefetching hides."""

    limits: ClassVar = {"workers": cli.Range(1, 1_000), "prefetch": cli.Range(1, 1_000)}

    task: str = "digits"
    """Data set; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own."""
    model_options: str | None = None
    """Options of the model as JSON, e.g. '{"patch_size": 4}'."""
    batch_size: int | None = None
    """Examples per step; default: the task's own."""
    delay: float | None = None
    """Seconds by which each batch is late; default: as long as a step."""
    steps: int = 20
    """Steps of a round."""
    rounds: int = 5
    """Interleaved rounds; medians are reported."""
    workers: int = 2
    """Threads that read ahead."""
    prefetch: int = 2
    """Batches that wait on the device."""
    trace: Path | None = None
    """File for the timeline."""
    html: Path | None = None
    """Also write the tables to this file, as a page for the browser."""


def make(options: Options) -> tuple[Plan, Program]:
    """Checks the options and makes the training that is measured, on one device.

    Raises:
      ValueError: an option is wrong.
    """
    options.check()
    cli.check_files({"--trace": options.trace, "--html": options.html})
    plan = prepare(
        TrainingOptions(
            task=options.task,
            data_dir=options.data_dir,
            model=options.model,
            model_options=options.model_options,
            batch_size=options.batch_size,
            devices=1,
        )
    )
    return plan, build(plan)


def run(options: Options, plan: Plan, program: Program) -> Overlap:
    """Measures what the options say."""
    state = program.runner.init(program.make_state)

    def step(batch: Any) -> Any:
        nonlocal state
        state, metrics = program.runner.step(state, batch, None, None)
        return metrics

    return measure(
        step,
        plan.task.train,
        program.runner.put_batch,
        batch_size=plan.batch_size,
        delay=options.delay,
        steps=options.steps,
        rounds=options.rounds,
        workers=options.workers,
        prefetch=options.prefetch,
    )


def dry_run(options: Options, plan: Plan, program: Program) -> int:
    """Prints what the measurement would take; returns the exit code."""
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.shapes))
    batch = plan.batch_size * plan.task.train.x[0].nbytes
    lines = {
        "plan": f"{plan.task.name}, {plan.model}, {plan.method.name}: steps of {plan.batch_size} "
        "examples, without a delay and late in turn, queued and prefetched",
        "runs": f"{cli.plural(options.rounds, 'round')} of 4 times {options.steps} steps",
        "parameters": f"{forecast.parameters(program.shapes.params):,}",
        "memory": f"state {forecast.size(state)}, a batch {forecast.size(batch)}, from shapes; "
        "intermediate results are not counted",
        "time": cli.TIME_NOT_KNOWN,
    }
    return cli.print_forecast(cli.console(120), lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan, program = make(options)
        if options.dry_run:
            return dry_run(options, plan, program)
        result = run(options, plan, program)
    table = tables.table(("milliseconds per step", "time", "delay hidden"))
    table.add_row("no delay", f"{1e3 * result.no_delay:.2f}", "")
    table.add_row(
        f"delay of {1e3 * result.delay:.2f}, in turn", f"{1e3 * result.in_turn:.2f}", "0 %"
    )
    table.add_row("queued", f"{1e3 * result.queued:.2f}", f"{result.hidden_by_queue:.0%}")
    table.add_row("prefetched", f"{1e3 * result.prefetched:.2f}", f"{result.hidden:.0%}")
    console = cli.console(80)
    console.print(table)
    if options.html is not None:
        title = f"How much of a slow input prefetching hides: {plan.task.name}, {plan.model}"
        pages.write_study(options.html, title, PROG, options, printed=console.printed)
    if options.trace is not None:
        cli.write_atomic(options.trace, trace(result.events))
        print(f"timeline: {options.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
