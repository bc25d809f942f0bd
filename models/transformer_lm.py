"""Decoder-only Transformer that predicts the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _attention, _common


class TransformerLM(nnx.Module):
    """Embedding and positions, causal pre-norm layers, normalization, logits of the next token.

    The default is GPT-2 small (Radford et al. 2019). With V = `vocabulary_size`, T = length, width
    E and F hidden units it has V E + T E + `num_layers` (4 E² + 2 E F + 9 E + F) + 2 E parameters:
    124,439,808 for V = 50,257 and T = 1,024, the number of the released model. Without tied weights
    there are V E more, with sinusoidal positions T E fewer. For texts of characters nanoGPT takes
    `embedding_size=384, num_layers=6, num_heads=6, dropout_rate=0.2`, T = 256.

    The logits at one position depend on the tokens up to that position. So padding on the right
    changes nothing in front of it: no token id is special here, and the loss leaves out whatever
    has no target.

    It starts like GPT-2: kernels and tables normal with standard deviation 0.02, those that write
    into the residual stream 0.02 / sqrt(2 `num_layers`), positions 0.01 as in their code, biases 0.

    Example:
        Sizes without computing anything:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> x = jnp.array([[5, 17, 3, 0], [4, 64, 2, 8]])
        >>> sizes = {"input_shape": (4,), "vocabulary_size": 65, "num_layers": 2}
        >>> nnx.eval_shape(lambda: TransformerLM(**sizes)(x)).shape
        (2, 4, 65)

    Args:
        input_shape: (length,): number of tokens of one example.
        vocabulary_size: Number of different token ids.
        embedding_size: Width of the network; even, and a multiple of `num_heads`.
        num_layers: Number of layers.
        num_heads: Attention heads of a layer.
        feedforward_size: Hidden units of a layer's feed-forward part; default: four times the
            width.
        activation: "gelu" (by tanh, as in GPT-2), "relu" or "tanh".
        positions: "learned", or "sinusoidal" as in Vaswani et al. (2017), where embeddings are
            multiplied by sqrt(width) in front of them.
        tied: Whether the logits are products with the embeddings; else with a matrix of their own.
        dropout_rate: Share of the activations that are dropped in train mode: after the positions,
            on attention weights, on what each part of a layer adds. (GPT-2 drops nothing between
            the two matrices of the feed-forward part; here it does.)
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Radford et al, `Language Models are Unsupervised Multitask Learners
        <https://openai.com/research/better-language-models>`_, 2019: section 2.3; Press and Wolf,
        `Using the Output Embedding to Improve Language Models
        <https://arxiv.org/abs/1608.05859>`_, 2017.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        vocabulary_size: int,
        embedding_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        feedforward_size: int | None = None,
        activation: str = "gelu",
        positions: str = "learned",
        tied: bool = True,
        dropout_rate: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_token_shape("TransformerLM", self.input_shape)
        if positions not in ("learned", "sinusoidal"):
            raise ValueError(f"unknown positions {positions!r}; valid: learned, sinusoidal")
        normal = nnx.initializers.normal
        layers = _attention.Layers(
            width=embedding_size,
            num_heads=num_heads,
            hidden=4 * embedding_size if feedforward_size is None else feedforward_size,
            activation=activation,
            dropout_rate=dropout_rate,
            kernel_init=normal(0.02),
            bias_init=nnx.initializers.zeros_init(),
            residual_init=normal(0.02 / math.sqrt(2 * max(num_layers, 1))),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(rngs) if isinstance(rngs, int) else rngs,
        )
        self.embedding = layers.embedding(vocabulary_size, normal(0.02))
        shape = (self.input_shape[0], embedding_size)
        self.positions = (
            nnx.Param(normal(0.01)(layers.rngs.params(), shape, param_dtype))
            if positions == "learned"
            else None
        )
        self.dropout = layers.dropout()
        self.layers = nnx.List(_attention.Layer(layers, pre_norm=True) for _ in range(num_layers))
        self.norm = layers.norm()
        self.linear = (
            None if tied else layers.linear(embedding_size, vocabulary_size, use_bias=False)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, length, vocabulary_size), at least float32, of token ids."""
        h = self.hidden(x)
        logits = self.embedding.attend(h) if self.linear is None else self.linear(h)
        return _common.as_logits(logits)

    def hidden(self, x: jax.Array) -> jax.Array:
        """What the logits are made of, of shape (N, length, embedding_size), of token ids.

        A classifier that is fine-tuned from a language model starts from it.
        """
        _common.check_tokens(self, x, self.input_shape)
        h = self.embedding(x)
        if self.positions is None:
            h = h * math.sqrt(h.shape[-1])
            positions = jnp.asarray(_attention.sinusoidal_positions(*h.shape[1:]), h.dtype)
        else:
            positions = self.positions[...].astype(h.dtype)
        h = self.dropout(h + positions[None])
        mask = _attention.causal_mask(h.shape[1])
        for layer in self.layers:
            h = layer(h, mask)
        return self.norm(h)
