"""Where natural gradients pay: the loss against steps and against time.

    python -m experiments.natural_gradient --problem mnist_autoencoder --scale small

SGD with momentum, Adam, Muon, schedule-free AdamW, K-FAC, EKFAC, Hessian-free and Gauss-Newton in
batch space train one network from the same start on the same batches; kfac-jax joins the comparison
on the digits and the autoencoder where it is installed, schedule-free SGD, Prodigy, AdEMAMix, ADOPT
and Lion where `--methods` names them. Each is tuned on the same number of settings, with one seed.
A run of any of them ends after the steps of SGD or, except for very short ones, four times its time
(`--time-factor`); what is chosen is the setting with the lowest training loss at the end. It is run
again with other seeds (`--seeds`), which change the initial weights and the order of the batches,
the same for all methods; medians and ranges over all seeds are shown. The target is the loss that
SGD gets to with every seed. Times are those of the steps: without compilation, without evaluation.
Beside them stands what the steps were worth in gradients of one batch: a product with a Gauss-
Newton matrix, or an iteration of conjugate gradients, counts as two, a loss as a third, K-FAC's
factors as one. `runs/<name>/` then holds

    results.json            settings, final losses of all runs, curves of the chosen ones
    curves.png, .svg        training loss over steps and over seconds
    report.html             the table, the conclusions and the picture

Hessian-free takes gradients of four batches a step and curvature of the first one of them, so its
steps use four times the examples of others. The methods that iterate in the compiled step are left
out of the convolutional problem on a CPU, where XLA runs convolutions in a loop many times slower
(jax#12868), unless `--methods` names them.

The problems are described in `experiments.training.studies.problems`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import optax_accel as oa
from experiments import cli, progress, timing
from experiments.methods import METHODS
from experiments.reporting import figures, pages
from experiments.reporting import natural_gradient as report
from experiments.runs import folders
from experiments.runs.study import check_results, claim_results, write_results
from experiments.training.studies import forecast, kfac_jax_rival
from experiments.training.studies.problems import PROBLEMS, Problem
from experiments.training.studies.tuning import Candidate, Trainer, final_loss, grid, train

PROG = "python -m experiments.natural_gradient"
SCALES = ("small", "full")
FILES = (*figures.files("curves"), "report.html")
# A run of another method than the first may always take this many seconds.
LEAST_SECONDS = 3.0

HESSIAN_FREE_BATCHES = 4

# The KL clip is what sets the length of nearly all steps; the rate with the momentum of 0.9 adds up
# to 1, the length of a Newton step.
_KFAC: dict[str, Any] = {
    "settings": grid(kl_clip=(0.001, 0.003, 0.01), damping=(0.003, 0.03)),
    "fixed": {"rate": 0.1},
}
_ADAM_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
# Further rivals, which run where `--methods` names them: six rates around their own.
_RIVALS: dict[str, tuple[float, ...]] = {
    "schedule_free_sgd": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "prodigy": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "ademamix": _ADAM_RATES,
    "adopt": _ADAM_RATES,
    "lion": (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01),
}


def adaptive_kfac(
    learning_rate: Any, objective: Any, *, damping: Any = 1.0, minimum: Any = 1e-3, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with damping that adapts, rate (times a number) and momentum from the model."""
    del learning_rate
    rule = oa.LevenbergMarquardt(damping, minimum=minimum)
    return oa.kfac("exact", objective, momentum="exact", damping=rule, **settings)


KFAC_ADAPTIVE = dataclasses.replace(
    METHODS["kfac"],
    name="kfac_adaptive",
    summary="K-FAC, rate and momentum of the quadratic model, damping that adapts",
    factory=functools.partial(adaptive_kfac, inverses_every=5),
    period=5,
)


def adaptive_gauss_newton(
    learning_rate: Any, *, minimum: Any = 1e-2, tolerance: float = 1e-2, likelihood: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton in batch space with damping that adapts, down to a minimum."""
    rule = oa.LevenbergMarquardt(0.3, minimum=minimum)
    return oa.batch_gauss_newton(
        learning_rate, damping=rule, tolerance=tolerance, max_iterations=250, likelihood=likelihood
    )


def _iterations(opt_state: Any) -> float:
    """What a step of Hessian-free is worth in gradients of one batch."""
    made, windows = int(optax.tree.get(opt_state, "num_iterations")), 0
    total = 0
    while total < made:  # each window of CG takes two products more
        total, windows = total + max(10, total // 2), windows + 1
    losses = 2 * HESSIAN_FREE_BATCHES / 3
    return HESSIAN_FREE_BATCHES + losses + 2 * (1 + made + 2 * windows)


def _batch_iterations(opt_state: Any) -> float:
    """What a step of Gauss-Newton in batch space is worth, its adaption every 5 steps included."""
    return 1 + 5 + 2 * int(optax.tree.get(opt_state, "solver_iterations")) + (2 + 2 / 3) / 5


CANDIDATES = {
    "sgd": Candidate(
        method=METHODS["sgd"],
        summary="SGD with momentum 0.9; rates for losses of about 1",
        settings=grid(rate=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
        relative_rate=True,
    ),
    "adam": Candidate(method=METHODS["adam"], summary="Adam", settings=grid(rate=_ADAM_RATES)),
    "muon": Candidate(
        method=METHODS["muon"],
        summary="Muon, with steps as long as Adam's, Adam for vectors, embeddings and the head",
        settings=grid(rate=_ADAM_RATES),
    ),
    "schedule_free_adamw": Candidate(
        method=METHODS["schedule_free_adamw"],
        summary="schedule-free AdamW without warm-up, evaluated at its average",
        settings=grid(rate=_ADAM_RATES),
        fixed={"warmup_steps": None},
    ),
    "kfac": Candidate(
        method=METHODS["kfac"],
        summary="K-FAC with rate 0.1, momentum 0.9, factors every step, inverses every 10",
        **_KFAC,
    ),
    "kfac_adaptive": Candidate(
        method=KFAC_ADAPTIVE,
        summary="K-FAC, rate and momentum of the quadratic model, damping adapted every 5 steps",
        settings=grid(damping=(0.1, 1.0, 10.0), minimum=(1e-3, 3e-2)),
        fixed={"rate": 1.0},
        # Its gradient and factors, two products, and every 5 steps two losses.
        gradients=lambda opt_state: 2 + 4 + 2 / 3 / 5,
    ),
    "ekfac": Candidate(method=METHODS["ekfac"], summary="EKFAC, as K-FAC", **_KFAC),
    "kfac_jax": Candidate(method=METHODS["kfac"], summary="kfac-jax, as K-FAC", **_KFAC),
    "hessian_free": Candidate(
        method=METHODS["hessian_free"],
        summary="Hessian-free, gradients of four batches, curvature of one",
        settings=grid(rate=(0.5, 1.0), damping=(0.1, 1.0, 10.0)),
        fixed={"max_iterations": 250},  # Martens, 2010
        gradient_batches=HESSIAN_FREE_BATCHES,
        gradients=_iterations,
    ),
    "batch_gauss_newton": Candidate(
        method=dataclasses.replace(METHODS["batch_gauss_newton"], factory=adaptive_gauss_newton),
        summary="Gauss-Newton in batch space by CG, damping adapted every 5 steps",
        settings=grid(rate=(0.3, 1.0), minimum=(1e-3, 1e-2, 1e-1)),
        gradients=_batch_iterations,
    ),
    **{
        name: Candidate(
            method=METHODS[name], summary=METHODS[name].summary, settings=grid(rate=rates)
        )
        for name, rates in _RIVALS.items()
    },
}
# What kfac-jax is asked to find the layers of.
_FOR_KFAC_JAX = ("digits_mlp", "mnist_autoencoder")


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Compare natural-gradient methods with SGD and Adam, over steps and over time."""

    problem: str = "digits_mlp"
    """digits_mlp, mnist_autoencoder, cifar10_5k_cnn, shakespeare_transformer or
    shakespeare_scanned."""
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
    """Seed of the initial weights and of the order of the batches, with which all are tuned."""
    seeds: int = 3
    """How many seeds, counted from that one, the chosen settings are run with."""
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
    make = PROBLEMS[options.problem]
    starts = {
        seed: make(options.scale == "full", options.data_dir, seed).params
        for seed in range(options.seed + 1, options.seed + options.seeds)
    }
    progress.expect(sum(number_of_runs(options, name) for name in names))
    for name in names:
        candidate = CANDIDATES[name]
        progress.tell(f"{name}: compiling")
        trainer: Any = Trainer(candidate, problem) if name != "kfac_jax" else rival(problem)
        settings = candidate.middle(options.settings)
        curves = []
        for setting in settings:
            values = ", ".join(f"{key} {value:g}" for key, value in setting.items())
            progress.tell(f"{name}: {values}")
            curves.append(train(trainer, setting, steps, seconds, options.seed))
            progress.advance()
        finals = [final_loss(curve, steps, seconds) for curve in curves]
        best = int(np.argmin(finals))
        if math.isinf(finals[best]):
            raise ValueError(f"{name} diverged with all of its settings")
        if not rows:
            # Runs that diverged early say nothing about the time.
            whole = [
                c["seconds"][-1] for c, loss in zip(curves, finals, strict=True) if loss < 1e30
            ]
            seconds = max(options.time_factor * float(np.median(whole)), LEAST_SECONDS)
        chosen = [curves[best]]
        for seed, params in starts.items():
            progress.tell(f"{name}: seed {seed}")
            chosen.append(train(trainer, settings[best], steps, seconds, seed, params))
            progress.advance()
        curve = chosen[0]
        rows.append(
            {
                "method": name,
                "summary": candidate.summary,
                "settings": settings,
                "final_losses": [loss if math.isfinite(loss) else None for loss in finals],
                "chosen": settings[best],
                "compile_seconds": trainer.compile_seconds,
                "milliseconds_per_step": 1000 * curve["seconds"][-1] / max(curve["step"][-1], 1),
                "curves": chosen,
            }
        )
    target = report.target(rows)
    for row in rows:
        row["reached"] = [report.reached(curve, target) for curve in row["curves"]]
    return rows


def number_of_runs(options: Options, name: str) -> int:
    """How often a method is trained: with each of its settings, then with the other seeds."""
    return len(CANDIDATES[name].middle(options.settings)) + options.seeds - 1


def rival(problem: Problem) -> kfac_jax_rival.KFACJaxTrainer:
    """Runs of kfac-jax."""
    return kfac_jax_rival.KFACJaxTrainer(CANDIDATES["kfac_jax"], problem)


def default_methods(problem: str) -> tuple[str, ...]:
    """The methods that suit the problem on this kind of device and are installed, but `_RIVALS`."""
    left_out = set(_RIVALS)
    if problem == "cifar10_5k_cnn" and jax.default_backend() == "cpu":
        left_out |= {"hessian_free", "batch_gauss_newton"}
    if problem not in _FOR_KFAC_JAX or not kfac_jax_rival.installed():
        left_out.add("kfac_jax")
    return tuple(name for name in CANDIDATES if name not in left_out)


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
    if "kfac_jax" in names and not kfac_jax_rival.installed():
        raise ValueError("kfac_jax is not installed: pip install kfac-jax, or leave it out")
    if "kfac_jax" in names and options.problem not in _FOR_KFAC_JAX:
        raise ValueError(f"kfac_jax runs on {' and '.join(_FOR_KFAC_JAX)} only; leave it out")
    make = PROBLEMS[options.problem]
    return make(options.scale == "full", options.data_dir, options.seed), names


def dry_run(
    heading: str, options: Options, problem: Problem, names: Sequence[str], console: Console
) -> int:
    """Prints what the study would take; returns the exit code."""
    first = CANDIDATES[names[0]]
    with progress.show(console, "natural_gradient"):
        progress.tell(f"{names[0]}: compiling and timing steps")
        trainer: Any = Trainer(first, problem) if names[0] != "kfac_jax" else rival(problem)
        steps = 20
        seconds = train(trainer, first.settings[0], steps, math.inf, options.seed)["seconds"][-1]
    whole = seconds / steps * (options.steps or problem.steps)
    runs = [number_of_runs(options, name) for name in names]
    longest = max(options.time_factor * whole, LEAST_SECONDS)
    most = runs[0] * whole + sum(runs[1:]) * longest
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(problem.params))
    batch = sum(array[: problem.batch_size].nbytes for array in problem.train)
    lines = {
        "plan": heading,
        "runs": f"{sum(runs)} of {cli.plural(len(names), 'method')}: {', '.join(names)}",
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(problem.params)):,}",
        "memory": f"parameters {forecast.size(size)}, batch {forecast.size(batch)}, from shapes; "
        "intermediate results are not counted",
        "time": f"at most about {cli.duration(most)} without compilation and evaluations: a run of "
        f"{names[0]} takes {cli.duration(whole)}, measured over {steps} steps after compilation, "
        f"and no other run more than {options.time_factor:g} times that (or {LEAST_SECONDS:g} s)",
    }
    return cli.print_forecast(console, lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        problem, names = resolve(options)
    default = f"natural-gradient-{options.problem}-{options.scale}"
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(170)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    title = (
        f"{options.problem}, {options.scale}: {parameters:,} parameters, "
        f"{len(problem.train[1]):,} examples, batches of {problem.batch_size}"
    )
    steps = cli.plural(options.steps or problem.steps, "step")
    if options.dry_run:
        check_results(folder, PROG, FILES)
        return dry_run(f"{title}, up to {steps} -> {folder}", options, problem, names, console)
    with claim_results(folder, PROG, FILES):
        console.print(f"{title}, up to {steps} -> {folder}", soft_wrap=True)
        try:
            with progress.show(console, "natural_gradient"):
                rows = run(options, problem, names)
        except ValueError as error:
            return cli.fail(error, 1)
        lines = report.conclusion(rows)
        record = {"machine": timing.machine(), "title": title, "conclusion": lines, "methods": rows}
        write_results(folder, PROG, options, record)
        pictures = figures.write(folder, "curves", report.picture(title, rows))
        console.print(report.table(rows))
        for line in lines:
            console.print(line)
        pages.write_study(
            folder / "report.html",
            f"Natural gradients on {options.problem}",
            PROG,
            options,
            printed=console.printed,
            pictures={"Training loss over steps and over time": pictures["curves.svg"]},
        )
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
