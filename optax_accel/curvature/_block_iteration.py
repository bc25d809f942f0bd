"""Block subspace iteration on pytrees, and its single step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_choice, check_integer, check_product
from optax_accel._numerics import divided, max_norm, norm, power_of_two
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import (
    Eigenpairs,
    Loop,
    PowerOrder,
    check_settings,
    is_accurate,
    no_pairs,
    run_times,
    run_while,
    score,
)


def subspace_sweep(
    products: Callable[[chex.ArrayTree], chex.ArrayTree],
    basis: chex.ArrayTree,
    *,
    shift: jax.Array,
    order: PowerOrder = "algebraic",
) -> tuple[jax.Array, chex.ArrayTree, jax.Array]:
    """One warm-started step of block power iteration with Rayleigh-Ritz: one block product.

    The products with an orthonormal basis ``U`` give the Ritz pairs of its span and, rotated into
    them, the next basis: the orthonormalized rows of ``Q^T (H + shift) U``.

    Args:
      products: the symmetric operator on a block: maps leaves ``(m, *shape)`` to leaves of the same
        shapes.
      basis: orthonormal block of ``m`` vectors, leaves ``(m, *shape)``.
      shift: scalar added to the spectrum so that its top leads in magnitude (order
        ``"algebraic"``); the negative of the smallest eigenvalue, or 0.
      order: which eigenvalues lead: ``"algebraic"`` (default) the largest, ``"magnitude"`` the
        largest in magnitude.

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
    check_product("products", products)
    check_choice("order", order, ("algebraic", "magnitude"))
    values, basis, _ = power_step(products(basis), basis, lambda _: shift, order)
    return values, basis, jnp.min(values)


def power_step(
    images: chex.ArrayTree,
    basis: chex.ArrayTree,
    shift_of: Callable[[jax.Array], jax.Array],
    order: PowerOrder,
) -> tuple[jax.Array, chex.ArrayTree, jax.Array]:
    """What :func:`subspace_sweep` does with the products, by a shift that they decide.

    Args:
      images: the products with the rows of the basis, of the same shapes.
      basis: orthonormal block of ``m`` vectors, leaves ``(m, *shape)``.
      shift_of: gives the shift for the Ritz values ``(m,)``.
      order: which eigenvalues lead.

    Returns:
      The Ritz values of the basis that came in, the new basis, and the shift.
    """
    values, vectors = _rayleigh_ritz(basis, images, order)
    shift = shift_of(values)
    shifted = _power(basis, images, values, shift)
    return values, blocks.orthonormalize(shifted, rotation=vectors.T), shift


def _rayleigh_ritz(
    basis: chex.ArrayTree, images: chex.ArrayTree, order: PowerOrder
) -> tuple[jax.Array, jax.Array]:
    projected = blocks.inner(basis, images)
    values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    index = jnp.argsort(-score(values, order))
    return values[index], vectors[:, index]


def _residual_norms(values: jax.Array, basis: chex.ArrayTree, images: chex.ArrayTree) -> jax.Array:
    """``|w - theta u|`` of each value theta and rows u and w of a basis and its images."""

    def residual_norm(theta: jax.Array, u: chex.ArrayTree, w: chex.ArrayTree) -> jax.Array:
        return norm(jax.tree.map(lambda u, w: w.astype(theta.dtype) - theta * u, u, w))

    return jax.vmap(residual_norm)(values, basis, images)


def ritz_residual_norms(
    basis: chex.ArrayTree, images: chex.ArrayTree, order: PowerOrder
) -> jax.Array:
    """The residual norms of the Ritz pairs that :func:`subspace_sweep` finds in a basis.

    Args:
      basis: orthonormal block of ``m`` vectors, leaves ``(m, *shape)``.
      images: the products with its rows, of the same shapes.
      order: which eigenvalues lead.

    Returns:
      ``|A v - theta v|`` of each pair, ``(m,)``, the leading one first.
    """
    values, vectors = _rayleigh_ritz(basis, images, order)
    basis, images = (blocks.combine(vectors.T, block) for block in (basis, images))
    return _residual_norms(values, basis, images)


def _power(
    basis: chex.ArrayTree, images: chex.ArrayTree, values: jax.Array, shift: jax.Array
) -> chex.ArrayTree:
    """``(H + shift) U``, with a little more of the old basis, up to a power of two.

    A little of the old basis keeps directions that the operator annihilates: a singular operator
    leaves them where they were instead of mapping them to noise. The power of two keeps the squares
    of the entries, which orthonormalization takes, from overflow and underflow.
    """
    magnitude = jnp.max(jnp.abs(values), initial=0)
    magnitude = jnp.where(magnitude > 0, magnitude, 1)
    keep = shift + jnp.sqrt(jnp.finfo(values.dtype).eps) * magnitude
    unit = power_of_two(jnp.maximum(max_norm(images).astype(keep.dtype), jnp.abs(keep)))
    keep = keep / unit
    return jax.tree.map(lambda w, u: w + keep.astype(u.dtype) * u, divided(images, unit), basis)


class _Sweep(NamedTuple):
    """A block iteration.

    Attributes:
      basis: the Ritz vectors, a block of ``m``.
      images: their products.
      eigenvalues: the Ritz values, ``(m,)``.
      residual_norms: ``(m,)``.
      converged: ``(k,)``.
      num_products: products so far.
      smallest: smallest Ritz value seen.
    """

    basis: chex.ArrayTree
    images: chex.ArrayTree
    eigenvalues: jax.Array
    residual_norms: jax.Array
    converged: jax.Array
    num_products: jax.Array
    smallest: jax.Array


@functools.partial(jax.jit, static_argnames=("num_directions", "order"))
def _assess(
    basis: chex.ArrayTree,
    images: chex.ArrayTree,
    num_products: jax.Array,
    smallest: jax.Array,
    tolerance: Any,
    *,
    num_directions: int,
    order: PowerOrder,
) -> _Sweep:
    """Ritz pairs of a basis with their residuals, from its images."""
    images = jax.tree.map(lambda w, u: w.astype(u.dtype), images, basis)
    values, vectors = _rayleigh_ritz(basis, images, order)
    basis, images = (blocks.combine(vectors.T, block) for block in (basis, images))

    residuals = _residual_norms(values, basis, images)
    # Eigenvalues outside the block lie, as far as the block can tell, beyond its last Ritz value.
    scores = score(values, order)
    gap = scores - scores[-1]
    errors = residuals * jnp.minimum(1, residuals / jnp.where(gap > residuals, gap, residuals))
    errors = jnp.where(residuals > 0, errors, 0)
    k, scale = num_directions, jnp.max(jnp.abs(values))
    return _Sweep(
        basis=basis,
        images=images,
        eigenvalues=values,
        residual_norms=residuals,
        converged=is_accurate(values[:k], errors[:k], tolerance, scale),
        num_products=num_products + values.shape[0],
        smallest=jnp.minimum(smallest, jnp.min(values)),
    )


def _filter_interval(sweep: _Sweep, order: PowerOrder) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Centre and half width of the unwanted interval, and the distance of the top from the centre.

    The ratio of the half width to the distance, sigma, sets the scaling.
    """
    values = sweep.eigenvalues
    if order == "algebraic":
        low, high = sweep.smallest, values[-1]
    else:
        low, high = -jnp.abs(values[-1]), jnp.abs(values[-1])
    centre, radius = (low + high) / 2, (high - low) / 2
    scale = jnp.maximum(jnp.max(jnp.abs(values)), jnp.abs(low))
    radius = jnp.maximum(radius, jnp.sqrt(jnp.finfo(values.dtype).eps) * scale)
    radius = jnp.where(radius > 0, radius, 1)
    distance = values[0] - centre
    return centre, radius, jnp.where(jnp.abs(distance) > radius, distance, radius)


@functools.partial(jax.jit, static_argnames="order")
def _filter_start(
    sweep: _Sweep, *, order: PowerOrder
) -> tuple[chex.ArrayTree, chex.ArrayTree, jax.Array]:
    """The filter's first two polynomials, the second from the products at hand, and sigma."""
    centre, radius, distance = _filter_interval(sweep, order)
    # Not sigma / radius, which XLA computes as radius / (distance * radius).
    factor = 1 / distance
    first = jax.tree.map(
        lambda w, u: (w - centre.astype(u.dtype) * u) * factor.astype(u.dtype),
        sweep.images,
        sweep.basis,
    )
    return sweep.basis, first, radius / distance


@functools.partial(jax.jit, static_argnames="order")
def _filter_step(
    sweep: _Sweep,
    state: tuple[chex.ArrayTree, chex.ArrayTree, jax.Array],
    images: chex.ArrayTree,
    *,
    order: PowerOrder,
) -> tuple[chex.ArrayTree, chex.ArrayTree, jax.Array]:
    """One degree of the three-term recurrence, scaled to stay of order one at the top."""
    centre, radius, distance = _filter_interval(sweep, order)
    before, block, sigma = state
    following = 1 / (2 * (distance / radius) - sigma)

    def leaf(w: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        factor, weight = 2 * following / radius, sigma * following
        image = w.astype(y.dtype) - centre.astype(y.dtype) * y
        return factor.astype(y.dtype) * image - weight.astype(y.dtype) * z

    return block, jax.tree.map(leaf, images, block, before), following


@functools.partial(jax.jit, static_argnames="order")
def _next_basis(sweep: _Sweep, filtered: chex.ArrayTree, *, order: PowerOrder) -> chex.ArrayTree:
    """The next orthonormal basis: of the filtered block, or by a power step without one."""
    if filtered is None:
        shift = jnp.maximum(-sweep.smallest, 0) * (order == "algebraic")
        filtered = _power(sweep.basis, sweep.images, sweep.eigenvalues, shift)
    return blocks.orthonormalize(filtered)


def block_iteration(
    products: Callable[[chex.ArrayTree], chex.ArrayTree],
    start: chex.ArrayTree,
    num_directions: int | None = None,
    *,
    num_products: int,
    order: PowerOrder = "algebraic",
    tolerance: float | None = None,
    chebyshev_degree: int = 0,
    smallest: Any = None,
    loop: Loop = "graph",
) -> Eigenpairs:
    """Leading eigenpairs by block subspace iteration with Rayleigh-Ritz, from a start basis.

    Each sweep multiplies the whole block. It converges by the ratio of the first eigenvalue outside
    the block to the ones inside, so it pays to have more rows than wanted directions. From a good
    basis, such as that of a little earlier in training, few sweeps are enough; from a random one
    use :func:`lanczos`. A Chebyshev filter of degree ``d`` damps the interval between ``smallest``
    and the block's last Ritz value in every sweep, for ``d`` products per row instead of one.

    With a tolerance, it stops as soon as the leading eigenvalues are accurate. The error of a Ritz
    value with residual norm ``r`` is estimated as ``min(r, r^2 / gap)`` (Parlett, theorem 11.7.1),
    with the gap to the block's last Ritz value (our reading: eigenvalues outside the block lie
    beyond it).

    Args:
      products: the symmetric operator on a block: maps leaves ``(m, *shape)`` to leaves of the same
        shapes.
      start: block of ``m`` linearly independent rows; ``optax_accel.curvature.blocks.random_basis``
        makes a random one.
      num_directions: how many leading eigenpairs to return, at most ``m``; ``None`` (default): all.
      num_products: budget of operator-vector products, at least ``m``; a product with a block
        counts ``m``.
      order: which eigenvalues lead: ``"algebraic"`` (default) the largest, ``"magnitude"`` the
        largest in magnitude.
      tolerance: relative error of the leading eigenvalues at which to stop; ``None`` (default): use
        the whole budget.
      chebyshev_degree: degree of the filter. With 0 (default) a power step takes its place, shifted
        by the smallest Ritz value seen if that is negative and the order ``"algebraic"``.
      smallest: lower end of the spectrum or an estimate (``lanczos(...).smallest``); eigenvalues
        below it are not damped. The filter of order ``"algebraic"`` requires it; otherwise it
        defaults to the smallest Ritz value seen.
      loop: ``"graph"`` (default) iterates in a ``lax.while_loop``, so that the solver can be part
        of a compiled function; ``"host"`` iterates in Python around compiled pieces, for products
        that cannot be traced or that XLA runs slowly inside loops (convolutions on a CPU).

    Returns:
      The :class:`Eigenpairs`: the Ritz pairs of the last basis that was multiplied.

    Raises:
      ValueError, TypeError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import block_iteration, blocks
      >>> diagonal = jnp.array([4.0, 3.0, 0.5, 0.2, -0.1, 0.0])
      >>> pairs = block_iteration(
      ...     lambda u: diagonal[None] * u, blocks.random_basis(jax.random.key(0), diagonal, 3), 2,
      ...     num_products=60, tolerance=1e-4)
      >>> [round(float(v), 3) for v in pairs.eigenvalues], bool(pairs.converged.all())
      ([4.0, 3.0], True)

    References:
      Stewart, *Matrix Algorithms II: Eigensystems*, section 5.1. Zhou, Saad, Tiago, Chelikowsky,
      `Self-consistent-field calculations using Chebyshev-filtered subspace iteration
      <https://doi.org/10.1016/j.jcp.2006.03.017>`_, J. Comput. Phys. 219, 2006 (scaled filter).
    """
    leaves = jax.tree.leaves(start)
    rows = leaves[0].shape[0] if leaves else 0
    k = rows if num_directions is None else num_directions
    check_product("products", products)
    check_settings(k, num_products, order, tolerance, loop)
    check_integer("chebyshev_degree", chebyshev_degree, 0)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), start)
    _check_rows(rows, like, k, num_products)
    if chebyshev_degree and order == "algebraic" and smallest is None:
        raise ValueError(
            "the Chebyshev filter damps an interval and needs its lower end: pass `smallest`, e.g. "
            "lanczos(...).smallest of a few products."
        )
    if k == 0:
        return no_pairs(like)
    smallest = jnp.asarray(jnp.inf if smallest is None else smallest, blocks.scalar_dtype(start))
    # The filter's first degree takes the products at hand.
    extra = rows * max(chebyshev_degree - 1, 0)

    def assess(basis: chex.ArrayTree, count: jax.Array, smallest: jax.Array) -> _Sweep:
        images = products(basis)
        return _assess(basis, images, count, smallest, tolerance, num_directions=k, order=order)

    def unfinished(sweep: _Sweep) -> jax.Array:
        affordable = sweep.num_products + extra + rows <= num_products
        affordable &= jnp.all(jnp.isfinite(sweep.residual_norms))
        return affordable if tolerance is None else affordable & ~jnp.all(sweep.converged)

    def step(sweep: _Sweep) -> _Sweep:
        filtered = None
        if chebyshev_degree:
            _, filtered, _ = run_times(
                loop,
                chebyshev_degree - 1,
                lambda state: _filter_step(sweep, state, products(state[1]), order=order),
                _filter_start(sweep, order=order),
            )
        basis = _next_basis(sweep, filtered, order=order)
        return assess(basis, sweep.num_products + extra, sweep.smallest)

    first = assess(_orthonormalize(start), jnp.zeros((), jnp.int32), smallest)
    sweep = run_while(loop, unfinished, step, first)
    return Eigenpairs(
        eigenvalues=sweep.eigenvalues[:k],
        basis=blocks.rows(sweep.basis, 0, k),
        residual_norms=sweep.residual_norms[:k],
        num_products=sweep.num_products,
        converged=sweep.converged,
        smallest=sweep.smallest,
    )


def _check_rows(rows: int, like: chex.ArrayTree, num_directions: int, num_products: int) -> None:
    if num_directions > rows:
        raise ValueError(
            f"`num_directions` must be at most the rows of `start`, {rows}, got {num_directions}."
        )
    if rows > blocks.dimension(like):
        raise ValueError(
            f"`start` has {rows} rows of dimension {blocks.dimension(like)}; give at most as many "
            "rows as the dimension."
        )
    if num_directions and num_products < rows:
        raise ValueError(
            f"`num_products` must be at least the rows of `start`, {rows}, got {num_products}."
        )


@jax.jit
def _orthonormalize(block: chex.ArrayTree) -> chex.ArrayTree:
    return blocks.orthonormalize(divided(block, power_of_two(max_norm(block))))
