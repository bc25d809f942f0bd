"""Values, gradients and curvature products of an Objective, alone and on replicas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa

DATA = np.random.default_rng(0)
X = DATA.normal(size=(8, 3))
Y = DATA.normal(size=(8, 2))
PARAMS = {"w": DATA.normal(size=(3, 4)), "v": DATA.normal(size=(4, 2))}


def predict(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(outputs, y):
    return 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


def dense_matrix(product, params):
    """A linear operator on a pytree as a matrix."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    columns = [jax.flatten_util.ravel_pytree(product(unravel(e)))[0] for e in jnp.eye(flat.size)]
    return np.stack(columns, axis=1)


def dense_hessian(fn, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.hessian(lambda p: fn(unravel(p)))(flat))


@pytest.fixture
def problem(x64):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return oa.Objective(predict, loss), params, {"x": jnp.asarray(X), "y": jnp.asarray(Y)}


def test_value_and_gradient_are_those_of_the_composed_function(problem):
    objective, params, batch = problem
    direct = jax.value_and_grad(lambda p: loss(predict(p, batch["x"]), batch["y"]))(params)
    value, grads = objective.value_and_grad(params, **batch)
    assert value == direct[0] == objective(params, **batch)
    jax.tree.map(np.testing.assert_array_equal, grads, direct[1])


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_hessian_products_match_the_dense_matrix(problem, mode):
    _, params, batch = problem
    objective = oa.Objective(predict, loss, hvp_mode=mode).bind(**batch)
    dense = dense_hessian(objective, params)
    np.testing.assert_allclose(
        dense_matrix(lambda v: objective.hvp(params, v), params), dense, rtol=1e-12, atol=1e-13
    )


def test_gauss_newton_products_match_the_dense_matrix(problem):
    objective, params, batch = problem
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(lambda p: predict(unravel(p), batch["x"]).ravel())(flat)
    dense = np.asarray(jacobian.T @ jacobian) / len(X)  # the loss Hessian is I / n
    bound = objective.bind(**batch)
    products = dense_matrix(lambda v: bound.ggn_vp(params, v), params)
    np.testing.assert_allclose(products, dense, rtol=1e-12, atol=1e-13)


def test_block_products_are_the_single_ones(problem):
    objective, params, batch = problem
    block = jax.tree.map(lambda p: jnp.stack([p, 2 * p, p**2]), params)
    for single, many in (
        (objective.hvp, objective.hvp_block),
        (objective.ggn_vp, objective.ggn_vp_block),
    ):
        got = many(params, block, **batch)
        for i in range(3):
            want = single(params, jax.tree.map(lambda b, i=i: b[i], block), **batch)
            jax.tree.map(
                lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-12, atol=1e-14),
                got,
                want,
            )


def test_golden_hessian_split(x64):
    """Spec B: f = w1 w2, target 5, w = (2, 3)."""
    objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
    w = jnp.array([2.0, 3.0])
    hessian = dense_matrix(lambda v: objective.hvp(w, v), w)
    outer = dense_matrix(lambda v: objective.ggn_vp(w, v), w)
    np.testing.assert_allclose(objective.grad(w), [3, 2])
    np.testing.assert_allclose(hessian, [[9, 7], [7, 4]])
    np.testing.assert_allclose(outer, [[9, 6], [6, 4]])
    np.testing.assert_allclose(hessian - outer, [[0, 1], [1, 0]])


def test_vectors_may_be_wider_than_the_parameters():
    objective = oa.Objective.from_value_fn(lambda p: jnp.sum(p**4))
    params = jnp.ones(3, jnp.bfloat16)
    product = objective.hvp(params, jnp.ones(3, jnp.float32))
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, 12.0)


def test_keyword_arguments_go_to_whoever_names_them(problem):
    objective, params, batch = problem
    bound = objective.bind(**batch, unknown=1)
    assert bound(params) == objective(params, **batch)
    assert bound.outputs(params).shape == (8, 2)
    with pytest.raises(TypeError, match=r"takes the arguments \['y'\]"):
        objective.bind(x=batch["x"])


def test_precompose_evaluates_at_the_transformed_parameters(problem):
    objective, params, batch = problem
    bound = objective.bind(**batch)
    part = bound.precompose(lambda w: {**params, "w": w})
    assert part(params["w"]) == bound(params)
    np.testing.assert_array_equal(part.grad(params["w"]), bound.grad(params)["w"])
    assert part.ggn_vp(params["w"], params["w"]).shape == (3, 4)


def test_value_functions_have_no_outputs():
    objective = oa.Objective.from_value_fn(lambda p: jnp.sum(p**2))
    for method in (objective.outputs, lambda p: objective.ggn_vp(p, p)):
        with pytest.raises(ValueError, match=r"build it with Objective\(predict, loss\)"):
            method(jnp.ones(2))


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="`loss` must be callable, got int"):
        oa.Objective(predict, 3)
    with pytest.raises(ValueError, match="unknown hvp_mode 'sideways'"):
        oa.Objective(predict, loss, hvp_mode="sideways")
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(3,\)"):
        oa.Objective.from_value_fn(lambda p: p**2)(jnp.ones(3))


def _everything(objective, params, batch):
    bound = objective.bind(**batch)
    return {
        "value": bound(params),
        "value_and_grad": bound.value_and_grad(params),
        "hvp": bound.hvp(params, params),
        "ggn": bound.ggn_vp(params, params),
        "block": bound.hvp_block(params, jax.tree.map(lambda p: p[None], params)),
    }


@pytest.mark.parametrize("mode", ["vmap", "pmap", "shard_map", "shard_map_unchecked"])
def test_replica_means_are_the_global_values(problem, mode):
    objective, params, batch = problem
    want = _everything(objective, params, batch)
    replicated = oa.Objective(predict, loss, axis_name="batch")

    def run(p, b):
        return _everything(replicated, p, b)

    shards = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), batch)
    if mode == "vmap":
        got = jax.jit(jax.vmap(run, in_axes=(None, 0), axis_name="batch"))(params, shards)
    elif mode == "pmap":
        got = jax.pmap(run, in_axes=(None, 0), axis_name="batch", devices=jax.devices()[:4])(
            params, shards
        )
    else:
        mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(jax.P(), jax.P("batch")),
            out_specs=jax.P(),
            check_vma=mode == "shard_map",
        )
        got = jax.jit(sharded)(params, batch)
    if mode in ("vmap", "pmap"):
        got = jax.tree.map(lambda a: a[0], got)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-14), got, want)


def test_local_drops_the_collectives(problem):
    _, params, batch = problem
    replicated = oa.Objective(predict, loss, axis_name="batch").bind(**batch)
    assert replicated.local.axis_name is None
    assert replicated.local(params) == loss(predict(params, batch["x"]), batch["y"])
