"""Estimates from random probe vectors, and what the estimators share.

All of them say how far they may be off. They take a
:class:`~optax_accel.curvature.CurvatureOperator` or any function of a pytree that is linear and
symmetric; for a function, ``like`` says what its vectors look like. Products are asked for in
blocks from a Python loop, with compiled code in between: no network runs inside a ``lax`` loop.
Inside ``jit`` the loop is unrolled.

Squares are summed in units of a power of two near the largest entry: they neither overflow nor
underflow for matrices of any size, and the unit costs no digit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_number, check_product
from optax_accel._numerics import power_of_two
from optax_accel._random import hash_bits, map_with_keys
from optax_accel.curvature import blocks
from optax_accel.curvature.operators import constrain, shape_of, shardings_of

Operator = Callable[[chex.ArrayTree], chex.ArrayTree]


class Estimate(NamedTuple):
    """A number known up to a random error.

    Attributes:
      value: the estimate, scalar.
      standard_error: its estimated standard deviation, scalar; 0 where the value is exact, nan
        where there is a single probe, which does not show the spread. It is itself an estimate from
        few samples, so twice the standard error covers less than 95%; use :meth:`interval`.
      num_products: products with the operator that it took.
      num_samples: samples that the standard error comes from; 0 where the value is exact.
    """

    value: jax.Array
    standard_error: jax.Array
    num_products: int
    num_samples: int = 0

    def interval(self, confidence: float = 0.95) -> tuple[jax.Array, jax.Array]:
        """A confidence interval, by Student's t distribution.

        Measured on a rotated spectrum with outliers, with 5 to 60 products, intervals of 0.95
        covered traces in 0.91 to 0.96 of 400 cases, Frobenius norms in 0.88 to 0.95, energy shares
        in 0.91 to 0.97 and second moments of a spectral density from 4 and 8 probes in 0.89 to
        0.91; 1.96 standard errors covered 0.77 to 0.94, 0.75 to 0.94, 0.85 to 0.94 and 0.79 to
        0.83. The rest is due to the skewness of the samples.

        Args:
          confidence: probability with which the interval should cover the true value, in (0, 1).

        Returns:
          ``(low, high)``, scalars; both equal the value where that is exact, and are nan for a
          single sample.

        Example:
          >>> import jax.numpy as jnp
          >>> from optax_accel.curvature import Estimate
          >>> low, high = Estimate(jnp.array(1.0), jnp.array(0.1), 5, num_samples=5).interval()
          >>> round(float(low), 3), round(float(high), 3)
          (0.722, 1.278)
        """
        check_number("confidence", confidence, 0, 1, open_low=True, open_high=True)
        num = int(self.num_samples)
        half = self.standard_error * (_student_quantile(confidence, num - 1) if num > 1 else 1)
        return self.value - half, self.value + half


def block_product(operator: Operator, like: chex.ArrayTree) -> tuple[Operator, chex.ArrayTree]:
    """The operator on blocks, and the structure, shapes and dtypes of its vectors."""
    check_product("operator", operator)
    like = getattr(operator, "like", None) if like is None else like
    if like is None:
        raise TypeError(
            "A plain function does not say what its vectors look like: give `like=`, a pytree of "
            "arrays or jax.ShapeDtypeStruct, e.g. the parameters."
        )

    def one_by_one(block: chex.ArrayTree) -> chex.ArrayTree:
        num = jax.tree.leaves(block)[0].shape[0]
        if num == 0:
            return block
        images = [operator(jax.tree.map(lambda b, i=i: b[i], block)) for i in range(num)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)

    return getattr(operator, "block", one_by_one), jax.tree.map(shape_of, like)


def mean_and_error(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean over the leading axis and its standard error."""
    num = samples.shape[0]
    mean = jnp.mean(samples, axis=0)
    if num == 1:
        return mean, jnp.full_like(mean, jnp.nan)
    deviations = samples - mean[None]
    unit = power_of_two(jnp.max(jnp.abs(deviations), axis=0))
    variance = jnp.sum((deviations / unit[None]) ** 2, axis=0) / (num * (num - 1))
    return mean, unit * jnp.sqrt(variance)


def _student_quantile(confidence: float, freedom: int) -> float:
    """Where the modulus of a t variable with integer degrees of freedom has this probability.

    By bisection of the finite sums for the distribution (Abramowitz, Stegun, *Handbook of
    Mathematical Functions*, 26.7.3 and 26.7.4).
    """

    def probability(angle: float) -> float:
        term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
        for i in range(freedom // 2):
            total += term
            term *= math.cos(angle) ** 2 * (2 * i + 1 + freedom % 2) / (2 * i + 2 + freedom % 2)
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if freedom % 2 else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def random_block(
    key: chex.PRNGKey, like: chex.ArrayTree, num: int, distribution: str
) -> chex.ArrayTree:
    """A block of random vectors, sharded as ``like`` is."""
    leaves, treedef = jax.tree.flatten(like)
    return _random_block(key, treedef, tuple(leaves), num, distribution)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random_block(
    key: chex.PRNGKey, treedef: Any, leaves: tuple[Any, ...], num: int, distribution: str
) -> chex.ArrayTree:
    def draw(leaf_key: jax.Array, leaf: Any) -> jax.Array:
        shape = (num, *leaf.shape)
        if distribution == "gaussian":
            return jax.random.normal(leaf_key, shape, leaf.dtype)
        signs = hash_bits(leaf_key, shape) >> 31
        return 1 - 2 * signs.astype(leaf.dtype)

    block = map_with_keys(draw, key, jax.tree.unflatten(treedef, leaves))
    return constrain(block, shardings_of(leaves), leading=(None,))


@jax.jit
def orthonormal_rows(block: chex.ArrayTree) -> chex.ArrayTree:
    """Orthonormal rows with the span of a block's rows; zero where a row depends on those before.

    Gram-Schmidt, twice for each row: unlike Cholesky QR it takes rows of any condition, as images
    of random vectors are that all lean towards the largest eigenvectors.
    """

    def row(i: jax.Array, basis: chex.ArrayTree) -> chex.ArrayTree:
        vector = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, 0, keepdims=False), block)
        before = jnp.sqrt(dot(vector, vector))
        for _ in range(2):
            inside = blocks.combine(blocks.inner(basis, blocks.as_block(vector))[:, 0], basis)
            vector = jax.tree.map(jnp.subtract, vector, inside)
            length = jnp.sqrt(dot(vector, vector))
            kept = length > 10 * jnp.finfo(length.dtype).eps * before
            factor = jnp.where(kept, 1 / jnp.where(kept, length, 1), 0)
            vector = jax.tree.map(lambda x, f=factor: f.astype(x.dtype) * x, vector)
            before = jnp.where(kept, 1, 0)
        return jax.tree.map(lambda b, x: lax.dynamic_update_index_in_dim(b, x, i, 0), basis, vector)

    num = jax.tree.leaves(block)[0].shape[0]
    return lax.fori_loop(0, num, row, jax.tree.map(jnp.zeros_like, block))


def dot(left: chex.ArrayTree, right: chex.ArrayTree) -> jax.Array:
    """The inner product of two vectors."""
    return blocks.inner(blocks.as_block(left), blocks.as_block(right))[0, 0]
