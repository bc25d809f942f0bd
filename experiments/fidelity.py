"""Hold every method against other programs: the same trajectory as the authors'.

    python -m experiments.fidelity
    python -m experiments.fidelity --methods qhm,adabound

Each method of the catalogue takes the steps of its reference in float64: a recorded run of the
authors' code or of another library, or a calculation in NumPy from the paper's formula. A row says
how far the parameters are apart at most; a method without a reference has a row that says so.
`evidence/fidelity.json` keeps the rows of the whole catalogue, from which the documentation has its
page. The exit code is 1 if a row fails.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments import cli, progress
from experiments.methods import METHODS, Method
from experiments.methods.references import Problem, Reference, recorded, references
from experiments.reporting import tables
from experiments.runs import ledger
from experiments.runs.records import read_json, versions

PROG = "python -m experiments.fidelity"
FILE = "fidelity.json"
_HEAD = """# The same trajectory

What `python -m experiments.fidelity` found: each method takes the steps of a reference in float64,
and a row says how far a parameter is away at most. The reference is a recorded run of the authors'
code or of another library, or a calculation in NumPy from the paper's formula.
"""
_RECORDED = """## How the recorded runs were made

`experiments/methods/references.json` holds the numbers. Each run starts at the `start` that stands
there and is given the gradient c x + noise cos(t + i), coordinate by coordinate with i = 0, 1, ...,
in steps t = 0, 1, ...; the parameters after the named steps were kept. Nothing is random, so there
are no seeds. The authors' code was not changed and is not part of this project.
"""


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Hold every method against other programs: the same trajectory as the authors'."""

    methods: str | None = None
    """Methods, separated by commas; default: the whole catalogue."""
    evidence_dir: Path = ledger.FOLDER
    """Where fidelity.json is written, when the whole catalogue was run."""


def objective(problem: Problem, step: Any) -> Callable[[jax.Array], jax.Array]:
    """The function of a column of weights whose gradient a step takes."""
    curvatures = jnp.asarray(problem.curvatures)
    slope = problem.noise * jnp.cos(step + jnp.arange(len(problem.start)))
    return lambda x: 0.5 * jnp.sum(curvatures * x[:, 0] ** 2) + jnp.sum(slope * x[:, 0])


def trajectory(method: Method, reference: Reference) -> np.ndarray:
    """The parameters after each step of the reference, (steps, coordinates), in float64.

    Args:
      method: an entry of the catalogue.
      reference: what says where it starts, how and how long it runs.

    Returns:
      The parameters.
    """
    with jax.enable_x64(True):
        tx = method.build(
            reference.learning_rate,
            total_steps=reference.total_steps,
            num_classes=1,
            **reference.settings,
        )

        def one(carry: Any, step: jax.Array) -> Any:
            x, state = carry
            value_fn = objective(reference.problem, step)
            value, grads = jax.value_and_grad(value_fn)(x)
            updates, state = tx.update(grads, state, x, value=value, grad=grads, value_fn=value_fn)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        x = jnp.asarray(reference.problem.start, jnp.float64)[:, None]
        _, iterates = jax.lax.scan(one, (x, tx.init(x)), jnp.arange(reference.steps))
        return np.asarray(iterates)[..., 0]


def compare(method: Method, reference: Reference) -> dict[str, Any]:
    """The row of a method and one of its references.

    Args:
      method: an entry of the catalogue.
      reference: a run that it should repeat.

    Returns:
      The row, as plain JSON.
    """
    iterates = trajectory(method, reference)
    differences = [
        np.max(np.abs(iterates[step - 1] - np.asarray(x))) for step, x in reference.iterates.items()
    ]
    difference = float(np.max(differences))
    return {
        "method": method.name,
        "reference": reference.kind,
        "source": reference.source,
        "steps": reference.steps,
        "difference": difference if math.isfinite(difference) else None,
        "tolerance": reference.tolerance,
        # Not "greater": a difference that is not a number fails.
        "passed": bool(difference <= reference.tolerance),
    }


def rows(methods: Sequence[Method], console: Console) -> list[dict[str, Any]]:
    """One row for each reference of each method; one that says "none" where there is none."""
    found = []
    with progress.show(console, "fidelity"):
        for method in progress.each(methods, lambda method: method.name):
            known = references(method.name)
            found += [compare(method, reference) for reference in known]
            if not known:
                empty = dict.fromkeys(("steps", "difference", "tolerance", "passed"))
                found.append({"method": method.name, "reference": "none", "source": "", **empty})
    return found


def _in_words(difference: float | None) -> str:
    return "not finite" if difference is None else f"{difference:.1e}"


def show(found: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the rows as a table."""
    view = tables.table(
        ["method", "reference", "source", "steps", "difference", "tolerance", ""], left=3, wrap=True
    )
    for row in found:
        numbers = ("", "", "")
        if row["passed"] is not None:
            numbers = (str(row["steps"]), _in_words(row["difference"]), f"{row['tolerance']:.0e}")
        verdict = {None: "", True: "pass", False: "FAIL"}[row["passed"]]
        view.add_row(row["method"], row["reference"], row["source"], *numbers, verdict)
    console.print(view)


def page(path: Path) -> str:
    """The page of the documentation, as Markdown.

    Args:
      path: the file that the command wrote; it need not exist.

    Returns:
      A table of all rows, and a line with the methods that have no reference.
    """
    parts = [_HEAD]
    if not path.exists():
        return _HEAD + "\nNo run is recorded yet.\n"
    found = read_json(path)["rows"]
    parts.append(
        "| method | reference | steps | largest difference | tolerance | |\n"
        "|---|---|---|---|---|---|"
    )
    parts += [
        f"| `{row['method']}` | {row['reference']}: {row['source']} | {row['steps']} | "
        f"{_in_words(row['difference'])} | {row['tolerance']:.0e} | "
        f"{'pass' if row['passed'] else '**fails**'} |"
        for row in found
        if row["passed"] is not None
    ]
    names = [f"`{row['method']}`" for row in found if row["passed"] is None]
    parts.append(
        f"\nWithout a recorded run: {', '.join(names)}. Their tests hold them against dense "
        "matrices, limit cases or simulations.\n"
    )
    return "\n".join([*parts, recordings()])


def recordings() -> str:
    """How each recorded number was made, as a section of the page."""
    lines = [
        _RECORDED,
        "| method | package | call, or formula with gradient g | steps | computed |",
        "|---|---|---|---|---|",
    ]
    for name, runs in recorded().items():
        lines += [
            f"| `{name}` | {run.made_by['package']} | `{run.made_by['call']}` | {run.steps} | "
            f"{run.made_by['how']} |"
            for run in runs
        ]
    return "\n".join(lines) + "\n"


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    names = list(METHODS)
    if options.methods is not None:
        names = [name.strip() for name in options.methods.split(",")]
        for name in names:
            cli.check_known("method", name, list(METHODS))
    console = cli.console(130)
    found = rows([METHODS[name] for name in dict.fromkeys(names)], console)
    show(found, console)
    held = [row for row in found if row["passed"] is not None]
    failed = [row["method"] for row in held if not row["passed"]]
    covered = len({row["method"] for row in held})
    console.print(
        f"{covered} of {cli.plural(len(set(names)), 'method')} held against a reference; "
        + (f"{', '.join(failed)} FAIL" if failed else "all of them pass"),
        soft_wrap=True,
    )
    if options.methods is None:
        options.evidence_dir.mkdir(parents=True, exist_ok=True)
        record = {"command": PROG, "versions": versions(), "rows": found}
        cli.write_atomic(options.evidence_dir / FILE, cli.to_json(record))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
