"""Ritz pairs of a Krylov space of fixed size: Lanczos without restarts, for cold starts.

A cold start runs once and is compiled for that, so it is written to compile soon: with one copy of
the product, one pass of Gram-Schmidt and one small eigenproblem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accel._numerics import divided, max_norm, power_of_two
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import Order, score, sorting_key

_Process: TypeAlias = tuple[chex.ArrayTree, chex.ArrayTree, jax.Array]
_Passes: TypeAlias = tuple[chex.ArrayTree, jax.Array, jax.Array, jax.Array]
_MAX_PASSES = 4


def ritz_pairs(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    draw: Callable[[chex.Numeric], chex.ArrayTree],
    num_directions: int,
    *,
    num_products: int,
    order: Order = "algebraic",
) -> tuple[jax.Array, chex.ArrayTree, jax.Array]:
    """Leading Ritz pairs of a Krylov space, in the graph; every product is used.

    The basis is orthogonalized in full. Where the Krylov space is exhausted, it goes on from a
    random vector, which finds other copies of multiple eigenvalues. Neither accuracy nor missing
    copies are judged: that is what :func:`~optax_accel.curvature.lanczos` is for.

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
    start = _unit(draw(0))

    def step(index: jax.Array, process: _Process) -> _Process:
        basis, row, projected = process
        image = jax.tree.map(lambda w, x: w.astype(x.dtype), product(row), row)
        basis = jax.tree.map(functools.partial(_insert, index), basis, row)
        row, coefficients = _following(image, basis, draw(index + 1))
        return basis, row, _insert(index, projected, coefficients)

    empty = jnp.zeros((num_products, num_products), blocks.scalar_dtype(start))
    process = (blocks.zeros(num_products, start), start, empty)
    # An unsigned index, which cannot count from the end.
    basis, _, projected = lax.fori_loop(np.uint32(0), np.uint32(num_products), step, process)
    # An image has coefficients in its own and the earlier rows.
    values, vectors = jnp.linalg.eigh(projected + jnp.tril(projected, -1).T)
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
    return values, blocks.combine(vectors.T, basis), smallest


def _insert(index: jax.Array, block: jax.Array, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(block, row[None], index, 0)


def _following(
    image: chex.ArrayTree, basis: chex.ArrayTree, random: chex.ArrayTree
) -> tuple[chex.ArrayTree, jax.Array]:
    """The next row of the basis, and the coefficients of an image in the rows that there are.

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
    return _unit(vector), unit * coefficients


def _square(vector: chex.ArrayTree) -> jax.Array:
    block = blocks.as_block(vector)
    return blocks.inner(block, block)[0, 0]


def _unit(vector: chex.ArrayTree) -> chex.ArrayTree:
    factor = lax.rsqrt(_square(vector))
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), vector)
