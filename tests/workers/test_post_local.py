"""Post-local SGD against a plain simulation of the workers, and combined with other methods."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import WORKER_MODES, over_workers, tree_allclose

N = 4
RNG = np.random.default_rng(0)
HESSIANS = (lambda root: root @ root.transpose(0, 2, 1) / 3)(RNG.normal(size=(N, 3, 3)))
CENTERS, START = RNG.normal(size=(N, 3)), RNG.normal(size=3)
SWITCH, LOCAL, STEPS = 3, 2, 8


def gradient(x: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nj->ni", HESSIANS, x - CENTERS)


def loss(x: Any, i: Any) -> Any:
    """Worker i's."""
    error = x - jnp.asarray(CENTERS, x.dtype)[i]
    return 0.5 * error @ jnp.asarray(HESSIANS, x.dtype)[i] @ error


def run(tx: Any, mode: str = "vmap", num_steps: int = STEPS, **extra: Any) -> tuple[Any, list[Any]]:
    """Parameters and state after each step."""

    def step(x: Any, state: Any, i: Any) -> tuple[Any, Any]:
        own = oa.Objective.from_value_fn(lambda x: loss(x, i))
        value, grads = own.value_and_grad(x)
        updates, state = tx.update(grads, state, x, value=value, grad=grads, value_fn=own, **extra)
        return optax.apply_updates(x, updates), state

    step = over_workers(mode, step, N)
    x = np.broadcast_to(START, (N, 3))
    state, seen, states = jax.vmap(tx.init)(x), [], []
    for _ in range(num_steps):
        x, state = jax.block_until_ready(step(x, state, np.arange(N)))
        seen.append(np.asarray(x))
        states.append(jax.device_get(state))
    return np.stack(seen), states


def spread(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.sum((x - x.mean(0)) ** 2, 1))))


def simulate(
    switch: int, local: int, *, momentum: float = 0.9, ahead: float = 0.0, shared_ahead: bool = True
) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    """Parameters, momenta and consensus distances; with extrapolation, if ``ahead``."""
    x, m = np.broadcast_to(START, (N, 3)), np.zeros((N, 3))
    seen, momenta, distances = [], [], [0.0]

    def mean(a: np.ndarray) -> np.ndarray:
        return np.broadcast_to(a.mean(0), a.shape)

    for t in range(STEPS):
        direction = gradient(x)
        if t < switch and shared_ahead:
            direction = mean(direction)
        g = gradient(x - ahead * direction)
        if t < switch:
            g = mean(g)
        m = momentum * m + g
        x = x - 0.1 * m
        if t >= switch and (t - switch + 1) % local == 0:
            distances.append(spread(x))
            x = mean(x)  # and not the momentum
        else:
            distances.append(distances[-1])
        seen.append(x)
        momenta.append(m)
    return np.stack(seen), momenta, distances[1:]


@pytest.mark.parametrize("mode", WORKER_MODES)
def test_before_at_and_after_the_switch(x64: None, mode: str) -> None:
    tx = oa.post_local_sgd(
        optax.sgd(0.1, 0.9), local_steps=LOCAL, switch_step=SWITCH, axis_name="workers"
    )
    seen, states = run(tx, mode)
    expected, momenta, distances = simulate(SWITCH, LOCAL)
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    spreads = [spread(x) for x in seen]
    together = [0, 1, 2, 4, 6]  # three shared steps, then every second one is averaged
    assert max(spreads[t] for t in together) < 1e-15
    assert min(spreads[t] for t in (3, 5, 7)) > 1e-2
    for state, momentum, distance in zip(states, momenta, distances, strict=True):
        np.testing.assert_allclose(optax.tree.get(state, "trace"), momentum, rtol=1e-12)
        np.testing.assert_allclose(state.consensus_distance, np.full(N, distance), rtol=1e-6)
    assert spread(states[-1].inner_state[0].trace) > 1e-2  # each worker keeps its own


@pytest.mark.parametrize(("switch", "local"), [(0, 1), (0, 3), (STEPS, 2), (1, 5)])
def test_other_switches_and_periods(x64: None, switch: int, local: int) -> None:
    tx = oa.post_local_sgd(
        optax.sgd(0.1, 0.9), local_steps=local, switch_step=switch, axis_name="workers"
    )
    np.testing.assert_allclose(run(tx)[0], simulate(switch, local)[0], rtol=1e-12)


def test_until_the_switch_it_is_the_inner_method_on_the_mean_gradient() -> None:
    """Here Adam, whose moments would tell."""
    tx = oa.post_local_sgd(optax.adam(0.1), local_steps=4, switch_step=STEPS, axis_name="workers")
    seen, _ = run(tx)
    x, state = jnp.asarray(START, jnp.float32), optax.adam(0.1).init(jnp.zeros(3))
    for actual in seen:
        mean = gradient(np.broadcast_to(x, (N, 3))).mean(0)
        updates, state = optax.adam(0.1).update(jnp.asarray(mean, jnp.float32), state, x)
        x = optax.apply_updates(x, updates)
        np.testing.assert_allclose(actual, np.broadcast_to(x, (N, 3)), rtol=1e-5)


def test_one_worker_is_the_inner_method_bit_for_bit() -> None:
    inner = optax.sgd(0.1, 0.9, nesterov=True)
    left, right = oa.post_local_sgd(inner, local_steps=LOCAL, switch_step=SWITCH), inner
    params = jnp.asarray(START, jnp.float32)
    states, x = [left.init(params), right.init(params)], [params, params]
    for _ in range(STEPS):
        for k, tx in enumerate((left, right)):
            updates, states[k] = tx.update(jnp.sinh(x[k]), states[k], x[k])
            x[k] = optax.apply_updates(x[k], updates)
    np.testing.assert_array_equal(*x)


# -- combined with other methods ------------------------------------------------------------------


@pytest.mark.parametrize("mode", WORKER_MODES)
def test_extragradient_inside(x64: None, mode: str) -> None:
    """The loss it is given averages before the switch: all extrapolate with the mean gradient."""
    inner = oa.extragradient(optax.sgd(0.1, 0.9), 0.2)
    seen, _ = run(
        oa.post_local_sgd(inner, local_steps=LOCAL, switch_step=SWITCH, axis_name="workers"), mode
    )
    np.testing.assert_allclose(seen, simulate(SWITCH, LOCAL, ahead=0.2)[0], rtol=1e-12)


def test_extragradient_outside(x64: None) -> None:
    """Each worker extrapolates with its own gradient throughout."""
    tx = oa.post_local_sgd(
        optax.sgd(0.1, 0.9), local_steps=LOCAL, switch_step=SWITCH, axis_name="workers"
    )
    seen, _ = run(oa.extragradient(tx, 0.2))
    expected = simulate(SWITCH, LOCAL, ahead=0.2, shared_ahead=False)[0]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    assert np.abs(expected - simulate(SWITCH, LOCAL, ahead=0.2)[0]).max() > 1e-3


def test_curvature_inside(x64: None) -> None:
    """Before the switch the dominant direction is the mean Hessian's, then the worker's own."""
    tx = oa.post_local_sgd(
        oa.dom_sgd(0.1, 1, tracker=oa.ExactTracker(refresh_every=1)),
        local_steps=10,
        switch_step=1,
        axis_name="workers",
    )
    seen, _ = run(tx, num_steps=2)
    first = np.linalg.eigh(HESSIANS.mean(0))[1][:, -1]
    x = np.broadcast_to(START, (N, 3))
    x = x - 0.1 * np.outer(np.ones(N), first * (first @ gradient(x).mean(0)))
    np.testing.assert_allclose(seen[0], x, rtol=1e-6)
    own = np.linalg.eigh(HESSIANS)[1][:, :, -1]
    x = x - 0.1 * own * np.sum(own * gradient(x), 1, keepdims=True)
    np.testing.assert_allclose(seen[1], x, rtol=1e-6)


def test_line_search_inside(x64: None) -> None:
    """Value, gradient and loss are averages before the switch; no Objective is needed."""
    inner = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20))
    tx = oa.post_local_sgd(inner, local_steps=LOCAL, switch_step=SWITCH, axis_name="workers")

    def step(x: Any, state: Any, i: Any) -> Any:
        own = lambda x: loss(x, i)  # noqa: E731
        value, grads = jax.value_and_grad(own)(x)
        updates, state = tx.update(grads, state, x, value=value, grad=1 * grads, value_fn=own)
        return optax.apply_updates(x, updates), state

    step = over_workers("vmap", step, N)
    x = np.broadcast_to(START, (N, 3))
    state, values = jax.vmap(tx.init)(x), [np.mean([loss(START, i) for i in range(N)])]
    for _ in range(SWITCH):
        x, state = step(x, state, np.arange(N))
        assert spread(np.asarray(x)) == 0
        values.append(np.mean([loss(a, i) for i, a in enumerate(x)]))
    assert np.all(np.diff(values) < 0)
    x, state = step(x, state, np.arange(N))
    assert spread(np.asarray(x)) > 1e-3


def test_arguments_of_the_loss_are_passed_on(x64: None) -> None:
    tx = oa.post_local_sgd(
        oa.extragradient(optax.sgd(0.1, 0.9), 0.2),
        local_steps=LOCAL,
        switch_step=SWITCH,
        axis_name="workers",
    )

    def step(x: Any, state: Any, i: Any) -> Any:
        return tx.update(jax.grad(loss)(x, i), state, x, value_fn=loss, i=i)[0]

    x = np.broadcast_to(START, (N, 3))
    updates = over_workers("vmap", step, N)(x, jax.vmap(tx.init)(x), np.arange(N))
    np.testing.assert_allclose(x + updates, simulate(SWITCH, LOCAL, ahead=0.2)[0][0], rtol=1e-12)


# -- communication --------------------------------------------------------------------------------


def test_communication(x64: None) -> None:
    """One all-reduce of the gradient, or one of the parameters, each under its condition."""
    tx = oa.post_local_sgd(
        optax.sgd(0.1, 0.9), local_steps=LOCAL, switch_step=SWITCH, axis_name="workers"
    )

    def step(x: Any, state: Any) -> Any:
        return tx.update(x, state, x)

    x = {"a": np.zeros((N, 5)), "b": np.zeros((N, 2))}
    lowered = over_workers("shard_map", step, N).lower(x, jax.vmap(tx.init)(x))
    text, compiled = lowered.as_text(), lowered.compile().as_text()
    # By leaf: the gradient, the parameters; and the consensus distance.
    assert text.count('"stablehlo.all_reduce"') == 2 + 2 + 1
    assert text.count('"stablehlo.case"') == 2
    assert compiled.count(" all-reduce(") == 1 + 1 + 1
    assert text.count("collective_permute") == text.count("all_gather") == 0


def test_narrow_parameters_average_in_float32() -> None:
    tx = oa.post_local_sgd(optax.sgd(0.5), local_steps=1, switch_step=0, axis_name="workers")
    x = jnp.asarray(RNG.normal(size=(N, 50)), jnp.bfloat16)
    step = over_workers("vmap", lambda x, s: tx.update(jnp.zeros_like(x), s, x), N)
    updates, state = step(x, jax.vmap(tx.init)(x))
    assert updates.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    tree_allclose(updates, jnp.asarray(exact.mean(0) - exact, jnp.bfloat16), rtol=2**-8)
    np.testing.assert_allclose(state.consensus_distance[0], spread(exact), rtol=1e-5)
