"""Norms of pytrees that neither overflow nor underflow in between, and constants for states."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

# Larger constants are made on the device: a program is compiled sooner than they are sent.
_SENT = 2**22


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
        jnp.max(jnp.abs(leaf), initial=0).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        for leaf in map(jnp.asarray, jax.tree.leaves(tree))
    ]
    return jnp.stack(_same_dtype(largest)).max() if largest else jnp.zeros((), jnp.float32)


def norm(tree: chex.ArrayTree) -> jax.Array:
    """The Euclidean norm, in at least float32, wherever it can be represented.

    ``optax.tree.norm`` squares the entries, so in float32 it is infinite from about 1e19 on and 0
    below about 1e-23. The entries are divided by a power of two first, which costs no digit.
    """
    scale = power_of_two(max_norm(tree))

    def squares(leaf: jax.Array) -> jax.Array:
        wide = jnp.abs(leaf).astype(jnp.promote_types(leaf.dtype, scale.dtype))
        return jnp.sum(jnp.square(wide / scale.astype(wide.dtype))).astype(scale.dtype)

    total = sum(map(squares, map(jnp.asarray, jax.tree.leaves(tree))), start=jnp.zeros_like(scale))
    return scale * jnp.sqrt(total)


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


def _same_dtype(numbers: list[jax.Array]) -> list[jax.Array]:
    dtype = jnp.result_type(*numbers)
    return [number.astype(dtype) for number in numbers]
