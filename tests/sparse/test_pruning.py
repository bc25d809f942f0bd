"""Pruning directed by sharpness, and what goes with it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import least_squares, tree_equal

PROBLEM = least_squares()
# The golden example: a quadratic with this gradient at these weights.
HESSIAN = np.float32([[2, 1], [1, 3]])
GRADIENT = np.float32([0.5, -1])
WEIGHTS = np.float32([1, 0.2])
PRUNED = np.array([False, True])


def quadratic(w: Any) -> Any:
    moved = w - WEIGHTS
    return GRADIENT @ moved + 0.5 * moved @ (HESSIAN @ moved)


@functools.partial(jax.jit, static_argnames="tx")
def step(tx: Any, params: Any, state: Any) -> Any:
    objective = PROBLEM.objective()
    updates, state = tx.update(objective.grad(params), state, params, value_fn=objective)
    return optax.apply_updates(params, updates), state


def first_updates(**changes: Any) -> Any:
    kwargs: dict[str, Any] = {"rho": 0.05, "sparsity": 0.5, "prune_step": 10} | changes
    tx = oa.sharpness_directed(optax.sgd(1.0), **kwargs)
    params = jnp.asarray(WEIGHTS)
    return jax.jit(lambda w: tx.update(jax.grad(quadratic)(w), tx.init(w), w, value_fn=quadratic))(
        params
    )


def test_golden_values() -> None:
    increase = oa.predicted_increase(quadratic, jnp.asarray(WEIGHTS), PRUNED)
    np.testing.assert_allclose(increase, 0.26, rtol=1e-6)
    kept = jnp.where(PRUNED, 0, WEIGHTS)
    real = jax.jit(lambda w: quadratic(w) - quadratic(jnp.asarray(WEIGHTS)))(kept)
    np.testing.assert_allclose(real, increase, rtol=1e-6)  # exact on quadratics
    updates, state = first_updates()  # of the gradient at (1, 0.15)
    np.testing.assert_allclose(updates, [-0.45, 1.15], rtol=1e-6)
    np.testing.assert_allclose(state.gradient_norm, 1.0, rtol=1e-6)
    tree_equal(state.pruned, PRUNED)


def test_nothing_to_prune_is_the_plain_gradient_and_everything_is_sam() -> None:
    np.testing.assert_allclose(first_updates(sparsity=0.0)[0], -GRADIENT, rtol=1e-6)
    np.testing.assert_allclose(first_updates(rho=0.0)[0], -GRADIENT, rtol=1e-6)
    sam = optax.contrib.sam(
        optax.sgd(1.0),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        opaque_mode=True,
    )

    @jax.jit
    def of_sam(w: Any) -> Any:
        gradient = jax.grad(quadratic)
        return sam.update(gradient(w), sam.init(w), w, grad_fn=lambda w, _: gradient(w))[0]

    w = jnp.asarray(WEIGHTS)
    np.testing.assert_allclose(first_updates(sparsity=1.0)[0], of_sam(w), rtol=1e-6)
    gnp = oa.gnp(optax.sgd(1.0), rho=0.05, alpha=1.0)
    ours = jax.jit(lambda w: gnp.update(jax.grad(quadratic)(w), gnp.init(w), w, value_fn=quadratic))
    np.testing.assert_allclose(first_updates(sparsity=1.0)[0], ours(w)[0], rtol=1e-6)


def test_the_gradient_of_no_length_is_not_divided_by() -> None:
    tx = oa.sharpness_directed(optax.sgd(1.0), sparsity=0.5, prune_step=5)
    zero = jnp.zeros(2)
    updates, state = jax.jit(
        lambda w: tx.update(zero, tx.init(w), w, value_fn=lambda w: 0.5 * jnp.sum(w**2))
    )(jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(updates, -WEIGHTS)
    assert float(state.gradient_norm) == 0


def test_the_final_sparsity_is_exact_and_stays_under_any_optimizer() -> None:
    """Also: the schedule's last value counts, and the mask keeps the bias."""
    schedule = optax.linear_schedule(0.0, 0.625, 3)
    mask = {"dense": True, "b": False}
    adam = optax.adamw(0.03, weight_decay=0.1)
    tx = oa.sharpness_directed(adam, sparsity=schedule, prune_step=6, refresh_every=2, mask=mask)
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    numbers = []
    for i in range(8):
        before = params
        params, state = step(tx, params, state)
        numbers.append(int(state.pruned["dense"]["w"].sum()))
        assert int(jnp.sum(params["dense"]["w"] == 0)) == (5 if i >= 5 else 0)
        if i == 5:
            smallest = oa.smallest_entries(before, 0.625, mask=mask)
            tree_equal(state.pruned, smallest)
    assert numbers == [0, 0, 3, 3, 5, 5, 5, 5]
    assert not np.any(state.pruned["b"])
    assert np.all(params["b"] != 0)
    later = oa.keep_pruned(optax.chain(optax.trace(0.9), adam), state.pruned)
    kept, later_state = params, later.init(params)
    for _ in range(2):
        kept, later_state = step(later, kept, later_state)
    assert jax.tree.map(lambda x: int(np.sum(x == 0)), kept) == {"dense": {"w": 5}, "b": 0}
    assert not np.allclose(kept["dense"]["w"], params["dense"]["w"])
    mu = optax.tree.get(later_state.inner_state, "mu")
    assert int(np.sum(np.asarray(mu["dense"]["w"]) == 0)) == 5  # moments do not see them


def test_entries_of_one_size_are_pruned_by_their_index() -> None:
    entries = {"w": jnp.float32([[1, -1, 2], [1, 0, 2]]), "s": jnp.float32(3)}
    found = oa.smallest_entries(entries, 0.5)
    assert found["w"].tolist() == [[True, True, False], [False, True, False]]
    assert not np.any(oa.smallest_entries(entries, 0.0)["w"])
    assert np.all(oa.smallest_entries(entries, 1.0)["s"])


def test_predicted_increase_is_the_real_one_of_a_quadratic_loss() -> None:
    objective = PROBLEM.objective()
    pruned = oa.smallest_entries(PROBLEM.params, 0.5)
    gone = jax.tree.map(lambda x, p: np.where(p, 0, x), PROBLEM.params, pruned)
    predicted, real = jax.jit(
        lambda params, gone: (
            oa.predicted_increase(objective, params, pruned),
            objective(gone) - objective(params),
        )
    )(PROBLEM.params, gone)
    np.testing.assert_allclose(predicted, real, rtol=1e-4)


def test_selected_examples() -> None:
    assert oa.select_examples(np.float32([3, 1, 2, 2, 0]), 0.4).tolist() == [0, 2]
    assert oa.select_examples([3, 1], 0.01).tolist() == [0]
    assert oa.select_examples([3, 1, 2], 1.0).tolist() == [0, 1, 2]
    logits = np.log(np.float32([[0.5, 0.25, 0.25]]))
    np.testing.assert_allclose(oa.el2n_scores(logits, np.array([0])), 0.375**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rho": -0.1}, r"`rho` must lie in \[0, inf\), got -0.1"),
        ({"sparsity": 1.5}, r"`sparsity` must lie in \[0, 1\], got 1.5"),
        ({"prune_step": 0}, "`prune_step` must be at least 1, got 0"),
        ({"refresh_every": 0}, "`refresh_every` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oa.sharpness_directed(optax.sgd(0.1), **{"sparsity": 0.5, "prune_step": 3, **changes})


def test_wrong_input() -> None:
    tx = oa.sharpness_directed(optax.sgd(0.1), sparsity=0.5, prune_step=3)
    with pytest.raises(TypeError, match="sharpness_directed works on real floating-point"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="needs the extra argument `value_fn`"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    kept = oa.keep_pruned(optax.sgd(0.1), PRUNED)
    with pytest.raises(ValueError, match=r"`pruned` of keep_pruned must be boolean arrays like"):
        kept.init(jnp.ones(3))
    with pytest.raises(ValueError, match="keep_pruned needs the parameters"):
        kept.update(jnp.ones(2), kept.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="`pruned` of predicted_increase"):
        oa.predicted_increase(quadratic, jnp.asarray(WEIGHTS), np.ones(2))
    with pytest.raises(ValueError, match=r"`fraction` must lie in \(0, 1\], got 0"):
        oa.select_examples([1.0], 0.0)
    with pytest.raises(ValueError, match=r"`scores` must be a vector.*with NaN"):
        oa.select_examples([1.0, np.nan], 0.5)
    with pytest.raises(ValueError, match="`logits` must have the shape"):
        oa.el2n_scores(np.ones((2, 3)), np.zeros(3, int))
