"""The spectral density of a Hessian, by this library and by matfree, from the same probes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments import progress, timing
from experiments.training.studies.eigensolvers import Search, Skipped, compiled_for
from experiments.training.studies.hessians import ChunkedHessian, mean_product, ravel
from optax_accel import curvature
from optax_accel.curvature import blocks
from optax_accel.curvature.estimates import random_block

PyTree = Any
Spectrum = curvature.SpectralDensity

NUM_PROBES = 4
NUM_STEPS = 30
REFERENCE_PROBES = 12
POINTS = 400  # of the grid on which densities are compared
WIDTH = 0.02  # of the smearing, relative to the range of the eigenvalues


class _Operator:
    """A Hessian over chunks as an operator of the library."""

    def __init__(self, hessian: ChunkedHessian):
        self.like = jax.eval_shape(lambda: hessian.params)
        self.block = hessian.products
        self._product = hessian.product

    def __call__(self, vector: PyTree) -> PyTree:
        return self._product(vector)


def measure(search: Search) -> list[dict[str, Any]]:
    """Times the programs in interleaved rounds, each of which has probes of its own.

    Args:
      search: the comparison of eigensolvers on the same matrix, which knows the budget.

    Returns:
      Per program: name and, if it runs, quartiles of milliseconds and of the ratio to ours, both
      also of processor time, number of products, median error, seconds of compilation; else a note
      that says why not.
    """
    operator, rounds = _Operator(search.hessian), len(search.starts)

    def ours(seed: int) -> Spectrum:
        return curvature.spectral_density(
            operator,
            key=jax.random.key(seed),
            num_probes=NUM_PROBES,
            num_products=NUM_PROBES * NUM_STEPS,
        )

    progress.tell("the density from many probes, the reference")
    reference = curvature.spectral_density(
        operator,
        key=jax.random.key(1000),
        num_probes=REFERENCE_PROBES,
        num_products=REFERENCE_PROBES * NUM_STEPS,
    )
    ours(0)  # compiles
    programs: dict[str, Callable[[int], Spectrum]] = {"spectral_density": ours}
    compile_seconds: dict[str, float | None] = {"spectral_density": None}
    skipped: list[Skipped] = []
    others: dict[str, Callable[[Search, str], Any]] = {
        "spectral_density, compiled loop": _compiled,
        "matfree, lax.map": functools.partial(_matfree, mapped=False),
        "matfree, vmap": functools.partial(_matfree, mapped=True),
    }
    for name, make in others.items():
        found = make(search, name)
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            programs[name], compile_seconds[name] = found
    errors: dict[str, list[float]] = {name: [] for name in programs}
    cpu: dict[str, list[float]] = {name: [] for name in programs}

    def timer(name: str) -> Callable[[], float]:
        seeds = iter(range(rounds))

        def run() -> float:
            seed = next(seeds)
            progress.tell(f"timing {name}")
            spectrum, seconds, cpu_seconds = timing.timed_cpu(lambda: programs[name](seed))
            cpu[name].append(cpu_seconds)
            errors[name].append(_distance(spectrum, reference))
            return seconds

        return run

    seconds = timing.interleave([timer(name) for name in programs], rounds)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "products": NUM_PROBES * NUM_STEPS,
            "milliseconds": timing.quartiles(1000 * times),
            "ratio": timing.quartiles(times / seconds[0]),
            **timing.cpu_quartiles(cpu[name], cpu["spectral_density"]),
            "error": float(np.median(errors[name])),
            "compile_seconds": compile_seconds[name],
        }
        for name, times in zip(programs, seconds, strict=True)
    ]
    return [*rows, *({"name": each.name, "note": each.note} for each in skipped)]


def _compiled(search: Search, name: str) -> tuple[Callable[[int], Spectrum], float] | Skipped:
    """Ours with the loop and the products in one program."""
    if (skipped := search.over_budget(name, NUM_PROBES * NUM_STEPS)) is not None:
        return skipped
    hessian = search.hessian
    like = jax.eval_shape(lambda: hessian.params)

    def rules(linears: list[Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        spectrum = curvature.spectral_density(
            lambda v: mean_product(linears, v, lambda linear, v: linear(v)),
            key=key,
            num_probes=NUM_PROBES,
            num_products=NUM_PROBES * NUM_STEPS,
            like=like,
            loop="graph",
        )
        return spectrum.nodes, spectrum.weights

    compiled, seconds = compiled_for(rules, hessian.linears, jax.random.key(0))

    def run(seed: int) -> Spectrum:
        nodes, weights = compiled(hessian.linears, jax.random.key(seed))
        return Spectrum(nodes, weights, NUM_PROBES * NUM_STEPS, blocks.dimension(like))

    return run, seconds


def _matfree(
    search: Search, name: str, mapped: bool
) -> tuple[Callable[[int], Spectrum], float] | Skipped:
    """Matfree's tridiagonal matrices of all probes, in one program, and their quadrature."""
    if importlib.util.find_spec("matfree") is None:
        return Skipped(name, "not installed: pip install matfree")
    if (skipped := search.over_budget(name, NUM_PROBES * NUM_STEPS)) is not None:
        return skipped
    from matfree import decomp

    linears, like = search.hessian.linears, jax.eval_shape(lambda: search.hessian.params)
    flat, unravel = ravel_pytree(search.hessian.params)
    tridiagonal = decomp.tridiag_sym(NUM_STEPS)

    def product(vector: jax.Array, linears: list[Any]) -> jax.Array:
        return ravel(mean_product(linears, unravel(vector), lambda linear, v: linear(v)))

    def quadrature(linears: list[Any], starts: PyTree) -> tuple[jax.Array, jax.Array]:
        def one(start: PyTree) -> tuple[jax.Array, jax.Array]:
            nodes, vectors = jnp.linalg.eigh(tridiagonal(product, ravel(start), linears).J_small)
            return nodes, vectors[0] ** 2

        return jax.vmap(one)(starts) if mapped else lax.map(one, starts)

    def starts_of(seed: int) -> PyTree:
        return random_block(jax.random.key(seed), like, NUM_PROBES, "rademacher")

    compiled, seconds = compiled_for(quadrature, linears, starts_of(0))

    def run(seed: int) -> Spectrum:
        nodes, weights = compiled(linears, starts_of(seed))
        return Spectrum(nodes, weights, NUM_PROBES * NUM_STEPS, len(flat))

    return run, seconds


def _distance(spectrum: Spectrum, reference: Spectrum) -> float:
    """The integral of the difference of two smeared densities."""
    low, high = float(jnp.min(reference.nodes)), float(jnp.max(reference.nodes))
    width = WIDTH * (high - low)
    grid = jnp.linspace(low - 5 * width, high + 5 * width, POINTS)
    one, other = (each.density(grid, width)[0] for each in (spectrum, reference))
    return float(jnp.sum(jnp.abs(one - other)) * (grid[1] - grid[0]))
