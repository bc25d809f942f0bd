"""Adam's moments in eight bits: a code for each entry, and one scale for each block of entries.

Blocks and their scales as in Dettmers, Lewis, Shleifer, Zettlemoyer, `8-bit optimizers via
block-wise quantization <https://arxiv.org/abs/2110.02861>`_, ICLR 2022, section 2.1.  Ours: the
map, powers of 2 ** (1/6) in place of the paper's dynamic tree, and stochastic rounding: a second
moment that decays by a thousandth a step would otherwise never leave its code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_accel._random import hash_bits

BLOCK = 2_048  # the paper's, section 2.1
# The codes c = 1 ... L stand for 2 ** ((c - L) / 6) of the block's largest value, 0 for 0: steps of
# 12 %, over 21 factors of 2 with a sign (L = 127) and 42 without (L = 255).
_STEPS_PER_OCTAVE = 6


class EightBitAdamState(NamedTuple):
    """Adam's state in eight bits.

    Attributes:
      count: number of updates made; int32 scalar.
      mu: codes of the first moment, int8, of its shape.
      nu: codes of the second moment, uint8, of its shape.
      mu_scales: the largest absolute value of each block of the first moment, float32.
      nu_scales: the same of the second moment.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mu: chex.ArrayTree
    nu: chex.ArrayTree
    mu_scales: chex.ArrayTree
    nu_scales: chex.ArrayTree


def in_eight_bits(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are kept in eight bits between its updates.

    Args:
      adam: a transformation with state ``optax.ScaleByAdamState``.

    Returns:
      The same with state :class:`EightBitAdamState`.
    """

    def init_fn(params: chex.ArrayTree) -> EightBitAdamState:
        def codes(dtype: Any) -> chex.ArrayTree:
            return jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), dtype), params)

        def scales() -> chex.ArrayTree:
            return jax.tree.map(lambda leaf: jnp.zeros(_blocks(leaf), jnp.float32), params)

        jax.eval_shape(adam.init, params)  # which refuses what it cannot train
        count = jnp.zeros((), jnp.int32)
        return EightBitAdamState(count, codes(jnp.int8), codes(jnp.uint8), scales(), scales())

    def update_fn(
        updates: chex.ArrayTree,
        state: EightBitAdamState,
        params: chex.ArrayTree | None = None,
    ) -> tuple[chex.ArrayTree, EightBitAdamState]:
        full = optax.ScaleByAdamState(
            count=state.count,
            mu=jax.tree.map(decoded, state.mu, state.mu_scales),
            nu=jax.tree.map(decoded, state.nu, state.nu_scales),
        )
        new_updates, full = adam.update(updates, full, params)
        mu, mu_scales = _all_encoded(full.mu, jnp.int8, state.count)
        nu, nu_scales = _all_encoded(full.nu, jnp.uint8, state.count)
        return new_updates, EightBitAdamState(full.count, mu, nu, mu_scales, nu_scales)

    return optax.GradientTransformation(init_fn, update_fn)


def _all_encoded(
    moments: chex.ArrayTree, dtype: Any, count: jax.Array
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    leaves, structure = jax.tree.flatten(moments)
    # Second moments round by other bits than first ones.
    keys = range(np.dtype(dtype).kind == "u", 2 * len(leaves), 2)
    pairs = [
        encoded(leaf, dtype, hash_bits(jax.random.key(key), jnp.shape(leaf), step=count))
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    codes, scales = zip(*pairs, strict=True) if pairs else ((), ())
    return jax.tree.unflatten(structure, codes), jax.tree.unflatten(structure, scales)


def _blocks(leaf: Any) -> int:
    return math.ceil(math.prod(jnp.shape(leaf)) / BLOCK)


def encoded(moment: jax.Array, dtype: Any, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes of a moment and the scales of its blocks; the mean over ``bits`` is the moment.

    Args:
      moment: of any shape; at least 0 for a ``dtype`` without sign.
      dtype: int8 or uint8.
      bits: uint32 of the moment's shape.

    Returns:
      Codes of the moment's shape, and as many float32 scales as it has blocks, NaN where a block
      has a value that is not finite.
    """
    largest = float(jnp.iinfo(dtype).max)
    size, shape = moment.size, moment.shape
    padded = jnp.zeros(_blocks(moment) * BLOCK, jnp.float32)
    padded = padded.at[:size].set(moment.ravel().astype(jnp.float32)).reshape(-1, BLOCK)
    scales = jnp.max(jnp.abs(padded), axis=1)
    relative = jnp.abs(padded) / jnp.where(scales > 0, scales, 1)[:, None]
    drawn = (bits.ravel() >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    chance = jnp.zeros(padded.size, jnp.float32).at[:size].set(drawn).reshape(padded.shape)
    # A value x between the values a and b of neighboring codes rounds up where chance < (x - a) /
    # (b - a); as b / a = 2 ** (1/6), that is where x's place between the codes exceeds `threshold`.
    # One floor decides: two could be compiled to different sides of a value that is a code's own.
    threshold = _STEPS_PER_OCTAVE * jnp.log2(1 + chance * (2 ** (1 / _STEPS_PER_OCTAVE) - 1))
    exponent = largest + _STEPS_PER_OCTAVE * jnp.log2(jnp.maximum(relative, 1e-37))
    numbers = jnp.clip(jnp.floor(exponent + 1 - threshold), 1, largest)
    smallest = _values(jnp.ones(()), largest)
    numbers = jnp.where(relative < smallest, chance * smallest < relative, numbers)
    codes = jnp.sign(padded) * numbers
    finite = jnp.isfinite(scales)
    codes = jnp.where(finite[:, None], codes, 0).ravel()[:size].reshape(shape).astype(dtype)
    return codes, jnp.where(finite, scales, jnp.nan)


def decoded(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The moment that codes and scales stand for, in float32."""
    largest = float(jnp.iinfo(codes.dtype).max)
    numbers = codes.astype(jnp.float32)
    spread = jnp.repeat(scales, BLOCK)[: codes.size].reshape(codes.shape)
    return jnp.sign(numbers) * _values(jnp.abs(numbers), largest) * spread


def _values(codes: jax.Array, largest: float) -> jax.Array:
    return jnp.where(codes > 0, jnp.exp2((codes - largest) / _STEPS_PER_OCTAVE), 0)
