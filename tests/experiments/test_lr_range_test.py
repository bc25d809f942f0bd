"""`python -m experiments.lr_range_test` as a person types it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import lr_range_test

TINY = ["--task", "digits", "--steps", "40", "--seeds", "2"]


def run(*arguments: str) -> int:
    try:
        return lr_range_test.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_median_of_rates() -> None:
    assert lr_range_test.median([0.1, 10.0, None]) == pytest.approx(1.0)
    assert lr_range_test.median([0.1, 0.2, 10.0]) == pytest.approx(0.2)
    assert lr_range_test.median([None]) is None


def test_files_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "lr-range-digits-sgd"
    assert {path.name for path in folder.iterdir()} == {
        *("report.html", "results.json", "range.png", "range.svg", "run.lock")
    }
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
    arguments = [*TINY, "--minimum", "1e-12", "--maximum", "1e-10", "--name", "still"]
    arguments += ["--spacing", "linear", "--batch-size", "1000", "--seeds", "1", "--steps", "3"]
    assert run(*arguments, "--runs-dir", str(tmp_path)) == 0
    assert "the loss never left: a higher --maximum may show more" in capsys.readouterr().out
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
        (["--minimum", "1", "--maximum", "0.1"], ["--minimum 1 must be less than --maximum 0.1"]),
        (["--minimum", "0"], ["--minimum must be more than 0 and at most 3e+38, got 0"]),
        (["--smoothing", "1"], ["--smoothing must be at least 0 and below 1, got 1"]),
        (["--stop-factor", "1"], ["--stop-factor must be more than 1, got 1"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--name", "../x"], ["--name", "'../x'"]),
        (["--rate", "1"], ["--rate", "--help shows all options"]),
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
