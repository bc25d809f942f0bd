"""Derivatives as linear functions of a vector, in the mode that a loss allows.

Each linear function is a pytree (``jax.tree_util.Partial``), so that jitted functions can take and
return it. :class:`~optax_accel.Objective` describes the modes.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from optax_accel._numerics import max_norm, norm

LinearFunction = Callable[[chex.ArrayTree], chex.ArrayTree]
HVPMode = Literal["forward_over_reverse", "reverse_over_reverse", "finite_difference"]


def derivative(
    mode: HVPMode,
    gradient: Callable[[chex.ArrayTree, Any], chex.ArrayTree],
    point: chex.ArrayTree,
    given: Any,
    norm: Callable[[chex.ArrayTree], jax.Array],
) -> LinearFunction:
    """The derivative of ``gradient(point, given)`` with respect to the point, a symmetric one."""
    with differentiable_in(mode):
        if mode == "forward_over_reverse":
            return _linearized(lambda p: gradient(p, given), point)[1]
        if mode == "reverse_over_reverse":
            pullback = jax.vjp(lambda p: gradient(p, given), point)[1]
            return Partial(_first_result, pullback)
    return linear_at(functools.partial(_central_difference, gradient, norm), point, given)


def jacobian_of(
    mode: HVPMode,
    function: Callable[[chex.ArrayTree, Any], chex.ArrayTree],
    point: chex.ArrayTree,
    given: Any,
) -> tuple[chex.ArrayTree, LinearFunction, LinearFunction]:
    """``function(point, given)`` and the products with its Jacobian and with the transpose."""

    def of_point(point: chex.ArrayTree) -> chex.ArrayTree:
        return function(point, given)

    if mode == "forward_over_reverse":
        with differentiable_in(mode):
            outputs, push = _linearized(of_point, point)
        return outputs, push, Partial(_transposed, push, point)
    outputs, pullback = jax.vjp(of_point, point)
    pull = Partial(_first_result, pullback)
    if mode == "reverse_over_reverse":
        return outputs, Partial(_transposed_pullback, pullback, outputs), pull
    push = linear_at(functools.partial(_central_difference, function, norm), point, given)
    return outputs, push, pull


def _linearized(
    function: Callable[[chex.ArrayTree], chex.ArrayTree], point: chex.ArrayTree
) -> tuple[chex.ArrayTree, LinearFunction]:
    value, derivative = jax.linearize(function, point)
    # Under `jit` JAX would find that only when it compiles, too late to say what helps.
    if has_primitive(jax.make_jaxpr(derivative)(point).jaxpr, "custom_lin"):
        raise TypeError("can't apply forward-mode differentiation to a jax.custom_vjp function.")
    return value, derivative


def has_primitive(jaxpr: Any, name: str) -> bool:
    """Whether a program contains an operation, in its loops and other inner programs too."""

    def inner(value: Any) -> Iterator[Any]:
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item

    return any(
        eqn.primitive.name == name
        or any(has_primitive(i, name) for value in eqn.params.values() for i in inner(value))
        for eqn in jaxpr.eqns
    )


def _transposed(push: LinearFunction, like: chex.ArrayTree, vector: chex.ArrayTree) -> Any:
    return jax.linear_transpose(push, like)(vector)[0]


def _transposed_pullback(
    pullback: Callable[[Any], Any], like: chex.ArrayTree, vector: chex.ArrayTree
) -> Any:
    """The product with the Jacobian, by differentiating the backward pass, which is linear."""
    with differentiable_in("reverse_over_reverse"):
        zeros = optax.tree.zeros_like(like)
        _, transposed = jax.vjp(lambda cotangent: pullback(cotangent)[0], zeros)
        return transposed(vector)[0]


def _central_difference(
    function: Callable[[chex.ArrayTree, Any], chex.ArrayTree],
    norm: Callable[[chex.ArrayTree], jax.Array],
    point: chex.ArrayTree,
    given: Any,
    vector: chex.ArrayTree,
) -> chex.ArrayTree:
    """The derivative of ``function(point, given)`` along a vector."""
    size, length = norm(point), norm(vector)
    length = jnp.where(length > 0, length, 1)
    precision = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(point)), default=1.0)
    step = precision ** (1 / 3) * jnp.sqrt(1 + size)

    def at(sign: int) -> chex.ArrayTree:
        def moved(x: jax.Array, v: jax.Array) -> jax.Array:
            wide = jnp.promote_types(x.dtype, step.dtype)
            along = sign * step.astype(wide) * (v.astype(wide) / length.astype(wide))
            return (x.astype(wide) + along).astype(x.dtype)

        return function(jax.tree.map(moved, point, vector), given)

    def quotient(up: jax.Array, down: jax.Array) -> jax.Array:
        wide = jnp.promote_types(up.dtype, step.dtype)
        slope = (up.astype(wide) - down.astype(wide)) / (2 * step).astype(wide)
        return (slope * length.astype(wide)).astype(up.dtype)

    return jax.tree.map(quotient, at(1), at(-1))


class Constants(NamedTuple):
    """The leaves of a pytree that are neither numbers nor arrays, such as flags; hashable.

    Attributes:
      treedef: the structure of the pytree.
      values: the constants, with None in place of numbers and arrays.
      chosen: which leaves are constants.
    """

    treedef: Any
    values: tuple[Any, ...]
    chosen: tuple[bool, ...]

    @classmethod
    def split(cls, tree: Any) -> tuple[list[Any], Constants]:
        """The arrays and numbers, which programs take and return, and the constants."""
        leaves, treedef = jax.tree.flatten(tree)
        chosen = tuple(isinstance(leaf, bool) or not _is_number(leaf) for leaf in leaves)
        arrays = [None if c else leaf for c, leaf in zip(chosen, leaves, strict=True)]
        values = tuple(leaf if c else None for c, leaf in zip(chosen, leaves, strict=True))
        return arrays, cls(treedef, values, chosen)

    def join(self, arrays: list[Any]) -> Any:
        """The pytree of these arrays and the constants."""
        parts = zip(self.chosen, self.values, arrays, strict=True)
        return jax.tree.unflatten(self.treedef, [v if c else a for c, v, a in parts])


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)


def linear_at(function: Callable[..., Any], point: chex.ArrayTree, given: Any) -> LinearFunction:
    """``function(point, given, vector)`` as a pytree whose leaves are arrays and numbers."""
    arrays, constants = Constants.split(given)
    return Partial(functools.partial(_joined, function, constants), point, arrays)


def _joined(
    function: Callable[..., Any], constants: Constants, point: Any, arrays: list[Any], vector: Any
) -> Any:
    return function(point, constants.join(arrays), vector)


# What JAX says about functions without a derivative of the kind that a product needs.
_NO_DERIVATIVE = re.compile(
    r"forward-mode|[Dd]ifferentiation rule|[Rr]everse-mode differentiation|Transpose rule|JVP|"
    r"cannot be differentiated|not differentiable"
)
_OTHER_MODES = {
    "forward_over_reverse": (
        "'reverse_over_reverse', which differentiates the backward pass of functions with a "
        "jax.custom_vjp, or 'finite_difference', which needs nothing but gradients"
    ),
    "reverse_over_reverse": "'finite_difference', which needs nothing but gradients",
}


@contextlib.contextmanager
def differentiable_in(mode: HVPMode) -> Iterator[None]:
    """Adds which ``hvp_mode`` may help to errors of JAX about a derivative that does not exist.

    Raises:
      TypeError: in place of the error of JAX.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if mode not in _OTHER_MODES or not _NO_DERIVATIVE.search(str(error)):
            raise
        raise TypeError(
            f"this loss cannot be differentiated twice in hvp_mode={mode!r}: {error} Build the "
            f"Objective with another hvp_mode: {_OTHER_MODES[mode]}."
        ) from error


@contextlib.contextmanager
def differentiable(method: str) -> Iterator[None]:
    """Names the method in errors of JAX about a gradient that does not exist.

    Raises:
      TypeError: in place of the error of JAX.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if not _NO_DERIVATIVE.search(str(error)):
            raise
        raise TypeError(
            f"{method} needs a loss with a gradient, and this one has none: {error}"
        ) from error


def _first_result(function: Callable[..., tuple[chex.ArrayTree, ...]], *args: Any) -> Any:
    return function(*args)[0]


def congruence(
    push: LinearFunction, middle: LinearFunction, pull: LinearFunction, vector: chex.ArrayTree
) -> chex.ArrayTree:
    """``J^T M J`` times a vector, from the linear functions ``J``, ``M`` and ``J^T``."""
    return pull(middle(push(vector)))


def gauss_newton_of(
    mode: HVPMode,
    outputs_of: Callable[[chex.ArrayTree, Any], chex.ArrayTree],
    loss_of: Callable[[chex.ArrayTree, Any], jax.Array],
    params: chex.ArrayTree,
    kwargs: dict[str, Any],
) -> LinearFunction:
    """The Gauss-Newton matrix of ``loss_of(outputs_of(params, kwargs), kwargs)``."""
    outputs, push, pull = jacobian_of(mode, outputs_of, params, kwargs)
    check_outputs("The Gauss-Newton matrix", outputs, jnp.inexact)
    return Partial(congruence, push, loss_hessian_of(mode, loss_of, outputs, kwargs), pull)


def check_outputs(taker: str, outputs: chex.ArrayTree, kind: Any) -> None:
    """Raises ``TypeError`` if the loss has no gradient at network outputs.

    Args:
      taker: what takes that gradient, for the message.
      outputs: of the network, arrays or their shapes and dtypes.
      kind: what the dtypes must be, ``jnp.floating`` or, with complex ones, ``jnp.inexact``.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(outputs)]
    if not all(jnp.issubdtype(dtype, kind) for dtype in dtypes):
        real = "real " if kind is jnp.floating else ""
        raise TypeError(
            f"{taker} takes gradients at the outputs of `predict`, which must be {real}"
            f"floating-point numbers; got the dtypes {', '.join(map(str, dtypes))}. Return logits, "
            "say, no labels."
        )


def loss_hessian_of(
    mode: HVPMode,
    loss_of: Callable[[chex.ArrayTree, Any], jax.Array],
    outputs: chex.ArrayTree,
    kwargs: dict[str, Any],
) -> LinearFunction:
    """The Hessian of ``loss_of(outputs, kwargs)`` with respect to the outputs."""

    def gradient(outputs: chex.ArrayTree, kwargs: dict[str, Any]) -> chex.ArrayTree:
        return jax.grad(lambda out: loss_of(out, kwargs))(outputs)

    # Losses are functions of single outputs: none of them should move far.
    return derivative(mode, gradient, outputs, kwargs, max_norm)
