"""Ensembles: what their averages are worth, how they are trained, the command as a person types it.

Members and snapshots are held against runs written out here, step by step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.calibration import calibration_curve

import models
import optax_accel as oa
from experiments import data, methods
from experiments import ensembles as command
from experiments.training import comparison, ensembles, networks
from experiments.training.calibration import average, calibration_error, scores
from experiments.training.ensembles import train_members, train_snapshots
from experiments.training.replicas import Plan
from experiments.training.step import init_state, train_step

SGD = methods.METHODS["sgd"]
TINY = ["--steps", "12", "--members", "3", "--seeds", "2", "--learning-rates", "0.1,0.3"]


@functools.cache
def plan(steps: int = 6, seeds: int = 1, **settings: Any) -> Plan:
    return comparison.plan("digits", ["sgd"], steps=steps, seeds=seeds, batch_size=32, **settings)


def random_probabilities(*shape: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=2.0, size=shape)
    return np.asarray(jax.nn.softmax(logits), np.float64)


# What probabilities are worth -------------------------------------------------------------------


def test_calibrated_predictions_have_no_error() -> None:
    """Three confidences, each as often right as it says."""
    rows, labels = [], []
    for confidence, right, examples in ((0.6, 3, 5), (0.8, 4, 5), (1.0, 7, 7)):
        rows += [[confidence, 1 - confidence]] * examples
        labels += [0] * right + [1] * (examples - right)
    assert calibration_error(rows, labels) == pytest.approx(0.0, abs=1e-15)
    # In one bin only the means count; these agree too.
    assert calibration_error(rows, labels, bins=1) == pytest.approx(0.0, abs=1e-15)


def test_sure_and_wrong_is_the_worst() -> None:
    assert calibration_error(np.eye(3)[[0, 1, 2]], [1, 2, 0]) == 1.0
    assert calibration_error(np.eye(3)[[0, 1, 2]], [0, 1, 2]) == 0.0


def test_calibration_error_by_hand() -> None:
    # Bins (0, 0.5], (0.5, 1]. First: 0.4 right, 0.5 wrong: |0.5 - 0.45| = 0.05, of 2 examples.
    # Second: 0.7 wrong, 0.9 right, 0.9 right: |2/3 - 2.5/3| = 0.5/3, of 3 examples.
    rows = [[0.4, 0.3, 0.3], [0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.9, 0.1, 0]]
    expected = 2 / 5 * 0.05 + 3 / 5 * 0.5 / 3
    assert calibration_error(rows, [0, 1, 2, 1, 0], bins=2) == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 4, 15, 50])
def test_calibration_error_is_that_of_scikit_learn_s_curve(bins: int) -> None:
    probabilities = random_probabilities(500, 4)
    labels = np.random.default_rng(1).integers(0, 4, 500)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    accuracies, confidences = calibration_curve(right, confidence, n_bins=bins)
    place = np.ceil(confidence * bins).astype(int)  # (b - 1) / B < confidence <= b / B
    counts = np.bincount(place)[np.unique(place)]
    expected = np.sum(counts * np.abs(accuracies - confidences)) / 500
    assert calibration_error(probabilities, labels, bins) == pytest.approx(expected, rel=1e-12)


def test_float32_rounding_is_no_error() -> None:
    outputs = np.random.default_rng(0).normal(scale=20, size=(200, 10)).astype(np.float32)
    found = scores(jax.nn.softmax(outputs), np.zeros(200, int))
    assert 0 < found["calibration_error"] <= 1


def test_scores_by_hand() -> None:
    found = scores([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], [0, 1], bins=2)
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(1.5 * math.log(2))
    assert found["calibration_error"] == pytest.approx(0.0)
    assert scores([[1.0, 0.0]], [1])["nll"] == math.inf


def test_a_prediction_that_is_not_finite_is_a_failure() -> None:
    found = scores([[math.nan, 1.0], [0.5, 0.5]], [0, 0])
    assert (found["accuracy"], found["nll"]) == (0.0, math.inf)
    assert math.isnan(found["calibration_error"])


def test_an_average_is_never_less_likely_than_its_members() -> None:
    """Jensen: -log is convex."""
    members, labels = random_probabilities(7, 50, 3), np.arange(50) % 3
    mean = np.mean([scores(own, labels)["nll"] for own in members])
    assert scores(average(members), labels)["nll"] < mean


def test_an_ensemble_of_equal_members_is_the_member() -> None:
    member = random_probabilities(20, 5)
    np.testing.assert_allclose(average([member] * 4), member, rtol=1e-15)


def test_the_last_members_are_averaged() -> None:
    members = random_probabilities(4, 20, 5)
    np.testing.assert_array_equal(average(members, 1), members[3])
    np.testing.assert_allclose(average(members, 2), (members[2] + members[3]) / 2, rtol=1e-15)
    np.testing.assert_array_equal(average(members, 4), average(members))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration_error([0.5, 0.5], [0]), r"\(examples, classes\).*got \(2,\)"),
        (lambda: calibration_error([[0.5, 0.5]], [0, 1]), r"got \(1, 2\) and \(2,\)"),
        (lambda: calibration_error(np.zeros((0, 2)), []), "at least one example"),
        (lambda: calibration_error([[0.5, 0.6]], [0]), "add up to 1 in each row"),
        (lambda: calibration_error([[1.5, -0.5]], [0]), "must not be negative"),
        (lambda: calibration_error([[math.nan, 1.0]], [0]), "add up to 1 in each row"),
        (lambda: calibration_error([[0.5, 0.5]], [2]), "`labels` must lie between 0 and 1, got 2"),
        (lambda: calibration_error([[0.5, 0.5]], [0], bins=0), "`bins` must be at least 1, got 0"),
        (lambda: average(np.ones((0, 2, 2))), "at least one member"),
        (lambda: average([[0.5, 0.5]]), r"\(members, examples, classes\)"),
        (lambda: average([[[0.5, 0.5]]], 2), "between 1 and the 1 members, got 2"),
        (lambda: average([[[0.5, 0.5]]], 0), "between 1 and the 1 members, got 0"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Training ---------------------------------------------------------------------------------------


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


# The command ------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    try:
        return command.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "ensembles-digits-sgd"
    assert {path.name for path in folder.iterdir()} == {"results.json", "ensembles.png", "run.lock"}
    assert (folder / "ensembles.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text())
    assert record["options"]["members"] == 3
    single, independent, snapshot = record["kinds"]
    assert [kind["members"] for kind in record["kinds"]] == [1, 3, 3]
    for kind in (single, independent, snapshot):
        # Equal budgets.
        assert (kind["steps"], kind["gradient_evaluations"]) == (12, 12.0)
        assert kind["learning_rate"] in (0.1, 0.3)
        assert [row["learning_rate"] for row in kind["validation"]] == [0.1, 0.3]
        best = max(kind["validation"], key=lambda row: (row["accuracy"], -row["nll"]))
        assert kind["learning_rate"] == best["learning_rate"]
        assert kind["kind"] in out
        assert len(kind["seeds"]) == 2
        for seed in kind["seeds"]:
            for split in ("validation", "test"):
                rows = seed[split]
                assert len(rows["members"]) == len(rows["averages"]) == kind["members"]
                assert rows["averages"][0] == rows["members"][-1]
                mean = np.mean([row["nll"] for row in rows["members"]])
                assert rows["averages"][-1]["nll"] <= mean + 1e-9
                assert all(0 <= row["calibration_error"] <= 1 for row in rows["members"])
        accuracies = [seed["test"]["averages"][-1]["accuracy"] for seed in kind["seeds"]]
        assert f"{100 * np.mean(accuracies):.2f} ±" in out
    assert "an end of the rates" in out
    assert "independent:" in out
    # The numbers are those of the functions.
    (expected, _) = train_snapshots(plan_of_the_command(), SGD, [snapshot["learning_rate"]], 3)
    found = snapshot["seeds"][0]["test"]["averages"][-1]
    for key, value in expected.scores("test")["averages"][-1].items():
        assert found[key] == pytest.approx(value, rel=1e-4)

    # The same command gives the same numbers.
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    assert json.loads((folder / "results.json").read_text())["kinds"] == record["kinds"]


def plan_of_the_command() -> Plan:
    return comparison.plan("digits", ["sgd"], steps=12, seeds=2)


def test_one_kind_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kind", "independent", "--members", "2", "--steps", "5", "--seeds", "1"]
    arguments += ["--schedule", "constant", "--learning-rates", "0.1", "--bins", "5"]
    assert run(*arguments, "--name", "mine", "--runs-dir", str(tmp_path)) == 0
    (kind,) = json.loads((tmp_path / "mine/results.json").read_text())["kinds"]
    assert (kind["kind"], kind["steps"], kind["learning_rate"]) == ("independent", 4, 0.1)
    share = comparison.plan("digits", ["sgd"], steps=2, seeds=1)
    (expected,) = train_members(share, SGD, [0.1], 2)
    found = kind["seeds"][0]["test"]["averages"][-1]
    value = expected.scores("test", 5)["averages"][-1]
    assert found == pytest.approx(value, rel=1e-4)
    out = capsys.readouterr().out
    assert "snapshot" not in out
    assert "an end of the rates" not in out  # there is only one


def test_a_training_that_fails_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY[:6], "--learning-rates", "3e38", "--kind", "snapshot"]
    assert run(*arguments, "--runs-dir", str(tmp_path)) == 0
    assert "diverged" in capsys.readouterr().out
    record = json.loads((tmp_path / "ensembles-digits-sgd/results.json").read_text())
    last = record["kinds"][0]["seeds"][0]["test"]["averages"][-1]
    assert last == {"accuracy": 0.0, "nll": None, "calibration_error": None}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "bagging"], ["'bagging'", "single, independent, snapshot, all"]),
        (["--method", "sgdd"], ["'sgdd'", "demon_sgd"]),
        (["--method", "decentlam"], ["decentlam needs workers", "experiments.train"]),
        (["--task", "digit"], ["'digit'", "cifar10"]),
        (["--model", "mlpp"], ["'mlpp'", "resnet20"]),
        (["--schedule", "step"], ["'step'", "cosine, constant"]),
        (["--members", "0"], ["--members must be at least 1, got 0"]),
        (["--bins", "0"], ["--bins must be at least 1, got 0"]),
        (["--members", "9", "--steps", "8"], ["--members 9", "8 steps", "raise --steps"]),
        (["--members", "6", "--steps", "10"], ["5 cycles of 2, not 6", "take 12 steps"]),
        (["--learning-rates", "0.1,x"], ["--learning-rates", "'0.1,x'"]),
        (["--learning-rates", "0"], ["must be positive numbers", "'0'"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--name", "../x"], ["--name", "'../x'"]),
        (["--kinds", "single"], ["--kinds", "--members"]),
    ],
)
def test_wrong_input_is_explained_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    assert run(*arguments, "--runs-dir", str(tmp_path / "runs")) == 2
    captured = capsys.readouterr()
    for part in expected:
        assert part in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_another_command_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    for name in ("config.json", "results.json"):
        (tmp_path / "a" / name).write_text("{}")
        assert run(*TINY, "--runs-dir", str(tmp_path), "--name", "a") == 2
        assert "a holds something else than python -m exp" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "a").iterdir()] == [name]
        (tmp_path / "a" / name).unlink()
