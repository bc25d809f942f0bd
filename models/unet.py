"""U-Net, which labels each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class UNet(nnx.Module):
    """The segmentation network of Ronneberger et al. (2015), figure 1.

    Going down, `depth` levels of two 3x3 convolutions with relu, 2x2 max pooling between levels and
    twice the channels in the next; then the same way up: a 2x2 transposed convolution of stride 2
    halves the channels, the features of that level from the way down are put beside them, and two
    convolutions follow. A 1x1 convolution gives the logits of each pixel. For one input channel
    and two classes there are 31,030,658 parameters (computed from the layers of the figure).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def logits(x):
        ...     return UNet(input_shape=(128, 128, 1), num_classes=2)(x)
        >>> jax.eval_shape(logits, jnp.ones((3, 128, 128, 1))).shape  # without computing anything
        (3, 128, 128, 2)

    Args:
        input_shape: (height, width, channels) of one example; with "same" padding height and width
            are multiples of 2 ** `depth`; with "valid", sizes for which all levels are even before
            pooling, such as the paper's 572.
        num_classes: Number of outputs of each pixel.
        width: Channels of the first level; default: 64, the paper's.
        depth: How many times the image is halved; default: 4, the paper's.
        padding: "same" (default): logits for all pixels. "valid", as in the paper: convolutions see
            no border, so that there are logits for a smaller image in the middle only
            (`output_shape`).
        norm: Normalization in front of each relu: "batch", "layer", "group", "instance" or None,
            the default and the paper's.
        dropout_rate: Share of the activations at the end of the way down that are dropped in train
            mode (section 3.1, without a number).
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Ronneberger et al, `U-Net: Convolutional Networks for Biomedical Image Segmentation
        <https://arxiv.org/abs/1505.04597>`_, 2015. Kernels start normal with variance 2 / N for N
        inputs of a unit (section 3).
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 64,
        depth: int = 4,
        padding: str = "same",
        norm: str | None = None,
        dropout_rate: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if padding not in ("same", "valid"):
            raise ValueError(f"unknown padding {padding!r}; valid: same, valid")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.input_shape = tuple(input_shape)
        lost = 2 if padding == "valid" else 0  # pixels, in each convolution
        _common.check_image_shape("UNet", self.input_shape, 2 if lost else 2**depth)
        height, image_width, channels = self.input_shape
        sizes = [_output_size(size, depth, lost) for size in (height, image_width)]
        self.output_shape = (*sizes, num_classes)
        layers = _common.Layers(
            norm=norm,
            axis_name=axis_name,
            conv_init=nnx.initializers.variance_scaling(2.0, "fan_in", "normal"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nnx.List(
            _TwoConvolutions(layers, fan_in, fan_out, lost)
            for fan_in, fan_out in zip((channels, *widths), widths, strict=False)
        )
        self.dropout = layers.dropout(dropout_rate)
        self.enlarge: nnx.List[nnx.ConvTranspose] = nnx.List()
        self.up: nnx.List[_TwoConvolutions] = nnx.List()
        for fan_out in widths[-2::-1]:
            self.enlarge.append(
                nnx.ConvTranspose(
                    2 * fan_out,
                    fan_out,
                    kernel_size=(2, 2),
                    strides=(2, 2),
                    padding="VALID",
                    # Of the 4 inputs of a channel that its kernel counts each output sees one.
                    kernel_init=nnx.initializers.variance_scaling(8.0, "fan_in", "normal"),
                    **layers.types,
                    rngs=layers.rngs,
                )
            )
            self.up.append(_TwoConvolutions(layers, 2 * fan_out, fan_out, lost))
        self.last = layers.conv(width, num_classes, size=1, use_bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, *output_shape), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        seen = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else _common.halve_by_maximum(x))
            seen.append(x)
        x = self.dropout(seen.pop())
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = enlarge(x)
            x = block(jnp.concatenate([_middle(seen.pop(), x.shape), x], axis=-1))
        return _common.as_logits(self.last(x))


def _output_size(size: int, depth: int, lost: int) -> int:
    """Pixels of the output for `size` of the input, if each convolution loses `lost`."""
    inner = size
    for _ in range(depth):
        inner -= 2 * lost
        if inner < 2 or inner % 2:
            break
        inner //= 2
    else:
        inner -= 2 * lost
        for _ in range(depth):
            inner = 2 * inner - 2 * lost
        if inner > 0:
            return inner
    raise ValueError(
        f"UNet of depth {depth} without padding cannot halve {size} pixels evenly {depth} times; "
        "sizes such as 572 or 188 work with depth 4"
    )


def _middle(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The middle of the images, of the given height and width."""
    top, left = (
        (size - wanted) // 2 for size, wanted in zip(x.shape[1:3], shape[1:3], strict=True)
    )
    return x[:, top : top + shape[1], left : left + shape[2]]


class _TwoConvolutions(nnx.Module):
    """Two times 3x3 convolution, normalization and relu."""

    def __init__(self, layers: _common.Layers, fan_in: int, fan_out: int, lost: int):
        padding = "VALID" if lost else "SAME"
        self.conv1 = layers.conv(fan_in, fan_out, padding=padding)
        self.norm1 = layers.norm(fan_out)
        self.conv2 = layers.conv(fan_out, fan_out, padding=padding)
        self.norm2 = layers.norm(fan_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)))
