"""Norms of pytrees that neither overflow nor underflow in between, and constants for states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accel._mesh_axes import explicit_mesh

# Larger constants are made on the device: a program is compiled sooner than they are sent.
_SENT = 2**22
# Larger arrays are reduced one by one: their copies would take longer than they save.
_JOINED = 2**16


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros for a state, without a program of its own for each shape where nothing is traced."""
    if math.prod(shape) > _SENT or _is_tracing():
        return jnp.zeros(shape, dtype)
    return jnp.array(np.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Ones for a state, made as :func:`zeros` are."""
    if math.prod(shape) > _SENT or _is_tracing():
        return jnp.ones(shape, dtype)
    return jnp.array(np.ones(shape, dtype))


def identity(size: int, dtype: Any) -> jax.Array:
    """An identity matrix for a state, made as :func:`zeros` are."""
    if size**2 > _SENT or _is_tracing():
        return jnp.eye(size, dtype=dtype)
    return jnp.array(np.eye(size, dtype=dtype))


def _is_tracing() -> bool:
    """Whether constants become part of a program, in which arrays of NumPy would be stored."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def max_norm(tree: chex.ArrayTree) -> jax.Array:
    """The largest absolute value of all entries, in at least float32; 0 without entries."""
    largest = [
        jnp.max(jnp.abs(array), initial=0).astype(jnp.promote_types(array.dtype, jnp.float32))
        for array in _joined(tree)
    ]
    return stack(largest).max() if largest else jnp.zeros((), jnp.float32)


def norm(tree: chex.ArrayTree) -> jax.Array:
    """The Euclidean norm, in at least float32, wherever it can be represented.

    ``optax.tree.norm`` squares the entries, so in float32 it is infinite from about 1e19 on and 0
    below about 1e-23. The entries are divided by a power of two first, which costs no digit.
    """
    scale = power_of_two(max_norm(tree))

    def squares(leaf: jax.Array) -> jax.Array:
        wide = jnp.abs(leaf).astype(jnp.promote_types(leaf.dtype, scale.dtype))
        return jnp.sum(jnp.square(wide / scale.astype(wide.dtype))).astype(scale.dtype)

    return scale * jnp.sqrt(total(list(map(squares, _joined(tree)))).astype(scale.dtype))


def vdot(tree: chex.ArrayTree, other: chex.ArrayTree) -> jax.Array:
    """The inner product, as ``optax.tree.vdot``, by :func:`total`."""
    return total(jax.tree.leaves(jax.tree.map(_leaf_vdot, tree, other)))


def _leaf_vdot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)


def total(numbers: Sequence[jax.Array]) -> jax.Array:
    """The sum of numbers, one of each leaf of a tree, say, or of arrays of one shape; else 0."""
    if len(numbers) < 2:
        return numbers[0] if numbers else jnp.zeros((), jnp.float32)
    return jnp.sum(stack(numbers), axis=0)


def stack(numbers: Sequence[jax.Array]) -> jax.Array:
    """Numbers as a vector, which XLA does not take apart again to reduce it.

    A sum of n numbers (written as a chain or as a reduction of what ``jnp.stack`` gives, of which
    XLA makes a chain) is repeated in every kernel that reads it.  Where these are as many, one for
    each leaf of a tree, the program grows with the square of their number: half of K-FAC's for a
    Transformer of four blocks.
    """
    if not numbers:
        return jnp.zeros(0, jnp.float32)
    return lax.optimization_barrier(jnp.stack(_same_dtype(numbers)))


def one_minus_power(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay ** count``, the weight of a running mean that starts at 0, with all its digits.

    In float32 the plain formula has three digits left for a decay of 0.999 and a count of 1.
    """
    count = count.astype(jnp.result_type(float))
    return -jnp.expm1(count * jnp.log1p(-jnp.asarray(1 - decay, count.dtype)))


def divided(tree: chex.ArrayTree, unit: jax.Array) -> chex.ArrayTree:
    """All leaves divided by a scalar, in the dtypes of the leaves."""
    return jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), tree)


def power_of_two(number: jax.Array) -> jax.Array:
    """The largest power of two up to a positive number; 1 for 0 and what is not finite."""
    usable = (number > 0) & jnp.isfinite(number)
    _, exponent = jnp.frexp(jnp.where(usable, number, 1))
    # Both it and its reciprocal are normal numbers: others are flushed to 0 on some devices.
    limits = jnp.finfo(number.dtype)
    exponent = jnp.clip(exponent - 1, limits.minexp, limits.maxexp - 2)
    return jnp.ldexp(jnp.ones_like(number), exponent)


def _joined(tree: chex.ArrayTree) -> list[jax.Array]:
    """The leaves, of which a single device flattens the small ones of a dtype into one array.

    What is done to each is compiled for each, in two or three kernels where it is a reduction.
    """
    leaves = list(map(jnp.asarray, jax.tree.leaves(tree)))
    # They may be sharded; Explicit axes are part of their types on a single device, too.
    if jax.device_count() > 1 or explicit_mesh(leaves) is not None:
        return leaves
    arrays, small = list[jax.Array](), dict[Any, list[jax.Array]]()
    for leaf in leaves:
        if leaf.size > _JOINED:
            arrays.append(leaf)
        else:
            small.setdefault(leaf.dtype, []).append(leaf)
    for group in small.values():
        if len(group) == 1:
            arrays += group
        else:  # of what XLA sees joined, it would reduce the parts
            flat = jnp.concatenate([leaf.ravel() for leaf in group])
            arrays.append(lax.optimization_barrier(flat))
    return arrays


def _same_dtype(numbers: Sequence[jax.Array]) -> list[jax.Array]:
    dtype = jnp.result_type(*numbers)
    return [number.astype(dtype) for number in numbers]
