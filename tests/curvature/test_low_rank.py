"""Nyström approximations against the dense formula, in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel.curvature import blocks, nystrom
from optax_accel.curvature.estimates import orthonormal_rows, random_block
from tests.curvature.rotated_matrices import SIZE, operator, split


def rows(block):
    return np.concatenate([np.asarray(block["a"]).reshape(-1, 40), np.asarray(block["b"])], axis=1)


def test_it_is_the_approximation_of_the_formula(x64):
    product, rank = operator("outliers"), 12
    found = nystrom(product, rank, key=3)
    matrix, basis = np.asarray(product.matrix), rows(found.basis)
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, product.like))
    random = random_block(jax.random.key(3), like, rank, "gaussian")
    test = rows(orthonormal_rows(random))
    image = test @ matrix
    want = image.T @ np.linalg.pinv(test @ image.T, rcond=1e-13) @ image
    got = (basis.T * np.asarray(found.eigenvalues)) @ basis
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=1e-12)
    assert np.linalg.eigvalsh(matrix - got)[0] > -1e-9  # from below
    assert int(found.num_products) == rank
    # Products, and the preconditioner.
    vector = np.cos(np.arange(SIZE))
    np.testing.assert_allclose(rows(blocks.as_block(found(split(vector))))[0], got @ vector)
    smallest = float(found.eigenvalues[-1])
    inverse = np.eye(SIZE) - basis.T @ basis
    inverse += (smallest + 0.1) * (basis.T / (np.asarray(found.eigenvalues) + 0.1)) @ basis
    precondition = jax.jit(found.inverse(0.1))
    np.testing.assert_allclose(
        rows(blocks.as_block(precondition(split(vector))))[0], inverse @ vector, atol=1e-10
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_low_rank_matrices_are_found_exactly(x64, dtype, scale):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, SIZE)) * np.array([[10.0], [3.0], [1.0], [0.1]])
    matrix = (factor.T @ factor).astype(dtype)

    def product(vector):
        flat = jnp.concatenate([vector["a"].ravel(), vector["b"]])
        return split(jnp.asarray(matrix) @ flat * jnp.asarray(scale, dtype))

    like = jax.tree.map(lambda x: jnp.asarray(x, dtype), split(np.zeros(SIZE)))
    found = nystrom(product, 9, key=0, like=like)
    values = np.asarray(found.eigenvalues, np.float64) / scale
    basis = rows(found.basis)
    eps = np.finfo(dtype).eps
    error = 3000 * eps * np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(values[:4], np.linalg.eigvalsh(matrix)[:-5:-1], atol=error)
    np.testing.assert_allclose(values[4:], 0, atol=error)
    np.testing.assert_allclose((basis.T * values) @ basis, matrix, atol=error)
    np.testing.assert_allclose(basis @ basis.T, np.eye(9), atol=100 * eps)


def test_whole_spectra_and_zero(x64):
    product = operator("outliers")
    found = nystrom(product, SIZE, key=0)
    want = np.linalg.eigvalsh(product.matrix)[::-1]
    np.testing.assert_allclose(found.eigenvalues, np.maximum(want, 0), atol=1e-9)
    nothing = nystrom(lambda v: jax.tree.map(jnp.zeros_like, v), 3, key=0, like=product.like)
    np.testing.assert_array_equal(nothing.eigenvalues, np.zeros(3))
    vector = split(jnp.arange(1.0, SIZE + 1))
    assert not nothing(vector)["b"].any()
    np.testing.assert_array_equal(nothing.inverse(2.0)(vector)["b"], vector["b"])


def test_wrong_operators_and_ranks_are_refused(x64):
    product = operator("indefinite")
    with pytest.raises(ValueError, match=r"nystrom: the operator is not positive semidefinite"):
        nystrom(product, 20, key=0)
    inside = jax.jit(lambda key: nystrom(product, 20, key=key).eigenvalues)(jax.random.key(0))
    assert np.isnan(inside).all()
    with pytest.raises(ValueError, match=f"`rank` must be at most {SIZE}, .* got {SIZE + 1}"):
        nystrom(product, SIZE + 1, key=0)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        nystrom(product, 0, key=0)
    with pytest.raises(ValueError, match=r"`damping` must lie in \(0"):
        nystrom(operator("outliers"), 2, key=0).inverse(0.0)
    found = nystrom(operator("outliers"), 2, key=0)
    for product in (found, found.inverse(0.1)):
        with pytest.raises(ValueError, match=r"nystrom: the vector must be a tree .* got an array"):
            product(jnp.ones(SIZE))
