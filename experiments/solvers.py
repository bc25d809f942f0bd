"""Time the eigensolvers of this library beside SciPy's, matfree's and JAX's, in one run.

    python -m experiments.solvers --task mnist5k

One matrix, the Hessian of the loss over the whole training set after some steps of SGD; one
accuracy, a relative error of `--tolerance` in each of the `--k` largest eigenvalues; the same
linearized product and the same random starts for all. Each tool runs at the cheapest of its own
settings that reached the accuracy from every start, found beforehand with the help of a reference
that a user does not have; only the rows marked "own stop" decide by themselves when to stop. Rounds
are interleaved (every tool once per round, in changing order), so that a busy moment hits all.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import models
from experiments import cli, data
from experiments.reporting import tables
from experiments.runs import folders
from experiments.runs.study import claim_results, write_results
from experiments.training import networks
from optax_accel import curvature
from optax_accel.curvature import blocks

PROG = "python -m experiments.solvers"
PyTree = Any

# What a search for the cheapest setting tries.
SCIPY_VECTORS = (2.0, 3.0, 4.0)  # kept vectors per wanted one, less one; 2 is its default
SCIPY_TOLERANCES = (1e-1, 1e-2, 1e-3)
LOBPCG_TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3)  # relative residual norms
FILTER_DEGREES = (0, 2, 4)
MAX_PRODUCTS = 200
LEARNING_RATE = 0.1
BATCH_SIZE = 50
# Steps of SGD between the parameters whose eigenvectors start the block iteration, and ours.
WARM_STEPS = 5
# Examples on which a product inside a compiled loop is timed, to predict slow tools.
PROBE_EXAMPLES = 50


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Time the eigensolvers of this library beside SciPy's, matfree's and JAX's."""

    limits: ClassVar = {
        "steps": cli.Range(WARM_STEPS, 10**6),
        "rounds": cli.Range(1, 1_000),
        "k": cli.Range(1, 50),  # every tool has to find so many within `MAX_PRODUCTS`
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
    """Rounds; each has a start of its own and runs every tool once."""
    steps: int = 300
    """Steps of SGD before (batch 50, rate 0.1, mean squared error)."""
    examples: int | None = None
    """Training examples to use; default: all."""
    chunk: int = 1000
    """Examples multiplied at a time."""
    budget_seconds: float = 60.0
    """Tools whose predicted time for one run is longer are not run."""
    seed: int = 0
    """Of the model and the batches."""
    runs_dir: Path = Path("runs")
    """Where the folder with results.json and results.csv is made."""
    name: str | None = None
    """Folder name; default: solvers-TASK."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A matrix: the mean of linear functions, one per chunk of examples.

    Attributes:
      params: the parameters, for their shapes.
      linears: linear functions as pytrees, which compiled functions can take.
      gradient: of the same loss.
      earlier: leading eigenvectors of a few steps before, a block.
      probe: the linear function of a few examples.
      num_examples: all of them.
    """

    params: PyTree
    linears: list[Any]
    gradient: PyTree
    earlier: PyTree
    probe: Any
    num_examples: int

    def product(self, vector: PyTree) -> PyTree:
        """One product, driven from the host."""
        return mean_product(self.linears, vector, _apply)

    def products(self, block: PyTree) -> PyTree:
        """The products of a block, row by row: on a CPU faster than vectorized."""
        num = jax.tree.leaves(block)[0].shape[0]
        return _stack([self.product(_row(block, i)) for i in range(num)])


def mean_product(linears: Sequence[Any], vector: PyTree, apply: Callable[..., PyTree]) -> PyTree:
    """The mean of ``apply(linear, vector)``."""
    images = [apply(linear, vector) for linear in linears]
    return jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves) / len(leaves), *images)


@jax.jit
def _apply(linear: Any, vector: PyTree) -> PyTree:
    return linear(vector)


@functools.partial(jax.jit, static_argnums=1)
def _row(block: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], block)


@jax.jit
def _stack(rows: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def make_problem(options: Options, task: data.Task) -> Problem:
    """Trains for a while and linearizes the gradient there."""
    model = models.create(
        task.default_model,
        input_shape=task.input_shape,
        num_classes=task.num_classes,
        rngs=options.seed,
    )
    graphdef, params, rest = networks.split(model)
    objective = networks.objective(graphdef, "mse").given(rest=rest)
    num = options.examples or len(task.train)
    chunk = min(options.chunk, num)
    num -= num % chunk  # chunks of one size, so that their mean is that of the examples
    x, y = jnp.asarray(task.train.x[:num]), jnp.asarray(task.train.y[:num])
    pieces = [(x[i : i + chunk], y[i : i + chunk]) for i in range(0, num, chunk)]
    gradient = jax.jit(lambda params, x, y: jax.grad(objective)(params, x=x, y=y))
    linearize = jax.jit(lambda params, x, y: objective.hessian(params, x=x, y=y))

    @jax.jit
    def step(params: PyTree, x: jax.Array, y: jax.Array) -> PyTree:
        slope = jax.grad(objective)(params, x=x, y=y)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, slope)

    random = np.random.default_rng(options.seed)
    earlier = params
    for i in range(options.steps):
        if i == options.steps - WARM_STEPS:
            earlier = params
        index = random.integers(0, num, BATCH_SIZE)
        params = step(params, x[index], y[index])

    def linears(params: PyTree) -> list[Any]:
        return [linearize(params, *piece) for piece in pieces]

    mean = mean_product(pieces, params, lambda piece, params: gradient(params, *piece))
    probe = linearize(params, x[:PROBE_EXAMPLES], y[:PROBE_EXAMPLES])
    before = Problem(params, linears(earlier), mean, None, probe, num)
    warm = curvature.lanczos(
        before.product,
        params,
        options.k + 2,
        key=jax.random.key(1),
        num_products=MAX_PRODUCTS,
        tolerance=options.tolerance,
        loop="host",
    )
    return dataclasses.replace(before, linears=linears(params), earlier=warm.basis)


# Tools --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tool:
    """A solver at its cheapest sufficient setting.

    Attributes:
      name: what is shown.
      setting: what is shown.
      run: solves from the start of a round; returns eigenvalues, largest first, and products.
      compile_seconds: what compilation took.
      note: why it was not run, where `run` is None.
      found_products: products from all starts, in the search for the setting.
    """

    name: str
    setting: str
    run: Callable[[PyTree], tuple[Any, Any]] | None
    compile_seconds: float | None = None
    note: str = ""
    found_products: int = 0


class Search:
    """Finds the tools' settings.

    Args:
      options: of the command.
      problem: the matrix.
      exact: reference eigenvalues.
      starts: one start vector per round.
      loop_seconds: predicted time of one product inside a compiled loop.
    """

    def __init__(
        self,
        options: Options,
        problem: Problem,
        exact: np.ndarray,
        starts: Sequence[PyTree],
        loop_seconds: float,
    ):
        self.options, self.problem, self.exact = options, problem, exact
        self.starts, self.loop_seconds = starts, loop_seconds

    def error(self, values: Any) -> float:
        """Largest relative error; infinite where an eigenvalue is missing."""
        values = np.asarray(values, np.float64)
        if values.shape != self.exact.shape or not np.isfinite(values).all():
            return float("inf")
        return float(np.max(np.abs(values - self.exact) / np.abs(self.exact)))

    def cheapest(self, candidates: Sequence[Tool]) -> Tool | None:
        """The first candidate that is accurate from every start; they come by rising cost."""
        for candidate in candidates:
            assert candidate.run is not None
            total = 0
            for start in self.starts:
                values, products = candidate.run(start)
                total += int(products)
                if self.error(values) > self.options.tolerance:
                    break
            else:
                return dataclasses.replace(candidate, found_products=total)
        return None

    def affordable(self, name: str, products: int) -> Tool | None:
        """A tool that says why it does not run, if its predicted time is beyond the budget."""
        predicted = products * self.loop_seconds
        if predicted <= self.options.budget_seconds:
            return None
        note = (
            f"over {self.options.budget_seconds:g} s: predicted {predicted:.0f} s, {products} "
            f"products of {self.loop_seconds:.2g} s in a compiled loop"
        )
        return Tool(name, "", None, note=note)

    def own(self) -> list[Tool]:
        """Our Lanczos that stops by itself, from a random start and from the gradient."""
        problem, options = self.problem, self.options

        def run(start: PyTree) -> tuple[Any, Any]:
            return self._lanczos(start, num_products=MAX_PRODUCTS, tolerance=options.tolerance)

        setting = f"own stop at {options.tolerance:g}"
        return [
            Tool("lanczos", setting, run),
            Tool("lanczos from the gradient", setting, lambda _: run(problem.gradient)),
        ]

    def _lanczos(self, start: PyTree, **setting: Any) -> tuple[Any, Any]:
        pairs = curvature.lanczos(
            self.problem.product,
            self.problem.params,
            self.options.k,
            key=jax.random.key(0),
            start=start,
            loop="host",
            **setting,
        )
        return pairs.eigenvalues, pairs.num_products

    def fewest(self, enough: int) -> Tool | None:
        """Our Lanczos with the fewest products that are enough, without a stop of its own.

        Args:
          enough: a number of products that is.
        """
        best = None
        for num in range(enough, self.options.k - 1, -1):
            run = functools.partial(self._lanczos, num_products=num, max_basis=num + 3)
            tool = self.cheapest([Tool("lanczos, given a budget", f"{num} products", run)])
            if tool is None:
                break
            best = tool
        return best

    def compiled(self) -> Tool:
        """Our Lanczos that stops by itself, its loop compiled with the products."""
        problem, options = self.problem, self.options

        def solve(linears: list[Any], start: PyTree) -> curvature.Eigenpairs:
            return curvature.lanczos(
                lambda v: mean_product(linears, v, lambda linear, v: linear(v)),
                problem.params,
                options.k,
                key=jax.random.key(0),
                num_products=MAX_PRODUCTS,
                tolerance=options.tolerance,
                start=start,
            )

        compiled, seconds = compile_for(solve, problem.linears, self.starts[0])

        def run(start: PyTree) -> tuple[Any, Any]:
            pairs = compiled(problem.linears, start)
            return jax.block_until_ready(pairs).eigenvalues, pairs.num_products

        return Tool("lanczos, compiled loop", f"own stop at {options.tolerance:g}", run, seconds)

    def block(self) -> Tool | None:
        """Our block iteration from the eigenvectors of a few steps before."""
        problem, options = self.problem, self.options
        lowest = curvature.lanczos(
            problem.product,
            problem.params,
            1,
            key=jax.random.key(2),
            num_products=12,
            loop="host",
        ).smallest

        def run(_: PyTree, degree: int) -> tuple[Any, Any]:
            pairs = curvature.block_iteration(
                problem.products,
                problem.earlier,
                options.k,
                num_products=10 * MAX_PRODUCTS,
                tolerance=options.tolerance,
                chebyshev_degree=degree,
                smallest=lowest,
                loop="host",
            )
            return pairs.eigenvalues, pairs.num_products

        best = [
            self.cheapest(
                [
                    Tool(
                        f"block_iteration from {WARM_STEPS} steps before",
                        f"own stop, filter degree {degree}",
                        functools.partial(run, degree=degree),
                    )
                ]
            )
            for degree in FILTER_DEGREES
        ]
        return min(
            (tool for tool in best if tool), key=lambda tool: tool.found_products, default=None
        )

    def scipy(self) -> Tool | None:
        """SciPy's ARPACK; its vectors are numpy arrays on the host."""
        k, problem = self.options.k, self.problem
        size = blocks.dimension(problem.params)

        def run(start: PyTree, vectors: int, tolerance: float) -> tuple[Any, Any]:
            return arpack(problem, start, k, vectors, tolerance)

        sizes = dict.fromkeys(min(int(f * k) + 1, size) for f in SCIPY_VECTORS)
        best = [
            self.cheapest(
                [
                    Tool(
                        "scipy eigsh",
                        f"ncv {vectors}, tol {tolerance:g}",
                        functools.partial(run, vectors=vectors, tolerance=tolerance),
                    )
                    for tolerance in SCIPY_TOLERANCES
                ]
            )
            for vectors in sizes
            if vectors > k
        ]
        return min(
            (tool for tool in best if tool), key=lambda tool: tool.found_products, default=None
        )

    def matfree(self, enough: int) -> Tool:
        """Matfree's Lanczos, in one compiled function, with the fewest products that are enough.

        Args:
          enough: a number of products that is.
        """
        name, options = "matfree eigh_partial", self.options
        if importlib.util.find_spec("matfree") is None:
            return Tool(name, "", None, note="not installed: pip install matfree")
        if (skipped := self.affordable(name, enough)) is not None:
            return skipped
        from matfree import decomp, eig

        _, unravel = ravel_pytree(self.problem.params)

        def product(vector: jax.Array, linears: list[Any]) -> jax.Array:
            image = mean_product(linears, unravel(vector), lambda linear, v: linear(v))
            return ravel_pytree(image)[0]

        def matrix(linears: list[Any], start: PyTree) -> jax.Array:
            return decomp.tridiag_sym(enough)(product, ravel_pytree(start)[0], linears).J_small

        # A Krylov space contains the smaller ones, so one run per start tells about all of them.
        longest, _ = compile_for(matrix, self.problem.linears, self.starts[0])
        matrices = [np.asarray(longest(self.problem.linears, start)) for start in self.starts]

        def accurate(num: int) -> bool:
            values = (np.linalg.eigvalsh(each[:num, :num])[::-1] for each in matrices)
            return all(self.error(each[: options.k]) <= options.tolerance for each in values)

        num = next((n for n in range(options.k, enough + 1) if accurate(n)), enough)
        solve = eig.eigh_partial(decomp.tridiag_sym(num))

        def leading(linears: list[Any], start: PyTree) -> tuple[jax.Array, jax.Array]:
            values, vectors = solve(product, ravel_pytree(start)[0], linears)
            return values[::-1][: options.k], vectors[::-1][: options.k]

        compiled, seconds = compile_for(leading, self.problem.linears, self.starts[0])

        def run(start: PyTree) -> tuple[Any, Any]:
            return jax.block_until_ready(compiled(self.problem.linears, start))[0], num

        return Tool(name, f"{num} products", run, seconds)

    def lobpcg(self, rough: int) -> Tool | None:
        """JAX's LOBPCG, in one compiled function."""
        from jax.experimental.sparse.linalg import lobpcg_standard

        name, k = "jax lobpcg_standard", self.options.k
        flat, unravel = ravel_pytree(self.problem.params)
        size = flat.shape[0]
        if 5 * k >= size:
            return Tool(name, "", None, note="needs 5 k < dimension")
        # It takes several times the products of Lanczos: an optimistic prediction.
        if (skipped := self.affordable(name, 4 * rough)) is not None:
            return skipped

        def solve(linears: list[Any], start: jax.Array, tolerance: jax.Array) -> Any:
            def one(vector: jax.Array) -> jax.Array:
                image = mean_product(linears, unravel(vector), lambda linear, v: linear(v))
                return ravel_pytree(image)[0]

            many = jax.vmap(one, in_axes=1, out_axes=1)
            return lobpcg_standard(many, start, m=MAX_PRODUCTS, tol=tolerance)

        @jax.jit
        def block(start: PyTree) -> jax.Array:
            # The start and k - 1 random vectors: it takes a block.
            first = ravel_pytree(start)[0]
            keys = jax.random.split(jax.random.key(3), k - 1)
            rest = jax.vmap(lambda key: blocks.random(key, flat))(keys)
            return jnp.concatenate([first[None] / jnp.linalg.norm(first), rest]).T

        example = block(self.starts[0])
        compiled, seconds = compile_for(
            solve, self.problem.linears, example, jnp.asarray(0.1, flat.dtype)
        )

        def run(start: PyTree, tolerance: float) -> tuple[Any, Any]:
            # Its tolerance is relative to 10 * dimension * (theta + |A u|).
            scaled = jnp.asarray(tolerance / (20 * size), flat.dtype)
            values, vectors, iterations = compiled(self.problem.linears, block(start), scaled)
            jax.block_until_ready(vectors)
            return values, k + 4 * k * int(iterations)

        candidates = [
            Tool(name, f"residual {tol:g}", functools.partial(run, tolerance=tol), seconds)
            for tol in LOBPCG_TOLERANCES
        ]
        return self.cheapest(candidates) or Tool(name, "", None, note="never accurate enough")


def arpack(
    problem: Problem, start: PyTree, k: int, vectors: int | None, tolerance: float
) -> tuple[np.ndarray, int]:
    """SciPy's eigsh; eigenvalues, largest first, and products."""
    import scipy.sparse.linalg

    first, unravel = ravel_pytree(start)
    count = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return np.asarray(_ravel(problem.product(unravel(jnp.asarray(vector.ravel())))))

    shape = (first.shape[0],) * 2
    operator = scipy.sparse.linalg.LinearOperator(shape, product, dtype=np.float32)
    values, _ = scipy.sparse.linalg.eigsh(
        operator, k, which="LA", ncv=vectors, tol=tolerance, v0=np.asarray(first)
    )
    return np.sort(values)[::-1], count


@jax.jit
def _ravel(tree: PyTree) -> jax.Array:
    return ravel_pytree(tree)[0]


def compile_for(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """A function compiled for these arguments, and the seconds that took."""
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - begin


def loop_penalty(problem: Problem) -> float:
    """How many times slower a product is inside a compiled loop, from a few examples.

    XLA runs convolutions in loops on a CPU many times slower than outside (jax#12868), and a
    compiled function cannot be interrupted, so its time has to be predicted.
    """

    def looped(linear: Any, vector: PyTree, times: jax.Array) -> PyTree:
        return lax.fori_loop(0, times, lambda _, v: linear(v), vector)

    vector, once = problem.gradient, jnp.asarray(1)
    compiled, _ = compile_for(looped, problem.probe, vector, once)
    seconds = [
        min(clock(call) for _ in range(3))
        for call in (
            lambda: compiled(problem.probe, vector, once),
            lambda: _apply(problem.probe, vector),
        )
    ]
    return seconds[0] / seconds[1]


def clock(call: Callable[[], Any]) -> float:
    """Seconds until the result of a call is there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def find_tools(search: Search) -> list[Tool]:
    """Every tool at its setting."""
    lanczos, warm_lanczos = search.own()
    assert lanczos.run is not None
    run = lanczos.run
    first = clock(lambda: run(search.starts[0])[0])
    lanczos.compile_seconds = max(0.0, first - clock(lambda: run(search.starts[0])[0]))
    enough = max(int(run(start)[1]) for start in search.starts)
    found = [lanczos, search.fewest(enough), warm_lanczos, search.block(), search.scipy()]
    found.append(search.matfree(enough))
    if search.affordable("", enough) is None:
        found.insert(1, search.compiled())
    return [tool for tool in [*found, search.lobpcg(enough)] if tool is not None]


def measure(tools: Sequence[Tool], search: Search) -> list[dict[str, Any]]:
    """Times all tools in interleaved rounds.

    Returns:
      Per tool: name, setting, quartiles of milliseconds and of the ratio to the first tool, mean
      products, largest error, seconds of compilation, note.
    """
    running = [tool for tool in tools if tool.run is not None]
    seconds: dict[str, list[float]] = {tool.name + tool.setting: [] for tool in running}
    products: dict[str, list[int]] = {key: [] for key in seconds}
    errors: dict[str, list[float]] = {key: [] for key in seconds}
    for i, start in enumerate(search.starts):
        turn = i % len(running)
        for tool in [*running[turn:], *running[:turn]]:
            assert tool.run is not None
            key = tool.name + tool.setting
            begin = time.perf_counter()
            values, count = jax.block_until_ready(tool.run(start))
            seconds[key].append(time.perf_counter() - begin)
            products[key].append(int(count))
            errors[key].append(search.error(values))
    reference = seconds[running[0].name + running[0].setting]
    rows = []
    for tool in tools:
        key = tool.name + tool.setting
        row: dict[str, Any] = {"name": tool.name, "setting": tool.setting, "note": tool.note}
        if tool.run is not None:
            ratios = [own / first for own, first in zip(seconds[key], reference, strict=True)]
            row |= {
                "milliseconds": [1000 * value for value in _quartiles(seconds[key])],
                "ratio": _quartiles(ratios),
                "products": float(np.mean(products[key])),
                "error": max(errors[key]),
                "compile_seconds": tool.compile_seconds,
            }
        rows.append(row)
    return rows


def _quartiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])]


# Output -------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], product_milliseconds: float) -> Table:
    """Medians, with quartiles in brackets."""
    columns = ["solver", "setting", "products", "milliseconds", "outside products", "to lanczos"]
    view = tables.table([*columns, "error", "compile"], left=2, wrap=True)
    for row in rows:
        if "milliseconds" not in row:
            view.add_row(row["name"], row["note"])
            continue
        low, median, high = row["milliseconds"]
        share = max(0.0, 1 - row["products"] * product_milliseconds / median)
        compiled = row["compile_seconds"]
        view.add_row(
            row["name"],
            row["setting"],
            f"{row['products']:.1f}".removesuffix(".0"),
            f"{median:.0f} ({low:.0f}–{high:.0f})",
            f"{100 * share:.0f} %",
            f"{row['ratio'][1]:.2f}",
            f"{row['error']:.0e}",
            "" if compiled is None else f"{compiled:.1f} s",
        )
    return view


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line per tool; medians."""
    text = io.StringIO()
    names = ("name", "setting", "products", "milliseconds", "ratio", "error", "compile_seconds")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "note"])
    for row in rows:
        values = [row.get(name) for name in names]
        writer.writerow(
            [*(value[1] if isinstance(value, list) else value for value in values), row["note"]]
        )
    return text.getvalue()


def check(options: Options) -> None:
    """Raises `UsageError` for options that make no sense."""
    options.check()
    data.check_classification(options.task)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Makes the matrix, finds the settings, times the tools and prints the table."""
    task = data.load_task(options.task, data_dir=options.data_dir)
    problem = make_problem(options, task)
    size = blocks.dimension(problem.params)
    starts = [blocks.random(jax.random.key(100 + i), problem.params) for i in range(options.rounds)]
    product_seconds = float(
        np.median([clock(lambda: problem.product(problem.gradient)) for _ in range(5)])
    )
    console.print(
        f"{options.task}, {task.default_model}, {size:,} parameters, Hessian over "
        f"{problem.num_examples:,} examples after {options.steps} steps; "
        f"{options.k} largest eigenvalues to {options.tolerance:g}; one product "
        f"{1000 * product_seconds:.1f} ms; jax {jax.__version__}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0:.1f}"
    )
    exact, _ = arpack(problem, starts[0], options.k, min(3 * options.k + 10, size), 1e-6)
    penalty = loop_penalty(problem)
    search = Search(options, problem, exact, starts, penalty * product_seconds)
    rows = measure(find_tools(search), search)
    console.print()
    console.print(table(rows, 1000 * product_seconds))
    console.print(
        f"\nMedians (quartiles) of {options.rounds} interleaved rounds, compilation apart. Every "
        "setting is the cheapest that was accurate from every start, found with the reference; "
        "“own stop” rows decide without it. The reference is ARPACK's, to a residual of 1e-6. A "
        "product inside a compiled loop takes "
        f"{penalty:.1f} times as long as outside. The gradient that one row starts from and the "
        "eigenvectors that another does are not counted."
    )
    return {
        "parameters": size,
        "product_milliseconds": 1000 * product_seconds,
        "loop_penalty": penalty,
        "eigenvalues": exact.tolist(),
        "solvers": rows,
    }


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    console = cli.console(120)
    try:
        check(options)
        folder = folders.locate(options.runs_dir, options.name, f"solvers-{options.task}")
        with claim_results(folder, PROG, ["results.csv"]):
            results = run(options, console)
            write_results(folder, PROG, options, results)
            cli.write_atomic(folder / "results.csv", to_csv(results["solvers"]))
    except data.DataError as error:
        return cli.fail(error)
    console.print(f"{folder / 'results.json'}, {folder / 'results.csv'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
