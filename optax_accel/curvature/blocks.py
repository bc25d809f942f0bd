"""Linear algebra on blocks of vectors that are pytrees.

A *block* of ``k`` vectors is a pytree like the parameters whose leaves have one more, leading, axis
of length ``k``.  Nothing here flattens the parameters into one vector: every contraction runs leaf
by leaf and only ``k x k`` matrices leave it, so sharded parameters stay sharded.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._random import hash_bits, map_with_keys

PyTree = Any


def dimension(tree: PyTree) -> int:
    """Number of scalars in a pytree of arrays (or of shapes): the length of its vector."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def scalar_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype in which inner products of a block are accumulated (float32 if empty)."""
    leaves = jax.tree.leaves(tree)
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))


def inner(left: PyTree, right: PyTree) -> jax.Array:
    """All inner products of two blocks of ``k`` and ``m`` vectors: a ``(k, m)`` matrix."""
    dtype = scalar_dtype((left, right))

    def leaf_products(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = tuple(range(1, a.ndim))
        return lax.dot_general(
            a,
            b,
            ((axes, axes), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    products = jax.tree.leaves(jax.tree.map(leaf_products, left, right))
    if not products:
        return jnp.zeros((0, 0), dtype)
    return functools.reduce(jnp.add, products)


def combine(coefficients: jax.Array, block: PyTree) -> PyTree:
    """Linear combinations of a block's ``k`` vectors.

    Args:
      coefficients: ``(k,)`` for one vector or ``(m, k)`` for a block of ``m``.
      block: leaves ``(k, *shape)``.

    Returns:
      Leaves ``(*shape)`` or ``(m, *shape)``, of the block's dtype.
    """

    def leaf_combination(b: jax.Array) -> jax.Array:
        return lax.dot_general(
            coefficients.astype(b.dtype),
            b,
            (((coefficients.ndim - 1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )

    return jax.tree.map(leaf_combination, block)


def as_block(vector: PyTree) -> PyTree:
    """A vector as a block of one."""
    return jax.tree.map(lambda x: x[None], vector)


def concatenate(first: PyTree, second: PyTree) -> PyTree:
    """The rows of two blocks, one after the other."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def rows(block: PyTree, start: int, stop: int) -> PyTree:
    """The vectors ``start`` to ``stop - 1`` of a block."""
    return jax.tree.map(lambda b: b[start:stop], block)


def random(key: jax.Array, like: PyTree) -> PyTree:
    """A vector of uniform entries in [-1, 1), with the shapes and dtypes of ``like``."""

    def leaf(leaf_key: jax.Array, x: Any) -> jax.Array:
        return (hash_bits(leaf_key, x.shape).astype(x.dtype) * 2.0**-31 - 1).astype(x.dtype)

    return map_with_keys(leaf, key, like)


def identity(like: PyTree) -> PyTree:
    """The block of all unit vectors, ``dimension(like)`` rows. For tiny problems only."""
    size = dimension(like)
    leaves, treedef = jax.tree.flatten(like)
    parts, offset = [], 0
    for leaf in leaves:
        count = math.prod(leaf.shape)
        part = jnp.eye(size, count, -offset, dtype=leaf.dtype)
        parts.append(part.reshape(size, *leaf.shape))
        offset += count
    return jax.tree.unflatten(treedef, parts)


def orthonormalize(block: PyTree, rounds: int = 2) -> PyTree:
    """Orthonormal rows with the span of the given ones, by scaled, shifted Cholesky QR.

    One round needs two passes over the block and one ``k x k`` factorization (and, for sharded
    leaves, one ``k x k`` all-reduce), against the serial column sweeps of Householder QR.  Two
    rounds give orthogonality to machine precision for condition numbers up to about ``eps ** -0.5``
    (Yamamoto et al., Roundoff error analysis of CholeskyQR2, ETNA 44, 2015). Rows are
    scaled to unit length first, so that only their angles count, and a shift of a few ``k * eps``
    keeps the factorization alive for dependent rows (Fukaya et al., `Shifted Cholesky QR
    <https://doi.org/10.1137/18M1218212>`_, 2020).  Rows are processed in order: the first keep
    their directions.

    Args:
      block: leaves ``(k, *shape)``.
      rounds: Cholesky QR sweeps.

    Returns:
      A block of the same shape. A zero row stays zero.
    """
    for remaining in reversed(range(rounds)):
        gram = inner(block, block)
        num = gram.shape[0]
        norms = jnp.sqrt(jnp.diagonal(gram))
        scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
        correlation = scale[:, None] * gram * scale[None, :]
        # The shift shortens the rows a little, so the last round goes without: it meets rows that
        # are nearly orthonormal, and a one in place of the zero pivot of a zero row.
        shift = jnp.where(norms > 0, 11 * num * jnp.finfo(gram.dtype).eps * (remaining > 0), 1)
        factor = jnp.linalg.cholesky(correlation + jnp.diag(shift.astype(gram.dtype)))
        transform = lax.linalg.triangular_solve(factor, jnp.diag(scale), left_side=True, lower=True)
        block = combine(transform, block)
    return block
