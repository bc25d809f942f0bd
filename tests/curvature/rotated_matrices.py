"""Dense matrices with prescribed spectra, as operators on a pytree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 60
ROTATION = np.linalg.qr(np.random.default_rng(4).normal(size=(SIZE, SIZE)))[0]
SPECTRA = {
    "random": np.random.default_rng(5).normal(size=SIZE),
    "clustered": np.repeat([8.0, 2.0, 0.0], [5, 15, 40]),
    "indefinite": np.concatenate([[-30.0, 20.0], np.linspace(-1, 1, SIZE - 2)]),
    "outliers": np.concatenate([[50.0, 20.0, 10.0], np.linspace(0, 1, SIZE - 3)]),
    "rank_deficient": np.concatenate([[5.0, -4.0, 3.0, 2.0], np.zeros(SIZE - 4)]),
}
LIKE = {"a": np.zeros((5, 8)), "b": np.zeros(20)}


def split(flat):
    return {"a": flat[..., :40].reshape(*flat.shape[:-1], 5, 8), "b": flat[..., 40:]}


class Matrix:
    """A dense matrix as an operator on a pytree with two leaves."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.like = jax.tree.map(lambda x: x.astype(matrix.dtype), LIKE)

    def __call__(self, vector):
        return split(self.matrix @ jnp.concatenate([vector["a"].ravel(), vector["b"]]))

    def block(self, block):
        rows = block["a"].reshape(-1, 40)
        return split(jnp.concatenate([rows, block["b"]], axis=1) @ self.matrix)


def operator(name, rotation=ROTATION):
    return Matrix(jnp.asarray((rotation * SPECTRA[name]) @ rotation.T))


def over_keys(estimate, num):
    """The estimates for many keys; inside jit, where the loops are unrolled."""
    return jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), num))
