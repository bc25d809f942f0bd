"""Stacked layers: K-FAC and EKFAC do to them what they do to the same layers one by one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax

import optax_accel as oa
from optax_accel import curvature
from optax_accel._means import vary_over
from optax_accel.natural_gradient.inverses import share
from tests.helpers import over_workers, tree_allclose, tree_equal
from tests.natural_gradient.test_kfac import (
    double,
    first_update,
    masked_cross_entropy,
    ravel,
    scale_by,
)

DEPTH, WIDTH, HEADS, CONTEXT, VOCABULARY = 2, 4, 2, 3, 5
TOKENS, LABELS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 4, CONTEXT))
MASK = np.float64(np.random.default_rng(1).uniform(size=LABELS.shape) < 0.7)
HEAD = WIDTH // HEADS


def normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale[None, None]


def block(x: jax.Array, p: Any) -> jax.Array:
    """A block of a transformer, causal."""
    h = normalized(x, p["norm"])
    q, k, v = jnp.moveaxis(jnp.einsum("ntd,dche->nthec", h, p["qkv"]), -1, 0)
    scores = jnp.einsum("nthe,nshe->nhts", q, k) / np.sqrt(HEAD)
    causal = np.tril(np.ones((CONTEXT, CONTEXT)))
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9))
    mixed = jnp.einsum("nhts,nshe->nthe", weights, v)
    x = x + jnp.einsum("nthe,hed->ntd", mixed, p["out"])
    hidden = jnp.tanh(x @ p["up"] + p["bias"][None, None])
    return x + hidden @ p["down"]


def in_turn(p: Any, x: jax.Array) -> jax.Array:
    for layer in p["layers"]:
        x = block(x, layer)
    return x


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, p: (jax.checkpoint(block)(x, p), None), x, p["layers"])[0]


def counted(p: Any, x: jax.Array) -> jax.Array:
    def body(i: Any, x: jax.Array) -> jax.Array:
        return block(x, jax.tree.map(lambda leaf: leaf[i], p["layers"]))

    return lax.fori_loop(0, len(p["layers"]["norm"]), body, x)


def numbered(p: Any, x: jax.Array) -> jax.Array:
    for i in range(DEPTH):
        x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"]))
    return x


def gpt(layers: Any) -> oa.Objective:
    def predict(p: Any) -> jax.Array:
        x = layers(p, p["tokens"][TOKENS])
        return normalized(x, p["norm"]) @ p["unembed"]

    return oa.Objective(predict, lambda out: masked_cross_entropy(out, LABELS, MASK))


def stack(layers: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def weights(depth: int = DEPTH) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / np.sqrt(shape[0])

    def layer() -> Any:
        heads = {"qkv": normal(WIDTH, 3, HEADS, HEAD), "out": normal(HEADS, HEAD, WIDTH)}
        mlp = {"up": normal(WIDTH, 6), "bias": normal(6), "down": normal(6, WIDTH)}
        return heads | mlp | {"norm": np.ones(WIDTH)}

    return {
        "layers": [layer() for _ in range(depth)],
        "tokens": normal(VOCABULARY, WIDTH),
        "norm": np.ones(WIDTH),
        "unembed": normal(WIDTH, VOCABULARY),
    }


def stacked(params: Any) -> Any:
    return params | {"layers": stack(params["layers"])}


def two_updates(tx: Any, objective: oa.Objective, params: Any) -> Any:
    """Updates, then those of the next step, with new inverses; and how much was refused."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads, extra = objective.grad(params), {"value_fn": objective, "refresh": "inverses"}
        return tx.update(grads, state, params, **extra)

    state = tx.init(params)
    first, state = step(params, state)
    second, state = step(optax.apply_updates(params, optax.tree.scale(-0.1, first)), state)
    return [first, second], (state.rejected, state.rejected_inverses)


SETTINGS = {
    "factored": {"estimator": "fisher", "norm_constraint": 1e-3},
    "eigen": {"estimator": "empirical", "max_size": 5},
    "ekfac": {"estimator": "fisher"},
}


@functools.cache
def one_by_one(kind: str) -> Any:
    objective, params = gpt(in_turn), double(weights())
    return two_updates(build(kind, objective), objective, params)


def build(kind: str, objective: oa.Objective) -> Any:
    return scale_by(kind, objective, damping=0.01, likelihood="categorical", **SETTINGS[kind])


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("factored", scanned),
        pytest.param("ekfac", counted, marks=[pytest.mark.slow]),
        pytest.param("eigen", numbered, marks=[pytest.mark.slow]),
    ],
)
def test_a_stack_is_its_layers(x64, kind, layers):
    """A GPT whose blocks are scanned, counted or numbered, and one that has a list of them."""
    objective, params = gpt(layers), double(stacked(weights()))
    text = oa.describe_layers(objective, params)
    assert text.count("for each of 2 slices") == 4
    assert "['layers']['bias'], " not in text
    assert "generic" not in text
    got, refused = two_updates(build(kind, objective), objective, params)
    assert refused == (0, 0)
    want = [stacked(updates) for updates in one_by_one(kind)[0]]
    tree_allclose(got, want, rtol=1e-9, atol=1e-12)


def heads(p: Any) -> jax.Array:
    x = np.random.default_rng(0).normal(size=(4, 2, 3))
    return jnp.einsum("nhd,hde->nhe", x, p["w"]) + p["b"][None]


def groups(p: Any) -> jax.Array:
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 4))
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(
        x, p["w"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
    )
    return out + p["b"][None, None, None]


@pytest.mark.parametrize(
    ("predict", "shapes"),
    [(heads, {"b": (2, 2), "w": (2, 3, 2)}), (groups, {"b": (4,), "w": (2, 2, 2, 4)})],
)
def test_natural_gradient_of_heads_and_groups(x64, predict, shapes):
    """With squared error the blocks of linear ones are the whole Gauss-Newton matrix."""
    objective = oa.Objective(predict, lambda out: 0.5 * jnp.sum((out - 1) ** 2) / len(out))
    params = {k: jnp.asarray(np.random.default_rng(1).normal(size=n)) for k, n in shapes.items()}
    tx = oa.scale_by_kfac(objective, damping=0.1, damping_kind="eigen", estimator="ggn")
    updates, state = first_update(tx, objective, params)
    assert state.factors[0].inputs.shape[0] == 2
    dense = np.asarray(curvature.gauss_newton(objective, params).dense())
    want = np.linalg.solve(dense + 0.1 * np.eye(len(dense)), ravel(objective.grad(params)))
    np.testing.assert_allclose(ravel(updates), want, rtol=1e-9)


def test_blocks_of_scanned_layers(x64):
    """One example's blocks are Kronecker products: those of the exact matrix."""
    x = np.random.default_rng(0).normal(size=(1, 2))
    objective = oa.Objective(
        lambda p: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0],
        lambda out: -jax.nn.log_softmax(out)[0, 0],
    )
    params = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 2)))
    tx = oa.scale_by_kfac(objective, estimator="ggn", likelihood="categorical", decay=0.0)
    a, b = first_update(tx, objective, params)[1].factors[0]
    dense = np.asarray(curvature.gauss_newton(objective, params).dense()).reshape(3, 4, 3, 4)
    for i in range(3):
        np.testing.assert_allclose(np.kron(a[i], b[i]), dense[i, :, i], rtol=1e-9, atol=1e-14)


def test_a_masked_stack_on_eight_devices_and_from_a_checkpoint(tmp_path):
    """On eight devices the steps of one; restored, the state goes on as it would have."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(8, 3)).astype(np.float32) for _ in range(2))
    params = {
        "layers": jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32),
        "fixed": jnp.ones((3, 3)),
    }

    def predict(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["fixed"]

    def loss(out: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((out - y) ** 2)

    def make(axis: str | None) -> tuple[oa.Objective, Any]:
        objective = oa.Objective(predict, loss, axis)
        mask = {"layers": True, "fixed": False}
        return objective, oa.kfac(0.1, objective, {"x": x[:1]}, estimator="ggn", mask=mask)

    def step(axis: str | None, state: Any, x: jax.Array, y: jax.Array) -> Any:
        objective, tx = make(axis)
        grads = objective.grad(params, x=x, y=y)
        return tx.update(grads, state, params, value_fn=objective, x=x, y=y)

    once = jax.jit(functools.partial(step, None))
    updates, state = once(make(None)[1].init(params), x, y)
    batch, each = jax.P("workers"), jax.P()
    mesh = jax.make_mesh((8,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    many = functools.partial(step, "workers")
    many = jax.jit(
        jax.shard_map(many, mesh=mesh, in_specs=(each, batch, batch), out_specs=(each, each))
    )
    tree_allclose(many(make(None)[1].init(params), x, y)[0], updates, rtol=1e-4, atol=1e-6)
    (factors,) = state[0].factors
    assert all(factor.shape == (2, 3, 3) for factor in factors)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    tree_equal(restored, state)
    tree_equal(once(restored, x, y), once(state, x, y))


def test_programs_do_not_grow_with_depth():
    """Neither what is traced for a step nor what is for its start."""
    lengths = []
    for depth in (2, 6):
        objective, params = gpt(scanned), double(stacked(weights(depth)))
        tx = build("ekfac", objective)
        update = functools.partial(tx.update, value_fn=objective, refresh="inverses")
        state = jax.eval_shape(tx.init, params)
        text = jax.jit(update).lower(params, state, params).as_text()
        lengths.append(text.count("\n"))
    assert lengths[0] == lengths[1]


def test_slices_are_shared_among_replicas():
    """Each is inverted by one of them; a stack is cut into parts of equal size."""
    calls = []

    def function(factor: jax.Array, scale: jax.Array) -> jax.Array:
        jax.debug.callback(lambda index: calls.append(int(index)), lax.axis_index("workers"))
        return scale * factor

    stack = jnp.arange(5 * 3 * 3.0).reshape(5, 3, 3)
    small = stack[:2, :2, :2]

    def worker(_: Any) -> Any:
        arguments = [(stack, jnp.arange(5.0)), (stack[0], jnp.ones(())), (small, jnp.ones(2))]
        vary = functools.partial(vary_over, axis_name="workers")
        arguments.append((stack[:, 0], jnp.ones(5)))  # diagonal: by all
        stacks = [True, False, True, True]
        return share(function, arguments, "workers", vary, stacks)[:3]

    results = over_workers("shard_map", worker, 4)(jnp.zeros((4, 1)))
    jax.effects_barrier()
    want = [jnp.arange(5.0)[:, None, None] * stack, stack[0], small]
    for result, expected in zip(results, want, strict=True):
        np.testing.assert_array_equal(result, np.broadcast_to(expected, (4, *expected.shape)))
    # Five diagonals each; three parts of two slices, the matrix, and the small slices.
    assert len(calls) == 4 * 5 + 6 + 1 + 2


def test_a_slice_whose_inverse_fails_keeps_its_own():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    objective = oa.Objective(
        lambda p: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0],
        lambda out: 0.5 * jnp.mean(jnp.sum((out - 1) ** 2, axis=-1)),
    )
    params = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 3)), jnp.float32)
    tx = oa.scale_by_kfac(objective)
    update = jax.jit(functools.partial(tx.update, value_fn=objective, refresh="inverses"))
    _, state = update(params, tx.init(params), params)
    (factors,) = state.factors
    broken = factors._replace(inputs=factors.inputs.at[1].multiply(-100))
    _, new = update(params, state._replace(factors=(broken,)), params)
    (got,), (old,) = new.inverses, state.inverses
    tree_equal(jax.tree.map(lambda m: m[1], got), jax.tree.map(lambda m: m[1], old))
    assert jnp.any(got.inputs[0] != old.inputs[0])
    assert (new.accepted, new.rejected, new.rejected_inverses) == (False, 0, 1)
