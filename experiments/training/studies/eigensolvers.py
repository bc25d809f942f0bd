"""Eigensolvers of this library, SciPy, matfree and JAX, each at its cheapest sufficient setting."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments import progress, timing
from experiments.training.studies.hessians import (
    MAX_PRODUCTS,
    WARM_STEPS,
    ChunkedHessian,
    apply_linear,
    arpack,
    mean_product,
    ravel,
)
from optax_accel import curvature
from optax_accel.curvature import blocks

PyTree = Any

# What a search for the cheapest setting tries.
SCIPY_VECTORS = (2.0, 3.0, 4.0)  # kept vectors per wanted one, less one; 2 is its default
SCIPY_TOLERANCES = (1e-1, 1e-2, 1e-3)
LOBPCG_TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3)  # relative residual norms
FILTER_DEGREES = (0, 2, 4)


@dataclasses.dataclass(frozen=True)
class Tool:
    """A solver at one setting.

    Attributes:
      name: what tables show.
      setting: the setting, as tables show it.
      run: solves from a start vector; returns the eigenvalues, the largest first, and the number of
        products.
      compile_seconds: time that compilation took; None where it is not measured.
      search_products: number of products from all starts in the search for the setting.
    """

    name: str
    setting: str
    run: Callable[[PyTree], tuple[Any, Any]]
    compile_seconds: float | None = None
    search_products: int = 0


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A solver that is not run.

    Attributes:
      name: what tables show.
      note: why it is not run.
    """

    name: str
    note: str


@dataclasses.dataclass(frozen=True)
class Search:
    """Finds the cheapest setting of each solver that is accurate from every start.

    Attributes:
      hessian: the matrix.
      exact: its largest eigenvalues, the largest first, from a reference; as many as are wanted.
      starts: one start vector per round.
      loop_seconds: predicted time of one product inside a compiled loop.
      tolerance: relative error that each eigenvalue may have.
      budget_seconds: solvers whose predicted time for one run is longer are not run.
    """

    hessian: ChunkedHessian
    exact: np.ndarray
    starts: Sequence[PyTree]
    loop_seconds: float
    tolerance: float
    budget_seconds: float

    @property
    def k(self) -> int:
        """Number of eigenvalues to find."""
        return len(self.exact)

    def error(self, values: Any) -> float:
        """Largest relative error of eigenvalues; infinite where one is missing."""
        values = np.asarray(values, np.float64)
        if values.shape != self.exact.shape or not np.isfinite(values).all():
            return float("inf")
        return float(np.max(np.abs(values - self.exact) / np.abs(self.exact)))

    def cheapest(self, candidates: Iterable[Tool]) -> Tool | None:
        """The first candidate that is accurate from every start, or None if there is none.

        Args:
          candidates: one solver at several settings, the cheapest first.
        """
        for candidate in candidates:
            total = 0
            for start in self.starts:
                values, products = candidate.run(start)
                total += int(products)
                if self.error(values) > self.tolerance:
                    break
            else:
                return dataclasses.replace(candidate, search_products=total)
        return None

    def over_budget(self, name: str, products: int) -> Skipped | None:
        """Says so where a solver in a compiled loop would take longer than the budget allows.

        Args:
          name: the solver.
          products: number of products that it is expected to make.
        """
        predicted = products * self.loop_seconds
        if predicted <= self.budget_seconds:
            return None
        return Skipped(
            name,
            f"over {self.budget_seconds:g} s: predicted {predicted:.0f} s, {products} products of "
            f"{self.loop_seconds:.2g} s in a compiled loop",
        )

    # This library -----------------------------------------------------------------------------

    def lanczos(self) -> Tool:
        """Our Lanczos iteration with its own stopping rule, from a random start."""
        setting = f"own stop at {self.tolerance:g}"
        return Tool("lanczos", setting, self._lanczos_to_tolerance)

    def lanczos_from_gradient(self) -> Tool:
        """The same, from the gradient."""
        setting = f"own stop at {self.tolerance:g}"
        gradient = self.hessian.gradient
        return Tool(
            "lanczos from the gradient", setting, lambda _: self._lanczos_to_tolerance(gradient)
        )

    def unconfirmed_lanczos(self) -> Tool:
        """The same, without the second sequence that looks for copies of eigenvalues."""

        def run(start: PyTree) -> tuple[Any, Any]:
            return self._lanczos(
                start, num_products=MAX_PRODUCTS, tolerance=self.tolerance, confirm=False
            )

        return Tool("lanczos, confirm=False", f"own stop at {self.tolerance:g}", run)

    def _lanczos_to_tolerance(self, start: PyTree) -> tuple[Any, Any]:
        return self._lanczos(start, num_products=MAX_PRODUCTS, tolerance=self.tolerance)

    def _lanczos(self, start: PyTree, **setting: Any) -> tuple[Any, Any]:
        pairs = curvature.lanczos(
            self.hessian.product,
            self.hessian.params,
            self.k,
            key=jax.random.key(0),
            start=start,
            loop="host",
            **setting,
        )
        return pairs.eigenvalues, pairs.num_products

    def lanczos_with_budget(self, enough: int) -> Tool | None:
        """Our Lanczos iteration with the fewest products that suffice, without a stopping rule.

        Args:
          enough: a number of products that suffices.
        """
        best = None
        for num in range(enough, self.k - 1, -1):
            run = functools.partial(self._lanczos, num_products=num, max_basis=num + 3)
            tool = self.cheapest([Tool("lanczos, given a budget", f"{num} products", run)])
            if tool is None:
                break
            best = tool
        return best

    def compiled_lanczos(self) -> Tool:
        """Our Lanczos iteration with its own stopping rule, loop and products in one program."""
        hessian = self.hessian

        def solve(linears: list[Any], start: PyTree) -> curvature.Eigenpairs:
            return curvature.lanczos(
                lambda v: mean_product(linears, v, lambda linear, v: linear(v)),
                hessian.params,
                self.k,
                key=jax.random.key(0),
                num_products=MAX_PRODUCTS,
                tolerance=self.tolerance,
                start=start,
            )

        compiled, seconds = compiled_for(solve, hessian.linears, self.starts[0])

        def run(start: PyTree) -> tuple[Any, Any]:
            pairs = compiled(hessian.linears, start)
            return jax.block_until_ready(pairs).eigenvalues, pairs.num_products

        return Tool("lanczos, compiled loop", f"own stop at {self.tolerance:g}", run, seconds)

    def block_iteration(self) -> Tool | None:
        """Our block iteration from the eigenvectors of a few steps before."""
        hessian = self.hessian
        lowest = curvature.lanczos(
            hessian.product,
            hessian.params,
            1,
            key=jax.random.key(2),
            num_products=12,
            loop="host",
        ).smallest

        def run(_: PyTree, degree: int) -> tuple[Any, Any]:
            pairs = curvature.block_iteration(
                hessian.products,
                hessian.earlier,
                self.k,
                num_products=10 * MAX_PRODUCTS,
                tolerance=self.tolerance,
                chebyshev_degree=degree,
                smallest=lowest,
                loop="host",
            )
            return pairs.eigenvalues, pairs.num_products

        name = f"block_iteration from {WARM_STEPS} steps before"
        candidates = (
            Tool(name, f"own stop, filter degree {degree}", functools.partial(run, degree=degree))
            for degree in FILTER_DEGREES
        )
        return _fewest_products(self.cheapest([candidate]) for candidate in candidates)

    # Others -----------------------------------------------------------------------------------

    def _arpack(self, start: PyTree, vectors: int | None, tolerance: float) -> tuple[Any, Any]:
        """SciPy's ARPACK, whose vectors are NumPy arrays on the host."""
        flat, unravel = ravel_pytree(self.hessian.params)
        solution = arpack(
            lambda vector: ravel(self.hessian.product(unravel(vector))),
            len(flat),
            self.k,
            ncv=vectors,
            tol=tolerance,
            v0=np.asarray(ravel(start)),
        )
        return solution.eigenvalues, solution.products

    def scipy_with_own_stop(self) -> Tool | None:
        """ARPACK as one calls it who has no reference, with its default number of vectors."""
        run = functools.partial(self._arpack, vectors=None, tolerance=self.tolerance)
        setting = f"own stop at {self.tolerance:g}"
        return self.cheapest([Tool("scipy eigsh, own stop", setting, run)])

    def scipy(self) -> Tool | None:
        """ARPACK at its cheapest sufficient setting."""
        k = self.k
        size = blocks.dimension(self.hessian.params)
        sizes = dict.fromkeys(min(int(factor * k) + 1, size) for factor in SCIPY_VECTORS)
        return _fewest_products(
            self.cheapest(
                Tool(
                    "scipy eigsh",
                    f"ncv {vectors}, tol {tolerance:g}",
                    functools.partial(self._arpack, vectors=vectors, tolerance=tolerance),
                )
                for tolerance in SCIPY_TOLERANCES
            )
            for vectors in sizes
            if vectors > k
        )

    def matfree(self, enough: int) -> Tool | Skipped:
        """Matfree's Lanczos iteration in one program, with the fewest products that suffice.

        Args:
          enough: a number of products that suffices.
        """
        name = "matfree eigh_partial"
        if importlib.util.find_spec("matfree") is None:
            return Skipped(name, "not installed: pip install matfree")
        if (skipped := self.over_budget(name, enough)) is not None:
            return skipped
        from matfree import decomp, eig

        linears = self.hessian.linears
        _, unravel = ravel_pytree(self.hessian.params)

        def product(vector: jax.Array, linears: list[Any]) -> jax.Array:
            return ravel(mean_product(linears, unravel(vector), lambda linear, v: linear(v)))

        def matrix(linears: list[Any], start: PyTree) -> jax.Array:
            return decomp.tridiag_sym(enough)(product, ravel(start), linears).J_small

        # A Krylov space contains the smaller ones, so one run per start tells about all of them.
        longest, _ = compiled_for(matrix, linears, self.starts[0])
        matrices = [np.asarray(longest(linears, start)) for start in self.starts]

        def accurate(num: int) -> bool:
            values = (np.linalg.eigvalsh(each[:num, :num])[::-1] for each in matrices)
            return all(self.error(each[: self.k]) <= self.tolerance for each in values)

        num = next((n for n in range(self.k, enough + 1) if accurate(n)), enough)
        solve = eig.eigh_partial(decomp.tridiag_sym(num))

        def leading(linears: list[Any], start: PyTree) -> tuple[jax.Array, jax.Array]:
            values, vectors = solve(product, ravel(start), linears)
            return values[::-1][: self.k], vectors[::-1][: self.k]

        compiled, seconds = compiled_for(leading, linears, self.starts[0])

        def run(start: PyTree) -> tuple[Any, Any]:
            return jax.block_until_ready(compiled(linears, start))[0], num

        return Tool(name, f"{num} products", run, seconds)

    def lobpcg(self, enough: int) -> Tool | Skipped:
        """JAX's LOBPCG in one program.

        Args:
          enough: a number of products that suffices for Lanczos.
        """
        from jax.experimental.sparse.linalg import lobpcg_standard

        name, k, linears = "jax lobpcg_standard", self.k, self.hessian.linears
        flat, unravel = ravel_pytree(self.hessian.params)
        size = flat.shape[0]
        if 5 * k >= size:
            return Skipped(name, "needs 5 k < dimension")
        # It takes several times the products of Lanczos: an optimistic prediction.
        if (skipped := self.over_budget(name, 4 * enough)) is not None:
            return skipped

        def solve(linears: list[Any], start: jax.Array, tolerance: jax.Array) -> Any:
            def one(vector: jax.Array) -> jax.Array:
                return ravel(mean_product(linears, unravel(vector), lambda linear, v: linear(v)))

            many = jax.vmap(one, in_axes=1, out_axes=1)
            return lobpcg_standard(many, start, m=MAX_PRODUCTS, tol=tolerance)

        @jax.jit
        def block(start: PyTree) -> jax.Array:
            # It takes a block: the start and k - 1 random vectors.
            first = ravel(start)
            keys = jax.random.split(jax.random.key(3), k - 1)
            rest = jax.vmap(lambda key: blocks.random(key, flat))(keys)
            return jnp.concatenate([first[None] / jnp.linalg.norm(first), rest]).T

        example = block(self.starts[0])
        compiled, seconds = compiled_for(solve, linears, example, jnp.asarray(0.1, flat.dtype))

        def run(start: PyTree, tolerance: float) -> tuple[Any, Any]:
            # Its tolerance is relative to 10 * dimension * (theta + |A u|).
            scaled = jnp.asarray(tolerance / (20 * size), flat.dtype)
            values, vectors, iterations = compiled(linears, block(start), scaled)
            jax.block_until_ready(vectors)
            return values, k + 4 * k * int(iterations)

        candidates = (
            Tool(name, f"residual {tol:g}", functools.partial(run, tolerance=tol), seconds)
            for tol in LOBPCG_TOLERANCES
        )
        return self.cheapest(candidates) or Skipped(name, "never accurate enough")


def _fewest_products(tools: Iterable[Tool | None]) -> Tool | None:
    sufficient = [tool for tool in tools if tool is not None]
    return min(sufficient, key=lambda tool: tool.search_products, default=None)


def compiled_for(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """A function compiled for these arguments, and the seconds that this took.

    Args:
      function: a pure function.
      *args: arguments like those that it will be called with.
    """
    return timing.timed(lambda: jax.jit(function).lower(*args).compile())


def loop_penalty(hessian: ChunkedHessian) -> float:
    """How many times slower a product is inside a compiled loop, from a few examples.

    XLA runs convolutions in loops on a CPU many times slower than outside (jax#12868), and a
    compiled function cannot be interrupted, so its time has to be predicted.

    Args:
      hessian: the matrix.

    Returns:
      The ratio of the shortest of three times each.
    """

    def looped(linear: Any, vector: PyTree, times: jax.Array) -> PyTree:
        return lax.fori_loop(0, times, lambda _, v: linear(v), vector)

    vector, once = hessian.gradient, jnp.asarray(1)
    compiled, _ = compiled_for(looped, hessian.probe, vector, once)
    inside, outside = (
        min(timing.timed(call)[1] for _ in range(3))
        for call in (
            lambda: compiled(hessian.probe, vector, once),
            lambda: apply_linear(hessian.probe, vector),
        )
    )
    return inside / outside


def find_tools(search: Search) -> list[Tool | Skipped]:
    """Every solver at its cheapest sufficient setting, or why it is not run.

    Args:
      search: the search, which knows the matrix and the accuracy.

    Returns:
      The solvers, our Lanczos iteration first, without those that were never accurate.
    """
    progress.tell("lanczos: looking for the cheapest setting")
    lanczos, start = search.lanczos(), search.starts[0]
    first, second = (timing.timed(lambda: lanczos.run(start))[1] for _ in range(2))
    lanczos = dataclasses.replace(lanczos, compile_seconds=max(0.0, first - second))
    enough = max(int(lanczos.run(start)[1]) for start in search.starts)
    searches: dict[str, Callable[[], Tool | Skipped | None]] = {
        "lanczos without confirmation": search.unconfirmed_lanczos,
        "lanczos with a budget": lambda: search.lanczos_with_budget(enough),
        "lanczos from the gradient": search.lanczos_from_gradient,
        "block iteration": search.block_iteration,
        "SciPy": search.scipy,
        "SciPy with its own stop": search.scipy_with_own_stop,
        "matfree": lambda: search.matfree(enough),
        "LOBPCG": lambda: search.lobpcg(enough),
        "curvlinops": lambda: Skipped("curvlinops", "PyTorch; takes SciPy's eigsh"),
    }
    if search.over_budget("", enough) is None:
        searches = {"compiled lanczos": search.compiled_lanczos} | searches
    found = (
        searches[name]()
        for name in progress.each([*searches], "{}: looking for the cheapest setting".format)
    )
    return [lanczos, *(tool for tool in found if tool is not None)]


def measure(tools: Sequence[Tool | Skipped], search: Search) -> list[dict[str, Any]]:
    """Times all solvers in interleaved rounds, each of which has a start of its own.

    Args:
      tools: the solvers; the first one has to be a `Tool`, with which the others are compared.
      search: the search, which knows the starts and the exact eigenvalues.

    Returns:
      Per solver: name, setting, note and, if it runs, quartiles of milliseconds and of the ratio to
      the first one, both also of processor time, mean number of products, largest error, seconds of
      compilation.
    """
    running = [tool for tool in tools if isinstance(tool, Tool)]
    products: dict[Tool, list[int]] = {tool: [] for tool in running}
    errors: dict[Tool, list[float]] = {tool: [] for tool in running}
    cpu: dict[Tool, list[float]] = {tool: [] for tool in running}

    def timer(tool: Tool) -> Callable[[], float]:
        starts = iter(search.starts)

        def run() -> float:
            start = next(starts)
            progress.tell(f"timing {tool.name}")
            (values, count), seconds, cpu_seconds = timing.timed_cpu(lambda: tool.run(start))
            cpu[tool].append(cpu_seconds)
            products[tool].append(int(count))
            errors[tool].append(search.error(values))
            progress.advance()
            return seconds

        return run

    progress.expect(len(running) * len(search.starts))
    seconds = timing.interleave([timer(tool) for tool in running], len(search.starts))
    times = dict(zip(running, seconds, strict=True))
    rows: list[dict[str, Any]] = []
    for tool in tools:
        if isinstance(tool, Skipped):
            rows.append({"name": tool.name, "setting": "", "note": tool.note})
            continue
        rows.append(
            {
                "name": tool.name,
                "setting": tool.setting,
                "note": "",
                "milliseconds": timing.quartiles(1000 * times[tool]),
                "ratio": timing.quartiles(times[tool] / seconds[0]),
                **timing.cpu_quartiles(cpu[tool], cpu[running[0]]),
                "products": float(np.mean(products[tool])),
                "error": max(errors[tool]),
                "compile_seconds": tool.compile_seconds,
            }
        )
    return rows
