"""Checks of states and of the functions that map them."""

from __future__ import annotations

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_accel._arguments import shown


def checked_state(name: str, z: chex.ArrayTree, batched: bool) -> chex.ArrayTree:
    """The state as arrays.

    Args:
      name: of the argument, for the messages.
      z: the state.
      batched: whether its arrays need a first axis in common, that of the examples.

    Raises:
      TypeError: a leaf is not an array of real floating-point numbers.
      ValueError: there are no entries, or the examples are not those of one batch.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(z)
    leaves = []
    for path, leaf in paths:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, float | int | np.ndarray | np.generic | jax.Array):
            raise TypeError(
                f"`{name}` must be of floating-point arrays, got {shown(leaf)} at {where}."
            )
        leaves.append(jnp.asarray(leaf))
        if not jnp.issubdtype(leaves[-1].dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must be of floating-point arrays, got {leaves[-1].dtype} at {where}."
            )
    shapes = [leaf.shape for leaf in leaves]
    if batched and (len({shape[:1] for shape in shapes}) > 1 or () in shapes):
        raise ValueError(
            f"the first axis of every array of `{name}` must be that of the examples, got shapes "
            f"{shapes}: give `batched=False` for a state without one."
        )
    if not any(leaf.size for leaf in leaves):
        found = f"arrays of shapes {shapes}" if shapes else "none"
        raise ValueError(f"`{name}` must contain arrays with entries, got {found}.")
    return jax.tree.unflatten(structure, leaves)


def checked_image(f: Any, arguments: tuple[Any, ...], call: str) -> Any:
    """What stands for the value of f, which must be like its first argument.

    Args:
      f: the function.
      arguments: its arguments; the first one is the state.
      call: how it is called, for the messages.

    Returns:
      A pytree of ``jax.ShapeDtypeStruct``.

    Raises:
      TypeError: f cannot be called so.
      ValueError: its value has another structure, other shapes or other dtypes.
    """
    if not callable(f):
        raise TypeError(f"`f` must be a function, called as {call}; got {shown(f)}.")
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # not told
        signature = None
    if signature is not None:
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise TypeError(
                f"`f` is called as {call}, which it does not allow: {error}."
            ) from error
    image = jax.eval_shape(f, *arguments)
    expected, found = str(jax.tree.structure(arguments[0])), str(jax.tree.structure(image))
    if expected != found:
        raise ValueError(f"{call} must have the structure of `z`, {expected}, got {found}.")
    paths = jax.tree_util.tree_leaves_with_path(arguments[0])
    for (path, leaf), new in zip(paths, jax.tree.leaves(image), strict=True):
        if leaf.shape != new.shape or leaf.dtype != new.dtype:
            raise ValueError(
                f"{call} must have the shapes and dtypes of `z`; at z"
                f"{jax.tree_util.keystr(path)} it maps {leaf.dtype}{list(leaf.shape)} to "
                f"{new.dtype}{list(new.shape)}."
            )
    return image
