"""The central flow on losses where it is known in closed form, and against gradient descent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training.studies.central_flow import (
    Rule,
    central_flow,
    covariance,
    curvature_slopes,
    stable_flow,
)

RATE = 0.01
DESCENT = Rule(learning_rate=RATE)
EDGE = 2 / RATE


def valley(w: jax.Array) -> jax.Array:
    """Across the valley the curvature is EDGE where y + z = 4; along it y goes to 4 and z to 2."""
    x, y, z = w
    return ((EDGE - 4 + y + z) * x**2 + (y - 4) ** 2 + (z - 2) ** 2) / 2


def test_gradient_descent_at_twice_the_reciprocal_curvature_has_period_two() -> None:
    """Below it decays, above it grows, by 1 - learning rate times curvature in each step."""
    for sharpness, factor in ((195, -0.95), (200, -1.0), (205, -1.05)):
        w = jnp.float32(1.0)
        path = [w := w - RATE * jax.grad(lambda w, s=sharpness: s * w**2 / 2)(w) for _ in range(6)]
        np.testing.assert_allclose(path, factor ** np.arange(1, 7), rtol=1e-4)


def test_central_flow_along_the_edge() -> None:
    """On y + z = 4 the difference decays to 2 like exp(-rate t); the variance is 4 + 2 - 4 = 2.

    With S = y + z: -<grad S, grad L> = (4 - y) + (2 - z), over |grad S|^2 / 2 = 1.
    """
    start = jnp.array([0.0, 1.0, 3.0])
    found = central_flow(valley, DESCENT, start, steps=200, unstable=1)
    x, y, z = np.asarray(found.params).T
    np.testing.assert_allclose(x, 0, atol=1e-6)
    np.testing.assert_allclose(y + z, 4, atol=2e-3)
    np.testing.assert_allclose(y - z, 2 - 4 * np.exp(-RATE * np.arange(200)), rtol=0.01, atol=0.01)
    np.testing.assert_allclose(found.variance[1:], 2, rtol=2e-2)
    np.testing.assert_allclose(
        found.predicted_loss - found.loss, found.variance * found.ratio * EDGE / 2, rtol=1e-4
    )


def test_gradient_descent_follows_it_in_the_mean() -> None:
    """Its own cycles of growth and decay are averaged over the second half of 4,000 steps."""

    def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return w - RATE * jax.grad(valley)(w), w

    path = np.asarray(jax.lax.scan(step, jnp.array([1.3, 1.0, 3.0]), length=4_000)[1])[2_000:]
    x, y, z = path.T
    np.testing.assert_allclose([x.mean(), np.mean(y + z), np.mean(y - z)], [0, 4, 2], atol=0.1)
    np.testing.assert_allclose(np.mean(x**2), 2, rtol=0.05)
    assert np.all(x[1:] * x[:-1] < 0)  # period two


def test_covariance_is_that_of_each_direction_where_they_do_not_meet() -> None:
    """Directions that flatten by themselves get nothing; a coupled one is held by its neighbor."""
    alone = jnp.zeros((2, 2, 2, 2)).at[0, 0, 0, 0].set(0.5).at[1, 1, 1, 1].set(2.0)
    found = covariance(jnp.diag(jnp.array([1.0, -3.0])), alone)
    np.testing.assert_allclose(found, [[2, 0], [0, 0]], atol=1e-4)
    found = covariance(jnp.diag(jnp.array([1.0, 3.0])), alone)
    np.testing.assert_allclose(found, [[2, 0], [0, 1.5]], atol=1e-3)
    together = alone.at[0, 0, 1, 1].set(1.0).at[1, 1, 0, 0].set(1.0)
    # The second one alone stops both: B X = (1, 2) x for X = diag(0, x), x = 2.
    found = covariance(jnp.diag(jnp.array([1.0, 4.0])), together)
    np.testing.assert_allclose(found, [[0, 0], [0, 2]], atol=2e-2)
    assert not covariance(jnp.eye(2), jnp.zeros((2, 2, 2, 2))).any()


def test_slopes_of_the_curvature() -> None:
    """Of x^3 y the Hessian is [[6 x y, 3 x^2], [3 x^2, 0]]."""
    found = curvature_slopes(lambda w: w[0] ** 3 * w[1], jnp.array([2.0, 5.0]), jnp.eye(2))
    expected = [[[30, 12], [12, 0]], [[12, 0], [0, 0]]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rmsprop_on_a_quadratic_finds_its_preconditioner() -> None:
    """There every parameter oscillates with variance eta^2 / 4, and 2 P - H is singular.

    Where H = [[2, 1], [1, 3]] all of the oscillation is along (1, 1), so that 2 P - H has to vanish
    there: P = (3 / 2, 2), whatever the second moment was before. A third parameter, without a
    gradient, stays where it is.
    """
    hessian = jnp.array([[2.0, 1.0], [1.0, 3.0]])

    def loss(w: jax.Array) -> jax.Array:
        return w[:2] @ hessian @ w[:2] / 2

    rule = Rule(learning_rate=RATE, b2=0.9)
    moments = (jnp.zeros(3), jnp.array([4e-4, 9e-4, 0.0]), jnp.float32(1))
    start = jnp.array([0.0, 0.0, 7.0])
    found = central_flow(loss, rule, start, moments, steps=200, unstable=1)
    np.testing.assert_allclose(found.params[-1], start, atol=1e-6)
    np.testing.assert_allclose(found.ratio[-50:], 1, atol=1e-3)
    np.testing.assert_allclose(found.variance[-50:], RATE**2 / 2, rtol=1e-2)
    # Optax's RMSprop, from a small oscillation.
    tx = optax.rmsprop(RATE, decay=0.9)

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple, jax.Array]:
        w, state = carry
        updates, state = tx.update(hessian @ w, state, w)
        return (optax.apply_updates(w, updates), state), w

    start = jnp.array([0.004, 0.006])
    (_, state), path = jax.lax.scan(step, (start, tx.init(start)), length=400)
    np.testing.assert_allclose(
        np.mean(np.asarray(path[-100:]) ** 2, axis=0), RATE**2 / 4, rtol=0.05
    )
    root = np.sqrt(np.asarray(optax.tree.get(state, "nu")))
    np.testing.assert_allclose(root / RATE, [1.5, 2], rtol=0.05)


def test_adam_on_a_quadratic_oscillates_by_the_rate_over_its_threshold() -> None:
    """P = h / c and P eta = h |x|: the amplitude is eta / c, with b1 = 0.9 eta / 38."""
    rule = Rule(learning_rate=RATE, b1=0.9, b2=0.99, corrects=True)
    assert np.isclose(rule.threshold, 38)
    moments = (jnp.zeros(1), jnp.array([1e-6]), jnp.float32(1_000))
    found = central_flow(
        lambda w: 3 * jnp.sum(w**2) / 2, rule, jnp.zeros(1), moments, steps=300, unstable=1
    )
    assert found.variance[0] == 0
    np.testing.assert_allclose(found.ratio[-50:], 1, atol=1e-2)
    np.testing.assert_allclose(found.variance[-50:], (RATE / 38) ** 2, rtol=2e-2)


def test_stable_flow_of_a_quadratic() -> None:
    """Also where it is so sharp that 64 Euler steps are needed in each step."""
    curvatures = jnp.array([4.0, 3_000.0])
    path = stable_flow(lambda w: curvatures @ w**2 / 2, DESCENT, jnp.ones(2), steps=50)
    np.testing.assert_allclose(path[:, 0], np.exp(-0.04 * np.arange(50)), rtol=5e-3)
    np.testing.assert_allclose(path[1:, 1], 0, atol=1e-6)
