"""Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _attention, _common

_POOLS = ("token", "mean")


class Vit(nnx.Module):
    """The Vision Transformer of Dosovitskiy et al. (2020).

    The image is cut into patches, each patch is mapped linearly to a token; a learned class token
    goes in front and learned positions are added. Behind pre-norm encoder layers and a
    normalization, a linear layer reads the class token, or the mean over the patches. On
    (224, 224, 3) images with 1,000 classes and patches of 16 pixels, Ti, S, B and L have 5,717,416,
    22,050,664, 86,567,656 and 304,326,632 parameters (B and L: torchvision's documentation; all:
    computed from the layers).

    Attention is written out, so that float64 stays float64 and second derivatives exist. The
    classifier starts from zeros, as in the paper's code: gradients reach the other layers from the
    second step on.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> def logits(x):
        ...     return Vit(input_shape=(32, 32, 3), num_classes=10, patch_size=4, num_layers=2)(x)
        >>> jax.eval_shape(logits, jnp.ones((2, 32, 32, 3))).shape  # without computing anything
        (2, 10)

    Args:
        input_shape: (height, width, channels) of one example; height and width multiples of
            `patch_size`.
        num_classes: Number of outputs.
        patch_size: Pixels on each side of a patch; 16 by default, 4 is usual for 32 x 32 images.
        embedding_size: Width of a token: 192, 384, 768 and 1,024 in Ti, S, B and L.
        num_layers: Number of encoder layers: 12, in L 24.
        num_heads: Attention heads of a layer: 3, 6, 12 and 16.
        feedforward_size: Hidden units of a layer's feed-forward part: 4 `embedding_size`.
        pool: What the classifier reads: "token", the class token, or "mean", the mean over the
            patches; then there is no class token.
        activation: "gelu" (its tanh approximation, as in the paper's code), "relu" or "tanh".
        dropout_rate: Share of the activations that are dropped in train mode: behind the positions,
            on attention weights, and on each part of a layer. Default: 0; the paper's runs on
            ImageNet alone have 0.1 (table 3).
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Dosovitskiy et al, `An Image is Worth 16x16 Words <https://arxiv.org/abs/2010.11929>`_,
        2020; Ti and S: Touvron et al, `Training data-efficient image transformers
        <https://arxiv.org/abs/2012.12877>`_, 2020, table 1. Layers start as in the `paper's code
        <https://github.com/google-research/vision_transformer>`_: Glorot uniform, the patches by
        LeCun's normal distribution, positions normal with standard deviation 0.02, feed-forward
        biases with 1e-6.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        patch_size: int = 16,
        embedding_size: int = 192,
        num_layers: int = 12,
        num_heads: int = 3,
        feedforward_size: int = 768,
        pool: str = "token",
        activation: str = "gelu",
        dropout_rate: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        if pool not in _POOLS:
            raise ValueError(f"unknown pool {pool!r}; valid: {', '.join(_POOLS)}")
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.input_shape = tuple(input_shape)
        _common.check_image_shape("Vit", self.input_shape, multiple_of=patch_size)
        layers = _attention.Layers(
            width=embedding_size,
            num_heads=num_heads,
            hidden=feedforward_size,
            activation=activation,
            dropout_rate=dropout_rate,
            epsilon=1e-6,
            kernel_init=nnx.initializers.glorot_uniform(),
            bias_init=nnx.initializers.normal(1e-6),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        height, width, channels = self.input_shape
        self.patch_size = patch_size
        zeros = nnx.initializers.zeros_init()
        self.patches = layers.linear(
            patch_size**2 * channels,
            embedding_size,
            kernel_init=nnx.initializers.lecun_normal(),
            bias_init=zeros,
        )
        num_tokens = (height // patch_size) * (width // patch_size) + (pool == "token")
        shape = (num_tokens, embedding_size)
        normal = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(normal(rngs.params(), shape, param_dtype))
        self.token = nnx.Param(jnp.zeros(embedding_size, param_dtype)) if pool == "token" else None
        self.dropout = layers.dropout()
        self.layers = nnx.List(_attention.Layer(layers, pre_norm=True) for _ in range(num_layers))
        self.norm = layers.norm()
        self.linear = layers.linear(embedding_size, num_classes, kernel_init=zeros, bias_init=zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of images."""
        _common.check_input(self, x, self.input_shape)
        x = self.patches(_cut(x, self.patch_size))
        if self.token is not None:
            token = jnp.broadcast_to(self.token[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = self.dropout(x + self.positions[...].astype(x.dtype)[None])
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return _common.as_logits(self.linear(x.mean(axis=1) if self.token is None else x[:, 0]))


def _cut(x: jax.Array, size: int) -> jax.Array:
    """(N, patches, size * size * channels) of images: a convolution of that stride without one."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(n, -1, size * size * channels)
