"""`python -m experiments.trackers` runs and prints; how fast anything is, it does not test."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import trackers

TINY = ["--task", "digits", "--steps", "20", "--learning-rate", "0.1", "--directions", "4"]


@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    """One test, so that only one process has to compile the run."""
    arguments = [
        *TINY,
        "--trackers",
        "block,block_adaptive,gradient_every_10,exact",
        "--repeats",
        "1",
    ]
    assert trackers.main([*arguments, "--runs-dir", str(tmp_path), "--name", "tiny"]) == 0
    with (tmp_path / "tiny" / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    check_every_tracker_is_compared_at_every_checkpoint(results, rows)
    check_exact_is_exact_and_the_others_are_near(results["summary"])
    check_costs(results)


def check_every_tracker_is_compared_at_every_checkpoint(
    results: dict[str, Any], rows: list[dict[str, str]]
) -> None:
    names = ("block", "block_adaptive", "gradient_every_10", "exact")
    assert [(row["tracker"], (int(row["step"]) + 1) // 2) for row in rows] == [
        (name, tenth) for tenth in range(1, 11) for name in names
    ]
    assert list(results["summary"]) == list(names)
    # Behind the cold start at 0: at 20; when it is due; at 10 and 20; at the checkpoints.
    block, adaptive, gradient, exact = results["refreshes"].values()
    assert (block, gradient, exact) == (1, 2, trackers.CHECKPOINTS)
    assert 1 <= adaptive <= 4
    assert len(results["arpack"]["products"]) == trackers.CHECKPOINTS


def check_exact_is_exact_and_the_others_are_near(summary: dict[str, Any]) -> None:
    exact = summary["exact"]
    assert exact["cos2"] > 0.999
    assert exact["chi full"] < 1e-3
    assert exact["eigenvalues"] < 1e-3
    for name in ("block", "block_adaptive", "gradient_every_10"):
        assert summary[name]["mean cos2"] > 0.8
        assert summary[name]["orthogonality"] < 1e-4


def check_costs(results: dict[str, Any]) -> None:
    block, adaptive, gradient = results["cost"]
    assert (block["tracker"], gradient["tracker"]) == ("block", "gradient_every_10")
    assert block["products per step"] == 4 / 20
    refreshes = results["refreshes"]["block_adaptive"]
    assert adaptive["products per step"] == 4 / round(20 / refreshes)
    assert gradient["products per step"] == 0
    assert gradient["linear algebra"] is None
    assert block["linear algebra"] < 1
    for row in results["cost"]:
        low, median, high = row["ratio"]
        assert 0 < low <= median <= high
        assert row["against ARPACK"] > 1
    assert len(results["checks"]) == 6
    for check in results["checks"]:
        below = check["value"] <= check["limit"]
        assert check["holds"] == (below if check["comparison"] == "<=" else not below)


def test_prints_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--trackers", "gradient", "--repeats", "0", "--runs-dir", str(tmp_path)]
    assert trackers.main(arguments) == 0
    out = capsys.readouterr().out
    for part in (": ARPACK", "mean squared cosine", "exact chi", "trackers-digits-0.1"):
        assert part in out
    assert {path.name for path in (tmp_path / "trackers-digits-0.1").iterdir()} == {
        "accuracy.csv",
        "report.html",
        "results.json",
        "run.lock",
    }


@pytest.mark.slow
def test_trackers_of_other_ends_are_held_against_their_own_reference(tmp_path: Path) -> None:
    arguments = [*TINY, "--trackers", "block_both", "--repeats", "0", "--runs-dir", str(tmp_path)]
    assert trackers.main([*arguments, "--name", "both"]) == 0
    summary = json.loads((tmp_path / "both" / "results.json").read_text())["summary"]
    # The upper half of the directions; the smallest ones of a part of the images are others.
    assert summary["block_both"]["mean cos2"] > 0.35


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "9"], ["--steps", "at least 10", "9"]),
        (["--trackers", "blocks"], ["tracker 'blocks'", "block, "]),
        (["--task", "mnist6k"], ["'mnist6k'", "digits"]),
        (["--curvature-batch", "2000"], ["--curvature-batch", "1077"]),
        (["--learning-rate", "-1"], ["--learning-rate must be more than 0"]),
        (["--directions", "0"], ["--directions must be at least 1"]),
        (["--repeats", "-1"], ["--repeats must be at least 0"]),
        (["--name", "a/b"], ["plain folder name"]),
        (["--step", "3"], ["--step", "--steps"]),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    try:
        code = trackers.main(["--task", "digits", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    for part in expected:
        assert part in error
