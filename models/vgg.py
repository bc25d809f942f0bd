"""VGG networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from models import _common

# Convolutions of the five stages (table 1 of the paper, A, B, D, E).
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Vgg(nnx.Module):
    """The networks of Simonyan and Zisserman (2014), table 1, as in torchvision.

    Five stages of 3x3 convolutions with 64, 128, 256, 512 and 512 channels, each followed by
    `norm`, if any, and relu, and each stage by 2x2 max pooling; then hidden linear layers with relu
    and dropout, and a linear layer. On (224, 224, 3) images with 1,000 classes there are
    132,863,336 parameters for `depth` 11 and 138,357,544 for 16, with batch normalization
    132,868,840 and 138,365,992 (torchvision's documentation).

    The names `vgg11_cifar` and `vgg16_cifar` stand for the network that Liu and Deng (2015)
    adjusted to CIFAR: batch normalization and one hidden layer of 512 units, which leaves
    15,037,092 parameters for `depth` 16 on (32, 32, 3) images with 100 classes (computed from the
    layers). Ours: dropout in front of the linear layers only, where their code also has some
    between convolutions, and no normalization behind the hidden layer. The other usual one, with
    no hidden layer at all (K. Liu, pytorch-cifar), is `vgg16_bn` with `hidden_sizes=()`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def logits(x):
        ...     return Vgg(input_shape=(224, 224, 3), num_classes=1000, depth=11)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 224, 224, 3))).shape  # without computing anything
        (2, 1000)

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of 32, 224
            in the paper. The first linear layer reads height/32 * width/32 * 8 `width` features;
            torchvision instead brings all sizes to those of 224 pixels by average pooling.
        num_classes: Number of outputs.
        depth: Number of layers with weights, with the paper's three linear ones: 11, 13, 16, 19.
        width: Channels of the first stage; default: 64, the paper's.
        hidden_sizes: Widths of the hidden linear layers; default: two of 4,096, the paper's.
        norm: "batch", "layer", "group", "instance" or None, the default. Convolutions always have a
            bias, as in torchvision.
        dropout_rate: Share of the outputs of each hidden layer that are dropped in train mode;
            default: 0.5, the paper's (section 3.1).
        axis_name: Replica axis (`pmap`, `shard_map`, `vmap`) whose batches are normalized together;
            `None` normalizes what one replica sees, which under global-view `jit` is everything.
        dtype: Type of the computation; default: that of inputs and parameters. The statistics of
            batch normalization stay in float32.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Simonyan and Zisserman, `Very Deep Convolutional Networks for Large-Scale Image Recognition
        <https://arxiv.org/abs/1409.1556>`_, 2014; Liu and Deng, Very deep convolutional neural
        network based image classification using small training sample size, 2015. Layers start as
        in `torchvision <https://pytorch.org/vision/stable/models/vgg.html>`_: convolutions normal
        with variance 2 / (9 * output channels), linear layers with standard deviation 0.01.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 16,
        width: int = 64,
        hidden_sizes: Sequence[int] = (4096, 4096),
        norm: str | None = None,
        dropout_rate: float = 0.5,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if depth not in _STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, _STAGES))}, got {depth}")
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("Vgg", self.input_shape, multiple_of=32)
        layers = _common.Layers(
            norm=norm,
            axis_name=axis_name,
            conv_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        height, image_width, channels = self.input_shape
        self.stages: nnx.List[nnx.List[_ConvNorm]] = nnx.List()
        for stage, num_convs in enumerate(_STAGES[depth]):
            self.stages.append(nnx.List())
            for _ in range(num_convs):
                fan_in, channels = channels, width * min(2**stage, 8)
                self.stages[stage].append(_ConvNorm(layers, fan_in, channels))
        sizes = (height // 32 * (image_width // 32) * channels, *hidden_sizes, num_classes)
        self.layers = nnx.List(
            layers.linear(
                fan_in,
                fan_out,
                kernel_init=nnx.initializers.normal(0.01),
                bias_init=nnx.initializers.zeros_init(),
            )
            for fan_in, fan_out in itertools.pairwise(sizes)
        )
        self.dropouts = nnx.List(layers.dropout(dropout_rate) for _ in hidden_sizes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        for stage in self.stages:
            for conv in stage:
                x = nnx.relu(conv(x))
            x = _common.halve_by_maximum(x)
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.layers
        for layer, dropout in zip(hidden, self.dropouts, strict=True):
            x = dropout(nnx.relu(layer(x)))
        return _common.as_logits(last(x))


class _ConvNorm(nnx.Module):
    """A convolution with bias, and a normalization."""

    def __init__(self, layers: _common.Layers, fan_in: int, fan_out: int):
        self.conv = layers.conv(fan_in, fan_out, use_bias=True)
        self.norm = layers.norm(fan_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))
