"""JAX's own LOBPCG on pytrees."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_accel._arguments import check_product
from optax_accel._random import as_key
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import Eigenpairs, check_settings, is_accurate, no_pairs


def lobpcg(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    like: chex.ArrayTree,
    num_directions: int,
    *,
    num_products: int,
    key: chex.PRNGKey | None = None,
    start: chex.ArrayTree | None = None,
    tolerance: float | None = None,
) -> Eigenpairs:
    """The algebraically largest eigenpairs by JAX's own LOBPCG.

    A wrapper of ``jax.experimental.sparse.linalg.lobpcg_standard`` for comparison. That takes a
    matrix, so vectors are raveled into one array at the edge, in one dtype (sharded parameters are
    gathered), and its loop is part of the graph (convolutions in it run slowly on a CPU). Each of
    its iterations takes four products per direction. It is compiled anew for every ``product``.

    Args:
      product: the operator, on a pytree like ``like``; symmetric; traceable.
      like: pytree of arrays or shapes that gives the vectors' structure, shapes and dtypes.
      num_directions: how many eigenpairs to return; five times as many must be fewer than the
        dimension.
      num_products: budget; at least six per direction, for one iteration.
      key: PRNG key of a random start, or an integer seed; not needed with a ``start``.
      start: block of ``num_directions`` rows to start from; default: a random one.
      tolerance: relative residual norm, ``|A u - theta u| / theta``, at which to stop; ``None``
        (default): use the whole budget. The relative error of an eigenvalue is about the square of
        its relative residual norm.

    Returns:
      The :class:`Eigenpairs`; ``converged`` judges the relative residual norm, and ``smallest`` is
      the smallest of the eigenvalues.

    Raises:
      ValueError, TypeError: an argument outside its range; neither ``key`` nor ``start``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import lobpcg
      >>> diagonal = jnp.arange(12.0) ** 2
      >>> pairs = lobpcg(
      ...     lambda v: diagonal * v, diagonal, 2, key=jax.random.key(0), num_products=200)
      >>> [round(float(v)) for v in pairs.eigenvalues]
      [121, 100]

    References:
      Knyazev, `Toward the optimal preconditioned eigensolver
      <https://doi.org/10.1137/S1064827500366124>`_, SIAM J. Sci. Comput. 23, 2001.
    """
    from jax.experimental.sparse.linalg import lobpcg_standard

    check_product("product", product)
    check_settings(num_directions, num_products, "algebraic", tolerance, "graph")
    k, size = num_directions, blocks.dimension(like)
    if k == 0:
        return no_pairs(like)
    if 5 * k >= size:
        raise ValueError(
            f"JAX's LOBPCG needs 5 * `num_directions` < dimension, got {k} and {size}; use lanczos."
        )
    if num_products < 6 * k:
        raise ValueError(
            f"`num_products` must be at least 6 * `num_directions`, {6 * k}, got {num_products}: "
            "LOBPCG takes one product per direction to begin, four per iteration, one to end."
        )
    if start is None:
        if key is None:
            raise ValueError("lobpcg needs a `key` for a random start, or a `start`.")
        start = jax.vmap(lambda key: blocks.random(key, like))(jax.random.split(as_key(key), k))
    dtype = blocks.scalar_dtype(like)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), like)
    _, unravel = ravel_pytree(zero)

    def ravel(vector: chex.ArrayTree) -> jax.Array:
        return ravel_pytree(jax.tree.map(lambda x: x.astype(dtype), vector))[0]

    def one(vector: jax.Array) -> jax.Array:
        tree = jax.tree.map(lambda x, y: x.astype(y.dtype), unravel(vector), like)
        return ravel(product(tree))

    many = jax.vmap(one, in_axes=1, out_axes=1)
    # Its tolerance is relative to 10 * dimension * (theta + |A u|).
    relative = 0.0 if tolerance is None else tolerance / (20 * size)
    iterations = (num_products - 2 * k) // (4 * k)
    rows = jax.vmap(ravel)(start)
    values, columns, used = lobpcg_standard(many, rows.T, m=iterations, tol=relative)
    residuals = jnp.linalg.norm(many(columns) - columns * values[None], axis=0)
    basis = jax.vmap(unravel, in_axes=1)(columns)
    scale = jnp.max(jnp.abs(values))
    return Eigenpairs(
        eigenvalues=values,
        basis=jax.tree.map(lambda b, x: b.astype(x.dtype), basis, like),
        residual_norms=residuals,
        num_products=jnp.asarray(2 * k + 4 * k * used, jnp.int32),
        converged=is_accurate(values, residuals, tolerance, scale),
        smallest=values[-1],
    )
