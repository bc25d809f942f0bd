"""Recurrent network that predicts the next token."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models import _common


class LstmLM(nnx.Module):
    """Embedding, LSTM layers with dropout in between, logits of the next token.

    The default is the medium network of Zaremba et al. (2014), 2 x 650. With V = `vocabulary_size`
    and H = `hidden_size` it has 2 V H + V + `num_layers` (8 H² + 4 H) parameters, 19,775,200 for
    the 10,000 words of Penn Treebank ("20M" in Merity et al., "Pointer Sentinel Mixture Models",
    2016); with tied weights V H fewer: 13,275,200. PyTorch's LSTM has a second bias, 4 H more a
    layer, which adds nothing to what it can compute.

    Lin, Stich et al. (code of "Don't Use Large Mini-Batches, Use Local SGD") take
    `num_layers=3, tied=True, dropout_rate=0.4` for WikiText-2, windows of 30 tokens: 31,811,778
    parameters for its 33,278 words.

    Every example starts from a state of zeros, so that the network is a function of its input like
    any other model. Zaremba et al. carry the last state of one window over into the next one, which
    gives the first tokens of a window a past.

    All parameters start uniform within ±0.05 (section 4.1, medium).

    Example:
        >>> import jax.numpy as jnp
        >>> model = LstmLM(input_shape=(4,), vocabulary_size=65, hidden_size=8, dropout_rate=0.0)
        >>> model(jnp.array([[5, 17, 3, 0], [4, 64, 2, 8]])).shape
        (2, 4, 65)

    Args:
        input_shape: (length,): number of tokens of one example.
        vocabulary_size: Number of different token ids.
        hidden_size: Width of the embeddings and of each layer.
        num_layers: Number of LSTM layers.
        tied: Whether the logits are products with the embeddings, plus a bias (Press and Wolf
            2017); else with a matrix of their own.
        dropout_rate: Share of the activations that are dropped in train mode, on the way into each
            layer and out of the last, never from one time to the next.
        forget_bias: Added to the forget gates, besides their bias.
        init_bound: Bound of the initial parameters.
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Zaremba et al, `Recurrent Neural Network Regularization <https://arxiv.org/abs/1409.2329>`_,
        2014; Press and Wolf, `Using the Output Embedding to Improve Language Models
        <https://arxiv.org/abs/1608.05859>`_, 2017.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        vocabulary_size: int,
        hidden_size: int = 650,
        num_layers: int = 2,
        tied: bool = False,
        dropout_rate: float = 0.5,
        forget_bias: float = 0.0,
        init_bound: float = 0.05,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_token_shape("LstmLM", self.input_shape)
        layers = _common.Layers(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = _common.uniform(init_bound)
        self.embedding = nnx.Embed(
            vocabulary_size, hidden_size, embedding_init=init, **layers.types, rngs=layers.rngs
        )
        self.layers = nnx.List(
            _LstmLayer(layers, hidden_size, forget_bias, init) for _ in range(num_layers)
        )
        self.dropouts = nnx.List(layers.dropout(dropout_rate) for _ in range(num_layers + 1))
        self.bias = nnx.Param(init(layers.rngs.params(), (vocabulary_size,), param_dtype))
        self.linear = (
            None
            if tied
            else layers.linear(hidden_size, vocabulary_size, kernel_init=init, use_bias=False)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, length, vocabulary_size), at least float32, of token ids."""
        _common.check_tokens(self, x, self.input_shape)
        h = self.embedding(x)
        *dropouts, last_dropout = self.dropouts
        for dropout, layer in zip(dropouts, self.layers, strict=True):
            h = layer(dropout(h))
        h = last_dropout(h)
        logits = self.embedding.attend(h) if self.linear is None else self.linear(h)
        return _common.as_logits(logits + self.bias.astype(logits.dtype)[None, None])


class _LstmLayer(nnx.Module):
    """c = f c + i g, h = o tanh(c); gates i, f, o = sigmoid and g = tanh of linear functions."""

    def __init__(
        self,
        layers: _common.Layers,
        width: int,
        forget_bias: float,
        init: nnx.initializers.Initializer,
    ):
        self.input = layers.linear(width, 4 * width, kernel_init=init, bias_init=init)
        self.recurrent = layers.linear(width, 4 * width, kernel_init=init, use_bias=False)
        self.forget_bias = forget_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        # What the inputs contribute, for all times in one product: (length, N, 4 width).
        inputs = jnp.moveaxis(self.input(x), 1, 0)

        def step(
            state: tuple[jax.Array, jax.Array], inputs: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, c = state
            i, f, g, o = jnp.split(inputs + self.recurrent(h), 4, axis=-1)
            c = nnx.sigmoid(f + self.forget_bias) * c + nnx.sigmoid(i) * jnp.tanh(g)
            h = nnx.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros_like(inputs[0, :, : x.shape[-1]])
        _, h = lax.scan(step, (start, start), inputs)
        return jnp.moveaxis(h, 0, 1)
