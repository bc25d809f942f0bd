from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import (
    classification,
    cross_entropy,
    mlp_apply,
    mlp_init,
    over_workers,
    tree_allclose,
)

X, Y = classification()  # 48 examples
PARAMS = mlp_init()
FUNCTIONS = (lambda params, x: mlp_apply(params, x), lambda logits, y: cross_entropy(logits, y))
UNBOUND = oa.Objective(*FUNCTIONS)
WHOLE = UNBOUND.bind(x=X, y=Y)
SLOW = pytest.mark.slow
QUANTITIES = {
    "value": lambda objective, params: objective(params),
    "value_and_grad": lambda objective, params: objective.value_and_grad(params),
    "jax.grad": lambda objective, params: jax.grad(objective)(params),
    "hvp": lambda objective, params: objective.hvp(params, params),
    "ggn_vp": lambda objective, params: objective.ggn_vp(params, params),
    "functional_hessian": lambda objective, params: objective.functional_hessian(params)(params),
    "outputs": lambda objective, params: objective.outputs(params),
}


def block_of(params):
    return jax.tree.map(lambda p: jnp.stack([p, 1 - p, 2 * p]), params)


@pytest.mark.parametrize(
    ("number", "unroll"),
    [
        (7, False),
        pytest.param(7, True, marks=SLOW),
        pytest.param(48, False, marks=SLOW),
    ],
)
def test_everything_is_that_of_the_whole_batch(number, unroll):
    """Also where the last micro-batch is smaller: 48 examples in parts of 7."""

    def everything(objective, params):
        found = {name: function(objective, params) for name, function in QUANTITIES.items()}
        found["hvp_block"] = objective.hvp_block(params, block_of(params))
        found["ggn_vp_block"] = objective.ggn_vp_block(params, block_of(params))
        return found

    parts = UNBOUND.accumulated(number, unroll=unroll, x=X, y=Y)
    run = jax.jit(everything, static_argnums=0)
    tree_allclose(run(parts, PARAMS), run(WHOLE, PARAMS), rtol=2e-6)


def test_in_double_precision_up_to_rounding(x64):
    params = optax.tree.cast(PARAMS, jnp.float64)
    x = np.float64(X)
    parts = UNBOUND.accumulated(7, x=x, y=Y)
    whole = UNBOUND.bind(x=x, y=Y)

    @jax.jit
    def errors(params):
        names = ("value_and_grad", "hvp", "ggn_vp")
        return [[QUANTITIES[name](o, params) for name in names] for o in (parts, whole)]

    tree_allclose(*errors(params), rtol=1e-13)


def test_a_half_precision_gradient_is_summed_in_float32():
    objective = oa.Objective.from_value_fn(lambda p, x: jnp.mean(x * p))
    x = jnp.asarray([1.0, *[2.0**-9] * 63], jnp.bfloat16)
    gradient = objective.accumulated(64, x=x).grad(jnp.ones((), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient, np.mean(np.float32(x)), rtol=2**-8)


@pytest.mark.parametrize("unroll", [False, True])
def test_carry_goes_from_part_to_part(unroll):
    def record(carry, part, index):
        first, count = carry
        first = jax.lax.dynamic_update_index_in_dim(first, part["x"][0], index, 0)
        return (first, count + 1), part["x"].mean()

    batch = {"x": jnp.arange(7.0)}
    run = jax.jit(
        lambda batch: oa.mean_over_micro_batches(
            record, batch, 3, carry=(jnp.zeros(3), jnp.int32(0)), unroll=unroll
        )
    )
    (first, count), mean = run(batch)
    # Parts of 3, 3 and 1 examples: (0, 2, 4), (1, 3, 5) and (6).
    np.testing.assert_array_equal(first, [0.0, 1.0, 6.0])
    assert int(count) == 3
    np.testing.assert_allclose(mean, 3.0, rtol=1e-6)


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=SLOW)])
def test_one_micro_batch_is_in_memory_at_a_time(unroll):
    width = 64

    def predict(params, x):
        for _ in range(10):
            x = jnp.tanh(x @ params)
        return x

    unbound = oa.Objective(predict, lambda out: jnp.mean(out**2))
    x, params = jnp.ones((2048, width)), jnp.eye(width)

    def memory(objective, function):
        compiled = jax.jit(functools.partial(function, objective)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = unbound.bind(x=x)
    for name in ("value_and_grad", "jax.grad", "hvp", "ggn_vp"):
        parts = unbound.accumulated(8, unroll=unroll, x=x)
        assert memory(parts, QUANTITIES[name]) < memory(whole, QUANTITIES[name]) / 4, name


@pytest.mark.parametrize(
    ("mode", "unroll"),
    [
        ("shard_map", False),
        pytest.param("shard_map", True, marks=SLOW),
        pytest.param("vmap", True, marks=SLOW),
        pytest.param("pmap", False, marks=SLOW),
    ],
)
def test_on_replicas(mode, unroll):
    unbound = oa.Objective(*FUNCTIONS, "workers")

    def one(x, y):
        parts = unbound.accumulated(5, unroll=unroll, x=x, y=y)
        gradient = parts.grad(PARAMS)
        return gradient, parts.hvp(PARAMS, PARAMS), parts.ggn_vp(PARAMS, PARAMS)

    found = over_workers(mode, one, 4)(X.reshape(4, 12, 2), Y.reshape(4, 12))
    expected = jax.jit(lambda p: (WHOLE.grad(p), WHOLE.hvp(p, p), WHOLE.ggn_vp(p, p)))(PARAMS)
    for i in range(4):
        tree_allclose(jax.tree.map(lambda a, i=i: a[i], found), expected, rtol=3e-6)


def test_a_sharded_batch_stays_where_it_is():
    """Each device works on its examples of every micro-batch: nothing but sums is exchanged."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    x, y = jax.device_put((X, Y), data)
    params = jax.device_put(PARAMS, everywhere)
    for unroll in (False, True):
        run = jax.jit(
            lambda p, x, y, unroll=unroll: UNBOUND.accumulated(3, unroll=unroll, x=x, y=y).grad(p)
        )
        program = run.lower(params, x, y).compile().as_text()
        assert "all-gather" not in program
        assert "all-to-all" not in program
        assert "collective-permute" not in program
        assert "all-reduce" in program
        tree_allclose(run(params, x, y), WHOLE.grad(PARAMS), rtol=2e-6)


@SLOW
def test_vmap_over_parameters():
    many = block_of(PARAMS)
    for unroll in (False, True):
        parts = UNBOUND.accumulated(5, unroll=unroll, x=X, y=Y)
        tree_allclose(jax.jit(jax.vmap(parts.grad))(many), jax.vmap(WHOLE.grad)(many), rtol=2e-6)


def test_parts_have_numbers_for_their_random_keys():
    def predict(params, x, key, micro_batch=None):
        if micro_batch is not None:
            key = jax.random.fold_in(key, micro_batch)
        return x * params * jax.random.bernoulli(key, 0.5, x.shape)

    unbound = oa.Objective(predict, lambda outputs: jnp.mean(outputs))
    key, x = jax.random.key(0), jnp.ones(64)
    parts = unbound.accumulated(2, x=x)
    masks = [
        jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, (32,)).astype(jnp.float32)
        for i in range(2)
    ]
    assert (masks[0] != masks[1]).any()
    np.testing.assert_allclose(parts(jnp.ones(()), key=key), jnp.mean(jnp.stack(masks)), rtol=1e-6)
    # As an extra argument of `update`, too.
    np.testing.assert_allclose(
        parts.bind(key=key).grad(jnp.ones(())), jnp.mean(jnp.stack(masks)), rtol=1e-6
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: oa.extrap_sgd(0.1, extrapolation_rate=0.05),
        lambda: oa.gnp(optax.sgd(0.1), rho=0.1, mask={"layer0": True, "layer1": False}),
        *(
            pytest.param(build, marks=SLOW)
            for build in (
                lambda: oa.bulk_sgd(
                    0.1, 1, tracker=oa.BlockTracker(refresh_every=2, oversampling=1)
                ),
                lambda: oa.hessian_free(max_iterations=2),
                lambda: oa.reparametrize(oa.extra_adam(0.1), oa.weight_norm()),
                lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
                lambda: oa.kfac(0.1, WHOLE, damping=1.0),
            )
        ),
    ],
    ids=["extrap_sgd", "gnp", "bulk_sgd", "hessian_free", "reparametrize", "linesearch", "kfac"],
)
def test_methods_make_the_steps_of_the_whole_batch(build):
    tx = build()

    @functools.partial(jax.jit, static_argnums=0)
    def run(objective):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            value, grads = objective.value_and_grad(params)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=objective
            )
            params = optax.apply_updates(params, updates)
        return params

    # Rounding in float32 turns eigenvectors, by eps over the gap of their eigenvalues.
    tree_allclose(run(UNBOUND.accumulated(5, x=X, y=Y)), run(WHOLE), rtol=1e-4)


def test_one_micro_batch_is_the_batch():
    parts = UNBOUND.accumulated(1, x=X, y=Y)
    assert "scan" not in str(jax.make_jaxpr(parts.grad)(PARAMS))
    tree_allclose(parts.grad(PARAMS), WHOLE.grad(PARAMS), rtol=0)


def test_wrong_numbers_and_batches():
    with pytest.raises(ValueError, match="48 examples do not make 49 micro-batches"):
        UNBOUND.accumulated(49, x=X, y=Y)(PARAMS)
    with pytest.raises(ValueError, match="at least 1"):
        UNBOUND.accumulated(0, x=X, y=Y)
    with pytest.raises(ValueError, match="one leading axis"):
        UNBOUND.accumulated(2, x=X, y=Y[:7])(PARAMS)
    with pytest.raises(TypeError, match="'y'"):
        UNBOUND.accumulated(2, x=X).bind()


def test_what_has_no_axis_of_examples_goes_to_every_part():
    def predict(p, x, train, scale, mode, key, raw_key, nothing):
        assert train is True
        assert mode == "fast"
        assert nothing is None
        assert raw_key.shape == (2,)
        noise = jax.random.normal(key, ()) + jax.random.normal(raw_key, ())
        return scale * p * x + 0 * noise

    objective = oa.Objective(predict, lambda outputs: jnp.mean(outputs))
    flags = {"train": True, "scale": 3.0, "mode": "fast", "nothing": None}
    keys = {"key": jax.random.key(0), "raw_key": jax.random.PRNGKey(0)}
    x = jnp.arange(5.0)
    for unroll in (False, True):
        parts = objective.accumulated(2, unroll=unroll, x=x, **flags, **keys)
        np.testing.assert_allclose(parts.grad(jnp.ones(())), 6.0, rtol=1e-6)
    with pytest.raises(ValueError, match="one leading axis of examples"):
        objective.accumulated(2, **flags).grad(jnp.ones(()))


def test_weights_and_other_results_of_the_loop():
    batch = {"x": jnp.arange(5.0), "w": jnp.array([1, 0, 1, 0, 0])}

    def one(carry, part, index):
        mean = jnp.sum(part["x"] * part["w"]) / jnp.sum(part["w"])
        return carry, {"mean": mean, "index": index, "flag": index > 5}

    for unroll in (False, True):
        # Parts (0, 3), (1, 4), (2): of weight 1, 0 and 1.
        _, found = oa.mean_over_micro_batches(
            one, batch, 3, unroll=unroll, weight=lambda part: jnp.sum(part["w"])
        )
        np.testing.assert_allclose(found["mean"], 1.0, rtol=1e-6)
        assert found["index"] == 2
        assert not found["flag"]
    # Nothing counts: then the mean is what it is of a batch of which nothing counts.
    nothing = {**batch, "w": jnp.zeros(5, int)}
    _, found = oa.mean_over_micro_batches(one, nothing, 3, weight=lambda part: jnp.sum(part["w"]))
    assert jnp.isnan(found["mean"])
    with pytest.raises(ValueError, match=r"shape \(2,\) for one micro-batch and \(1,\)"):
        oa.mean_over_micro_batches(lambda carry, part, _: (carry, part["x"]), batch, 3)
