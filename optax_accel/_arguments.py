"""Checks of hyperparameters, made where a method is built."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    allow_schedule: bool = False,
) -> None:
    """Raises if a hyperparameter is no number in the allowed range.

    Arrays pass unchecked: under ``optax.inject_hyperparams`` or ``vmap`` their value is unknown.

    Raises:
      ValueError: the value is outside the range or not finite.
      TypeError: the value is no number (nor a schedule where one is allowed).
    """
    if isinstance(value, jax.Array) or (allow_schedule and callable(value)):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        kind = "a number or a schedule" if allow_schedule else "a number"
        raise TypeError(f"`{name}` must be {kind}, got {value!r}.")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if math.isnan(value) or math.isinf(value) or below or above:
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(f"`{name}` must lie in {left}{low}, {high}{right}, got {value!r}.")


def check_integer(name: str, value: Any, low: int) -> None:
    """Raises if a static count is no Python integer of at least ``low``.

    Raises:
      ValueError: the value is too small.
      TypeError: the value is no integer, e.g. an array made by ``optax.inject_hyperparams``.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a Python integer, got an array. Under optax.inject_hyperparams use "
            "optax_accel.inject_hyperparams, which keeps static arguments as they are."
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value!r}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ``ValueError`` if ``value`` is none of the allowed words."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def check_real_leaves(params: Any, method: str) -> None:
    """Raises ``TypeError`` if a leaf is not real floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{method} works on real floating-point parameters, but the leaf "
                f"{jax.tree_util.keystr(path) or '(root)'} has dtype {dtype}; leave it out of "
                "what is differentiated (`mask=`, where there is one)."
            )


def value_of(parameter: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """The value of a hyperparameter that may be a schedule."""
    return parameter(count) if callable(parameter) else parameter
