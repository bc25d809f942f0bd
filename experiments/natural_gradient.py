"""Where natural gradients pay: the loss against steps and against time.

    python -m experiments.natural_gradient --problem mnist_autoencoder --scale small

SGD with momentum, Adam, K-FAC, EKFAC and Hessian-free train one network from the same start on the
same batches. Each is tuned on the same number of settings. A run of any of them ends after the
steps of SGD or, except for very short ones, four times its time (`--time-factor`); what is chosen
and shown is the setting with the lowest training loss at the end. Times are those of the steps:
without compilation, without evaluation. `runs/<name>/` then holds

    results.json            settings, final losses of all runs, curves of the chosen ones
    curves.png              training loss over steps and over seconds

Hessian-free takes gradients of four batches a step and curvature of the first one of them, so its
steps use four times the examples of others. It is left out of the convolutional problem on a CPU,
where XLA runs convolutions in a loop many times slower (jax#12868), unless `--methods` names it.

The problems are described in `experiments.training.studies.problems`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cli, timing
from experiments.methods import METHODS
from experiments.reporting import figures
from experiments.reporting import natural_gradient as report
from experiments.runs import folders
from experiments.runs.study import claim_results, write_results
from experiments.training.studies.problems import PROBLEMS, Problem
from experiments.training.studies.tuning import Candidate, Trainer, final_loss, grid, train

PROG = "python -m experiments.natural_gradient"
SCALES = ("small", "full")
# A run of another method than the first may always take this many seconds.
LEAST_SECONDS = 3.0

# The KL clip is what sets the length of nearly all steps; the rate with the momentum of 0.9 adds up
# to 1, the length of a Newton step.
_KFAC: dict[str, Any] = {
    "settings": grid(kl_clip=(0.001, 0.003, 0.01), damping=(0.003, 0.03)),
    "fixed": {"rate": 0.1},
}
CANDIDATES = {
    "sgd": Candidate(
        method=METHODS["sgd"],
        summary="SGD with momentum 0.9; rates for losses of about 1",
        settings=grid(rate=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
        relative_rate=True,
    ),
    "adam": Candidate(
        method=METHODS["adam"],
        summary="Adam",
        settings=grid(rate=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)),
    ),
    "kfac": Candidate(
        method=METHODS["kfac"],
        summary="K-FAC with rate 0.1, momentum 0.9, factors every step, inverses every 10",
        **_KFAC,
    ),
    "ekfac": Candidate(method=METHODS["ekfac"], summary="EKFAC, as K-FAC", **_KFAC),
    "hessian_free": Candidate(
        method=METHODS["hessian_free"],
        summary="Hessian-free, gradients of four batches, curvature of one",
        settings=grid(rate=(0.5, 1.0), damping=(0.1, 1.0, 10.0)),
        fixed={"max_iterations": 250},  # Martens, 2010
        gradient_batches=4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Compare natural-gradient methods with SGD and Adam: loss over steps and over time."""

    problem: str = "digits_mlp"
    """digits_mlp, mnist_autoencoder, cifar10_5k_cnn or shakespeare_transformer."""
    scale: str = "small"
    """small (minutes on two cores) or full (the networks and data of the literature)."""
    methods: str | None = None
    """Separated by commas; the first one sets the target and the time. Default: all that suit."""
    steps: int | None = None
    """Steps per run; default: those of the problem."""
    settings: int | None = None
    """How many of its six settings each method is tuned on; default: all."""
    time_factor: float = 4.0
    """A run may take this many times the time of the median run of the first method."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    seed: int = 0
    """Seed of the initial weights and of the order of the batches."""
    name: str | None = None
    """Name of the run's folder; default: natural-gradient-<problem>-<scale>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


def run(options: Options, problem: Problem, names: Sequence[str]) -> list[dict[str, Any]]:
    """Tunes and compares the methods; one row each.

    Raises:
      ValueError: a method diverged with all of its settings.
    """
    rows: list[dict[str, Any]] = []
    steps, seconds = options.steps or problem.steps, math.inf
    for name in names:
        candidate = CANDIDATES[name]
        trainer = Trainer(candidate, problem)
        settings = candidate.middle(options.settings)
        curves = [train(trainer, setting, steps, seconds, options.seed) for setting in settings]
        finals = [final_loss(curve, steps, seconds) for curve in curves]
        best = int(np.argmin(finals))
        if math.isinf(finals[best]):
            raise ValueError(f"{name} diverged with all of its settings")
        curve = curves[best]
        if not rows:
            # Runs that diverged early say nothing about the time.
            whole = [
                c["seconds"][-1] for c, loss in zip(curves, finals, strict=True) if loss < 1e30
            ]
            seconds = max(options.time_factor * float(np.median(whole)), LEAST_SECONDS)
        rows.append(
            {
                "method": name,
                "summary": candidate.summary,
                "settings": settings,
                "final_losses": [loss if math.isfinite(loss) else None for loss in finals],
                "chosen": settings[best],
                "compile_seconds": trainer.compile_seconds,
                "milliseconds_per_step": 1000 * curve["seconds"][-1] / max(curve["step"][-1], 1),
                "curve": curve,
            }
        )
    target = rows[0]["curve"]["train"][-1]
    for row in rows:
        row["reached"] = report.reached(row["curve"], target)
    return rows


def default_methods(problem: str) -> tuple[str, ...]:
    """All methods that suit the problem on this kind of device."""
    loops = problem != "cifar10_5k_cnn" or jax.default_backend() != "cpu"
    return tuple(name for name in CANDIDATES if name != "hessian_free" or loops)


def resolve(options: Options) -> tuple[Problem, tuple[str, ...]]:
    """Checks the options; returns the problem and the names of the methods.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("problem", options.problem, tuple(PROBLEMS))
    cli.check_known("scale", options.scale, SCALES)
    names = default_methods(options.problem)
    if options.methods is not None:
        names = tuple(dict.fromkeys(name.strip() for name in options.methods.split(",")))
    for name in names:
        cli.check_known("method", name, tuple(CANDIDATES))
    make = PROBLEMS[options.problem]
    return make(options.scale == "full", options.data_dir, options.seed), names


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        problem, names = resolve(options)
    default = f"natural-gradient-{options.problem}-{options.scale}"
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(130)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    title = (
        f"{options.problem}, {options.scale}: {parameters:,} parameters, "
        f"{len(problem.train[1]):,} examples, batches of {problem.batch_size}"
    )
    steps = cli.plural(options.steps or problem.steps, "step")
    with claim_results(folder, PROG, ["curves.png"]):
        console.print(f"{title}, up to {steps} -> {folder}", soft_wrap=True)
        try:
            rows = run(options, problem, names)
        except ValueError as error:
            return cli.fail(error, 1)
        lines = report.conclusion(rows)
        record = {"machine": timing.machine(), "title": title, "conclusion": lines, "methods": rows}
        write_results(folder, PROG, options, record)
        cli.write_atomic(folder / "curves.png", figures.png(report.picture(title, rows)))
    console.print(report.table(rows))
    for line in lines:
        console.print(line)
    console.print(f"picture: {folder / 'curves.png'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
