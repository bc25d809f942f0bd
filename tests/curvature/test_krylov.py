"""Ritz pairs of a Krylov space, on operators with prescribed spectra, against dense solutions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel.curvature import blocks
from optax_accel.curvature._krylov import ritz_pairs
from tests.curvature.eigenproblems import SIZE, SPECTRA, as_matrix, dense, leading, like, multiply


@functools.partial(jax.jit, static_argnames=("num_products", "order"))
def solve(matrix, num_products, order="algebraic"):
    def draw(number):
        vectors = blocks.random_block(jax.random.key(0), like(), 1, number)
        return jax.tree.map(lambda x: x[0].astype(matrix.dtype), vectors)

    return ritz_pairs(
        lambda vector: multiply(matrix, vector), draw, 3, num_products=num_products, order=order
    )


def check_pairs(matrix, values, basis, rtol):
    rows = as_matrix(basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=rtol)
    np.testing.assert_allclose(
        rows @ matrix, values[:, None] * rows, atol=rtol * np.abs(matrix).max() * SIZE
    )


@pytest.mark.parametrize("order", ["algebraic", "magnitude"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_whole_space_is_exact(spectrum, order):
    """The Krylov space of "rank 2" is exhausted after three vectors, of "clustered" one earlier."""
    matrix = jnp.float32(dense(spectrum))
    values, basis, smallest = solve(matrix, SIZE, order)
    scale = np.abs(SPECTRA[spectrum]).max()
    np.testing.assert_allclose(values, leading(spectrum, order)[:3], atol=3e-6 * scale)
    np.testing.assert_allclose(smallest, SPECTRA[spectrum].min(), atol=3e-6 * scale)
    check_pairs(np.asarray(matrix), np.asarray(values), basis, 2e-6)


def test_a_few_products_find_what_leads():
    values, *_ = solve(jnp.float32(dense("outliers")), 12)
    np.testing.assert_allclose(values, [50, 20, 10], rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1.0, 1e25])
@pytest.mark.parametrize("num_products", [10, SIZE - 1, SIZE])
def test_copies_of_an_eigenvalue_at_any_scale(scale, num_products):
    """Each vector after the first one is random, up to the last direction that there is."""
    matrix = scale * np.eye(SIZE, dtype=np.float32)
    matrix[0, 0] = 0
    values, basis, _ = solve(jnp.asarray(matrix), num_products)
    np.testing.assert_allclose(values, np.full(3, scale), rtol=2e-6)
    rows = as_matrix(basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad):
    matrix = dense("random").astype(np.float32)
    matrix[3, 3] = bad
    assert not np.isfinite(solve(jnp.asarray(matrix), 10)[0]).any()
