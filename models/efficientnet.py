"""EfficientNet."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from models import _common
from models.mobilenet import InvertedResidual


class Stage(NamedTuple):
    """A row of table 1 of the paper: equal blocks, of which the first has the stride."""

    expansion: int
    kernel_size: int
    strides: int
    channels: int
    repeats: int


_STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class EfficientNet(nnx.Module):
    """The networks of Tan and Le (2019), table 1, as in torchvision.

    A 3x3 convolution with stride 2, inverted residual blocks with squeeze and excitation, a 1x1
    convolution to four times the channels, global average pooling, dropout and a linear layer;
    silu between convolutions. A block expands the channels by a 1x1 convolution, filters each by a
    3x3 or 5x5 one, weights them by a gate computed from their means, and projects by a 1x1 one; if
    the shape stays, its input is added, and in train mode the branch is skipped for some examples
    (stochastic depth). With 1,000 classes B0 to B7 have 5,288,548, 7,794,184, 9,109,994,
    12,233,232, 19,341,616, 30,389,784, 43,040,704 and 66,347,960 parameters (torchvision's
    documentation).

    Convolutions pad by half their size on each side, as torchvision's do; the TensorFlow original
    pads strided ones ("SAME") on one side more than on the other, so that its outputs are shifted.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> options = {"stages": [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2)], "small_images": True}
        >>> def logits(x):
        ...     return EfficientNet(input_shape=(32, 32, 3), num_classes=10, **options)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape  # without computing anything
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example. The paper's sizes of B0 to B7 are
            224, 240, 260, 300, 380, 456, 528 and 600 pixels; the last stage sees 1/32 of the height
            and the width, with `small_images` 1/8, rounded up.
        num_classes: Number of outputs.
        width_multiplier: Factor of all numbers of channels, which are rounded to multiples of 8;
            1.0, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0 for B0 to B7.
        depth_multiplier: Factor of the numbers of blocks in a stage, which are rounded up; 1.0,
            1.1, 1.2, 1.4, 1.8, 2.2, 2.6, 3.1 for B0 to B7.
        stages: (expansion, kernel_size, strides, channels, repeats) of each stage before the
            multipliers; default: the paper's.
        small_images: Whether the first convolution and the second stage have stride 1 instead of 2,
            for images such as CIFAR's.
        norm: "batch", "layer", "group", "instance" or None; without one the convolutions have a
            bias. Batch normalization has epsilon 1e-5 and decay 0.9; torchvision's B5 to B7 have
            1e-3 and 0.99, like the paper's code.
        dropout_rate: Share of the inputs of the linear layer that are dropped in train mode;
            default: B0's; 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5 for B0 to B7.
        drop_path_rate: Probability that the last block skips its branch for an example in train
            mode; that of the k-th of n blocks (from 0) is k / n times as large. Default: 0.2, by
            the paper's survival probability of 0.8 (section 5.2).
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Tan and Le, `EfficientNet <https://arxiv.org/abs/1905.11946>`_, 2019; Huang et al, `Deep
        Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_, 2016. Layers start as
        in `torchvision <https://pytorch.org/vision/stable/models/efficientnet.html>`_: convolutions
        normal by the number of outputs, the linear layer uniform within ±1/sqrt(num_classes).
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        width_multiplier: float = 1.0,
        depth_multiplier: float = 1.0,
        stages: Sequence[tuple[int, int, int, int, int]] = _STAGES,
        small_images: bool = False,
        norm: str | None = "batch",
        dropout_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("EfficientNet", self.input_shape, multiple_of=1)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
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
        rows = [Stage._make(stage) for stage in stages]
        repeats = [math.ceil(stage.repeats * depth_multiplier) for stage in rows]
        self.blocks: nnx.List[InvertedResidual] = nnx.List()
        for number, stage in enumerate(rows):
            for block in range(repeats[number]):
                fan_in, width = width, _common.round_channels(stage.channels * width_multiplier)
                strides = stage.strides if block == 0 and not (small_images and number == 1) else 1
                hidden = _common.round_channels(fan_in * stage.expansion)
                self.blocks.append(
                    InvertedResidual(
                        layers,
                        fan_in,
                        hidden,
                        width,
                        strides,
                        kernel_size=stage.kernel_size,
                        activation=nnx.silu,
                        gate=functools.partial(_Gate, width=hidden, squeezed=max(1, fan_in // 4)),
                        drop_path_rate=drop_path_rate * len(self.blocks) / sum(repeats),
                    )
                )
        fan_in, width = width, 4 * width
        self.last_conv = layers.conv(fan_in, width, size=1)
        self.last_norm = layers.norm(width)
        self.dropout = layers.dropout(dropout_rate)
        self.linear = layers.linear(
            width,
            num_classes,
            kernel_init=_common.uniform_fan_in(num_classes),
            bias_init=nnx.initializers.zeros_init(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = nnx.silu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.silu(self.last_norm(self.last_conv(x)))
        return _common.as_logits(self.linear(self.dropout(x.mean(axis=(1, 2)))))


class _Gate(nnx.Module):
    """Squeeze and excitation: each channel times a number in (0, 1) computed from all means."""

    def __init__(self, layers: _common.Layers, width: int, squeezed: int):
        inits = {"kernel_init": layers.conv_init, "bias_init": nnx.initializers.zeros_init()}
        self.squeeze = layers.linear(width, squeezed, **inits)
        self.excite = layers.linear(squeezed, width, **inits)

    def __call__(self, x: jax.Array) -> jax.Array:
        means = x.mean(axis=(1, 2))
        gates = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(means))))
        return x * gates[:, None, None]
