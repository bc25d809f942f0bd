"""What a monitor of the curvature measures with products: the functions behind the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._numerics import norm, vdot
from optax_accel.curvature import blocks
from optax_accel.curvature.estimates import random_block
from optax_accel.curvature.tracking import (
    CurvatureTracker,
    Eigenspace,
    accept,
    block_product,
    cold_start_products,
    load,
    solve,
    vector_like,
)

Product = Callable[[chex.ArrayTree], chex.ArrayTree]


class GivenProduct:
    """What a tracker asks an objective for: the product with its curvature, linearized before."""

    def __init__(self, product: Product):
        self._product = product

    def hessian(self, params: chex.ArrayTree) -> Product:
        """The product, at whichever parameters it was linearized."""
        del params
        return self._product

    gauss_newton = hessian


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


def alignment(vector: chex.ArrayTree, space: Eigenspace) -> jax.Array:
    """The length of a unit vector's projection onto a basis, in [0, 1]."""
    coefficients = blocks.inner(space.basis, blocks.as_block(vector))
    return jnp.sqrt(jnp.minimum(jnp.sum(coefficients**2), 1))


def follow_smallest(
    tracker: CurvatureTracker,
    space: Eigenspace,
    product: Product,
    params: chex.ArrayTree,
    cold: bool | None,
) -> Eigenspace:
    """The lower end of the spectrum: Lanczos at first, then block steepest descent.

    The smallest eigenvalues lie next to the bulk, so that a power iteration would follow them far
    too slowly. A warm step is Rayleigh-Ritz on the span of the basis and of its residuals, that of
    LOBPCG without a memory of the last step (Knyazev, `Toward the optimal preconditioned
    eigensolver <https://doi.org/10.1137/S1064827500366124>`_, 2001, section 4), at three products
    for each direction.

    Args:
      tracker: the dtypes, the seed and the budget of the cold start.
      space: the space before; its eigenvalues ascend.
      product: the symmetric operator.
      params: the parameters.
      cold: static; whether to start anew; None decides by ``space.ready``.

    Returns:
      The space after a step.
    """
    num = space.eigenvalues.shape[0]
    like, packing = vector_like(tracker, params), blocks.Packing(params)

    def negative(vector: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(jnp.negative, product(vector))

    def start(old: Eigenspace) -> Eigenspace:
        budget = cold_start_products(tracker, params, num)
        values, basis, *_ = solve(tracker, negative, params, packing, num, num_products=budget)
        valid = jnp.ones((), bool)
        return accept(tracker, old, -values, basis, None, valid, packing)

    def descend(old: Eigenspace) -> Eigenspace:
        rows = block_product(product, like)
        basis = load(tracker, old.basis, params)
        random = blocks.random_basis(jax.random.key(tracker.seed), like, num)
        basis = jax.tree.map(lambda b, r: jnp.where(old.ready, b, r), basis, random)
        images = rows(basis)
        projected = blocks.combine(blocks.inner(images, basis), basis)
        residuals = jax.tree.map(jnp.subtract, images, projected)
        both = blocks.orthonormalize(blocks.concatenate(basis, residuals))
        ritz = blocks.inner(both, rows(both))
        # A residual of zero stays zero, and its row must not pass for a direction.
        lengths = jnp.diagonal(blocks.inner(both, both))
        top = 4 * jnp.max(jnp.abs(ritz)) + 1
        ritz = (ritz + ritz.T) / 2 + jnp.diag(jnp.where(lengths > 0.5, 0, top))
        values, vectors = jnp.linalg.eigh(ritz)
        basis = blocks.combine(vectors[:, :num].T, both)
        valid = jnp.ones((), bool)
        return accept(tracker, old, values[:num], basis, None, valid)

    if cold is None:
        return lax.cond(space.ready, descend, start, space)
    return start(space) if cold else descend(space)
