"""Transformer that classifies sentences."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _attention, _common

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
        self.input_shape = tuple(input_shape)
        _common.check_token_shape("Transformer", self.input_shape)
        layers = _attention.Layers(
            width=embedding_size,
            num_heads=num_heads,
            hidden=feedforward_size,
            activation=activation,
            dropout_rate=dropout_rate,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(rngs) if isinstance(rngs, int) else rngs,
        )
        self.embedding = layers.embedding(vocabulary_size)
        self.dropout = layers.dropout()
        self.layers = nnx.List(_attention.Layer(layers) for _ in range(num_layers))
        self.linear = layers.linear(embedding_size, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of token ids."""
        _common.check_tokens(self, x, self.input_shape)
        is_token = _attention.padding_mask(x, PADDING)
        h = self.embedding(x)
        positions = _attention.sinusoidal_positions(*h.shape[1:])
        h = self.dropout(h + jnp.asarray(positions, h.dtype)[None])
        for layer in self.layers:
            h = layer(h, is_token)
        return _common.as_logits(self.linear(h.mean(axis=1)))
