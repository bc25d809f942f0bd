"""Transformer that classifies sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models import _common

PADDING = 0  # the token id that stands for no token


class Transformer(nnx.Module):
    """Embedding and positions, encoder layers, mean over the positions, one linear layer.

    The default is the network of Song et al., "Does SGD really happen in tiny subspaces?" (2024),
    for SST-2: width 64, two post-norm layers of 8 heads and 2,048 hidden units, relu, no dropout.
    With V = `vocabulary_size`, C = `num_classes`, width E and F hidden units it has
    V E + C (E + 1) + `num_layers` (4 E² + 2 E F + 9 E + F) parameters.

    Attention leaves out padding as keys; the mean at the end takes all positions, padding included,
    as their code does. Layers start like PyTorch's, from which their code is built: embeddings
    normal with standard deviation 1; query, key and value uniform within ±sqrt(6 / 4E) (Glorot's,
    for the three as one matrix) without bias; other layers uniform within ±1/sqrt(fan in). One
    thing is ours: PyTorch starts all layers from copies of one, here each is drawn.

    Example:
        >>> import jax.numpy as jnp
        >>> model = Transformer(input_shape=(6,), num_classes=2, vocabulary_size=100)
        >>> model(jnp.array([[5, 17, 3, 0, 0, 0], [4, 99, 2, 8, 1, 7]])).shape
        (2, 2)

    Args:
        input_shape: (length,): number of tokens of one example.
        num_classes: Number of outputs.
        vocabulary_size: Number of different token ids; id 0 is padding.
        embedding_size: Width of the network; even, and a multiple of `num_heads`.
        num_layers: Number of encoder layers.
        num_heads: Attention heads of a layer.
        feedforward_size: Hidden units of a layer's feed-forward part.
        activation: "relu", "tanh" or "gelu".
        dropout_rate: Share of the activations that are dropped in train mode, where PyTorch's
            encoder does: after the positions, on attention weights, on each part of a layer.
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Vaswani et al, `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, 2017:
        section 3.2 (layers) and 3.5 (positions).
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        vocabulary_size: int,
        embedding_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 8,
        feedforward_size: int = 2048,
        activation: str = "relu",
        dropout_rate: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.input_shape = tuple(input_shape)
        if len(self.input_shape) != 1:
            raise ValueError(
                f"Transformer needs input_shape=(length,) for token ids, got {self.input_shape}"
            )
        if embedding_size % 2 or embedding_size % num_heads:
            raise ValueError(
                f"embedding_size must be even and a multiple of num_heads {num_heads}, "
                f"got {embedding_size}"
            )
        if not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate must be at least 0 and below 1, got {dropout_rate}")
        layers = _Layers(
            embedding_size,
            num_heads,
            feedforward_size,
            activation,
            dropout_rate,
            dtype,
            param_dtype,
            rngs,
        )
        self.embedding = nnx.Embed(
            vocabulary_size,
            embedding_size,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dropout = layers.dropout()
        self.layers = nnx.List(_EncoderLayer(layers) for _ in range(num_layers))
        self.linear = layers.linear(embedding_size, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of token ids."""
        _common.check_input(self, x, self.input_shape)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"Transformer expects integer token ids, got {x.dtype}")
        # One mask for all heads and queries: (N, heads, queries, keys).
        is_token = (x != PADDING)[:, None, None, :]
        h = self.embedding(x)
        h = self.dropout(h + jnp.asarray(_positions(*h.shape[1:]), h.dtype)[None])
        for layer in self.layers:
            h = layer(h, is_token)
        return _common.as_logits(self.linear(h.mean(axis=1)))


def _positions(length: int, width: int) -> np.ndarray:
    """Sines in the even columns and cosines in the odd ones, of falling frequency."""
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width)


class _Layers:
    """What the layers have in common."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        activation: str,
        dropout_rate: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.width = width
        self.num_heads = num_heads
        self.hidden = hidden
        self.activation = _common.activation_function(activation)
        self.dropout_rate = dropout_rate
        self.types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.rngs = rngs

    def linear(self, fan_in: int, fan_out: int, **inits: Any) -> nnx.Linear:
        init = _common.uniform_fan_in(fan_in)
        inits = {"kernel_init": init, "bias_init": init} | inits
        return nnx.Linear(fan_in, fan_out, **inits, **self.types, rngs=self.rngs)

    def norm(self) -> nnx.LayerNorm:
        return nnx.LayerNorm(self.width, epsilon=1e-5, **self.types, rngs=self.rngs)

    def dropout(self) -> nnx.Dropout:
        # Without dropout the model has no random state.
        return nnx.Dropout(self.dropout_rate, rngs=self.rngs if self.dropout_rate else None)


class _Attention(nnx.Module):
    """Scaled dot products of all heads, written out.

    The fused attention of JAX and Flax rounds float64 to float32, and on some devices has no second
    derivative.
    """

    def __init__(self, layers: _Layers):
        width, no_bias = layers.width, nnx.initializers.zeros_init()
        # Glorot's bound for a matrix with `width` inputs and 3 `width` outputs.
        glorot = _common.uniform(math.sqrt(6 / (4 * width)))
        self.projection = layers.linear(width, 3 * width, kernel_init=glorot, bias_init=no_bias)
        self.output = layers.linear(width, width, bias_init=no_bias)
        self.dropout = layers.dropout()
        self.num_heads = layers.num_heads

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        parts = self.projection(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = jnp.moveaxis(parts, 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[-1])
        # Not minus infinity: a row of padding only would become NaN.
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = self.dropout(jax.nn.softmax(scores))
        return self.output(jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape))


class _EncoderLayer(nnx.Module):
    """h = norm(x + attention(x)), then norm(h + linear(activation(linear(h))))."""

    def __init__(self, layers: _Layers):
        self.attention = _Attention(layers)
        self.norm1 = layers.norm()
        self.linear1 = layers.linear(layers.width, layers.hidden)
        self.linear2 = layers.linear(layers.hidden, layers.width)
        self.norm2 = layers.norm()
        self.activation = layers.activation
        self.dropout1 = layers.dropout()
        self.dropout2 = layers.dropout()
        self.dropout3 = layers.dropout()

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        h = self.norm1(x + self.dropout1(self.attention(x, mask)))
        y = self.dropout2(self.activation(self.linear1(h)))
        return self.norm2(h + self.dropout3(self.linear2(y)))
