"""The loss around trained parameters: slices along sharp, flat, random and trained directions.

    python -m experiments.landscape --task digits --method sgd
    python -m experiments.landscape --run runs/train-digits-adam-0

It trains a model, or takes a run of `experiments.train` with its checkpoints, and evaluates the
loss of training examples along lines and on planes through the parameters: along eigenvectors of
the Hessian's largest eigenvalues (dominant), along a random vector outside of their space (bulk),
along random vectors whose filters have the norms of the network's (random), and along the principal
components of what training went through (trajectory). All directions have the length of the
network's weights. The curvature of each line is held against d^T H d from derivatives: the two
agree where the loss is smooth; kinks of ReLU and max pooling bend a line without any H.

The loss is that of the training, in training mode: batch normalization uses the examples' own
statistics, and masks of dropout are the same everywhere. `runs/<name>/` then holds

    results.json              the settings, all losses and curvatures
    lines.png, planes.png     the slices; also as .svg
    report.html               one page without any other file, whose slices can be read and cut

Papers: Li et al., "Visualizing the loss landscape of neural nets" (arXiv 1712.09913), sections 4
and 7. Song et al., "Does SGD really happen in tiny subspaces?" (arXiv 2405.16002).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from experiments import cli, data, methods, progress, timing
from experiments.cli import UsageError
from experiments.reporting import figures, pages
from experiments.reporting import landscape as report
from experiments.runs import folders
from experiments.runs.study import check_results, claim_results, write_results
from experiments.training.replicas import Plan, tree_bytes
from experiments.training.studies import comparison, forecast, landscape, landscape_points
from experiments.training.studies.landscape import Point

PROG = "python -m experiments.landscape"
FILES = (*figures.files("lines", "planes"), "report.html")
# What `--run` decides, so that no other value can be given.
OF_THE_RUN = ("task", "model", "loss", "method", "learning_rate", "steps", "batch_size")


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Draw the loss around trained parameters along directions that mean something."""

    limits: ClassVar = {"steps": cli.Range(2, 10**6), "resolution": cli.Range(3, 1_001)}

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
    learning_rate: float | None = None
    """Learning rate; default: the middle of the method's grid."""
    steps: int = 400
    """Steps of the training."""
    batch_size: int = 64
    """Examples per step."""
    seed: int = 0
    """Seed of the weights, the batches and the random directions."""
    run: Path | None = None
    """Folder of a run of experiments.train, instead of a training: the path goes through its
    checkpoints (train --keep 20 keeps more of them)."""
    slices: str | None = None
    """Directions, separated by commas: any of dominant, bulk, random, trajectory; default: all."""
    examples: int | None = None
    """Training examples whose loss is drawn; default: all of them, at most 2000."""
    reach: float = 0.5
    """How far slices go both ways, in units of the length of the network's weights."""
    resolution: int = 31
    """Points along each axis; an odd number, so that the parameters are one of them."""
    name: str | None = None
    """Name of the folder for results; default: landscape, task, model and method."""
    runs_dir: Path = Path("runs")
    """Folder in which that folder is made."""


def kinds_of(options: Options) -> list[str]:
    """Checks the options by themselves; returns the kinds of directions.

    Raises:
      UsageError: with one line that says what is allowed.
    """
    options.check()
    if options.resolution % 2 == 0:
        raise UsageError(
            f"--resolution must be odd, so that the parameters are on the grid, got "
            f"{options.resolution}"
        )
    kinds = list(landscape.KINDS)
    if options.slices is not None:
        kinds = [kind.strip() for kind in options.slices.split(",")]
    for kind in kinds:
        cli.check_known("slice", kind, landscape.KINDS)
    if options.run is not None:
        for name in OF_THE_RUN:
            if getattr(options, name) != getattr(Options, name):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} is decided by the run in --run; leave out one of them")
    return list(dict.fromkeys(kinds))


def resolve(options: Options) -> tuple[Plan, float]:
    """Checks the options of a training; returns its plan and the learning rate.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    cli.check_known("method", options.method, tuple(methods.METHODS))
    grid = methods.METHODS[options.method].learning_rates
    plan = comparison.plan(
        options.task,
        [options.method],
        data_dir=options.data_dir,
        files=options.files,
        model=options.model,
        loss=options.loss,
        seeds=1,
        steps=options.steps,
        batch_size=options.batch_size,
    )
    landscape_points.check_examples(options.examples, plan.task.train)
    rate = options.learning_rate or sorted(grid)[len(grid) // 2]
    return dataclasses.replace(plan, first_seed=options.seed), rate


def default_name(options: Options) -> str:
    """The name of the folder where nobody gives one."""
    if options.run is not None:
        return f"landscape-{options.run.resolve().name}"
    task = data.short_name(options.task, options.data_dir)
    model = f"-{options.model}" if options.model else ""
    return f"landscape-{task}{model}-{options.method}"


def find_point(options: Options, kinds: list[str]) -> Point | None:
    """The point of the run that `--run` names; None where a model is to be trained.

    Args:
      options: the options.
      kinds: kinds of directions; `trajectory` is taken out where nobody asked for it and the run
        has too few checkpoints.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    if options.run is None:
        return None
    point = landscape_points.load(options.run, options.data_dir, options.examples)
    if "trajectory" in kinds and len(point.steps) < landscape.LEAST_POINTS:
        if options.slices is not None:
            raise UsageError(
                f"--slices trajectory needs {landscape.LEAST_POINTS} checkpoints, {options.run} "
                f"has {len(point.steps)}; leave it out, or train with a higher --keep"
            )
        kinds.remove("trajectory")
    return point


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    kinds = kinds_of(options)
    with cli.usage():
        point = find_point(options, kinds)
        training = resolve(options) if point is None else None
    folder = folders.locate(options.runs_dir, options.name, default_name(options))
    console = cli.console(110)
    if options.dry_run:
        check_results(folder, PROG, FILES)
        return cli.print_forecast(console, dry_run(options, kinds, point, training, folder))
    with claim_results(folder, PROG, FILES):
        try:
            with progress.show(console, "landscape"):
                if training is not None:
                    point = landscape_points.train(*training, options.examples)
                assert point is not None
                slices = landscape.measure(
                    point,
                    kinds,
                    reach=options.reach,
                    resolution=options.resolution,
                    seed=options.seed,
                )
        except ValueError as error:
            return cli.fail(error, 1)
        record = {"title": point.title, **slices}
        report.tell(record, console)
        write_results(folder, PROG, options, {"machine": timing.machine(), **record})
        write_pictures(folder, record)
        pages.write_study(
            folder / "report.html",
            f"The loss around {record['title']}",
            PROG,
            options,
            printed=console.printed,
            template="landscape.html",
            landscape=report.for_page(record),
        )
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


def write_pictures(folder: Path, record: dict[str, Any]) -> None:
    """Writes the pictures; removes those of planes that an earlier landscape had there."""
    figures.write(folder, "lines", report.draw_lines(record))
    if record["planes"]:
        figures.write(folder, "planes", report.draw_planes(record))
    else:
        for file in figures.files("planes"):
            (folder / file).unlink(missing_ok=True)


def dry_run(
    options: Options,
    kinds: Sequence[str],
    point: Point | None,
    training: tuple[Plan, float] | None,
    folder: Path,
) -> dict[str, str]:
    """What the command would do and take, by what the line is about."""
    number = landscape.evaluations(kinds, options.resolution)
    lines = {"plan": f"{', '.join(kinds)}: {number:,} evaluations of the loss -> {folder}"}
    if training is not None:
        plan, rate = training
        lines["runs"] = (
            f"1 of {plan.methods[0].name} at learning rate {rate:g}, "
            f"{cli.plural(plan.steps, 'step')}"
        )
        shapes = forecast.of_shapes(plan.task, plan.model, plan.batch_size)
    else:
        assert point is not None
        lines["runs"] = f"none: {point.title}"
        shapes = {
            "parameters": f"{forecast.parameters(point.params):,}",
            "memory": f"parameters {forecast.size(tree_bytes(point.params))}, intermediate "
            "results are not counted",
        }
    return {**lines, **shapes, "time": cli.TIME_NOT_KNOWN}


if __name__ == "__main__":
    sys.exit(main())
