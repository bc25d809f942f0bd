"""`python -m experiments.ensembles` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import ensembles as command
from experiments import methods
from experiments.training.replicas import Plan
from experiments.training.studies import comparison
from experiments.training.studies.ensembles import train_members, train_snapshots

SGD = methods.METHODS["sgd"]
TINY = ["--steps", "12", "--members", "3", "--seeds", "2", "--learning-rates", "0.1,0.3"]


def run(*arguments: str) -> int:
    try:
        return command.main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_files_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, "--runs-dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "ensembles-digits-sgd"
    assert {path.name for path in folder.iterdir()} == {
        *("report.html", "results.json", "ensembles.png", "ensembles.svg", "run.lock")
    }
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
        (["--learning-rates", "0"], ["must be positive, finite numbers", "'0'"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--name", "../x"], ["--name", "'../x'"]),
        (["--kinds", "single"], ["--kinds", "did you mean --kind?"]),
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
