"""Eigensolvers on operators with prescribed spectra, against dense and ARPACK solutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from optax_accel.curvature import blocks, lanczos, subspace_sweep

SIZE = 40
ROTATION, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(SIZE, SIZE)))
SPECTRA = {
    "geometric": 10.0 * 0.7 ** np.arange(SIZE),
    "outliers": np.concatenate([[50.0, 20.0, 10.0], np.linspace(1, -1, SIZE - 3)]),
    "negative": np.concatenate([[-30.0, 8.0, 6.0, 4.0], np.linspace(1, 0, SIZE - 4)]),
}


def operator(spectrum):
    matrix = jnp.asarray((ROTATION * spectrum) @ ROTATION.T)

    def product(vector):  # a pytree with two leaves
        flat = matrix @ jnp.concatenate([vector["a"].ravel(), vector["b"]])
        return {"a": flat[:30].reshape(5, 6), "b": flat[30:]}

    return np.asarray(matrix), product


LIKE = {"a": np.zeros((5, 6)), "b": np.zeros(10)}


def random_basis(like, num):
    rows = jax.vmap(lambda key: blocks.random(key, like))(jax.random.split(jax.random.key(0), num))
    return blocks.orthonormalize(rows)


def as_matrix(block):
    return np.concatenate([np.asarray(block["a"]).reshape(-1, 30), np.asarray(block["b"])], axis=1)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("order", ["algebraic", "magnitude"])
def test_lanczos_agrees_with_arpack(x64, spectrum, order):
    matrix, product = operator(SPECTRA[spectrum])
    like = jax.tree.map(jnp.asarray, LIKE)
    values, basis, *_, smallest = lanczos(
        product, like, 3, key=jax.random.key(0), num_products=30, order=order
    )
    want, vectors = scipy.sparse.linalg.eigsh(
        matrix, 3, which={"algebraic": "LA", "magnitude": "LM"}[order]
    )
    index = np.argsort(-want if order == "algebraic" else -np.abs(want))
    np.testing.assert_allclose(values, want[index], rtol=1e-6)
    cosines = np.linalg.norm(as_matrix(basis) @ vectors, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)
    np.testing.assert_allclose(as_matrix(basis) @ as_matrix(basis).T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(smallest, min(SPECTRA[spectrum]), atol=0.05 * abs(want).max())


@pytest.mark.parametrize("spectrum", [np.ones(6), np.array([3.0, 3, 3, 1, 1, 0]), np.zeros(6)])
def test_lanczos_finds_multiplicities(x64, spectrum):
    diagonal = jnp.asarray(spectrum)
    values, basis, *_ = lanczos(
        lambda v: diagonal * v, diagonal, 6, key=jax.random.key(0), num_products=6
    )
    np.testing.assert_allclose(values, np.sort(spectrum)[::-1], atol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-12)


def test_sweeps_converge_to_the_algebraic_top_despite_large_negative_curvature(x64):
    matrix, product = operator(SPECTRA["negative"])
    products = jax.jit(jax.vmap(product))
    basis = random_basis(jax.tree.map(jnp.asarray, LIKE), 3)
    for _ in range(300):
        values, basis, _ = subspace_sweep(products, basis, shift=jnp.asarray(30.0))
    np.testing.assert_allclose(values, [8, 6, 4], rtol=1e-6)
    top = np.linalg.eigh(matrix)[1][:, -3:]
    np.testing.assert_allclose(np.linalg.norm(as_matrix(basis) @ top, axis=1), 1, rtol=1e-6)


def test_a_sweep_of_a_singular_operator_keeps_an_orthonormal_basis():
    diagonal = jnp.array([2.0, 0.0, 0.0, 0.0, 0.0])
    basis = random_basis(diagonal, 3)
    for scale in (1.0, 0.0):
        for _ in range(3):
            _, basis, _ = subspace_sweep(
                jax.vmap(lambda v, s=scale: s * diagonal * v), basis, shift=jnp.zeros(())
            )
        np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.abs(basis[0, 0]), 1, rtol=1e-5)
