"""The component of an update in a tracked subspace."""

from __future__ import annotations

import functools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp

from optax_accel.curvature import Eigenspace, blocks
from optax_accel.subspace._metric import Roots, scaled

# Combinations of at most this many directions are written out as a sum.
_UNROLLED = 32
# Arrays of at most this many entries are packed: copying them costs less than compiling for each.
_PACKED = 4096


def _coefficients(basis: chex.ArrayTree, vector: chex.ArrayTree, dtype: Any) -> jax.Array:
    """The inner products of a vector with the rows of a basis: ``(k,)``."""

    def leaf(b: jax.Array, v: jax.Array) -> jax.Array:
        if b.dtype == v.dtype:
            return blocks.inner([b], [v[None]])[:, 0]
        # A dot product would first write a wide copy of a narrow basis, a fused sum does not.
        return jnp.sum(b.astype(v.dtype) * v[None], axis=tuple(range(1, b.ndim)))

    products = jax.tree.leaves(jax.tree.map(leaf, basis, vector))
    return functools.reduce(jnp.add, products, jnp.zeros((), dtype)).astype(dtype)


def dominant_component(
    vector: chex.ArrayTree,
    space: Eigenspace,
    everything: bool,
    counted: jax.Array | None,
    roots: Roots | None,
) -> tuple[chex.ArrayTree, jax.Array]:
    """``P v`` in the basis' dtype, at least float32, and ``|P v| / |v|``, in the metric.

    Args:
      vector: the update.
      space: the tracked directions.
      everything: whether they span the whole space.
      counted: which of them count, ``(k,)``; None for all.
      roots: those of the preconditioner; None in the Euclidean metric.
    """

    def widen(v: jax.Array, b: jax.Array) -> jax.Array:
        return v.astype(jnp.promote_types(b.dtype, jnp.float32))

    wide = jax.tree.map(widen, vector, space.basis)
    k, dtype = space.eigenvalues.shape[0], space.eigenvalues.dtype
    if k == 0:
        return jax.tree.map(jnp.zeros_like, wide), jnp.zeros((), dtype)
    # The biases and scales of a deep network are many small arrays of few shapes.
    packing = blocks.Packing(wide, largest=_PACKED)
    inner = wide if roots is None else scaled(wide, roots.roots)
    packed, basis = packing.pack(inner), packing.pack(space.basis, axis=1)
    block = blocks.as_block(packed)
    squared = blocks.inner(block, block)[0, 0]
    coefficients = _coefficients(basis, packed, dtype)
    if counted is not None:
        coefficients = jnp.where(counted, coefficients, 0)
    ratio = jnp.sum(coefficients**2) / jnp.where(squared > 0, squared, 1)
    alignment = jnp.sqrt(jnp.minimum(ratio, 1)).astype(dtype)
    if everything:
        return wide, alignment

    def combination(b: jax.Array, v: jax.Array, joint: bool) -> jax.Array:
        # A sum is fused with what is done to the update, a dot product is not. Of a joint array it
        # would be fused anew for each array in it, and take long to compile.
        if joint or k > _UNROLLED:
            return cast(jax.Array, blocks.combine(coefficients, b.astype(v.dtype)))
        weights = coefficients.astype(v.dtype)
        return functools.reduce(jnp.add, (weights[i] * b[i].astype(v.dtype) for i in range(k)))

    combined = tuple(map(combination, basis, packed, packing.joint))
    dominant = packing.unpack(combined)
    return dominant if roots is None else scaled(dominant, roots.inverses), alignment
