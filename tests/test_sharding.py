"""Optimizer states lie where the parameters lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accel as oa

SPECS = {"dense": {"w": jax.P("data", None), "b": jax.P()}, "out": jax.P(None, "data")}


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def placed(spec):
    return jax.NamedSharding(mesh(), spec)


def abstract_params():
    shapes = {"dense": {"w": (16, 4), "b": (4,)}, "out": (4, 8)}
    return jax.tree.map(
        lambda spec, shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed(spec)),
        SPECS,
        shapes,
        is_leaf=lambda x: isinstance(x, jax.P),
    )


def params():
    return jax.tree.map(
        lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), abstract_params()
    )


def block(spec):
    return jax.P(None, *spec)


MASK = {"dense": {"w": True, "b": False}, "out": True}
LABELS = {"dense": "x", "out": "y"}

# Transformation, then the fields of its state that hold trees like the parameters with their specs:
# how many axes the field has in front, and how often it occurs.
CASES = {
    "adam": (lambda: optax.adam(0.1), {"mu": 0, "nu": 0}),
    "chain": (
        lambda: optax.chain(optax.clip(1.0), optax.trace(0.9), oa.project_to_bulk(2)),
        {"trace": 0, "basis": 1},
    ),
    "masked": (lambda: optax.masked(optax.adam(0.1), MASK), {"mu": 0, "nu": 0}),
    "partition": (
        lambda: optax.partition({"x": optax.adam(0.1), "y": optax.adam(0.2)}, LABELS),
        {"mu": 0, "nu": 0},
    ),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(0.1), 4), {"acc_grads": 0, "mu": 0}),
    "inject": (
        lambda: oa.inject_hyperparams(oa.bulk_sgd)(learning_rate=0.1, num_directions=3),
        {"basis": 1},
    ),
    "schedules": (
        lambda: oa.with_schedules(optax.sgd, momentum=optax.constant_schedule(0.9))(0.1),
        {"trace": 0},
    ),
    "past": (lambda: oa.extrap_sgd(0.1, direction="past"), {"past": 0, "trace": 0}),
    "round_robin": (
        lambda: oa.bulk_sgd(0.1, 2, tracker=oa.RoundRobinTracker(), mask=MASK),
        {"basis": 1},
    ),
    "history": (lambda: optax.scale_by_lbfgs(5), {"diff_params_memory": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_state_follows_parameters(name):
    make, fields = CASES[name]
    tx = make()
    shardings = oa.state_shardings(tx, abstract_params())
    shapes = jax.eval_shape(tx.init, abstract_params())
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    found = set()
    for (path, sharding), shape in zip(
        jax.tree_util.tree_leaves_with_path(shardings), jax.tree.leaves(shapes), strict=True
    ):
        text = jax.tree_util.keystr(path)
        field = next((field for field in fields if f".{field}[" in text), None)
        if field is None:
            # The fields not listed: counters, eigenvalues, other trees like the parameters.
            is_like = text.endswith(("['w']", "['b']", "['out']"))
            assert is_like or sharding == placed(jax.P()), text
            continue
        spec = next(
            s
            for n, s in (
                ("['w']", SPECS["dense"]["w"]),
                ("['b']", SPECS["dense"]["b"]),
                ("['out']", SPECS["out"]),
            )
            if text.endswith(n)
        )
        for _ in range(fields[field]):
            spec = block(spec)
        assert sharding == placed(spec), text
        assert len(sharding.spec) <= len(shape.shape)
        found.add(field)
    assert found == set(fields)


@pytest.mark.parametrize("name", ["adam", "chain", "partition", "multi_steps", "inject", "history"])
def test_init_puts_it_there(name):
    """As `out_shardings` of a compiled init: no device gets what it does not keep."""
    tx = CASES[name][0]()
    arrays = params()
    shardings = oa.state_shardings(tx, arrays)
    state = jax.jit(tx.init, out_shardings=shardings)(arrays)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    assert shardings == oa.state_shardings(tx, abstract_params())


def test_only_path_and_shape_together_count():
    def init(params):
        return {
            "copy": params,
            "rows": jax.tree.map(lambda p: jnp.zeros(p.shape[:1]), params),  # factored moments
            "w": jnp.zeros((16, 4)),  # the shape alone
            "transposed": {"out": params["out"].T},
        }

    tx = optax.GradientTransformation(init, lambda *args: args)
    shardings = oa.state_shardings(tx, abstract_params())
    assert jax.tree.map(lambda s: s.spec, shardings["copy"]) == SPECS
    rest = [shardings["rows"], shardings["w"], shardings["transposed"]]
    assert {s.spec for s in jax.tree.leaves(rest)} == {jax.P()}


def test_longest_path_wins():
    inner, outer = placed(jax.P("data")), placed(jax.P())
    params = {
        "a": {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=inner)},
        "w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=outer),
    }
    trace = oa.state_shardings(optax.trace(0.9), params).trace
    assert trace == {"a": {"w": inner}, "w": outer}


def test_one_array_as_parameters():
    param = jax.ShapeDtypeStruct((16, 2), jnp.bfloat16, sharding=placed(jax.P("data")))
    state = oa.state_shardings(oa.bulk_sgd(0.1, 3), param)
    assert optax.tree.get(state, "basis").spec == jax.P(None, "data")
    assert optax.tree.get(state, "eigenvalues").spec == jax.P()


def test_wrong_input():
    for wrong in ({"w": jnp.ones(8)}, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}):
        with pytest.raises(
            ValueError, match=r"parameter \['w'\] has no NamedSharding .*device_put"
        ):
            oa.state_shardings(optax.adam(0.1), wrong)
    with pytest.raises(ValueError, match="no parameters"):
        oa.state_shardings(optax.adam(0.1), {})
