"""Time the eigensolvers of this library beside SciPy's, matfree's and JAX's, in one run.

    python -m experiments.solvers --task mnist5k

One matrix, the Hessian of the loss over the whole training set after some steps of SGD; one
accuracy, a relative error of `--tolerance` in each of the `--k` largest eigenvalues; the same
linearized product and the same random starts for all. Each solver runs at its cheapest setting that
reached the accuracy from every start. These settings were found beforehand with the help of a
reference that a user does not have; only the rows marked "own stop" decide by themselves when to
stop. Every solver runs once per round, so that a busy moment of the machine hits all of them.

A second table compares the spectral density with matfree's stochastic Lanczos quadrature, from the
same probes, with as many products.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from rich.console import Console

from experiments import cli, data, progress, timing
from experiments.reporting import pages
from experiments.reporting import solvers as report
from experiments.runs import folders
from experiments.runs.records import to_csv
from experiments.runs.study import check_results, claim_results, write_results
from experiments.training.studies import densities, eigensolvers, forecast, hessians
from optax_accel.curvature import blocks

PROG = "python -m experiments.solvers"
FILES = ("results.csv", "report.html")


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Time the eigensolvers of this library beside SciPy's, matfree's and JAX's."""

    limits: ClassVar = {
        "steps": cli.Range(hessians.WARM_STEPS, 10**6),
        "rounds": cli.Range(1, 1_000),
        "k": cli.Range(1, 50),  # all of which every solver has to find within `MAX_PRODUCTS`
    }

    task: str = "mnist5k"
    """Data set: mnist5k, cifar10_5k, digits, ...; its default model is used."""
    data_dir: Path | None = None
    """Folder with the data sets; default: the environment variable OPTAX_ACCEL_DATA."""
    k: int = 10
    """Eigenpairs to find."""
    tolerance: float = 1e-4
    """Relative error of each eigenvalue."""
    rounds: int = 5
    """Rounds; each has its own start vector and runs every solver once."""
    steps: int = 300
    """Steps of SGD before (batch 50, rate 0.1, mean squared error)."""
    examples: int | None = None
    """Training examples to use; default: all."""
    chunk: int = 1000
    """Examples multiplied at a time."""
    budget_seconds: float = 60.0
    """Solvers whose predicted time for one run is longer are not run."""
    seed: int = 0
    """Seed of the model and the batches."""
    runs_dir: Path = Path("runs")
    """Folder in which the folder with results.json, results.csv and report.html is made."""
    name: str | None = None
    """Name of that folder; default: solvers-TASK."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Makes the matrix, finds the settings, times the solvers and prints the table.

    Args:
      options: the command's options.
      console: where the table is printed.

    Returns:
      The results as plain JSON.
    """
    task = data.load_classification(options.task, data_dir=options.data_dir, **options.files)
    progress.tell(f"{options.steps} steps of SGD")
    hessian = hessians.trained_hessian(
        task,
        k=options.k,
        steps=options.steps,
        examples=options.examples,
        chunk=options.chunk,
        tolerance=options.tolerance,
        seed=options.seed,
    )
    flat, unravel = ravel_pytree(hessian.params)
    size = len(flat)
    starts = [blocks.random(jax.random.key(100 + i), hessian.params) for i in range(options.rounds)]
    seconds = [timing.timed(lambda: hessian.product(hessian.gradient))[1] for _ in range(5)]
    product_seconds = float(np.median(seconds))
    console.print(
        f"{options.task}, {task.default_model}, {size:,} parameters, Hessian over "
        f"{hessian.num_examples:,} examples after {options.steps} steps; "
        f"{options.k} largest eigenvalues to {options.tolerance:g}; one product "
        f"{1000 * product_seconds:.1f} ms; jax {jax.__version__}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0:.1f}"
    )
    progress.tell("ARPACK's eigenvalues, the reference")
    exact = hessians.arpack(
        lambda vector: hessians.ravel(hessian.product(unravel(vector))),
        size,
        options.k,
        ncv=min(3 * options.k + 10, size),
        tol=1e-6,
        v0=np.asarray(hessians.ravel(starts[0])),
    ).eigenvalues
    penalty = eigensolvers.loop_penalty(hessian)
    search = eigensolvers.Search(
        hessian=hessian,
        exact=exact,
        starts=starts,
        loop_seconds=penalty * product_seconds,
        tolerance=options.tolerance,
        budget_seconds=options.budget_seconds,
    )
    rows = eigensolvers.measure(eigensolvers.find_tools(search), search)
    console.print()
    console.print(report.table(rows, 1000 * product_seconds))
    console.print(
        f"\nMedians (quartiles) of {options.rounds} interleaved rounds, compilation apart; CPU is "
        "the median ratio of processor times, which a busy machine disturbs least. Every "
        "setting is the cheapest that was accurate from every start, found with the reference; "
        "“own stop” rows decide without it. The reference is ARPACK's, to a residual of 1e-6. A "
        "product inside a compiled loop takes "
        f"{penalty:.1f} times as long as outside. The gradient that one row starts from and the "
        "eigenvectors that another does are not counted."
    )
    spectra = densities.measure(search)
    console.print()
    console.print(report.density_table(spectra))
    console.print(
        f"\nThe spectral density from {densities.NUM_PROBES} probes of {densities.NUM_STEPS} "
        "products, the same for all; the error is the mean distance from the density of "
        f"{densities.REFERENCE_PROBES} other probes, between 0 and 2."
    )
    return {
        "parameters": size,
        "product_milliseconds": 1000 * product_seconds,
        "loop_penalty": penalty,
        "eigenvalues": exact.tolist(),
        "solvers": rows,
        "densities": spectra,
    }


def dry_run(options: Options, folder: Path, console: Console) -> int:
    """Prints what the study would take; returns the exit code."""
    task = data.load_classification(options.task, data_dir=options.data_dir, **options.files)
    lines = {
        "plan": f"{options.task}, {task.default_model}: {options.k} eigenvalues to "
        f"{options.tolerance:g} after {options.steps} steps of SGD -> {folder}",
        "runs": f"{cli.plural(options.rounds, 'round')} of every solver",
        **forecast.of_shapes(task, task.default_model, options.chunk),
        "time": f"{cli.TIME_NOT_KNOWN}; a solver whose single run would take more than "
        f"{options.budget_seconds:g} s is left out",
    }
    return cli.print_forecast(console, lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    console = cli.console(120)
    try:
        data.check_classification(options.task)
        folder = folders.locate(
            options.runs_dir,
            options.name,
            f"solvers-{data.short_name(options.task, options.data_dir)}",
        )
        if options.dry_run:
            check_results(folder, PROG, FILES)
            return dry_run(options, folder, console)
        with claim_results(folder, PROG, FILES):
            with progress.show(console, "solvers"):
                results = run(options, console)
            write_results(folder, PROG, options, results)
            cli.write_atomic(folder / "results.csv", to_csv(report.medians(results["solvers"])))
            title = f"Eigensolvers on the Hessian of {options.task}"
            pages.write_study(folder / "report.html", title, PROG, options, printed=console.printed)
    except data.DataError as error:
        return cli.fail(error)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
