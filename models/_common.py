"""What the model files share."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def uniform_fan_in(fan_in: int) -> nnx.initializers.Initializer:
    """Uniform within ±1/sqrt(fan_in), for the kernel and for the bias of one layer.

    This is what PyTorch layers start from by default, hence the start of every experiment that was
    published with PyTorch code and names no initializer.
    """
    return uniform(1.0 / math.sqrt(fan_in))


def uniform(bound: float) -> nnx.initializers.Initializer:
    """Uniform within ±bound."""

    def init(
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: DTypeLike | None = None,
        out_sharding: object = None,
    ) -> jax.Array:
        del out_sharding  # parameters are placed by whoever creates the model
        dtype = jnp.float32 if dtype is None else dtype
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


def check_input(model: nnx.Module, x: jax.Array, input_shape: tuple[int, ...]) -> None:
    """Raises if `x` is not a batch of examples of shape `input_shape`."""
    if x.shape[1:] != input_shape or x.ndim != len(input_shape) + 1:
        expected = ", ".join(str(size) for size in ("N", *input_shape))
        raise ValueError(
            f"{type(model).__name__} expects a batch of shape ({expected}), got {x.shape}; "
            "the shape of one example is set by input_shape when the model is created"
        )


def check_image_shape(name: str, input_shape: tuple[int, ...], multiple_of: int) -> None:
    """Raises if `input_shape` is not (height, width, channels) in multiples of `multiple_of`."""
    if len(input_shape) != 3 or any(size % multiple_of for size in input_shape[:2]):
        raise ValueError(
            f"{name} needs input_shape=(height, width, channels) with height and width multiples "
            f"of {multiple_of}, got {input_shape}"
        )


def activation_function(activation: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name."""
    functions = {"gelu": nnx.gelu, "relu": nnx.relu, "tanh": nnx.tanh}
    if activation not in functions:
        raise ValueError(f"unknown activation {activation!r}; valid: {', '.join(functions)}")
    return functions[activation]


def normalization(
    norm: str | None,
    width: int,
    *,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Callable[[jax.Array], jax.Array]:
    """The normalization of that name, in front of an activation; None: the identity."""
    if norm is None:
        return jax.nn.identity
    if norm != "batch":
        raise ValueError(f"unknown norm {norm!r}; valid: None, 'batch'")
    return nnx.BatchNorm(width, momentum=0.9, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def as_logits(x: jax.Array) -> jax.Array:
    """At least float32, so that a loss on bfloat16 outputs keeps its precision."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
