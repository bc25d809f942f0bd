"""Initializers, layers and checks that the model files share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def uniform_fan_in(fan_in: int) -> nnx.initializers.Initializer:
    """Uniform within ±1/sqrt(fan_in), for the kernel and for the bias of one layer.

    This is the default of PyTorch's layers, hence the initialization of every experiment that was
    published with PyTorch code without naming an initializer.
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
        del out_sharding  # the caller that creates the model places its parameters
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


def check_tokens(model: nnx.Module, x: jax.Array, input_shape: tuple[int, ...]) -> None:
    """Raises if `x` is not a batch of token ids of shape `input_shape`."""
    check_input(model, x, input_shape)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{type(model).__name__} expects integer token ids, got {x.dtype}")


def check_token_shape(name: str, input_shape: tuple[int, ...]) -> None:
    """Raises if `input_shape` is not (length,)."""
    if len(input_shape) != 1:
        raise ValueError(f"{name} needs input_shape=(length,) for token ids, got {input_shape}")


def check_image_shape(name: str, input_shape: tuple[int, ...], multiple_of: int) -> None:
    """Raises if `input_shape` is not (height, width, channels) in multiples of `multiple_of`."""
    if len(input_shape) != 3 or any(size % multiple_of for size in input_shape[:2]):
        multiples = f" with height and width multiples of {multiple_of}" if multiple_of > 1 else ""
        raise ValueError(
            f"{name} needs input_shape=(height, width, channels){multiples}, got {input_shape}"
        )


def activation_function(activation: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name."""
    functions = {"gelu": nnx.gelu, "relu": nnx.relu, "tanh": nnx.tanh}
    if activation not in functions:
        raise ValueError(f"unknown activation {activation!r}; valid: {', '.join(functions)}")
    return functions[activation]


NORMS = ("batch", "layer", "group", "instance")


def normalization(
    norm: str | None,
    width: int,
    *,
    axis_name: str | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    scale: float = 1.0,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Callable[[jax.Array], jax.Array]:
    """The normalization of that name, with a scale and a bias for each channel.

    The channels are the last axis, as in (N, height, width, channels). Each takes the mean and the
    variance over other axes: "batch" over all but the channels; "layer" over the channels, for each
    pixel or token by itself; "instance" over the pixels; "group" over the pixels and the channels
    of one group, with 32 groups as in its paper (Wu and He 2018) if these have at least two
    channels, otherwise with the largest power of two for which they do. "layer" is that of
    Transformers and ConvNeXt; including the pixels, it would be "group" with one group. Statistics
    are computed and kept in float32 or wider, whatever the type of the computation.

    Args:
        norm: "batch", "layer", "group", "instance" or None, the identity.
        width: Number of channels.
        axis_name: Replica axis whose batches are normalized together; only for "batch".
        momentum: Decay of the running averages; only for "batch". In PyTorch's terms 0.9 is 0.1.
        epsilon: Added to the variance; default: PyTorch's.
        scale: Initial value of the scales.
        dtype: Type of the computation; None means that of inputs and parameters.
        param_dtype: Type of the parameters.
        rngs: Random keys.

    Raises:
        ValueError: If the name is unknown.
    """
    if norm is None:
        return jax.nn.identity
    options: dict[str, Any] = {
        "epsilon": epsilon,
        "scale_init": nnx.initializers.constant(scale),
        "dtype": dtype,
        "param_dtype": param_dtype,
        "rngs": rngs,
    }
    if norm == "batch":
        layer = nnx.BatchNorm(width, momentum=momentum, axis_name=axis_name, **options)
        # Flax keeps running averages in float32, and warns when it rounds wider ones to that.
        kept = jnp.promote_types(jnp.float32, param_dtype)
        layer.mean = nnx.BatchStat(jnp.zeros(width, kept))
        layer.var = nnx.BatchStat(jnp.ones(width, kept))
        return layer
    if norm == "layer":
        return nnx.LayerNorm(width, **options)
    if norm == "group":
        return nnx.GroupNorm(width, math.gcd(32, width, width // 2), **options)
    if norm == "instance":
        return nnx.InstanceNorm(width, **options)
    raise ValueError(f"unknown norm {norm!r}; valid: {', '.join(NORMS)}, None")


class Layers:
    """Makes the layers of an image network, which share their settings.

    Args:
        norm: The normalization: "batch", "layer", "group", "instance" or None.
        axis_name: Replica axis whose batches are normalized together; only for "batch".
        momentum: Decay of the running averages; only for "batch".
        epsilon: Added to the variance in a normalization.
        conv_init: Initializer of the kernels of convolutions; default: He et al.'s normal
            distribution for relu, by the number of inputs.
        dtype: Type of the computation.
        param_dtype: Type of the parameters.
        rngs: Random keys, or a seed.
    """

    def __init__(
        self,
        *,
        norm: str | None = None,
        axis_name: str | None = None,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        conv_init: nnx.initializers.Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.conv_init = nnx.initializers.he_normal() if conv_init is None else conv_init
        self._norm = norm
        self._norm_options: dict[str, Any] = {
            "axis_name": axis_name,
            "momentum": momentum,
            "epsilon": epsilon,
        }

    def conv(
        self,
        fan_in: int,
        fan_out: int,
        size: int = 3,
        strides: int = 1,
        *,
        use_bias: bool | None = None,
        **options: Any,
    ) -> nnx.Conv:
        """A square convolution; by default it has a bias only if there is no norm.

        It pads by half its size on each side, as PyTorch code does; "SAME" would pad a strided one
        on one side only.
        """
        options = {"padding": size // 2, "kernel_init": self.conv_init} | options
        return nnx.Conv(
            fan_in,
            fan_out,
            kernel_size=(size, size),
            strides=strides,
            use_bias=self._norm is None if use_bias is None else use_bias,
            **options,
            **self.types,
            rngs=self.rngs,
        )

    def norm(self, width: int, scale: float = 1.0) -> Callable[[jax.Array], jax.Array]:
        """The normalization of `width` channels, whose scales start from `scale`."""
        return normalization(
            self._norm, width, scale=scale, **self._norm_options, **self.types, rngs=self.rngs
        )

    def linear(self, fan_in: int, fan_out: int, **options: Any) -> nnx.Linear:
        """A linear layer; by default it starts uniform within ±1/sqrt(fan_in)."""
        init = uniform_fan_in(fan_in)
        options = {"kernel_init": init, "bias_init": init} | options
        return nnx.Linear(fan_in, fan_out, **options, **self.types, rngs=self.rngs)

    def dropout(self, rate: float, **options: Any) -> nnx.Dropout:
        """Dropout, with a random stream only if the rate is above 0."""
        if not 0 <= rate < 1:
            raise ValueError(f"dropout_rate must be at least 0 and below 1, got {rate}")
        return nnx.Dropout(rate, **options, rngs=self.rngs if rate else None)


class WeightNormalized(nnx.Module):
    """A layer whose weights are given by a length and a direction for each output unit.

    The output is that of the layer with the kernel length * direction / |direction|, where `length`
    is a parameter of the shape (outputs,) and the kernel of the layer is the direction. At the
    start it computes the same function as the layer; units whose weights are all zero get length 0.

    Flax's `nnx.WeightNorm` does not serve here: its lengths are not an `nnx.Param`, so they are not
    trained, and each call writes into the parameters of the layer.

    Args:
        layer: `nnx.Linear`, `nnx.Conv` or another layer whose `kernel` ends with the output axis.

    References:
        Salimans and Kingma, `Weight Normalization <https://arxiv.org/abs/1602.07868>`_, 2016,
        equation 2.
    """

    def __init__(self, layer: nnx.Linear | nnx.Conv | nnx.ConvTranspose):
        self.layer = layer
        kernel = layer.kernel[...]
        length = _lengths(kernel)
        # A direction is needed even where all weights are zero.
        direction = jnp.where(length > 0, kernel, 1)
        self.length = nnx.Param(length.reshape(-1).astype(kernel.dtype))
        self.layer.kernel[...] = direction

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output of the layer for `x`."""
        return self.folded()(x)

    def folded(self) -> Any:
        """The plain layer of the same function: a copy, so that the parameters stay unchanged."""
        direction = self.layer.kernel[...]
        axes = tuple(range(direction.ndim - 1))
        factor = jnp.expand_dims(self.length[...], axes) / _lengths(direction)
        layer = nnx.clone(self.layer)
        layer.kernel[...] = (direction * factor).astype(direction.dtype)
        return layer


def _lengths(kernel: jax.Array) -> jax.Array:
    """Norms of the output units in float32 or wider, the other axes kept with length 1."""
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(kernel**2, axis=tuple(range(kernel.ndim - 1)), keepdims=True))


def normalize_weights(model: nnx.Module) -> None:
    """Puts `WeightNormalized` around every linear layer and convolution of a model, in place.

    Those that a model has normalized itself stay as they are.
    """
    layers = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear | nnx.Conv | nnx.ConvTranspose)
    ]
    for path, layer in layers:
        owner = owner_of(model, path)
        if not isinstance(owner, WeightNormalized):
            replace(owner, path[-1], WeightNormalized(layer))


def owner_of(model: nnx.Module, path: Sequence[Any]) -> Any:
    """The module, list or other container in which the module of a path stands.

    Args:
        model: The model.
        path: As `nnx.iter_modules` gives it.
    """
    owner: Any = model
    for part in path[:-1]:
        owner = owner[part] if isinstance(part, int) else getattr(owner, str(part))
    return owner


def replace(owner: Any, name: Any, module: nnx.Module) -> None:
    """Puts a module in place of another one.

    Args:
        owner: As `owner_of` gives it.
        name: The last part of the path.
        module: The new one.
    """
    if isinstance(name, int):
        owner[name] = module
    else:
        setattr(owner, str(name), module)


def halve_by_maximum(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 blocks; among equal values the first gets the gradient.

    A last row or column that has no partner is left out.

    On a CPU its gradient is twice as fast as that of `nnx.max_pool`. The gradient of `jnp.max`
    would go to the inputs that equal the maximum: where XLA computes an input twice, in two fusions
    that round differently, none does, and the gradient is NaN or wrong.
    """
    n, height, width, channels = x.shape
    if height % 2 or width % 2:
        x = x[:, : height - height % 2, : width - width % 2]
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    x = _larger(x[:, :, 0], x[:, :, 1])
    return _larger(x[:, :, :, 0], x[:, :, :, 1])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def round_channels(width: float) -> int:
    """The nearest multiple of 8, at least 8 and not more than 10 % below `width`.

    The rule is that of MobileNet's code, which EfficientNet adopted.
    """
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def as_logits(x: jax.Array) -> jax.Array:
    """At least float32, so that a loss on bfloat16 outputs keeps its precision."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
