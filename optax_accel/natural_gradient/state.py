"""The state of K-FAC and EKFAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import static_integer
from optax_accel._numerics import identity, ones, zeros
from optax_accel.natural_gradient.factors import Kronecker, side_shapes
from optax_accel.natural_gradient.inverses import Eigen
from optax_accel.natural_gradient.layers import Block
from optax_accel.natural_gradient.options import Kind, Options


class ScaleByKFACState(NamedTuple):
    """State of :func:`scale_by_kfac` and :func:`scale_by_ekfac`.

    The tuples have one entry for each line of :func:`describe_layers`.

    Attributes:
      count: number of updates made; int32 scalar.
      rng_key: PRNG key of the sampled outputs.
      step_scale: what the last update was multiplied by, 1 or less with ``norm_constraint``.
      accepted: whether the last refresh took all that it measured and computed; boolean scalar.
      rejected: how many batches were refused, because a factor or a moment of theirs was not
        finite; int32 scalar. Such a batch changes none of the averages.
      rejected_inverses: how many inverses or eigendecompositions of layers were not finite, and the
        old ones kept; int32 scalar.
      factor_weight: 1 - decay ** (number of accepted batches), by which factors and moments are
        divided to correct them for their start at 0.
      factors: for a layer its ``inputs`` A and ``outputs`` B, for other parameters their second
        moments; moving averages that start at 0. What belongs to a stack of matrices (layers that a
        loop scans, say) has a leading axis of slices, here and below.
      inverses: for a layer what its gradient is multiplied with: the damped inverses of A and B, or
        their eigendecompositions (``eigenvalues`` and ``eigenvectors``); else None.
      moments: of EKFAC, for a layer the second moments S in the eigenbasis; else None.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    rng_key: chex.PRNGKey
    step_scale: jax.Array
    accepted: jax.Array
    rejected: jax.Array
    rejected_inverses: jax.Array
    factor_weight: jax.Array
    factors: tuple[Any, ...]
    inverses: tuple[Any, ...]
    moments: tuple[Any, ...]


def initial_state(
    options: Options, key: jax.Array, blocks: Sequence[Block], dtypes: Sequence[Any]
) -> ScaleByKFACState:
    """The state before the first step, in which gradients pass.

    Args:
      options: of the transformation.
      key: of the random vectors.
      blocks: of the network.
      dtypes: of all parameters.
    """
    limit = static_integer("max_size", options.max_size, 1)  # it decides shapes
    factors: list[Any] = []
    inverses: list[Any] = []
    moments: list[Any] = []
    for block in blocks:
        dtype = jnp.result_type(jnp.float32, *(dtypes[i] for i in block.leaves))
        if not block.kronecker:
            factors.append(zeros(block.shapes[0], dtype))
            inverses.append(None)
            moments.append(None)
            continue
        shapes = side_shapes(block, limit)
        factors.append(Kronecker(*(zeros(shape, dtype) for shape in shapes)))
        inverses.append(
            Kronecker(*(_identity(block, shape, dtype, options.kind) for shape in shapes))
        )
        shape = (*shapes.inputs[: block.stacked], *block.matrix_shape)
        moments.append(zeros(shape, dtype) if options.kind == "ekfac" else None)
    used = {dtypes[i] for block in blocks for i in block.leaves}
    return ScaleByKFACState(
        count=jnp.zeros((), jnp.int32),
        rng_key=jnp.copy(key),
        step_scale=jnp.ones((), jnp.float32),
        accepted=jnp.ones((), bool),
        rejected=jnp.zeros((), jnp.int32),
        rejected_inverses=jnp.zeros((), jnp.int32),
        factor_weight=jnp.zeros((), jnp.result_type(jnp.float32, *used)),
        factors=tuple(factors),
        inverses=tuple(inverses),
        moments=tuple(moments),
    )


def _identity(block: Block, shape: tuple[int, ...], dtype: Any, kind: Kind) -> Any:
    """The inverse or the eigendecomposition of an identity matrix, or of a stack of them."""
    size = shape[-1]
    eigenvalues = ones((*shape[: block.stacked], size), dtype)
    if len(shape) - block.stacked == 1:
        return eigenvalues if kind == "factored" else Eigen(eigenvalues, None)
    matrix = jnp.broadcast_to(identity(size, dtype), shape)
    return matrix if kind == "factored" else Eigen(eigenvalues, matrix)


def corrected(average: jax.Array, weight: jax.Array, otherwise: Any = 0) -> jax.Array:
    """A moving average that started at 0, divided by the weights it has."""
    weight = weight.astype(average.dtype)
    return jnp.where(weight > 0, average / jnp.where(weight > 0, weight, 1), otherwise)
