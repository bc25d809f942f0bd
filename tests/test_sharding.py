"""Optimizer states lie where the parameters lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
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


# -- meshes with Explicit axes ---------------------------------------------------------------------

X, Y = jnp.sin(jnp.arange(128.0)).reshape(16, 8), jnp.arange(16) % 3
WEIGHTS = {"w": jnp.cos(jnp.arange(24.0)).reshape(8, 3), "b": jnp.zeros(3)}


def linear(params, x):
    if not jax.typeof(params["w"]).sharding.mesh.empty:  # gathered, as such a network has to
        params = jax.sharding.reshard(params, jax.P())
    return x @ params["w"] + params["b"][None]


def cross_entropy(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


OBJECTIVE = oa.Objective(linear, cross_entropy)
EXAMPLE = {"x": X, "y": Y}
# The optimizer, and whether its parameters may be divided over an Explicit axis, too.
EXPLICIT = {
    "kfac": (lambda: oa.kfac(0.1, OBJECTIVE.bind(**EXAMPLE)), True),
    "ekfac": (lambda: oa.ekfac(0.1, OBJECTIVE.bind(**EXAMPLE)), True),
    "hessian_free": (lambda: oa.hessian_free(max_iterations=2), False),
    "batch_gauss_newton": (lambda: oa.batch_gauss_newton(damping=0.1, max_iterations=2), False),
    "bulk_sgd": (lambda: oa.bulk_sgd(0.1, 2), False),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_axes(name):
    """The batch is divided over the axis that `jax.make_mesh` makes, and perhaps the parameters."""
    make, divided = EXPLICIT[name]
    tx = make()

    @jax.jit
    def step(params, x, y):
        value, grads = OBJECTIVE.value_and_grad(params, x=x, y=y)
        extra = {"value": value, "value_fn": OBJECTIVE, "x": x, "y": y}
        return tx.update(grads, tx.init(params), params, **extra)[0]

    want = step(WEIGHTS, X, Y)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        batch = jax.device_put((X, Y), jax.P("data"))
        spec = {"w": jax.P("data" if divided else None), "b": jax.P()}
        got = step(jax.device_put(WEIGHTS, spec), *batch)
    for key in WEIGHTS:
        assert got[key].sharding.spec == jax.P(
            *spec[key], *(None,) * (got[key].ndim - len(spec[key]))
        )
        np.testing.assert_allclose(got[key], want[key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: oa.bulk_sgd(0.1, 2),
        oa.hessian_free,
        lambda: oa.batch_gauss_newton(damping=0.1),
        lambda: oa.kfac("exact", OBJECTIVE.bind(**EXAMPLE)),
    ],
)
def test_what_needs_auto_axes_says_so(make):
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    specs = {"w": jax.P("data"), "b": jax.P()}
    params = {
        k: jax.device_put(v, jax.NamedSharding(explicit, specs[k])) for k, v in WEIGHTS.items()
    }
    for init in (make().init, jax.jit(make().init)):
        with pytest.raises(ValueError, match=r"\['w'\] lies there as (.|\n)*AxisType.Auto"):
            init(params)
