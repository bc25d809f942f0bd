"""K-FAC and EKFAC against the matrices that they stand for."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel import curvature
from tests.helpers import (
    classification,
    least_squares,
    mlp_apply,
    mlp_init,
    mlp_objective,
    tree_allclose,
)

KINDS = ("factored", "eigen", "ekfac")
# What differs little between them is tested with one by default.
ONE_KIND = [pytest.param(k, marks=[pytest.mark.slow] if k != "ekfac" else []) for k in KINDS]


def scale_by(kind: str, *args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    if kind == "ekfac":
        return oa.scale_by_ekfac(*args, **kwargs)
    return oa.scale_by_kfac(*args, damping_kind=kind, **kwargs)


def first_update(tx: Any, objective: oa.Objective, params: Any, **extra: Any) -> tuple[Any, Any]:
    """The update of the gradient and the new state."""

    @jax.jit
    def run(params: Any) -> tuple[Any, Any]:
        grads = objective.grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=objective, **extra)

    return run(params)


def ravel(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def squares(outputs: Any, targets: Any) -> jax.Array:
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


@functools.cache
def linear_layer() -> tuple[oa.Objective, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
    objective = oa.Objective(lambda p: x @ p["w"] + p["b"][None], lambda out: squares(out, y))
    return objective, {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}


def deep_linear(num_examples: int) -> tuple[oa.Objective, Any]:
    rng = np.random.default_rng(1)
    sizes = (4, 3, 5, 2)
    x, y = rng.normal(size=(num_examples, 4)), rng.normal(size=(num_examples, 2))
    params = {
        f"layer{i}": {"w": rng.normal(size=(m, n)), "b": rng.normal(size=n)}
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }

    def predict(params: Any) -> jax.Array:
        out = x
        for i in range(3):
            out = out @ params[f"layer{i}"]["w"] + params[f"layer{i}"]["b"][None]
        return out

    return oa.Objective(predict, lambda out: squares(out, y)), params


def matrices(tx: Any, objective: oa.Objective, params: Any) -> list[np.ndarray]:
    """A kron B of each layer, for rows of weights one after the other, the bias last."""
    _, state = first_update(tx, objective, params)
    return [np.kron(*(m / state.factor_weight for m in f)) for f in state.factors]


def block(dense: Any, params: Any, name: str) -> np.ndarray:
    """The block of one layer in the order of `matrices`."""
    numbered = jax.tree.map(np.ones_like, params)
    flat, treedef = jax.tree.flatten(numbered)
    ends = np.cumsum([leaf.size for leaf in flat])
    parts = [np.arange(e - leaf.size, e) for e, leaf in zip(ends, flat, strict=True)]
    layer = jax.tree.unflatten(treedef, parts)[name]
    order = np.concatenate([layer["w"], layer["b"]])
    return np.asarray(dense)[np.ix_(order, order)]


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [None, "gaussian"])
@pytest.mark.parametrize("kind", ["eigen", "ekfac"])
def test_natural_gradient_of_a_linear_layer(x64, kind, likelihood):
    """With squared error A kron B is the Fisher matrix: here B is the identity."""
    objective, params = linear_layer()
    params = double(params)
    tx = scale_by(kind, objective, damping=0.1, estimator="ggn", likelihood=likelihood)
    updates, _ = first_update(tx, objective, params)
    fisher = np.asarray(curvature.gauss_newton(objective, params).dense())
    want = np.linalg.solve(fisher + 0.1 * np.eye(len(fisher)), ravel(objective.grad(params)))
    np.testing.assert_allclose(ravel(updates), want, rtol=1e-10)


def test_natural_gradient_of_a_low_rank_adapter(x64):
    """Each of its matrices has the Kronecker product that is the Fisher matrix of it alone."""
    rng = np.random.default_rng(0)
    x, w, y = rng.normal(size=(7, 3)), rng.normal(size=(3, 4)), rng.normal(size=(7, 4))
    objective = oa.Objective(
        lambda p: x @ (w + 0.5 * (p["left"] @ p["right"])), lambda out: squares(out, y)
    )
    params = double({"left": rng.normal(size=(3, 2)), "right": rng.normal(size=(2, 4))})
    tx = oa.scale_by_kfac(objective, damping=0.1, damping_kind="eigen", estimator="ggn")
    updates, _ = first_update(tx, objective, params)
    fisher = np.asarray(curvature.gauss_newton(objective, params).dense())
    gradient = ravel(objective.grad(params))
    for one, update in zip(
        (slice(6), slice(6, 14)), (updates["left"], updates["right"]), strict=True
    ):
        want = np.linalg.solve(fisher[one, one] + 0.1 * np.eye(update.size), gradient[one])
        np.testing.assert_allclose(np.ravel(update), want, rtol=1e-10)


@pytest.mark.parametrize(
    ("weight", "shapes"),
    [
        (oa.weight_norm().forward, {"directions": (3, 2), "lengths": (2,)}),
        (lambda p: jnp.sinh(p["w"].T), {"w": (2, 3)}),
        (lambda p: (p["u"] * p["v"]).reshape(3, 2), {"u": (6,), "v": (6,)}),
    ],
    ids=["normalized", "one parameter", "product of entries"],
)
def test_weights_that_are_computed_from_parameters(x64, weight, shapes):
    """The factors are those of the weight; the rest is the derivative of the user's function."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
    objective = oa.Objective(lambda p: jnp.tanh(x @ weight(p)), lambda out: squares(out, y))
    params = double({name: rng.normal(size=shape) for name, shape in shapes.items()})
    tx = oa.scale_by_kfac(objective, estimator="ggn", damping=0.1)
    updates, state = first_update(tx, objective, params)
    plain = oa.Objective(lambda w: jnp.tanh(x @ w), lambda out: squares(out, y))
    plain_tx = oa.scale_by_kfac(plain, estimator="ggn", damping=0.1)
    _, expected = first_update(plain_tx, plain, weight(params))
    tree_allclose(state.inverses, expected.inverses, rtol=1e-10)
    jacobian = jax.jacobian(lambda p: weight(p).ravel())(params)
    jacobian = np.hstack([np.reshape(leaf, (6, -1)) for leaf in jax.tree.leaves(jacobian)])
    curvature_of_weight = np.linalg.inv(np.kron(*state.inverses[0]))
    curvature_of_params = jacobian.T @ curvature_of_weight @ jacobian
    want = np.linalg.pinv(curvature_of_params, 1e-10) @ ravel(objective.grad(params))
    np.testing.assert_allclose(ravel(updates), want, rtol=1e-8, atol=1e-12)


def test_weights_of_positions(x64):
    """With weights in the loss, too, A kron B is the curvature of a linear layer."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 3, 2))
    weights = rng.uniform(size=(5, 3, 1)) * (rng.uniform(size=(5, 3, 1)) > 0.3)
    objective = oa.Objective(
        lambda p: x @ p["layer"]["w"] + p["layer"]["b"][None, None],
        lambda out: jnp.sum(weights * (out - y) ** 2) / jnp.sum(weights),
    )
    params = double({"layer": {"w": rng.normal(size=(2, 2)), "b": rng.normal(size=2)}})
    tx = oa.scale_by_kfac(objective, estimator="ggn", likelihood="gaussian")
    (matrix,) = matrices(tx, objective, params)
    want = block(curvature.gauss_newton(objective, params).dense(), params, "layer")
    np.testing.assert_allclose(matrix, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "likelihood"),
    [("ggn", None), ("ggn", "categorical"), ("empirical", None)],
)
def test_examples_that_the_loss_leaves_out(x64, estimator, likelihood):
    """Padding changes no factor, whatever it holds."""
    x, y = classification()
    params = double(mlp_init())
    x, mask = np.float64(x[:9]), np.arange(9) < 6

    def factors(x: Any, y: Any, mask: Any) -> Any:
        objective = oa.Objective(
            lambda p: mlp_apply(p, x),
            lambda out: masked_cross_entropy(out, y, mask),
            weight=lambda: jnp.sum(mask),
        )
        tx = oa.scale_by_kfac(objective, estimator=estimator, likelihood=likelihood)
        return first_update(tx, objective, params)[1].factors

    tree_allclose(factors(x, y[:9], mask), factors(x[:6], y[:6], mask[:6]), rtol=1e-9)


@pytest.mark.parametrize("num_examples", [1, 6])
def test_blocks_of_deep_linear_networks(x64, num_examples):
    """Exact: the gradients at the outputs do not depend on the example, nor on the inputs."""
    objective, params = deep_linear(num_examples)
    params = double(params)
    dense = curvature.gauss_newton(objective, params).dense()
    tx = oa.scale_by_kfac(objective, estimator="ggn")
    for i, matrix in enumerate(matrices(tx, objective, params)):
        np.testing.assert_allclose(
            matrix, block(dense, params, f"layer{i}"), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("likelihood", [None, "categorical"])
def test_blocks_of_one_example(x64, likelihood):
    """With softmax, too: one example's block is a Kronecker product."""
    x, y = classification()
    params = double(mlp_init())
    objective = mlp_objective(np.float64(x[:1]), y[:1])
    dense = curvature.gauss_newton(objective, params).dense()
    tx = oa.scale_by_kfac(objective, estimator="ggn", likelihood=likelihood)
    for i, matrix in enumerate(matrices(tx, objective, params)):
        np.testing.assert_allclose(matrix, block(dense, params, f"layer{i}"), rtol=1e-9, atol=1e-12)


def masked_cross_entropy(logits: jax.Array, labels: Any, mask: Any) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(mask * each) / jnp.sum(mask)


def test_empirical_factors(x64):
    """Second moments of the gradients of the loss."""
    objective, params = deep_linear(6)
    params = double(params)
    _, state = first_update(
        oa.scale_by_kfac(objective, estimator="empirical", decay=0.0), objective, params
    )
    slopes = 6 * jax.grad(objective.loss_of_outputs)(objective.outputs(params))
    np.testing.assert_allclose(state.factors[2].outputs, slopes.T @ slopes / 6, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_preconditioning_solves_the_damped_system(x64, kind):
    """Row by row: (A + ..) kron (B + ..), (A kron B) + damping I, U diag(S) U^T + damping I."""
    x, y = classification()
    params, damping = double(mlp_init()), 0.03
    objective = mlp_objective(np.float64(x), y)
    tx = scale_by(kind, objective, damping=damping, likelihood="categorical")
    updates, state = first_update(tx, objective, params)
    grads = objective.grad(params)
    for i, (f, s) in enumerate(zip(state.factors, state.moments, strict=True)):
        a, b = (np.asarray(m / state.factor_weight) for m in f)
        if kind == "factored":
            pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
            root = np.sqrt(damping)
            matrix = np.kron(a + pi * root * np.eye(len(a)), b + root / pi * np.eye(len(b)))
        else:
            matrix = np.kron(a, b)
            if kind == "ekfac":
                basis = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(b)[1])
                matrix = (basis * np.ravel(s / state.factor_weight)) @ basis.T
            matrix = matrix + damping * np.eye(len(matrix))
        name = f"layer{i}"
        gradient = np.concatenate([np.ravel(grads[name]["w"]), grads[name]["b"]])
        got = np.concatenate([np.ravel(updates[name]["w"]), updates[name]["b"]])
        np.testing.assert_allclose(got, np.linalg.solve(matrix, gradient), rtol=1e-8, atol=1e-12)


def test_ekfac_is_closer_than_kfac(x64):
    """In the Frobenius norm; its eigenvalues are the best ones in K-FAC's basis."""
    x, y = classification()
    params = double(mlp_init())
    objective = mlp_objective(np.float64(x), y)
    dense = curvature.gauss_newton(objective, params).dense()
    tx = oa.scale_by_ekfac(objective, estimator="ggn", likelihood="categorical")
    _, state = first_update(tx, objective, params)
    for i, (f, inverses, s) in enumerate(
        zip(state.factors, state.inverses, state.moments, strict=True)
    ):
        want = block(dense, params, f"layer{i}")
        a, b = (np.asarray(m / state.factor_weight) for m in f)
        basis = np.kron(inverses.inputs.eigenvectors, inverses.outputs.eigenvectors)
        moments = np.ravel(s / state.factor_weight)
        np.testing.assert_allclose(moments, np.diagonal(basis.T @ want @ basis), atol=1e-12)
        errors = [
            np.linalg.norm(want - approximation)
            for approximation in ((basis * moments) @ basis.T, np.kron(a, b))
        ]
        assert errors[0] < errors[1] * (1 - 1e-3)


def test_ekfac_of_a_tied_embedding(x64):
    """A table that is also the projection to the outputs: in the basis of both of its uses."""
    rng = np.random.default_rng(0)
    tokens, y = rng.integers(0, 5, (6, 3)), rng.normal(size=(6, 3, 5))
    objective = oa.Objective(
        lambda p: jnp.tanh(p["w"][tokens]) @ p["w"].T, lambda out: squares(out, y)
    )
    params = double({"w": rng.normal(size=(5, 2))})
    tx = oa.scale_by_ekfac(objective, estimator="ggn", damping=0.1)
    updates, state = first_update(tx, objective, params)
    dense = curvature.gauss_newton(objective, params).dense()
    (basis,), (moments,) = state.inverses, state.moments
    both = np.kron(basis.inputs.eigenvectors, basis.outputs.eigenvectors)
    want = np.diagonal(both.T @ dense @ both)
    np.testing.assert_allclose(np.ravel(moments / state.factor_weight), want, atol=1e-12)
    want = both @ ((both.T @ ravel(objective.grad(params))) / (want + 0.1))
    np.testing.assert_allclose(ravel(updates), want, rtol=1e-10)


def test_weights_of_several_kinds_on_replicas():
    """Tied, adapted and computed ones, with indices that are numbers: as on one device."""
    rng = np.random.default_rng(0)
    shapes = {"w": (5, 3), "left": (3, 1), "right": (1, 2), "v": (3, 2), "u": (2, 3)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    tokens, y = rng.integers(0, 5, 8), np.float32(rng.normal(size=(8, 5)))

    def predict(p: Any, tokens: Any) -> jax.Array:
        h = jnp.tanh(p["w"][tokens])
        return jnp.tanh(h @ (jnp.sinh(p["v"]) + p["left"] @ p["right"])) @ p["u"] @ p["w"].T

    def update(axis_name: str | None, params: Any, tokens: Any, y: Any) -> Any:
        objective = oa.Objective(predict, squares, axis_name)
        tx = oa.scale_by_ekfac(objective, {"tokens": tokens}, estimator="ggn", damping=0.1)
        grads = objective.grad(params, tokens=tokens, targets=y)
        batch = {"value_fn": objective, "tokens": tokens, "targets": y}
        return tx.update(grads, tx.init(params), params, **batch)[0]

    mesh = jax.make_mesh((2,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(update, "workers"),
        mesh=mesh,
        in_specs=(jax.P(), jax.P("workers"), jax.P("workers")),
        out_specs=jax.P(),
    )
    want = jax.jit(functools.partial(update, None))(params, tokens, y)
    tree_allclose(jax.jit(sharded)(params, tokens, y), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_curvature_gradients_pass(kind):
    """A = B = I: divided by 1 + damping in the eigenbasis."""
    problem = least_squares()
    objective = problem.objective()
    tx = scale_by(kind, objective, damping=0.25)
    updates, _ = first_update(tx, objective, problem.params, refresh=False)
    scale = 1.0 if kind == "factored" else 1 / 1.25
    tree_allclose(updates, optax.tree.scale(scale, objective.grad(problem.params)), rtol=1e-6)


# -- moving averages and periods ------------------------------------------------------------------


def steps(tx: Any, objective: Any, params: Any, refresh: Any, num_steps: int) -> list[Any]:
    """States after steps at which the parameters change."""

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params: Any, state: Any, refresh: Any) -> Any:
        updates, state = tx.update(
            objective.grad(params), state, params, value_fn=objective, refresh=refresh
        )
        return optax.apply_updates(params, optax.tree.scale(-0.05, updates)), state

    state, states = tx.init(params), []
    for i in range(num_steps):
        params, state = step(params, state, refresh(i))
        states.append((params, state))
    return states


@pytest.mark.parametrize("kind", ONE_KIND)
def test_periods(kind):
    """Between refreshes factors and inverses stay; the host's rhythm is the graph's."""
    x, y = classification()
    objective = mlp_objective(x, y)
    tx = scale_by(kind, objective, factors_every=2, inverses_every=4, likelihood="categorical")
    refresh = functools.partial(oa.refresh_at, tx=tx)
    assert [refresh(i) for i in range(4)] == ["inverses", False, "factors", False]
    host = steps(tx, objective, mlp_init(), refresh, 6)
    tree_allclose(host, steps(tx, objective, mlp_init(), lambda i: None, 6), rtol=1e-4)
    for i in range(1, 6):
        (_, before), (_, after) = host[i - 1 : i + 1]
        for field, changes in (("factors", i % 2 == 0), ("inverses", i % 4 == 0)):
            same = all(
                np.array_equal(a, b)
                for a, b in zip(
                    jax.tree.leaves(getattr(before, field)),
                    jax.tree.leaves(getattr(after, field)),
                    strict=True,
                )
            )
            assert same != changes, (i, field)


def test_factors_are_averages_corrected_for_their_start(x64):
    """On one batch at one point the average is that batch's matrix, from the first step on."""
    objective, params = linear_layer()
    params = double(params)
    tx = oa.scale_by_kfac(objective, decay=0.9, estimator="ggn")
    state = tx.init(params)
    grads = objective.grad(params)
    update = jax.jit(lambda state: tx.update(grads, state, params, value_fn=objective))
    for i in range(3):
        _, state = update(state)
        np.testing.assert_allclose(state.factor_weight, 1 - 0.9 ** (i + 1), rtol=1e-12)
        np.testing.assert_allclose(
            state.factors[0].outputs / state.factor_weight, np.eye(2), atol=1e-12
        )


# -- bounds on the step ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ONE_KIND)
def test_kl_clip(x64, kind):
    """Active: nu^2 lr^2 <V, G> = kappa; inactive: no change."""
    objective, params = deep_linear(6)
    params, rate, kappa = double(params), 0.3, 1e-3
    grads = objective.grad(params)
    free, _ = first_update(scale_by(kind, objective), objective, params)
    product = optax.tree.vdot(free, grads)
    bound = kappa / rate**2
    assert product > bound
    clipped, state = first_update(
        scale_by(kind, objective, norm_constraint=bound), objective, params
    )
    np.testing.assert_allclose(state.step_scale**2 * rate**2 * product, kappa, rtol=1e-6)
    tree_allclose(clipped, optax.tree.scale(float(state.step_scale), free), rtol=1e-6)
    tx = scale_by(kind, objective, norm_constraint=2.0 * float(product))
    loose, same = tx.update(grads, state, params, refresh=False)
    assert same.step_scale == 1
    tree_allclose(loose, free, rtol=1e-12)
    optimizer = oa.ekfac if kind == "ekfac" else functools.partial(oa.kfac, damping_kind=kind)
    learning_rate = rate if kind == "eigen" else lambda count: rate
    updates, _ = first_update(optimizer(learning_rate, objective, kl_clip=kappa), objective, params)
    tree_allclose(updates, optax.tree.scale(-rate, clipped), rtol=1e-5)
