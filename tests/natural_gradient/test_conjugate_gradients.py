"""The solver of Hessian-free steps: when it stops, where it starts, numbers of any size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import tree_allclose, tree_equal
from tests.natural_gradient.test_hessian_free import PROBLEM, quadratic, step, update


def reference(spectrum, rhs, iterations, x):
    """Textbook conjugate gradients for a diagonal matrix."""
    r = rhs - spectrum * x
    p, rr = r, r @ r
    for _ in range(iterations):
        alpha = rr / (p @ (spectrum * p))
        x, r = x + alpha * p, r - alpha * spectrum * p
        p, rr = r + (r @ r) / rr * p, r @ r
    return x


def windows(spectrum, rhs, tolerance, max_iterations):
    """The rule of the documentation, on top of the reference."""
    x, last, i = np.zeros_like(rhs), 0.0, 0
    while i < max_iterations:
        k = min(max(10, i // 2), max_iterations - i)
        x = reference(spectrum, rhs, k, x)
        value = 0.5 * x @ (spectrum * x) - rhs @ x
        i += k
        if last - value <= k * tolerance * -value:
            break
        last = value
    return x, i


def test_stops_by_relative_progress(x64):
    spectrum, tolerances = np.geomspace(1e-4, 1, 300), np.array([0.02, 5e-4, 1e-6, 0.0])

    @jax.jit
    @jax.vmap
    def run(tolerance):
        tx = oa.hessian_free(damping=1e-4, tolerance=tolerance, max_iterations=133)
        x = jnp.zeros(300)
        return update(tx, x, tx.init(x), quadratic(spectrum))

    updates, state = run(tolerances)
    wanted = [windows(spectrum + 1e-4, spectrum, tolerance, 133) for tolerance in tolerances]
    made = [iterations for _, iterations in wanted]
    assert state.num_iterations.tolist() == made
    assert made[0] < made[1] < made[2], made
    # Rounding errors grow over 133 iterations, differently in each version of XLA.
    np.testing.assert_allclose(updates, [x for x, _ in wanted], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("most", [1, 7, 10, 14])
def test_ends_at_the_maximum(most):
    _, state = step(
        oa.hessian_free(max_iterations=most, tolerance=0.0),
        jnp.zeros(300),
        objective=quadratic(np.float32(np.geomspace(1e-4, 10, 300))),
    )
    assert state.num_iterations == most


def test_starts_from_the_last_direction(x64):
    """One iteration from decay times it; from zero where the model does not like it."""
    spectrum = np.array([3.0, 1.0, 0.2])
    objective, x = quadratic(spectrum), jnp.zeros(3)
    tx = oa.hessian_free(damping=0.5, max_iterations=1, decay=0.8)
    state = tx.init(x)
    before = jnp.array([0.5, 0.1, 0.9])
    updates, _ = step(tx, x, state._replace(direction=before), objective)
    np.testing.assert_allclose(
        updates, reference(spectrum + 0.5, spectrum, 1, 0.8 * before), rtol=1e-12
    )
    cold, _ = step(tx, x, state, objective)
    np.testing.assert_allclose(cold, reference(spectrum + 0.5, spectrum, 1, 0 * before), rtol=1e-12)
    uphill, _ = step(tx, x, state._replace(direction=-before), objective)
    tree_equal(uphill, cold)


def test_a_warm_start_saves_iterations(x64):
    spectrum = np.geomspace(1e-4, 1, 300)
    objective, x = quadratic(spectrum), jnp.zeros(300)
    tx = oa.hessian_free(damping=1e-3, decay=1.0)
    _, state = step(tx, x, objective=objective)
    _, again = step(tx, x, state._replace(damping=jnp.float32(1e-3)), objective)
    assert again.num_iterations == 10 < state.num_iterations


def test_preconditioner_finds_the_diagonal(x64):
    """A diagonal matrix is known from one probe, and with the power 1 would be solved in one."""
    spectrum = np.geomspace(1e-6, 1, 300)
    objective, x = quadratic(spectrum), jnp.zeros(300)
    _, plain = step(oa.hessian_free(damping=1e-6), x, objective=objective)
    tx = oa.hessian_free(damping=1e-6, precondition=True)
    _, state = step(tx, x, objective=objective)
    np.testing.assert_allclose(state.diagonal_rms**2, 0.1 * spectrum**2, rtol=1e-12)
    assert state.num_iterations < plain.num_iterations
    _, state = step(tx, x, state, objective)
    np.testing.assert_allclose(state.diagonal_rms**2, 0.19 * spectrum**2, rtol=1e-12)


@pytest.mark.parametrize("precondition", [False, True])
def test_a_loss_in_other_units_gives_the_same_step(precondition):
    """With the damping in the same units. Squares of such numbers overflow or vanish."""

    @jax.jit
    @jax.vmap
    def run(unit):
        tx = oa.hessian_free(damping=0.1, tolerance=0.0, precondition=precondition)
        plain = PROBLEM.objective()
        scaled = oa.Objective(plain.outputs, lambda out: unit * plain.loss_of_outputs(out))
        state = tx.init(PROBLEM.params)
        params, made = PROBLEM.params, []
        state = state._replace(count=jnp.int32(1), damping=0.1 * unit)
        for _ in range(2):  # the second step starts from the first one's direction
            updates, state = update(tx, params, state, scaled)
            params = optax.apply_updates(params, updates)
            made.append(updates)
        return made, state.reduction_ratio, state.damping / unit

    found = run(jnp.array([1.0, 1e30, 1e-25, 1e-30], jnp.float32))
    for i in (1, 2, 3):
        tree_allclose(
            jax.tree.map(lambda a, i=i: a[i], found),
            jax.tree.map(lambda a: a[0], found),
            rtol=1e-4,
        )


def all_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("objective", "x", "damping", "moves"),
    [
        # Without curvature: a gradient step, or no solution and no step.
        (oa.Objective(lambda x: x, jnp.sum), jnp.ones(2), 0.5, True),
        (oa.Objective(lambda x: x, jnp.sum), jnp.ones(2), 0.0, False),
        # A curvature that overflows, at a point where loss and gradient do not.
        (
            oa.Objective(lambda x: 1e25 * x, lambda out: jnp.sum(out**2)),
            jnp.full(2, 1e-25),
            0.5,
            False,
        ),
        # A gradient whose square overflows, and one of zero.
        (oa.Objective(lambda x: x, lambda out: 1e20 * jnp.sum(out)), jnp.ones(2), 1.0, True),
        (oa.Objective(lambda x: x, lambda out: jnp.sum(out**2)), jnp.zeros(2), 0.0, False),
        # Steps that overflow the parameters' dtype, and half precision.
        (
            oa.Objective(lambda x: x, lambda out: jnp.sum(out)),
            jnp.ones(2, jnp.float16),
            1e-6,
            True,
        ),
        (
            oa.Objective(lambda x: x, lambda out: jnp.sum((out - 2) ** 2)),
            jnp.ones(2, jnp.bfloat16),
            0.5,
            True,
        ),
    ],
    ids=["linear", "singular", "huge curvature", "huge", "zero", "float16", "bfloat16"],
)
def test_finite_losses_and_gradients_give_finite_steps(objective, x, damping, moves):
    tx = oa.hessian_free(damping=damping, precondition=True)
    # Not compiled as a whole: XLA multiplies constants with each other first, beyond infinity.
    updates, state = update(tx, x, tx.init(x), objective)
    assert all_finite(updates)
    assert all_finite(optax.apply_updates(x, updates))
    assert not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(state))
    assert all_finite(state.direction)
    assert bool(jnp.any(updates != 0)) == moves
    assert objective(optax.apply_updates(x, updates)) <= objective(x)
    if damping == 0.5 and not moves:
        assert state.damping > damping  # the next step is shorter
