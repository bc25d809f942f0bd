"""Residual networks, for CIFAR and for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class CifarResNet(nnx.Module):
    """The CIFAR networks of He et al. (2015), section 4.2, with 6 n + 2 layers.

    A 3x3 convolution, three stages of n residual blocks with 16, 32 and 64 channels, where the
    second and the third stage halve the image, then global average pooling and a linear layer.
    With 10 classes and `depth` 20, 32, 44, 56, 110 there are 269,722, 464,154, 658,586, 853,018 and
    1,727,962 trainable parameters (computed from the layers), the paper's 0.27, 0.46, 0.66, 0.85
    and 1.7 million (table 6); with projection shortcuts `depth` 20 has 272,474.

    In train mode (the default; `model.train()`, `model.eval()`, `nnx.view`) batch normalization
    uses the statistics of the batch and updates its running averages with decay 0.9, as PyTorch
    does by default.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def logits(x):
        ...     return CifarResNet(input_shape=(32, 32, 3), num_classes=10, depth=20)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape  # without computing anything
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of 4.
        num_classes: Number of outputs.
        depth: Number of layers with weights, 6 n + 2: 20, 32, 44, 56, 110 in the paper.
        width: Channels of the first stage.
        shortcut: Where a block changes the shape: "identity" takes every second pixel and pads the
            new channels with zeros (option A of the paper, its choice for CIFAR), "projection" is a
            1x1 convolution with normalization (option B).
        norm: "batch", "layer", "group", "instance" or None; without one the convolutions have a
            bias.
        dropout_rate: Share of the inputs of the linear layer that are dropped in train mode.
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        He et al, `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015; initialization: He et al, `Delving Deep into
        Rectifiers <https://arxiv.org/abs/1502.01852>`_, 2015.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 20,
        width: int = 16,
        shortcut: str = "identity",
        norm: str | None = "batch",
        dropout_rate: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if shortcut not in ("identity", "projection"):
            raise ValueError(f"unknown shortcut {shortcut!r}; valid: identity, projection")
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("CifarResNet", self.input_shape, multiple_of=4)
        layers = _common.Layers(
            norm=norm, axis_name=axis_name, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.conv = layers.conv(self.input_shape[2], width)
        self.norm = layers.norm(width)
        self.blocks: nnx.List[_Block] = nnx.List()
        fan_in = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                fan_out, strides = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                self.blocks.append(_Block(layers, fan_in, fan_out, strides, shortcut=shortcut))
                fan_in = fan_out
        self.dropout = layers.dropout(dropout_rate)
        self.linear = layers.linear(
            fan_in,
            num_classes,
            kernel_init=nnx.initializers.he_normal(),
            bias_init=nnx.initializers.zeros_init(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return _common.as_logits(self.linear(self.dropout(x.mean(axis=(1, 2)))))


# Blocks of the four stages (table 1 of the paper); 10 and 14 are the smallest of each kind.
_STAGES = {
    10: (1, 1, 1, 1),
    14: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BASIC_DEPTHS = (10, 18, 34)  # the others have bottlenecks


class ResNet(nnx.Module):
    """The ImageNet networks of He et al. (2015), table 1, as in torchvision.

    A 7x7 convolution and 3x3 max pooling, both with stride 2, four stages of residual blocks, all
    but the first halving the image, then global average pooling and a linear layer. Blocks have two
    3x3 convolutions, from `depth` 50 on one 3x3 between two 1x1 ("bottleneck") with the stride in
    the 3x3, unlike the paper, which has it in the first 1x1. Where a block changes the shape its
    shortcut is a 1x1 convolution with normalization (option B of the paper). With 1,000 classes and
    `depth` 18, 34, 50, 101, 152 there are 11,689,512, 21,797,672, 25,557,032, 44,549,160 and
    60,192,808 parameters (torchvision's documentation).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def logits(x):
        ...     return ResNet(input_shape=(224, 224, 3), num_classes=1000, depth=18)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 224, 224, 3))).shape  # without computing anything
        (2, 1000)

    Args:
        input_shape: (height, width, channels) of one example; 224 x 224 in the paper. The last
            stage sees 1/32 of the height and the width, with `small_images` 1/8, rounded up.
        num_classes: Number of outputs.
        depth: Number of layers with weights: 18, 34, 50, 101 or 152 as in the paper, or one block
            in each stage: 10, with bottlenecks 14.
        width: Channels of the first stage; default: 64, the paper's.
        small_images: Whether to start with a 3x3 convolution of stride 1 without pooling, as is
            usual for CIFAR.
        zero_init_residual: Whether the scale of the last normalization of each block starts from 0,
            so that each block starts as its shortcut (Goyal et al. 2017, section 5.1).
        norm: "batch", "layer", "group", "instance" or None; without one the convolutions have a
            bias.
        dropout_rate: Share of the inputs of the linear layer that are dropped in train mode.
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        He et al, `Deep Residual Learning for Image Recognition
        <https://arxiv.org/abs/1512.03385>`_, 2015; Goyal et al, `Accurate, Large Minibatch SGD
        <https://arxiv.org/abs/1706.02677>`_, 2017. Layout and start (convolutions normal by the
        number of outputs, the linear layer uniform within ±1/sqrt(fan in)): `torchvision
        <https://pytorch.org/vision/stable/models/resnet.html>`_.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 50,
        width: int = 64,
        small_images: bool = False,
        zero_init_residual: bool = False,
        norm: str | None = "batch",
        dropout_rate: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if depth not in _STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, _STAGES))}, got {depth}")
        if zero_init_residual and norm is None:
            raise ValueError(
                "zero_init_residual needs a norm, whose scale starts at 0; got norm=None"
            )
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("ResNet", self.input_shape, multiple_of=1)
        layers = _common.Layers(
            norm=norm,
            axis_name=axis_name,
            conv_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        size, strides = (3, 1) if small_images else (7, 2)
        self.conv = layers.conv(self.input_shape[2], width, size, strides)
        self.norm = layers.norm(width)
        self.pool = not small_images
        self.blocks: nnx.List[_Block] = nnx.List()
        fan_in = width
        for stage, num_blocks in enumerate(_STAGES[depth]):
            for block in range(num_blocks):
                bottleneck = None if depth in _BASIC_DEPTHS else width * 2**stage
                fan_out = width * 2**stage if bottleneck is None else 4 * bottleneck
                self.blocks.append(
                    _Block(
                        layers,
                        fan_in,
                        fan_out,
                        strides=2 if stage > 0 and block == 0 else 1,
                        bottleneck=bottleneck,
                        last_scale=0.0 if zero_init_residual else 1.0,
                    )
                )
                fan_in = fan_out
        self.dropout = layers.dropout(dropout_rate)
        self.linear = layers.linear(fan_in, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = nnx.relu(self.norm(self.conv(x)))
        if self.pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return _common.as_logits(self.linear(self.dropout(x.mean(axis=(1, 2)))))


class _Block(nnx.Module):
    """relu(shortcut(x) + branch(x)); the branch has norms after and relu between its convolutions.

    The convolutions of the branch are two 3x3, the first with the stride; with `bottleneck`, a
    number of channels, 1x1, 3x3 with the stride, 1x1.
    """

    def __init__(
        self,
        layers: _common.Layers,
        fan_in: int,
        fan_out: int,
        strides: int,
        *,
        bottleneck: int | None = None,
        shortcut: str = "projection",
        last_scale: float = 1.0,
    ):
        if bottleneck is None:
            self.conv1 = layers.conv(fan_in, fan_out, strides=strides)
            self.norm1 = layers.norm(fan_out)
            self.conv2 = layers.conv(fan_out, fan_out)
            self.norm2 = layers.norm(fan_out, last_scale)
        else:
            self.conv1 = layers.conv(fan_in, bottleneck, size=1)
            self.norm1 = layers.norm(bottleneck)
            self.conv2 = layers.conv(bottleneck, bottleneck, strides=strides)
            self.norm2 = layers.norm(bottleneck)
            self.conv3 = layers.conv(bottleneck, fan_out, size=1)
            self.norm3 = layers.norm(fan_out, last_scale)
        self.bottleneck = bottleneck
        self.strides = strides
        self.new_channels = fan_out - fan_in
        changes_shape = strides > 1 or fan_in != fan_out
        self.projection = (
            nnx.Sequential(layers.conv(fan_in, fan_out, 1, strides), layers.norm(fan_out))
            if shortcut == "projection" and changes_shape
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.bottleneck is not None:
            y = self.norm3(self.conv3(nnx.relu(y)))
        if self.projection is not None:
            x = self.projection(x)
        elif self.strides > 1:
            x = x[:, :: self.strides, :: self.strides]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))
        return nnx.relu(x + y)
