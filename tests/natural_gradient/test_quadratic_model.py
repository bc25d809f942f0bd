"""Steps from the quadratic model: dense solutions, adapted damping, trust regions, workers."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import (
    classification,
    least_squares,
    mlp_init,
    mlp_objective,
    over_workers,
    signature,
    tree_allclose,
    tree_equal,
)

X, Y = classification()
PARAMS = jax.tree.map(np.asarray, mlp_init((2, 4, 3)))


def double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def mlp(rows: slice = slice(None)) -> oa.Objective:
    return mlp_objective(np.float64(X[rows]), Y[rows])


def flat(tree: Any) -> jax.Array:
    return jax.flatten_util.ravel_pytree(tree)[0]


def gauss_newton(objective: oa.Objective, params: Any) -> jax.Array:
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    product = objective.gauss_newton(params)
    return jax.vmap(lambda v: flat(product(unravel(v))))(jnp.eye(vector.size))


def steps(tx: Any, params: Any, objective: Any, number: int, refresh: Any = None) -> list[Any]:
    """Parameters and states of a run, the start included."""

    def step(params: Any, state: Any, refresh: Any) -> Any:
        grads = objective.grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective, refresh=refresh)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, static_argnums=2)
    run = [(params, tx.init(params))]
    for i in range(number):
        run.append(compiled(*run[-1], refresh(i) if refresh else None))
    return run


# -- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "momentum"),
    [
        ("exact", "exact"),
        ("exact", 0.3),
        pytest.param("exact", 0.0, marks=[pytest.mark.slow]),
        pytest.param(0.2, "exact", marks=[pytest.mark.slow]),
    ],
)
def test_rate_and_momentum_are_the_minimum_of_the_dense_model(x64, rate, momentum):
    objective, params, damping = mlp(), double(PARAMS), 1 / 16
    # A preconditioner that is far from the inverse of the curvature.
    tx = oa.quadratic_model(optax.scale_by_sign(), rate, momentum, damping=damping)
    start, first, second = steps(tx, params, objective, 2)
    gradient = flat(objective.grad(first[0]))
    basis = np.stack([-jnp.sign(gradient), flat(first[0]) - flat(start[0])], axis=1)
    matrix = gauss_newton(objective, first[0]) + damping * np.eye(len(gradient))
    given = [rate, momentum]
    free = [i for i in (0, 1) if given[i] == "exact"]
    known = sum(given[i] * basis[:, i] for i in (0, 1) if i not in free) + np.zeros(len(gradient))
    part = basis[:, free]
    solved = np.linalg.solve(part.T @ matrix @ part, -part.T @ (gradient + matrix @ known))
    update = known + part @ solved
    np.testing.assert_allclose(flat(second[0]) - flat(first[0]), update, rtol=1e-9)
    coefficients = dict(zip(free, solved, strict=True))
    state = second[1]
    np.testing.assert_allclose(state.step_size, coefficients.get(0, rate), rtol=1e-6)
    np.testing.assert_allclose(state.step_momentum, coefficients.get(1, momentum), rtol=1e-6)
    change = gradient @ update + update @ matrix @ update / 2
    np.testing.assert_allclose(state.model_decrease, -change, rtol=1e-6)
    # Without a previous update the learning rate alone decides.
    assert first[1].step_momentum == (momentum if momentum == 0.3 else 0)


def test_the_trust_region_bounds_the_length_in_the_metric_of_the_curvature(x64):
    objective, params = mlp(), double(PARAMS)
    region = oa.TrustRegion(0.1, every=1)
    tx = oa.quadratic_model(optax.identity(), damping=1e-3, trust_region=region)
    (start, _), (end, state) = steps(tx, params, objective, 1)
    update = flat(end) - flat(start)
    length = jnp.sqrt(update @ gauss_newton(objective, start) @ update)
    np.testing.assert_allclose(length, 0.1, rtol=1e-6)
    # Short steps are predicted well, so the region grows.
    np.testing.assert_allclose(state.trust_radius, 0.2, rtol=1e-6)
    assert state.reduction_ratio > 0.75


def test_curvature_of_another_batch_and_a_mask(x64):
    objective, part, params = mlp(), mlp(slice(12)), double(PARAMS)
    mask = {"layer0": True, "layer1": {"w": True, "b": False}}
    tx = oa.quadratic_model(optax.identity(), damping=1 / 8, momentum=0.0, mask=mask)
    gradient = objective.grad(params)

    @jax.jit
    def update(params: Any) -> Any:
        others = {"value_fn": objective, "curvature_value_fn": part}
        return tx.update(gradient, tx.init(params), params, **others)[0]

    updates = update(params)
    tree_equal(updates["layer1"]["b"], gradient["layer1"]["b"])
    masked = {**gradient, "layer1": gradient["layer1"] | {"b": jnp.zeros(3)}}
    vector = flat(masked)
    matrix = gauss_newton(part, params) + jnp.eye(vector.size) / 8
    rate = vector @ vector / (vector @ matrix @ vector)
    np.testing.assert_allclose(
        flat(updates["layer0"]), -rate * flat(gradient["layer0"]), rtol=1e-10
    )


@pytest.mark.slow
def test_given_numbers_are_those_of_kfac(x64):
    """With damping that stays, the options change nothing but the form of the program."""
    objective, params = mlp(), double(PARAMS)
    plain = oa.kfac(0.05, objective, damping=0.1, estimator="ggn", inverses_every=2)
    same = oa.kfac(
        0.05,
        objective,
        damping=oa.LevenbergMarquardt(0.1, decay=1.0, every=2),
        estimator="ggn",
        inverses_every=2,
    )
    runs = [steps(tx, params, objective, 4) for tx in (plain, same)]
    tree_allclose(runs[1][-1][0], runs[0][-1][0], rtol=1e-6)  # 0.1 is rounded to float32
    assert runs[1][-1][1].damping_value == np.float32(0.1)


# -- what adapts ----------------------------------------------------------------------------------


def with_ratio(c: float) -> oa.Objective:
    """A loss whose step from 0 at damping 0 is 1 and has the reduction ratio 1 - 2 c."""
    return oa.Objective(lambda x: (x, x**3), lambda out: 0.5 * (out[0] - 1) ** 2 + c * out[1])


@pytest.mark.parametrize(
    ("c", "factor", "radius"),
    [(0.0, 0.95**5, 0.2), (0.2, 1, 0.1), (0.45, 0.95**-5, 0.025), (0.7, 0.95**-5, 0.025)],
)
def test_damping_and_radius_follow_the_reduction_ratio(x64, c, factor, radius):
    objective, params = with_ratio(c), jnp.zeros(())
    damping = oa.LevenbergMarquardt(1e-6)
    tx = oa.quadratic_model(optax.identity(), damping=damping)
    state = steps(tx, params, objective, 1)[-1][1]
    np.testing.assert_allclose(state.reduction_ratio, 1 - 2 * c, atol=1e-4)
    np.testing.assert_allclose(state.damping_value, factor * 1e-6, rtol=1e-5)
    # The same ratio at a tenth of the step, whose model is -0.1 + 0.005.
    region = oa.TrustRegion(0.1, every=1)
    tx = oa.quadratic_model(optax.identity(), damping=1e-8, trust_region=region)
    point, state = steps(tx, params, with_ratio(190 * c), 1)[-1]
    np.testing.assert_allclose(state.reduction_ratio, 1 - 2 * c, atol=1e-4)
    np.testing.assert_allclose(state.trust_radius, radius, rtol=1e-5)
    np.testing.assert_allclose(point, 0.1 if c < 0.5 else 0, rtol=1e-5)


def test_a_step_that_raises_the_loss_is_not_made(x64):
    tx = oa.quadratic_model(
        optax.identity(), damping=1e-6, trust_region=oa.TrustRegion(8.0, every=1)
    )
    run = steps(tx, jnp.zeros(()), with_ratio(0.7), 3)
    assert run[1][0] == run[1][1].step_size == 0
    assert run[1][1].reduction_ratio < 0
    np.testing.assert_allclose(run[1][1].trust_radius, 0.25, rtol=1e-5)
    np.testing.assert_allclose(run[2][0], 0.25, rtol=1e-5)
    assert run[2][1].reduction_ratio > 0.75


def test_rounding_says_nothing_about_the_damping():
    objective = oa.Objective(lambda x: x, lambda out: 1e6 + jnp.sum((out - 1e-4) ** 2))
    tx = oa.quadratic_model(optax.identity(), damping=oa.LevenbergMarquardt(1.0, every=1))
    state = steps(tx, jnp.zeros(2), objective, 2)[-1][1]
    assert state.damping_value == 1


def test_the_host_drives_what_the_graph_decides():
    """Factors, inverses and damping have periods of their own; a chain of them is one argument."""
    objective, params = least_squares().objective(), least_squares().params
    tx = oa.kfac(
        "exact",
        objective,
        momentum="exact",
        damping=oa.LevenbergMarquardt(0.5, every=3),
        factors_every=2,
        inverses_every=4,
        estimator="ggn",
    )
    wanted = [oa.refresh_at(i, tx) for i in range(4)]
    assert wanted == [
        oa.Refresh(factors=True, inverses=True, damping=True),
        oa.Refresh(),
        oa.Refresh(factors=True),
        oa.Refresh(damping=True),
    ]
    graph = steps(tx, params, objective, 6)
    host = steps(tx, params, objective, 6, lambda i: oa.refresh_at(i, tx))
    tree_allclose(graph[-1][0], host[-1][0], rtol=1e-5)
    values = [float(state.damping_value) for _, state in host]
    np.testing.assert_allclose(values, 0.5 * 0.95 ** np.array([0, 3, 3, 3, 6, 6, 6]), rtol=1e-6)
    np.testing.assert_allclose([float(s.damping_value) for _, s in graph], values)
    alone = oa.quadratic_model(optax.identity(), damping=oa.LevenbergMarquardt(1.0, every=2))
    assert [oa.refresh_at(i, alone) for i in range(3)] == [True, False, True]
    assert optax.tree.get(host[-1][1], "reduction_ratio") > 0.75


def test_kfac_inverts_with_the_damping_of_the_model(x64):
    """A step at a damping that has adapted is that of K-FAC built with it."""
    objective, params = mlp(), double(PARAMS)
    settings = {"estimator": "ggn", "inverses_every": 1, "decay": 0.0}
    rule = oa.LevenbergMarquardt(2.0, every=1)
    run = steps(
        oa.kfac("exact", objective, momentum=0.0, damping=rule, **settings), params, objective, 2
    )
    (before, state), (after, last) = run[1:]
    assert state.damping_value != 2
    tx = oa.scale_by_kfac(objective, damping=float(state.damping_value), **settings)
    grads = objective.grad(before)
    update = jax.jit(lambda *args: tx.update(*args, value_fn=objective)[0])
    direction = update(grads, tx.init(params), before)
    tree_allclose(
        jax.tree.map(jnp.subtract, before, after),
        jax.tree.map(lambda d: float(last.step_size) * d, direction),
        rtol=1e-5,
    )


def test_eight_devices_are_one_device(x64):
    x, y = X[:24], Y[:24]
    rule = oa.LevenbergMarquardt(0.3, every=2)

    def train(x: Any, y: Any, axis_name: str | None) -> Any:
        objective = mlp_objective(x, y, axis_name)
        tx = oa.kfac(
            "exact",
            objective,
            momentum="exact",
            damping=rule,
            trust_region=oa.TrustRegion(0.5, every=2),
            estimator="ggn",
            inverses_every=2,
        )
        params = double(PARAMS)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(objective.grad(params), state, params, value_fn=objective)
            params = optax.apply_updates(params, updates)
        return params, state._replace(inner_state=())

    alone = jax.jit(lambda: train(np.float64(x), y, None))()
    many = over_workers("shard_map", lambda x, y: train(x, y, "workers"), 8)
    each = jax.block_until_ready(many(np.float64(x).reshape(8, 3, 2), y.reshape(8, 3)))
    tree_allclose(jax.tree.map(lambda leaf: leaf[5], each), alone, rtol=1e-6)


def test_every_step_lowers_the_loss_without_a_rate(x64):
    objective, params = mlp(), double(PARAMS)
    tx = oa.ekfac(
        "exact",
        objective,
        momentum="exact",
        damping=oa.LevenbergMarquardt(0.01, every=2),
        estimator="ggn",
        inverses_every=2,
    )
    run = steps(tx, params, objective, 8)
    assert signature(run[0][1]) == signature(run[-1][1])
    losses = [float(objective(params)) for params, _ in run]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]


# -- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda o: oa.kfac("best", o),
            ValueError,
            "`learning_rate` must be .* 'exact', got 'best'",
        ),
        (lambda o: oa.kfac(0.1, o, momentum="best"), ValueError, "`momentum` must be .*'exact'"),
        (
            lambda o: oa.kfac("exact", o, trust_region=0.1),
            TypeError,
            r"TrustRegion\(0.3\), or None",
        ),
        (
            lambda o: oa.kfac("exact", o, momentum=1.0),
            ValueError,
            r"`momentum` must lie in \[0, 1\)",
        ),
        (lambda o: oa.LevenbergMarquardt(0.0), ValueError, "`initial` must lie in"),
        (lambda o: oa.LevenbergMarquardt(1.0, decay=1.5), ValueError, "`decay` must lie in"),
        (lambda o: oa.LevenbergMarquardt(1.0, every=0), ValueError, "`every` must be at least 1"),
        (lambda o: oa.TrustRegion(-1.0), ValueError, "`radius` must lie in"),
        (lambda o: oa.TrustRegion(20.0), ValueError, "at most `maximum`, got 20.0 and 10.0"),
        (
            lambda o: oa.kfac(
                0.1,
                o,
                damping=oa.LevenbergMarquardt(1.0),
                trust_region=oa.TrustRegion(1.0, every=2),
            ),
            ValueError,
            "give both the same `every`, got 5 and 2",
        ),
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(make, error, message):
    with pytest.raises(error, match=message):
        make(least_squares().objective())


def test_asks_for_an_objective_with_outputs():
    tx, params = oa.quadratic_model(optax.identity(), damping=1.0), jnp.ones(2)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the extra argument `value_fn`"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="needs the network outputs"):
        tx.update(params, state, params, value_fn=lambda p: jnp.sum(p**2))


SCALED = oa.Objective(lambda w, scale: scale * jnp.eye(3) @ w, lambda out: jnp.mean((out - 1) ** 2))


@pytest.mark.parametrize(
    "tx",
    [
        oa.batch_gauss_newton(damping=0.1),
        oa.batch_gauss_newton(0.1, damping=0.1, momentum=optax.linear_schedule(0.9, 0.5, 9)),
        oa.kfac(0.1, SCALED, example={"scale": 1.0}, estimator="ggn"),
        oa.ekfac(0.1, SCALED, example={"scale": 1.0}, momentum=0.0, estimator="ggn"),
        oa.quadratic_model(optax.identity(), damping=0.1),
        oa.quadratic_model(optax.identity(), 0.1, 0.9, damping=0.1),
    ],
)
def test_recovers_after_a_batch_that_is_not_finite(tx):
    @jax.jit
    def step(scale, state):
        grads = SCALED.grad(params, scale=scale)
        return tx.update(grads, state, params, value_fn=SCALED, scale=scale)

    params = jnp.zeros((3, 1))
    state = tx.init(params)
    for scale in (1.0, jnp.nan, 2.0, 2.0):
        updates, state = step(scale, state)
        assert jnp.isfinite(updates).all() == jnp.isfinite(scale)
        assert not jnp.isfinite(scale) or (updates > 0).all()
