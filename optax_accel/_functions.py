"""The functions that an objective is made of, called with the arguments that they name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._means import as_weight

HasAux = bool | Literal["loss", "predict", "both"]
AUX_OF: dict[HasAux, tuple[str, ...]] = {
    False: (),
    True: ("loss",),
    "loss": ("loss",),
    "predict": ("predict",),
    "both": ("predict", "loss"),
}


class Functions(NamedTuple):
    """What an objective is made of; all functions take further arguments by name.

    Attributes:
      predict: the outputs at the parameters; None where ``loss`` is a function of the parameters.
      loss: the scalar loss of the outputs.
      weight: what the loss of a batch was divided by; None where parts count by their examples.
      aux_of: which of "predict" and "loss" return a pair of their result and auxiliary outputs.
      factor: scalar that the loss is multiplied by; None means 1.
    """

    predict: Callable[..., Any] | None
    loss: Callable[..., Any]
    weight: Callable[..., chex.Numeric] | None
    aux_of: tuple[str, ...]
    factor: chex.Numeric | None = None

    def change(self, change: Callable[[Any, str], Any]) -> Functions:
        """The same with ``change(function, name)`` in place of each function."""
        new = {
            name: function and change(function, name)
            for name, function in self._asdict().items()
            if name in ("predict", "loss", "weight")
        }
        return self._replace(**new)

    def outputs_and_aux(self, params: chex.ArrayTree, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The outputs at the parameters, and the auxiliary outputs of ``predict`` or None."""
        if self.predict is None:
            return params, None
        outputs = call_by_name(self.predict, params, kwargs)
        return _pair(outputs, "predict") if "predict" in self.aux_of else (outputs, None)

    def outputs(self, params: chex.ArrayTree, kwargs: dict[str, Any]) -> chex.ArrayTree:
        """The outputs at the parameters."""
        return self.outputs_and_aux(params, kwargs)[0]

    def loss_and_aux(self, outputs: chex.ArrayTree, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The loss of outputs, and the auxiliary outputs of ``loss`` or None."""
        value, aux = call_by_name(self.loss, outputs, kwargs), None
        if "loss" in self.aux_of:
            value, aux = _pair(value, "loss" if self.predict else "value_fn")
        value = _scalar(value, self.predict is not None)
        return value if self.factor is None else self.factor * value, aux

    def loss_of(self, outputs: chex.ArrayTree, kwargs: dict[str, Any]) -> jax.Array:
        """The loss of outputs."""
        return self.loss_and_aux(outputs, kwargs)[0]

    def value_and_aux(
        self, params: chex.ArrayTree, kwargs: dict[str, Any]
    ) -> tuple[jax.Array, Any]:
        """The loss at the parameters, and all auxiliary outputs."""
        outputs, of_predict = self.outputs_and_aux(params, kwargs)
        value, of_loss = self.loss_and_aux(outputs, kwargs)
        if self.aux_of == ("predict", "loss"):
            return value, (of_predict, of_loss)
        return value, of_predict if "predict" in self.aux_of else of_loss

    def value(self, params: chex.ArrayTree, kwargs: dict[str, Any]) -> jax.Array:
        """The loss at the parameters."""
        return self.value_and_aux(params, kwargs)[0]

    def weight_of(self, kwargs: dict[str, Any]) -> jax.Array | None:
        """How much a batch counts in a mean, or None without ``weight``."""
        if self.weight is None:
            return None
        names, _, variadic = argument_names(self.weight, skip=0)
        return as_weight(self.weight(**select_named(kwargs, names, variadic)))


def _pair(result: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        first = "outputs" if name == "predict" else "value"
        raise TypeError(
            f"Objective: has_aux says that `{name}` returns a pair ({first}, aux), but it returned "
            f"{_describe(result)}; return the pair, or build the objective without has_aux."
        )
    return result


def _scalar(value: Any, has_outputs: bool) -> jax.Array:
    """The value of a loss, which must be a scalar."""
    name = "loss" if has_outputs else "value_fn"
    if isinstance(value, tuple):
        build = "Objective(predict, loss" if has_outputs else "Objective.from_value_fn(value_fn"
        raise TypeError(
            f"Objective: the loss must be a scalar, but `{name}` returned {_describe(value)}. If "
            f"it returns (value, aux), say so with has_aux: optax_accel.{build}, has_aux=True)."
        )
    if value is None or not jax.tree_util.all_leaves([value]):
        raise TypeError(
            f"Objective: the loss must be a scalar, but `{name}` returned {_describe(value)}."
        )
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(
            f"Objective: the loss must be a scalar, got shape {value.shape}; reduce it, "
            "e.g. with jnp.mean."
        )
    return value


def _describe(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list | dict) else kind


def argument_names(fn: Callable[..., Any], skip: int = 1) -> tuple[list[str], list[str], bool]:
    """The names that a function takes by keyword, those it requires, and whether it takes ``**``.

    Args:
      fn: the function.
      skip: how many positional arguments come first, e.g. the parameters.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none: they get no extra arguments
        return [], [], False
    parameters = list(signature.parameters.values())
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first_is_positional = parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY
    named = [p for p in parameters[skip if first_is_positional else 0 :] if p.kind in keyword]
    required = [p.name for p in named if p.default is inspect.Parameter.empty]
    variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return [p.name for p in named], required, variadic


def select_named(kwargs: dict[str, Any], names: list[str], variadic: bool) -> dict[str, Any]:
    """The arguments that a function takes by these names, or all of them if it takes ``**``."""
    return kwargs if variadic else {name: kwargs[name] for name in kwargs if name in names}


def call_by_name(fn: Callable[..., Any], first: chex.ArrayTree, kwargs: dict[str, Any]) -> Any:
    """Calls a function with its first argument and those of the others that it takes."""
    if not kwargs:
        return fn(first)
    names, _, variadic = argument_names(fn)
    return fn(first, **select_named(kwargs, names, variadic))


def bind_by_name(
    fn: Callable[..., Any],
    kwargs: dict[str, Any],
    given_later: tuple[str, ...] = (),
    skip: int = 1,
) -> Callable[..., Any]:
    """Fixes the arguments that a function names; as in Optax, a bare ``**`` gets none.

    Args:
      fn: the function.
      kwargs: candidates; the function need not take all of them.
      given_later: names that may be missing now.
      skip: how many positional arguments come first, e.g. the parameters.

    Raises:
      TypeError: a required argument is missing.
    """
    names, required, _ = argument_names(fn, skip)
    missing = [name for name in required if name not in kwargs and name not in given_later]
    if missing:
        label = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"`{label}` takes the arguments {missing}, which were not given; pass them as extra "
            f"arguments of update, e.g. tx.update(..., value_fn=value_fn, {missing[0]}=...)."
        )
    bound = {k: v for k, v in kwargs.items() if k in names}
    return functools.partial(fn, **bound) if bound else fn
