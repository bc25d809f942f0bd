"""Statistics of layers against explicit matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_accel as oa
from optax_accel.natural_gradient import factors as stats
from optax_accel.natural_gradient.inverses import Eigen
from tests.helpers import tree_allclose
from tests.natural_gradient.test_finding import (
    CASES,
    IMAGES,
    PATCHES,
    TOKENS,
    N,
    captured,
    captured_case,
    loss_slope,
    marked,
    tree,
)


@pytest.mark.parametrize("name", marked(name for name in CASES if name != "time first"))
def test_second_moments_of_each_example(x64, name):
    """Of scales and shifts, and EKFAC's in the standard basis: those of separate gradients."""
    predict, _, _ = CASES[name]
    params, network, outputs, values, gradients, _ = captured_case(name)

    def second_moments(params: Any, slope: np.ndarray) -> list[jax.Array]:
        jacobian = jax.jacrev(lambda p: N * jnp.sum((predict(p) * slope).reshape(N, -1), axis=1))
        return jax.tree.leaves(jax.tree.map(lambda g: jnp.mean(g**2, axis=0), jacobian(params)))

    def statistics(block: Any, values: Any, gradients: Any) -> Any:
        if not block.kronecker:
            return stats.diagonal_statistics(block, values, gradients, N, jnp.float64)
        slices = (block.num_slices,) if block.stacked else ()
        basis = stats.Kronecker(
            *(
                Eigen(jnp.ones((*slices, n)), jnp.broadcast_to(jnp.eye(n), (*slices, n, n)))
                for n in block.matrix_shape
            )
        )
        tied = block.kind == "tied"
        of_basis = stats.tied_eigen_statistics if tied else stats.eigen_statistics
        return of_basis(block, values, gradients, N, basis, jnp.float64, lambda t: t)

    @jax.jit
    def both(params: Any, *read: Any) -> Any:
        moments, pairs = second_moments(params, loss_slope(outputs)), []
        for block in network.blocks:
            if block.kronecker and block.kind == "embedding":
                continue
            leaves = {i: moments[i] for i in block.leaves}
            want = block.to_matrix(leaves) if block.kronecker else leaves[block.leaves[0]]
            pairs.append((statistics(block, *read), want))
        return pairs

    for got, want in both(params, values, gradients):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_factors_of_a_convolution(x64):
    """Against patches as JAX extracts them; every position is an example's position."""
    predict, shapes, _ = CASES["strides and dilations"]
    params = tree(**shapes)
    network, outputs, values, gradients, _ = captured(predict, params)
    (block,) = network.blocks
    patches = lax.conv_general_dilated_patches(
        jnp.asarray(IMAGES),
        filter_shape=(3, 2),
        window_strides=(2, 1),
        padding=((1, 2), (0, 3)),
        lhs_dilation=(1, 2),
        rhs_dilation=(2, 1),
        dimension_numbers=PATCHES,
    )
    rows = patches.reshape(-1, 3, 6).swapaxes(1, 2).reshape(-1, 18)  # features: channel first
    got = stats.kronecker_statistics(
        block, values, gradients, jnp.ones(N), stats.side_shapes(block, 99), jnp.float64
    )
    np.testing.assert_allclose(got.inputs, rows.T @ rows / len(rows), rtol=1e-12)
    slopes = N * loss_slope(outputs).reshape(-1, 4)
    np.testing.assert_allclose(got.outputs, slopes.T @ slopes / N, rtol=1e-12)
    assert len(rows) == len(slopes)


def test_factors_of_an_embedding(x64):
    """A is the share of each token."""
    predict, shapes, _ = CASES["embedding"]
    network, outputs, values, gradients, _ = captured(predict, tree(**shapes))
    (block,) = network.blocks
    got = stats.kronecker_statistics(
        block, values, gradients, jnp.ones(N), stats.side_shapes(block, 99), jnp.float64
    )
    np.testing.assert_allclose(got.inputs, np.bincount(TOKENS.ravel()) / TOKENS.size)
    slopes = N * loss_slope(outputs).reshape(-1, 3)
    np.testing.assert_allclose(got.outputs, slopes.T @ slopes / N, rtol=1e-12)


@pytest.mark.parametrize("name", ["tied embedding", "tied autoencoder"])
def test_factors_of_a_tied_matrix(x64, name):
    """The best Kronecker product for the sum of those of the uses, by a decomposition."""
    _, network, _, values, gradients, _ = captured_case(name)
    (block,) = (block for block in network.blocks if block.kind == "tied")
    (rows, columns), weights = block.matrix_shape, jnp.ones(N)
    terms = stats.tied_statistics(
        block, values, gradients, weights, stats.side_shapes(block, 99), jnp.float64
    )
    total = np.zeros((rows, rows, columns, columns))
    for (part, turned), term in zip(block.parts(), terms, strict=True):
        shapes = stats.side_shapes(part, 99)
        alone = stats.kronecker_statistics(part, values, gradients, weights, shapes, jnp.float64)
        left, right = reversed(alone) if turned else alone
        left = np.diag(left) if left.ndim == 1 else left
        tree_allclose(term, stats.Kronecker(left, right), rtol=1e-12)
        total += np.einsum("ij,kl->ijkl", left, right)
    matrix = total.reshape(rows**2, columns**2)
    u, s, v = np.linalg.svd(matrix)
    assert s[1] > 1e-3 * s[0]
    got = stats.nearest_kronecker(terms)
    product = np.outer(got.inputs, got.outputs)
    np.testing.assert_allclose(product, s[0] * np.outer(u[:, 0], v[0]), atol=1e-12 * s[0])
    assert min(np.linalg.eigvalsh(side).min() for side in got) > -1e-12


def test_nearest_kronecker_product_of_diagonal_and_empty_terms():
    """Diagonals of large factors, terms of very different sizes, and no curvature at all."""
    big = stats.Kronecker(1e9 * jnp.array([1.0, 2.0]), jnp.eye(2))
    small = stats.Kronecker(1e-9 * jnp.array([1.0, 0.0]), jnp.ones((2, 2)))
    got = stats.nearest_kronecker([big, small])
    want = np.outer(big.inputs, big.outputs)
    np.testing.assert_allclose(np.outer(got.inputs, got.outputs), want, rtol=1e-6, atol=1)
    zero = jax.tree.map(jnp.zeros_like, big)
    tree_allclose(stats.nearest_kronecker([zero, zero]), zero)


def test_indices_too_narrow_for_their_table():
    """A byte cannot hold the number of rows, by which a negative index would be marked."""
    tokens = np.array([[0, 1], [1, 127]], np.int8)
    numbers = lax.GatherDimensionNumbers((2,), (0,), (0,))
    objective = oa.Objective(
        lambda table: lax.gather(table, tokens[..., None], numbers, (1, 2), mode="clip").mean(1),
        lambda outputs: jnp.mean(outputs**2),
    )
    table = jnp.ones((200, 2))
    transform = oa.scale_by_ekfac(objective, estimator="ggn", decay=0.0)
    _, state = transform.update(table, transform.init(table), table, value_fn=objective)
    want = np.bincount(tokens.ravel(), minlength=200) / tokens.size
    np.testing.assert_allclose(state.factors[0].inputs, want, rtol=1e-6)
