"""K-FAC and EKFAC as people train with them: devices, masks, wrong input."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import (
    WORKER_MODES,
    classification,
    cross_entropy,
    mlp_apply,
    mlp_init,
    mlp_objective,
    over_workers,
    signature,
    tree_allclose,
    tree_equal,
)
from tests.natural_gradient.test_kfac import (
    double,
    first_update,
    masked_cross_entropy,
    scale_by,
    squares,
)

# -- any number of devices ------------------------------------------------------------------------

X, Y = (a[:24] for a in classification())
# A layer with a bias, one without examples of its own statistics, a diagonal and a generic block.
PARAMS = mlp_init((2, 6, 3)) | {"scale": jnp.ones(3), "log": jnp.zeros(3)}
PARAMS = jax.tree.map(np.asarray, PARAMS)


def mixed(x: Any, y: Any, axis_name: str | None = None) -> oa.Objective:
    def predict(params: Any) -> jax.Array:
        layers = {name: params[name] for name in ("layer0", "layer1")}
        return mlp_apply(layers, x) * params["scale"][None] + jnp.exp(params["log"])[None]

    return oa.Objective(predict, lambda out: cross_entropy(out, y), axis_name)


def train(tx: Any, params: Any, x: Any, y: Any, axis_name: str | None, num_steps: int = 4) -> Any:
    state, objective = tx.init(params), mixed(x, y, axis_name)
    for _ in range(num_steps):
        updates, state = tx.update(objective.grad(params), state, params, value_fn=objective)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def alone(kind: str, estimator: str) -> Any:
    return jax.jit(
        lambda: train(optimizer(kind, estimator), double(PARAMS), np.float64(X), Y, None)
    )()


def optimizer(kind: str, estimator: str) -> Any:
    return optax.chain(
        scale_by(
            kind,
            mixed(X, Y),
            estimator=estimator,
            likelihood="categorical" if kind == "eigen" else None,
            damping=0.1,
            factors_every=2 if kind == "ekfac" else 1,
            inverses_every=2,
        ),
        optax.scale(-0.1),
    )


@pytest.mark.parametrize(
    ("kind", "estimator", "mode"),
    [
        pytest.param(kind, estimator, mode, marks=[] if mode == fast else [pytest.mark.slow])
        for kind, estimator, fast in (
            ("factored", "ggn", "pmap"),
            ("eigen", "fisher", "vmap"),
            ("ekfac", "fisher", "shard_map"),
        )
        for mode in WORKER_MODES
    ],
)
def test_eight_devices_are_one_device(x64, kind, estimator, mode):
    """Factors are means, inverses split, the random vectors those of the global batch."""

    def worker(x: Any, y: Any) -> Any:
        return train(optimizer(kind, estimator), double(PARAMS), x, y, "workers")

    x, y = np.float64(X).reshape(8, 3, 2), Y.reshape(8, 3)
    params, state = jax.block_until_ready(over_workers(mode, worker, 8)(x, y))
    want = alone(kind, estimator)
    for i in (0, 7):
        tree_allclose(jax.tree.map(lambda leaf, i=i: leaf[i], params), want[0], rtol=1e-8)
    factors = jax.tree.map(lambda leaf: leaf[3], state[0].factors)
    tree_allclose(factors, want[1][0].factors, rtol=1e-8)


@pytest.mark.parametrize("kind", ["ekfac", pytest.param("factored", marks=[pytest.mark.slow])])
def test_replicated_states(x64, kind):
    """Under `shard_map` a state goes in and comes out as the same on all devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optimizer(kind, "fisher")

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        objective = mixed(x, y, "data")
        updates, state = tx.update(objective.grad(params), state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    sharded = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), jax.P("data"), jax.P("data")),
            out_specs=jax.P(),
        )
    )
    params = double(PARAMS)
    state = tx.init(params)
    for _ in range(4):
        before = signature(state)
        params, state = jax.block_until_ready(sharded(params, state, np.float64(X), Y))
        assert signature(state) == before
    tree_allclose(params, alone(kind, "fisher")[0], rtol=1e-8)


@pytest.mark.parametrize(
    ("kind", "settings", "mode"),
    [
        ("factored", {"estimator": "ggn"}, "vmap"),
        ("factored", {"estimator": "empirical"}, "vmap"),
        ("ekfac", {"likelihood": "categorical"}, "shard_map"),
    ],
)
def test_replicas_that_do_not_count_alike(x64, kind, settings, mode):
    """Of a mean over valid tokens, one replica without any: what the whole batch gives."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3, 2)), rng.integers(0, 3, (8, 3))
    mask = np.float64(rng.uniform(size=(8, 3)) < 0.6)
    mask[2:4] = 0
    params = double({"w": rng.normal(size=(2, 4)), "v": rng.normal(size=(4, 3)), "log": np.ones(3)})

    def predict(p: Any, x: Any) -> jax.Array:
        return jnp.tanh(x @ p["w"]) @ p["v"] * jnp.exp(p["log"])[None, None]

    def moments(x: Any, y: Any, mask: Any, axis_name: str | None = "workers") -> Any:
        objective = oa.Objective(
            predict, masked_cross_entropy, axis_name, weight=lambda mask: jnp.sum(mask)
        )
        tx = scale_by(kind, objective, example={"x": x}, **settings)
        batch = {"x": x, "labels": y, "mask": mask}
        grads = objective.grad(params, **batch)
        state = tx.init(params)
        state = tx.update(grads, state, params, value_fn=objective, **batch)[1]
        return state.factors, state.moments

    got = over_workers(mode, moments, 4)(*(a.reshape(4, 2, *a.shape[1:]) for a in (x, y, mask)))
    want = jax.jit(functools.partial(moments, axis_name=None))(x, y, mask)
    for i in (0, 1):
        tree_allclose(jax.tree.map(lambda leaf, i=i: leaf[i], got), want, rtol=1e-8, atol=1e-14)


# -- what it gains ------------------------------------------------------------------------------


def test_a_fifth_of_the_steps_of_sgd():
    """On inputs of very different scales, with the best of several learning rates."""
    inputs = np.float32(np.random.default_rng(0).normal(size=(64, 6)))
    x = inputs * np.logspace(0, -1.5, 6, dtype=np.float32)[None]
    y = mlp_apply(mlp_init((6, 8, 2), seed=3), inputs)
    objective = oa.Objective(lambda p: mlp_apply(p, x), lambda out: squares(out, y))

    def reached(build: Any, num_steps: int) -> jax.Array:
        def run(rate: Any) -> Any:
            tx = optax.with_extra_args_support(build(rate))

            def step(carry: Any, _: None) -> Any:
                params, state = carry
                grads = objective.grad(params)
                updates, state = tx.update(grads, state, params, value_fn=objective)
                return (optax.apply_updates(params, updates), state), None

            params = mlp_init((6, 8, 2))
            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=num_steps)
            return objective(params)

        losses = jax.jit(jax.vmap(run))(jnp.logspace(-1, 0, 3))
        assert jnp.isfinite(losses[0])  # the highest rates may be too high
        return jnp.nanmin(losses)

    sgd = reached(functools.partial(optax.sgd, momentum=0.9), 200)
    settings = {"likelihood": "gaussian", "inverses_every": 1, "kl_clip": 0.01, "momentum": 0.0}
    for build in (functools.partial(oa.kfac, damping_kind="eigen"), oa.ekfac):
        assert reached(functools.partial(build, objective=objective, **settings), 40) < sgd


# -- what a user gets wrong -----------------------------------------------------------------------


LINEAR = oa.Objective(lambda p, x: x @ p["w"], lambda out, y: squares(out, y))
ONE = {"w": np.ones((2, 2), np.float32)}


def test_no_layer_at_all():
    """A diagonal of batch gradients, and one warning that says for which parameter and why."""

    def predict(params: Any) -> jax.Array:
        return jax.lax.scan(lambda h, w: (h @ jnp.exp(w), None), X, params["w"])[0]

    objective = oa.Objective(predict, lambda out: squares(out, X))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2)), jnp.float32)}
    tx = oa.scale_by_kfac(objective, damping=0.1, estimator="empirical")
    with pytest.warns(UserWarning, match=r"1 of 1 blocks(.|\n)*'w'.*is changed by `exp`"):
        state = tx.init(params)
    grads = objective.grad(params)
    updates, _ = tx.update(grads, state, params, value_fn=objective)
    want = grads["w"] / (len(X) * grads["w"] ** 2 + 0.1)
    np.testing.assert_allclose(updates["w"], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: oa.kfac(0.1, LINEAR),
            ValueError,
            r"lacks its arguments \['x'\].*example={'x': ...",
        ),
        (
            lambda: oa.ekfac(0.1, LINEAR, example={"y": X}),
            ValueError,
            r"lacks its arguments \['x'\]",
        ),
        (
            lambda: oa.scale_by_kfac(LINEAR, example=X),
            TypeError,
            "must be a dictionary .*; got ndarray",
        ),
        (lambda: oa.describe_layers(LINEAR, ONE), ValueError, r"describe_layers .* lacks its arg"),
        (
            lambda: oa.kfac(0.1, LINEAR, example={"x": X.T}).init(ONE),
            ValueError,
            r"`predict` cannot be evaluated: TypeError: dot_gen.*\n.*'w'.*: float32\[2, 2\].*'x'",
        ),
        (
            lambda: oa.scale_by_ekfac(LINEAR, example={"x": X}).init({"v": X}),
            ValueError,
            r"`predict` cannot be evaluated: KeyError: 'w'\n.* parameters {\['v'\]",
        ),
        (
            lambda: oa.scale_by_kfac(oa.Objective.from_value_fn(lambda p: 0.0)),
            ValueError,
            r"a plain function of the parameters; build it as .*Objective\(predict, loss\)",
        ),
        (
            lambda: oa.kfac(0.1, LINEAR, example={"x": X}).update(
                {"w": np.ones((2, 3))},
                oa.kfac(0.1, LINEAR, example={"x": X}).init(ONE),
                {"w": np.ones((2, 3))},
                value_fn=LINEAR,
                x=X,
            ),
            ValueError,
            "these are not the parameters that `init` was called with",
        ),
        (
            lambda: oa.kfac(0.1, oa.Objective(lambda p: jnp.argmax(X @ p["w"], 1), jnp.sum)).init(
                ONE
            ),
            TypeError,
            "must be real floating-point numbers; got the dtypes int32. Return logits",
        ),
        (
            lambda: oa.kfac(0.1, LINEAR, example={"x": X}, likelihood="categorical").update(
                ONE,
                oa.kfac(0.1, LINEAR, example={"x": X}, likelihood="categorical").init(ONE),
                ONE,
                value_fn=LINEAR,
                x=X,
                y=X,
            ),
            ValueError,
            "`likelihood` is 'categorical', but the program of the loss shows 'gaussian'",
        ),
    ],
)
def test_wrong_examples(build, error, message):
    """Said as early as it is known, in words of ours."""
    with pytest.raises(error, match=message):
        build()


def test_flags_of_an_example_are_given_as_they_are():
    def predict(params: Any, x: Any, train: bool, name: str) -> jax.Array:
        return x @ params["w"] if train and name == "linear" else x

    objective = oa.Objective(predict, lambda out: squares(out, X))
    example = {"x": jax.ShapeDtypeStruct(X.shape, X.dtype), "train": True, "name": "linear"}
    assert "2 x 2 Kronecker" in oa.describe_layers(objective, ONE, example)


def test_parameters_that_do_not_take_part():
    """Integers and keys behind a mask pass; Python numbers are parameters."""
    params = ONE | {"t": 2.0, "step": jnp.asarray(3), "key": jax.random.key(0)}
    objective = oa.Objective(lambda p: X @ p["w"] * p["t"], lambda out: squares(out, X))
    mask = {"w": True, "t": True, "step": False, "key": False}
    tx = oa.scale_by_kfac(objective, mask=mask)
    state = tx.init(params)
    grads = dict.fromkeys(params, 0.0) | ONE
    updates, state = tx.update(grads, state, params, value_fn=objective)
    assert updates["step"] == updates["key"] == 0.0
    assert (updates["w"].shape, updates["t"].shape) == ((2, 2), ())
    assert state.accepted
    with pytest.raises(TypeError, match=r"'key'.* has dtype key"):
        oa.scale_by_kfac(objective, mask=mask | {"key": True}).init(params)


def test_auxiliary_outputs_and_losses_with_a_rule():
    """Pairs are taken apart; with a likelihood no second derivative of the loss is needed."""

    @jax.custom_vjp
    def fused(out: jax.Array) -> jax.Array:
        return squares(out, X)

    fused.defvjp(lambda out: (fused(out), out), lambda out, g: (g * (out - X) / len(X),))
    plain = oa.Objective(lambda p: X @ p["w"], lambda out: squares(out, X))
    pairs = oa.Objective(
        lambda p: (X @ p["w"], "aux"), lambda out: (fused(out), "aux"), has_aux="both"
    )
    grads = plain.grad(ONE)
    updates = []
    for objective in (plain, pairs):
        tx = oa.scale_by_kfac(objective, likelihood="gaussian", estimator="ggn")
        updates.append(tx.update(grads, tx.init(ONE), ONE, value_fn=objective)[0])
    tree_allclose(*updates, rtol=1e-5)


def test_roots_of_losses_that_forward_mode_cannot_differentiate():
    """They are taken as the objective says; where it says nothing, the error names the option."""

    @jax.custom_vjp
    def square(out: jax.Array) -> jax.Array:
        return out**2

    square.defvjp(lambda out: (square(out), out), lambda out, g: (2 * out * g,))

    def update(square: Any, **mode: Any) -> jax.Array:
        objective = oa.Objective(
            lambda p: X @ p["w"], lambda out: jnp.mean(jnp.sum(square(out - X), -1)), **mode
        )
        tx = oa.scale_by_kfac(objective, estimator="ggn")
        return jax.jit(lambda: tx.update(ONE, tx.init(ONE), ONE, value_fn=objective)[0]["w"])()

    want = update(jnp.square)
    for mode, rtol in (("reverse_over_reverse", 1e-6), ("finite_difference", 1e-3)):
        np.testing.assert_allclose(update(square, hvp_mode=mode), want, rtol=rtol)
    with pytest.raises(TypeError, match="hvp_mode='forward_over_reverse'"):
        update(lambda out: square(square(out) ** 0.5))


@pytest.mark.parametrize("build", [oa.kfac, oa.ekfac])
def test_states_without_parameters(build):
    """`optax.tree.map_params` touches the momentum alone; shapes come without parameters."""
    settings = {"objective": mlp_objective(X, Y), "momentum": 0.9}
    tx, params = build(0.1, **settings), mlp_init()
    state = tx.init(params)
    assert signature(jax.eval_shape(tx.init, params)) == signature(state)
    for same in (tx, build(0.1, **settings)):  # one that has seen parameters, one that has not
        mapped = optax.tree.map_params(same, lambda leaf: leaf + 1, state)
        tree_equal(mapped[0], state[0])
        tree_equal(mapped[1].trace, jax.tree.map(jnp.ones_like, params))
        zeros = optax.tree.map_params(  # what belongs to layers is one value
            same, jnp.ones_like, state, transform_non_params=optax.tree.zeros_like
        )
        estimates = zeros[0].factors, zeros[0].inverses
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(estimates))


def test_another_network_than_it_was_built_with():
    objective = mlp_objective(X, Y)
    tx = oa.scale_by_kfac(objective)
    params = mlp_init()

    def predict(params: Any) -> jax.Array:
        return mlp_apply(params, X) * jnp.exp(params["layer0"]["b"].sum())

    other = oa.Objective(predict, lambda out: cross_entropy(out, Y))
    with pytest.raises(ValueError, match="not the one it was built with"):
        tx.update(params, tx.init(params), params, value_fn=other)


def test_mask():
    """Masked-out leaves pass unchanged; those that stay have the block that they have alone."""
    mask = {"layer0": {"w": True, "b": False}, "layer1": True}
    objective, params = mlp_objective(X, Y), mlp_init()
    tx = oa.scale_by_kfac(objective, estimator="ggn", mask=mask, norm_constraint=1e-9)
    updates, state = first_update(tx, objective, params)
    grads = objective.grad(params)
    tree_equal(updates["layer0"]["b"], jax.jit(objective.grad)(params)["layer0"]["b"])
    assert state.factors[0].inputs.shape == (2, 2)
    assert not jnp.allclose(updates["layer0"]["w"], grads["layer0"]["w"])


def test_large_factors_are_diagonal():
    objective, params = mlp_objective(X, Y), mlp_init()
    tx = oa.scale_by_kfac(objective, estimator="ggn", max_size=3)
    full = oa.scale_by_kfac(objective, estimator="ggn")
    (updates, state), (_, want) = (first_update(t, objective, params) for t in (tx, full))
    assert [f.inputs.shape for f in state.factors] == [(3, 3), (9,)]
    assert [f.outputs.shape for f in state.factors] == [(8,), (3, 3)]
    np.testing.assert_allclose(
        state.factors[1].inputs, jnp.diagonal(want.factors[1].inputs), rtol=1e-5
    )
    ekfac = scale_by("ekfac", objective, estimator="ggn", max_size=3)
    both = updates, first_update(ekfac, objective, params)[0]
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(both))
