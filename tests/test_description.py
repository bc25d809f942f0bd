"""What `describe` tells of optimizers of all kinds, against what they do."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accel as oa
from tests.methods import OPTIMIZERS, PROBLEM, Case

CASES = [pytest.param(case, id=case.name) for case in OPTIMIZERS]


def traced_update(tx: Any, **extra: Any) -> Any:
    state = jax.eval_shape(tx.init, PROBLEM.params)
    return jax.eval_shape(
        functools.partial(tx.update, **extra), PROBLEM.params, state, PROBLEM.params
    )


@pytest.mark.parametrize("case", CASES)
def test_every_method_needs_what_its_description_says(case: Case) -> None:
    """With these arguments `update` runs; without them it raises."""
    tx = case.build(0.1)
    found = oa.describe(tx, PROBLEM.params)
    shapes = jax.eval_shape(tx.init, PROBLEM.params)
    assert found.num_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    offered: dict[str, Any] = {"value_fn": PROBLEM.objective()}
    traced_update(tx, **{name: offered[name] for name in found.requires})
    if found.requires:
        with pytest.raises(ValueError, match="value_fn"):
            traced_update(tx)
    # GaLore's bases and sampled epochs, about which the gauntlet lets the graph decide.
    in_the_graph = case.name.split()[0] in ("anderson_acceleration", "galore", "gradsamp")
    assert bool(found.refreshes) == (case.refresh is not None or in_the_graph)
    assert "unknown" not in str(found)


@pytest.mark.parametrize(
    ("tx", "gradients"),
    [
        (oa.gnp(optax.sgd(0.1)), 2),
        (oa.extrap_sgd(0.1), 2),
        (oa.extrap_sgd(0.1, direction="past"), 1),
        (oa.gnp(oa.extrap_sgd(0.1)), 3),
        (optax.chain(oa.sample_gradients(0.5, key=0), optax.adam(0.1)), 1),
    ],
)
def test_gradients_are_counted(tx: Any, gradients: int) -> None:
    """Passes over the data in the compiled step: products with the inputs that XLA keeps."""
    elements = oa.describe(tx, jnp.zeros(7)).elements
    assert 1 + sum(element.further_gradients or 0 for element in elements) == gradients

    def step(w: jax.Array, state: Any, x: jax.Array) -> Any:
        loss = lambda w: jnp.sum(jnp.tanh(x @ w))  # noqa: E731
        return tx.update(jax.grad(loss)(w), state, w, value_fn=loss)

    w = jnp.zeros(7)
    text = jax.jit(step).lower(w, tx.init(w), jnp.ones((5, 7))).compile().as_text()
    assert text is not None
    assert text.count(" tanh(") == gradients


def wrapped() -> dict[str, Any]:
    inner = oa.gnp(optax.sgd(0.1))
    labels = {"dense": "a", "b": "b"}
    return {
        "chain(clip, gnp": optax.chain(optax.clip(1.0), optax.chain(inner)),
        "multi_steps, multi_steps: gnp(": optax.MultiSteps(inner, 2),
        "masked: scale_by_aggmo": optax.masked(oa.aggmo(0.1), True),
        "partition 'a': scale_by_adam, partition 'a': scale, partition 'b'": optax.partition(
            {"a": optax.adam(0.1), "b": oa.demon_sgd(0.1, decay_steps=3)}, labels
        ),
        "inject_hyperparams(": oa.inject_hyperparams(oa.gnp)(inner=optax.sgd(0.1), rho=0.1),
        "apply_if_finite(gnp": optax.apply_if_finite(inner, 3),
    }


@pytest.mark.parametrize("name", wrapped())
def test_sees_through_wrappers(name: str) -> None:
    tx = wrapped()[name]
    found = oa.describe(tx, PROBLEM.params)
    names = ", ".join(element.name for element in found.elements)
    shapes = jax.eval_shape(tx.init, PROBLEM.params)
    assert found.num_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert (f"chain({names})" if name.startswith("chain") else names).startswith(name)
    assert ("value_fn" in found.requires) == ("gnp" in name or "inject" in name)


def test_allocates_nothing_and_takes_shapes() -> None:
    params = {"w": jax.ShapeDtypeStruct((10**9, 10**6), "float32")}  # 4 petabytes
    found = oa.describe(optax.adam(1e-3), params)
    assert found.num_bytes == 2 * 4 * 10**15 + 4
    assert [element.name for element in found.elements] == ["scale_by_adam", "scale"]
    mu = found.elements[0].arrays[1]
    assert (mu.path, math.prod(mu.shape), mu.dtype) == (".mu['w']", 10**15, "float32")


def test_arguments_of_others_and_what_is_not_known() -> None:
    found = oa.describe(optax.lbfgs(), jnp.zeros(3))
    assert found.requires == ("value", "grad", "value_fn")
    assert (found.elements[-1].cost, found.elements[-1].further_gradients) == ("unknown", None)


def test_names_the_parts_of_a_method_that_is_made_for_a_mask() -> None:
    element = oa.describe(oa.bulk_sgd(0.1, 2, base=optax.adam), jnp.zeros(9)).elements[0]
    assert element.name == "interpolated_sgd(scale_by_adam, scale, interpolate_subspaces)"
    assert element.cost.startswith("2 curvature products a refresh")


def test_text() -> None:
    tx = optax.chain(optax.clip(1.0), oa.gnp(optax.sgd(0.1, momentum=0.9)))
    assert (
        str(oa.describe(tx, {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}))
        == """\
element            state              arrays            bytes  a step costs, besides its gradient
-----------------  -----------------  ----------------  -----  ----------------------------------
clip               none                                        nothing
gnp(trace, scale)  count              int32 ()              4  a gradient at the perturbed point
                   gradient_norm      float32 ()            4
                   inner_state.trace  float32 2 arrays     32

state: 40 bytes
call: tx.update(grads, state, params, value_fn=...)"""
    )


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="`tx` must be an Optax transformation"):
        oa.describe(optax.adam, jnp.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got an object of type dict") as caught:
        oa.describe({"w": jnp.zeros((9, 9))}, optax.adam(0.1))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_are_no_parameters() -> None:
    unlabelled = optax.partition({"a": optax.adam(0.1)}, {"dense": "a", "b": "c"})
    with pytest.raises(ValueError, match="no corresponding transformation"):
        oa.describe(unlabelled, PROBLEM.params)
    with pytest.raises(ValueError, match="`params` must contain arrays, got None"):
        oa.describe(optax.adam(0.1), None)
    with pytest.raises(TypeError, match=r"the leaf \['name'\] is 'mlp'"):
        oa.describe(optax.adam(0.1), {"w": jnp.zeros(3), "name": "mlp"})
