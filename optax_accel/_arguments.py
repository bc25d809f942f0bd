"""Checks of hyperparameters, made where a method is built."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax


def shown(value: Any) -> str:
    """A wrong value as a message names it: on one line, and without addresses in memory."""
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    text = repr(value)
    plain = len(text) <= 80 and "\n" not in text and " at 0x" not in text
    return text if plain else f"an object of type {type(value).__name__}"


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
    """Raises if a hyperparameter is not a number in the allowed range.

    A scalar array is checked if its value is known.  The ends of the range are allowed, because
    ``optax.inject_hyperparams`` rounds numbers to the dtype of the parameters, and because a
    schedule may end there.  Traced arrays and arrays with axes (members of a ``vmap``) pass.

    Raises:
      ValueError: the value is outside the range or not finite.
      TypeError: the value is not a number (nor a schedule where one is allowed).
    """
    if allow_schedule and callable(value):
        return
    kind = "a number or a schedule" if allow_schedule else "a number"
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating) and not _is_integer_array(value):
            raise TypeError(f"`{name}` must be {kind}, got an array of dtype {value.dtype}.")
        known = _known(value)
        if known is None:
            return
        if open_high and known == high and value.dtype.itemsize < 4:  # 0.999 in bfloat16
            raise ValueError(
                f"`{name}` must be less than {high}, which it was rounded to in {value.dtype}. "
                "Give optax.inject_hyperparams `hyperparam_dtype=jnp.float32`."
            )
        value, open_low, open_high = known, False, False
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"`{name}` must be {kind}, got {shown(value)}.")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if math.isnan(value) or math.isinf(value) or below or above:
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(f"`{name}` must lie in {left}{low}, {high}{right}, got {value!r}.")


def check_learning_rate(value: Any) -> None:
    """Raises if a learning rate is neither a number of at least 0 nor a schedule."""
    check_number("learning_rate", value, 0, allow_schedule=True)


def check_integer(name: str, value: Any, low: int) -> None:
    """Raises if a static count is not a Python integer of at least ``low``.

    Raises:
      ValueError: the value is too small.
      TypeError: the value is not an integer, e.g. an array made by ``optax.inject_hyperparams``.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a Python integer, got an array. Under optax.inject_hyperparams use "
            "optax_accel.inject_hyperparams, which keeps static arguments as they are."
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value!r}.")


def check_count(name: str, value: Any, low: int) -> None:
    """Raises if a count that decides no shapes is not an integer of at least ``low``.

    Unlike :func:`check_integer` it allows the integer arrays that ``optax.inject_hyperparams``
    makes, and checks those whose value is known.

    Raises:
      ValueError: the value is too small.
      TypeError: the value is not an integer.
    """
    if isinstance(value, jax.Array):
        if not _is_integer_array(value):
            raise TypeError(f"`{name}` must be an integer, got an array of dtype {value.dtype}.")
        value = _known(value)
        if value is None:
            return
    check_integer(name, value, low)


def known_integer(value: Any) -> int | None:
    """A count as a Python integer, None if it is an array whose value is not known."""
    known = _known(value) if isinstance(value, jax.Array) else value
    return None if known is None else int(known)


def static_integer(name: str, value: Any, low: int) -> int:
    """The Python integer of a count that decides shapes.

    Raises:
      ValueError: the value is too small.
      TypeError: the value is not an integer, or it is an array whose value is not known.
    """
    if isinstance(value, jax.Array) and (known := known_integer(value)) is not None:
        value = known
    check_integer(name, value, low)
    return int(value)


def check_dtype(name: str, value: Any) -> None:
    """Raises ``TypeError`` if an optional dtype is not a floating-point one."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a dtype, got an array: optax.inject_hyperparams takes every "
            "callable for a schedule, dtypes too. Use optax_accel.inject_hyperparams, which keeps "
            "static arguments as they are."
        )
    if value is None:
        return
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"`{name}` must be a dtype, got {shown(value)}.") from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"`{name}` must be a floating-point dtype, got {dtype}: it would truncate.")


def with_checked_init(
    tx: optax.GradientTransformation, check: Callable[[chex.ArrayTree], None]
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose ``init`` checks the parameters first."""
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: chex.ArrayTree) -> optax.OptState:
        check(params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def check_inner(inner: Any, name: str = "inner") -> None:
    """Raises ``TypeError`` if what a method wraps is not an Optax transformation."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an Optax transformation, got {shown(inner)}: build it first, as in "
            f"{name}=optax.sgd(0.1)."
        )


def check_factory(factory: Any) -> None:
    """Raises ``TypeError`` if it is not a function that builds a transformation."""
    if not callable(factory):
        raise TypeError(
            "`factory` must be a function that returns an Optax transformation, such as optax.sgd "
            f"(not optax.sgd(0.1)), got {shown(factory)}."
        )


def check_product(name: str, value: Any) -> None:
    """Raises ``TypeError`` if an operator is not a function of a vector."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function that multiplies a vector, such as "
            f"lambda v: matrix @ v, got {type(value).__name__}."
        )


def _is_integer_array(value: jax.Array) -> bool:
    return jnp.issubdtype(value.dtype, jnp.integer)


def _known(value: jax.Array) -> Any:
    """The Python number in a scalar array; None if it is traced or has axes."""
    return None if isinstance(value, jax.core.Tracer) or value.ndim else value.item()


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Raises ``TypeError`` if a flag is not a Python or NumPy boolean (or None, if ``optional``).

    Any other value would count as true or false without an error, ``"no"`` as true.
    """
    if not isinstance(value, bool | np.bool_) and not (optional and value is None):
        allowed = "True, False or None" if optional else "True or False"
        raise TypeError(f"`{name}` must be {allowed}, got {shown(value)}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ``ValueError`` if ``value`` is not one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}; got {value!r}.")


def is_placeholder(params: Any) -> bool:
    """Whether it is the placeholder with which ``optax.tree.map_params`` calls ``init``."""
    return isinstance(params, _placeholder_type())


@functools.cache
def _placeholder_type() -> type:
    types: list[type] = []
    optax.tree.map_params(lambda params: types.append(type(params)), lambda leaf: leaf, None)
    return types[0]


def as_arrays(tree: Any) -> Any:
    """The tree with arrays in place of Python numbers, which Optax allows as parameters."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


HOLD_FIXED = "hold it fixed with optax.masked"


def check_real_leaves(
    params: Any,
    method: str,
    advice: str = "leave it out of what is differentiated (`mask=`, where there is one)",
) -> None:
    """Raises ``TypeError`` if a leaf is not real floating point; ``advice`` says what to do."""
    _check_leaves(params, method, jnp.floating, "real floating-point parameters", advice)


def check_floating_leaves(params: Any, method: str, advice: str = HOLD_FIXED) -> None:
    """Raises ``TypeError`` if a leaf is not floating point, real or complex."""
    _check_leaves(params, method, jnp.inexact, "floating-point parameters", advice)


def check_numeric_leaves(params: Any, method: str, advice: str = HOLD_FIXED) -> None:
    """Raises ``TypeError`` if a leaf is a PRNG key, a boolean or anything other than numbers."""
    _check_leaves(params, method, jnp.number, "numbers", advice)


def _check_leaves(params: Any, method: str, kind: Any, what: str, advice: str) -> None:
    for path, dtype in _dtypes(params, method):
        if not jnp.issubdtype(dtype, kind):
            raise TypeError(
                f"{method} works on {what}, but the leaf {path} has dtype {dtype}; {advice}."
            )


def _dtypes(tree: Any, method: str) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path) or "(root)"
        try:
            yield name, leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        except TypeError as error:
            raise TypeError(
                f"{method} works on arrays, but the leaf {name} is {leaf!r}."
            ) from error


def value_of(parameter: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """The value of a hyperparameter that may be a schedule."""
    return parameter(count) if callable(parameter) else parameter
