"""Values, gradients and curvature products of an Objective, alone and on replicas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import optax_accel as oa
from tests.helpers import over_workers, tree_allclose

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


# -- means that are not over examples --------------------------------------------------------------

# Sentences of different lengths; two of them are empty, and so are two pairs of neighbours.
TOKENS = DATA.integers(0, 5, (8, 4))
LENGTHS = np.array([4, 1, 0, 0, 3, 2, 0, 0])
MASK = np.arange(4)[None] < LENGTHS[:, None]
EMBEDDING = {"e": np.float32(DATA.normal(size=(5, 3))), "o": np.float32(DATA.normal(size=(3, 5)))}


def predict_tokens(params, tokens):
    return jnp.tanh(params["e"][tokens]) @ params["o"]


def token_loss(outputs, tokens, mask):
    """The mean over the valid tokens, 0 / 0 without any."""
    log_p = jax.nn.log_softmax(outputs)
    entropy = -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(entropy * mask) / jnp.sum(mask)


def token_objective(**options):
    options.setdefault("weight", lambda mask: jnp.sum(mask))
    return oa.Objective(predict_tokens, token_loss, **options)


QUANTITIES = {
    "value_and_grad": lambda objective, v: objective.value_and_grad(EMBEDDING),
    "jax.grad": lambda objective, v: jax.grad(objective)(EMBEDDING),
    "hvp": lambda objective, v: objective.hvp(EMBEDDING, v),
    "ggn": lambda objective, v: objective.ggn_vp(EMBEDDING, v),
    "functional": lambda objective, v: objective.functional_hessian(EMBEDDING)(v),
}


def quantities(objective, names):
    vector = jax.tree.map(jnp.cos, EMBEDDING)
    return {name: QUANTITIES[name](objective, vector) for name in names}


@pytest.fixture(scope="module")
def of_all_tokens():
    plain = oa.Objective(predict_tokens, token_loss).bind(tokens=TOKENS, mask=MASK)
    return jax.jit(lambda: quantities(plain, QUANTITIES))()


@pytest.mark.parametrize(
    ("mode", "names"),
    [("forward_over_reverse", QUANTITIES), ("reverse_over_reverse", ["hvp", "ggn"])],
)
def test_micro_batches_count_with_their_weight(of_all_tokens, mode, names):
    """Four parts of two sentences; two of them have no token."""
    parts = token_objective(hvp_mode=mode).accumulated(4, tokens=TOKENS, mask=MASK)
    for name, found in jax.jit(lambda: quantities(parts, names))().items():
        tree_allclose(found, of_all_tokens[name], rtol=3e-6)


@pytest.mark.parametrize(
    ("mode", "names"), [("vmap", ["jax.grad"]), ("shard_map", ["value_and_grad", "hvp", "ggn"])]
)
def test_replicas_count_with_their_weight(of_all_tokens, mode, names):
    """Four replicas of two sentences; two of them have no token."""
    objective = token_objective(axis_name="workers")

    def one(tokens, mask):
        return quantities(objective.bind(tokens=tokens, mask=mask), names)

    split = [a.reshape(4, 2, 4) for a in (TOKENS, MASK)]
    for name, found in over_workers(mode, one, 4)(*split).items():
        if name == "jax.grad":  # by each replica's own parameters; their mean is the gradient
            found = jax.tree.map(lambda a: jnp.broadcast_to(jnp.mean(a, 0), a.shape), found)
        for i in (0, 3):
            tree_allclose(jax.tree.map(lambda a, i=i: a[i], found), of_all_tokens[name], rtol=3e-6)


def test_a_weight_is_called_with_what_it_names():
    by_number = oa.Objective.from_value_fn(
        lambda p, x, n: p * jnp.sum(x) / n, weight=lambda n: n, axis_name="workers"
    )
    value = jax.vmap(lambda x, n: by_number(2.0, x=x, n=n), axis_name="workers")(
        jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 3.0])
    )
    np.testing.assert_allclose(value, 2 * 10 / 4, rtol=1e-6)
    assert by_number.batch_weight(n=3, x=None) == 3
    assert oa.Objective(predict, loss).batch_weight() is None
    with pytest.raises(TypeError, match=r"takes the arguments \['n'\]"):
        by_number.bind(x=jnp.ones(2))
    with pytest.raises(ValueError, match="`weight` must return a scalar, got shape"):
        oa.Objective(predict, loss, weight=lambda y: y).batch_weight(y=jnp.ones(2))
    with pytest.raises(TypeError, match="`weight` must be callable, got float"):
        oa.Objective(predict, loss, weight=1.0)


# -- auxiliary outputs -----------------------------------------------------------------------------


def test_auxiliary_outputs_are_averaged_or_handed_through():
    x, key = jnp.arange(6.0), jax.random.key(1)

    def predict(p, x, state):
        new = {"mean": 0.5 * state["mean"] + 0.5 * jnp.mean(x), "count": state["count"] + 1}
        return p * x, new | {"key": state["key"]}

    def loss(outputs, x):
        return jnp.mean(outputs), {"largest": jnp.max(outputs)}

    state = {"mean": 1.0, "count": jnp.int32(7), "key": key}
    objective = oa.Objective(predict, loss, has_aux="both")
    (value, (new, metrics)), gradient = objective.value_and_grad(2.0, x=x, state=state)
    assert (value, gradient, new["mean"], metrics["largest"]) == (5.0, 2.5, 1.75, 10.0)
    assert objective(2.0, x=x, state=state) == 5.0
    assert objective.grad(2.0, x=x, state=state) == 2.5
    np.testing.assert_array_equal(objective.outputs(2.0, x=x, state=state), 2 * x)
    # In parts of 2, 2, 2 as if seen at once; the largest outputs of the parts are averaged.
    parts = objective.accumulated(3, x=x, state=state)
    (value, (new, metrics)), gradient = parts.value_and_grad(2.0)
    np.testing.assert_allclose([value, gradient, new["mean"]], [5.0, 2.5, 1.75], rtol=1e-6)
    np.testing.assert_allclose(metrics["largest"], 8.0, rtol=1e-6)
    assert new["count"] == 8
    assert new["key"] == key
    # On replicas.
    replicated = oa.Objective(predict, lambda o, x: loss(o, x)[0], "workers", has_aux="predict")
    (value, new), _ = jax.vmap(
        lambda x: replicated.value_and_grad(2.0, x=x, state=state), axis_name="workers"
    )(x.reshape(3, 2))
    np.testing.assert_allclose(value, 5.0, rtol=1e-6)
    np.testing.assert_allclose(new["mean"], 1.75, rtol=1e-6)
    np.testing.assert_array_equal(new["count"], [8, 8, 8])


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("has_aux", ["predict", "both"])
def test_micro_batches_hand_on_what_they_change(has_aux, unroll):
    """Floats go from part to part; counters and keys begin like the batch's in each of them."""
    x, mask, key = jnp.arange(6.0), jnp.array([1.0, 0, 1, 1, 0, 1]), jax.random.key(1)

    def predict(p, x, state):
        new = {"mean": 0.5 * state["mean"] + 0.5 * jnp.mean(x), "count": state["count"] + 1}
        return p * (x + state["mean"]), new | {"key": state["key"]}

    def loss(outputs, mask):
        value = jnp.sum(mask * outputs) / jnp.sum(mask)
        return (value, {"largest": jnp.max(outputs)}) if has_aux == "both" else value

    state = {"mean": jnp.float32(1.0), "count": jnp.int32(7), "key": key}
    objective = oa.Objective(predict, loss, has_aux=has_aux, weight=lambda mask: jnp.sum(mask))
    parts = objective.accumulated(3, x=x, mask=mask, carry={"state": state}, unroll=unroll)
    (value, aux), gradient = jax.jit(parts.value_and_grad)(2.0)
    new, metrics = aux if has_aux == "both" else (aux, None)
    # The parts are (0, 3), (1, 4) and (2, 5); the second one has no weight and hands on nothing.
    first = 0.5 * 1.0 + 0.5 * 1.5
    np.testing.assert_allclose(new["mean"], 0.5 * first + 0.5 * 3.5, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.mean([0 + 1, 3 + 1, 2 + first, 5 + first]), rtol=1e-6)
    np.testing.assert_allclose(value, 2 * gradient, rtol=1e-6)
    assert (new["count"], new["key"]) == (8, key)
    if metrics is not None:
        np.testing.assert_allclose(metrics["largest"], np.mean([8, 2 * (5 + first)]), rtol=1e-6)
    # Where no auxiliary outputs are asked for, every part is given the same.
    for slope in (parts.grad(2.0), parts.without_aux.value_and_grad(2.0)[1], parts(1.0)):
        np.testing.assert_allclose(slope, np.mean([1, 4, 3, 6]), rtol=1e-6)
    # The whole batch is one part.
    whole = objective.accumulated(1, x=x, mask=mask, carry={"state": state})
    (_, aux), _ = whole.value_and_grad(2.0)
    np.testing.assert_allclose((aux[0] if has_aux == "both" else aux)["mean"], 1.75)
    with pytest.raises(ValueError, match="takes one argument, got x, y; put them into one pytree"):
        objective.accumulated(2, carry={"x": x, "y": x})


def test_a_scaled_objective_scales_its_products_not_what_it_returns_besides(problem):
    objective, params, batch = problem
    objective = oa.Objective(
        lambda params, x: (predict(params, x), {"largest": jnp.max(x)}), loss, has_aux="predict"
    )
    for one in (objective.bind(**batch), objective.accumulated(2, **batch)):
        scaled = one.scaled(5.0).scaled(2.0)
        (value, aux), gradient = one.value_and_grad(params)
        expected = (10 * value, aux), optax.tree.scale(10, gradient)
        tree_allclose(scaled.value_and_grad(params), expected, rtol=1e-12)
        np.testing.assert_allclose(scaled(params), 10 * value, rtol=1e-12)
        for product in ("hvp", "ggn_vp"):
            plain, times_ten = (getattr(o, product)(params, params) for o in (one, scaled))
            tree_allclose(times_ten, optax.tree.scale(10, plain), rtol=1e-12)


def test_methods_leave_auxiliary_outputs_out():
    objective = oa.Objective.from_value_fn(lambda p: (jnp.sum(p**2), {"p": p}), has_aux=True)
    params = jnp.ones(2)
    (value, aux), grads = objective.value_and_grad(params)
    assert value == 2.0
    np.testing.assert_array_equal(aux["p"], params)
    for tx in (oa.extrap_sgd(0.1), oa.gnp(optax.sgd(0.1))):
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
        assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("value_fn", [lambda p: (p, {"a": 1.0}), lambda p: (p, p, p)])
def test_a_value_function_with_auxiliary_outputs_is_told_what_to_do(value_fn):
    tx, p = oa.extrap_sgd(0.1), jnp.ones(())
    with pytest.raises(TypeError, match=r"from_value_fn\(value_fn, has_aux=True\)"):
        tx.update(p, tx.init(p), p, value_fn=value_fn)


def test_wrong_auxiliary_outputs_are_named():
    p = jnp.ones(())
    with pytest.raises(TypeError, match=r"`value_fn` returns a pair .*, but it returned"):
        oa.Objective.from_value_fn(lambda p: p, has_aux=True)(p)
    with pytest.raises(TypeError, match="`predict` returns a pair"):
        oa.Objective(lambda p: (p, p, p), lambda out: out, has_aux="predict")(p)
    with pytest.raises(ValueError, match="unknown has_aux 'outputs'"):
        oa.Objective(predict, loss, has_aux="outputs")
    with pytest.raises(TypeError, match="must be a scalar, but `loss` returned NoneType"):
        oa.Objective(lambda p: p, lambda out: None)(p)


def test_python_numbers_as_parameters():
    objective = oa.Objective(lambda p: p["w"] * 3.0, lambda out: out**2)
    params = {"w": 1.0}
    assert objective(params) == 9.0
    assert objective.grad(params)["w"] == 18.0
    for product in (objective.hvp, objective.ggn_vp):
        assert product(params, {"w": 2.0})["w"] == 36.0


def test_a_train_state_that_swallows_the_arguments_is_told_what_to_write():
    params = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=oa.gnp(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"apply_gradients of Flax does not") as caught:
        state.apply_gradients(grads=params, value_fn=lambda p: jnp.sum(p["w"] ** 2))
    lines = [line.strip() for line in str(caught.value).split("\n")[1:]]
    scope = {"state": state, "grads": params, "optax": optax}
    scope["objective"] = lambda p: jnp.sum(p["w"] ** 2)
    exec("\n".join(lines), scope)
    assert scope["state"].step == 1
    assert (scope["state"].params["w"] < 1).all()


@pytest.mark.parametrize("build", ["gnp", "extragradient"])
def test_local_methods_average_with_the_weight(build):
    """Three replicas of two examples, one of which has none that counts."""
    x = jnp.array([[[1.0, 2.0], [3.0, -1.0]], [[0.5, 1.0], [2.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]])
    mask = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    objective = oa.Objective.from_value_fn(
        lambda p, x, mask: jnp.sum(jnp.sin(x @ p) * mask) / jnp.sum(mask),
        weight=lambda mask: jnp.sum(mask),
    )
    params = jnp.array([0.3, -0.4])
    if build == "gnp":
        tx = oa.gnp(optax.sgd(1.0), rho=0.1, alpha=1.0, axis_name="workers")
    else:
        tx = oa.extragradient(optax.sgd(1.0), 0.1, axis_name="workers")

    def one(x, mask):
        given = {"x": x, "mask": mask}
        grads = objective.grad(params, **given)
        return tx.update(grads, tx.init(params), params, value_fn=objective, **given)[0]

    updates = jax.vmap(one, axis_name="workers")(x, mask)
    want = jnp.zeros(2)
    for i, weight in ((0, 2), (1, 1)):
        own = objective.grad(params, x=x[i], mask=mask[i])
        step = own / jnp.linalg.norm(own) if build == "gnp" else -own
        want += weight / 3 * objective.grad(params + 0.1 * step, x=x[i], mask=mask[i])
    for update in updates:
        np.testing.assert_allclose(update, -want, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_penalized_norm_is_that_of_a_gradient_of_any_size(size):
    tx, params = oa.gnp(optax.sgd(0.0), rho=0.1, alpha=1.0), jnp.ones(2)
    objective = oa.Objective.from_value_fn(lambda p: size * jnp.sum(p**2) / 2)
    _, state = tx.update(objective.grad(params), tx.init(params), params, value_fn=objective)
    np.testing.assert_allclose(state.gradient_norm / size, 2**0.5, rtol=1e-5)
