"""Lanczos on operators with prescribed spectra, against dense and ARPACK solutions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg

from optax_accel.curvature import _lanczos, lanczos
from tests.curvature.eigenproblems import (
    SIZE,
    SPECTRA,
    as_matrix,
    check,
    dense,
    leading,
    like,
    multiply,
    operator,
)


def solve(spectrum, *, order="algebraic", num_products=40, **options):
    return lanczos(
        operator(spectrum), like(), 3, key=jax.random.key(0), order=order,
        num_products=num_products, **{"loop": "host", **options},
    )  # fmt: skip


@jax.jit
def scale(diagonal, vector):
    return diagonal * vector


@pytest.mark.parametrize("order", ["algebraic", "magnitude"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lanczos_converges_to_the_tolerance(x64, order, spectrum):
    pairs = solve(spectrum, order=order, tolerance=1e-6, num_products=2 * SIZE)
    check(pairs, spectrum, order, 3, 2e-6)
    assert pairs.converged.all()
    assert pairs.num_products < SIZE or spectrum == "indefinite"


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lanczos_converges_to_the_tolerance_with_restarts(x64, spectrum):
    pairs = solve(spectrum, num_products=400, tolerance=1e-6, max_basis=10)
    check(pairs, spectrum, "algebraic", 3, 2e-6)
    assert pairs.converged.all()
    assert pairs.num_products < 400


def test_lanczos_agrees_with_arpack(x64):
    pairs = solve("negative", num_products=29)
    want, vectors = scipy.sparse.linalg.eigsh(dense("negative"), 3, which="LA")
    np.testing.assert_allclose(pairs.eigenvalues, want[::-1], rtol=1e-6)
    cosines = np.linalg.norm(as_matrix(pairs.basis) @ vectors, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)
    np.testing.assert_allclose(pairs.smallest, -30, rtol=1e-3)
    assert pairs.num_products == 29


def test_without_confirmation_it_stops_sooner(x64):
    sure = solve("outliers", tolerance=1e-6)
    quick = solve("outliers", tolerance=1e-6, confirm=False)
    check(quick, "outliers", "algebraic", 3, 2e-6, one_sequence=True)
    assert quick.converged.all()
    assert quick.num_products < sure.num_products
    # Of a double eigenvalue it has seen one copy only.
    copies = jnp.array([3.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    options = {"num_products": 6, "tolerance": 1e-3, "loop": "host", "key": 0}
    once = lanczos(functools.partial(scale, copies), copies, 2, confirm=False, **options)
    both = lanczos(functools.partial(scale, copies), copies, 2, **options)
    np.testing.assert_allclose(both.eigenvalues, [3, 3], rtol=1e-6)
    np.testing.assert_allclose(once.eigenvalues, [3, 1], rtol=1e-6)
    with pytest.raises(TypeError, match="`confirm` must be True or False"):
        solve("outliers", confirm="no")


def test_the_loop_in_the_graph_takes_the_same_steps(x64):
    options = {"num_products": 400, "tolerance": 1e-6, "max_basis": 10}
    hosted = solve("random", **options)
    graph = jax.jit(lambda: solve("random", loop="graph", **options))()
    assert hosted.num_products == graph.num_products > 10
    np.testing.assert_allclose(hosted.eigenvalues, graph.eigenvalues, rtol=1e-12)
    overlap = as_matrix(hosted.basis) @ as_matrix(graph.basis).T
    np.testing.assert_allclose(np.abs(overlap), np.eye(3), atol=1e-6)


def test_the_hosts_loop_compiles_once_for_all_operators(x64):
    solve("random", tolerance=1e-3)
    compiled = _lanczos._absorb._cache_size()
    solve("outliers", tolerance=1e-2)
    assert _lanczos._absorb._cache_size() == compiled


def test_lanczos_stops_early_and_says_when_it_has_not_converged(x64):
    loose, tight = (solve("geometric", tolerance=tolerance) for tolerance in (1e-2, 1e-10))
    assert loose.num_products < tight.num_products < 40
    check(loose, "geometric", "algebraic", 3, 1e-2)
    check(tight, "geometric", "algebraic", 3, 1e-10)
    cut = solve("geometric", tolerance=1e-10, num_products=5)
    assert cut.num_products == 5
    assert not cut.converged.any()


@pytest.mark.parametrize("seed", range(3))
def test_lanczos_does_not_take_a_smaller_eigenvalue_for_one_that_is_still_hidden(x64, seed):
    # The outliers of a CNN's Hessian: the last copies of the cluster show up late, when smaller
    # eigenvalues have long converged.
    outliers = [19.82, 14.74, 10.33, 9.41, 9.34, 9.25, 9.16, 9.15, 9.08, 9.07, 5.2]
    rest = np.concatenate([2.5 * 0.93 ** np.arange(60), -0.6 * 0.95 ** np.arange(60)])
    noise = 0.02 * np.random.default_rng(0).normal(size=5000)
    diagonal = jnp.asarray(np.concatenate([outliers, rest, noise]))
    pairs = lanczos(
        jax.jit(lambda v: diagonal * v), diagonal, 10, key=jax.random.key(seed), num_products=50,
        tolerance=1e-4, loop="host",
    )  # fmt: skip
    np.testing.assert_allclose(pairs.eigenvalues, outliers[:10], rtol=1e-4)
    assert pairs.converged.all()
    assert pairs.num_products <= 37


@pytest.mark.parametrize("spectrum", [np.ones(6), np.array([3.0, 3, 3, 1, 1, 0]), np.zeros(6)])
@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_lanczos_finds_multiplicities(x64, spectrum, tolerance):
    diagonal = jnp.asarray(spectrum)
    for k in (2, 6):
        pairs = lanczos(
            functools.partial(scale, diagonal), diagonal, k, key=jax.random.key(0), num_products=6,
            tolerance=tolerance, loop="host",
        )  # fmt: skip
        np.testing.assert_allclose(pairs.eigenvalues, np.sort(spectrum)[::-1][:k], atol=1e-12)
        np.testing.assert_allclose(pairs.basis @ pairs.basis.T, np.eye(k), atol=1e-12)


MULTIPLE = {
    "more than wanted": [5.0] * 5 + [3.0],
    "as many as wanted": [5.0] * 3 + [3.0],
    "the last one": [7.0, 6.0, 5.0, 5.0],
    "two": [5.0, 5.0, 3.0, 3.0, 3.0],
    "all negative": [-1.1, -1.1, -1.1, -1.2],
}


@pytest.mark.parametrize("spectrum", MULTIPLE)
def test_lanczos_counts_copies_of_an_eigenvalue(x64, spectrum):
    """A Krylov space has one direction of each, and a given start may have none."""
    rest = np.linspace(1.0, -1.0, 51 - len(MULTIPLE[spectrum]))  # all of one size compile once
    rest -= 3 if "negative" in spectrum else 0
    diagonal = jnp.asarray(np.concatenate([MULTIPLE[spectrum], rest]))
    blind = jnp.ones(diagonal.shape).at[0].set(0)
    for sign, order, start in ((1, "algebraic", None), (-1, "magnitude", blind)):
        if sign < 0 and "negative" in spectrum:
            continue
        pairs = lanczos(
            functools.partial(scale, sign * diagonal), diagonal, 3, key=jax.random.key(0),
            num_products=200, tolerance=1e-5, order=order, start=start, max_basis=20, loop="host",
        )  # fmt: skip
        want = np.asarray(sorted(MULTIPLE[spectrum], reverse=True)[:3])
        np.testing.assert_allclose(pairs.eigenvalues, sign * want, rtol=2e-5)
        np.testing.assert_allclose(pairs.basis @ pairs.basis.T, np.eye(3), atol=1e-12)
        assert pairs.converged.all()
        assert pairs.num_products < 100


def test_lanczos_does_not_vouch_for_copies_that_it_has_not_looked_for(x64):
    diagonal = jnp.asarray([5.0] * 4 + [3.0] + [0.0] * 40)
    pairs = lanczos(
        functools.partial(scale, diagonal), diagonal, 2, key=jax.random.key(0), num_products=3,
        tolerance=1e-5, loop="host",
    )  # fmt: skip
    np.testing.assert_allclose(pairs.eigenvalues, [5, 3], rtol=1e-10)
    assert pairs.num_products == 3
    assert not pairs.converged.any()


def test_a_low_rank_is_recognized_without_spending_the_budget(x64):
    diagonal = jnp.zeros(1000).at[:3].set(jnp.array([3.0, 2.0, -1.0]))
    pairs = lanczos(
        jax.jit(lambda v: diagonal * v), diagonal, 5, key=jax.random.key(0), num_products=500,
        tolerance=1e-4, loop="host",
    )  # fmt: skip
    np.testing.assert_allclose(pairs.eigenvalues, [3, 2, 0, 0, 0], atol=1e-12)
    assert pairs.converged.all()
    assert pairs.num_products <= 8


@pytest.mark.parametrize("k", [0, 4, 6])
def test_lanczos_returns_all_there_is(x64, k):
    diagonal = jnp.array([1.0, -2.0, 3.0, 0.5])
    pairs = lanczos(
        lambda v: diagonal * v, diagonal, k, key=jax.random.key(0), num_products=50, tolerance=1e-6
    )
    want = np.sort(diagonal)[::-1][: min(k, 4)]
    np.testing.assert_allclose(pairs.eigenvalues, want, rtol=1e-12)
    assert pairs.basis.shape == (min(k, 4), 4)
    assert pairs.num_products == min(k, 4)
    assert pairs.converged.shape == (min(k, 4),)
    assert pairs.converged.all()


@pytest.mark.parametrize("size", [1e-25, 1e20])
@pytest.mark.parametrize("spectrum", ["outliers", "rank 2"])
def test_squares_neither_overflow_nor_underflow(spectrum, size):
    """In float32, with restarts and from a start as large or small as the operator."""
    matrix, example = jnp.float32(dense(spectrum)), optax.tree.cast(like(), jnp.float32)
    start = jax.tree.map(jnp.ones_like, example)
    settings = {"key": 0, "num_products": 80, "tolerance": 1e-4, "max_basis": 10, "loop": "host"}
    small, large = (
        lanczos(
            functools.partial(multiply, factor * matrix),
            example,
            2,
            start=optax.tree.scale(factor, start),
            **settings,
        )
        for factor in (jnp.float32(1), jnp.float32(size))
    )
    assert large.converged.all()
    assert large.num_products == small.num_products
    np.testing.assert_allclose(large.eigenvalues / size, leading(spectrum, "algebraic")[:2], 1e-4)
    np.testing.assert_allclose(large.smallest / size, small.smallest, rtol=1e-3, atol=1e-4)
    overlap = as_matrix(large.basis) @ as_matrix(small.basis).T
    np.testing.assert_allclose(np.abs(overlap), np.eye(2), atol=1e-3)


@pytest.mark.parametrize("loop", ["graph", "host"])
def test_a_product_that_is_not_finite_ends_the_process(loop):
    diagonal = jnp.array([1.0, jnp.nan, 2.0, 3.0, 0.0, 5.0, 6.0])
    pairs = lanczos(
        lambda v: diagonal * v, diagonal, 2, key=jax.random.key(0), num_products=6, tolerance=1e-3,
        loop=loop,
    )  # fmt: skip
    assert pairs.num_products == 1
    assert not pairs.converged.any()
    assert not np.isfinite(pairs.eigenvalues).any()


def test_a_good_start_saves_products(x64):
    cold = solve("random", tolerance=1e-3)
    total = jax.tree.map(lambda b: b.sum(axis=0), cold.basis)
    warm = solve("random", tolerance=1e-3, start=total)
    assert warm.num_products < cold.num_products
    np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=2e-3)
    zero = solve("random", tolerance=1e-3, start=like())  # as good as none
    np.testing.assert_array_equal(zero.eigenvalues, cold.eigenvalues)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_directions": -1}, "num_directions"),
        ({"num_products": 1}, "at least `num_directions`, 2, got 1"),
        ({"order": "largest"}, "'algebraic', 'magnitude', 'smallest', 'both'; got 'largest'"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_basis": 4}, "at least `num_directions` \\+ 3, 5, got 4"),
        ({"loop": "scan"}, "'graph', 'host'; got 'scan'"),
    ],
)
def test_lanczos_refuses_wrong_input(changes, message):
    options = {"num_directions": 2, "num_products": 9, "key": jax.random.key(0), **changes}
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, jnp.ones(10), **options)


@pytest.mark.parametrize("loop", ["graph", "host"])
def test_sharded_parameters_stay_sharded(loop):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"a": jax.P(None, "d"), "b": jax.P("d")}
    diagonal = {"a": jnp.linspace(-1, 1, 48).reshape(3, 16), "b": jnp.linspace(2, 9, 8)}
    sharded = jax.tree.map(
        lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), diagonal, spec
    )

    def solve(diagonal):
        return lanczos(
            jax.jit(lambda v: jax.tree.map(jnp.multiply, diagonal, v)), diagonal, 2,
            key=jax.random.key(0), num_products=20, tolerance=1e-4, loop=loop,
        )  # fmt: skip

    if loop == "graph":
        solve = jax.jit(solve)
    one, many = solve(diagonal), solve(sharded)
    np.testing.assert_allclose(one.eigenvalues, many.eigenvalues, rtol=1e-5)
    np.testing.assert_allclose(one.eigenvalues, [9, 8], rtol=1e-3)
    assert one.num_products == many.num_products
    for name, leaf in many.basis.items():
        want = jax.NamedSharding(mesh, jax.P(None, *spec[name]))
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), name


def test_lanczos_takes_an_integer_seed_and_refuses_other_keys() -> None:
    diagonal = jnp.arange(3.0)

    def solve(key: object) -> jax.Array:
        pairs = lanczos(lambda v: diagonal * v, diagonal, 1, key=key, num_products=3)
        return pairs.basis

    np.testing.assert_array_equal(solve(0), solve(jax.random.key(0)))
    with pytest.raises(TypeError, match="`key` must be a PRNG key"):
        solve(None)
