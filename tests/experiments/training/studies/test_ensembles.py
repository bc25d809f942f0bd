"""How ensembles are trained: members and snapshots against runs written out here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import models
import optax_accel as oa
from experiments import data, methods
from experiments.training import networks
from experiments.training.replicas import Plan
from experiments.training.step import init_state, train_step
from experiments.training.studies import comparison, ensembles
from experiments.training.studies.ensembles import train_members, train_snapshots

SGD = methods.METHODS["sgd"]


@functools.cache
def plan(steps: int = 6, seeds: int = 1, **settings: Any) -> Plan:
    return comparison.plan("digits", ["sgd"], steps=steps, seeds=seeds, batch_size=32, **settings)


def alone(
    plan: Plan,
    runs: list[tuple[float, int]],
    *,
    schedule: Callable[[Any], Any] = lambda rate: rate,
    method: methods.Method = SGD,
) -> list[list[Any]]:
    """(params, rest) after 0, 1, ... steps of each run (learning rate, seed), written out."""
    task = plan.task
    shapes = {"input_shape": task.input_shape, "num_classes": task.num_classes}

    def build(rate: Any, seed: int) -> Any:
        kwargs = {"total_steps": plan.steps, "num_classes": task.num_classes, "seed": seed}
        return method.build(schedule(rate), **kwargs)

    @jax.jit
    def step(rate: Any, state: Any, x: Any, y: Any) -> Any:
        objective = networks.objective(graphdef)
        return train_step(build(rate, 0), objective, state, {"x": x, "y": y})[0]

    histories = []
    for rate, seed in runs:
        graphdef, params, rest = networks.split(models.create(plan.model, rngs=seed, **shapes))
        state = init_state(build(rate, seed), params, rest)
        history = [(state.params, state.rest)]
        batches = data.index_batches(len(task.train), batch_size=plan.batch_size, seed=seed)
        for _ in range(plan.steps):
            index = next(batches)
            state = step(rate, state, task.train.x[index], task.train.y[index])
            history.append((state.params, state.rest))
        histories.append(history)
    return histories


def assert_close(actual: Any, expected: Any, rtol: float = 2e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()),
        actual,
        expected,
    )


def test_members_trained_together_are_those_trained_alone() -> None:
    small = plan(steps=6, seeds=2)
    found = train_members(small, SGD, [0.1, 0.3], 3)
    assert [(e.learning_rate, e.seed) for e in found] == [(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1)]
    for ensemble in found:
        assert (ensemble.steps, ensemble.gradient_evaluations) == (18, 18.0)
    runs = [(rate, seed) for rate in (0.1, 0.3) for seed in (0, 2, 4, 1, 3, 5)]
    together = [member for ensemble in found for member in ensemble.members]
    assert_close(together, [history[-1] for history in alone(small, runs)])
    # One by one, and in chunks the last of which is not full.
    for most in (1, 5):
        other = train_members(small, SGD, [0.1, 0.3], 3, max_replicas=most)
        assert_close(together, [member for ensemble in other for member in ensemble.members])
        for a, b in zip(found, other, strict=True):
            assert_close(a.probabilities, b.probabilities)


def test_members_differ_in_weights_and_batches() -> None:
    (ensemble,) = train_members(plan(), SGD, [0.1], 3)
    probabilities = ensemble.probabilities["test"]
    assert probabilities.shape == (3, 360, 10)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-12)
    for i in range(3):
        for j in range(i):
            assert np.abs(probabilities[i] - probabilities[j]).max() > 0.01


def test_probabilities_are_the_softmax_of_the_models() -> None:
    small = plan()
    (ensemble,) = train_members(small, SGD, [0.1], 1)
    ((params, rest),) = ensemble.members
    model = models.create("mlp", input_shape=(8, 8, 1), num_classes=10)
    graphdef, _, _ = networks.split(model)
    for name, split in (("validation", small.task.validation), ("test", small.task.test)):
        np.testing.assert_array_equal(ensemble.labels[name], split.y)
        expected = networks.evaluate(graphdef, params, rest, {"x": split.x, "y": split.y})
        found = ensemble.scores(name)
        assert found["members"] == found["averages"]
        assert found["members"][0]["accuracy"] == pytest.approx(float(expected["accuracy"]))
        assert found["members"][0]["nll"] == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_a_schedule_reaches_the_members() -> None:
    small = plan(steps=6)
    schedule = ensembles.SCHEDULES["cosine"]
    (ensemble,) = train_members(small, SGD, [0.3], 1, schedule=lambda rate: schedule(rate, 6))
    (history,) = alone(small, [(0.3, 0)], schedule=lambda rate: oa.snapshot_schedule(rate, 6, 1))
    assert_close(ensemble.members, history[-1:])


def test_snapshots_are_the_states_at_the_ends_of_the_cycles() -> None:
    small = plan(steps=8, seeds=2)  # cycles of 3, 3 and 2 steps
    found = train_snapshots(small, SGD, [0.1, 0.3], 3)
    assert [(e.learning_rate, e.seed) for e in found] == [(0.1, 0), (0.1, 1), (0.3, 0), (0.3, 1)]
    histories = alone(
        small,
        [(ensemble.learning_rate, ensemble.seed) for ensemble in found],
        schedule=lambda rate: oa.snapshot_schedule(rate, 8, 3),
    )
    for ensemble, history in zip(found, histories, strict=True):
        assert (ensemble.steps, ensemble.gradient_evaluations) == (8, 8.0)
        assert_close(ensemble.members, [history[t] for t in (3, 6, 8)])
    for a, b in zip(found, train_snapshots(small, SGD, [0.1, 0.3], 3, max_replicas=1), strict=True):
        assert_close(a.probabilities, b.probabilities)


def test_the_first_snapshot_is_the_first_member_after_one_cycle() -> None:
    (snapshots,) = train_snapshots(plan(steps=9), SGD, [0.3], 3)
    (members,) = train_members(
        plan(steps=3), SGD, [0.3], 3, schedule=lambda rate: oa.snapshot_schedule(rate, 3, 1)
    )
    assert_close(snapshots.members[0], members.members[0])
    (single,) = train_snapshots(plan(steps=3), SGD, [0.3], 1)
    assert_close(single.members[0], members.members[0])


def test_adam_and_the_method_s_own_seed() -> None:
    small, method = plan(steps=4), methods.METHODS["stoch_grad_adam"]
    (ensemble,) = train_members(small, method, [0.01], 2)
    histories = alone(small, [(0.01, 0), (0.01, 1)], method=method)
    assert_close(ensemble.members, [history[-1] for history in histories], rtol=1e-4)


def test_the_cost_counts_extra_gradients() -> None:
    (ensemble,) = train_members(plan(steps=2), methods.METHODS["extrap_sgd"], [0.1], 3)
    assert (ensemble.steps, ensemble.gradient_evaluations) == (6, 12.0)


def test_convolutions() -> None:
    """On a CPU these train one by one."""
    small = dataclasses.replace(plan(steps=2), model="cnn", batch_size=8)
    members, snapshots = (
        train(small, SGD, [0.1], 2)[0] for train in (train_members, train_snapshots)
    )
    for ensemble in (members, snapshots):
        assert ensemble.probabilities["test"].shape == (2, 360, 10)
        np.testing.assert_allclose(ensemble.probabilities["test"].sum(axis=-1), 1, rtol=1e-12)
    (history,) = alone(small, [(0.1, 0)])
    assert_close(members.members[0], history[-1], rtol=1e-4)


class WithState(nnx.Module):
    """A model with running statistics and dropout."""

    def __init__(self, *, rngs: int, **_: Any):
        streams = nnx.Rngs(rngs)
        self.linear = nnx.Linear(64, 10, rngs=streams)
        self.norm = nnx.BatchNorm(64, momentum=0.5, rngs=streams)
        self.dropout = nnx.Dropout(0.5, rngs=streams)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(self.dropout(self.norm(x.reshape(len(x), -1))))


def test_running_statistics_and_random_streams_belong_to_the_member(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "create", lambda name, **settings: WithState(**settings))
    small = plan(steps=4, seeds=2)
    members = train_members(small, SGD, [0.1], 2)
    snapshots = train_snapshots(small, SGD, [0.1], 2)

    def numbers(member: Any) -> Any:
        keys = jax.dtypes.prng_key
        return jax.tree.map(
            lambda leaf: (
                jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, keys) else leaf
            ),
            member,
        )

    fixed = alone(small, [(0.1, seed) for seed in (0, 2, 1, 3)])
    found = [member for ensemble in members for member in ensemble.members]
    assert_close(numbers(found), numbers([history[-1] for history in fixed]))
    cyclic = alone(
        small, [(0.1, 0), (0.1, 1)], schedule=lambda rate: oa.snapshot_schedule(rate, 4, 2)
    )
    found = [member for ensemble in snapshots for member in ensemble.members]
    assert_close(numbers(found), numbers([history[t] for history in cyclic for t in (2, 4)]))
    # The statistics moved, and predictions use them and no dropout.
    statistics = found[0][1]["norm"]["mean"], found[1][1]["norm"]["mean"]
    assert np.abs(statistics[0] - statistics[1]).max() > 1e-3
    graphdef = networks.split(WithState(rngs=0))[0]
    batch = {"x": small.task.test.x, "y": small.task.test.y}
    for i, (params, rest) in enumerate(snapshots[0].members):
        expected = networks.evaluate(graphdef, params, rest, batch)
        assert snapshots[0].scores("test")["members"][i]["nll"] == pytest.approx(
            float(expected["loss"]), rel=1e-5
        )


def test_an_ensemble_of_trained_members_is_more_likely_than_they_are() -> None:
    for ensemble in (
        *train_members(plan(steps=20), SGD, [0.1], 3),
        *train_snapshots(plan(steps=20), SGD, [0.3], 4),
    ):
        found = ensemble.scores("test")
        members = [row["nll"] for row in found["members"]]
        assert len(found["averages"]) == len(members) == len(ensemble.members)
        for last, row in enumerate(found["averages"], 1):
            assert row["nll"] <= np.mean(members[-last:]) + 1e-12
        assert found["averages"][0] == found["members"][-1]
        assert max(row["accuracy"] for row in found["members"]) > 0.5  # learned something


def test_a_diverged_rate_is_not_chosen() -> None:
    found = train_members(plan(steps=20), SGD, [3e38, 0.1], 2)
    assert found[0].scores("test")["averages"][-1]["nll"] == math.inf
    assert found[0].scores("test")["averages"][-1]["accuracy"] == 0.0
    assert ensembles.best_rate(found) == 0.1


def test_the_rate_is_chosen_by_accuracy_then_likelihood() -> None:
    def ensemble(rate: float, right: float) -> Any:
        probabilities = np.array([[[right, 1 - right]]])
        return ensembles.Ensemble(
            rate, 0, 1, 1.0, [], {"validation": probabilities}, {"validation": np.array([0])}
        )

    assert ensembles.best_rate([ensemble(0.1, 0.4), ensemble(0.2, 0.6), ensemble(0.3, 0.3)]) == 0.2
    assert ensembles.best_rate([ensemble(0.1, 0.6), ensemble(0.2, 0.7), ensemble(0.3, 0.6)]) == 0.2
    # Over the seeds the mean counts.
    several = [ensemble(0.1, 0.9), ensemble(0.1, 0.1), ensemble(0.2, 0.6), ensemble(0.2, 0.6)]
    assert ensembles.best_rate(several) == 0.2


@pytest.mark.parametrize("train", [train_members, train_snapshots])
def test_wrong_settings_are_refused(train: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="at least 1 member, got 0"):
        train(plan(), SGD, [0.1], 0)
    with pytest.raises(ValueError, match="decentlam needs workers of its own"):
        train(plan(), methods.METHODS["decentlam"], [0.1], 2)
    with pytest.raises(ValueError, match="loss 'cross_entropy', got 'mse'"):
        train(plan(loss="mse"), SGD, [0.1], 2)


def test_cycles_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="7 members need at least 7 steps, got 6"):
        train_snapshots(plan(steps=6), SGD, [0.1], 7)
    with pytest.raises(ValueError, match="are 5 cycles of 2, not 6; for 6 members take 12 steps"):
        train_snapshots(plan(steps=10), SGD, [0.1], 6)
    assert ensembles.snapshot_cycle(10, 4) == 3
    assert ensembles.snapshot_cycle(10, 10) == 1
