"""Learning-rate range test: a short training during which the rate rises, and what it suggests.

    python -m experiments.lr_range_test --task digits --method sgd

The rate rises a little at every step, from one that is too low to learn to one that is too high to
stay; the test ends where the loss leaves for good. The suggestion is the rate at which the loss
falls fastest; the rate at which it is lowest is already on the edge, and an upper bound, e.g. for
the peak of a cycle. `runs/<name>/` then holds

    results.json            the settings, the losses and what they suggest, for each seed
    range.png, .svg         the losses over the rates
    report.html             what the tests found, with the picture

The papers, and how the test ends and suggests: `optax_accel.learning_rate_range_test`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import optax_accel as oa
from experiments import cli, data, methods, progress, timing
from experiments.cli import UsageError
from experiments.reporting import figures, pages, tables
from experiments.runs import folders
from experiments.runs.study import check_results, claim_results, write_results
from experiments.training.replicas import Plan, Trainer
from experiments.training.studies import comparison, forecast

PROG = "python -m experiments.lr_range_test"
FILES = (*figures.files("range"), "report.html")
SPACINGS = ("exponential", "linear")
# Without --minimum and --maximum: the factor by which the rates go beyond the method's grid.
MARGIN = 100.0


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Find a learning rate: train for a short time while the rate rises."""

    limits: ClassVar = {"steps": cli.Range(2, 10**6)}

    task: str = "digits"
    """Data set to classify; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own. An unknown name lists all."""
    loss: str = "cross_entropy"
    """Loss: cross_entropy, or mse (half the squared distance to the one-hot label)."""
    method: str = "sgd"
    """Training method; an unknown name lists all."""
    minimum: float | None = None
    """First rate; default: a hundredth of the lowest one of the method's grid."""
    maximum: float | None = None
    """Last rate; default: a hundred times the highest one of the method's grid."""
    spacing: str = "exponential"
    """How the rate rises: exponential (by a factor per step) or linear (as in Smith's paper)."""
    steps: int = 200
    """Steps from the first rate to the last one."""
    batch_size: int = 64
    """Examples per step."""
    curvature_batch_size: int | None = None
    """Examples (fixed per seed) for Hessian-vector products; default: twice the batch size."""
    smoothing: float = 0.9
    """Weight of the past in the average of the losses, in [0, 1); 0.9 averages about 10 steps."""
    stop_factor: float = 4.0
    """The test ends where the averaged loss is this many times its lowest value."""
    seeds: int = 3
    """Tests to make, with other initial weights and batches; the suggestion is the median."""
    name: str | None = None
    """Name of the run's folder; default: lr-range-<task>-<method>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


def resolve(options: Options) -> tuple[Plan, np.ndarray]:
    """Checks the options; returns the plan of the trainings and the rates.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("method", options.method, tuple(methods.METHODS))
    cli.check_known("spacing", options.spacing, SPACINGS)
    grid = methods.METHODS[options.method].learning_rates
    minimum = min(grid) / MARGIN if options.minimum is None else options.minimum
    maximum = max(grid) * MARGIN if options.maximum is None else options.maximum
    if not minimum < maximum:
        raise UsageError(f"--minimum {minimum:g} must be less than --maximum {maximum:g}")
    plan = comparison.plan(
        options.task,
        [options.method],
        data_dir=options.data_dir,
        files=options.files,
        model=options.model,
        loss=options.loss,
        seeds=options.seeds,
        steps=options.steps,
        batch_size=options.batch_size,
        curvature_batch_size=options.curvature_batch_size,
    )
    space = np.geomspace if options.spacing == "exponential" else np.linspace
    return plan, space(minimum, maximum, options.steps)


def run(options: Options, plan: Plan, rates: np.ndarray) -> list[oa.LearningRateCurve]:
    """One range test per seed.

    Raises:
      ValueError: the loss was never finite.
    """
    trainer, (method,) = Trainer(plan), plan.methods
    results = []
    for seed in range(plan.seeds):
        results.append(
            oa.learning_rate_range_test(
                advance,
                trainer.start(method, [(float(rates[0]), seed)]),
                range(plan.steps),
                minimum=float(rates[0]),
                maximum=float(rates[-1]),
                num_steps=plan.steps,
                spacing=options.spacing,
                smoothing=options.smoothing,
                stop_factor=options.stop_factor,
                set_learning_rate=with_rate,
            )
        )
    return results


def advance(runs: Any, step: int) -> tuple[Any, Any]:
    """Makes a step of the runs, which hold their own state."""
    progress.advance()
    return runs, runs.advance(step)


def with_rate(runs: Any, rate: float) -> Any:
    """The same runs, which go on at a learning rate."""
    runs.rates = jnp.asarray(rate, jnp.float32)
    return runs


def median(rates: Sequence[float | None]) -> float | None:
    """The median of the rates that are not None; of an even number in the geometric sense."""
    logs = [math.log(rate) for rate in rates if rate is not None]
    return math.exp(float(np.median(logs))) if logs else None


@figures.styled
def picture(
    options: Options, results: Sequence[oa.LearningRateCurve], suggestion: float | None
) -> Figure:
    """The losses over the rates, with the suggestion."""
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    color = figures.style(options.method)["color"]
    for seed, result in enumerate(results):
        axes.plot(result.rates, result.losses, color=color, linewidth=0.6, alpha=0.3)
        label = "average" if seed == 0 else None
        axes.plot(result.rates, result.smoothed, color=color, linewidth=1.8, label=label)
    lowest = median([result.lowest for result in results])
    marks = [("falls fastest", suggestion, "-"), ("is lowest", lowest, "--")]
    for what, rate, line in marks:
        if rate is not None:
            axes.axvline(rate, color="#D55E00", linestyle=line, label=f"{what}: {rate:.2g}")
    if options.spacing == "exponential":
        axes.set_xscale("log")
    # Where the loss leaves is seen without showing how far it goes.
    least = min(result.smoothed.min() for result in results)
    start = max(result.smoothed[0] for result in results)
    axes.set_ylim(least - 0.1 * (start - least) - 1e-3, start + 0.5 * (start - least) + 1e-3)
    axes.set_xlabel(f"learning rate, rising at every step ({options.spacing})")
    axes.set_ylabel("mini-batch loss")
    axes.set_title(f"Learning-rate range test: {options.method} on {options.task}")
    axes.legend(title="the loss")
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan, rates = resolve(options)
    default = f"lr-range-{data.short_name(options.task, options.data_dir)}-{options.method}"
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(100)
    heading = (
        f"{plan.task.name}, {plan.model}, {options.method}: "
        f"{cli.plural(plan.seeds, 'test')} of up to {cli.plural(plan.steps, 'step')} of "
        f"{cli.plural(plan.batch_size, 'example')}, rates {rates[0]:g} to {rates[-1]:g} -> "
        f"{folder}"
    )
    if options.dry_run:
        check_results(folder, PROG, FILES)
        with progress.show(console, "lr_range_test"):
            speed = forecast.of_runs(Trainer(plan), plan.methods[0], [(float(rates[0]), 0)])
        seconds = speed.seconds(plan.steps, 0, plan.seeds)
        lines = {
            "plan": heading,
            "runs": f"{plan.seeds}",
            **forecast.of_shapes(plan.task, plan.model, plan.batch_size),
            "time": f"at most about {cli.duration(seconds)}: {speed.source()}",
        }
        return cli.print_forecast(console, lines)
    with claim_results(folder, PROG, FILES):
        console.print(heading, soft_wrap=True)
        try:
            with progress.show(console, "lr_range_test", plan.seeds * plan.steps):
                results = run(options, plan, rates)
        except ValueError as error:
            return cli.fail(error, 1)
        suggestion = median([result.suggestion for result in results])
        tests = [
            {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in result._asdict().items()
            }
            for result in results
        ]
        record = {"machine": timing.machine(), "suggestion": suggestion, "tests": tests}
        write_results(folder, PROG, options, record)
        pictures = figures.write(folder, "range", picture(options, results, suggestion))
        tell(results, suggestion, console)
        pages.write_study(
            folder / "report.html",
            f"Learning-rate range test: {options.method} on {options.task}",
            PROG,
            options,
            printed=console.printed,
            pictures={"The loss while the learning rate rises": pictures["range.svg"]},
        )
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


def tell(
    results: Sequence[oa.LearningRateCurve], suggestion: float | None, console: Console
) -> None:
    """Prints what the tests found."""
    view = tables.table(["seed", "falls fastest at", "lowest at", "a tenth of that", "left at"])
    for seed, result in enumerate(results):
        cells = (result.suggestion, result.lowest, result.lowest / 10, result.stopped_at)
        view.add_row(str(seed), *("never" if cell is None else f"{cell:.2g}" for cell in cells))
    console.print(view)
    if suggestion is None:
        console.print(
            "the loss never falls: lower --minimum, raise --maximum, or give more --steps"
        )
    else:
        console.print(f"suggested learning rate: {suggestion:.2g}, where the loss falls fastest")
    if all(result.stopped_at is None for result in results):
        console.print("the loss never left: a higher --maximum may show more")


if __name__ == "__main__":
    sys.exit(main())
