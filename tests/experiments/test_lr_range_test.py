"""The learning-rate range test as a function and as a person types it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import lr_range_test
from experiments.training.range_test import range_test

TINY = ["--task", "digits", "--steps", "40", "--seeds", "2"]


def run(*arguments: str) -> int:
    try:
        return lr_range_test.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def replay(losses: Any) -> Any:
    """A training that meets the given losses, whatever the rates."""
    sequence = iter(losses)
    return lambda rate: next(sequence)


# The function ----------------------------------------------------------------------------------


def test_a_quadratic_diverges_where_theory_says() -> None:
    """Gradient descent on c w**2 / 2 diverges beyond 2 / c: a rate for every curvature."""
    rates = np.geomspace(1e-6, 1e4, 400)
    for curvature in (0.1, 1.0, 100.0):
        w = 1.0

        def advance(rate: float, curvature: float = curvature) -> float:
            nonlocal w
            loss = curvature * w**2 / 2
            w -= rate * curvature * w
            return loss

        result = range_test(advance, rates, smoothing=0.3)
        assert result.suggestion is not None
        assert result.stopped_at is not None
        assert 0.01 / curvature < result.suggestion < 1 / curvature
        assert result.suggestion < result.lowest < result.stopped_at
        assert 2 / curvature < result.stopped_at
        assert len(result.rates) == len(result.losses) == len(result.smoothed) < 400


def test_the_suggestion_does_not_lag() -> None:
    """The middle of a smooth fall is found however strong the average."""
    rates = np.geomspace(1e-4, 1.0, 201)
    losses = 1 - np.tanh((np.arange(201) - 100) / 20) / 2
    for smoothing in (0.0, 0.5, 0.9):
        result = range_test(replay(losses), rates, smoothing=smoothing)
        assert result.suggestion == pytest.approx(rates[100])
        assert result.stopped_at is None


def test_noise_is_averaged() -> None:
    rates = np.geomspace(1e-4, 1.0, 201)
    smooth = 1 - np.tanh((np.arange(201) - 100) / 20) / 2
    noise = 0.05 * np.random.default_rng(0).standard_normal(201)

    def error(smoothing: float) -> float:
        result = range_test(replay(smooth + noise), rates, smoothing=smoothing)
        assert result.suggestion is not None
        return abs(math.log(result.suggestion / rates[100]))

    assert error(0.9) < 20 * math.log(rates[1] / rates[0]) < error(0.0)


def test_a_huge_last_loss_does_not_spoil_what_came_before() -> None:
    rates = np.geomspace(1e-4, 1.0, 41)
    losses = 1 - np.tanh((np.arange(41) - 20) / 4) / 2
    calm = range_test(replay(losses), rates)
    losses[-1] = 1e9
    wild = range_test(replay(losses), rates)
    assert wild.stopped_at == rates[-1]
    assert wild.suggestion == calm.suggestion == pytest.approx(rates[20], rel=0.3)


def test_the_average_has_no_bias() -> None:
    result = range_test(replay([3.0] * 10), np.arange(1.0, 11.0), smoothing=0.99)
    np.testing.assert_allclose(result.smoothed, 3.0, rtol=1e-12)
    assert (result.suggestion, result.lowest, result.stopped_at) == (None, 1.0, None)


def test_the_end_is_where_the_average_leaves() -> None:
    # Averages with weight 1/2 and bias correction: 1, 1, 1, 29/15, 117/31 and 245/63 < 4, 501/127.
    losses = [1.0] * 3 + [2.75, 5.5, 4.0, 4.0] + [9.0] * 3
    result = range_test(replay(losses), np.arange(1.0, 11.0), smoothing=0.5)
    average, weight, expected = 0.0, 0.0, None
    for rate, loss in enumerate(losses, 1):
        average, weight = 0.5 * average + 0.5 * loss, 0.5 * weight + 0.5
        if average / weight > 4:
            expected = float(rate)
            break
    assert expected == 8.0
    assert result.stopped_at == expected
    assert len(result.losses) == 8  # the one that showed it is kept
    assert (
        range_test(replay(losses), np.arange(1.0, 11.0), smoothing=0.5, stop_factor=9).stopped_at
        is None
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_ends_the_test(bad: float) -> None:
    result = range_test(replay([3.0, 2.0, 1.0, bad, 0.0]), np.arange(1.0, 6.0), smoothing=0.0)
    assert result.stopped_at == 4.0
    np.testing.assert_array_equal(result.losses, [3, 2, 1])
    with pytest.raises(ValueError, match="not finite before the first step"):
        range_test(replay([bad, 1.0]), [0.1, 0.2])


@pytest.mark.parametrize(
    ("rates", "settings", "message"),
    [
        ([0.1], {}, "at least two positive numbers that rise"),
        ([0.0, 0.1], {}, "at least two positive numbers that rise"),
        ([0.2, 0.1], {}, "at least two positive numbers that rise"),
        ([0.1, math.inf], {}, "`rates` must be finite"),
        ([0.1, 0.2], {"smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\), got 1.0"),
        ([0.1, 0.2], {"stop_factor": 1.0}, "`stop_factor` must be more than 1, got 1.0"),
    ],
)
def test_wrong_arguments(rates: list[float], settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        range_test(replay([1.0] * 9), rates, **settings)


def test_median_of_rates() -> None:
    assert lr_range_test.median([0.1, 10.0, None]) == pytest.approx(1.0)
    assert lr_range_test.median([0.1, 0.2, 10.0]) == pytest.approx(0.2)
    assert lr_range_test.median([None]) is None


# The command -----------------------------------------------------------------------------------


def test_files_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "lr-range-digits-sgd"
    assert {path.name for path in folder.iterdir()} == {"results.json", "range.png", "run.lock"}
    assert (folder / "range.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text())
    assert f"suggested learning rate: {record['suggestion']:.2g}" in out
    # SGD with momentum 0.9 on the digits: the best rate of the grid is 0.1 or 0.3.
    assert 0.01 < record["suggestion"] < 0.5
    assert record["options"]["steps"] == 40
    one, two = record["tests"]
    for test in (one, two):
        number = len(test["rates"])
        assert number == len(test["losses"]) == len(test["smoothed"]) <= 40
        expected = np.geomspace(1e-4, 100, 40)[:number]
        np.testing.assert_allclose(test["rates"], expected, rtol=1e-6)
        assert test["losses"][0] == pytest.approx(math.log(10), rel=0.3)
        assert min(test["losses"]) < 1
        assert test["suggestion"] < test["lowest"] < test["stopped_at"]
    assert one["losses"][0] != two["losses"][0]

    # The same command gives the same numbers.
    before = (folder / "results.json").read_text()
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    assert json.loads(before)["tests"] == json.loads((folder / "results.json").read_text())["tests"]


def test_rates_reach_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates too small to move anything leave the loss where it is."""
    arguments = [*TINY, "--lowest", "1e-12", "--highest", "1e-10", "--name", "still"]
    arguments += ["--spacing", "linear", "--batch-size", "1000", "--seeds", "1", "--steps", "3"]
    assert run(*arguments, "--runs-dir", str(tmp_path)) == 0
    assert "the loss never left: a higher --highest may show more" in capsys.readouterr().out
    (test,) = json.loads((tmp_path / "still" / "results.json").read_text())["tests"]
    np.testing.assert_allclose(test["rates"], np.linspace(1e-12, 1e-10, 3))
    assert max(test["losses"]) - min(test["losses"]) < 0.1


def test_a_method_with_curvature(tmp_path: Path) -> None:
    arguments = ["--method", "bulk_sgd", "--steps", "22", "--seeds", "1", "--batch-size", "32"]
    assert run(*arguments, "--curvature-batch-size", "32", "--runs-dir", str(tmp_path)) == 0
    (test,) = json.loads((tmp_path / "lr-range-digits-bulk_sgd/results.json").read_text())["tests"]
    assert len(test["losses"]) > 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "sgdd"], ["'sgdd'", "demon_sgd"]),
        (["--method", "decentlam"], ["decentlam needs workers", "experiments.train"]),
        (["--task", "digit"], ["'digit'", "cifar10"]),
        (["--spacing", "log"], ["'log'", "exponential, linear"]),
        (["--steps", "1"], ["--steps must be at least 2, got 1"]),
        (["--lowest", "1", "--highest", "0.1"], ["--lowest 1 must be less than --highest 0.1"]),
        (["--lowest", "0"], ["--lowest must be more than 0 and at most 3e+38, got 0"]),
        (["--smoothing", "1"], ["--smoothing must be at least 0 and below 1, got 1"]),
        (["--stop-factor", "1"], ["--stop-factor must be more than 1, got 1"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--name", "../x"], ["--name", "'../x'"]),
        (["--rate", "1"], ["--rate", "--lowest"]),
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
