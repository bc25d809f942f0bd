"""Encoder-decoder Transformer that translates sentences."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models import _attention, _common

PADDING = 0  # the token id that stands for no token


class TransformerTranslator(nnx.Module):
    """An encoder reads the source, a decoder predicts the target token by token.

    One example is one row of `source_length + target_length` token ids: first the source, padded
    with 0 on either side, then the target shifted right: a begin token and all but the last of the
    tokens that are to be predicted. So the logits at one target position depend on the source and
    on the target tokens before the one that they predict. Padding at the end of the target changes
    nothing in front of it; the loss leaves it out. Source padding is seen by nobody.

    The default is the base network of Vaswani et al. (2017): width 512, 6 + 6 post-norm layers of 8
    heads and 2,048 hidden units, sinusoidal positions, embeddings times sqrt(width), one table for
    source, target and output (section 3.4). With V = `vocabulary_size`, width E, F hidden units and
    L = `num_layers` it has V E + L (12 E² + 4 E F + 24 E + 2 F) parameters; the layers alone
    44,138,496, which is PyTorch's `nn.Transformer()` without the two normalizations that it adds
    behind its stacks. A `source_vocabulary_size` S adds S E, `tied=False` V E, `pre_norm` 4 E.
    For the 29,000 sentence pairs of Multi30k smaller ones are usual, such as PyTorch's tutorial
    `num_layers=3, feedforward_size=512`.

    It starts as in the authors' tensor2tensor: kernels uniform by Glorot's rule, tables normal with
    standard deviation 1/sqrt(width), biases 0.

    Example:
        Sizes without computing anything:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> source, target = jnp.array([[7, 5, 6, 0]]), jnp.array([[1, 9, 8]])
        >>> x = jnp.concatenate([source, target], axis=1)
        >>> sizes = {"input_shape": (4, 3), "vocabulary_size": 37_000, "num_layers": 2}
        >>> nnx.eval_shape(lambda: TransformerTranslator(**sizes)(x)).shape
        (1, 3, 37000)

    Args:
        input_shape: (source_length, target_length): numbers of tokens of one example.
        vocabulary_size: Number of different token ids; 0 is padding.
        source_vocabulary_size: Number of different ids of the source; default: source and target
            share one vocabulary and its embeddings.
        embedding_size: Width of the network; even, and a multiple of `num_heads`.
        num_layers: Number of encoder layers, and of decoder layers.
        num_heads: Attention heads of a layer.
        feedforward_size: Hidden units of a layer's feed-forward part.
        activation: "relu", "tanh" or "gelu".
        pre_norm: Whether layers normalize the input of each part, and each stack its output, rather
            than sums.
        tied: Whether the logits are products with the target's embeddings; else with a matrix of
            their own.
        dropout_rate: Share of the activations that are dropped in train mode: after the positions,
            on attention weights, in the middle of the feed-forward part, on what each part of a
            layer adds.
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Vaswani et al, `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_, 2017.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        vocabulary_size: int,
        source_vocabulary_size: int | None = None,
        embedding_size: int = 512,
        num_layers: int = 6,
        num_heads: int = 8,
        feedforward_size: int = 2048,
        activation: str = "relu",
        pre_norm: bool = False,
        tied: bool = True,
        dropout_rate: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        if len(self.input_shape) != 2:
            raise ValueError(
                "TransformerTranslator needs input_shape=(source_length, target_length) for token "
                f"ids, got {self.input_shape}"
            )
        layers = _attention.Layers(
            width=embedding_size,
            num_heads=num_heads,
            hidden=feedforward_size,
            activation=activation,
            dropout_rate=dropout_rate,
            kernel_init=nnx.initializers.glorot_uniform(),
            bias_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(rngs) if isinstance(rngs, int) else rngs,
        )
        init = nnx.initializers.normal(1 / math.sqrt(embedding_size))
        self.embedding = layers.embedding(vocabulary_size, init)
        self.source_embedding = (
            None
            if source_vocabulary_size is None
            else layers.embedding(source_vocabulary_size, init)
        )
        self.dropout = layers.dropout()
        self.encoder = nnx.List(
            _attention.Layer(layers, pre_norm=pre_norm) for _ in range(num_layers)
        )
        self.decoder = nnx.List(
            _attention.Layer(layers, pre_norm=pre_norm, cross=True) for _ in range(num_layers)
        )
        self.encoder_norm, self.decoder_norm = (
            layers.norm() if pre_norm else None for _ in range(2)
        )
        self.linear = (
            None if tied else layers.linear(embedding_size, vocabulary_size, use_bias=False)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, target_length, vocabulary_size), at least float32, of token ids."""
        source_length, target_length = self.input_shape
        _common.check_tokens(self, x, (source_length + target_length,))
        source, target = x[:, :source_length], x[:, source_length:]
        is_token = _attention.padding_mask(source, PADDING)

        h = self._embed(self.source_embedding or self.embedding, source)
        for layer in self.encoder:
            h = layer(h, is_token)
        memory = h if self.encoder_norm is None else self.encoder_norm(h)

        h = self._embed(self.embedding, target)
        past = _attention.causal_mask(target_length)
        for layer in self.decoder:
            h = layer(h, past, memory, is_token)
        h = h if self.decoder_norm is None else self.decoder_norm(h)
        logits = self.embedding.attend(h) if self.linear is None else self.linear(h)
        return _common.as_logits(logits)

    def _embed(self, embedding: nnx.Embed, tokens: jax.Array) -> jax.Array:
        h = embedding(tokens) * math.sqrt(embedding.features)
        positions = _attention.sinusoidal_positions(*h.shape[1:])
        return self.dropout(h + jnp.asarray(positions, h.dtype)[None])


def translate(
    model: TransformerTranslator, source: jax.Array, *, begin: int, end: int
) -> jax.Array:
    """Greedy decoding: the most likely next token, again and again.

    It runs the whole network once for each token, in evaluation mode.

    Args:
        model: The model; its mode does not change.
        source: Token ids, (N, source_length).
        begin: The token before every target.
        end: The token after every target.

    Returns:
        Token ids, (N, target_length); padding behind the first `end`.
    """
    return _translate(*nnx.split(model), source, begin, end)


@functools.partial(jax.jit, static_argnums=0)
def _translate(graphdef: Any, state: Any, source: jax.Array, begin: int, end: int) -> jax.Array:
    model = nnx.merge(graphdef, state)
    model.eval()
    length = model.input_shape[1]

    def step(i: jax.Array, tokens: jax.Array) -> jax.Array:
        # The first column is the begin token; prediction i goes behind column i.
        logits = model(jnp.concatenate([source, tokens[:, :-1]], axis=1))
        best = jnp.argmax(logits[:, i], axis=-1).astype(tokens.dtype)
        ended = jnp.any(tokens[:, 1:] == end, axis=1)
        return tokens.at[:, i + 1].set(jnp.where(ended, PADDING, best))

    tokens = jnp.full((len(source), length + 1), PADDING, source.dtype).at[:, 0].set(begin)
    return lax.fori_loop(0, length, step, tokens)[:, 1:]
