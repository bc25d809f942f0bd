"""What a batch does to the curvature of K-FAC and EKFAC, and which batches are refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import mlp_init, mlp_objective, tree_allclose, tree_equal
from tests.natural_gradient.test_kfac import ONE_KIND, first_update, scale_by, squares
from tests.natural_gradient.test_kfac_training import ONE, PARAMS, X, Y, mixed


@pytest.mark.parametrize("kind", ONE_KIND)
def test_non_finite_batches_change_nothing(kind):
    """And are counted."""
    tx, params = scale_by(kind, mixed(X, Y), likelihood="categorical"), PARAMS
    _, state = first_update(tx, mixed(X, Y), params)
    assert state.accepted
    assert optax.tree.get(state, "rejected") == 0
    for poisoned in (mixed(X * np.nan, Y), mixed(X * 1e30, Y)):
        grads = mixed(X, Y).grad(params)
        updates, new = jax.jit(
            lambda g, s, o=poisoned: tx.update(g, s, params, value_fn=o, refresh="inverses")
        )(grads, state)
        tree_equal((new.factors, new.factor_weight), (state.factors, state.factor_weight))
        assert not optax.tree.get(new, "accepted")
        assert (optax.tree.get(new, "rejected"), new.rejected_inverses) == (1, 0)
        # Rotated into a basis that is the same again.
        tree_allclose(new.moments, state.moments, rtol=1e-5)
        assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves((updates, new.inverses)))


@pytest.mark.parametrize("kind", ONE_KIND)
def test_a_first_batch_that_is_refused(kind):
    """Gradients pass, as long as there is no curvature."""
    problem = mixed(X * np.nan, Y)
    tx, grads = scale_by(kind, problem, damping=0.25), mixed(X, Y).grad(PARAMS)
    update = jax.jit(lambda: tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=problem))
    updates, state = update()
    assert (state.factor_weight, state.rejected, state.rejected_inverses) == (0, 1, 0)
    scale = 1.0 if kind == "factored" else 1 / 1.25
    for name in ("layer0", "layer1"):
        tree_allclose(updates[name], optax.tree.scale(scale, grads[name]), rtol=1e-6)


def test_moments_that_are_refused_hold_the_weight_back():
    """Second moments overflow before the factors do: then none of them takes the batch."""

    def objective(size: Any) -> oa.Objective:
        return oa.Objective(lambda p: size * ((size * X) @ p["w"]), lambda out: squares(out, X))

    tx = oa.scale_by_ekfac(objective(1.0), likelihood="gaussian", inverses_every=1)
    update = jax.jit(lambda state, size: tx.update(ONE, state, ONE, value_fn=objective(size))[1])
    state = update(tx.init(ONE), 1.0)
    new = update(state, 1e12)
    assert not new.accepted
    assert new.rejected == 1
    for field in ("factor_weight", "factors", "inverses", "moments"):
        tree_equal(getattr(new, field), getattr(state, field))
    assert update(new, 1.0).factor_weight > state.factor_weight


def test_gradients_that_are_not_finite_somewhere_change_nothing():
    """In the middle of a square array that has a diagonal block."""
    x, y = X.reshape(len(X), -1), jnp.ones((len(X), 2))
    objective = oa.Objective(
        lambda p: (x @ p["w"]) * jnp.sqrt(p["t"]).sum(), lambda out: squares(out, y)
    )
    params = {"w": jnp.ones((x.shape[1], 2)), "t": jnp.ones((2, 2))}
    tx = oa.scale_by_kfac(objective, likelihood="gaussian")
    with pytest.warns(UserWarning, match="1 of 2 blocks"):
        _, state = first_update(tx, objective, params)
    params = {"w": params["w"], "t": jnp.array([[1.0, 0.0], [1.0, 1.0]])}
    _, new = jax.jit(functools.partial(tx.update, value_fn=objective))(params, state, params)
    tree_equal(new.factors, state.factors)


def test_inverses_stay_where_a_decomposition_fails():
    objective, params = mlp_objective(X, Y), mlp_init()
    tx = oa.scale_by_kfac(objective, likelihood="categorical", damping=1e-3)
    _, state = first_update(tx, objective, params)
    first, *others = state.factors
    broken = state._replace(factors=(first._replace(inputs=-100 * first.inputs), *others))
    update = jax.jit(functools.partial(tx.update, value_fn=objective, refresh="inverses"))
    updates, new = update(objective.grad(params), broken, params)
    tree_equal(new.inverses[0], state.inverses[0])
    assert jnp.any(new.inverses[1].inputs != state.inverses[1].inputs)
    assert (new.accepted, new.rejected, new.rejected_inverses) == (False, 0, 1)
    assert all(jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates))


def test_curvature_batch_of_its_own():
    """The gradient's batch is not looked at."""
    objective, other = mlp_objective(X[:12], Y[:12]), mlp_objective(X[12:], Y[12:])
    params, tx = mlp_init(), oa.scale_by_kfac(objective, estimator="ggn")
    grads = objective.grad(params)
    update = jax.jit(functools.partial(tx.update, grads, tx.init(params), params, value_fn=other))
    beside = jax.jit(
        lambda: tx.update(
            grads, tx.init(params), params, value_fn=objective, curvature_value_fn=other
        )
    )
    tree_equal(beside(), update())
