"""K-FAC and EKFAC on the models of the zoo, by the steps that the commands make."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
import optax_accel as oa
from experiments.training import networks
from experiments.training.step import init_state, train_step
from tests.helpers import signature

ZOO: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "mlp": ({"input_shape": (4, 4, 1), "hidden_sizes": (5,)}, {"dense": 2}),
    "cnn": ({"input_shape": (8, 8, 3)}, {"convolution": 2, "dense": 1}),
    "resnet20": ({"input_shape": (8, 8, 3)}, {"convolution": 19, "dense": 1, "scale-shift": 38}),
    "transformer": (
        {
            "input_shape": (6,),
            "vocabulary_size": 11,
            "embedding_size": 8,
            "num_heads": 2,
            "feedforward_size": 7,
            "dropout_rate": 0.1,
        },
        {"dense": 9, "embedding": 1, "scale-shift": 8},
    ),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=[pytest.mark.slow])])
@pytest.mark.parametrize("name", ZOO)
def test_describe_finds_every_layer_of_the_zoo(name, dtype):
    """Batch normalization, dropout and half precision change nothing in it."""
    options, counts = ZOO[name]
    model = models.create(name, num_classes=3, param_dtype=dtype, **options)
    graphdef, params, rest = networks.split(model)
    x = jax.ShapeDtypeStruct(
        (4, *options["input_shape"]), jnp.int32 if "vocabulary_size" in options else jnp.float32
    )
    text = oa.describe_layers(networks.objective(graphdef).given(rest=rest), params, {"x": x})
    lines = text.splitlines()[1:-1]
    kinds = [kind for line in lines for kind in counts if f"  {kind} " in line]
    assert {kind: kinds.count(kind) for kind in kinds} == counts
    assert len(kinds) == len(lines)
    weights = sum("kernel" in line for line in lines)
    assert weights == counts["dense"] + counts.get("convolution", 0)


class Normalized(nnx.Module):
    """Batch normalization and dropout."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, rngs: nnx.Rngs):
        self.linear1 = nnx.Linear(*input_shape, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.linear2 = nnx.Linear(6, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(self.dropout(nnx.relu(self.norm(self.linear1(x)))))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "convolutions": (models.Cnn, (4, 4, 1)),
    "bfloat16": (functools.partial(models.Mlp, hidden_sizes=(7,), param_dtype="bfloat16"), (9,)),
    "batch norm and dropout": (Normalized, (5,)),
    "attention": (
        functools.partial(
            models.Transformer,
            vocabulary_size=9,
            embedding_size=8,
            num_layers=1,
            num_heads=2,
            feedforward_size=7,
            dropout_rate=0.1,
        ),
        (5,),
    ),
}
SLOW = ("convolutions", "attention")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS]
)
@pytest.mark.parametrize("kind", ["factored", "ekfac"])
def test_trains_models(name, kind):
    """By the step of all experiments: losses fall, dtypes stay, factors are in single precision."""
    build, shape = MODELS[name]
    graphdef, params, rest = networks.split(
        build(input_shape=shape, num_classes=3, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(12, *shape)))
    x = rng.integers(1, 9, x.shape) if name == "attention" else x
    y = jnp.arange(12) % 3
    objective = networks.objective(graphdef)
    example = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    optimizer = oa.ekfac if kind == "ekfac" else oa.kfac
    tx = optimizer(
        0.05,
        objective.given(rest=rest),
        example,
        damping=0.1,
        likelihood="categorical",
        inverses_every=4,
    )
    state = init_state(tx, params, rest)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(state: Any, refresh: Any) -> Any:
        return train_step(tx, objective, state, {"x": x, "y": y}, refresh=refresh)

    losses, before = [], signature(state)
    for i in range(12):
        state, metrics = step(state, oa.refresh_at(i, tx))
        assert signature(state) == before
        assert metrics["finite"]
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0], losses
    factors = optax.tree.get(state.opt_state, "factors")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(factors)} == {"float32"}
