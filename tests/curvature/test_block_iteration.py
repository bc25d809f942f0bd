"""Block iteration and its sweep on operators with prescribed spectra, against dense solutions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_accel.curvature import block_iteration, blocks, subspace_sweep
from tests.curvature.eigenproblems import (
    ROTATION,
    SPECTRA,
    as_matrix,
    as_tree,
    check,
    dense,
    like,
    multiply_block,
    operator,
)


def random_block(num):
    return blocks.random_basis(jax.random.key(0), like(), num)


def iterate(spectrum, num=6, **options):
    smallest = float(SPECTRA[spectrum].min())
    options = {"num_products": 6000, "tolerance": 1e-6, "smallest": smallest, **options}
    return block_iteration(
        operator(spectrum, multiply_block), random_block(num), 3, **{"loop": "host", **options}
    )


@pytest.mark.parametrize("order", ["algebraic", "magnitude"])
@pytest.mark.parametrize("degree", [0, 4])
@pytest.mark.parametrize("spectrum", ["geometric", "outliers", "negative", "rank 2", "clustered"])
def test_block_iteration_converges_to_the_tolerance(x64, order, degree, spectrum):
    pairs = iterate(spectrum, order=order, chebyshev_degree=degree)
    check(pairs, spectrum, order, 3, 3e-6)
    assert pairs.converged.all()


def test_the_filter_saves_products(x64):
    used = {}
    for degree in (0, 1, 5):
        pairs = iterate("random", chebyshev_degree=degree)
        check(pairs, "random", "algebraic", 3, 1e-6)
        assert (pairs.num_products - 6) % (6 * max(degree, 1)) == 0
        used[degree] = int(pairs.num_products)
    assert used[5] < used[1] < used[0]


def test_the_block_iteration_in_the_graph_takes_the_same_sweeps(x64):
    hosted = iterate("random", chebyshev_degree=3)
    graph = jax.jit(lambda: iterate("random", chebyshev_degree=3, loop="graph"))()
    assert hosted.num_products == graph.num_products > 24
    np.testing.assert_allclose(hosted.eigenvalues, graph.eigenvalues, rtol=1e-10)


def test_block_iteration_from_the_exact_basis_takes_one_sweep(x64):
    exact = jax.vmap(as_tree)(jnp.asarray(ROTATION.T[:6]))
    pairs = block_iteration(
        operator("outliers", multiply_block), exact, 3, num_products=100, tolerance=1e-8,
        loop="host",
    )  # fmt: skip
    assert pairs.num_products == 6
    check(pairs, "outliers", "algebraic", 3, 1e-12)


def test_block_iteration_keeps_to_its_budget_and_says_so(x64):
    pairs = iterate("random", num_products=17)
    assert pairs.num_products == 12
    assert not pairs.converged.all()
    none = block_iteration(multiply_block, random_block(6), 0, num_products=11)
    assert none.eigenvalues.shape == (0,)
    assert none.num_products == 0


def test_block_iteration_ends_when_a_product_is_not_finite():
    diagonal = jnp.array([1.0, jnp.nan, 2.0, 3.0, 0.0, 5.0, 6.0])
    start = blocks.random_basis(jax.random.key(0), diagonal, 2)
    pairs = block_iteration(lambda u: diagonal[None] * u, start, num_products=90, tolerance=1e-3)
    assert pairs.num_products == 2
    assert not pairs.converged.any()


@pytest.mark.parametrize("size", [1e-25, 1e20])
@pytest.mark.parametrize("degree", [0, 4])
def test_squares_neither_overflow_nor_underflow(degree, size):
    """In float32, from a start as large or small as the operator."""
    matrix, start = jnp.float32(dense("outliers")), optax.tree.cast(random_block(5), jnp.float32)
    settings = {"num_products": 600, "tolerance": 1e-3, "chebyshev_degree": degree, "loop": "host"}
    small, large = (
        block_iteration(
            functools.partial(multiply_block, factor * matrix),
            optax.tree.scale(factor, start),
            3,
            smallest=-factor,
            **settings,
        )
        for factor in (jnp.float32(1), jnp.float32(size))
    )
    assert large.converged.all()
    assert large.num_products == small.num_products
    np.testing.assert_allclose(large.eigenvalues / size, [50, 20, 10], rtol=1e-3)
    np.testing.assert_allclose(large.residual_norms / size, small.residual_norms, 0.01, 1e-3)
    overlap = as_matrix(large.basis) @ as_matrix(small.basis).T
    np.testing.assert_allclose(np.abs(overlap), np.eye(3), atol=1e-3)


def test_a_sweep_is_scaled_by_what_it_adds_up():
    """Not by Ritz values, which may vanish beside the products or beside a shift from before."""
    products = jax.vmap(lambda u: jnp.array([1e-30 * u[0] + u[1], u[0]]))
    _, basis, _ = subspace_sweep(products, jnp.array([[1.0, 0.0]]), shift=jnp.array(0.0))
    np.testing.assert_allclose(basis, [[0.0, 1.0]], atol=1e-6)
    _, basis, _ = subspace_sweep(
        lambda u: 1e-30 * products(u), jnp.array([[0.6, 0.8]]), shift=jnp.array(1.0)
    )
    np.testing.assert_allclose(basis, [[0.6, 0.8]], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_directions": 4}, "at most the rows of `start`, 3, got 4"),
        ({"num_products": 2}, "at least the rows of `start`, 3, got 2"),
        ({"chebyshev_degree": 3}, "pass `smallest`"),
        ({"chebyshev_degree": -1}, "chebyshev_degree"),
        ({"start": jnp.ones((9, 8))}, "9 rows of dimension 8"),
    ],
)
def test_block_iteration_refuses_wrong_input(changes, message):
    options = {"start": jnp.eye(3, 8), "num_products": 9, **changes}
    with pytest.raises(ValueError, match=message):
        block_iteration(lambda u: u, **options)


def test_sweeps_converge_to_the_algebraic_top_despite_large_negative_curvature(x64):
    sweep = jax.jit(
        functools.partial(
            subspace_sweep, operator("negative", multiply_block), shift=jnp.asarray(30.0)
        )
    )
    basis = random_block(3)
    for _ in range(300):
        values, basis, _ = sweep(basis=basis)
    np.testing.assert_allclose(values, [8, 6, 4], rtol=1e-6)
    top = np.linalg.eigh(dense("negative"))[1][:, -3:]
    np.testing.assert_allclose(np.linalg.norm(as_matrix(basis) @ top, axis=1), 1, rtol=1e-6)


def test_a_sweep_of_a_singular_operator_keeps_an_orthonormal_basis():
    diagonal = jnp.array([2.0, 0.0, 0.0, 0.0, 0.0])
    basis = blocks.random_basis(jax.random.key(0), diagonal, 3)
    sweep = jax.jit(
        lambda basis, scale: subspace_sweep(
            lambda u: scale * diagonal[None] * u, basis, shift=jnp.zeros(())
        )
    )
    for scale in (1.0, 0.0):
        for _ in range(3):
            _, basis, _ = sweep(basis, scale)
        np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.abs(basis[0, 0]), 1, rtol=1e-5)
