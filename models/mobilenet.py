"""MobileNetV2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class Stage(NamedTuple):
    """A row of table 2 of the paper: equal blocks, of which the first has the stride."""

    expansion: int
    channels: int
    repeats: int
    strides: int


_STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class MobileNetV2(nnx.Module):
    """The network of Sandler et al. (2018), table 2, as in torchvision.

    A 3x3 convolution with stride 2, inverted residual blocks (1x1 convolution to `expansion` times
    the channels, 3x3 on each channel, 1x1 back, the input added if the shape stays), a 1x1
    convolution to 1,280 channels, global average pooling, dropout and a linear layer; relu6 between
    convolutions. With 1,000 classes there are 3,504,872 parameters (torchvision's documentation).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> options = {"stages": [(1, 16, 1, 1), (6, 24, 2, 2)], "small_images": True}
        >>> def logits(x):
        ...     return MobileNetV2(input_shape=(32, 32, 3), num_classes=10, **options)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape  # without computing anything
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example; 224 x 224 in the paper. The last
            stage sees 1/32 of the height and the width, with `small_images` 1/8, rounded up.
        num_classes: Number of outputs.
        width_multiplier: Factor of all numbers of channels, which are rounded to multiples of 8;
            that of the last convolution never falls below 1,280.
        stages: (expansion, channels, repeats, strides) of each stage; default: the paper's.
        small_images: Whether the first convolution and the second stage have stride 1 instead of 2,
            as is usual for CIFAR.
        norm: "batch", "layer", "group", "instance" or None; without one the convolutions have a
            bias.
        dropout_rate: Share of the inputs of the linear layer that are dropped in train mode;
            default: torchvision's.
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Sandler et al, `MobileNetV2: Inverted Residuals and Linear Bottlenecks
        <https://arxiv.org/abs/1801.04381>`_, 2018. Layers start as in `torchvision
        <https://pytorch.org/vision/stable/models/mobilenetv2.html>`_: convolutions normal by the
        number of outputs, the linear layer with standard deviation 0.01.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        width_multiplier: float = 1.0,
        stages: Sequence[tuple[int, int, int, int]] = _STAGES,
        small_images: bool = False,
        norm: str | None = "batch",
        dropout_rate: float = 0.2,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("MobileNetV2", self.input_shape, multiple_of=1)
        layers = _common.Layers(
            norm=norm,
            axis_name=axis_name,
            conv_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        width = _common.round_channels(32 * width_multiplier)
        self.conv = layers.conv(self.input_shape[2], width, strides=1 if small_images else 2)
        self.norm = layers.norm(width)
        self.blocks: nnx.List[InvertedResidual] = nnx.List()
        for number, stage in enumerate(map(Stage._make, stages)):
            for block in range(stage.repeats):
                fan_in, width = width, _common.round_channels(stage.channels * width_multiplier)
                strides = stage.strides if block == 0 and not (small_images and number == 1) else 1
                hidden = fan_in * stage.expansion
                self.blocks.append(InvertedResidual(layers, fan_in, hidden, width, strides))
        fan_in, width = width, _common.round_channels(1280 * max(1.0, width_multiplier))
        self.last_conv = layers.conv(fan_in, width, size=1)
        self.last_norm = layers.norm(width)
        self.dropout = layers.dropout(dropout_rate)
        self.linear = layers.linear(
            width,
            num_classes,
            kernel_init=nnx.initializers.normal(0.01),
            bias_init=nnx.initializers.zeros_init(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = nnx.relu6(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.last_norm(self.last_conv(x)))
        return _common.as_logits(self.linear(self.dropout(x.mean(axis=(1, 2)))))


class InvertedResidual(nnx.Module):
    """Expand (1x1), filter each channel, project (1x1); the input is added if the shape stays.

    Args:
        layers: Makes them.
        fan_in: Channels of the input.
        hidden: Channels of what is filtered; if they are `fan_in` nothing is expanded.
        fan_out: Channels of the result.
        strides: Of the filter.
        kernel_size: Of the filter.
        activation: Behind all but the projection.
        gate: Applied to what is filtered.
        drop_path_rate: Probability that what would be added is left out for an example.
    """

    def __init__(
        self,
        layers: _common.Layers,
        fan_in: int,
        hidden: int,
        fan_out: int,
        strides: int,
        *,
        kernel_size: int = 3,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu6,
        gate: Callable[[_common.Layers], Callable[[jax.Array], jax.Array]] | None = None,
        drop_path_rate: float = 0.0,
    ):
        self.expands = hidden != fan_in
        if self.expands:
            self.expand = layers.conv(fan_in, hidden, size=1)
            self.expand_norm = layers.norm(hidden)
        self.filter = layers.conv(hidden, hidden, kernel_size, strides, feature_group_count=hidden)
        self.filter_norm = layers.norm(hidden)
        self.gate = jax.nn.identity if gate is None else gate(layers)
        self.project = layers.conv(hidden, fan_out, size=1)
        self.project_norm = layers.norm(fan_out)
        self.activation = activation
        self.adds = strides == 1 and fan_in == fan_out
        # One decision for all pixels and channels of an example.
        rate = drop_path_rate if self.adds else 0.0
        self.drop_path = layers.dropout(rate, broadcast_dims=(1, 2, 3))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, height, width, fan_in) to (N, height / strides, width / strides, fan_out)."""
        y = self.activation(self.expand_norm(self.expand(x))) if self.expands else x
        y = self.gate(self.activation(self.filter_norm(self.filter(y))))
        y = self.project_norm(self.project(y))
        return x + self.drop_path(y) if self.adds else y
