"""Whether a pytree is a vector of an operator, and the part of a tree that is one."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def check_vector(
    name: str,
    like: chex.ArrayTree,
    vector: chex.ArrayTree,
    *,
    num_axes: int = 0,
    whose: str = "the vectors of the operator",
) -> None:
    """Raises ``ValueError`` if a vector has another structure or other shapes than it must.

    Args:
      name: what the message begins with.
      like: structure and shapes that the vector must have.
      vector: the vector, or a block of vectors.
      num_axes: leading axes of the vector that ``like`` does not have: 1 for a block.
      whose: what has that structure, in words.
    """
    leaves = jax.tree.leaves(vector)
    wanted: Any = jax.tree.structure(like)
    if jax.tree.structure(vector) != wanted:
        raise ValueError(f"{name}: {_other_structure(like, vector, whose)}")
    for leaf, (path, want) in zip(leaves, jax.tree_util.tree_leaves_with_path(like), strict=True):
        shape, right = jnp.shape(leaf), jnp.shape(want)
        if len(shape) < num_axes or shape[num_axes:] != right:
            which = f"the leaf {jax.tree_util.keystr(path)}" if path else "the array"
            wanted = str(right) if not num_axes else f"(number of vectors, *{right})"
            raise ValueError(f"{name}: {which} must have the shape {wanted}, got {shape}.")


def part_of(name: str, like: chex.ArrayTree, tree: chex.ArrayTree) -> chex.ArrayTree:
    """A tree without the leaves that are ``MaskedNode`` in ``like``, which is then like ``like``.

    Args:
      name: what a message begins with.
      like: structure and shapes of the part.
      tree: a tree like the whole.

    Returns:
      The part.

    Raises:
      ValueError: the tree is not like the whole.
    """

    def keep(wanted: Any, leaf: Any) -> Any:
        return wanted if _is_masked(wanted) else leaf

    try:
        part = jax.tree.map(keep, like, tree, is_leaf=_is_masked)
    except ValueError:
        part = tree
    check_vector(name, like, part)
    return part


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _paths(tree: chex.ArrayTree) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _other_structure(like: chex.ArrayTree, vector: chex.ArrayTree, whose: str) -> str:
    """What is wrong with the structure of a vector, and what to do."""
    must = f"the vector must be a tree like {whose}"
    if type(like) is not type(vector):
        got = "an array" if hasattr(vector, "shape") else f"a {type(vector).__name__}"
        return f"{must}, a {type(like).__name__}, got {got}."
    want, have = _paths(like), _paths(vector)
    masked = any(map(_is_masked, jax.tree.leaves(like, is_leaf=_is_masked)))
    if masked and want < have:
        return (
            "the operator acts on a part of the parameters (`where=`), and the vector has further "
            f"leaves, such as {min(have - want)}; cut a tree like the parameters to that part with "
            "operator.select(tree)."
        )
    if want - have:
        return f"{must}, whose leaf {min(want - have)} it does not have."
    if have - want:
        return f"{must}, which have no leaf {min(have - want)}."
    return f"{must}: {jax.tree.structure(like)}, got {jax.tree.structure(vector)}."
