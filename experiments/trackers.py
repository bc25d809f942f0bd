"""Trackers of the dominant Hessian subspace: how accurate, at which cost, in one run.

    python -m experiments.trackers --task mnist5k --data-dir data

Plain SGD trains the task's network with the squared error of Song et al., "Does SGD really happen
in tiny subspaces?" (2024). Every tracker follows the same path. At ten checkpoints ARPACK
(`scipy.sparse.linalg.eigsh`, largest algebraic eigenvalues, relative accuracy 1e-6) solves for the
Hessian of the whole training split, and what a Bulk-SGD step would use there is compared with it:

* `chi`: |chi_k of the tracked basis - chi_k of the exact one|, of the gradient of the whole split
  and of the mini-batch;
* `cos2`: mean squared cosine of the two subspaces, |U^T V|^2 / k (Frobenius norm);
* `eigenvalues`: largest relative error.

`used` is the basis that the step at the checkpoint projects with. `before` is the one before that
step's refresh: where a refresh falls on the checkpoint, the oldest that any step projects with.

Then Bulk-SGD steps are timed beside plain SGD steps, both as a user runs them: compiled, buffers
donated, the batch gathered by index, refreshes driven from the host at their usual rhythm, the cold
start left out.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from rich.console import Console
from rich.table import Table

import models
import optax_accel as oa
from experiments import cli, data, timing
from experiments.reporting import tables
from experiments.runs import folders
from experiments.runs.study import claim_results, write_results
from experiments.training import networks

PROG = "python -m experiments.trackers"
LOSS = "mse"
CHECKPOINTS = 10
# What this project asks of its default tracker, after the first checkpoint.
TARGETS = {"chi": 0.01, "cos2": 0.99, "step": 8.0, "against ARPACK": 100.0, "linear algebra": 0.2}
PRODUCT_FREE_STEP = 1.5


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Measure the trackers of the dominant Hessian subspace against ARPACK."""

    limits: ClassVar = {"steps": cli.Range(CHECKPOINTS, 10**6), "repeats": cli.Range(0, 10**6)}
    limits |= {"directions": cli.Range(1, 1_000)}

    task: str = "mnist5k"
    """Data set: a task of images, such as digits, mnist5k, cifar10_5k."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    trackers: str | None = None
    """Trackers, separated by commas; default: all."""
    steps: int = 500
    """Steps of SGD, at least 10."""
    learning_rate: float = 0.01
    """Learning rate of SGD; 0.01 for MNIST in Song et al."""
    batch_size: int = 50
    """Examples in a mini-batch."""
    curvature_batch: int = 500
    """Examples, fixed, for curvature products."""
    directions: int | None = None
    """Dimension of the subspace; default: the number of classes."""
    repeats: int = 20
    """Rounds of the timing; 0: no timing."""
    seed: int = 0
    """Of the weights, the batches and the curvature examples."""
    name: str | None = None
    """Name of the folder for results; default: trackers, task and learning rate."""
    runs_dir: Path = Path("runs")
    """Where that folder is made."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tracker to measure.

    Attributes:
      tracker: the tracker.
      examples: what its refreshes see: the fixed ``"subset"``, the mini-``"batch"`` of the step, or
        the ``"whole"`` training split.
      note: what is special.
    """

    tracker: oa.Tracker
    examples: str
    note: str


ENTRIES: dict[str, Entry] = {
    "block": Entry(oa.BlockTracker(), "subset", "the default"),
    "block_bfloat16": Entry(
        oa.BlockTracker(storage_dtype=jnp.bfloat16), "subset", "basis kept in bfloat16"
    ),
    "block_every_5": Entry(oa.BlockTracker(refresh_every=5), "subset", "refreshed more often"),
    "round_robin": Entry(oa.RoundRobinTracker(), "subset", "one product a step"),
    "gradient": Entry(oa.GradientTracker(), "batch", "gradients of the mean outputs"),
    "gradient_every_10": Entry(
        oa.GradientTracker(refresh_every=10, decay=0.8), "batch", "the same, refreshed more often"
    ),
    "gradient_rows": Entry(
        oa.GradientTracker(rows="gradient", refresh_every=1, decay=0.9),
        "batch",
        "centered mini-batch gradients",
    ),
    "exact": Entry(oa.ExactTracker(), "whole", "refreshed at the checkpoints only"),
}


class Problem:
    """The network, its data and what is compiled for them."""

    def __init__(self, task: data.Task, options: Options):
        self.task, self.options = task, options
        model = models.create(
            task.default_model,
            input_shape=task.input_shape,
            num_classes=task.num_classes,
            rngs=options.seed,
        )
        self.graphdef, self.params, self.rest = networks.split(model)
        self.x, self.y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
        self.k = options.directions or task.num_classes
        _, self.unravel = jax.flatten_util.ravel_pytree(self.params)
        random = np.random.default_rng(options.seed)
        size = len(task.train)
        self.subset = jnp.asarray(random.permutation(size)[: options.curvature_batch])
        rounds = math.ceil((options.steps + 1) * options.batch_size / size) + 1
        order = np.concatenate([random.permutation(size) for _ in range(rounds)])
        shape = (-1, options.batch_size)
        self.batches = jnp.asarray(order[: len(order) // shape[1] * shape[1]].reshape(shape))

    @property
    def dimension(self) -> int:
        """Number of parameters."""
        return int(optax.tree.size(self.params))

    def objective(self, index: Any = None) -> oa.Objective:
        """The training loss on some examples; ``None``: on all."""
        x, y = (self.x, self.y) if index is None else (self.x[index], self.y[index])
        return networks.objective(self.graphdef, LOSS).bind(rest=self.rest, x=x, y=y)

    def index(self, entry: Entry, batch: Any) -> Any:
        """The examples that a refresh sees."""
        return {"subset": self.subset, "batch": batch, "whole": None}[entry.examples]

    @functools.cached_property
    def gradient(self) -> Callable[..., Any]:
        """The compiled gradient: of the parameters and the examples, ``None`` for all."""
        return jax.jit(lambda params, index: self.objective(index).grad(params))

    @functools.cached_property
    def hessian_product(self) -> Callable[..., Any]:
        """The compiled product of the whole split's Hessian with a flat vector."""

        def product(params: Any, vector: Any) -> Any:
            flat = self.objective().hvp(params, self.unravel(vector))
            return jax.flatten_util.ravel_pytree(flat)[0]

        return jax.jit(product)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The exact leading eigenspace at a checkpoint.

    Attributes:
      eigenvalues: ``(k,)``, the largest first.
      vectors: ``(dimension, k)``.
      seconds: that ARPACK took.
      products: that it took.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    seconds: float
    products: int


def arpack(problem: Problem, params: Any) -> Reference:
    """Leading eigenpairs of the Hessian on the whole training split."""
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return np.asarray(problem.hessian_product(params, jnp.asarray(vector.ravel())))

    size = problem.dimension
    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float32)
    product(np.zeros(size, np.float32))  # compiles
    count, begin = 0, time.perf_counter()
    values, vectors = scipy.sparse.linalg.eigsh(
        operator, problem.k, which="LA", tol=1e-6, rng=np.random.default_rng(0)
    )
    order = np.argsort(-values)
    return Reference(values[order], vectors[:, order], time.perf_counter() - begin, count)


def compare(space: Any, reference: Reference, vectors: dict[str, np.ndarray]) -> dict[str, float]:
    """Errors of a tracked eigenspace.

    Args:
      space: the tracked eigenspace.
      reference: the exact one.
      vectors: by name, what the alignment chi_k is taken of.

    Returns:
      ``chi <name>`` for each vector, ``cos2``, ``eigenvalues`` and ``orthogonality``, the largest
      entry of ``|U U^T - I|``.
    """
    basis = np.concatenate(
        [
            np.asarray(leaf.astype(jnp.float32)).reshape(len(leaf), -1)
            for leaf in jax.tree.leaves(space.basis)
        ],
        axis=1,
    )
    exact, values = reference.vectors, np.asarray(space.eigenvalues)
    result = {
        f"chi {name}": abs(np.linalg.norm(basis @ v) - np.linalg.norm(exact.T @ v))
        / np.linalg.norm(v)
        for name, v in vectors.items()
    }
    result["cos2"] = np.linalg.norm(basis @ exact) ** 2 / len(basis)
    result["eigenvalues"] = np.max(np.abs(values / reference.eigenvalues - 1))
    result["orthogonality"] = np.max(np.abs(basis @ basis.T - np.eye(len(basis))))
    return {name: float(value) for name, value in result.items()}


def accuracy(
    problem: Problem, entries: dict[str, Entry], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[Reference]]:
    """Follows SGD with every tracker and compares at the checkpoints.

    Returns:
      One row per checkpoint and tracker, and the references.
    """
    options = problem.options

    def refreshed(
        space: Any, params: Any, gradient: Any, batch: Any, entry: Entry, cold: bool
    ) -> Any:
        objective = problem.objective(problem.index(entry, batch))
        return entry.tracker.refresh(space, objective, params, gradient, cold=cold)

    refresh = jax.jit(refreshed, static_argnames=("entry", "cold"), donate_argnames="space")
    descend = jax.jit(
        lambda params, grads: jax.tree.map(
            lambda p, g: p - options.learning_rate * g, params, grads
        )
    )
    every = options.steps // CHECKPOINTS
    params, rows, references = problem.params, [], []
    spaces = {name: e.tracker.init(params, problem.k) for name, e in entries.items()}
    for step in range(options.steps + 1):
        batch = problem.batches[step]
        gradient = problem.gradient(params, batch)
        checkpoint = step > 0 and step % every == 0
        if checkpoint:
            reference = arpack(problem, params)
            references.append(reference)
            vectors = {
                name: np.asarray(jax.flatten_util.ravel_pytree(vector)[0])
                for name, vector in (
                    ("full", problem.gradient(params, None)),
                    ("batch", gradient),
                )
            }
            say(f"step {step}: ARPACK {reference.seconds:.1f} s, {reference.products} products")
        for name, entry in entries.items():
            solved = entry.examples == "whole"
            due = checkpoint if solved else oa.refresh_at(step, entry.tracker.refresh_every)
            before = None
            if checkpoint and not solved:
                before = compare(spaces[name], reference, vectors)
            if due:
                spaces[name] = refresh(
                    spaces[name], params, gradient, batch, entry=entry, cold=due == "cold" or solved
                )
            if checkpoint:
                used = compare(spaces[name], reference, vectors)
                exact = {
                    f"exact chi {key}": float(
                        np.linalg.norm(reference.vectors.T @ v) / np.linalg.norm(v)
                    )
                    for key, v in vectors.items()
                }
                row = {"tracker": name, "step": step, **exact, **used}
                row |= {f"before {key}": value for key, value in (before or used).items()}
                rows.append(row)
        params = descend(params, gradient)
    return rows, references


def costs(
    problem: Problem, entries: dict[str, Entry], arpack_seconds: float
) -> list[dict[str, Any]]:
    """Times Bulk-SGD steps beside plain SGD steps, and what a refresh is made of.

    Args:
      problem: the network and its data.
      entries: the trackers; those that solve on the whole split are left out.
      arpack_seconds: of one reference solve.

    Returns:
      One row per tracker.
    """
    options = problem.options
    cases = [_step_case(problem, "sgd", None)]
    rows, parts = [], []
    for name, entry in entries.items():
        if entry.examples != "whole":
            cases.append(_step_case(problem, name, entry))
            parts.append(_refresh_parts(problem, entry))
    timed = timing.measure(cases, options.repeats)
    sgd = timed[0]["milliseconds"][1]
    for row, case, (whole, products) in zip(timed[1:], cases[1:], parts, strict=True):
        tracker = entries[row["name"]].tracker
        share = None
        if products is not None:
            shares = [1 - products() / whole() for _ in range(options.repeats)]
            share = float(np.median(shares))
        warm = tracker.num_products(problem.params, problem.k, cold=False)
        rows.append(
            {
                "tracker": row["name"],
                "sgd milliseconds": sgd,
                "milliseconds": row["milliseconds"],
                "ratio": row["ratio"],
                "products per step": warm / tracker.refresh_every,
                "against ARPACK": (1000 * arpack_seconds + sgd) / row["milliseconds"][1],
                "linear algebra": share,
                "steps timed": case.period * options.repeats,
            }
        )
    return rows


def _step_case(problem: Problem, name: str, entry: Entry | None) -> timing.Case:
    """A training step as a user writes it; plain SGD without an entry."""
    rate, k = problem.options.learning_rate, problem.k
    tx: Any = optax.sgd(rate)
    period = 20
    if entry is not None:
        tx = oa.bulk_sgd(rate, k, tracker=entry.tracker)
        every = entry.tracker.refresh_every
        # Round robin and gradient rows have a rhythm of their own besides that of the refreshes.
        period = math.lcm(every, 10 if every == 1 else every) * (2 if every <= 10 else 1)
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, static_argnames="refresh", donate_argnums=(0, 1))
    def step(params: Any, state: Any, index: Any, subset: Any, x: Any, y: Any, refresh: Any) -> Any:
        def objective(index: Any) -> oa.Objective:
            bound = {"rest": problem.rest, "x": x[index], "y": y[index]}
            return networks.objective(problem.graphdef, LOSS).bind(**bound)

        value_fn = objective(index)
        grads = value_fn.grad(params)
        extra: dict[str, Any] = {}
        if entry is not None:
            own = entry.examples == "batch"
            extra = {
                "curvature_value_fn": value_fn if own else objective(subset),
                "refresh": refresh,
            }
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def call(i: int, carry: Any) -> Any:
        refresh = None if entry is None else oa.refresh_at(i, entry.tracker.refresh_every)
        index = problem.batches[i % len(problem.batches)]
        return step(*carry, index, problem.subset, problem.x, problem.y, refresh=refresh)

    params = jax.tree.map(jnp.copy, problem.params)
    carry = (params, jax.jit(tx.init)(params))
    return timing.Case(name, None if entry is None else "sgd", call, carry, period)


def _refresh_parts(
    problem: Problem, entry: Entry
) -> tuple[Callable[[], float], Callable[[], float] | None]:
    """Functions that time all of a warm refresh, and its products alone."""
    tracker, params = entry.tracker, problem.params
    batch = problem.batches[0]
    gradient = problem.gradient(params, batch)
    index = problem.index(entry, batch)
    # A block of products a refresh; or one, k times, with the linear algebra of a round.
    calls = problem.k if isinstance(tracker, oa.RoundRobinTracker) else 1

    @functools.partial(jax.jit, donate_argnums=0)
    def refresh(space: Any, params: Any) -> Any:
        return tracker.refresh(space, problem.objective(index), params, gradient, cold=False)

    @jax.jit
    def products(block: Any, params: Any) -> Any:
        return problem.objective(index).hvp_block(params, block)

    space = refresh(tracker.init(params, problem.k), params)

    def time_refresh() -> float:
        nonlocal space
        begin = time.perf_counter()
        for _ in range(calls):
            space = refresh(space, params)
        jax.block_until_ready(space)
        return time.perf_counter() - begin

    if not tracker.num_products(params, problem.k, cold=False):
        return time_refresh, None
    basis = oa.BlockTracker().init(params, problem.k // calls).basis
    jax.block_until_ready(products(basis, params))

    def time_products() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = products(basis, params)
        jax.block_until_ready(result)
        return time.perf_counter() - begin

    return time_refresh, time_products


# Output -----------------------------------------------------------------------------------------


def summarize(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """The worst of a tracker's checkpoints after the first, and the mean of the cosines."""
    own = [row for row in rows if row["tracker"] == name]
    own = own[1:] or own
    result: dict[str, float] = {}
    for prefix in ("", "before "):
        for key in ("chi full", "chi batch", "eigenvalues", "orthogonality"):
            result[prefix + key] = max(row[prefix + key] for row in own)
        cosines = [row[prefix + "cos2"] for row in own]
        result[prefix + "cos2"], result[prefix + "mean cos2"] = (
            min(cosines),
            float(np.mean(cosines)),
        )
    return result


def checks(
    summary: dict[str, dict[str, float]], cost: Sequence[dict[str, Any]]
) -> list[tuple[str, float, str, float, bool]]:
    """What is asked: (what, measured, comparison, limit, whether it holds)."""
    result = []

    def add(what: str, value: float, comparison: str, limit: float) -> None:
        holds = value <= limit if comparison == "<=" else value >= limit
        result.append((what, value, comparison, limit, holds))

    if "block" in summary:
        own = summary["block"]
        add("default tracker: error of chi, full gradient", own["chi full"], "<=", TARGETS["chi"])
        add("default tracker: error of chi, mini-batch", own["chi batch"], "<=", TARGETS["chi"])
        add("default tracker: mean squared cosine", own["mean cos2"], ">=", TARGETS["cos2"])
    for row in cost:
        if row["tracker"] == "block":
            add("default tracker: step / SGD step", row["ratio"][1], "<=", TARGETS["step"])
            name = "against ARPACK"
            add("default tracker: ARPACK step / step", row[name], ">=", TARGETS[name])
            name = "linear algebra"
            add("default tracker: linear algebra in a refresh", row[name], "<=", TARGETS[name])
        if row["tracker"] == "gradient":
            add("product-free: step / SGD step", row["ratio"][1], "<=", PRODUCT_FREE_STEP)
    return result


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    view = tables.table(columns, title)
    for row in rows:
        view.add_row(*row)
    return view


def _print(
    console: Console,
    entries: dict[str, Entry],
    rows: Sequence[dict[str, Any]],
    summary: dict[str, dict[str, float]],
    cost: Sequence[dict[str, Any]],
) -> None:
    names = list(entries)
    steps = list(dict.fromkeys(row["step"] for row in rows))
    cell = {(row["tracker"], row["step"]): row for row in rows}
    for key, title in (
        ("chi full", "error of chi, gradient of the whole split: used / before the refresh"),
        ("chi batch", "error of chi, mini-batch gradient: used / before the refresh"),
        ("cos2", "mean squared cosine: used / before the refresh"),
    ):
        body = []
        for step in steps:
            line = [str(step)]
            if key != "cos2":
                line.append(f"{cell[names[0], step]['exact ' + key]:.3f}")
            for name in names:
                row = cell[name, step]
                line.append(f"{row[key]:.4f} / {row['before ' + key]:.4f}")
            body.append(line)
        console.print()
        exact = [] if key == "cos2" else ["exact chi"]
        console.print(_table(title, ["step", *exact, *names], body))
    costs_by_name = {row["tracker"]: row for row in cost}
    body = []
    for name, entry in entries.items():
        own, spent = summary[name], costs_by_name.get(name)
        line = [name, entry.examples, str(entry.tracker.refresh_every)]
        line += [f"{own['chi full']:.4f}", f"{own['chi batch']:.4f}"]
        line += [f"{own['mean cos2']:.4f}", f"{own['cos2']:.4f}", f"{own['eigenvalues']:.3f}"]
        line.append(f"{own['orthogonality']:.0e}")
        if spent is not None:
            low, median, high = spent["ratio"]
            share = spent["linear algebra"]
            line += [f"{spent['products per step']:.2g}", f"{median:.2f} ({low:.2f}–{high:.2f})"]
            line += [f"{spent['against ARPACK']:.0f}", "" if share is None else f"{share:.0%}"]
        body.append(line)
    columns = ["tracker", "examples", "every", "chi full", "chi batch", "cos2", "lowest"]
    columns += ["eigenvalues", "|UU'-I|", "products/step", "step / SGD step", "ARPACK / step"]
    console.print()
    title = "worst checkpoint after the first (cos2: mean, lowest), and cost"
    console.print(_table(title, [*columns, "linear algebra"], body))
    for what, value, comparison, limit, holds in checks(summary, cost):
        verdict = "pass" if holds else "FAIL"
        console.print(f"{verdict}  {what}: {value:.4g} ({comparison} {limit:g})")


def _to_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check(options: Options) -> tuple[data.Task, dict[str, Entry]]:
    """The task and the trackers that the options name.

    Raises:
      UsageError: an option is wrong.
    """
    options.check()
    data.check_classification(options.task)
    names = list(ENTRIES)
    if options.trackers is not None:
        names = [name.strip() for name in options.trackers.split(",")]
    for name in names:
        cli.check_known("tracker", name, list(ENTRIES))
    task = data.load_task(options.task, data_dir=options.data_dir)
    if max(options.batch_size, options.curvature_batch) > len(task.train):
        raise cli.UsageError(
            f"--batch-size and --curvature-batch can be at most {len(task.train)}, the size of the "
            f"training split, got {options.batch_size} and {options.curvature_batch}"
        )
    return task, {name: ENTRIES[name] for name in dict.fromkeys(names)}


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        task, entries = _check(options)
        default = f"trackers-{options.task}-{options.learning_rate:g}"
        folder = folders.locate(options.runs_dir, options.name, default)
    except ValueError as error:
        return cli.fail(error)
    console = cli.console(180)
    with claim_results(folder, PROG, ["accuracy.csv"]):
        problem = Problem(task, options)
        machine = timing.machine()
        console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
        console.print(
            f"{options.task}, {len(task.train):,} examples, {task.default_model} with "
            f"{problem.dimension:,} parameters, squared error, SGD {options.learning_rate:g}, "
            f"batch {options.batch_size}, k = {problem.k}; subset of {options.curvature_batch} "
            "examples"
        )
        rows, references = accuracy(problem, entries, console.print)
        arpack_seconds = float(np.median([reference.seconds for reference in references]))
        cost = costs(problem, entries, arpack_seconds) if options.repeats else []
        summary = {name: summarize(rows, name) for name in entries}
        _print(console, entries, rows, summary, cost)
        results = {
            "machine": machine,
            "arpack": {
                "seconds": arpack_seconds,
                "products": [reference.products for reference in references],
            },
            "summary": summary,
            "cost": cost,
            "checks": [
                dict(zip(("what", "value", "comparison", "limit", "holds"), check, strict=True))
                for check in checks(summary, cost)
            ],
        }
        write_results(folder, PROG, options, results)
        cli.write_atomic(folder / "accuracy.csv", _to_csv(rows))
    console.print(f"results in {folder}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
