"""Methods on a part of the parameters, while the loss still sees all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import numpy as np
import optax

Mask: TypeAlias = chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree] | None


def resolve(tree: chex.ArrayTree, mask: Mask) -> chex.ArrayTree:
    """A boolean for every leaf of ``tree``, from a mask that may be a prefix or a function.

    Raises:
      ValueError: the mask does not fit the tree or holds something else than booleans.
    """
    given = mask(tree) if callable(mask) else mask

    def spread(selected: Any, part: chex.ArrayTree) -> chex.ArrayTree:
        if not isinstance(selected, bool | np.bool_):
            raise ValueError(f"found {selected!r} in it")
        return jax.tree.map(lambda _: bool(selected), part)

    try:
        return jax.tree.map(spread, given, tree)
    except ValueError as error:
        raise ValueError(
            "`mask` must be a pytree of booleans like the parameters (or a prefix of it), or a "
            f"function that returns one: {error}"
        ) from error


def select(tree: chex.ArrayTree, mask: Mask) -> chex.ArrayTree:
    """The part of a tree that takes part; the rest becomes ``MaskedNode``, without leaves."""
    if mask is None:
        return tree
    return jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), resolve(tree, mask), tree)


def merge(part: chex.ArrayTree, whole: chex.ArrayTree, mask: Mask) -> chex.ArrayTree:
    """The whole tree with the selected part replaced."""
    if mask is None:
        return part
    flat, treedef = jax.tree.flatten(whole)
    chosen = jax.tree.leaves(resolve(whole, mask))
    replacements = iter(jax.tree.leaves(part))
    return jax.tree.unflatten(
        treedef, [next(replacements) if m else x for m, x in zip(chosen, flat, strict=True)]
    )
