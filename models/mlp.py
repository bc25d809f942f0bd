"""Multi-layer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from models import _common


class Mlp(nnx.Module):
    """Fully connected layers with one activation between them.

    The default above 64 inputs, two tanh layers of 200, is on MNIST the 784-200-200-10 network of
    Song et al., "Does SGD really happen in tiny subspaces?" (2024), with 199,210 parameters, and
    starts like theirs from PyTorch's default, uniform within ±1/sqrt(fan in). One layer of 64 is
    enough for the 64 pixels of the scikit-learn digits.

    Example:
        >>> import jax.numpy as jnp
        >>> model = Mlp(input_shape=(8, 8, 1), num_classes=10, hidden_sizes=(32, 16))
        >>> model(jnp.ones((5, 8, 8, 1))).shape
        (5, 10)

    Args:
        input_shape: Shape of one example; it is flattened.
        num_classes: Number of outputs.
        hidden_sizes: Widths of the hidden layers; `()` gives a linear model. `None` stands for
            `(64,)` up to 64 inputs and `(200, 200)` above.
        activation: "tanh", "relu" or "gelu".
        norm: Normalization in front of every activation: "batch", "layer", "group" or None, the
            default.
        dtype: Type of the computation; default: that of inputs and parameters.
        param_dtype: Type of the parameters; default: float32.
        rngs: Random keys, or a seed.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        hidden_sizes: Sequence[int] | None = None,
        activation: str = "tanh",
        norm: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs | int = 0,
    ):
        rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
        self.input_shape = tuple(input_shape)
        self.activation = _common.activation_function(activation)
        if norm == "instance":
            raise ValueError(
                "norm 'instance' averages over pixels, which Mlp does not have; use another norm"
            )
        inputs = math.prod(self.input_shape)
        if hidden_sizes is None:
            hidden_sizes = (64,) if inputs <= 64 else (200, 200)
        sizes = (inputs, *hidden_sizes, num_classes)
        self.layers = nnx.List(
            nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=_common.uniform_fan_in(fan_in),
                bias_init=_common.uniform_fan_in(fan_in),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for fan_in, fan_out in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(
            _common.normalization(norm, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for width in hidden_sizes
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (N, num_classes), at least float32, of a batch of examples."""
        _common.check_input(self, x, self.input_shape)
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.layers
        for layer, norm in zip(hidden, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return _common.as_logits(last(x))
