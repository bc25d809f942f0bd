"""Hessian-free: exact steps on quadratics, the damping's rule, training, workers."""

from __future__ import annotations

import functools

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

PROBLEM = least_squares()
X, Y = classification()


def double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def least_squares_objective(axis_name=None):
    return PROBLEM.objective(double(PROBLEM.x), double(PROBLEM.y), axis_name)


def mlp():
    return mlp_objective(double(X), Y)


def update(tx, params, state, objective, **extra):
    return tx.update(objective.grad(params), state, params, value_fn=objective, **extra)


def step(tx, params, state=None, objective=None, **extra):
    """The updates and the state after one step from ``params``, compiled."""

    @jax.jit
    def run(params, state):
        return update(tx, params, state, objective, **extra)

    return run(params, tx.init(params) if state is None else state)


def dense(linear, params):
    """A linear function of trees as a matrix, and the function that flattens a tree."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    rows = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(linear(unravel(v)))[0])
    return rows(jnp.eye(flat.size)), lambda tree: jax.flatten_util.ravel_pytree(tree)[0]


# -- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precondition", [False, True])
def test_solves_least_squares_in_one_step(x64, precondition):
    params, objective = double(PROBLEM.params), least_squares_objective()
    tx = oa.hessian_free(damping=0.0, tolerance=0.0, precondition=precondition)
    updates, state = step(tx, params, objective=objective)
    new = optax.apply_updates(params, updates)
    # The optimum is one of the data, which were rounded to float32; the loss there is about 1e-15.
    matrix, flatten = dense(objective.gauss_newton(params), params)
    exact = flatten(params) - jnp.linalg.solve(matrix, flatten(objective.grad(params)))
    np.testing.assert_allclose(flatten(new), exact, rtol=1e-10)
    assert optax.tree.norm(objective.grad(new)) < 1e-10 * optax.tree.norm(objective.grad(params))
    np.testing.assert_allclose(state.reduction_ratio, 1, rtol=1e-6)
    np.testing.assert_allclose(state.model_decrease, objective(params) - objective(new), rtol=1e-6)
    assert state.damping == 0


@pytest.mark.parametrize(("damping", "precondition"), [(1.0, False), (1 / 64, True)])
def test_direction_is_the_dense_solution(x64, damping, precondition):
    """(G + damping I) d = -g for a network, by a dense solve."""
    params, objective = double(mlp_init()), mlp()
    tx = oa.hessian_free(0.3, damping=damping, tolerance=0.0, precondition=precondition)
    updates, state = step(tx, params, objective=objective)
    matrix, flatten = dense(objective.gauss_newton(params), params)
    gradient = flatten(objective.grad(params))
    exact = -jnp.linalg.solve(matrix + damping * jnp.eye(len(matrix)), gradient)
    np.testing.assert_allclose(flatten(state.direction), exact, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(flatten(updates), 0.3 * exact, rtol=1e-8, atol=1e-10)
    # The model of the step that is made, without the damping, and what came of it.
    s = 0.3 * exact
    model = gradient @ s + s @ matrix @ s / 2
    after = objective(optax.apply_updates(params, updates))
    np.testing.assert_allclose(state.model_decrease, -model, rtol=1e-6)
    np.testing.assert_allclose(
        state.reduction_ratio, (after - objective(params)) / model, rtol=1e-6
    )


def test_curvature_of_another_batch(x64):
    params, objective = double(mlp_init()), mlp()
    part = mlp_objective(double(X[:16]), Y[:16])
    tx = oa.hessian_free(damping=1 / 8, tolerance=0.0)
    updates, state = step(tx, params, objective=objective, curvature_value_fn=part)
    matrix, flatten = dense(part.gauss_newton(params), params)
    gradient = flatten(objective.grad(params))
    exact = -jnp.linalg.solve(matrix + jnp.eye(len(matrix)) / 8, gradient)
    np.testing.assert_allclose(flatten(updates), exact, rtol=1e-8, atol=1e-10)
    # The loss is that of the gradient.
    gained = objective(optax.apply_updates(params, updates)) - objective(params)
    model = gradient @ exact + exact @ matrix @ exact / 2
    np.testing.assert_allclose(state.reduction_ratio, gained / model, rtol=1e-6)


def test_mask_holds_the_rest_fixed(x64):
    params, objective = double(PROBLEM.params), least_squares_objective()
    mask = {"dense": {"w": True}, "b": False}
    tx = oa.hessian_free(damping=0.0, tolerance=0.0, mask=mask)
    gradient = objective.grad(params)
    updates, state = tx.update(gradient, tx.init(params), params, value_fn=objective)
    tree_equal(updates["b"], gradient["b"])  # unchanged, for another element of the chain
    assert isinstance(state.direction["b"], optax.MaskedNode)
    new = {**optax.apply_updates(params, updates), "b": params["b"]}
    assert optax.tree.norm(objective.grad(new)["dense"]) < 1e-12
    np.testing.assert_allclose(state.reduction_ratio, 1, rtol=1e-6)


def quadratic(spectrum):
    """0.5 * sum(spectrum * (x - 1) ** 2), of which all is curvature."""
    return oa.Objective(
        lambda x: x, lambda out: 0.5 * jnp.sum(jnp.asarray(spectrum) * (out - 1) ** 2)
    )


# -- damping --------------------------------------------------------------------------------------


def cubic(c):
    """A loss whose step from 0, with G = 1 and damping 0, is 1, with a chosen rho."""
    # L(1) - L(0) = c - 0.5 with the model's -0.5: rho = 1 - 2 c. The outputs are two: x, and x ** 3
    # of which the loss is linear, so that it adds no curvature.
    return oa.Objective(lambda x: (x, x**3), lambda out: 0.5 * (out[0] - 1) ** 2 + c * out[1])


def test_levenberg_marquardt_rule(x64):
    tiny = 1e-7
    # With c = 0.7 the loss rises.
    c, factors = np.array(
        [(0, 2 / 3), (0.12, 2 / 3), (0.13, 1), (0.37, 1), (0.38, 1.5), (0.7, 1.5), (-1, 2 / 3)]
    ).T

    def run(c, factor):
        tx = oa.hessian_free(damping=tiny, damping_factor=factor)
        x = jnp.array(0.0)
        return update(tx, x, tx.init(x), cubic(c))[1]

    state = jax.jit(jax.vmap(run, (0, None)))(c, 1.5)
    np.testing.assert_allclose(state.reduction_ratio, 1 - 2 * c, atol=1e-5)
    np.testing.assert_allclose(state.damping, tiny * factors, rtol=1e-6)
    state = jax.jit(jax.vmap(run, (0, None)))(c, 1.0)
    np.testing.assert_allclose(state.damping, np.full(7, tiny), rtol=1e-6)


def test_the_state_carries_the_damping(x64):
    tx, x, state = oa.hessian_free(damping=0.9), jnp.array(0.0), None
    for i in range(3):
        _, state = step(tx, x, state, quadratic(np.array(1.0)))
        np.testing.assert_allclose(state.damping, 0.9 * (2 / 3) ** (i + 1), rtol=1e-6)
    assert state.count == 3


def test_at_the_optimum_nothing_changes():
    """What rounding makes of a difference says nothing about the model."""
    tx, params = oa.hessian_free(damping=0.5), jnp.ones(3)
    updates, state = step(tx, params, objective=quadratic(np.ones(3, np.float32)))
    np.testing.assert_array_equal(updates, np.zeros(3))
    assert state.damping == 0.5

    def run(params, state):
        updates, state = update(tx, params, state, PROBLEM.objective())
        return optax.apply_updates(params, updates), state

    params, state = jax.jit(lambda *carry: jax.lax.fori_loop(0, 40, lambda i, c: run(*c), carry))(
        PROBLEM.params, tx.init(PROBLEM.params)
    )
    tree_allclose(params, PROBLEM.optimum, rtol=1e-5)
    # Neither gone nor grown without end: what is gained there is all rounding.
    assert 1e-8 < state.damping < 100


def test_values_that_are_not_finite():
    """The update shows them; the state stays one to go on from."""
    params, objective = PROBLEM.params, PROBLEM.objective()
    tx = oa.hessian_free(damping=0.5, precondition=True)
    _, state = step(tx, params, objective=objective)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, after = tx.update(bad, state, params, value_fn=objective)
    assert jnp.isnan(optax.tree.norm(updates))
    assert after.damping == state.damping
    assert optax.tree.norm(after.direction) == 0
    updates, after = step(tx, params, after, objective)
    assert jnp.isfinite(optax.tree.norm(updates))
    # A step to where the loss is infinite was too long.
    edge = oa.Objective(lambda x: x, lambda out: -out + jnp.where(out > 1, jnp.inf, out**2 / 8))
    _, after = step(tx, jnp.array(0.0), objective=edge)
    assert after.damping == 0.75
    assert 0 < after.step_size < 1


def test_a_loss_that_did_not_change_raises_the_damping():
    """The model promised 4 of 4.5 and nothing came of it: rho is 0."""
    plateau = oa.Objective(lambda w: jnp.where(w < 1, -3.0, w), lambda out: 0.5 * jnp.sum(out**2))
    updates, state = step(oa.hessian_free(damping=0.1), jnp.array([3.0]), objective=plateau)
    assert updates < -2
    assert state.reduction_ratio == 0
    np.testing.assert_allclose(state.damping, 0.15, rtol=1e-6)
    # Where the step is lost in the rounding of the parameters, the loss tells nothing.
    far = oa.Objective(lambda w: w - 1e8, lambda out: jnp.sum(out))
    _, state = step(oa.hessian_free(damping=10.0), jnp.array([1e8]), objective=far)
    np.testing.assert_allclose(state.damping, 10.0, rtol=1e-6)


def test_positive_damping_never_gets_lost():
    """It could not rise again from 0, nor fall from infinity."""
    tx, x = oa.hessian_free(), jnp.array(0.0)
    for damping, factor in ((1.2e-38, 2 / 3), (3e38, 1.5)):
        state = tx.init(x)._replace(count=jnp.int32(1), damping=jnp.float32(damping))
        _, state = step(tx, x, state, cubic(0.0 if factor < 1 else 0.7))
        assert 0 < state.damping < jnp.inf


def test_products_are_those_of_the_mode():
    """A kernel with a backward pass of its own has no forward-mode derivative."""

    @jax.custom_vjp
    def kernel(h):
        return jnp.tanh(h)

    kernel.defvjp(lambda h: (jnp.tanh(h), jnp.tanh(h)), lambda t, g: (g * (1 - t**2),))

    def objective(tanh, mode="forward_over_reverse"):
        return oa.Objective(
            lambda w: tanh(w) * 2, lambda out: jnp.mean((out - 1) ** 2), hvp_mode=mode
        )

    w, tx = jnp.array([0.3, -0.2]), oa.hessian_free(damping=0.1)
    want, _ = step(tx, w, objective=objective(jnp.tanh))
    for mode, rtol in (("reverse_over_reverse", 1e-5), ("finite_difference", 1e-3)):
        got, _ = step(tx, w, objective=objective(kernel, mode))
        np.testing.assert_allclose(got, want, rtol=rtol)
    with pytest.raises(TypeError, match="another hvp_mode: 'reverse_over_reverse'"):
        step(tx, w, objective=objective(kernel))


# -- training -------------------------------------------------------------------------------------


def train(tx, params, num_steps, x=X, y=Y):
    def body(carry, _):
        params, state = carry
        objective = mlp_objective(x, y)
        value, grads = objective.value_and_grad(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        params = optax.apply_updates(params, updates)
        return (params, state), objective(params)

    return jax.lax.scan(body, (params, tx.init(params)), length=num_steps)


@pytest.mark.parametrize("precondition", [False, True])
def test_trains_a_network_in_few_steps(precondition):
    """Gradient descent with the best of some rates takes hundreds of steps."""
    tx = oa.hessian_free(damping=0.1, precondition=precondition)
    _, losses = train(tx, mlp_init(), 15)
    _, of_sgd = jax.vmap(
        lambda rate: train(optax.with_extra_args_support(optax.sgd(rate)), mlp_init(), 150)
    )(jnp.array([0.1, 0.3, 1.0, 3.0]))
    assert jnp.all(jnp.isfinite(of_sgd))
    assert losses[-1] < jnp.min(of_sgd[:, -1])


def test_jit_is_no_jit():
    params, objective = PROBLEM.params, PROBLEM.objective()
    tx = oa.hessian_free(damping=0.3, precondition=True)
    state, jitted, jitted_state = tx.init(params), params, tx.init(params)
    for _ in range(2):
        updates, state = update(tx, params, state, objective)
        params = optax.apply_updates(params, updates)
        updates, jitted_state = step(tx, jitted, jitted_state, objective)
        jitted = optax.apply_updates(jitted, updates)
        tree_allclose(params, jitted, rtol=1e-5)
    assert signature(jitted_state) == signature(state) == signature(tx.init(params))


@pytest.mark.slow
def test_vmap_over_members_is_a_loop():
    """Though each member stops after iterations of its own."""

    def run(tolerance, rate):
        tx = oa.hessian_free(rate, damping=0.1, tolerance=tolerance)
        (params, state), losses = train(tx, mlp_init(), 4)
        return params, state.num_iterations, losses

    tolerances, rates = jnp.array([0.05, 5e-4, 1e-6]), jnp.array([1.0, 0.5, 0.9])
    together = jax.jit(jax.vmap(run))(tolerances, rates)
    assert len(set(together[1].tolist())) > 1
    alone_run = jax.jit(run)
    alone = [alone_run(*each) for each in zip(tolerances, rates, strict=True)]
    tree_allclose(together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone), rtol=2e-4)


def test_steps_that_raise_the_loss_are_halved(x64):
    # From 1, G = 2e-6 and the gradient is 1: the step is -1 / (2e-6 + damping).
    objective = oa.Objective(lambda x: x, lambda out: jnp.abs(out) + 1e-6 * out**2)
    x = jnp.array(1.0)

    def steps(damping, max_halvings):
        tx = oa.hessian_free(damping=damping, max_halvings=max_halvings)
        updates, state = step(tx, x, objective=objective)
        np.testing.assert_allclose(updates, state.step_size * state.direction, rtol=1e-6)
        return float(updates), state

    whole, state = steps(0.1, 0)
    np.testing.assert_allclose(whole, -10, rtol=1e-4)
    assert state.reduction_ratio < 0
    np.testing.assert_allclose(state.damping, 0.15, rtol=1e-6)
    halved, after = steps(0.1, 10)  # to -9, -4 and -1.5 the loss rises, to -0.25 it falls
    np.testing.assert_allclose(halved, whole / 8, rtol=1e-6)
    np.testing.assert_allclose(after.step_size, 1 / 8, rtol=1e-6)
    assert after.reduction_ratio == state.reduction_ratio  # of the whole step, like the damping
    assert after.damping == state.damping
    none, after = steps(0.1, 2)
    assert none == after.step_size == 0
    short, after = steps(10.0, 10)
    np.testing.assert_allclose(short, -0.1, rtol=1e-4)
    assert after.step_size == 1


def test_bfloat16_and_float32_together():
    params = mlp_init()
    params["layer0"] = optax.tree.cast(params["layer0"], jnp.bfloat16)
    tx = oa.hessian_free(damping=0.3, precondition=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(tx.init(params).direction)} == {
        np.dtype("float32")
    }
    (new, state), losses = train(tx, params, 10, x=jnp.asarray(X))
    assert signature(new) == signature(params)
    assert signature(state) == signature(tx.init(params))
    assert losses[-1] < 0.5 * losses[0]


def test_many_shapes():
    params = {"a": jnp.ones((0, 3)), "b": [jnp.array(2.0), None], "c": {}}
    objective = oa.Objective(lambda p: p["b"][0] + jnp.sum(p["a"]), lambda out: 0.5 * out**2)
    updates, _ = step(oa.hessian_free(damping=0.0), params, objective=objective)
    tree_allclose(updates, {"a": jnp.ones((0, 3)), "b": [jnp.array(-2.0), None], "c": {}})
    nothing = oa.Objective(lambda p: jnp.zeros(()), lambda out: out**2)
    updates, state = step(oa.hessian_free(), {}, objective=nothing)
    assert updates == {}
    assert state.count == 1


# -- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    ["shard_map", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("vmap", "pmap"))],
)
def test_replicas_are_one_device(x64, mode):
    """Each with its part of the batch: the step of the whole batch, on all of them."""
    params = double(PROBLEM.params)
    tx = oa.hessian_free(damping=0.1, tolerance=1e-3, precondition=True)

    def worker(params, state, x, y):
        return update(tx, params, state, PROBLEM.objective(x, y, "workers"))

    x, y = (double(a).reshape(8, 2, -1) for a in (PROBLEM.x, PROBLEM.y))
    copies = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * 8))
    many = over_workers(mode, worker, 8)
    state, states = tx.init(params), copies(tx.init(params))
    for _ in range(2):
        updates, state = step(tx, params, state, least_squares_objective())
        per_worker, states = jax.block_until_ready(many(copies(params), states, x, y))
        tree_allclose(per_worker, copies(updates), rtol=1e-10)
        tree_allclose(states, copies(state), rtol=1e-6)
        params = optax.apply_updates(params, updates)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["batch", "parameters"])
def test_eight_devices_are_one_device(sharded):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, params = oa.hessian_free(damping=0.1, precondition=True), mlp_init()

    @jax.jit
    def run(params, x, y):
        return train(tx, params, 3, x, y)

    def place(tree, spec):
        return jax.device_put(tree, jax.NamedSharding(mesh, spec))

    alone = run(params, X, Y)
    everywhere = place(params, jax.P())
    if sharded == "parameters":
        everywhere["layer0"] = {
            "w": place(params["layer0"]["w"], jax.P(None, "data")),
            "b": place(params["layer0"]["b"], jax.P("data")),
        }
    tree_allclose(run(everywhere, *place((X, Y), jax.P("data"))), alone, rtol=1e-3)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` must lie in"),
        ({"damping": -0.1}, ValueError, "`damping` must lie in"),
        ({"damping_factor": 0.5}, ValueError, "`damping_factor` must lie in"),
        ({"max_iterations": 0}, ValueError, "`max_iterations` must be at least 1"),
        ({"max_iterations": 2.5}, TypeError, "`max_iterations` must be an integer"),
        ({"tolerance": -1}, ValueError, "`tolerance` must lie in"),
        ({"decay": 1.5}, ValueError, r"`decay` must lie in \[0, 1\]"),
        ({"max_halvings": -1}, ValueError, "`max_halvings` must be at least 0"),
        ({"precondition": "diagonal"}, TypeError, "`precondition` must be True or False"),
    ],
)
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        oa.hessian_free(**kwargs)


def test_wrong_calls():
    tx, x = oa.hessian_free(), jnp.ones(3)
    with pytest.raises(ValueError, match="hessian_free needs the extra argument `value_fn`"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match="hessian_free needs the parameters"):
        tx.update(x, tx.init(x), value_fn=quadratic(np.ones(3)))
    with pytest.raises(ValueError, match=r"build it with Objective\(predict, loss\)"):
        tx.update(x, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
    with pytest.raises(TypeError, match="`curvature_value_fn` must be callable"):
        tx.update(x, tx.init(x), x, value_fn=quadratic(np.ones(3)), curvature_value_fn=1)
    with pytest.raises(TypeError, match="real floating-point"):
        tx.init({"a": jnp.ones(3, int)})
    for other in ({"b": x}, {"a": x[:2]}):
        objective = oa.Objective(lambda p: jax.tree.leaves(p)[0], lambda out: jnp.sum(out**2))
        with pytest.raises(
            ValueError, match=r"not the parameters that `init` .*\{\"\['a'\]\": \(3,\)"
        ):
            tx.update(other, tx.init({"a": x}), other, value_fn=objective)
    labels = oa.Objective(lambda x: x.astype(int), lambda out: jnp.sum(1.0 * out))
    with pytest.raises(TypeError, match="floating-point numbers; got the dtypes int32"):
        tx.update(x, tx.init(x), x, value_fn=labels)
    with pytest.raises(ValueError, match="its own `mask=`"):
        optax.masked(tx, {"a": True, "b": False}).init({"a": x, "b": x})
