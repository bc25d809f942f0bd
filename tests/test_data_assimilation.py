"""ESMDA and the EnKF against golden values, NumPy, Bayes' rule, and themselves in parallel."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel import data_assimilation
from tests.helpers import (
    mlp_apply,
    mlp_init,
    over_workers,
    signature,
    tree_allclose,
    tree_equal,
)

RNG = np.random.default_rng(0)
MEMBERS, NOISE = 12, 0.3
ALPHAS = (9.333, 7.0, 4.0, 2.0)
PARAMS = mlp_init((2, 3, 1))  # 13 parameters
X = np.float32(RNG.normal(size=(8, 2)))
Y = np.float32(RNG.normal(size=(8, 1)))
TX = oa.esmda(num_members=MEMBERS, noise=NOISE, alphas=ALPHAS, key=3)


def objective_of(x: Any = X, y: Any = Y, axis_name: str | None = None, **kwargs: Any) -> Any:
    loss = lambda out: jnp.mean(jnp.sum((out - y) ** 2, -1))  # noqa: E731
    return oa.Objective(lambda p: mlp_apply(p, x), loss, axis_name, **kwargs)


def step(tx: Any, params: Any, state: Any, objective: Any) -> tuple[Any, Any]:
    updates, state = tx.update(params, state, params, value_fn=objective)
    return optax.apply_updates(params, updates), state


def run(tx: Any, objective: Any, num_steps: int = 4) -> list[Any]:
    """The parameters and states from the start on."""

    @jax.jit
    def steps() -> list[Any]:
        trajectory = [(PARAMS, tx.init(PARAMS))]
        for _ in range(num_steps):
            trajectory.append(step(tx, *trajectory[-1], objective))
        return trajectory

    return steps()


@pytest.fixture(scope="module")
def trajectory() -> list[Any]:
    return run(TX, objective_of())


# -- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [1.3309090909, 1.8290909091, 1.5854545455]),
        (2.0, [1.2706389013, 1.769067025, 1.6154664875]),
    ],
)
def test_golden_square(x64: None, alpha: float, expected: list[float]) -> None:
    new = oa.esmda_step(
        lambda theta: theta**2,
        jnp.array([0.0, 1.0, 2.0]),
        jnp.array(3.0),
        noise=0.5,
        alpha=alpha,
        perturbations=jnp.array([0.1, -0.2, 0.1]),
    )
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-10)


def test_golden_sum_of_two(x64: None) -> None:
    new = oa.esmda_step(
        jnp.sum,
        jnp.array([[0.0, 0], [1, 0], [0, 1], [1, 2]]),
        jnp.array(2.0),
        noise=0.5**0.5,
        alpha=2.0,
        perturbations=jnp.array([0.2, -0.1, -0.2, 0.1]),
    )
    expected = [
        [0.4258064516, 0.9225806452],
        [1.1741935484, 0.3774193548],
        [0.1548387097, 1.3354838710],
        [0.8258064516, 1.6225806452],
    ]
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 1), (5, 7), (7, 5)])
def test_the_smaller_system_is_solved_and_both_give_the_same(
    x64: None, shape: tuple[int, int]
) -> None:
    """The first shape is that of the second golden value."""
    outputs = np.array([[0.0], [1], [1], [3]]) if shape == (4, 1) else RNG.normal(size=shape)
    deviations = jnp.asarray((outputs - outputs.mean(0)) / 0.5**0.5)
    in_space = [data_assimilation.gain_weights(deviations, jnp.asarray(2.0), b) for b in (0, 1)]
    np.testing.assert_allclose(*in_space, rtol=0, atol=2e-16)


ANALYSIS = jax.jit(data_assimilation.analysis)


def numpy_step(
    theta: np.ndarray,
    outputs: np.ndarray,
    targets: np.ndarray,
    alpha: float,
    z: np.ndarray,
    noise: Any = NOISE,
    localization: Any = 1.0,
) -> np.ndarray:
    """The rule as Emerick and Reynolds have it, member by member."""
    covariance = np.cov(np.float64(theta).T, np.float64(outputs).T)
    n, deviations = theta.shape[1], np.broadcast_to(noise, targets.shape)
    gain = covariance[:n, n:] @ np.linalg.inv(covariance[n:, n:] + alpha * np.diag(deviations**2))
    perturbed = [targets + np.sqrt(alpha) * deviations * each for each in z]
    return np.stack(
        [
            t + localization * gain @ (p - out)
            for t, p, out in zip(theta, perturbed, outputs, strict=True)
        ]
    )


@pytest.mark.parametrize("members", [5, 12])  # fewer than targets, and more
def test_four_iterations_against_numpy(x64: None, members: int) -> None:
    start, unravel = jax.flatten_util.ravel_pytree(optax.tree.cast(PARAMS, "float64"))
    theta = np.asarray(start) + RNG.normal(size=(members, start.size))
    z = RNG.normal(size=(4, members, 8, 1))
    ensemble = jax.vmap(unravel)(jnp.asarray(theta))

    def predict(member: Any) -> jax.Array:
        return mlp_apply(member, jnp.asarray(X, jnp.float64))

    outputs = jax.jit(jax.vmap(lambda flat: predict(unravel(flat))[:, 0]))
    one = jax.jit(
        lambda ensemble, alpha, z: oa.esmda_step(
            predict, ensemble, jnp.asarray(Y), noise=NOISE, alpha=alpha, perturbations=z
        )
    )
    for alpha, each in zip(ALPHAS, z, strict=True):
        ensemble = one(ensemble, alpha, each)
        theta = numpy_step(theta, np.asarray(outputs(theta)), Y[:, 0], alpha, each[..., 0])
    flat = np.concatenate([leaf.reshape(members, -1) for leaf in jax.tree.leaves(ensemble)], 1)
    np.testing.assert_allclose(flat, theta, rtol=0, atol=1e-10)


def test_updates_are_the_plain_step(trajectory: list[Any]) -> None:
    """With the targets of the loss, an alpha for each update, and the parameters in the middle."""
    flat = jax.jit(jax.vmap(lambda member: jax.flatten_util.ravel_pytree(member)[0]))
    outputs = jax.jit(jax.vmap(lambda member: mlp_apply(member, X)[:, 0]))
    for i, alpha in enumerate(ALPHAS):
        old, (params, new) = trajectory[i][1], trajectory[i + 1]
        z = data_assimilation.perturbations_of(
            jax.random.key(3), jnp.asarray(i), (MEMBERS, 8, 1), jnp.float32, 0
        )
        theta, out = np.float64(flat(old.ensemble)), np.float64(outputs(old.ensemble))
        expected = numpy_step(theta, out, Y[:, 0], alpha, np.float64(z[..., 0]))
        np.testing.assert_allclose(flat(new.ensemble), expected, rtol=0, atol=1e-4)
        middle = jax.tree.map(lambda leaf: np.mean(leaf, 0), new.ensemble)
        tree_allclose(params, middle, rtol=1e-5, atol=1e-6)
        spread = np.sqrt(np.mean(np.var(expected, 0, ddof=1)))
        np.testing.assert_allclose(optax.tree.get(new, "spread"), spread, rtol=1e-4)
        mismatch = np.mean((out - Y[:, 0]) ** 2) / (2 * NOISE**2)
        np.testing.assert_allclose(optax.tree.get(new, "data_mismatch"), mismatch, rtol=1e-4)


def test_perturbations_are_standard_normal() -> None:
    z = data_assimilation.perturbations_of(
        jax.random.key(0), jnp.asarray(1), (100, 50, 2), jnp.float32, 0
    )
    moments = [float(jnp.mean(z**k)) for k in (1, 2, 3, 4)]
    # Four standard errors of the means of 10,000 numbers.
    np.testing.assert_allclose(moments, [0, 1, 0, 3], rtol=0, atol=0.4)
    assert abs(moments[0]) < 0.04
    assert abs(moments[1] - 1) < 0.06
    correlations = np.corrcoef(np.asarray(z).reshape(100, 100).T) - np.eye(100)
    assert np.abs(correlations).max() < 0.5


@pytest.mark.parametrize("alphas", [(1.0,), (4.0,) * 4])
def test_linear_network_and_gaussian_prior_give_the_posterior(alphas: tuple[float, ...]) -> None:
    """Bayes' rule in closed form, to the sampling errors of 20,000 members."""
    x, y = jnp.array([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.2]]), jnp.array([1.0, -2.0, 0.5])
    objective = oa.Objective(lambda w: x @ w, lambda out: jnp.mean((out - y) ** 2))
    tx, w = oa.esmda(num_members=20_000, noise=0.5, alphas=alphas), jnp.zeros(2)

    @jax.jit
    def train() -> Any:
        carry = w, tx.init(w)
        for _ in alphas:
            carry = step(tx, *carry, objective)
        return carry

    mean, state = train()
    covariance = np.linalg.inv(np.eye(2) + x.T @ x / 0.25)
    np.testing.assert_allclose(mean, covariance @ x.T @ y / 0.25, atol=0.02)
    np.testing.assert_allclose(np.cov(state.ensemble.T), covariance, atol=0.01)


def test_one_iteration_with_alpha_1_is_the_ensemble_kalman_filter(trajectory: list[Any]) -> None:
    settings: dict[str, Any] = {"num_members": MEMBERS, "noise": NOISE, "key": 3}

    def program(tx: Any) -> str:
        state = trajectory[0][1]
        return str(jax.make_jaxpr(lambda state: step(tx, PARAMS, state, objective_of()))(state))

    one = program(oa.esmda(alphas=(1.0,), **settings))
    assert program(oa.enkf(**settings)) == one
    assert program(oa.esmda(alphas=(2.0, 2.0), **settings)) != one


def test_members_stay_in_the_space_of_the_first_ones_and_agree_more_and_more(
    trajectory: list[Any],
) -> None:
    states = [state for _, state in trajectory]
    first, last = (
        np.concatenate([leaf.reshape(MEMBERS, -1) for leaf in jax.tree.leaves(s.ensemble)], 1)
        for s in (states[0], states[-1])
    )
    apart = np.concatenate([first, last]) - first.mean(0)
    assert np.linalg.matrix_rank(apart, tol=1e-4) == MEMBERS - 1 < first.shape[1]
    spread = [float(state.spread) for state in states]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.8 * spread[0]


def test_what_changes_nothing(trajectory: list[Any]) -> None:
    """Noise that drowns the targets, members that are all alike, outputs that are not finite."""
    ensemble = trajectory[0][1].ensemble
    alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), ensemble)
    one = jax.jit(lambda state, noise, x: step(_with_noise(noise), PARAMS, state, objective_of(x)))
    for members, noise, x in ((ensemble, 1e6, X), (alike, NOISE, X), (ensemble, NOISE, X * np.nan)):
        state = trajectory[0][1]._replace(ensemble=members)
        _, new = one(state, noise, x)
        tree_allclose(new.ensemble, members, rtol=1e-5)
    assert int(new.count) == 0
    assert jnp.isnan(new.data_mismatch)


def _with_noise(noise: Any) -> Any:
    return oa.esmda(num_members=MEMBERS, noise=noise)


# -- options --------------------------------------------------------------------------------------


def test_weights_of_the_loss_are_precisions_of_the_targets() -> None:
    """Of weight 0 a target does not count; of weight 1/4 it has twice the deviation."""
    weights = np.repeat(np.float32([[1.0], [0.25], [0.0]]), (4, 2, 2), 0)
    y = np.where(weights > 0, Y, 1e6)
    weighted = oa.Objective(
        lambda p: mlp_apply(p, X), lambda out: jnp.sum(weights * (out - y) ** 2) / 6
    )
    targets, found = data_assimilation.targets_of(
        weighted, jnp.zeros((8, 1)), jax.tree.structure(0), "esmda"
    )
    np.testing.assert_allclose(found, weights, rtol=1e-6)
    np.testing.assert_allclose(targets, np.where(weights > 0, Y, 0), rtol=1e-6)
    theta, outputs, z = (np.float32(RNG.normal(size=(MEMBERS, n))) for n in (3, 8, 8))
    new, mismatch = ANALYSIS(theta, outputs[..., None], targets, found, z[..., None], NOISE, 2.0)
    deviations = NOISE / np.sqrt(weights[:6, 0])
    expected = numpy_step(theta, outputs[:, :6], Y[:6, 0], 2.0, z[:, :6], deviations)
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-4)
    squares = (outputs[:, :6] - Y[:6, 0]) ** 2 / deviations**2
    np.testing.assert_allclose(mismatch, squares.mean() / 2, rtol=1e-5)


def test_localization_multiplies_the_gain() -> None:
    """Parameters that do not learn from some of the targets, in NumPy and through the chain."""
    theta, outputs, z = (np.float32(RNG.normal(size=(MEMBERS, n))) for n in (3, 8, 8))
    near = np.float32(RNG.uniform(size=(3, 8)))
    arguments = theta, outputs[..., None], Y, np.ones_like(Y), z[..., None], NOISE, 2.0
    new, _ = ANALYSIS(*arguments, near[..., None])
    expected = numpy_step(theta, outputs, Y[:, 0], 2.0, z, NOISE, near)
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-4)
    factors = jax.tree.map(lambda p: jnp.ones((1,) * (p.ndim + 2)), PARAMS)
    factors["layer1"]["w"] = jnp.zeros((3, 1, 8, 1))
    tx = oa.esmda(num_members=MEMBERS, noise=NOISE, localization=factors)
    (_, before), (_, after) = run(tx, objective_of(), 1)
    still = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), before.ensemble, after.ensemble)
    assert still == {"layer0": {"w": False, "b": False}, "layer1": {"w": True, "b": False}}


def test_inflation_moves_members_apart_first(trajectory: list[Any]) -> None:
    inflated = run(
        oa.esmda(num_members=MEMBERS, noise=1e6, inflation=1.5, key=3), objective_of(), 1
    )
    (_, before), (same, after) = inflated
    np.testing.assert_allclose(after.spread, 1.5 * before.spread, rtol=1e-5)
    middle = jax.tree.map(lambda leaf: leaf.mean(0), before.ensemble)
    tree_allclose(same, middle, atol=1e-4)


def test_what_a_mask_leaves_out_is_held_fixed() -> None:
    mask = {"layer0": False, "layer1": True}
    (_, start), (params, state) = run(
        oa.esmda(num_members=MEMBERS, noise=NOISE, mask=mask), objective_of(), 1
    )
    tree_equal(params["layer0"], jax.tree.map(lambda p: 2 * p, PARAMS["layer0"]))  # passed through
    assert len(jax.tree.leaves(state.ensemble)) == 2
    assert float(state.spread) < float(start.spread)


# -- in parallel, and what a step computes --------------------------------------------------------


MASK = np.float32([1, 1, 1, 1, 1, 1, 1, 0])


def masked_objective(x: Any, y: Any, mask: Any, axis_name: str | None) -> Any:
    return oa.Objective(
        lambda p: mlp_apply(p, x),
        lambda out: jnp.sum(mask * (out - y)[..., 0] ** 2) / jnp.sum(mask),
        axis_name,
        weight=lambda: jnp.sum(mask),
    )


@pytest.fixture(scope="module")
def with_mask() -> Any:
    return run(TX, masked_objective(X, Y, MASK, None), 1)[1]


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_replicas_with_parts_of_the_batch_are_one(
    mode: str, trajectory: list[Any], with_mask: Any
) -> None:
    """With different numbers of examples that count: the loss is divided by these."""

    def replica(state: Any, *batch: Any) -> Any:
        return step(TX, PARAMS, state, masked_objective(*batch, "workers"))

    parts = (a.reshape(4, 2, *a.shape[1:]) for a in (X, Y, MASK))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), trajectory[0][1])
    several = over_workers(mode, replica, 4)(states, *parts)
    for i in range(4):
        tree_allclose(jax.tree.map(lambda leaf, i=i: leaf[i], several), with_mask, rtol=1e-4)


def test_members_on_eight_devices() -> None:
    """Each device evaluates its own; the state stays where it is."""
    tx, objective = oa.esmda(num_members=64, noise=NOISE), objective_of()
    mesh = jax.make_mesh((8,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    state = tx.init(PARAMS)
    divided = jax.device_put(state.ensemble, jax.NamedSharding(mesh, jax.P("members")))
    rest = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    one = jax.jit(lambda state: step(tx, PARAMS, state, objective))
    parts = one.lower(rest._replace(ensemble=divided)).compile()
    assert "f32[8,8,3]" in parts.as_text()  # (members, examples, hidden units) of one device
    assert "f32[64,8,3]" not in parts.as_text()
    new_params, new_state = parts(rest._replace(ensemble=divided))
    tree_allclose((new_params, new_state), one(state), rtol=1e-4)
    assert {x.sharding.spec[0] for x in jax.tree.leaves(new_state.ensemble)} == {"members"}


def test_state_shardings_follow_the_parameters() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jax.device_put(jnp.ones((8, 2)), jax.NamedSharding(mesh, jax.P("data")))}
    tx = oa.esmda(num_members=4, noise=NOISE)
    shardings = oa.state_shardings(tx, params)
    assert shardings.ensemble["w"].spec == jax.P(None, "data")
    x = jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)
    objective = oa.Objective(lambda p: x @ p["w"], lambda out: jnp.mean((out - 1) ** 2))

    def train(params: Any, state: Any) -> Any:
        return step(tx, params, state, objective)

    state = jax.jit(tx.init, out_shardings=shardings)(params)
    sharded = jax.jit(train, out_shardings=(jax.tree.map(lambda p: p.sharding, params), shardings))
    local = jax.device_get((params, state))
    tree_allclose(sharded(params, state), jax.jit(train)(*local), rtol=1e-4)


def test_a_batch_divided_over_explicit_axes(trajectory: list[Any]) -> None:
    mesh = jax.make_mesh((8,), ("data",))
    batch = jax.device_put((X, Y), jax.NamedSharding(mesh, jax.P("data")))
    one = jax.jit(lambda x, y, state: step(TX, PARAMS, state, objective_of(x, y)))
    with jax.set_mesh(mesh):
        state = jax.device_put(trajectory[0][1], jax.NamedSharding(mesh, jax.P()))
        tree_allclose(one(*batch, state), trajectory[1], rtol=1e-4)


def test_the_gradient_that_is_ignored_is_not_computed() -> None:
    """A compiled step that takes the gradient has as many operations as one that does not."""
    objective = objective_of()

    def with_gradient(params: Any, state: Any) -> Any:
        grads = objective.grad(params)
        updates, state = TX.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    def flops(train: Any) -> float:
        return jax.jit(train).lower(PARAMS, TX.init(PARAMS)).compile().cost_analysis()["flops"]

    without = flops(lambda params, state: step(TX, params, state, objective))
    assert flops(with_gradient) == without


def test_any_pytree() -> None:
    """Numbers of Python, holes, arrays without entries, and bfloat16 beside float32."""
    params = {"a": [None, 2.0], "b": (jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((0, 3))), "c": {}}

    def predict(p: Any) -> jax.Array:
        return jnp.stack([p["a"][1], jnp.sum(p["b"][0].astype(jnp.float32)), jnp.sum(p["b"][1])])

    objective = oa.Objective(predict, lambda out: jnp.mean((out - 1) ** 2))

    def once() -> Any:
        state = TX.init(params)
        return state, *TX.update(params, state, params, value_fn=objective)

    before, updates, after = jax.jit(once)()
    assert signature(after) == signature(before)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert [u.dtype for u in jax.tree.leaves(updates)] == ["float32", "bfloat16", "float32"]
    assert all(np.isfinite(np.float32(u)).all() for u in jax.tree.leaves(updates))
    assert TX.update((), TX.init(()), (), value_fn=objective)[0] == ()


# -- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alphas": (4.0, 4.0)}, "inverses of `alphas` must sum up to 1.* sum up to 0.5"),
        ({"alphas": ()}, "`alphas` must be a sequence of numbers"),
        ({"alphas": 4}, "`alphas` must be a sequence of numbers"),
        ({"alphas": (-1.0, 0.5)}, r"`alphas` must lie in \(0, inf\), got -1"),
        ({"num_members": 1}, "`num_members` must be at least 2, got 1"),
        ({"noise": 0.0}, r"`noise` must lie in \(0, inf\), got 0.0"),
        ({"noise": -0.1}, r"`noise` must lie in \(0, inf\), got -0.1"),
        ({"prior_scale": 0.0}, r"`prior_scale` must lie in \(0, inf\), got 0.0"),
        ({"inflation": 0.9}, r"`inflation` must lie in \[1, inf\), got 0.9"),
        ({"localization": 1.0}, "`localization` must be a pytree like the parameters"),
        (
            {"localization": {"layer0": np.ones((3, 1))}},
            "`localization` must be a pytree like the parameters.* its structure is",
        ),
        (
            {"localization": jax.tree.map(np.ones_like, PARAMS)},
            r"for the parameter \['layer0'\]\['b'\] of shape \(3,\) it has the shape \(3,\)",
        ),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        oa.esmda(**{"num_members": 4, "noise": 0.1} | kwargs).init(PARAMS)


def cross_entropy(out: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(out, jnp.zeros(8, int)).mean()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            oa.Objective(lambda p: jnp.mean(mlp_apply(p, X) ** 2), lambda out: out**2),
            r"one real floating-point array whose first axis counts the examples, got shapes \(\)",
        ),
        (oa.Objective.from_value_fn(lambda p: 0.0), r"build it with Objective\(predict, loss\)"),
        (
            oa.Objective(lambda p: mlp_apply(p, X) * jnp.ones((1, 2)), cross_entropy),
            "loss that is a sum or mean of squared errors.* its likelihood is categorical",
        ),
        (None, "esmda needs the extra argument `value_fn`"),
    ],
)
def test_wrong_objectives(objective: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: step(TX, PARAMS, TX.init(PARAMS), objective))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble": np.ones(1)}, "leading axis of at least 2 members"),
        ({"ensemble": {"a": np.ones(2), "b": np.ones(3)}}, "of the same number; got 2, 3"),
        ({"targets": np.ones(3)}, r"outputs of shape \(\), but `targets` have the shape \(3,\)"),
        ({"perturbations": None}, "give either `key` or `perturbations`"),
        ({"key": 0}, "give either `key` or `perturbations`"),
        ({"noise": 0.0}, r"`noise` must lie in \(0, inf\)"),
        ({"alpha": 0.0}, r"`alpha` must lie in \(0, inf\)"),
    ],
)
def test_wrong_arguments_of_the_plain_step(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "predict": lambda theta: jax.tree.leaves(theta)[0],
        "ensemble": np.ones(2),
        "targets": np.ones(()),
        "noise": 1.0,
        "perturbations": np.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        oa.esmda_step(**settings | change)


def test_a_batch_without_examples_is_refused() -> None:
    params, x = jnp.ones((3, 1)), jnp.ones((0, 3))
    objective = oa.Objective(lambda w: x @ w, lambda outputs: jnp.mean(outputs**2))
    tx = oa.esmda(num_members=4, noise=0.1)
    with pytest.raises(ValueError, match="esmda needs at least one example"):
        jax.eval_shape(
            lambda state: tx.update(params, state, params, value_fn=objective), tx.init(params)
        )
