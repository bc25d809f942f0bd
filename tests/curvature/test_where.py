"""Curvature of a part of the parameters, through attention, against the dense matrix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_accel as oa
from optax_accel import curvature
from optax_accel.curvature import block_diagonal

LORA = {"query": {"base": False, "down": True, "up": True}, "out": False, "vocabulary": False}


def plain_attention(query, key, value):
    weights = jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2) / 3**0.5, axis=-1)
    return weights @ value


def fused_attention(*arrays):
    heads = [array[:, :, None, :] for array in arrays]
    return jax.nn.dot_product_attention(*heads, implementation="xla")[:, :, 0]


def network(params, x, attention=plain_attention):
    """A head of attention whose queries have a low-rank correction; one leaf is an integer."""
    query = params["query"]
    q = x @ (query["base"] + query["down"] @ query["up"])
    return attention(q, x, x) @ params["out"] / params["vocabulary"]


def mse(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def problem(mode="forward_over_reverse", attention=plain_attention):
    rng = np.random.default_rng(0)
    params = {
        "query": {
            "base": rng.normal(size=(3, 3)),
            "down": rng.normal(size=(3, 1)),
            "up": rng.normal(size=(1, 3)),
        },
        "out": rng.normal(size=(3, 2)),
        "vocabulary": np.array(2),
    }
    batch = {"x": rng.normal(size=(4, 3, 3)), "y": rng.normal(size=(4, 3, 2))}
    objective = oa.Objective(functools.partial(network, attention=attention), mse, hvp_mode=mode)
    return objective, *jax.tree.map(jnp.asarray, (params, batch))


def dense(params, batch):
    """The Hessian with respect to the corrections, by differentiating a function of one array."""
    part = {name: params["query"][name] for name in ("down", "up")}
    flat, unravel = ravel_pytree(part)

    def loss(flat):
        return mse(
            network({**params, "query": params["query"] | unravel(flat)}, batch["x"]), batch["y"]
        )

    return jax.jit(jax.hessian(loss))(flat)


@pytest.mark.parametrize(
    ("mode", "error"),
    [("forward_over_reverse", 1e-11), ("reverse_over_reverse", 1e-11), ("finite_difference", 1e-8)],
)
def test_only_the_selected_leaves_are_differentiated(x64, mode, error):
    objective, params, batch = problem(mode)
    want = dense(params, batch)
    assert np.abs(want).max() > 0.1
    operator = curvature.hessian(objective, params, where=LORA, **batch)
    assert operator.dimension == 6
    assert isinstance(operator.like["out"], optax.MaskedNode)
    np.testing.assert_allclose(operator.dense(), want, atol=error)
    if mode == "reverse_over_reverse":
        return
    # In two batches, elsewhere, with the same compiled code or with another function.
    data = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 2], batch) for i in (0, 2)]
    chosen = jax.tree.map(lambda m, p: p + 0.1 if m else p, LORA, params)
    operator = curvature.hessian(objective, chosen, where=lambda _: LORA, batches=data)
    np.testing.assert_allclose(operator.dense(), dense(chosen, batch), atol=error)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_products_go_through_fused_attention(x64, mode):
    objective, params, batch = problem(mode, fused_attention)
    operator = curvature.hessian(objective, params, where=LORA, **batch)
    # Its softmax is in float32, whatever the arrays are.
    np.testing.assert_allclose(operator.dense(), dense(params, batch), atol=1e-5)


def test_every_operator_takes_a_part(x64):
    objective, params, batch = problem()
    for build in (
        curvature.gauss_newton,
        curvature.functional_hessian,
        curvature.fisher,
        curvature.empirical_fisher,
        curvature.gradient_covariance,
    ):
        real = {**LORA, "query": True, "out": True}
        whole = build(objective, params, where=real, **batch).dense()
        part = build(objective, params, where=LORA, **batch).dense()
        rows = np.r_[15:21]  # after "out" of 6 entries and "base" of 9
        np.testing.assert_allclose(part, whole[rows][:, rows], rtol=1e-9, atol=1e-12)


def test_operators_are_mapped_over_parameters(x64):
    objective, params, batch = problem()

    def product(scale):
        point = {**params, "query": jax.tree.map(lambda p: scale * p, params["query"])}
        operator = curvature.hessian(objective, point, where=LORA, **batch)
        return operator(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), operator.like))

    many = jax.vmap(product)(jnp.array([0.5, 1.0]))
    got = [row[1].ravel() for row in (many["query"]["down"], many["query"]["up"])]
    want = dense(params, batch) @ jnp.ones(6)
    np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-10)


def test_wrong_selections_are_refused():
    objective, params, batch = problem()
    with pytest.raises(ValueError, match=r"hessian: `where` is False for all 5 leaves"):
        curvature.hessian(objective, params, where=False, **batch)
    with pytest.raises(TypeError, match=r"\['vocabulary'\] has dtype int32; set `where` to False"):
        curvature.hessian(objective, params, where={**LORA, "vocabulary": True}, **batch)
    with pytest.raises(TypeError, match=r"has dtype int32; leave it out with `where=`"):
        curvature.hessian(objective, params, **batch)
    with pytest.raises(ValueError, match=r"`where` must be a pytree of booleans"):
        curvature.hessian(objective, params, where={"query": True}, **batch)
    own = oa.Objective.from_value_fn(lambda w, where: jnp.sum(w**2 * where))
    with pytest.raises(TypeError, match=r"takes an argument `where` of its own.*batches"):
        curvature.hessian(own, jnp.ones(2), where=jnp.ones(2))
    selected = curvature.hessian(own, {"w": jnp.ones(2)}["w"], batches=[{"where": jnp.ones(2)}])
    np.testing.assert_allclose(selected.dense(), 2 * np.eye(2))


def test_vectors_of_another_structure_are_refused():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    objective = oa.Objective.from_value_fn(lambda p: jnp.sum(p["w"] ** 2 * p["b"]))
    part = curvature.hessian(objective, params, where={"w": True, "b": False})
    whole = curvature.hessian(objective, params)
    layers = block_diagonal(whole, {"w": 0, "b": 1})
    for product in (part, layers.part(0)):
        with pytest.raises(ValueError, match=r"\['b'\]; cut .* with operator.select\(tree\)"):
            product(params)
        np.testing.assert_allclose(product(product.select(params))["w"], 2)
    with pytest.raises(ValueError, match=r"hessian: .* whose leaf \['b'\] it does not have"):
        whole({"w": params["w"]})
    with pytest.raises(ValueError, match=r"BlockDiagonal.* which have no leaf \['c'\]"):
        layers({**params, "c": params["w"]})
    with pytest.raises(ValueError, match=r"\['w'\] must have the shape \(2,\), got \(3,\)"):
        part.select({**params, "w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"must have the shape \(number of vectors, \*\(2,\)\)"):
        whole.block(params)
    with pytest.raises(ValueError, match="the vectors of the operator: PyTreeDef"):
        part.select({"w": params["w"]})
    # Everything that asks the operator for products.
    with pytest.raises(ValueError, match=r"operator.select"):
        curvature.lanczos(part, params, 1, key=0, num_products=2)
    with pytest.raises(ValueError, match=r"operator.select"):
        curvature.diagonal(part, key=0, like=params)
    with pytest.raises(ValueError, match=r"energy_shares, `basis`: .*operator.select"):
        curvature.energy_shares(part, jax.tree.map(lambda x: x[None], params), key=0)


def test_masks_and_labels_of_another_type_are_refused():
    nnx = pytest.importorskip("flax.nnx")
    graphdef, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    objective = oa.Objective.from_value_fn(lambda p: jnp.sum(nnx.merge(graphdef, p)(jnp.ones(2))))
    message = "the parameters are a State and `{}` is a dict. .*tree_map_with_path"
    with pytest.raises(ValueError, match=message.format("where")):
        curvature.hessian(objective, params, where={"kernel": True, "bias": False})
    with pytest.raises(ValueError, match=message.format("mask")):
        oa.project_to_bulk(num_directions=1, mask={"kernel": True, "bias": False}).init(params)
    kernel = jax.tree_util.tree_map_with_path(
        lambda path, leaf: "kernel" in jax.tree_util.keystr(path), params
    )
    operator = curvature.hessian(objective, params, where=kernel)
    assert operator.dimension == 2
    assert operator.select(params)["kernel"].get_value() is params["kernel"].get_value()
    with pytest.raises(ValueError, match=message.format("labels")):
        block_diagonal(curvature.hessian(objective, params), {"kernel": 0, "bias": 1})


def test_operators_of_the_outputs_refuse_a_function():
    for build in (curvature.gauss_newton, curvature.functional_hessian, curvature.fisher):
        with pytest.raises(TypeError, match=r"needs the network outputs.*Objective\(predict, loss"):
            build(jnp.sum, jnp.ones(2))
    with pytest.raises(TypeError, match=r"wrap a function with Objective.from_value_fn"):
        curvature.hessian(jnp.sum, jnp.ones(2))


class Matrix:
    """A dense matrix as an operator on three leaves in two layers."""

    like = {"a": {"w": np.zeros((2, 2)), "b": np.zeros(2)}, "c": {"w": np.zeros(3)}}  # noqa: RUF012

    def __init__(self, matrix):
        self.matrix, self.rows = matrix, []
        self.unravel = ravel_pytree(jax.tree.map(jnp.asarray, self.like))[1]

    def __call__(self, vector):
        return self.unravel(self.matrix @ ravel_pytree(vector)[0])

    def block(self, block):
        self.rows.append(jax.tree.leaves(block)[0].shape[0])
        return jax.vmap(self)(block)


def test_blocks_are_those_of_the_dense_matrix(x64):
    matrix = np.random.default_rng(1).normal(size=(9, 9))
    matrix = jnp.asarray(matrix + matrix.T)
    operator = Matrix(matrix)
    layers = block_diagonal(operator)
    assert layers.labels == ("['a']", "['c']")
    group = np.repeat([0, 1], [6, 3])
    want = np.where(group[:, None] == group[None], matrix, 0)
    np.testing.assert_array_equal(layers.dense(), want)
    vector = operator.unravel(jnp.cos(jnp.arange(9.0)))
    operator.rows.clear()
    got = ravel_pytree(layers(vector))[0]
    assert operator.rows == [2]  # one product for each group
    np.testing.assert_allclose(got, want @ np.cos(np.arange(9.0)), rtol=1e-12)
    # One group by itself, and groups by labels of one's own.
    part = layers.part("['c']")
    np.testing.assert_array_equal(part.dense(), matrix[6:, 6:])
    largest = curvature.lanczos(part, part.like, 1, key=0, num_products=3).eigenvalues[0]
    np.testing.assert_allclose(largest, np.linalg.eigvalsh(matrix[6:, 6:])[-1], rtol=1e-10)
    mixed = block_diagonal(operator, {"a": {"w": 0, "b": 1}, "c": 1})
    group = np.array([1, 1, 0, 0, 0, 0, 1, 1, 1])  # "b" comes before "w"
    want = np.where(group[:, None] == group[None], matrix, 0)
    np.testing.assert_array_equal(mixed.dense(), want)
    np.testing.assert_allclose(
        jax.vmap(lambda v: ravel_pytree(mixed(v))[0])(jax.vmap(operator.unravel)(jnp.eye(9))),
        want,
        atol=1e-14,
    )


def test_wrong_labels_are_refused():
    operator = Matrix(jnp.eye(9))
    with pytest.raises(ValueError, match=r"no block 'd'; there are .*'a'.*'c'"):
        block_diagonal(operator).part("d")
    with pytest.raises(ValueError, match="`labels` must be a pytree of strings or integers"):
        block_diagonal(operator, {"a": "x"})
    with pytest.raises(ValueError, match="which is neither a string nor an integer"):
        block_diagonal(operator, operator.like)
