"""Meshes with Explicit axes: linear algebra whose shardings the compiler chooses.

On such a mesh, which ``jax.make_mesh`` makes by default, shardings are part of the types of arrays,
and an operation that leaves open how its result is divided is an error: a sum over the examples of
a divided batch, say. That is the network's business in the network; what follows from its outputs
and gradients is computed here as if the axes were ``Auto``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType

from optax_accel._means import varying_axes

_Result = TypeVar("_Result")


def with_auto_axes(function: Callable[..., _Result], *args: Any, out_like: Any = None) -> _Result:
    """Calls a function of arrays with the Explicit axes of their mesh as ``Auto`` ones.

    Args:
      function: the function; what it closes over must not lie on the mesh.
      *args: pytrees of arrays.
      out_like: a pytree like the result, or a prefix of it, of arrays whose shardings the result
        gets; ``None`` in it, and by default: the result is replicated.

    Returns:
      What the function returns.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    replicated = jax.NamedSharding(mesh, jax.P())

    def sharding(leaf: Any) -> jax.NamedSharding:
        own = None if leaf is None else _sharding(leaf)
        return replicated if own is None else jax.NamedSharding(mesh, own.spec)

    shardings = jax.tree.map(sharding, out_like, is_leaf=lambda leaf: leaf is None)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes on which arrays of a pytree lie, if there is one."""
    for leaf in jax.tree.leaves(tree):
        sharding = _sharding(leaf)
        if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
            return sharding.mesh
    return None


def check_undivided(params: Any, method: str) -> None:
    """Raises if parameters are divided over an Explicit axis, where a method takes them whole.

    Raises:
      ValueError: one of them is.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        mesh, sharding = explicit_mesh(leaf), _sharding(leaf)
        if mesh is not None and any(axis is not None for axis in sharding.spec):
            raise ValueError(
                f"{method} cannot divide parameters over Explicit axes of a mesh, and "
                f"{jax.tree_util.keystr(path) or 'the parameter'} lies there as {sharding.spec}: "
                "give jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,)), where it can, "
                "or replicate the parameters; the batch may be divided over both kinds."
            )


def filled_like(value: Any, like: Any) -> jax.Array:
    """A value broadcast to the shape of an array, and divided over devices as that is."""
    sharding = _sharding(like)
    value = jnp.broadcast_to(value, like.shape)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return value
    return jax.sharding.reshard(value, jax.NamedSharding(sharding.mesh, sharding.spec))


def placed_like(tree: Any, like: Any) -> Any:
    """The tree with its leaves divided over devices as those of another one are.

    Args:
      tree: a pytree of arrays.
      like: a pytree of the same structure and shapes, of arrays or of what stands for them.

    Returns:
      The tree: over Explicit axes each leaf lies where its model lies, and along the axes of a
      ``shard_map`` all leaves differ along which any leaf of either tree does.
    """
    varying: frozenset[str] = frozenset().union(*map(varying_axes, jax.tree.leaves((tree, like))))

    def place(leaf: jax.Array, like: Any) -> jax.Array:
        leaf = filled_like(leaf, like)
        missing = tuple(varying - varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(place, tree, like)


def _sharding(leaf: Any) -> Any:
    """The sharding in the type of an array, or of what stands for one."""
    try:
        aval = leaf if hasattr(leaf, "weak_type") and not isinstance(leaf, jax.Array) else None
        aval = jax.typeof(leaf) if aval is None else aval
    except TypeError:  # no array
        return None
    sharding = getattr(aval, "sharding", None)
    return sharding if isinstance(sharding, jax.NamedSharding) else None
