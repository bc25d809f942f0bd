"""Ritz pairs of a Krylov space of fixed size: Lanczos without restarts.

For cold starts and for records of the curvature, which are run seldom: it is written to compile
soon, with one copy of the product, one pass of Gram-Schmidt and one small eigenproblem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accel._numerics import divided, max_norm, power_of_two
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import Order, score, sorting_key

_Process: TypeAlias = tuple[chex.ArrayTree, chex.ArrayTree, jax.Array, jax.Array]
_Passes: TypeAlias = tuple[chex.ArrayTree, jax.Array, jax.Array, jax.Array]
_MAX_PASSES = 4


class KrylovSpace(NamedTuple):
    """An orthonormal basis of a Krylov space and the operator in it.

    Attributes:
      basis: leaves ``(m, *shape)``.
      projected: the operator between the rows of the basis, ``(m, m)``, symmetric.
      remainder: the length of what the image of the last row has outside of the space. A Ritz
        vector with the coefficients ``s`` has the residual norm ``remainder * |s[-1]|`` (Parlett,
        *The Symmetric Eigenvalue Problem*, section 13.2), and within it of the Ritz value there is
        an eigenvalue (theorem 4.5.1 there).
    """

    basis: chex.ArrayTree
    projected: jax.Array
    remainder: jax.Array


def krylov_space(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    start: chex.ArrayTree,
    draw: Callable[[chex.Numeric], chex.ArrayTree],
    *,
    num_products: int,
    unroll: bool = False,
) -> KrylovSpace:
    """The span of a vector and its images, in the graph; every product is used.

    The basis is orthogonalized in full. Where the Krylov space is exhausted, it goes on from a
    random vector, which finds other copies of multiple eigenvalues.

    Args:
      product: the symmetric operator on a vector.
      start: the first vector, not zero; it decides structure, shapes and dtypes.
      draw: gives the random vector of a number from 1 on.
      num_products: dimension of the space, at most that of the vectors; so many vectors are kept.
      unroll: static; whether the products are written out one after the other instead of a loop,
        which compiles longer, but XLA runs convolutions slowly inside loops on a CPU.

    Returns:
      The :class:`KrylovSpace`.
    """
    start = _unit(start)

    def step(index: jax.typing.ArrayLike, process: _Process) -> _Process:
        basis, row, projected, _ = process
        image = jax.tree.map(lambda w, x: w.astype(x.dtype), product(row), row)
        basis = jax.tree.map(functools.partial(_insert, index), basis, row)
        row, coefficients, length = _following(image, basis, draw(index + 1))
        return basis, row, _insert(index, projected, coefficients), length

    dtype = blocks.scalar_dtype(start)
    empty = jnp.zeros((num_products, num_products), dtype)
    process = (blocks.zeros(num_products, start), start, empty, jnp.zeros((), dtype))
    # An unsigned index, which cannot count from the end.
    if unroll:
        for index in range(num_products):
            process = step(np.uint32(index), process)
    else:
        process = lax.fori_loop(np.uint32(0), np.uint32(num_products), step, process)
    basis, _, projected, remainder = process
    # An image has coefficients in its own and the earlier rows.
    lower = jnp.tril(projected)
    return KrylovSpace(basis, lower + jnp.tril(projected, -1).T, remainder)


def ritz_pairs(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    draw: Callable[[chex.Numeric], chex.ArrayTree],
    num_directions: int,
    *,
    num_products: int,
    order: Order = "algebraic",
) -> tuple[jax.Array, chex.ArrayTree, jax.Array]:
    """Leading Ritz pairs of the Krylov space of a random vector.

    Neither accuracy nor missing copies are judged: that is what
    :func:`~optax_accel.curvature.lanczos` is for.

    Args:
      product: the symmetric operator on a vector.
      draw: gives the random vector of a number, 0 for the start; it decides structure, shapes and
        dtypes.
      num_directions: how many pairs are returned, at most ``num_products``.
      num_products: dimension of the space, at most that of the vectors; so many vectors are kept.
      order: which eigenvalues lead: ``"algebraic"`` (default) the largest, ``"magnitude"`` the
        largest in magnitude, ``"smallest"`` the smallest, ``"both"`` the largest and the smallest
        in turn.

    Returns:
      The Ritz values ``(k,)``, leading one first, the orthonormal block of the Ritz vectors, and
      the smallest Ritz value.
    """
    space = krylov_space(product, draw(0), draw, num_products=num_products)
    values, vectors = jnp.linalg.eigh(space.projected)
    smallest = values[0]
    if order == "magnitude":
        index = jnp.argsort(score(values, order))
        values, vectors = values[index], vectors[:, index]
    if order in ("algebraic", "magnitude"):
        values, vectors = values[::-1], vectors[:, ::-1]
    else:
        index = jnp.argsort(sorting_key(values, order))
        values, vectors = values[index], vectors[:, index]
    values, vectors = values[:num_directions], vectors[:, :num_directions]
    return values, blocks.combine(vectors.T, space.basis), smallest


def _insert(index: jax.typing.ArrayLike, block: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(block, row[None], index, 0)


def _following(
    image: chex.ArrayTree, basis: chex.ArrayTree, random: chex.ArrayTree
) -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
    """The next row of the basis; an image's coefficients in the rows; the length of its rest.

    The row is the image's direction orthogonal to the basis, by classical Gram-Schmidt, again where
    a pass left less than half of the vector (Giraud et al., 2005). In the first one a random vector
    as long as a rounding error is added: where the Krylov space is exhausted, it or rounding errors
    are all that is left.
    """
    dtype = blocks.scalar_dtype(image)
    # Squares neither overflow nor underflow beside a unit, which costs no digit.
    unit = power_of_two(max_norm(image)).astype(dtype)
    noise = _unit(random)

    def one_pass(state: _Passes) -> _Passes:
        vector, first, passes, _ = state
        coefficients = blocks.inner(basis, blocks.as_block(vector))[:, 0]
        added = jnp.where(passes == 0, jnp.finfo(dtype).eps, 0)
        vector = jax.tree.map(
            lambda x, part, r: x - part + added.astype(x.dtype) * r,
            vector,
            blocks.combine(coefficients, basis),
            noise,
        )
        # The largest entry of an image is at least one unit, unless all of them are zero.
        least = jnp.where(passes == 0, 0.25, 0)
        enough = _square(vector) > jnp.maximum(jnp.sum(coefficients**2) / 3, least)
        return vector, jnp.where(passes == 0, coefficients, first), passes + 1, enough

    zeros = jnp.zeros((jax.tree.leaves(basis)[0].shape[0],), dtype)
    state = (divided(image, unit), zeros, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    vector, coefficients, *_ = lax.while_loop(
        lambda state: ~state[3] & (state[2] < _MAX_PASSES), one_pass, state
    )
    return _unit(vector), unit * coefficients, unit * jnp.sqrt(_square(vector))


def _square(vector: chex.ArrayTree) -> jax.Array:
    block = blocks.as_block(vector)
    return blocks.inner(block, block)[0, 0]


def _unit(vector: chex.ArrayTree) -> chex.ArrayTree:
    factor = lax.rsqrt(_square(vector))
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), vector)
