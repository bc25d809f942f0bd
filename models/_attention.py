"""Attention and the layers of Transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models import _common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Makes layers that share their settings.

    Without initializers they start like PyTorch's: linear layers uniform within ±1/sqrt(fan in),
    except that query, key and value are uniform within ±sqrt(6 / 4 width) (Glorot's for the three
    as one matrix). The biases of attention start at 0 in any case.

    Args:
        width: Width of the network; even, and a multiple of `num_heads`.
        num_heads: Attention heads of a layer.
        hidden: Hidden units of a layer's feed-forward part.
        activation: "relu", "tanh" or "gelu", in the feed-forward part.
        dropout_rate: Share of the activations that are dropped in train mode.
        epsilon: What layer normalization adds to the variance.
        kernel_init: Start of all kernels; query, key and value are drawn one by one.
        bias_init: Start of all biases outside attention.
        residual_init: Start of the kernels that write into the residual stream; default:
            `kernel_init`.
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters.
        rngs: Random keys.
    """

    width: int
    num_heads: int
    hidden: int
    activation: str
    dropout_rate: float
    epsilon: float = 1e-5
    kernel_init: nnx.initializers.Initializer | None = None
    bias_init: nnx.initializers.Initializer | None = None
    residual_init: nnx.initializers.Initializer | None = None
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def __post_init__(self) -> None:
        if self.width % 2 or self.width % self.num_heads:
            raise ValueError(
                f"embedding_size must be even and a multiple of num_heads {self.num_heads}, "
                f"got {self.width}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"dropout_rate must be at least 0 and below 1, got {self.dropout_rate}"
            )
        _common.activation_function(self.activation)

    @property
    def types(self) -> dict[str, Any]:
        """Arguments of any Flax layer."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}

    def linear(
        self, fan_in: int, fan_out: int, *, residual: bool = False, **options: Any
    ) -> nnx.Linear:
        """A linear layer; `residual` if it writes into the residual stream."""
        default = _common.uniform_fan_in(fan_in)
        kernel_init = (self.residual_init if residual else None) or self.kernel_init or default
        options = {"kernel_init": kernel_init, "bias_init": self.bias_init or default} | options
        return nnx.Linear(fan_in, fan_out, **options, **self.types)

    def projection(self, parts: int) -> nnx.Linear:
        """One projection to that many of query, key and value, side by side."""

        def one_by_one(key: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
            assert self.kernel_init is not None
            draws = [
                self.kernel_init(key, (self.width, self.width), dtype)
                for key in jax.random.split(key, parts)
            ]
            return jnp.concatenate(draws, axis=1).reshape(shape)

        # Glorot's bound for a matrix with `width` inputs and 3 `width` outputs.
        joint = _common.uniform(math.sqrt(6 / (4 * self.width)))
        return self.linear(
            self.width,
            parts * self.width,
            kernel_init=joint if self.kernel_init is None else one_by_one,
            bias_init=nnx.initializers.zeros_init(),
        )

    def embedding(self, size: int, init: nnx.initializers.Initializer | None = None) -> nnx.Embed:
        """A table of `size` rows, by default normal with standard deviation 1 as in PyTorch."""
        init = init or nnx.initializers.normal(1.0)
        return nnx.Embed(size, self.width, embedding_init=init, **self.types)

    def norm(self) -> nnx.LayerNorm:
        """Layer normalization over the width."""
        return nnx.LayerNorm(self.width, epsilon=self.epsilon, **self.types)

    def dropout(self) -> nnx.Dropout:
        """Dropout; with rate 0 the model has no random state."""
        return nnx.Dropout(self.dropout_rate, rngs=self.rngs if self.dropout_rate else None)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    dropout: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Scaled dot products of all heads, written out.

    The fused attention of JAX and Flax rounds float64 to float32, and on some devices has no second
    derivative.

    Args:
        query: (N, queries, heads, features).
        key: (N, keys, heads, features).
        value: (N, keys, heads, features).
        mask: Booleans that broadcast against (N, heads, queries, keys), as many axes: which keys a
            query may see; `None`: all. A query that may see none gets the mean of all values.
        dropout: Applied to the weights.

    Returns:
        (N, queries, heads * features).
    """
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        # Not minus infinity, with which a row that is all padding would become NaN.
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = dropout(jax.nn.softmax(scores))
    mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, value)
    return mixed.reshape(*mixed.shape[:2], -1)


class Attention(nnx.Module):
    """A sequence attends to itself."""

    def __init__(self, layers: Layers):
        self.projection = layers.projection(3)
        self.output = layers.linear(
            layers.width, layers.width, residual=True, bias_init=nnx.initializers.zeros_init()
        )
        self.dropout = layers.dropout()
        self.num_heads = layers.num_heads

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(N, length, width) to the same shape; `mask` as in `attend`."""
        query, key, value = _heads(self.projection(x), 3, self.num_heads)
        return self.output(attend(query, key, value, mask, self.dropout))


class CrossAttention(nnx.Module):
    """A sequence attends to another one, the memory."""

    def __init__(self, layers: Layers):
        self.query = layers.projection(1)
        self.memory = layers.projection(2)
        self.output = layers.linear(
            layers.width, layers.width, residual=True, bias_init=nnx.initializers.zeros_init()
        )
        self.dropout = layers.dropout()
        self.num_heads = layers.num_heads

    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(N, length, width) to the same shape; `mask` as in `attend`."""
        (query,) = _heads(self.query(x), 1, self.num_heads)
        key, value = _heads(self.memory(memory), 2, self.num_heads)
        return self.output(attend(query, key, value, mask, self.dropout))


def _heads(x: jax.Array, parts: int, num_heads: int) -> jax.Array:
    """(parts, N, length, heads, features) of (N, length, parts * heads * features)."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], parts, num_heads, -1), 2, 0)


class Layer(nnx.Module):
    """Self-attention, then a feed-forward part; in a decoder, cross-attention in between.

    Each part is added to its input. With `pre_norm` the input of a part is normalized,
    x + part(norm(x)), otherwise the sum, norm(x + part(x)). The feed-forward part is
    linear(activation(linear(x))).
    """

    def __init__(self, layers: Layers, *, pre_norm: bool = False, cross: bool = False):
        self.attention = Attention(layers)
        self.norm1 = layers.norm()
        self.linear1 = layers.linear(layers.width, layers.hidden)
        self.linear2 = layers.linear(layers.hidden, layers.width, residual=True)
        self.norm2 = layers.norm()
        self.activation = _common.activation_function(layers.activation)
        self.dropout1 = layers.dropout()
        self.dropout2 = layers.dropout()
        self.dropout3 = layers.dropout()
        self.pre_norm = pre_norm
        if cross:
            self.cross = CrossAttention(layers)
            self.cross_norm = layers.norm()
            self.cross_dropout = layers.dropout()

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """(N, length, width) to the same shape; masks as in `attend`."""
        x = self._add(x, self.norm1, self.dropout1, lambda h: self.attention(h, mask))
        if memory is not None:
            x = self._add(
                x,
                self.cross_norm,
                self.cross_dropout,
                lambda h: self.cross(h, memory, memory_mask),
            )
        return self._add(x, self.norm2, self.dropout3, self._feed_forward)

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return self.linear2(self.dropout2(self.activation(self.linear1(x))))

    def _add(
        self,
        x: jax.Array,
        norm: nnx.LayerNorm,
        dropout: nnx.Dropout,
        part: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        return x + dropout(part(norm(x))) if self.pre_norm else norm(x + dropout(part(x)))


def causal_mask(length: int) -> jax.Array:
    """Each position sees itself and those before it: (1, 1, length, length)."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def padding_mask(tokens: jax.Array, padding: int) -> jax.Array:
    """All heads and queries may attend to what is not padding: (N, 1, 1, length)."""
    return (tokens != padding)[:, None, None, :]


def sinusoidal_positions(length: int, width: int) -> np.ndarray:
    """Sines in the even columns and cosines in the odd ones, of falling frequency."""
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, width)
