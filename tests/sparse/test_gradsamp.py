"""Epochs sampled from how the last one moved the parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel.refresh import of_damping, of_eigenspace, of_factors, of_sampling
from tests.helpers import least_squares, tree_allclose, tree_equal

PROBLEM = least_squares()
DELTA = {"a": np.float32([0.5, 0.0, -1.0]), "b": np.float32([[2.0, -2.0]])}
STEPS, EPOCHS = 3, 7  # of which 2, 4 and 6 are sampled


def build(**changes: Any) -> optax.GradientTransformationExtraArgs:
    inner = optax.adam(optax.exponential_decay(0.1, 2, 0.8))
    return oa.gradsamp(inner, **{"steps_per_epoch": STEPS, "period": 2, "start": 1} | changes)


@functools.partial(jax.jit, static_argnames=("tx", "refresh"))
def step(tx: Any, params: Any, state: Any, refresh: Any = None) -> Any:
    gradient = PROBLEM.objective().grad(params)
    updates, state = tx.update(gradient, state, params, refresh=refresh)
    return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def paths() -> tuple[list[Any], list[Any], list[Any]]:
    """Parameters and states from the start on, decided in the graph and driven from the host."""
    tx = build()
    decided = [(PROBLEM.params, tx.init(PROBLEM.params))]
    driven, forms = list(decided), []
    for i in range(STEPS * EPOCHS):
        forms.append(oa.refresh_at(i, tx))
        decided.append(step(tx, *decided[-1]))
        driven.append(step(tx, *driven[-1], refresh=forms[-1]))
    return decided, driven, forms


def test_golden_statistics() -> None:
    """Mean and population standard deviation of (.5, 0, -1), and of both tensors together."""
    entries = np.concatenate([leaf.ravel() for leaf in DELTA.values()]).astype(np.float64)
    np.testing.assert_allclose(DELTA["a"].mean(), -0.1666666667, rtol=1e-6)

    @jax.jit
    def samples(statistics_scale: Any, delta: Any) -> Any:
        zero = jax.tree.map(jnp.zeros_like, delta)
        return {
            name: oa.sample_epoch(3, delta, zero, statistics=name, scale=statistics_scale)
            for name in ("tensor", "model", "element")
        }

    unit = {"a": np.float32([1.5**0.5, 0.0, -(1.5**0.5)]), "b": np.float32([[1.0, -1.0]])}
    mean, spread, noise = samples(0.0, DELTA), samples(1.0, DELTA), samples(1.0, unit)["tensor"]
    moved = jax.tree.map(lambda x, y: x - y, mean, dict.fromkeys(mean, DELTA))
    deviation = jax.tree.map(
        lambda x, y, z, u: (x - y) / (z - u),
        spread,
        mean,
        *(dict.fromkeys(mean, t) for t in (noise, unit)),
    )
    np.testing.assert_allclose(moved["tensor"]["a"], -0.1666666667, rtol=1e-5)
    np.testing.assert_allclose(deviation["tensor"]["a"], 0.6236095645, rtol=1e-5)
    np.testing.assert_allclose(moved["tensor"]["b"], 0.0, atol=1e-6)
    np.testing.assert_allclose(deviation["tensor"]["b"], 2.0, rtol=1e-5)
    for leaf in DELTA:
        np.testing.assert_allclose(moved["model"][leaf], entries.mean(), rtol=1e-5)
        np.testing.assert_allclose(deviation["model"][leaf], entries.std(), rtol=1e-5)
        np.testing.assert_allclose(moved["element"][leaf], DELTA[leaf], rtol=1e-6)
        np.testing.assert_allclose(deviation["element"][leaf], np.abs(DELTA[leaf]), atol=1e-6)


def test_samples_are_normal_and_follow_the_key() -> None:
    end = jnp.asarray(DELTA["a"])
    sample = jax.vmap(lambda key: oa.sample_epoch(key, end, jnp.zeros(3)))
    many = jax.jit(sample)(jax.random.split(jax.random.key(0), 20_000))
    many = np.asarray(many) - DELTA["a"]
    np.testing.assert_allclose(many.mean(0), -0.16667, atol=0.015)  # 3.4 standard errors
    np.testing.assert_allclose(many.std(0), 0.62361, rtol=0.02)
    np.testing.assert_allclose(np.corrcoef(many.T), np.eye(3), atol=0.03)
    tree_equal(oa.sample_epoch(0, end, end), end)  # what did not move stays
    tree_equal(oa.sample_epoch(1, end, 0 * end), oa.sample_epoch(jax.random.key(1), end, 0 * end))
    assert not np.allclose(oa.sample_epoch(1, end, 0 * end), oa.sample_epoch(2, end, 0 * end))


def test_the_host_drives_what_the_graph_decides(paths: Any) -> None:
    decided, driven, forms = paths
    assert [forms[STEPS * epoch] for epoch in range(EPOCHS)] == [
        False,
        False,
        *["sample", False] * 2,
        "sample",
    ]
    assert [form == "sample" for form in forms] == [bool(s.epoch_sampled) for _, s in decided[1:]]
    tree_allclose(driven, decided, rtol=1e-5)


def test_a_sampled_epoch_moves_once_and_the_optimizer_stands_still(paths: Any) -> None:
    decided, _, forms = paths
    for i in range(STEPS * EPOCHS):
        (before, state), (after, new_state) = decided[i], decided[i + 1]
        same = np.array_equal(before["b"], after["b"])
        if forms[i] == "sample":
            tree_equal(new_state.inner_state, state.inner_state)
            assert same == (i % STEPS > 0)
        else:
            assert not same
    assert int(optax.tree.get(decided[-1][1].inner_state[0], "count")) == STEPS * 4


def test_an_epoch_is_sampled_from_the_increment_of_the_last_one(paths: Any) -> None:
    decided, _, _ = paths
    weights, noises = np.stack([params["dense"]["w"] for params, _ in decided]), []
    for first in (2 * STEPS, 4 * STEPS, 6 * STEPS):
        tree_equal(decided[first][1].epoch_start, decided[first - STEPS][0])
        delta = weights[first] - weights[first - STEPS]
        noises.append((weights[first + 1] - weights[first] - delta.mean()) / delta.std())
    assert 0.5 < np.std(noises) < 1.5
    noises = [noise.ravel() for noise in noises]
    assert np.max(np.corrcoef(noises) - np.eye(3)) < 0.9  # 8 numbers each, drawn anew


def test_without_samples_it_is_the_inner_optimizer() -> None:
    tx = build(start=100)
    inner = optax.adam(optax.exponential_decay(0.1, 2, 0.8))
    left, right = (
        (PROBLEM.params, tx.init(PROBLEM.params)),
        (PROBLEM.params, inner.init(PROBLEM.params)),
    )
    for _ in range(5):
        left = step(tx, *left, refresh=False)
        right = step(optax.with_extra_args_support(inner), *right)
    tree_equal(left[0], right[0])


def test_the_gradient_of_a_sampled_step_is_not_computed() -> None:
    tx = oa.gradsamp(optax.adam(0.1), 2, period=2, start=1)
    x = jnp.ones((512, 64))

    def train_step(params: Any, state: Any, refresh: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p) ** 2))(params)
        updates, state = tx.update(gradient, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    params = jnp.ones((64, 32))
    program = jax.jit(train_step, static_argnames="refresh")
    flops = {}
    for refresh in (False, "sample"):
        lowered = program.lower(params, tx.init(params), refresh)
        flops[refresh] = lowered.compile().cost_analysis()["flops"]
        assert ("dot_general" in lowered.as_text()) == (not refresh)
    assert flops["sample"] < flops[False] / 20


def test_the_rule_of_epochs() -> None:
    def skipped(**kwargs: Any) -> list[int]:
        return [epoch for epoch in range(30) if oa.skip_epoch(epoch, **kwargs)]

    assert skipped() == [7, 10, 13, 16, 19, 22, 25, 28]
    assert skipped(period=2, start=1) == list(range(2, 30, 2))
    always = [oa.skip_epoch(epoch, probability=1.0, start=3) for epoch in range(2, 7)]
    assert always == [False, True, False, True, False]
    assert not oa.skip_epoch(9, probability=0.0)

    def chosen_by(key: Any) -> list[int]:
        tx = oa.gradsamp(optax.sgd(0.1), 2, probability=0.4, start=1, key=key)
        return [epoch for epoch in range(30) if oa.refresh_at(2 * epoch, tx) == "sample"]

    chosen = chosen_by(7)
    assert chosen == chosen_by(jax.random.key(7))
    assert chosen != chosen_by(8)
    assert [oa.skip_epoch(e, probability=0.4, start=1, key=7) for e in chosen] == [True] * len(
        chosen
    )
    assert 3 < len(chosen) < 15
    assert min(np.diff(chosen)) > 1
    tx = oa.gradsamp(optax.sgd(0.1), 2, probability=0.4, start=1, key=7)
    state, params, seen = tx.init(jnp.ones(2)), jnp.ones(2), []
    update = jax.jit(tx.update)
    for _ in range(60):
        _, state = update(params, state, params)
        seen.append(bool(state.epoch_sampled))
    assert [e for e in range(30) if seen[2 * e]] == chosen


def test_what_is_inside_refreshes_by_the_steps_that_trained() -> None:
    tracker = oa.BlockTracker(refresh_every=4)
    tx = oa.gradsamp(oa.bulk_sgd(0.1, 1, tracker=tracker, start_step=5), 2, period=2, start=1)
    forms = [oa.refresh_at(i, tx) for i in range(18)]
    assert [i for i, form in enumerate(forms) if form == "sample"] == [4, 5, 8, 9, 12, 13, 16, 17]
    trained = [form for form in forms if form != "sample"]
    assert trained == [oa.refresh_at(i, refresh_every=4, start_step=5) for i in range(10)]
    schedule = oa.RefreshSchedule(tx)
    assert [schedule(i, ()) for i in range(18)] == forms
    assert (of_sampling("sample"), of_sampling("warm"), of_sampling(None)) == (True, False, None)
    assert [of("sample") for of in (of_eigenspace, of_factors, of_damping)] == [False] * 3
    assert "sampled epochs of 2 steps" in str(oa.describe(build(steps_per_epoch=2), jnp.ones(2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_epoch": 0}, "`steps_per_epoch` must be at least 1, got 0"),
        ({"period": 1}, "`period` must be at least 2, got 1"),
        ({"start": 0}, "`start` must be at least 1, got 0"),
        ({"period": None, "probability": 1.5}, r"`probability` must lie in \[0, 1\], got 1.5"),
        ({"probability": 0.5}, "either every `period`, got 2, or with a `probability`, got 0.5"),
        ({"statistics": "layer"}, "`statistics` must be one of 'tensor', 'model', 'element'"),
        ({"scale": -1.0}, r"`scale` must lie in \[0, inf\), got -1.0"),
    ],
)
def test_wrong_arguments(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_wrong_input() -> None:
    with pytest.raises(TypeError, match=r"gradsamp works on real floating-point .*\['n'\]"):
        build().init({"n": jnp.arange(3)})
    state = build().init(jnp.ones(2))
    with pytest.raises(ValueError, match="params"):
        build().update(jnp.ones(2), state)
    with pytest.raises(ValueError, match="`refresh` must be"):
        build().update(jnp.ones(2), state, jnp.ones(2), refresh="skip")
    with pytest.raises(ValueError, match="`previous` must have the structure and the shapes"):
        oa.sample_epoch(0, jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="`epoch` must be at least 0"):
        oa.skip_epoch(-1)
