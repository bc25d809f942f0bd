"""Sampled products as Flax NNX modules, which switch and draw as dropout does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from optax_accel.gradients._bilinear import convolution, dot
from optax_accel.gradients.sampled_terms import Sampling

_EXACT: dict[str, Callable[..., jax.Array]] = {
    "dot_general": lax.dot_general,
    "conv_general_dilated": lax.conv_general_dilated,
}
_SAMPLED: dict[str, Callable[..., jax.Array]] = {
    "dot_general": dot,
    "conv_general_dilated": convolution,
}


class SampledProduct(nnx.Module):
    """A product to call like one of ``jax.lax``, sampled in training mode.

    Attributes:
      deterministic: whether it is exact; ``model.eval()`` and ``model.train()`` set it.
      rngs: the stream of its keys; None where nothing is drawn.
    """

    def __init__(self, name: str, sampling: Sampling, rngs: nnx.Rngs | nnx.RngStream | None):
        """Makes a product.

        Args:
          name: of the function of ``jax.lax``.
          sampling: how it is sampled.
          rngs: where keys come from.

        Raises:
          TypeError: something is drawn, and there are no ``rngs``, or they are none of Flax's.
        """
        if rngs is None and sampling.needs_key:
            raise TypeError(
                f"method={sampling.method!r} and norm_rows={sampling.norm_rows!r} draw at random: "
                "give `rngs`, such as rngs=nnx.Rngs(0)."
            )
        if not isinstance(rngs, nnx.Rngs | nnx.RngStream | None):
            raise TypeError(f"`rngs` must be nnx.Rngs or nnx.RngStream, got {type(rngs).__name__}.")
        self.name = name
        self.sampling = sampling
        self.deterministic = False
        stream = None
        if sampling.needs_key:
            stream = rngs["sampling"] if isinstance(rngs, nnx.Rngs) else rngs
        self.rngs: nnx.RngStream | None = nnx.data(None if stream is None else stream.fork())

    def __call__(
        self, lhs: jax.Array, rhs: jax.Array, *args: Any, out_sharding: Any = None, **kwargs: Any
    ) -> jax.Array:
        """The product, exact if ``deterministic``; arguments are those of ``jax.lax``.

        Raises:
          ValueError: it is sampled, and ``out_sharding`` is given.
        """
        if self.deterministic:
            return _EXACT[self.name](lhs, rhs, *args, out_sharding=out_sharding, **kwargs)
        if out_sharding is not None:
            raise ValueError(
                f"A sampled product leaves its sharding to the compiler; got {out_sharding=}. Use "
                "a mesh with Auto axes, and no `out_sharding`."
            )
        key = None if self.rngs is None else self.rngs()
        return _SAMPLED[self.name](lhs, rhs, *args, sampling=self.sampling, key=key, **kwargs)
