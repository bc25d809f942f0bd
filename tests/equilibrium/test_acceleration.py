"""Anderson acceleration of training: its theory on quadratics, its safeguard, its options."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import tree_equal

EIGENVALUES = np.geomspace(1.0, 0.01, 30)


def quadratic(params):
    return 0.5 * jnp.sum(jnp.asarray(EIGENVALUES[: params.size], params.dtype) * params**2)


def trained(tx, params, steps, loss=quadratic, **extra_args):
    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(
                jax.grad(loss)(params), state, params, value_fn=loss, **extra_args
            )
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    (params, state), path = run(params)
    return params, state, np.asarray(path)


@pytest.mark.parametrize("memory", [4, 8])
def test_reaches_the_rate_of_chebyshev(x64, memory):
    """Gradient descent of step 1/L: |A y| <= 2 b^k / (1 + b^2k) |A x_0|, y the mixture of x_i.

    The mixture of the successors is one step further, which never makes the gradient larger.
    """
    start = jnp.ones(30)
    tx = oa.anderson_acceleration(optax.sgd(1.0), memory, ridge=1e-14)
    params, state, _ = trained(tx, start, memory)
    root = np.sqrt(EIGENVALUES[-1])
    base, degree = (1 - root) / (1 + root), memory - 1
    bound = 2 * base**degree / (1 + base ** (2 * degree)) * np.linalg.norm(EIGENVALUES)
    assert np.linalg.norm(EIGENVALUES * params) <= bound
    plain = EIGENVALUES * (1 - EIGENVALUES) ** memory
    assert np.linalg.norm(EIGENVALUES * params) < 0.6 * np.linalg.norm(plain)
    assert int(state.accepted) == 1


def test_solves_a_quadratic_of_few_eigenvalues_at_once(x64):
    tx = oa.anderson_acceleration(optax.sgd(1.0), 5, ridge=0.0)
    params, _, _ = trained(tx, jnp.ones(4), 5)
    assert quadratic(params) < 1e-10 * quadratic(jnp.ones(4))


def test_is_the_rule_of_the_paper(x64):
    """The same in NumPy: weights of the residuals, successors, a history that begins anew."""
    tx = oa.anderson_acceleration(optax.sgd(0.5), 3, every=4, ridge=1e-3)
    _, state, path = trained(tx, jnp.ones(6), 9)
    eigenvalues, history, x = EIGENVALUES[:6], [], np.ones(6)
    for step in range(9):
        history = [*history, x][-3:]
        x = x - 0.5 * eigenvalues * x
        if step % 4 == 3:
            after = np.array([*history[1:], x])
            residuals = after - np.array(history)
            gram = residuals @ residuals.T
            weights = np.linalg.solve(gram / np.linalg.norm(gram, 2) + 1e-3 * np.eye(3), np.ones(3))
            x, history = weights / weights.sum() @ after, []
        np.testing.assert_allclose(path[step], x, rtol=1e-9)
    assert (int(state.accepted), int(state.consecutive)) == (2, 1)


def test_never_takes_what_is_worse_or_not_finite():
    """Where the loss grows along the mixture, and where weights are not finite: the inner steps."""
    kinked = lambda p: jnp.sum(jnp.abs(p))  # noqa: E731  # the steps are equal: no fixed point
    inner = optax.sgd(0.1)
    start = jnp.array([1.0, -0.73])
    params, _, _ = trained(oa.anderson_acceleration(inner, 3), start, 9, kinked)
    expected, _, _ = trained(optax.with_extra_args_support(inner), start, 9, kinked)
    np.testing.assert_allclose(params, expected, rtol=1e-6)
    still = lambda p: 0.0 * jnp.sum(p)  # noqa: E731
    tx = oa.anderson_acceleration(inner, 3, ridge=0.0, safeguard=False)
    params, _, _ = trained(tx, start, 9, still)
    tree_equal(params, start)
    assert bool(jnp.isfinite(params).all())


def test_driven_from_the_host_it_is_the_same():
    tx = oa.anderson_acceleration(optax.sgd(1.0), 3)
    assert [oa.refresh_at(step, tx) for step in range(6)] == [
        False, False, "warm", False, False, "warm"
    ]  # fmt: skip
    params = expected = jnp.ones(5)
    state = expected_state = tx.init(params)

    def update(params, state, refresh):
        gradient = jax.grad(quadratic)(params)
        updates, state = tx.update(gradient, state, params, value_fn=quadratic, refresh=refresh)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, static_argnames="refresh")
    for step in range(6):
        params, state = update(params, state, oa.refresh_at(step, tx))
        expected, expected_state = update(expected, expected_state, None)
    np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-8)
    assert int(state.accepted) == int(expected_state.accepted) == 2


def test_masked_leaves_follow_the_inner_transformation():
    loss = lambda p: quadratic(p["a"]) + quadratic(p["b"])  # noqa: E731
    params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    tx = oa.anderson_acceleration(optax.sgd(1.0), 3, mask={"a": True, "b": False})
    state = tx.init(params)
    assert state.iterates["a"].shape == (3, 3)
    assert isinstance(state.iterates["b"], optax.MaskedNode)
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p, value_fn=loss))
    for _ in range(3):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["b"], (1 - EIGENVALUES[:4]) ** 3, rtol=1e-6)
    assert quadratic(params["a"]) < 0.5 * quadratic(jnp.asarray((1 - EIGENVALUES[:3]) ** 3))


def test_without_the_safeguard_it_stands_within_optax_masked():
    tx = optax.masked(
        oa.anderson_acceleration(optax.sgd(1.0), 3, safeguard=False), {"a": True, "b": False}
    )
    alone = oa.anderson_acceleration(optax.sgd(1.0), 3, safeguard=False)

    def after_three(tx, params):
        state = tx.init(params)
        for _ in range(3):
            gradients = jax.tree.map(jax.grad(quadratic), params)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    found = after_three(tx, {"a": jnp.ones(3), "b": jnp.ones(3)})
    np.testing.assert_array_equal(found["a"], after_three(alone, {"a": jnp.ones(3)})["a"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: oa.anderson_acceleration(optax.sgd(1), 1),
            ValueError,
            "`memory` must be at least 2",
        ),
        (
            lambda: oa.anderson_acceleration(optax.sgd(1), 4, 3),
            ValueError,
            "`every` must be at least 4",
        ),
        (
            lambda: oa.anderson_acceleration(optax.sgd(1), ridge=-1),
            ValueError,
            "`ridge` must lie in",
        ),
        (lambda: oa.anderson_acceleration("sgd"), TypeError, "`inner` must be"),
        (
            lambda: oa.anderson_acceleration(optax.sgd(1)).init(jnp.arange(3)),
            TypeError,
            "floating",
        ),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_loss_is_named():
    tx = oa.anderson_acceleration(optax.sgd(1.0))
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="needs the extra argument `value_fn` to compare the loss"):
        tx.update(params, tx.init(params), params)
