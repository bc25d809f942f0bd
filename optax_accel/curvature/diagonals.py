"""The diagonal of a symmetric operator, estimated from products."""

from __future__ import annotations

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_choice, check_integer
from optax_accel._numerics import divided, max_norm, power_of_two
from optax_accel._random import as_key
from optax_accel.curvature import blocks
from optax_accel.curvature.estimates import (
    Operator,
    block_product,
    mean_and_error,
    orthonormal_rows,
    random_block,
)

Method = Literal["xdiag", "hutchinson"]


class DiagonalEstimate(NamedTuple):
    """A diagonal known up to random errors.

    Attributes:
      diagonal: the estimate, like the vectors of the operator.
      standard_error: the estimated standard deviation of each entry, like ``diagonal``; 0 where the
        diagonal is exact, nan where there is a single sample, which does not show the spread.
      num_products: products with the operator that it took.
      num_samples: samples that the standard errors come from; 0 where the diagonal is exact.
    """

    diagonal: chex.ArrayTree
    standard_error: chex.ArrayTree
    num_products: int
    num_samples: int


def diagonal(
    operator: Operator,
    *,
    key: chex.PRNGKey,
    num_products: int = 60,
    method: Method = "xdiag",
    like: chex.ArrayTree = None,
) -> DiagonalEstimate:
    r"""The diagonal of a symmetric operator, in as many numbers as a vector has.

    Hutchinson: the mean of :math:`z \odot A z` over random signs :math:`z`. XDiag spends half of
    the products on :math:`A \Omega` and half on the span :math:`Q` of the images. For each column
    :math:`\omega_i` it takes the diagonal of :math:`Q_i Q_i^\top A` exactly, where :math:`Q_i`
    spans the images of the *other* columns, and Hutchinson's estimate of the rest from
    :math:`\omega_i`; all these estimates, which are unbiased, are averaged. For a few large
    eigenvalues over a small bulk, as curvature has them, this is far more precise.

    Args:
      operator: a symmetric operator: a :class:`~optax_accel.curvature.CurvatureOperator` or a
        function of a pytree.
      key: PRNG key of the probes, or an integer seed.
      num_products: products in all; with at least as many as the dimension, the diagonal is exact.
        As many vectors are in memory at a time.
      method: ``"xdiag"`` (default) or ``"hutchinson"``, which only averages over random probes.
      like: structure, shapes and dtypes of the vectors; default: the operator's own.

    Returns:
      The estimate, with a standard error of each entry. XDiag's samples share their products, so
      its errors are rough: the paper recommends their like, and proves nothing about it.

    Raises:
      ValueError: the method is unknown, or there are too few products (XDiag needs 4).
      TypeError: ``like`` is missing, or the count is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_accel import curvature
      >>> u = jnp.array([3.0, 2.0, 1.0, 0.0, 0.0, 1.0])  # of rank 1
      >>> estimate = curvature.diagonal(
      ...     lambda v: u * (u @ v), key=jax.random.key(0), num_products=4, like=u)
      >>> [abs(round(float(x), 3)) for x in estimate.diagonal]
      [9.0, 4.0, 1.0, 0.0, 0.0, 1.0]

    References:
      Epperly, Tropp, Webber, `XTrace: making the most of every sample in stochastic trace
      estimation <https://arxiv.org/abs/2301.07825>`_, 2024, section 2.4; Bekas, Kokiopoulou, Saad,
      *An estimator for the diagonal of a matrix*, 2007, for the simpler one.
    """
    check_choice("method", method, ("xdiag", "hutchinson"))
    check_integer("num_products", num_products, 4 if method == "xdiag" else 1)
    product, like = block_product(operator, like)
    size = blocks.dimension(like)
    if num_products >= size:
        basis = blocks.identity(like)
        exact = jax.tree.map(lambda b, i: jnp.sum(b * i, axis=0), basis, product(basis))
        return DiagonalEstimate(exact, jax.tree.map(jnp.zeros_like, exact), size, 0)
    if method == "hutchinson":
        probes = random_block(as_key(key), like, num_products, "rademacher")
        value, error = _of_probes(probes, product(probes))
        return DiagonalEstimate(value, error, num_products, num_products)
    num = num_products // 2
    probes = random_block(as_key(key), like, num, "rademacher")
    images = product(probes)
    basis = _span(images)
    value, error = _leave_one_out(probes, images, basis, product(basis))
    return DiagonalEstimate(value, error, 2 * num, num)


@jax.jit
def _of_probes(
    probes: chex.ArrayTree, images: chex.ArrayTree
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    return _statistics(jax.tree.map(jnp.multiply, probes, images))


@jax.jit
def _span(images: chex.ArrayTree) -> chex.ArrayTree:
    return orthonormal_rows(divided(images, power_of_two(max_norm(images))))


@jax.jit
def _leave_one_out(
    probes: chex.ArrayTree, images: chex.ArrayTree, basis: chex.ArrayTree, of_basis: chex.ArrayTree
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    r"""The mean of the estimates without one probe each, and its standard error.

    The span without the image :math:`i` lacks one direction :math:`Q s_i`, where :math:`s_i` is
    orthogonal to the coordinates of all other images. So the estimate without it is the diagonal of
    :math:`Q Q^\top A - Q s_i (A Q s_i)^\top` plus :math:`\omega_i` times the rest of its image,
    :math:`(I - Q Q^\top + Q s_i s_i^\top Q^\top) A \omega_i`.
    """
    unit = power_of_two(max_norm(images))
    images, of_basis = divided(images, unit), divided(of_basis, unit)
    coordinates = blocks.inner(basis, images)  # of image i in column i
    lacking = _normals(coordinates)  # s_i in row i
    directions = blocks.combine(lacking, basis)
    of_directions = blocks.combine(lacking, of_basis)
    kept = jnp.sum(lacking * coordinates.T, axis=1)
    inside = blocks.combine(coordinates.T, basis)

    def samples(
        probe: jax.Array,
        image: jax.Array,
        part: jax.Array,
        direction: jax.Array,
        of_direction: jax.Array,
        each: jax.Array,
        of_each: jax.Array,
    ) -> jax.Array:
        whole = jnp.sum(each * of_each, axis=0)
        weights = lax.expand_dims(kept.astype(image.dtype), range(1, image.ndim))
        rest = image - part + weights * direction
        return whole[None] - direction * of_direction + probe * rest

    found = jax.tree.map(
        samples, probes, images, inside, directions, of_directions, basis, of_basis
    )
    value, error = _statistics(found)
    return _times(value, unit), _times(error, unit)


def _times(tree: chex.ArrayTree, unit: jax.Array) -> chex.ArrayTree:
    return jax.tree.map(lambda x: x * unit.astype(x.dtype), tree)


def _normals(columns: jax.Array) -> jax.Array:
    """For each column a unit vector orthogonal to all others; zero where it depends on them."""
    lengths = jnp.sqrt(jnp.sum(columns**2, axis=0))
    scaled = columns / jnp.where(lengths > 0, lengths, 1)[None, :]
    left, values, right = jnp.linalg.svd(scaled, full_matrices=False)
    keep = values > 10 * len(columns) * jnp.finfo(columns.dtype).eps * jnp.max(values, initial=0)
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    rows = (right.T * inverse[None, :]) @ left.T  # of the pseudoinverse
    norms = jnp.sqrt(jnp.sum(rows**2, axis=1))
    # A column is independent of the others if all of its unit vector is in the row space.
    independent = (jnp.sum((right * keep[:, None]) ** 2, axis=0) > 0.99) & (lengths > 0)
    factors = jnp.where(independent, 1 / jnp.where(norms > 0, norms, 1), 0)
    return factors[:, None] * rows


def _statistics(samples: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    leaves, treedef = jax.tree.flatten(samples)
    pairs = [mean_and_error(leaf) for leaf in leaves]
    value, error = ([pair[i] for pair in pairs] for i in (0, 1))
    return jax.tree.unflatten(treedef, value), jax.tree.unflatten(treedef, error)
