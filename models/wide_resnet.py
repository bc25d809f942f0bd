"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class WideResNet(nnx.Module):
    """The WRN-d-k of Zagoruyko and Komodakis (2016), table 1.

    A 3x3 convolution with 16 channels, three stages of (d - 4) / 6 residual blocks with 16 k, 32 k
    and 64 k channels, where the second and the third stage halve the image, then normalization,
    relu, global average pooling and a linear layer. A block normalizes before each of its two 3x3
    convolutions, with dropout between them; where it changes the number of channels its shortcut is
    a 1x1 convolution of the normalized input. With 10 classes WRN-28-10 has 36,479,194 parameters
    and WRN-16-8 10,961,370 (computed from the layers), the paper's 36.5 and 11.0 million (table 4).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> options = {"depth": 16, "widening_factor": 8}
        >>> def logits(x):
        ...     return WideResNet(input_shape=(32, 32, 3), num_classes=10, **options)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape  # without computing anything
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of 4.
        num_classes: Number of outputs.
        depth: d, the number of convolutions, 6 n + 4 with n blocks in each stage.
        widening_factor: k.
        width: Channels of the first convolution.
        norm: "batch", "layer", "group", "instance" or None; without one the convolutions have a
            bias.
        dropout_rate: Share of the activations between the convolutions of a block that are dropped
            in train mode; default: 0; the paper's runs with dropout use 0.3 for CIFAR and 0.4 for
            SVHN (section 3).
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Zagoruyko and Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_, 2016.
        Convolutions start as in their code, normal with variance 2 / (9 * output channels).
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 28,
        widening_factor: int = 10,
        width: int = 16,
        norm: str | None = "batch",
        dropout_rate: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4 with n at least 1, got {depth}")
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("WideResNet", self.input_shape, multiple_of=4)
        layers = _common.Layers(
            norm=norm,
            axis_name=axis_name,
            conv_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.conv = layers.conv(self.input_shape[2], width)
        self.blocks: nnx.List[_Block] = nnx.List()
        fan_in = width
        for stage in range(3):
            for block in range((depth - 4) // 6):
                fan_out = width * widening_factor * 2**stage
                strides = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(_Block(layers, fan_in, fan_out, strides, dropout_rate))
                fan_in = fan_out
        self.norm = layers.norm(fan_in)
        self.linear = layers.linear(fan_in, num_classes, bias_init=nnx.initializers.zeros_init())

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x))
        return _common.as_logits(self.linear(x.mean(axis=(1, 2))))


class _Block(nnx.Module):
    """x + conv(dropout(relu(norm(conv(relu(norm(x))))))), or a 1x1 shortcut instead of x."""

    def __init__(
        self,
        layers: _common.Layers,
        fan_in: int,
        fan_out: int,
        strides: int,
        dropout_rate: float,
    ):
        self.norm1 = layers.norm(fan_in)
        self.conv1 = layers.conv(fan_in, fan_out, strides=strides)
        self.norm2 = layers.norm(fan_out)
        self.dropout = layers.dropout(dropout_rate)
        self.conv2 = layers.conv(fan_out, fan_out)
        changes_shape = strides > 1 or fan_in != fan_out
        self.shortcut = layers.conv(fan_in, fan_out, 1, strides) if changes_shape else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm1(x))
        y = nnx.relu(self.norm2(self.conv1(h)))
        y = self.conv2(self.dropout(y))
        return y + (x if self.shortcut is None else self.shortcut(h))
