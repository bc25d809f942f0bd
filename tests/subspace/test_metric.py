"""Subspaces in the metric of a preconditioner, and a number of directions that adapts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel.curvature import (
    Preconditioner,
    adagrad_preconditioner,
    adam_preconditioner,
    sgd_preconditioner,
)
from tests.curvature.outlier_network import PARAMS, K, as_matrix, hessian, objective
from tests.helpers import tree_allclose

METRIC: dict[str, Any] = {"metric": "preconditioned", "preconditioner": adam_preconditioner()}
TRACKER = oa.BlockTracker(refresh_every=2, cold_start_products=20, oversampling=2)


@functools.cache
def trainer(*, tracker: Any = TRACKER, **options: Any) -> Any:
    """A compiled step of a Bulk method on the network with outliers."""
    tx = oa.bulk_sgd(num_directions=K, tracker=tracker, **options)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(params: Any, state: Any, refresh: Any) -> Any:
        value_fn = objective()
        updates, state = tx.update(
            value_fn.grad(params), state, params, value_fn=value_fn, refresh=refresh
        )
        return updates, state

    return tx, step


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_bulk_adam_against_the_dense_preconditioned_hessian() -> None:
    """Along training: the tracked directions, and the step, D-orthogonal to all of them."""
    tracker = oa.ExactTracker(cold_start_products=72)
    tx, step = trainer(learning_rate=0.01, base=optax.adam, tracker=tracker, **METRIC)
    adam = optax.adam(0.01)
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(13):
        before, adam_state = params, state[0]
        updates, state = step(params, state, i % 4 == 0)
        params = optax.apply_updates(params, updates)
    plain, adam_state = adam.update(objective().grad(before), adam_state, before)
    root = np.sqrt(flat(adam_preconditioner().diagonal(adam_state, before)))
    matrix = np.asarray(hessian(before), np.float64) / np.outer(root, root)
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(state[1].space.eigenvalues, values[::-1][:K], rtol=1e-3)
    leading = vectors[:, ::-1][:, :K]
    overlap = as_matrix(state[1].space.basis) @ leading
    np.testing.assert_allclose(np.linalg.norm(overlap, axis=1), 1, atol=1e-3)
    scaled = root * flat(updates)
    np.testing.assert_allclose(as_matrix(state[1].space.basis) @ scaled, 0, atol=1e-5)
    want = root * flat(plain) - leading @ (leading.T @ (root * flat(plain)))
    cosine = want @ scaled / np.linalg.norm(want) / np.linalg.norm(scaled)
    assert cosine > 0.9999
    # In the Euclidean metric the step is another.
    assert np.abs(as_matrix(state[1].space.basis) @ flat(updates)).max() > 1e-4
    chi = np.linalg.norm(leading.T @ (root * flat(plain))) / np.linalg.norm(root * flat(plain))
    np.testing.assert_allclose(state[1].alignment, chi, atol=1e-3)


def test_the_metric_of_one_is_the_plain_method() -> None:
    identity = {"metric": "preconditioned", "preconditioner": sgd_preconditioner()}
    results = []
    for options in ({}, identity):
        tx, step = trainer(learning_rate=0.1, **options)
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(5):
            updates, state = step(params, state, oa.refresh_at(i, 2))
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    tree_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


SCALES = jnp.array([100.0, 1.0, 4.0])


def quadratic(params: Any) -> jax.Array:
    """In the metric of SCALES its curvature is 0.1, 1 and 0.5: the second direction leads."""
    return 0.5 * jnp.sum(jnp.array([10.0, 1.0, 2.0]) * params**2)


def own(diagonal: Any) -> Preconditioner:
    return Preconditioner(lambda state, params: diagonal, lambda rate: 2 / rate)


def test_by_hand() -> None:
    params, grads = jnp.ones(3), jnp.ones(3)
    tx = oa.bulk_sgd(0.1, 1, metric="preconditioned", preconditioner=own(SCALES))
    updates, state = tx.update(grads, tx.init(params), params, value_fn=quadratic)
    np.testing.assert_allclose(updates, [-0.1, 0, -0.1], atol=1e-6)
    np.testing.assert_allclose(state[1].space.eigenvalues, [1.0], rtol=1e-5)
    np.testing.assert_allclose(state[1].alignment, 1 / np.sqrt(105), rtol=1e-4)


def test_entries_that_do_not_move_take_no_part() -> None:
    params, grads = jnp.ones(3), jnp.array([2.0, 0.0, 1.0])
    tx = oa.dom_sgd(
        0.1,
        1,
        base=functools.partial(optax.adagrad, initial_accumulator_value=0.0),
        metric="preconditioned",
        preconditioner=adagrad_preconditioner(),
    )
    updates, state = tx.update(grads, tx.init(params), params, value_fn=quadratic)
    np.testing.assert_allclose(updates, [-0.1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(state[1].space.eigenvalues, [5.0], rtol=1e-5)


def test_a_mask_in_the_metric() -> None:
    params = {"frozen": jnp.ones(2), "w": jnp.ones(3)}
    diagonal = {"frozen": jnp.ones(2), "w": SCALES}
    tx = oa.project_to_bulk(1, metric="preconditioned", mask={"frozen": False, "w": True})
    updates, state = tx.update(
        params,
        tx.init(params),
        params,
        value_fn=lambda p: quadratic(p["w"]) + 50 * jnp.sum(p["frozen"] ** 2),
        preconditioner_diagonal=diagonal,
    )
    np.testing.assert_allclose(updates["w"], [1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(updates["frozen"], 1)
    assert isinstance(state.space.basis["frozen"], optax.MaskedNode)


def test_gradient_rows_change_as_gradients_do() -> None:
    tracker = oa.GradientTracker(rows="gradient", refresh_every=1, buffer=1, decay=0.5)
    tx = oa.project_to_dominant(1, metric="preconditioned", tracker=tracker)
    params = jnp.ones(3)
    found = []
    for given in (True, False):
        state = tx.init(params)
        for grads in (jnp.zeros(3), jnp.array([10.0, 1.0, 0.0])):
            extra = {"grad": grads} if given else {}
            update = -grads / SCALES
            _, state = tx.update(update, state, params, preconditioner_diagonal=SCALES, **extra)
        found.append(np.abs(state.space.basis[0]))
    # D^(-1/2) g, and D^(1/2) times the update, which is the same for a step without momentum.
    for basis in found:
        np.testing.assert_allclose(basis, np.array([1, 1, 0]) / np.sqrt(2), atol=1e-6)


# -- a number of directions that adapts ------------------------------------------------------------


# Eigenvalues are 10, 2 and 1, the rate 0.1: thresholds of 0.5, 5 and 15.
@pytest.mark.parametrize(("factor", "num"), [(0.05, 2), (0.5, 1), (1.5, 0)])
def test_num_dominant_by_hand(factor: float, num: int) -> None:
    params, grads = jnp.ones(3), jnp.ones(3)
    tx = oa.bulk_sgd(0.1, 2, sharpness_factor=factor)
    updates, state = tx.update(grads, tx.init(params), params, value_fn=quadratic)
    assert state[1].num_dominant == num
    want = np.full(3, -0.1)
    want[[0, 2][:num]] = 0
    np.testing.assert_allclose(updates, want, atol=1e-6)
    np.testing.assert_allclose(state[1].alignment, np.sqrt(num / 3), rtol=1e-5)
    # All of them stay tracked.
    np.testing.assert_allclose(state[1].space.eigenvalues, [10, 2], rtol=1e-5)


def test_in_the_metric_the_threshold_is_that_of_the_preconditioner() -> None:
    """Eigenvalues between the roots are 3800 and 380; Adam's threshold is 38 / rate."""
    pre = adam_preconditioner()
    diagonal = np.array([10 / 3800, 1 / 10, 2 / 380], np.float32)  # of curvatures 10, 1 and 2
    fixed = pre._replace(diagonal=lambda state, params: jnp.asarray(diagonal))
    for factor, want in ((0.9 * 2, 2), (1.1 * 2, 1)):
        tx = oa.bulk_sgd(
            0.1,
            2,
            sharpness_factor=factor,
            base=optax.adam,
            metric="preconditioned",
            preconditioner=fixed,
        )
        params = jnp.ones(3)
        _, state = tx.update(params, tx.init(params), params, value_fn=quadratic)
        np.testing.assert_allclose(state[1].space.eigenvalues, [3800, 380], rtol=1e-4)
        assert state[1].num_dominant == want


def test_the_count_follows_schedule_and_curvature() -> None:
    """In the graph: with a rate that falls, fewer directions are too sharp for it."""
    rate = optax.piecewise_constant_schedule(0.4, {1: 0.25, 2: 0.25, 3: 0.0})
    tx = oa.bulk_sgd(rate, 3, sharpness_factor=0.6)
    params = jnp.ones(3)
    update = jax.jit(functools.partial(tx.update, value_fn=quadratic))
    state, counts = tx.init(params), []
    assert state[1].num_dominant == 0
    for _ in range(4):
        updates, state = update(jnp.ones(3), state, params)
        counts.append(int(state[1].num_dominant))
    assert counts == [2, 1, 0, 0]  # thresholds of 1.5, 6, 24 and infinity
    np.testing.assert_array_equal(updates, 0)
    assert oa.bulk_sgd(0.1, 2).init(params)[1].num_dominant is None


def test_a_threshold_far_below_is_the_plain_method() -> None:
    (tx, step), (low, low_step) = (
        trainer(learning_rate=0.1),
        trainer(learning_rate=0.1, sharpness_factor=1e-9),
    )
    (want, _), (got, state) = (
        step(PARAMS, tx.init(PARAMS), "cold"),
        low_step(PARAMS, low.init(PARAMS), "cold"),
    )
    tree_allclose(got, want, rtol=1e-6, atol=1e-8)
    assert state[1].num_dominant == K


def test_thresholds_in_the_metric_are_of_the_effective_sharpness() -> None:
    """Its curvature is 0.1, 1 and 0.5 there."""
    tx = oa.project_to_dominant(2, min_eigenvalue=lambda count: 0.75, metric="preconditioned")
    params = jnp.ones(3)
    updates, state = tx.update(
        params, tx.init(params), params, value_fn=quadratic, preconditioner_diagonal=SCALES
    )
    assert state.num_dominant == 1
    np.testing.assert_allclose(updates, [0, 1, 0], atol=1e-6)


def test_as_many_directions_as_parameters_may_adapt() -> None:
    """Then all of them can be dominant, but need not be."""
    params = jnp.ones(3)
    tx = oa.project_to_bulk(3, min_eigenvalue=1.5)
    updates, state = tx.update(params, tx.init(params), params, value_fn=quadratic)
    assert state.num_dominant == 2
    np.testing.assert_allclose(updates, [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: oa.bulk_sgd(0.1, 1, metric="adam"), ValueError, "'euclidean', 'preconditioned'"),
        (lambda: oa.bulk_sgd(0.1, 1, metric="preconditioned"), ValueError, "go together: give b"),
        (
            lambda: oa.bulk_sgd(0.1, 1, preconditioner=sgd_preconditioner()),
            ValueError,
            "go together: .*got metric='euclidean'",
        ),
        (
            lambda: oa.bulk_sgd(0.1, 1, metric="preconditioned", preconditioner=optax.adam),
            TypeError,
            r"must be a Preconditioner, such as .*adam_preconditioner\(\), got adam",
        ),
        (lambda: oa.project_to_bulk(1, min_eigenvalue="2"), TypeError, "a number or a schedule"),
        (lambda: oa.bulk_sgd(0.1, 1, sharpness_factor=-1), ValueError, "`sharpness_factor` must"),
        (
            lambda: oa.bulk_sgd(0.1, 1, sharpness_factor=1, tracker=oa.GradientTracker()),
            ValueError,
            "takes curvature products, such as BlockTracker",
        ),
        (
            lambda: oa.bulk_sgd(
                0.1, 1, sharpness_factor=1, tracker=oa.BlockTracker(order="smallest")
            ),
            ValueError,
            'picks the largest ones: .*got order="smallest"',
        ),
    ],
)
def test_wrong_input(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_what_update_needs_in_the_metric() -> None:
    params = jnp.ones(3)
    tx = oa.project_to_bulk(1, metric="preconditioned")
    update = functools.partial(tx.update, params, tx.init(params), params, value_fn=quadratic)
    with pytest.raises(ValueError, match=r"needs the extra argument `preconditioner_diagonal`, .*"):
        update()
    with pytest.raises(ValueError, match="must be a pytree like the parameters, "):
        update(preconditioner_diagonal={"w": params})
    chained = oa.bulk_sgd(0.1, 1, **METRIC)  # the base is SGD
    with pytest.raises(ValueError, match="found no ScaleByAdamState"):
        chained.update(params, chained.init(params), params, value_fn=quadratic)
    with pytest.raises(ValueError, match="needs the parameters"):
        chained.update(params, chained.init(params), value_fn=quadratic)
