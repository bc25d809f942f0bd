"""`python -m experiments.landscape` as a person types it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import landscape, train
from experiments.reporting import landscape as report

TINY = ["--task", "digits", "--steps", "40", "--resolution", "5", "--examples", "200"]
FILES = {"results.json", "lines.png", "lines.svg", "planes.png", "planes.svg", "report.html"}


def run(*arguments: str) -> int:
    try:
        return landscape.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_files_table_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "landscape-digits-sgd"
    assert {path.name for path in folder.iterdir()} == {*FILES, "run.lock"}
    record = json.loads((folder / "results.json").read_text())
    assert len(record["lines"]) == 7
    assert [(plane["x"], plane["y"]) for plane in record["planes"]] == [
        ("dominant 1", "dominant 2"),
        ("dominant 1", "bulk"),
        ("random 1", "random 2"),
        ("trajectory 1", "trajectory 2"),
    ]
    # The slices' own curvature is that of the Hessian: the MLP's tanh is smooth.
    largest = record["eigenvalues"][0]
    for line in record["lines"]:
        assert line["curvature"] == pytest.approx(line["product"], rel=5e-3, abs=1e-4 * largest)
        assert line["name"] in out
    dominant, bulk = record["lines"][0], record["lines"][2]
    assert dominant["product"] == pytest.approx(largest, rel=1e-3)
    assert abs(bulk["product"]) < 0.1 * largest
    # It begins where training began, seen from its end.
    assert record["steps"][0] == 0
    assert record["steps"][-1] == 40
    path = np.array(record["planes"][-1]["path"])
    assert np.linalg.norm(path[0]) > np.linalg.norm(path[-2]) > np.linalg.norm(path[-1])
    # One page, which loads nothing.
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    held = json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0]
    )
    assert held["planes"] == record["planes"]
    assert held["low"] <= min(min(row) for row in held["planes"][0]["losses"])

    # The same command gives the same numbers, also where fewer slices are asked for.
    arguments = [*TINY, "--runs-dir", str(tmp_path), "--slices", "random"]
    assert run(*arguments) == 0
    again = json.loads((folder / "results.json").read_text())
    assert again["lines"] == record["lines"][3:5]
    assert again["planes"] == record["planes"][2:3]


@pytest.mark.slow
def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--steps",
        "12",
        "--eval-every",
        "4",
        "--devices",
        "1",
        "--runs-dir",
        str(tmp_path),
    ]
    assert train.main([*arguments, "--name", "a", "--method", "adam"]) == 0
    scores = json.loads((tmp_path / "a" / "result.json").read_text())
    assert scores["steps"] == 12
    tiny = ["--run", str(tmp_path / "a"), "--runs-dir", str(tmp_path), "--resolution", "3"]
    assert run(*tiny, "--dry-run") == 0
    assert "none: digits, mlp, adam at learning rate" in capsys.readouterr().out
    assert not (tmp_path / "landscape-a").exists()
    assert run(*tiny, "--slices", "random,trajectory") == 0
    record = json.loads((tmp_path / "landscape-a" / "results.json").read_text())
    assert record["steps"] == [4, 8, 12]
    assert "step 12 of the run in" in record["title"]
    assert 0 < record["loss"] < 2.5
    # What the run decides cannot be given, and its folder is left as it is.
    assert run(*tiny, "--method", "sgd_momentum") == 2
    assert "--method is decided by the run in --run" in capsys.readouterr().err

    # One that keeps a single checkpoint has no path.
    assert train.main([*arguments, "--name", "b", "--keep", "1"]) == 0
    tiny = ["--run", str(tmp_path / "b"), *tiny[2:]]
    capsys.readouterr()
    assert run(*tiny, "--slices", "trajectory") == 2
    assert "needs 3 checkpoints, " in capsys.readouterr().err
    assert run(*tiny, "--dry-run") == 0
    assert "dominant, bulk, random: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--slices", "sharp"], ["slice 'sharp'", "dominant, bulk, random, trajectory"]),
        (["--resolution", "4"], ["--resolution must be odd", "got 4"]),
        (["--resolution", "1"], ["--resolution must be at least 3, got 1"]),
        (["--reach", "0"], ["--reach must be more than 0", "got 0"]),
        (["--examples", "10000"], ["--examples 10000 is more than the", "training examples"]),
        (["--method", "sgdd"], ["'sgdd'", "demon_sgd"]),
        (["--method", "decentlam"], ["decentlam needs workers"]),
        (["--run", "nowhere"], ["--run nowhere holds no run", "experiments.train"]),
        (["--name", "../x"], ["--name", "'../x'"]),
    ],
)
def test_wrong_input_is_explained_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    assert run(*arguments, "--runs-dir", str(tmp_path / "runs")) == 2
    captured = capsys.readouterr()
    for part in expected:
        assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_diverges_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--learning-rate", "1e38", "--runs-dir", str(tmp_path)]
    assert run(*arguments) == 1
    assert "lower the learning rate" in capsys.readouterr().err


def test_pictures_of_losses_that_are_not_finite() -> None:
    line = {
        "name": "bulk",
        "alphas": [-1.0, 0.0, 1.0],
        "losses": [None, 0.5, 1.0],
        "slope": None,
        "curvature": None,
        "product": 2.0,
    }
    plane = {
        "x": "random 1",
        "y": "random 2",
        "alphas": [-1.0, 0.0, 1.0],
        "betas": [-1.0, 0.0, 1.0],
        "losses": [[None, 1.0, 2.0], [3.0, 0.5, None], [1.0, 1e9, 2.0]],
        "path": None,
    }
    record = {"loss": 0.5, "lines": [line], "planes": [plane], "steps": [0]}
    assert report.difference(line) is None
    (axes,) = report.draw_lines(record).axes
    assert np.isnan(axes.lines[0].get_ydata()[0])
    axes, bar = report.draw_planes(record).axes
    shown = axes.collections[0].get_array()
    assert np.nanmax(np.ma.filled(shown, np.nan)) == 0.5 * report.HIGHEST
    assert bar.get_ylabel() == "loss (log scale)"
    assert report.for_page(record)["high"] == 0.5 * report.HIGHEST


def test_a_landscape_without_planes_leaves_no_picture_of_some(tmp_path: Path) -> None:
    line = {"name": "bulk", "alphas": [-1.0, 1.0], "losses": [0.5, 1.0], "product": 2.0}
    record = {"loss": 0.5, "lines": [line], "planes": [], "steps": [0]}
    (tmp_path / "planes.png").touch()
    landscape.write_pictures(tmp_path, record)
    assert {path.name for path in tmp_path.iterdir()} == {"lines.png", "lines.svg"}
    assert report.for_page(record)["planes"] == []
