"""What predicted probabilities are worth, by hand and by scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from experiments.training.studies.calibration import average, calibration_error, scores


def random_probabilities(*shape: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=2.0, size=shape)
    return np.asarray(jax.nn.softmax(logits), np.float64)


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
