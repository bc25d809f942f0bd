"""Random numbers that are cheap to draw and to compile."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def as_key(key: chex.PRNGKey | int) -> jax.Array:
    """A typed PRNG key from a key of either kind or an integer seed.

    Raises:
      TypeError: it is neither.
      ValueError: it is a batch of keys, or an integer that does not fit into 64 bits.
    """
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        seed = int(key)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(
                f"`key` must be an integer of 64 bits, in [-2**63, 2**63), got {seed}."
            )
        return jax.random.key(seed)
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.ndim:
                raise ValueError(
                    f"`key` must be one PRNG key, got an array of keys of shape {key.shape}: give "
                    "one of them, or map over all of them with jax.vmap."
                )
            return key
        if key.dtype == jnp.uint32 and key.shape == (2,):
            return jax.random.wrap_key_data(key)
        if jnp.issubdtype(key.dtype, jnp.integer) and not key.ndim:  # a seed, injected
            return jax.random.key(key)
    raise TypeError(f"`key` must be a PRNG key (jax.random.key(0)) or an integer, got {key!r}.")


def map_with_keys(
    fn: Callable[[jax.Array, Any], Any], key: chex.PRNGKey, tree: chex.ArrayTree
) -> chex.ArrayTree:
    """``fn(leaf_key, leaf)`` for every leaf of a tree, with a different key for each."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        treedef, [fn(jax.random.fold_in(key, i), leaf) for i, leaf in enumerate(leaves)]
    )


def hash_bits(
    key: chex.PRNGKey,
    shape: tuple[int, ...],
    step: jax.Array | None = None,
    first: chex.Numeric = 0,
) -> jax.Array:
    """32 pseudo-random bits for every index of an array: uint32 of the given shape.

    Each index is hashed with two words drawn from ``key``.  Against ``jax.random.bits`` it costs a
    tenth of the time on a CPU, fuses with its consumer, compiles at once, and its bits do not
    depend on how the array is sharded.  Good enough for masks and random starts, not for
    cryptography.

    The finalizer "lowbias32" (C. Wellons, hash prospector, 2018), with the second key word mixed in
    between its two multiplications, so that masks of two keys are not permutations of each other.

    Args:
      key: PRNG key.
      shape: shape of the result.
      step: integer scalar that is hashed with the key, in place of ``fold_in``, whose loop of
        rounds would compile longer than everything else here.
      first: integer scalar, the number of the array's first entry: with a multiple of a row's size
        the rows of a longer array from there on.
    """
    if step is None:
        words: Any = jax.random.bits(key, (2,), jnp.uint32)
    else:
        word = step.astype(jnp.uint32)
        for part in jax.random.key_data(key):
            word = _mix(word ^ part) + np.uint32(0x9E3779B9)  # 2**32 over the golden ratio
        words = (_mix(word), _mix(word + np.uint32(0x9E3779B9)))
    index = jnp.broadcast_to(jnp.asarray(first, jnp.uint32), shape)
    stride = 1
    for axis in reversed(range(len(shape))):
        position = lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + position * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mix(index ^ words[0], words[1])


def hash_normal(
    key: chex.PRNGKey,
    shape: tuple[int, ...],
    dtype: Any,
    step: jax.Array,
    first: chex.Numeric = 0,
) -> jax.Array:
    """Standard normal numbers from :func:`hash_bits`, of 23 bits each, up to 5.3 in size.

    They are compiled sooner than those of ``jax.random.normal``.
    """
    bits = hash_bits(key, shape, step, first) >> 9
    uniform = (bits.astype(jnp.float32) + 0.5) / 2**22 - 1  # exact, and never -1 or 1
    return (lax.erf_inv(uniform) * math.sqrt(2)).astype(dtype)


def _mix(bits: jax.Array, word: Any = 0) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15) ^ word) * np.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
