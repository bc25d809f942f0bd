"""What a monitor of the curvature measures with products: the functions behind the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_accel._numerics import norm, vdot
from optax_accel.curvature import blocks
from optax_accel.curvature._krylov import krylov_space
from optax_accel.curvature.estimates import random_block
from optax_accel.curvature.tracking import block_product, loops_slowly

Product = Callable[[chex.ArrayTree], chex.ArrayTree]


class Spectrum(NamedTuple):
    """Both ends of a spectrum, as a Krylov space shows them.

    Attributes:
      leading: the largest Ritz values, ``(k,)``, descending.
      leading_residuals: their residual norms ``|A v - theta v|``, ``(k,)``.
      leading_vectors: the orthonormal block of their vectors.
      smallest: the smallest Ritz values, ``(num_smallest,)``, ascending.
      smallest_residuals: their residual norms.
      start: the sum of all these vectors, from which the next space starts.
    """

    leading: jax.Array
    leading_residuals: jax.Array
    leading_vectors: chex.ArrayTree
    smallest: jax.Array
    smallest_residuals: jax.Array
    start: chex.ArrayTree


def unit(vector: chex.ArrayTree, like: chex.ArrayTree) -> tuple[chex.ArrayTree, jax.Array]:
    """A vector divided by its length, in the dtypes of the linear algebra, and its length."""
    length = norm(vector)
    divisor = jnp.where(length > 0, length, 1)
    scaled = jax.tree.map(
        lambda v, x: (
            (v.astype(jnp.float32) / divisor.astype(jnp.float32)).astype(x.dtype)
            if x.dtype.itemsize < 8
            else v.astype(x.dtype) / divisor.astype(x.dtype)
        ),
        vector,
        like,
    )
    return scaled, length


def quotients(
    product: Product, vectors: list[chex.ArrayTree], num_probes: int, key: jax.Array, like: Any
) -> tuple[jax.Array, jax.Array]:
    r"""Rayleigh quotients of unit vectors, and Hutchinson's estimate of the trace.

    Args:
      product: the symmetric operator.
      vectors: vectors of length 1, or zero, whose quotient is 0.
      num_probes: random signs :math:`z` over which :math:`z^T A z` is averaged (Hutchinson 1989).
      key: key of the signs.
      like: shapes and dtypes of a vector.

    Returns:
      The quotients, one for each vector, and the trace, NaN without probes.
    """
    block = jax.tree.map(lambda *rows: jnp.stack(rows), *vectors)
    if num_probes:
        signs = random_block(key, like, num_probes, "rademacher")
        block = blocks.concatenate(block, signs)
    images = block_product(product, like)(block)
    num = len(vectors) + num_probes
    rows = [blocks.rows(tree, i, i + 1) for i in range(num) for tree in (block, images)]
    values = jnp.stack([vdot(rows[2 * i], rows[2 * i + 1]) for i in range(num)])
    mean = jnp.mean(values[len(vectors) :]) if num_probes else jnp.full((), jnp.nan)
    return values[: len(vectors)], mean


def alignment(vector: chex.ArrayTree, basis: chex.ArrayTree) -> jax.Array:
    """The length of a unit vector's projection onto an orthonormal block, in [0, 1]."""
    coefficients = blocks.inner(basis, blocks.as_block(vector))
    return jnp.sqrt(jnp.minimum(jnp.sum(coefficients**2), 1))


def spectrum_ends(
    product: Product,
    before: chex.ArrayTree,
    gradient: chex.ArrayTree,
    num_leading: int,
    num_smallest: int,
    *,
    num_products: int,
    key: chex.PRNGKey,
    like: chex.ArrayTree,
) -> Spectrum:
    """Both ends of the spectrum of a symmetric operator from one Lanczos process.

    A Krylov space approximates both ends at once (Parlett, *The Symmetric Eigenvalue Problem*,
    section 12.4; Saad, *Numerical Methods for Large Eigenvalue Problems*, 2nd ed., section 6.6),
    as well as its start is rich in them. Our reading: the start is the sum of three unit vectors,
    what the last record found, the gradient and a random vector. The first makes a restart of it
    where the operator has hardly moved; the gradient lies mostly within the leading eigenvectors
    (Gur-Ari et al., `Gradient descent happens in a tiny subspace
    <https://arxiv.org/abs/1812.04754>`_, 2018); the last has a component in whatever came up since.

    Args:
      product: the operator.
      before: the ``start`` of the last record, or zeros.
      gradient: in the operator's coordinates; zeros are allowed.
      num_leading: k, how many of the largest eigenvalues, at least 1.
      num_smallest: how many of the smallest ones.
      num_products: dimension of the space, at least as many and at most the dimension.
      key: key of the random vectors.
      like: shapes and dtypes of a vector.

    Returns:
      The :class:`Spectrum`.
    """
    packing = blocks.Packing(like)

    def packed_product(packed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return packing.pack(product(packing.unpack(packed)))

    def draw(number: chex.Numeric) -> tuple[jax.Array, ...]:
        return tuple(x[0] for x in packing.random_block(key, like, 1, number))

    units = [unit(vector, like)[0] for vector in (before, gradient, packing.unpack(draw(0)))]
    start = jax.tree.map(lambda a, b, c: a + b + c, *units)
    space = krylov_space(
        packed_product,
        packing.pack(start),
        draw,
        num_products=num_products,
        unroll=loops_slowly(product, like),
    )
    values, vectors = jnp.linalg.eigh(space.projected)
    ascending = np.arange(num_products)
    order = np.concatenate([ascending[::-1][:num_leading], ascending[:num_smallest]])
    values, vectors = values[order], vectors[:, order]
    residuals = space.remainder * jnp.abs(vectors[-1])
    found = blocks.combine(vectors.T, space.basis)
    mixed = blocks.combine(jnp.ones((len(order),), values.dtype), found)
    return Spectrum(
        leading=values[:num_leading],
        leading_residuals=residuals[:num_leading],
        leading_vectors=packing.unpack(blocks.rows(found, 0, num_leading), axis=1),
        smallest=values[num_leading:],
        smallest_residuals=residuals[num_leading:],
        start=packing.unpack(mixed),
    )
