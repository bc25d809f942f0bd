"""Operators on a pytree with prescribed spectra, and what eigenpairs of theirs must be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 40
ROTATION, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(SIZE, SIZE)))
SPECTRA = {
    "geometric": 10.0 * 0.7 ** np.arange(SIZE),
    "outliers": np.concatenate([[50.0, 20.0, 10.0], np.linspace(1, -1, SIZE - 3)]),
    "negative": np.concatenate([[-30.0, 8.0, 6.0, 4.0], np.linspace(1, 0, SIZE - 4)]),
    "random": np.random.default_rng(3).normal(size=SIZE),
    "clustered": np.concatenate(
        [[5.0, 5.0 + 1e-4, 5.0 - 1e-3, 3, 3], np.linspace(1, -1, SIZE - 5)]
    ),
    "indefinite": np.concatenate([np.linspace(10, 1, 20), -np.linspace(11, 2, 20)]),
    "rank 2": np.concatenate([[4.0, 2.0], np.zeros(SIZE - 2)]),
}
LIKE = {"a": np.zeros((5, 6)), "b": np.zeros(10)}


def as_tree(flat):
    return {"a": flat[:30].reshape(5, 6), "b": flat[30:]}


def as_matrix(block):
    return np.concatenate([np.asarray(block["a"]).reshape(-1, 30), np.asarray(block["b"])], axis=1)


@functools.cache
def dense(spectrum):
    return (ROTATION * SPECTRA[spectrum]) @ ROTATION.T


@jax.jit
def multiply(matrix, vector):
    return as_tree(matrix @ jnp.concatenate([vector["a"].ravel(), vector["b"]]))


multiply_block = jax.jit(jax.vmap(multiply, in_axes=(None, 0)))


def operator(spectrum, function=multiply):
    """Of one compilation for all spectra."""
    return functools.partial(function, jnp.asarray(dense(spectrum)))


def like():
    return jax.tree.map(jnp.asarray, LIKE)


def leading(spectrum, order):
    values = np.linalg.eigvalsh(dense(spectrum))
    if order in ("smallest", "both"):
        both = np.stack([values[::-1], values], axis=1).ravel()[: len(values)]
        return values if order == "smallest" else both
    return values[np.argsort(-(values if order == "algebraic" else np.abs(values)))]


def check(pairs, spectrum, order, k, tolerance, *, one_sequence=False):
    """Accurate, orthonormal, bounded residuals, and an eigenvalue within each of them."""
    matrix, basis = dense(spectrum), as_matrix(pairs.basis)
    exact, values = leading(spectrum, order), np.asarray(pairs.eigenvalues)
    score = np.abs if order == "magnitude" else (lambda x: x)
    rounding = 1e-12 * np.abs(exact).max()
    assert values.shape == (k,)
    np.testing.assert_allclose(score(values), score(exact[:k]), rtol=tolerance, atol=rounding)
    np.testing.assert_allclose(basis @ basis.T, np.eye(k), atol=1e-12)
    residuals = np.linalg.norm(basis @ matrix - values[:, None] * basis, axis=1)
    if one_sequence:
        np.testing.assert_allclose(pairs.residual_norms, residuals, rtol=1e-4, atol=rounding)
    else:
        assert np.all(residuals <= (1 + 1e-4) * pairs.residual_norms + rounding)
        assert np.all(pairs.residual_norms <= 10 * residuals + rounding)
    nearest = np.abs(values[:, None] - exact[None]).min(axis=1)
    assert np.all(nearest <= residuals + rounding)
    assert pairs.smallest >= exact.min() - rounding
