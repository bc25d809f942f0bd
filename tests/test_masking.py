"""Masks mean the same in every method that has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import tree_equal

SGD = optax.sgd(0.1)
# Every method that has a mask, of all families.
METHODS: dict[str, Callable[[Any], optax.GradientTransformationExtraArgs]] = {
    "project_to_bulk": lambda mask: oa.project_to_bulk(1, mask=mask),
    "bulk_sgd": lambda mask: oa.bulk_sgd(0.1, 1, mask=mask),
    "hessian_free": lambda mask: oa.hessian_free(max_iterations=2, mask=mask),
    "forward_gradient": lambda mask: oa.forward_gradient(SGD, mask=mask),
    "gnp": lambda mask: oa.gnp(SGD, mask=mask),
    "extragradient": lambda mask: oa.extragradient(SGD, 0.2, mask=mask),
    "extragradient past": lambda mask: oa.extragradient(SGD, 0.2, "past", mask=mask),
    "extragradient noise": lambda mask: oa.extragradient(SGD, 0.2, "filter_uniform", mask=mask),
    "extragradient inner": lambda mask: oa.extragradient(SGD, 1.0, "inner_update", mask=mask),
    "extrap_sgd": lambda mask: oa.extrap_sgd(0.1, mask=mask),
    "reparametrize": lambda mask: oa.reparametrize(SGD, oa.weight_norm(), mask=mask),
}
ALL = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    """A network that is a pytree, as Equinox's modules are."""

    w: Any
    v: Any

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(x @ self.w) @ self.v


OBJECTIVE = oa.Objective(lambda net: net(np.eye(2, 3)), lambda out: jnp.mean((out - 1) ** 2))
NET = Net(jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.array([[1.0], [2.0]]))
# Those whose answers are compared elsewhere.
NATURAL_GRADIENTS: dict[str, Callable[[Any], optax.GradientTransformationExtraArgs]] = {
    "kfac": lambda mask: oa.kfac(0.1, OBJECTIVE, mask=mask),
    "ekfac": lambda mask: oa.ekfac(0.1, OBJECTIVE, mask=mask),
    "batch_gauss_newton": lambda mask: oa.batch_gauss_newton(0.1, mask=mask),
}


def updated(tx: Any, grads: Any, params: Any, value_fn: Any, **extra: Any) -> Any:
    return tx.update(grads, tx.init(params), params, value_fn=value_fn, refresh="warm", **extra)[0]


@ALL
def test_a_module_of_booleans_is_a_tree(make: Callable[[Any], Any]) -> None:
    """Although it can be called; functions, also partial ones, are functions."""
    mask = Net(w=True, v=False)
    functions = (lambda net: mask), jax.tree_util.Partial(lambda m, net: m, mask)

    @jax.jit
    def with_each(net: Net) -> list[Any]:
        grads = jax.grad(OBJECTIVE)(net)
        return [updated(make(m), grads, net, OBJECTIVE) for m in (mask, *functions)]

    results = with_each(NET)
    for result in results[1:]:
        tree_equal(result, results[0])


FROZEN = {
    "steps": jnp.arange(3),
    "key": jax.random.key(1),
    "old_key": jax.random.PRNGKey(2),
    "on": jnp.array([True, False]),
    "python": 3,
}


def loss(params: Any) -> jax.Array:
    """It sees what is fixed."""
    scale = 1 + params["fixed"]["steps"][1] + jax.random.uniform(params["fixed"]["key"])
    scale = jnp.where(params["fixed"]["on"][0], scale, 0.0) * params["fixed"]["python"]
    return scale * jnp.sum((params["w"] - 1) ** 4) + jnp.sum(jnp.abs(params["z"]) ** 2)


@pytest.mark.parametrize("style", ["float0", "none", "leaf"])
@ALL
def test_what_is_masked_out_may_be_anything(make: Callable[[Any], Any], style: str) -> None:
    """Whatever stands in place of the gradients of what cannot be differentiated: it passes."""
    w, z = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.array([1 + 2j])
    params = {"fixed": FROZEN, "w": w, "z": z}
    objective = oa.Objective(lambda p: loss(p)[None], lambda out: out[0])
    trained = jax.jit(jax.grad(lambda part: loss({**params, **part})))({"w": w, "z": z})
    fixed = {
        "float0": {name: np.zeros(jnp.shape(x), jax.dtypes.float0) for name, x in FROZEN.items()},
        "none": dict.fromkeys(FROZEN),
        "leaf": FROZEN,
    }[style]
    mask = {"fixed": False, "w": True, "z": False}
    tx = make(lambda p: jax.tree.map(lambda x: jnp.result_type(x) == jnp.float32, p))
    grads = {"fixed": fixed, **trained}
    result = updated(tx, grads, params, objective, grad=grads)
    assert all(result["fixed"][name] is leaf for name, leaf in fixed.items())
    # The same as if the rest were constants of the loss.
    alone = updated(
        make({"w": True, "z": False}),
        trained,
        {"w": w, "z": z},
        oa.Objective(lambda p: loss({**params, **p})[None], lambda out: out[0]),
    )
    tree_equal({"w": result["w"], "z": result["z"]}, alone)
    tree_equal(updated(make(mask), grads, params, objective)["w"], alone["w"])


@ALL
def test_messages_advise_what_was_not_done(make: Callable[[Any], Any]) -> None:
    params = {"w": jnp.ones((3, 2)), "n": {"steps": jnp.arange(6).reshape(3, 2)}}
    with pytest.raises(TypeError, match=r"\['n'\]\['steps'\] has dtype int32; leave it out with"):
        make(None).init(params)
    with pytest.raises(TypeError, match=r"\['n'\]\['steps'\] has dtype int32; `mask` selects it"):
        make({"w": False, "n": True}).init(params)
    for wrong in ({"w": True}, {"w": True, "n": 1}, lambda p: p, jnp.ones(2, bool), "w"):
        with pytest.raises(ValueError, match="`mask` must be a pytree of booleans like the param"):
            make(wrong).init(params)


@pytest.mark.parametrize("name", METHODS | NATURAL_GRADIENTS)
def test_nothing_selected(name: str) -> None:
    make = (METHODS | NATURAL_GRADIENTS)[name]
    for mask in (False, Net(w=False, v=False), lambda net: jax.tree.map(lambda _: False, net)):
        with pytest.raises(ValueError, match="is False for all 2 leaves of the parameters, which"):
            make(mask).init(NET)
    make(Net(w=True, v=False)).init(NET)


@ALL
def test_states_can_be_mapped_like_the_parameters(make: Callable[[Any], Any]) -> None:
    """As Optax maps states, to shard them, say: with a placeholder for the parameters in `init`."""
    tx = make({"w": True, "n": False})
    state = tx.init({"w": jnp.ones((3, 2)), "n": jnp.ones(2)})
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize("style", ["float0", "none"])
def test_kfac_with_anything_masked_out(style: str) -> None:
    """It finds the layers of a network whose parameters hold what cannot be trained, too."""
    x = jnp.linspace(-1, 1, 12).reshape(4, 3)
    fixed = {name: FROZEN[name] for name in ("steps", "key", "on")}
    params = {"fixed": fixed, "w": jnp.ones((3, 2))}
    objective = oa.Objective(
        lambda p: x @ p["w"] * p["fixed"]["steps"][1], lambda out: jnp.mean(out**2)
    )
    grad_w = jax.grad(lambda w: objective({**params, "w": w}))(params["w"])
    zeros = {name: np.zeros(leaf.shape, jax.dtypes.float0) for name, leaf in fixed.items()}
    passed = zeros if style == "float0" else dict.fromkeys(fixed)
    tx = oa.kfac(0.1, objective, estimator="ggn", kl_clip=None, mask={"fixed": False, "w": True})
    result = tx.update({"fixed": passed, "w": grad_w}, tx.init(params), params, value_fn=objective)[
        0
    ]
    assert all(result["fixed"][name] is leaf for name, leaf in passed.items())
    alone = oa.Objective(lambda p: objective.outputs({**params, **p}), lambda o: jnp.mean(o**2))
    other = oa.kfac(0.1, alone, estimator="ggn", kl_clip=None)
    expected = other.update(
        {"w": grad_w}, other.init({"w": params["w"]}), {"w": params["w"]}, value_fn=alone
    )[0]
    np.testing.assert_allclose(result["w"], expected["w"], rtol=1e-5)
