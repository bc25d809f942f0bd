"""Transformer whose output is a fixed point, as a language model."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models import _attention, _common, _equilibrium
from optax_accel.equilibrium import FixedPointReport


class EquilibriumLM(nnx.Module):
    """Predicts the next token from the fixed point of a few causal Transformer layers.

    The layers are applied again and again: z = layers(z, u), from z = 0, where what u, the
    embeddings with their positions, are mapped to is added to query, key and value of each layer.
    Normalization is behind the sums (post-norm). Dropout masks whole channels, the same ones at all
    positions and in all iterations.

    With `solver="fixed_point", gradient="unrolled"` and `max_steps=4` two layers are applied four
    times and trained by back-propagation through all of it: a stack of eight layers with tied
    weights, with the same parameters.

    With V = `vocabulary_size`, width E and F hidden units it has 2 V E + V + `num_layers`
    (7 E² + 2 E F + 9 E + F) parameters.

    Faithful to the authors' network are the injection, the post-norm and the fixed masks. Theirs
    has one layer, positions relative to each other, a memory of the previous window, and
    normalizations without a scale; ours starts like PyTorch's layers, with sinusoidal positions.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> x = jnp.array([[5, 17, 3, 0], [4, 64, 2, 8]])
        >>> sizes = {"input_shape": (4,), "vocabulary_size": 65, "loop": "while"}
        >>> nnx.eval_shape(lambda: EquilibriumLM(**sizes)(x)).shape
        (2, 4, 65)

    Args:
        input_shape: (length,): number of tokens of one example.
        vocabulary_size: Number of different token ids.
        embedding_size: Width of the network; even, and a multiple of `num_heads`.
        num_layers: Number of layers of the block.
        num_heads: Attention heads of a layer.
        feedforward_size: Hidden units of a layer's feed-forward part; default: four times the
            width.
        activation: "relu", "gelu" or "tanh".
        dropout_rate: Share of the channels that are dropped in train mode.
        solver: "anderson", "broyden" or "fixed_point", in both directions.
        max_steps: The most steps of the solver.
        backward_steps: The same for the linear system of the implicit gradient.
        tolerance: Residual, relative to the norm of the block's output, below which an example has
            converged.
        memory: Pairs that Anderson (default: 6) or Broyden (default: all) keeps.
        gradient: "implicit", "phantom" or "unrolled", see `optax_accel.deq`.
        phantom_steps: Steps of the phantom gradient.
        damping: Share of the block in each of these.
        loop: "while", "unrolled" or None: "unrolled" on a CPU, otherwise "while".
        dtype: Type of the computation; default: that of the parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.

    References:
        Bai, Kolter, Koltun, `Deep equilibrium models <https://arxiv.org/abs/1909.01377>`_, NeurIPS
        2019: section 3.2, the universal transformer.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        vocabulary_size: int,
        embedding_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        feedforward_size: int | None = None,
        activation: str = "relu",
        dropout_rate: float = 0.0,
        solver: str = "anderson",
        max_steps: int = 16,
        backward_steps: int = 16,
        tolerance: float = 1e-3,
        memory: int | None = None,
        gradient: str = "implicit",
        phantom_steps: int = 1,
        damping: float = 1.0,
        loop: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        self.input_shape = tuple(input_shape)
        _common.check_token_shape("EquilibriumLM", self.input_shape)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.options = _equilibrium.Options(
            solver=solver,
            max_steps=max_steps,
            backward_steps=backward_steps,
            tolerance=tolerance,
            memory=memory,
            gradient=gradient,
            phantom_steps=phantom_steps,
            damping=damping,
            loop=loop,
        )
        layers = _attention.Layers(
            width=embedding_size,
            num_heads=num_heads,
            hidden=4 * embedding_size if feedforward_size is None else feedforward_size,
            activation=activation,
            dropout_rate=dropout_rate,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(rngs) if isinstance(rngs, int) else rngs,
        )
        self.embedding = layers.embedding(vocabulary_size)
        self.injections = nnx.List(
            layers.linear(embedding_size, 3 * embedding_size, use_bias=False)
            for _ in range(num_layers)
        )
        self.dropout = layers.dropout()
        self.cell = _Cell(layers, num_layers)
        self.linear = layers.linear(embedding_size, vocabulary_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, length, vocabulary_size), at least float32, of token ids."""
        z, _ = self.equilibrium(x)
        return _common.as_logits(self.linear(z))

    def equilibrium(self, x: jax.Array) -> tuple[jax.Array, FixedPointReport]:
        """The fixed point and what the solver says of it.

        Args:
            x: Token ids, (N, length).

        Returns:
            The states (N, length, embedding_size), and the report of `optax_accel.deq`.
        """
        _common.check_tokens(self, x, self.input_shape)
        h = self.embedding(x)
        n, length, width = h.shape
        h = h + jnp.asarray(_attention.sinusoidal_positions(length, width), h.dtype)[None]
        injected = tuple(layer(h) for layer in self.injections)
        ones = jnp.ones((n, 1, width), h.dtype)
        masks = tuple((self.dropout(ones), self.dropout(ones)) for _ in self.injections)
        found, report = self.options.solve(self.cell, jnp.zeros_like(h), (injected, masks))
        return found, report


class _Cell(nnx.Module):
    """The layers, one after the other."""

    def __init__(self, layers: _attention.Layers, num_layers: int):
        self.layers = nnx.List(_Layer(layers) for _ in range(num_layers))

    def __call__(
        self,
        z: jax.Array,
        x: tuple[Sequence[jax.Array], Sequence[tuple[jax.Array, jax.Array]]],
    ) -> jax.Array:
        for layer, injected, masks in zip(self.layers, *x, strict=True):
            z = layer(z, injected, masks)
        return z


class _Layer(nnx.Module):
    """norm(z + attention(z, injected) * mask), then norm(z + feed_forward(z) * mask)."""

    def __init__(self, layers: _attention.Layers):
        self.projection = layers.projection(3)
        self.output = layers.linear(layers.width, layers.width)
        self.norm1 = layers.norm()
        self.linear1 = layers.linear(layers.width, layers.hidden)
        self.linear2 = layers.linear(layers.hidden, layers.width)
        self.norm2 = layers.norm()
        self.activation = _common.activation_function(layers.activation)
        self.num_heads = layers.num_heads

    def __call__(
        self, z: jax.Array, injected: jax.Array, masks: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        n, length, _ = z.shape
        parts = (self.projection(z) + injected).reshape(n, length, 3, self.num_heads, -1)
        query, key, value = jnp.moveaxis(parts, 2, 0)
        mask = _attention.causal_mask(length)
        mixed = _attention.attend(query, key, value, mask, jax.nn.identity)
        z = self.norm1(z + self.output(mixed) * masks[0])
        h = self.linear2(self.activation(self.linear1(z)))
        return self.norm2(z + h * masks[1])
