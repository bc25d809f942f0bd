"""Methods on a part of the parameters, while the loss still sees all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from optax_accel._arguments import as_arrays, check_real_leaves, is_placeholder
from optax_accel.objective import Objective

Mask: TypeAlias = chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree] | None


def resolve(params: chex.ArrayTree, mask: Mask, name: str = "mask") -> chex.ArrayTree | None:
    """A boolean for every leaf of the parameters, or None, which means all of them.

    It is None without a mask and for Optax's placeholder, which stands for any tree.

    The mask may be a prefix or a function.  As in Optax it is a function only if its leaves can be
    called: a module with booleans in place of its parameters is a tree of booleans.
    Resolve a mask on the *parameters* and use the result for their gradients: those of leaves that
    are not differentiated may be ``None`` or of the dtype ``float0``.

    Raises:
      ValueError: the mask does not fit the parameters or has leaves other than booleans.
    """
    if mask is None or is_placeholder(params):
        return None
    leaves, booleans = jax.tree.leaves(mask), mask
    if isinstance(mask, Partial) or (callable(mask) and leaves and all(map(callable, leaves))):
        booleans = mask(params)

    def spread(selected: Any, part: chex.ArrayTree) -> chex.ArrayTree:
        if not _is_boolean(selected):
            raise ValueError(f"it contains {selected!r}")
        return jax.tree.map(lambda _: bool(selected), part)

    try:
        return jax.tree.map(spread, booleans, params)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a pytree of booleans like the parameters (or a prefix of it), or a "
            f"function that returns one: {other_type(booleans, params, name) or error}"
        ) from error


def other_type(
    tree: Any,
    params: chex.ArrayTree,
    name: str,
    of_leaf: str = "'kernel' in jax.tree_util.keystr(path)",
) -> str | None:
    """What to do where a mask or labels are a container of another type than the parameters.

    Args:
      tree: the mask or the labels.
      params: the parameters.
      name: the name of the argument.
      of_leaf: an example of what makes one of its leaves from a path.

    Returns:
      The end of a message; ``None`` where the types of both are the same, or one is no container.
    """
    if type(tree) is type(params) or any(map(jax.tree_util.all_leaves, ([tree], [params]))):
        return None
    return (
        f"the parameters are a {type(params).__name__} and `{name}` is a {type(tree).__name__}. "
        "Make it from the parameters, as in jax.tree_util.tree_map_with_path(lambda path, leaf: "
        f"{of_leaf}, params)."
    )


def select(tree: chex.ArrayTree, chosen: chex.ArrayTree | None) -> chex.ArrayTree:
    """The selected leaves of a tree; the others become ``MaskedNode``, which has no leaves."""
    if chosen is None:
        return tree
    return jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), chosen, tree)


def merge(
    part: chex.ArrayTree, whole: chex.ArrayTree, chosen: chex.ArrayTree | None
) -> chex.ArrayTree:
    """The whole tree with the selected part replaced."""
    if chosen is None:
        return part
    return jax.tree.map(lambda m, new, old: new if m else old, chosen, part, whole)


def check_selected(
    params: chex.ArrayTree, mask: Mask, method: str, *, may_be_none: bool = False
) -> None:
    """Raises if what a mask selects cannot be trained.

    Args:
      params: the parameters.
      mask: pytree of booleans like the parameters (or a prefix of it), a function, or None.
      method: the name of the method, for the messages.
      may_be_none: whether the mask may select nothing, as a rule of ours may.

    Raises:
      ValueError: the mask selects none of the parameters, or does not fit them.
      TypeError: a selected leaf is not real floating point.
    """
    chosen = resolve(params, mask)
    if chosen is not None and not may_be_none:
        selected = jax.tree.leaves(chosen)
        if selected and not any(selected):
            raise ValueError(
                f"`mask` of {method} is False for all {len(selected)} leaves of the parameters, "
                "which leaves it nothing to do: set it to True for one of them at least, or leave "
                f"{method} out."
            )
    if mask is None:
        advice = "leave it out with `mask=`"
    else:
        advice = "`mask` selects it: set it to False there"
    check_real_leaves(select(params, chosen), method, advice)


def with_fixed_leaves(
    make: Callable[[chex.ArrayTree | None], optax.GradientTransformation], mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """A masked method that never meets the masked-out leaves that cannot be differentiated.

    Integers, booleans and PRNG keys become ``None`` for the method and the transformations inside,
    and their updates pass unchanged: ``float0``, ``None`` or a leaf of the same kind.

    Args:
      make: gives the transformation for a resolved mask, which may be None.
      mask: pytree of booleans like the parameters (or a prefix of it), a function, or None.
    """

    def init_fn(params: chex.ArrayTree) -> optax.OptState:
        chosen, trained = _parts(params, mask)
        return make(_hide(chosen, trained)).init(as_arrays(_hide(params, trained)))

    def update_fn(
        updates: chex.ArrayTree,
        state: optax.OptState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        chosen, trained = _parts(updates if params is None else params, mask)
        tx = optax.with_extra_args_support(make(_hide(chosen, trained)))
        if trained is None:
            point = None if params is None else as_arrays(params)
            return tx.update(updates, state, point, **extra_args)
        if extra_args.get("grad") is not None:
            extra_args["grad"] = _hide(extra_args["grad"], trained)
        extra_args = precompose_all(extra_args, lambda part: merge(part, params, trained))
        new_updates, state = tx.update(
            _hide(updates, trained),
            state,
            None if params is None else as_arrays(_hide(params, trained)),
            **extra_args,
        )
        return merge(new_updates, updates, trained), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def precompose_all(
    extra_args: dict[str, Any], transform: Callable[[chex.ArrayTree], chex.ArrayTree]
) -> dict[str, Any]:
    """Extra arguments of ``update`` whose losses are functions of what ``transform`` takes."""
    return {
        name: _precompose(argument, transform)
        if name.endswith("value_fn") and callable(argument)
        else argument
        for name, argument in extra_args.items()
    }


def _precompose(value_fn: Any, transform: Callable[[chex.ArrayTree], chex.ArrayTree]) -> Any:
    if isinstance(value_fn, Objective):
        return value_fn.precompose(transform)

    @functools.wraps(value_fn)
    def composed(params: chex.ArrayTree, *args: Any, **kwargs: Any) -> Any:
        return value_fn(transform(params), *args, **kwargs)

    return composed


def _parts(
    params: chex.ArrayTree, mask: Mask
) -> tuple[chex.ArrayTree | None, chex.ArrayTree | None]:
    """The resolved mask, and which leaves can be trained; None where that is all of them."""
    chosen = resolve(params, mask)
    if chosen is None:
        return None, None
    trained = jax.tree.map(lambda m, p: m or _is_inexact(p), chosen, params)
    return chosen, None if all(jax.tree.leaves(trained)) else trained


def _hide(tree: chex.ArrayTree | None, trained: chex.ArrayTree | None) -> chex.ArrayTree | None:
    if tree is None or trained is None:
        return tree
    return jax.tree.map(lambda m, x: x if m else None, trained, tree)


def _is_inexact(leaf: Any) -> bool:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)


def _is_boolean(leaf: Any) -> bool:
    """Whether it is a Python or NumPy boolean, or a boolean scalar array of known value."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    return isinstance(leaf, bool | np.bool_) or (
        isinstance(leaf, np.ndarray | jax.Array) and leaf.dtype == bool and leaf.ndim == 0
    )
