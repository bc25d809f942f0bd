"""Residual network for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class ResNet20(nnx.Module):
    """The 20-layer CIFAR network of He et al. (2015), section 4.2.

    A 3x3 convolution, three stages of three residual blocks with 16, 32 and 64 channels, where the
    second and the third stage halve the image, then global average pooling and a linear layer.
    On (32, 32, 3) images with 10 classes it has 269,722 trainable parameters, the scales and biases
    of batch normalization included; 272,474 with projection shortcuts.

    In train mode (the default; `model.train()`, `model.eval()`, `nnx.view`) batch normalization
    uses the statistics of the batch and updates its running averages with decay 0.9, as PyTorch
    does by default.

    Example:
        >>> import jax.numpy as jnp
        >>> model = ResNet20(input_shape=(8, 8, 3), num_classes=10)
        >>> sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        269722
        >>> model(jnp.ones((2, 8, 8, 3))).shape
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of 4.
        num_classes: Number of outputs.
        shortcut: Where a block changes the shape: "identity" takes every second pixel and pads the
            new channels with zeros (option A of the paper, its choice for CIFAR), "projection" is a
            1x1 convolution with batch normalization (option B).
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
        shortcut: str = "identity",
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if shortcut not in ("identity", "projection"):
            raise ValueError(f"unknown shortcut {shortcut!r}; valid: identity, projection")
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("ResNet20", self.input_shape, multiple_of=4)
        layers = _Layers(axis_name, dtype, param_dtype, rngs)

        self.conv = layers.conv(self.input_shape[2], 16)
        self.norm = layers.norm(16)
        blocks = []
        width = 16
        for stage, new_width in enumerate((16, 32, 64)):
            for block in range(3):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(layers, width, new_width, strides, shortcut))
                width = new_width
        self.blocks = nnx.List(blocks)
        self.linear = nnx.Linear(
            width,
            num_classes,
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return _common.as_logits(self.linear(x.mean(axis=(1, 2))))


class _Layers:
    """Makes convolutions and normalizations that share their settings."""

    def __init__(
        self,
        axis_name: str | None,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.axis_name = axis_name
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.rngs = rngs

    def conv(self, fan_in: int, fan_out: int, size: int = 3, strides: int = 1) -> nnx.Conv:
        return nnx.Conv(
            fan_in,
            fan_out,
            kernel_size=(size, size),
            strides=strides,
            # As in the paper, one pixel on each side; "SAME" pads a strided one on one side only.
            padding=size // 2,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def norm(self, width: int) -> nnx.BatchNorm:
        return nnx.BatchNorm(
            width,
            momentum=0.9,
            axis_name=self.axis_name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


class _Block(nnx.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, layers: _Layers, fan_in: int, fan_out: int, strides: int, shortcut: str):
        self.conv1 = layers.conv(fan_in, fan_out, strides=strides)
        self.norm1 = layers.norm(fan_out)
        self.conv2 = layers.conv(fan_out, fan_out)
        self.norm2 = layers.norm(fan_out)
        self.strides = strides
        self.new_channels = fan_out - fan_in
        self.projection = (
            nnx.Sequential(
                layers.conv(fan_in, fan_out, size=1, strides=strides), layers.norm(fan_out)
            )
            if shortcut == "projection" and strides > 1
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projection is not None:
            x = self.projection(x)
        elif self.strides > 1:
            x = x[:, :: self.strides, :: self.strides]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))
        return nnx.relu(x + y)
