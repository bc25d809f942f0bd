"""Small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class Cnn(nnx.Module):
    """Two times 3x3 convolution, activation and 2x2 max pooling, then one linear layer.

    With 32 channels and relu this is the network of Song et al., "Does SGD really happen in tiny
    subspaces?" (2024), for CIFAR-10, and starts like theirs from PyTorch's default, uniform within
    ±1/sqrt(fan in).

    Example:
        >>> import jax.numpy as jnp
        >>> model = Cnn(input_shape=(8, 8, 1), num_classes=10, channels=(4, 4))
        >>> model(jnp.ones((5, 8, 8, 1))).shape
        (5, 10)

    Args:
        input_shape: (height, width, channels) of one example; height and width at least 4. Pooling
            leaves out a last row or column that has no partner.
        num_classes: Number of outputs.
        channels: Output channels of the two convolutions.
        activation: "relu", "tanh" or "gelu".
        norm: Normalization in front of every activation: "batch", "layer", "group", "instance" or
            None, the default.
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        channels: tuple[int, int] = (32, 32),
        activation: str = "relu",
        norm: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("Cnn", self.input_shape, multiple_of=1)
        if min(self.input_shape[:2]) < 4:
            raise ValueError(f"Cnn needs pictures of at least 4 x 4 pixels, got {self.input_shape}")
        self.activation = _common.activation_function(activation)
        height, width, colors = self.input_shape
        first, second = channels
        features = (height // 4) * (width // 4) * second

        def conv(fan_in: int, fan_out: int) -> nnx.Conv:
            init = _common.uniform_fan_in(9 * fan_in)
            return nnx.Conv(
                fan_in,
                fan_out,
                kernel_size=(3, 3),
                kernel_init=init,
                bias_init=init,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.conv1 = conv(colors, first)
        self.conv2 = conv(first, second)
        self.norm1, self.norm2 = (
            _common.normalization(norm, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for width in channels
        )
        self.linear = nnx.Linear(
            features,
            num_classes,
            kernel_init=_common.uniform_fan_in(features),
            bias_init=_common.uniform_fan_in(features),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = _common.halve_by_maximum(self.activation(self.norm1(self.conv1(x))))
        x = _common.halve_by_maximum(self.activation(self.norm2(self.conv2(x))))
        return _common.as_logits(self.linear(x.reshape(x.shape[0], -1)))
