"""Matrix-free eigensolvers for symmetric operators on pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accel.curvature import blocks

PyTree = Any
Order = Literal["algebraic", "magnitude"]


class Eigenpairs(NamedTuple):
    """What an eigensolver found.

    Attributes:
      eigenvalues: Ritz values ``(k,)``, the leading one first.
      basis: orthonormal block of the Ritz vectors, leaves ``(k, *shape)``, in the same order.
      residual_norms: ``|A u - theta u|`` of each pair, ``(k,)``. For a symmetric operator there is
        an eigenvalue within this distance of the Ritz value.
      num_products: operator-vector products used; int32 scalar.
      converged: ``(k,)``, whether the estimated relative error of each eigenvalue is within the
        tolerance.
      smallest: the smallest Ritz value seen, an estimate of the bottom of the spectrum.
    """

    eigenvalues: jax.Array
    basis: PyTree
    residual_norms: jax.Array
    num_products: jax.Array
    converged: jax.Array
    smallest: jax.Array


def sort_spectrum(
    eigenvalues: jax.Array, eigenvectors: jax.Array, order: Order
) -> tuple[jax.Array, jax.Array]:
    """Eigenpairs (columns) sorted from the leading one down, by value or by magnitude."""
    score = eigenvalues if order == "algebraic" else jnp.abs(eigenvalues)
    index = jnp.argsort(-score)
    return eigenvalues[index], eigenvectors[:, index]


def lanczos(
    product: Callable[[PyTree], PyTree],
    like: PyTree,
    num_directions: int,
    *,
    key: jax.Array,
    num_products: int,
    order: Order = "algebraic",
) -> Eigenpairs:
    """Leading eigenpairs by the Lanczos process with full reorthogonalization.

    The start is random; when the Krylov space is exhausted (multiple eigenvalues, low rank) the
    process goes on from a fresh random vector orthogonal to it, so that multiplicities are found.

    Args:
      product: the operator, on a pytree like ``like``; symmetric.
      like: pytree of arrays or shapes that gives the vectors' structure, shapes and dtypes.
      num_directions: how many leading eigenpairs to return; at most ``num_products``.
      key: PRNG key of the start.
      num_products: length of the process (and number of products), at most the dimension.
      order: ``"algebraic"``: the largest eigenvalues; ``"magnitude"``: the largest in magnitude.

    Returns:
      The :class:`Eigenpairs`.

    Raises:
      ValueError: ``num_directions > num_products`` or ``num_products`` exceeds the dimension.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import lanczos
      >>> diagonal = jnp.array([4.0, -5.0, 1.0, 2.0])
      >>> pairs = lanczos(
      ...     lambda v: diagonal * v, diagonal, 2, key=jax.random.key(0), num_products=4)
      >>> [round(float(v), 4) for v in pairs.eigenvalues], round(float(pairs.smallest), 4)
      ([4.0, 2.0], -5.0)

    References:
      Golub, Van Loan, *Matrix Computations*, 4th ed., sections 10.1 and 10.3.
    """
    size = blocks.dimension(like)
    if not num_directions <= num_products <= size:
        raise ValueError(
            f"lanczos: need num_directions <= num_products <= dimension, got {num_directions}, "
            f"{num_products}, {size}."
        )
    start_key, restart_key = jax.random.split(key)
    dtype = blocks.scalar_dtype(like)
    tolerance = 10 * jnp.finfo(dtype).eps

    def orthogonalize(vector: PyTree, basis: PyTree) -> tuple[PyTree, jax.Array]:
        # Classical Gram-Schmidt, twice: "twice is enough" (Giraud et al. 2005).
        total = jnp.zeros((num_products,), dtype)
        for _ in range(2):
            coefficients = blocks.inner(basis, blocks.as_block(vector))[:, 0]
            vector = jax.tree.map(jnp.subtract, vector, blocks.combine(coefficients, basis))
            total = total + coefficients
        return vector, total

    def norm(vector: PyTree) -> jax.Array:
        block = blocks.as_block(vector)
        return jnp.sqrt(blocks.inner(block, block)[0, 0])

    def scaled(vector: PyTree, factor: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), vector)

    def put(basis: PyTree, vector: PyTree, i: Any) -> PyTree:
        return jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, x, i, 0), basis, vector)

    def step(i: Any, carry: tuple[PyTree, jax.Array, jax.Array, jax.Array]) -> Any:
        basis, diagonal, off_diagonal, scale = carry
        current = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, keepdims=False), basis)
        residual, coefficients = orthogonalize(product(current), basis)
        beta = norm(residual)
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(coefficients[i]), beta))
        exhausted = beta <= tolerance * scale

        def restart() -> PyTree:
            fresh = blocks.random(jax.random.fold_in(restart_key, i), like)
            vector, _ = orthogonalize(fresh, basis)
            return scaled(vector, 1 / norm(vector))

        def proceed() -> PyTree:
            return scaled(residual, 1 / jnp.where(exhausted, 1, beta))

        following = lax.cond(exhausted, restart, proceed)
        # The last step has no successor: the index is clamped and its own row written back.
        last = i == num_products - 1
        following = jax.tree.map(lambda f, c: jnp.where(last, c, f), following, current)
        basis = put(basis, following, jnp.minimum(i + 1, num_products - 1))
        diagonal = diagonal.at[i].set(coefficients[i])
        off_diagonal = off_diagonal.at[i].set(jnp.where(exhausted, 0, beta))
        return basis, diagonal, off_diagonal, scale

    first = blocks.random(start_key, like)
    first = scaled(first, 1 / norm(first))
    basis = jax.tree.map(lambda x: jnp.zeros((num_products, *x.shape), x.dtype), first)
    zeros = jnp.zeros((num_products,), dtype)
    carry = (put(basis, first, 0), zeros, zeros, jnp.zeros((), dtype))
    carry = lax.fori_loop(0, num_products, step, carry)
    basis, diagonal, off_diagonal, _ = carry
    off = off_diagonal[: num_products - 1]
    tridiagonal = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    smallest = values[0]
    values, vectors = sort_spectrum(values, vectors, order)
    values, vectors = values[:num_directions], vectors[:, :num_directions]
    residual_norms = off_diagonal[-1] * jnp.abs(vectors[-1])
    return Eigenpairs(
        eigenvalues=values,
        basis=blocks.orthonormalize(blocks.combine(vectors.T, basis), rounds=1),
        residual_norms=residual_norms,
        num_products=jnp.asarray(num_products, jnp.int32),
        converged=residual_norms <= jnp.sqrt(jnp.finfo(dtype).eps) * jnp.abs(values),
        smallest=smallest,
    )


def subspace_sweep(
    products: Callable[[PyTree], PyTree],
    basis: PyTree,
    *,
    shift: jax.Array,
    order: Order = "algebraic",
) -> tuple[jax.Array, PyTree, jax.Array]:
    """One warm-started step of block power iteration with Rayleigh-Ritz: one block product.

    The products with an orthonormal basis ``U`` give the Ritz pairs of its span and, rotated into
    them, the next basis: the orthonormalized rows of ``Q^T (H + shift) U``.

    Args:
      products: the symmetric operator on a block.
      basis: orthonormal block of ``m`` vectors.
      shift: scalar added to the spectrum so that its top leads in magnitude (order
        ``"algebraic"``); the negative of the smallest eigenvalue, or 0.
      order: as in :func:`lanczos`.

    Returns:
      ``(eigenvalues, basis, smallest)``: the Ritz values ``(m,)`` of the basis that came in
      (accurate to second order in its error), the new basis with rows in their order, and the
      smallest Ritz value.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import subspace_sweep
      >>> diagonal = jnp.array([4.0, 2.0, 1.0])
      >>> basis, shift = jnp.array([[0.8, 0.6, 0.0]]), jnp.array(0.0)
      >>> values, basis, _ = subspace_sweep(lambda u: diagonal[None] * u, basis, shift=shift)
      >>> [round(float(x), 3) for x in (values[0], *basis[0])]
      [3.28, 0.936, 0.351, 0.0]

    References:
      Stewart, *Matrix Algorithms II: Eigensystems*, section 5.1 (subspace iteration).
    """
    images = products(basis)
    projected = blocks.inner(basis, images)
    projected = (projected + projected.T) / 2
    values, vectors = jnp.linalg.eigh(projected)
    smallest = values[0]
    values, vectors = sort_spectrum(values, vectors, order)
    # A little of the old basis keeps directions that the operator annihilates: a singular operator
    # leaves them where they were instead of mapping them to noise.
    magnitude = jnp.max(jnp.abs(values), initial=0)
    magnitude = jnp.where(magnitude > 0, magnitude, 1)
    keep = shift + jnp.sqrt(jnp.finfo(values.dtype).eps) * magnitude
    shifted = jax.tree.map(lambda w, u: w + keep.astype(u.dtype) * u, images, basis)
    return values, blocks.orthonormalize(blocks.combine(vectors.T, shifted)), smallest
