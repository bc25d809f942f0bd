"""Preconditioners read from states, and thresholds that separate convergence from divergence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel import curvature
from optax_accel.curvature import (
    Preconditioner,
    adagrad_preconditioner,
    adam_preconditioner,
    preconditioned,
    rmsprop_preconditioner,
    sgd_preconditioner,
)

RATE = 0.1
PARAMS = {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.float32)}


def grads_after(tx, steps):
    """The state and the parameters' shapes after steps with random gradients."""
    rng, state = np.random.default_rng(0), tx.init(PARAMS)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)
        updates, state = tx.update(grads, state, PARAMS)
    return updates, state, grads


def grows(tx, state, curvature_, steps=200):
    """How much farther from the minimum of a parabola it ends than it began, as a logarithm."""

    @jax.jit
    def run(state):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(curvature_ * x, state, x)
            x = x + updates
            return (x, state), jnp.abs(x)

        return jax.lax.scan(step, (jnp.array(1e-40), state), length=steps)[1]

    distances = np.asarray(run(state))
    return np.log(distances[-20:].max() / distances[:20].max())


STEADY = 1 - 1e-7  # decay of mean squares that gradients as small as these do not change
NU = 4.0


def steady_adam(nesterov):
    tx = optax.adam(RATE, b1=0.8, b2=STEADY, nesterov=nesterov)
    state = tx.init(jnp.ones(()))
    # So many steps that the bias corrections are 1.
    adam = state[0]._replace(count=jnp.array(10**9, jnp.int32), nu=jnp.array(NU))
    pre = adam_preconditioner(b1=0.8, b2=STEADY, nesterov=nesterov)
    return tx, (adam, *state[1:]), pre


def steady_rms(momentum, nesterov):
    tx = optax.rmsprop(RATE, decay=STEADY, momentum=momentum, nesterov=nesterov)
    state = optax.tree.set(tx.init(jnp.ones(())), nu=jnp.array(NU))
    pre = rmsprop_preconditioner(decay=STEADY, momentum=momentum or 0.0, nesterov=nesterov)
    return tx, state, pre


def plain(momentum, nesterov):
    tx = optax.sgd(RATE, momentum=momentum, nesterov=nesterov)
    return tx, tx.init(jnp.ones(())), sgd_preconditioner(momentum or 0.0, nesterov)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(plain, None, False),
        functools.partial(plain, 0.8, False),
        functools.partial(plain, 0.8, True),
        functools.partial(steady_adam, False),
        functools.partial(steady_adam, True),
        functools.partial(steady_rms, None, False),
        functools.partial(steady_rms, 0.8, False),
        functools.partial(steady_rms, 0.8, True),
    ],
    ids=["sgd", "heavy_ball", "nesterov", "adam", "nadam", "rms", "rms_momentum", "rms_nesterov"],
)
def test_thresholds_separate_convergence_from_divergence(x64, make):
    tx, state, pre = make()
    # After an update, as the preconditioner is read; the moments stand still.
    _, later = tx.update(jnp.zeros(()), state, jnp.ones(()))
    diagonal = pre.diagonal(later, jnp.ones(()))
    largest = pre.threshold(RATE) * diagonal
    assert grows(tx, state, 0.97 * largest) < -0.5
    assert grows(tx, state, 1.03 * largest) > 0.5


def test_thresholds_are_those_of_the_papers():
    assert sgd_preconditioner().threshold(0.5) == 4
    assert sgd_preconditioner(0.9).threshold(0.5) == pytest.approx(2 * 1.9 / 0.5)
    assert sgd_preconditioner(0.9, True).threshold(0.5) == pytest.approx(2 * 1.9 / 2.8 / 0.5)
    assert adam_preconditioner().threshold(1e-3) == pytest.approx(38 / 1e-3)
    assert adagrad_preconditioner().threshold(0.5) == 4


ADAM = {"b1": 0.7, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4}


@pytest.mark.parametrize("steps", [1, 4])
def test_the_diagonal_of_adam_is_what_its_step_is_divided_by(steps):
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adam(RATE, **ADAM))
    updates, state, _ = grads_after(tx, steps)
    diagonal = adam_preconditioner(**ADAM).diagonal(state, PARAMS)
    mean = optax.tree.get(state, "mu")
    for update, mu, entry in zip(*map(jax.tree.leaves, (updates, mean, diagonal)), strict=True):
        assert entry.dtype == jnp.float32
        np.testing.assert_allclose(update, -RATE * mu / entry, rtol=1e-5)


@pytest.mark.parametrize(
    ("tx", "pre"),
    [
        (optax.rmsprop(RATE, 0.8, 1e-3), rmsprop_preconditioner(0.8, 1e-3)),
        (
            optax.rmsprop(RATE, 0.8, 1e-3, eps_in_sqrt=False, bias_correction=True),
            rmsprop_preconditioner(0.8, 1e-3, eps_in_sqrt=False, bias_correction=True),
        ),
        (
            optax.rmsprop(RATE, 0.8, 1e-3, centered=True),
            rmsprop_preconditioner(0.8, 1e-3, centered=True),
        ),
        (
            optax.rmsprop(RATE, 0.8, 1e-3, centered=True, bias_correction=True),
            rmsprop_preconditioner(0.8, 1e-3, centered=True, bias_correction=True),
        ),
        (optax.adagrad(RATE, 0.3, 1e-3), adagrad_preconditioner(1e-3)),
        (optax.sgd(RATE), sgd_preconditioner()),
    ],
    ids=["rms", "rms_corrected", "rms_centered", "rms_centered_corrected", "adagrad", "sgd"],
)
def test_diagonals_are_what_the_step_is_divided_by(tx, pre):
    updates, state, grads = grads_after(tx, 3)
    diagonal = pre.diagonal(state, PARAMS)
    for update, grad, entry in zip(*map(jax.tree.leaves, (updates, grads, diagonal)), strict=True):
        np.testing.assert_allclose(update, -RATE * grad / entry, rtol=1e-4)


def test_the_state_is_found_inside_wrappers():
    tx = optax.MultiSteps(
        optax.chain(oa.inject_hyperparams(optax.adamw)(learning_rate=RATE), optax.zero_nans()), 1
    )
    _, state, _ = grads_after(tx, 1)
    diagonal = adam_preconditioner().diagonal(state, PARAMS)
    assert jax.tree.structure(diagonal) == jax.tree.structure(PARAMS)


def test_missing_ambiguous_and_partial_states_are_named():
    adam, params = adam_preconditioner(), PARAMS
    with pytest.raises(ValueError, match="no ScaleByAdamState"):
        adam.diagonal(optax.sgd(RATE).init(params), params)
    with pytest.raises(ValueError, match="no TraceState"):
        sgd_preconditioner(0.9).diagonal(optax.sgd(RATE).init(params), params)
    both = optax.chain(optax.adam(RATE), optax.adam(RATE))
    part = optax.masked(optax.adam(RATE), {"a": True, "b": False})
    with pytest.raises(ValueError, match="2 states ScaleByAdamState"):
        adam.diagonal(both.init(params), params)
    with pytest.raises(ValueError, match="part of the parameters"):
        adam.diagonal(part.init(params), params)
    with pytest.raises(ValueError, match="no ScaleByRmsState"):
        rmsprop_preconditioner().diagonal(optax.rmsprop(RATE, centered=True).init(params), params)


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="`momentum`"):
        sgd_preconditioner(momentum=1.5)
    with pytest.raises(ValueError, match="`b2`"):
        adam_preconditioner(b2=-0.1)
    with pytest.raises(ValueError, match="`eps`"):
        adagrad_preconditioner(eps=-1.0)
    with pytest.raises(TypeError, match="`operator`"):
        preconditioned(3.0, jnp.ones(2))


def problem():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "c": jnp.asarray(rng.normal(size=3))}
    objective = oa.Objective(
        lambda p, x: jnp.tanh(x @ p["w"] + p["c"][None]), lambda f, y: jnp.mean((f - y) ** 2)
    )
    diagonal = jax.tree.map(lambda p: jnp.asarray(rng.uniform(0.5, 4.0, p.shape)), params)
    return objective, params, {"x": jnp.asarray(x), "y": jnp.asarray(y)}, diagonal


def test_the_operator_is_the_dense_product_of_three_matrices(x64):
    objective, params, batch, diagonal = problem()
    hessian = curvature.hessian(objective, params, **batch)
    half = preconditioned(hessian, diagonal)
    root = np.sqrt(jax.flatten_util.ravel_pytree(diagonal)[0])
    dense = np.asarray(hessian.dense()) / np.outer(root, root)
    np.testing.assert_allclose(half.dense(), dense, rtol=1e-12, atol=1e-14)
    # Its eigenvalues are those of the unsymmetric product.
    unsymmetric = np.linalg.eigvals(np.asarray(hessian.dense()) / root[:, None] ** 2).real
    np.testing.assert_allclose(np.linalg.eigvalsh(dense), np.sort(unsymmetric), atol=1e-12)
    pairs = curvature.lanczos(half, params, 2, key=0, num_products=15)
    np.testing.assert_allclose(pairs.eigenvalues, np.linalg.eigvalsh(dense)[::-1][:2], rtol=1e-10)


def test_functions_and_parts_of_batches_take_it_too(x64):
    objective, params, batch, diagonal = problem()
    whole = preconditioned(curvature.hessian(objective, params, **batch), diagonal)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    loaded = preconditioned(curvature.hessian(objective, params, batches=parts), diagonal)
    np.testing.assert_allclose(loaded.dense(), whole.dense(), rtol=1e-10, atol=1e-14)
    product = preconditioned(objective.bind(**batch).hessian(params), diagonal)
    both = jax.jit(lambda operator, v: operator(v))(product, params)  # a pytree, as an argument
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), both, whole(params)
    )


def test_infinite_entries_take_no_part():
    half = preconditioned(lambda v: 3 * v, jnp.array([1.0, jnp.inf]))
    assert half(jnp.array([1.0, 1.0])).tolist() == [3.0, 0.0]
    own = Preconditioner(lambda state, params: params, lambda rate: 1 / rate)
    assert own.threshold(0.25) == 4.0
