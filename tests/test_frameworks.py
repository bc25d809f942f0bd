"""Models of any framework train with the same lines: parameters are pytrees, the loss a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accel as oa
from tests.helpers import classification, cross_entropy, mlp_apply, mlp_init

X, Y = classification()
Model = tuple[Any, Callable[[Any], jax.Array]]


def plain_dict() -> Model:
    return mlp_init(), lambda params: mlp_apply(params, X)


def flax_linen() -> Model:
    nn = pytest.importorskip("flax.linen")
    module = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(3)])
    return module.init(jax.random.key(0), X), lambda variables: module.apply(variables, X)


def flax_nnx() -> Model:
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    # The batch normalization's statistics are no parameters: they stay in `rest`.
    module = nnx.Sequential(
        nnx.Linear(2, 8, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        jnp.tanh,
        nnx.Linear(8, 3, rngs=rngs),
    )
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return params, lambda params: nnx.merge(graphdef, params, rest, copy=True)(X)


def equinox() -> Model:
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(2, 3, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    # Leaves that are no arrays (the activation function) become `None` subtrees.
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return params, lambda params: jax.vmap(eqx.combine(params, static))(X)


def haiku() -> Model:
    hk = pytest.importorskip("haiku")
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    return network.init(jax.random.key(0), X), lambda params: network.apply(params, X)


OPTIMIZERS = {
    "bulk_sgd": oa.bulk_sgd(0.5, 3),
    "extrap_sgd": oa.extrap_sgd(0.1),
}


@pytest.mark.parametrize("make", [plain_dict, flax_linen, flax_nnx, equinox, haiku])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains(make: Callable[[], Model], name: str) -> None:
    tx = OPTIMIZERS[name]
    params, predict = make()
    objective = oa.Objective(predict, lambda logits: cross_entropy(logits, Y))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    structure = jax.tree.structure((params, state))
    losses = []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert jax.tree.structure((params, state)) == structure
    assert losses[-1] < 0.7 * losses[0], losses
