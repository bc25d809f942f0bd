"""AdaRankGrad: golden values, limit cases, when subspaces end, memory, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers as Axes

import optax_accel as oa
from tests.helpers import tree_equal
from tests.low_rank.test_galore import updates_for

RNG = np.random.default_rng(1)


def with_singular_values(values, shape, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return jnp.asarray(left * np.asarray(values, float) @ right.T)


def rank_of(gradient, max_rank=4, **kwargs):
    tx = oa.scale_by_adarankgrad(max_rank, **kwargs)
    return int(updates_for(tx, [gradient])[1].subspace_rank)


@pytest.mark.parametrize("method", ["svd", "range_finder"])
def test_golden_ranks(x64, method):
    """Relative residuals .6069769787, .2961744389, .1324532357 and 0."""
    rank = functools.partial(rank_of, with_singular_values((3, 2, 1, 0.5), (9, 6)), method=method)
    assert [rank(residual=xi) for xi in (0.2, 0.3)] == [3, 2]
    residuals = (0.6069769787, 0.2961744389, 0.1324532357)
    assert [rank(residual=xi * (1 + 1e-7)) for xi in residuals] == [1, 2, 3]
    assert [rank(residual=xi * (1 - 1e-7)) for xi in residuals] == [2, 3, 4]
    assert rank(residual=0.2, min_rank=2, rank_step=2) == 4
    assert rank(residual=0.01, max_rank=3, min_rank=2, rank_step=2) == 2  # the largest tried


def test_exact_ranks(x64):
    for exact in (1, 2, 3):
        gradient = with_singular_values([1.0] * exact, (7, 5))
        for lowest in (1, 2):
            assert rank_of(gradient, min_rank=lowest, residual=1e-6) == max(exact, lowest)
    assert rank_of(jnp.zeros((4, 4))) == 1


def test_golden_moments(x64):
    """The subspace of e1, e2 turns by 0.3 in the plane of e1, e3."""
    turned = jnp.zeros((3, 8)).at[0, 0].set(2 * np.cos(0.3)).at[2, 0].set(2 * np.sin(0.3))
    turned = turned.at[1, 1].set(1.0)
    tx = oa.scale_by_adarankgrad(2, min_rank=2, method="svd")
    state = tx.init(turned)._replace(
        low_rank_basis=jnp.eye(3)[:, :2],
        mu=jnp.zeros((2, 8)).at[:, 5].set(jnp.array([1.0, 2.0])),
        nu=jnp.zeros((2, 8)).at[:, 5].set(jnp.array([0.5, 0.1])),
    )
    _, state = tx.update(turned, state, refresh=True)
    # After one step of Adam on a gradient that is zero there.
    np.testing.assert_allclose(np.abs(state.mu[:, 5]) / 0.9, [0.9553364891, 2], rtol=1e-9)
    np.testing.assert_allclose(state.nu[:, 5] / 0.999, [0.4563339037, 0.1], rtol=1e-9)


def test_full_rank_with_a_fixed_subspace_is_adam_in_it(x64):
    gradients = list(RNG.normal(size=(6, 4, 9)))
    tx = oa.adarankgrad(0.1, 4, residual=1e-12, refresh="period", scale=1.0, method="svd")
    ours, state = updates_for(tx, gradients)
    basis = np.asarray(optax.tree.get(state, "low_rank_basis"))
    theirs, _ = updates_for(optax.adam(0.1), [basis.T @ g for g in gradients])
    np.testing.assert_allclose(ours, [basis @ u for u in theirs], rtol=1e-9, atol=1e-12)


def test_moments_survive_another_basis_of_the_same_subspace(x64):
    """The first moment, led back, is the same; the second stays positive."""
    gradient = with_singular_values((2, 1.5), (6, 9))
    mixed = with_singular_values((2, 1.5), (2, 2), seed=3)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    other = left[:, :2] @ mixed @ right[:2]  # the same subspace, other singular vectors
    tx = oa.scale_by_adarankgrad(2, min_rank=2, b1=0.9)
    state = tx.init(gradient)
    _, state = tx.update(gradient, state)
    before = state.low_rank_basis @ state.mu
    _, state = tx.update(other, state, refresh=True)
    np.testing.assert_allclose(
        state.low_rank_basis @ state.mu, 0.9 * before + 0.1 * other, atol=1e-9
    )
    assert (state.nu >= 0).all()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("period", [0, 4, 8]), ("convergence", [0, 3, 6]), ("either", [0, 3, 4, 6, 8])],
)
def test_when_subspaces_end(rule, expected):
    """The gradient keeps its direction and falls; a new subspace notes its size."""
    direction = jnp.float32(with_singular_values([1.0], (5, 4)))
    sizes = [1, 0.9, 0.5, 0.09, 0.08, 0.05, 0.007, 0.006, 0.005]
    tx = oa.scale_by_adarankgrad(1, refresh=rule, refresh_every=4, convergence=0.1)
    step, state, new = jax.jit(tx.update), tx.init(direction), []
    for i, size in enumerate(sizes):
        _, state = step(size * direction, state)
        if abs(state.start_norm - size) < 1e-4 * size:
            new.append(i)
    assert new == expected


def test_stacked_layers_have_a_rank_each():
    gradient = jnp.stack(
        [jnp.float32(with_singular_values([1.0] * rank, (6, 5))) for rank in (1, 3, 2)]
    )
    tx = oa.scale_by_adarankgrad(4, dimension_numbers=Axes(1, 2))
    _, state = tx.update(gradient, tx.init(gradient))
    assert state.subspace_rank.tolist() == [1, 3, 2]
    assert oa.low_rank_bytes((state,)).effective < oa.low_rank_bytes(state).allocated
    # Only the second has converged, and only it is replaced.
    change = gradient.at[1].multiply(0.01).at[0].multiply(2.0)
    _, new = tx.update(change, state._replace(count=state.count + 1))
    np.testing.assert_allclose(new.start_norm[1], 0.01 * state.start_norm[1], rtol=1e-3)
    tree_equal(new.start_norm[jnp.array([0, 2])], state.start_norm[jnp.array([0, 2])])


def test_gradients_that_are_not_finite_leave_the_subspace_alone():
    gradient = jnp.float32(RNG.normal(size=(4, 3)))
    tx = oa.scale_by_adarankgrad(2)
    _, state = tx.update(gradient, tx.init(gradient))
    _, new = tx.update(gradient * np.nan, state, refresh=True)
    for field in ("low_rank_basis", "subspace_rank", "start_norm"):
        tree_equal(getattr(new, field), getattr(state, field))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_rank": 0}, "`max_rank` must be at least 1"),
        ({"max_rank": 2, "min_rank": 3}, "`min_rank` must be at most `max_rank`, 2, got 3"),
        ({"max_rank": 2, "residual": 1.0}, r"`residual` must lie in \(0, 1\)"),
        ({"max_rank": 2, "convergence": 1.5}, r"`convergence` must lie in \[0, 1\)"),
        ({"max_rank": 2, "refresh": "never"}, "`refresh` must be one of"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        oa.adarankgrad(0.1, **kwargs)


def test_bytes_need_a_state():
    with pytest.raises(ValueError, match="found no state of scale_by_adarankgrad"):
        oa.low_rank_bytes(optax.adam(0.1).init(jnp.zeros(3)))
    tx = oa.adarankgrad(0.1, 2)
    with pytest.raises(ValueError, match="whose values must be known"):
        oa.low_rank_bytes(jax.eval_shape(tx.init, jnp.zeros((3, 3))))


def test_only_the_period_can_be_driven_from_the_host():
    """Beside an element that `refresh_at` drives, the rule of convergence still decides."""
    gradients = [jnp.float32(RNG.normal(size=(4, 3))) * size for size in (1, 0.01, 0.01)]
    for rule, replaced in (("either", True), ("period", False)):
        tx = oa.scale_by_adarankgrad(1, refresh=rule)
        _, state = tx.update(gradients[0], tx.init(gradients[0]), refresh="cold")
        _, new = tx.update(gradients[1], state, refresh=False)
        assert (new.start_norm != state.start_norm) == replaced
