"""Rayleigh-Ritz in a block Krylov space: the refresh of trackers that power steps do not serve."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._numerics import divided, max_norm, power_of_two
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import Order, rounding_error, sorting_key


def block_krylov(
    products: Callable[[chex.ArrayTree], chex.ArrayTree],
    basis: chex.ArrayTree,
    *,
    depth: int,
    order: Order = "algebraic",
) -> tuple[jax.Array, chex.ArrayTree, jax.Array, jax.Array]:
    """Leading Ritz pairs of the span of ``U, A U, ..., A^(depth - 1) U``.

    The space does not change where the operator is shifted, so that both ends of the spectrum are
    approximated, each at the rate of the Chebyshev polynomial of degree ``depth - 1`` (Saad,
    *Numerical Methods for Large Eigenvalue Problems*, 2nd ed., section 6.7).

    Args:
      products: the symmetric operator on a block: maps leaves ``(m, *shape)`` to leaves of the same
        shapes.
      basis: orthonormal block ``U`` of ``m`` vectors, leaves ``(m, *shape)``; ``depth * m`` may be
        at most the dimension.
      depth: block products, at least 1.
      order: which eigenvalues lead.

    Returns:
      The ``m`` leading Ritz values, leading one first; the orthonormal block of their vectors; the
      smallest Ritz value of the space; and the residual norms ``|A v - theta v|``, ``(m,)``. All
      of them belong together, unlike those of a power sweep, whose values are those of the basis
      that came in.
    """
    num = jax.tree.leaves(basis)[0].shape[0]
    dtype = blocks.scalar_dtype(basis)
    projected = jnp.zeros((depth * num, depth * num), dtype)
    space = newest = basis
    for i in range(depth):
        images = jax.tree.map(lambda w, u: w.astype(u.dtype), products(newest), newest)
        # Squares neither overflow nor underflow beside a unit, which costs no digit.
        unit = power_of_two(max_norm(images)).astype(dtype)
        images = divided(images, unit)
        coefficients = blocks.inner(space, images)
        projected = lax.dynamic_update_slice(projected, unit * coefficients, (0, i * num))
        outside = _without(images, space, coefficients)
        if i + 1 < depth:
            newest = _orthonormal(outside, space, i * num)
            space = blocks.concatenate(space, newest)
    # Of the images of later rows, the parts in all earlier rows are known.
    upper = jnp.triu(projected)
    values, vectors = jnp.linalg.eigh(upper + jnp.triu(projected, 1).T)
    index = jnp.argsort(sorting_key(values, order))[:num]
    leading, vectors = values[index], vectors[:, index]
    # What a Ritz vector's image has outside of the space comes from the last block alone.
    last = blocks.combine(vectors[-num:].T, outside)
    squared = jax.vmap(lambda x: blocks.inner(blocks.as_block(x), blocks.as_block(x))[0, 0])(last)
    residual_norms = unit * jnp.sqrt(squared)
    return leading, blocks.combine(vectors.T, space), jnp.min(values), residual_norms


def _without(
    block: chex.ArrayTree, space: chex.ArrayTree, coefficients: jax.Array
) -> chex.ArrayTree:
    """A block less its components in a space."""
    return jax.tree.map(jnp.subtract, block, blocks.combine(coefficients.T, space))


def _orthonormal(block: chex.ArrayTree, space: chex.ArrayTree, first: int) -> chex.ArrayTree:
    """Orthonormal rows, orthogonal to a space, with the span of a block whose entries are about 1.

    Rows of which nothing is left but rounding errors are drawn anew, because the space may be
    exhausted.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), block)
    num = jax.tree.leaves(block)[0].shape[0]

    def norms(rows: chex.ArrayTree) -> jax.Array:
        return jnp.sqrt(jnp.diagonal(blocks.inner(rows, rows)))

    lengths = norms(block)
    lost = ~(lengths > rounding_error(jnp.ones((), lengths.dtype)))

    def refilled() -> chex.ArrayTree:
        random = blocks.random_block(jax.random.key(0), like, num, first)

        def fill(x: jax.Array, r: jax.Array) -> jax.Array:
            return jnp.where(lost.reshape(-1, *[1] * (x.ndim - 1)), r, x)

        return jax.tree.map(fill, block, random)

    block = blocks.orthonormalize(lax.cond(jnp.any(lost), refilled, lambda: block))
    # Twice is enough (Giraud et al., 2005).
    return blocks.orthonormalize(_without(block, space, blocks.inner(space, block)))
