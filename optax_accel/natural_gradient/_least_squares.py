"""Least squares by conjugate gradients, on pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax


def pseudoinverse(
    forward: Callable[[chex.ArrayTree], chex.ArrayTree],
    backward: Callable[[chex.ArrayTree], chex.ArrayTree],
    target: chex.ArrayTree,
) -> chex.ArrayTree:
    """The smallest x for which ``forward(x)`` is nearest to a target, by conjugate gradients.

    CGLS (Hestenes and Stiefel, 1952, section 10), which ends at a residual of the size of rounding
    errors, after as many steps as the linear map has different singular values, or after 50.

    Args:
      forward: a linear map.
      backward: its transpose.
      target: like the results of the map.
    """
    tolerance = 10 * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(target))

    def squared(tree: chex.ArrayTree) -> jax.Array:
        return jnp.sum(jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)]))

    def add(tree: chex.ArrayTree, factor: jax.Array, other: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda a, b: a + factor.astype(a.dtype) * b, tree, other)

    start = backward(target)
    first = squared(start)

    def unfinished(carry: Any) -> jax.Array:
        count, *_, size = carry
        return (count < 50) & (size > tolerance**2 * first)

    def advance(carry: Any) -> Any:
        count, x, residual, direction, size = carry
        image = forward(direction)
        length = size / squared(image)
        residual = add(residual, -length, image)
        slope = backward(residual)
        new = squared(slope)
        return (
            count + 1,
            add(x, length, direction),
            residual,
            add(slope, new / size, direction),
            new,
        )

    zeros = jax.tree.map(lambda leaf: 0 * leaf, start)
    return lax.while_loop(unfinished, advance, (0, zeros, target, start, first))[1]
