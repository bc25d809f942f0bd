"""Block algebra on pytrees against plain matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel.curvature import blocks

RNG = np.random.default_rng(1)
TREE = {"a": RNG.normal(size=(5, 3, 4)), "b": [RNG.normal(size=(5,)), RNG.normal(size=(5, 7))]}


def as_matrix(block):
    leaves = jax.tree.leaves(block)
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


@pytest.fixture
def block(x64):
    return jax.tree.map(jnp.asarray, TREE)


def test_inner_and_combine(block):
    matrix = as_matrix(block)
    np.testing.assert_allclose(blocks.inner(block, block), matrix @ matrix.T, rtol=1e-13)
    coefficients = jnp.asarray(RNG.normal(size=(2, 5)))
    combined = blocks.combine(coefficients, block)
    np.testing.assert_allclose(as_matrix(combined), coefficients @ matrix, rtol=1e-12)
    one = blocks.combine(coefficients[0], block)
    np.testing.assert_allclose(
        as_matrix(blocks.as_block(one))[0], coefficients[0] @ matrix, rtol=1e-12
    )


def test_dimension_identity_and_rows(block):
    like = jax.tree.map(lambda x: x[0], block)
    assert blocks.dimension(like) == 20
    np.testing.assert_array_equal(as_matrix(blocks.identity(like)), np.eye(20))
    np.testing.assert_array_equal(as_matrix(blocks.rows(block, 1, 3)), as_matrix(block)[1:3])
    assert blocks.dimension({}) == 0


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_orthonormalize_keeps_the_span_and_the_order(x64, condition):
    factor, _ = np.linalg.qr(RNG.normal(size=(20, 5)))
    rows = (factor * np.geomspace(1, 1 / condition, 5)).T
    rows = rows + rows[0]  # nearly parallel, in the worst case
    got = as_matrix(blocks.orthonormalize(jnp.asarray(rows)))
    # Two rounds of CholeskyQR are orthogonal to rounding up to condition eps**-0.5 = 7e7.
    np.testing.assert_allclose(got @ got.T, np.eye(5), atol=1e-14 if condition < 1e7 else 1e-2)
    want, _ = np.linalg.qr(rows.T)
    np.testing.assert_allclose(np.abs(got[0] @ want[:, 0]), 1, rtol=1e-12)
    projected = got @ want @ want.T
    np.testing.assert_allclose(projected, got, atol=1e-6)


def test_orthonormalize_leaves_zero_rows(x64):
    got = np.asarray(blocks.orthonormalize(jnp.array([[0.0, 0.0], [3.0, 4.0]])))
    np.testing.assert_allclose(got, [[0, 0], [0.6, 0.8]], atol=1e-14)


def test_float32_blocks_of_bfloat16_accumulate_in_float32():
    block = {"x": jnp.full((1, 4096), 1.0, jnp.bfloat16)}
    gram = blocks.inner(block, block)
    assert gram.dtype == jnp.float32
    assert gram[0, 0] == 4096
