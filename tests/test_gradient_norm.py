"""GNP: the gradient of the penalized loss, its relation to SAM, workers."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import WORKER_MODES, least_squares, over_workers, tree_allclose, tree_equal

CURVATURE = np.array([[3.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.5, 0.0, 0.3]])
PARAMS = {"w": jnp.linspace(-1.0, 1, 12).reshape(4, 3), "v": jnp.array([0.3, -0.2, 1.0])}


def quadratic(x):
    return 0.5 * x @ jnp.asarray(CURVATURE) @ x + jnp.array([0.1, -0.2, 0.3]) @ x


def loss_fn(p):
    return jnp.sum(jnp.cosh(p["w"])) + 0.5 * jnp.sum((p["w"] @ p["v"]) ** 2)


def fed(loss, params, rho, alpha, **kwargs):
    """The gradient that the inner transformation gets, and the state."""
    tx = oa.gnp(optax.identity(), rho, alpha, **kwargs)
    return tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)


def double(params):
    return jax.tree.map(lambda x: jnp.asarray(x, float), params)


@pytest.mark.parametrize("rho", [0.01, 1.0, 30.0])
def test_exact_on_quadratics(x64, rho):
    """The gradient of L + lambda ||grad L||, by automatic differentiation."""

    def penalized(x):
        return quadratic(x) + 0.7 * rho * jnp.linalg.norm(jax.grad(quadratic)(x))

    x = jnp.array([1.0, -2.0, 0.5])
    gradient, state = fed(quadratic, x, rho, 0.7)
    np.testing.assert_allclose(gradient, jax.grad(penalized)(x), rtol=1e-12)
    np.testing.assert_allclose(
        state.gradient_norm, np.linalg.norm(jax.grad(quadratic)(x)), rtol=1e-6
    )


def test_mask_penalizes_a_part(x64):
    """The gradient's norm of the selected leaves; its gradient moves all leaves."""
    hessian = jax.random.normal(jax.random.key(0), (15, 15), float)
    hessian = hessian @ hessian.T / 15

    def loss(p):
        x = jnp.concatenate([p["w"].ravel(), p["v"]])
        return 0.5 * x @ hessian @ x

    def penalized(p):
        return loss(p) + 0.35 * jnp.linalg.norm(jax.grad(loss)(p)["v"])

    params = double(PARAMS)
    gradient, state = fed(loss, params, 0.5, 0.7, mask={"w": False, "v": True})
    tree_allclose(gradient, jax.grad(penalized)(params), rtol=1e-12)
    np.testing.assert_allclose(
        state.gradient_norm, np.linalg.norm(jax.grad(loss)(params)["v"]), rtol=1e-6
    )


def test_error_is_of_first_order_in_the_radius(x64):
    def penalized(p):
        return loss_fn(p) + 0.1 * optax.tree.norm(jax.grad(loss_fn)(p))

    params = double(PARAMS)
    want = jax.grad(penalized)(params)
    errors = []
    for rho in (1e-2, 1e-3):
        got, _ = fed(loss_fn, params, rho, 0.1 / rho)
        errors.append(optax.tree.norm(optax.tree.sub(got, want)))
    assert 8 < errors[0] / errors[1] < 12


def run(tx, steps=10, params=PARAMS, **extra):
    """The parameters after each step."""
    state, points = tx.init(params), []

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        points.append(params)
    return points


def test_alpha_one_is_sam(x64):
    sam = optax.contrib.sam(
        optax.adam(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.1)), opaque_mode=True
    )
    theirs = run(sam, params=double(PARAMS), grad_fn=lambda p, i: jax.grad(loss_fn)(p))
    ours = run(oa.gnp(optax.adam(0.05), 0.1, 1.0), params=double(PARAMS), value_fn=loss_fn)
    tree_allclose(ours, theirs, rtol=1e-10)


def test_alpha_zero_is_the_inner_method_bit_for_bit():
    # Operation by operation: XLA may fuse, and so round, two compiled programs differently.
    inner = optax.sgd(0.05, momentum=0.9)
    tx, grads = oa.gnp(inner, alpha=0.0), jax.grad(loss_fn)(PARAMS)
    ours, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss_fn)
    theirs, their_state = inner.update(grads, inner.init(PARAMS), PARAMS)
    tree_equal((ours, state.inner_state), (theirs, their_state))


def test_radius_zero_is_the_inner_method():
    ours = run(oa.gnp(optax.sgd(0.05), 0.0, 0.8), value_fn=loss_fn)
    tree_allclose(ours, run(optax.sgd(0.05)), rtol=1e-6)


def test_schedules():
    """Warm-up of the penalty: off at first, then as with numbers."""
    x = jnp.array([1.0, -2.0, 0.5])
    grads = jax.grad(quadratic)(x)
    for scheduled in (
        {"rho": lambda t: 0.5 * (t > 0), "alpha": 0.8},
        {"rho": 0.5, "alpha": lambda t: 0.8 * (t > 0)},
    ):
        tx = oa.gnp(optax.identity(), **scheduled)
        state = tx.init(x)
        first, state = tx.update(grads, state, x, value_fn=quadratic)
        second, state = tx.update(grads, state, x, value_fn=quadratic)
        np.testing.assert_allclose(first, grads, rtol=1e-6)
        np.testing.assert_allclose(second, fed(quadratic, x, 0.5, 0.8)[0], rtol=1e-6)
        assert state.count == 2


def test_zero_gradient_is_left_alone():
    gradient, state = fed(lambda x: jnp.sum(x**2), jnp.zeros(3), 0.1, 0.8)
    np.testing.assert_array_equal(gradient, np.zeros(3))
    assert state.gradient_norm == 0
    nothing, state = fed(lambda p: jnp.zeros(()), {"a": None}, 0.1, 0.8)
    assert nothing == {"a": None}
    assert state.gradient_norm == 0


def test_two_gradients_a_step():
    """No third one, whether the step uses the incoming gradient or, locally, does not."""
    weights = jnp.ones((64, 64))

    def loss(p):
        return jnp.sum(jnp.tanh(weights @ p))

    def flops(tx):
        params = jnp.ones((1, 64, 8))

        def step(params):
            grads = jax.grad(loss)(params)
            updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss)
            return optax.apply_updates(params, updates)

        mapped = jax.jit(jax.vmap(step, axis_name="workers"))
        return mapped.lower(params).compile().cost_analysis()["flops"]

    base = flops(optax.with_extra_args_support(optax.sgd(0.1)))
    for axis_name in (None, "workers"):
        assert 1.9 * base < flops(oa.gnp(optax.sgd(0.1), axis_name=axis_name)) < 2.1 * base


# -- workers --------------------------------------------------------------------------------------

TARGETS = np.array([1.0, -3.0, 0.5, 2.0])


def quartic(x, target):
    return x**4 / 4 - target * x


@pytest.mark.parametrize("mode", WORKER_MODES)
@pytest.mark.parametrize("local", [True, False])
def test_workers_follow_the_simulation(x64, local, mode):
    """Each with a perturbation of its own, or all with that of the mean gradient."""
    tx = oa.gnp(optax.sgd(0.05), 0.3, 0.8, axis_name="workers" if local else None)

    def worker(x, state, target):
        axis_name = None if local else "workers"
        objective = oa.Objective.from_value_fn(quartic, axis_name).bind(target=target)
        updates, state = tx.update(objective.grad(x), state, x, value_fn=objective)
        return optax.apply_updates(x, updates), state

    step = over_workers(mode, worker, 4)
    x, state = np.ones(4), jax.vmap(tx.init)(jnp.ones(4))
    y = 1.0
    for _ in range(5):
        x, state = jax.block_until_ready(step(x, state, TARGETS))
        own = y**3 - TARGETS
        perturbing = own if local else own.mean()
        second = (y + 0.3 * np.sign(perturbing)) ** 3 - TARGETS
        y = y - 0.05 * np.mean(0.2 * own + 0.8 * second)
        np.testing.assert_allclose(x, np.full(4, y), rtol=1e-12)
        norm = np.mean(np.abs(own)) if local else np.abs(np.mean(own))
        np.testing.assert_allclose(state.gradient_norm, np.full(4, norm), rtol=1e-6)


def test_local_perturbation_costs_one_all_reduce():
    def reductions(tx, objective):
        def worker(x, state, target):
            bound = objective.bind(target=target)
            return tx.update(bound.grad(x), state, x, value_fn=bound)

        x = jnp.ones(4)
        lowered = over_workers("shard_map", worker, 4).lower(x, jax.vmap(tx.init)(x), TARGETS)
        return len(re.findall(r" all-reduce(?:-start)?\(", lowered.compile().as_text()))

    own = oa.Objective.from_value_fn(quartic)
    mean = oa.Objective.from_value_fn(quartic, "workers")
    assert reductions(oa.gnp(optax.sgd(0.1), axis_name="workers"), own) == 1
    assert reductions(oa.gnp(optax.sgd(0.1)), mean) == 2


# -- composition ----------------------------------------------------------------------------------


def test_inner_methods_that_ask_for_more():
    """The inner method gets the mixed gradient as `grad`, and the loss itself."""
    seen = {}

    def update(updates, state, params, *, grad, value, value_fn, **extra_args):
        seen.update(updates=updates, grad=grad, value=value, value_fn=value_fn)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    x = jnp.array([1.0, -2.0, 0.5])
    value, grads = jax.value_and_grad(quadratic)(x)
    tx = oa.gnp(inner)
    tx.update(grads, tx.init(x), x, value=value, grad=grads, value_fn=quadratic)
    want, _ = fed(quadratic, x, 0.1, 0.8)
    tree_allclose(seen["updates"], want)
    assert seen["grad"] is seen["updates"]
    assert (seen["value"], seen["value_fn"]) == (value, quadratic)


def test_dtypes_micro_batches_and_vmap():
    problem = least_squares()
    params = problem.params | {"b": problem.params["b"].astype(jnp.bfloat16)}
    tx = oa.gnp(optax.sgd(0.1, 0.9), 0.2)
    objective = problem.objective()

    def step(params, state, tx=tx):
        grads = objective.grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    want, state = jax.jit(step)(params, tx.init(params))
    assert jax.tree.map(jnp.result_type, want) == jax.tree.map(jnp.result_type, params)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, tx.init(params))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (params, tx.init(params)))
    several, _ = jax.jit(jax.vmap(step))(*stacked)
    tree_allclose(jax.tree.map(lambda x: x[0], several), want, rtol=1e-2)  # of bfloat16
    multi = optax.MultiSteps(tx, 2)
    state = multi.init(params)
    for _ in range(2):
        last, state = step(params, state, multi)
    tree_allclose(last, want, rtol=1e-2)


def test_integer_parameters_are_refused():
    with pytest.raises(TypeError, match=r"leaf \['n'\] has dtype int32"):
        oa.gnp(optax.sgd(0.1)).init({"n": jnp.arange(2)})
