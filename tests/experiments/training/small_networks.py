"""Small networks, batches and optimizers for the tests of the training step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


class NormDropout(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(x)))


def make_batch(n=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2.0, 3.0, (n, 4)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, 3, n), jnp.int32)}


class SpyState(NamedTuple):
    objective_value: jax.Array
    seen: dict


def spy(value=None):
    """An optimizer that keeps the extra arguments of its last update."""

    def init(params):
        zero = jnp.zeros(())
        return SpyState(zero, {"value": zero, "grad": params, "loss": zero, "curvature": zero})

    def update(updates, state, params, *, curvature_value_fn=None, **arguments):
        del state
        result = {
            "value": arguments["value"],
            "grad": arguments["grad"],
            "loss": arguments["value_fn"](params),
            "curvature": jnp.zeros(())
            if curvature_value_fn is None
            else curvature_value_fn(params),
        }
        assert ("refresh" in arguments) == (curvature_value_fn is not None)
        kept = arguments["value"] if value is None else jnp.asarray(value)
        return optax.tree.scale(-0.1, updates), SpyState(kept, result)

    return optax.GradientTransformationExtraArgs(init, update)
