"""Trace, Frobenius norm and energy shares of a symmetric operator, from products."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_choice, check_integer
from optax_accel._numerics import divided, max_norm, power_of_two
from optax_accel._random import as_key
from optax_accel.curvature import blocks
from optax_accel.curvature._vectors import check_vector
from optax_accel.curvature.estimates import (
    Estimate,
    Operator,
    block_product,
    dot,
    mean_and_error,
    random_block,
)

Method = Literal["hutch++", "hutchinson"]


class EnergyShares(NamedTuple):
    r"""How much of a matrix :math:`A` lies in the span of orthonormal :math:`u_1 \dots u_k`.

    Attributes:
      frobenius: :math:`\sum_i \|A u_i\|^2 / \|A\|_F^2`, in [0, 1]; nan for a zero matrix.
      trace: :math:`\mathrm{tr}(U^\top A U) / \mathrm{tr}(A)`; for an indefinite matrix it may lie
        outside [0, 1], and it has no meaning (huge or nan) where the trace is about zero.
    """

    frobenius: Estimate
    trace: Estimate


def trace(
    operator: Operator,
    *,
    key: chex.PRNGKey,
    num_products: int = 60,
    method: Method = "hutch++",
    like: chex.ArrayTree = None,
) -> Estimate:
    r"""The trace of a symmetric operator, the sum of its eigenvalues.

    Hutchinson: the mean of :math:`z^\top A z` over random signs :math:`z`. Hutch++ spends a third
    of the products on a sketch :math:`A S`, a third on the exact trace in its span :math:`Q`, and
    a third on Hutchinson's estimate of :math:`\mathrm{tr}((I - Q Q^\top) A (I - Q Q^\top))`: for a
    few large eigenvalues over a small bulk, as curvature has them, this is far more precise.

    Args:
      operator: a symmetric operator: a :class:`~optax_accel.curvature.CurvatureOperator` or a
        function of a pytree.
      key: PRNG key of the probes, or an integer seed.
      num_products: products in all; with at least as many as the dimension, the trace is exact.
      method: ``"hutch++"`` (default), which computes a sketched part exactly, or ``"hutchinson"``,
        which only averages over random probes.
      like: structure, shapes and dtypes of the vectors; default: the operator's own.

    Returns:
      The estimate, with the standard error of the mean over the probes.

    Raises:
      ValueError: the method is unknown, or there are too few products (Hutch++ needs 3).
      TypeError: ``like`` is missing, or the count is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import trace
      >>> diagonal = jnp.concatenate([jnp.array([50.0, 20.0]), jnp.full(500, 0.1)])
      >>> estimate = trace(
      ...     lambda v: diagonal * v, key=jax.random.key(0), num_products=30, like=diagonal)
      >>> round(float(estimate.value)), float(estimate.standard_error) < 0.5
      (120, True)

    References:
      Meyer, Musco, Musco, Woodruff, `Hutch++: optimal stochastic trace estimation
      <https://arxiv.org/abs/2010.09649>`_, 2021, algorithm 1.
    """
    inside, outside, unit, num_products, num_samples = _sketched_sums(
        operator, key, num_products, method, like
    )
    rest, error = mean_and_error(outside[:, 0])
    return Estimate(unit * (inside[0] + rest), unit * error, num_products, num_samples)


def frobenius_norm(
    operator: Operator,
    *,
    key: chex.PRNGKey,
    num_products: int = 60,
    method: Method = "hutch++",
    like: chex.ArrayTree = None,
) -> Estimate:
    r"""The Frobenius norm of a symmetric operator, the root of its summed squared eigenvalues.

    It is estimated as :func:`trace` is, from :math:`\mathrm{tr}(A^2)`, whose samples
    :math:`\|A z\|^2` take one product each; the error of the root is that of the square over twice
    the root.

    Args:
      operator: a symmetric operator: a :class:`~optax_accel.curvature.CurvatureOperator` or a
        function of a pytree.
      key: PRNG key of the probes, or an integer seed.
      num_products: products in all; with at least as many as the dimension, the norm is exact.
      method: ``"hutch++"`` (default), which computes a sketched part exactly, or ``"hutchinson"``,
        which only averages over random probes.
      like: structure, shapes and dtypes of the vectors; default: the operator's own.

    Returns:
      The estimate, with the standard error by the delta method.

    Raises:
      ValueError: the method is unknown, or there are too few products (Hutch++ needs 3).
      TypeError: ``like`` is missing, or the count is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import frobenius_norm
      >>> diagonal = jnp.concatenate([jnp.array([4.0, -3.0]), jnp.zeros(500)])
      >>> estimate = frobenius_norm(
      ...     lambda v: diagonal * v, key=jax.random.key(0), num_products=30, like=diagonal)
      >>> round(float(estimate.value), 3)
      5.0
    """
    inside, outside, unit, num_products, num_samples = _sketched_sums(
        operator, key, num_products, method, like
    )
    rest, error = mean_and_error(outside[:, 1])
    norm = jnp.sqrt(inside[1] + rest)
    error = jnp.where(norm > 0, error / (2 * jnp.where(norm > 0, norm, 1)), error)
    return Estimate(unit * norm, unit * error, num_products, num_samples)


def energy_shares(
    operator: Operator, basis: chex.ArrayTree, *, key: chex.PRNGKey, num_probes: int = 20
) -> EnergyShares:
    r"""The share of a matrix's energy in a subspace, by Frobenius norm and by trace.

    The part in the subspace is computed exactly, the part outside is estimated with probes
    :math:`z` projected onto the complement, :math:`\|A\|_F^2 = \|A U\|_F^2 + E \|A (I - P) z\|^2`
    and :math:`\mathrm{tr} A = \mathrm{tr}(U^\top A U) + E\, z^\top (I - P) A (I - P) z`, so the
    Frobenius share never leaves [0, 1].

    Args:
      operator: a symmetric operator: a :class:`~optax_accel.curvature.CurvatureOperator` or a
        function of a pytree.
      basis: orthonormal block of the ``k`` directions, leaves ``(k, *shape)``.
      key: PRNG key of the probes, or an integer seed.
      num_probes: number of random probes; ``k + num_probes`` products in all. With at least as many
        as the dimension, the complement is computed exactly, too.

    Returns:
      Both shares, with standard errors by the delta method.

    Raises:
      ValueError: ``num_probes`` is less than 1, or the basis is not one of the operator's vectors.
      TypeError: ``num_probes`` is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel.curvature import energy_shares
      >>> diagonal = jnp.array([3.0, 2.0, 1.0])
      >>> shares = energy_shares(
      ...     lambda v: diagonal * v, jnp.array([[1.0, 0.0, 0.0]]), key=jax.random.key(0))
      >>> round(float(shares.frobenius.value), 3), round(float(shares.trace.value), 3)
      (0.643, 0.5)
    """
    check_integer("num_probes", num_probes, 1)
    like = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), basis)
    product, like = block_product(operator, getattr(operator, "like", like))
    check_vector("energy_shares, `basis`", like, basis, num_axes=1)
    k, size = jax.tree.leaves(basis)[0].shape[0], blocks.dimension(like)
    num_samples = num_probes if num_probes < size else 0
    if num_samples:
        probes = random_block(as_key(key), like, num_probes, "rademacher")
    else:
        num_probes, probes = size, blocks.identity(like)
    probes = _complement(probes, basis)
    diagonals = _diagonals(basis, product(basis)), _diagonals(probes, product(probes))
    (inside, outside), _ = _in_one_unit(*diagonals)
    inside = jnp.sum(inside, axis=0)
    if num_samples:
        outside, errors = mean_and_error(outside)
    else:
        outside = jnp.sum(outside, axis=0)
        errors = jnp.zeros_like(outside)
    total = inside + outside
    values, errors = inside / total, jnp.abs(inside) / total**2 * errors
    return EnergyShares(
        frobenius=Estimate(values[1], errors[1], k + num_probes, num_samples),
        trace=Estimate(values[0], errors[0], k + num_probes, num_samples),
    )


def _sketched_sums(
    operator: Operator,
    key: chex.PRNGKey,
    num_products: int,
    method: Method,
    like: chex.ArrayTree,
) -> tuple[jax.Array, jax.Array, jax.Array, int, int]:
    """Traces of ``A`` and ``A**2`` in a sketched subspace, and samples of them in the complement.

    Returns:
      ``(inside, outside, unit, num_products, num_samples)``: traces of shape ``(2,)`` and samples
      of shape ``(num_samples, 2)``, for the operator divided by the unit. Where the traces are
      exact, there are two samples that are 0, and ``num_samples`` is 0.
    """
    check_choice("method", method, ("hutch++", "hutchinson"))
    check_integer("num_products", num_products, 3 if method == "hutch++" else 1)
    product, like = block_product(operator, like)
    size = blocks.dimension(like)
    dtype = blocks.scalar_dtype(like)
    none = jnp.zeros((2, 2), dtype)
    if size == 0:
        return none[0], none, jnp.ones((), dtype), 0, 0
    if num_products >= size:
        basis = blocks.identity(like)
        inside, largest = _diagonals(basis, product(basis))
        return jnp.sum(inside, axis=0), none, power_of_two(largest), size, 0
    sketch_key, sample_key = jax.random.split(as_key(key))
    rank = num_products // 3 if method == "hutch++" else 0
    num_samples = num_products - 2 * rank
    samples = random_block(sample_key, like, num_samples, "rademacher")
    sketched = jnp.zeros((0, 2), dtype), jnp.zeros((), dtype)
    if rank:
        basis = _orthonormal(product(random_block(sketch_key, like, rank, "rademacher")))
        sketched = _diagonals(basis, product(basis))
        samples = _complement(samples, basis)
    diagonals, unit = _in_one_unit(sketched, _diagonals(samples, product(samples)))
    inside, outside = diagonals
    return jnp.sum(inside, axis=0), outside, unit, num_products, num_samples


@jax.jit
def _diagonals(left: chex.ArrayTree, images: chex.ArrayTree) -> tuple[jax.Array, jax.Array]:
    """Row by row, the inner products with the images and the squared lengths of these, (k, 2).

    They are those of the images divided by the power of two at the largest entry, which is returned
    with them.
    """
    largest = max_norm(images)
    images = divided(images, power_of_two(largest))
    return jax.vmap(lambda z, w: jnp.stack([dot(z, w), dot(w, w)]))(left, images), largest


def _in_one_unit(
    *diagonals: tuple[jax.Array, jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
    """Results of ``_diagonals`` with images divided by the same number, and this."""
    unit = power_of_two(functools.reduce(jnp.maximum, [largest for _, largest in diagonals]))

    def convert(sums: jax.Array, largest: jax.Array) -> jax.Array:
        ratio = jnp.minimum(power_of_two(largest) / unit, 1)  # more than 1 only for zeros
        return sums * jnp.stack([ratio, ratio**2])[None]

    return [convert(*each) for each in diagonals], unit


@jax.jit
def _complement(block: chex.ArrayTree, basis: chex.ArrayTree) -> chex.ArrayTree:
    """The rows of a block without their parts in the span of an orthonormal basis."""
    part = blocks.combine(blocks.inner(block, basis), basis)
    return jax.tree.map(jnp.subtract, block, part)


@jax.jit
def _orthonormal(block: chex.ArrayTree) -> chex.ArrayTree:
    """Orthonormal rows with the span of the block, and zero rows where its rows are dependent.

    Unlike Cholesky QR it drops the directions of a rank-deficient block that are rounding errors:
    the rest of Hutch++ is exact for any orthonormal rows, but not for nearly orthonormal ones.
    """
    block = divided(block, power_of_two(max_norm(block)))
    for round_ in range(2):
        gram = blocks.inner(block, block)
        values, vectors = jnp.linalg.eigh(gram)
        largest = jnp.max(values)
        # The second round meets orthonormal rows, zero ones, and inaccurate ones in between.
        cutoff = 0.5 if round_ else 10 * len(gram) * jnp.finfo(gram.dtype).eps * largest
        keep = (values > cutoff) & (largest > 0)
        scale = jnp.where(keep, 1 / jnp.sqrt(jnp.where(keep, values, 1)), 0)
        block = blocks.combine((vectors * scale[None, :]).T, block)
    return block
