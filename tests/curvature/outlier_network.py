"""A small network whose Hessian has one outlier per output, and its dense eigenpairs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_accel as oa

K = 3


def network(size: int = 6) -> tuple[Any, Any, Any]:
    """Inputs, targets and parameters of a network with one curvature outlier per output."""
    rng = np.random.default_rng(0)
    x = np.float32(0.5 * rng.normal(size=(64, size)) + 1)
    y = np.eye(K, dtype=np.float32)[np.argmax(x @ rng.normal(size=(size, K)), axis=1)]
    params = {
        "w": jnp.asarray(rng.normal(size=(size, 8)) / 3, jnp.float32),
        "v": jnp.asarray(rng.normal(size=(8, K)) / 4, jnp.float32),
    }
    return x, y, params


X, Y, PARAMS = jax.tree.map(jnp.asarray, network())
SIZE = optax.tree.size(PARAMS)


def objective(x: Any = X, y: Any = Y) -> oa.Objective:
    return oa.Objective(
        lambda p: jnp.tanh(x @ p["w"]) @ p["v"],
        lambda out: 0.5 * jnp.mean(jnp.sum((out - y) ** 2, axis=-1)),
    )


@jax.jit
def hessian(params: Any) -> jax.Array:
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda p: objective()(unravel(p)))(flat)


def exact(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenvalues and eigenvectors (rows) of the Hessian."""
    values, vectors = np.linalg.eigh(np.asarray(hessian(params), np.float64))
    return values[::-1][:K], vectors[:, ::-1][:, :K].T


def as_matrix(block: Any) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(block)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
