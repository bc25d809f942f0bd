"""`python -m experiments.survey` as a person types it, and what it is about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import survey
from experiments.methods import METHODS
from experiments.reporting import survey as report

TINY = ("--steps", "10", "--seeds", "2", "--name", "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and few contestants."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(survey, "PLAIN", ("plain_sgd", "sgd"))
    monkeypatch.setattr(survey, "BATCH_NORM", ("sgd",))
    return tmp_path


def test_claims_are_about_contestants() -> None:
    later = {"kfac", "ekfac", "hessian_free"}  # where the catalogue has them
    names = {*survey.PLAIN, *survey.ENSEMBLES, *(name + report.BN for name in survey.BATCH_NORM)}
    assert set(survey.PLAIN) <= set(METHODS)
    for claim in report.CLAIMS:
        assert {claim.better, claim.worse} <= names | later
        assert claim.of_members == (claim.better == claim.worse)
        assert claim.quality in ("accuracy", "speed", "calibration")
        assert (
            claim.quality == "accuracy"
            or claim.of_members
            or claim.better in names - {*survey.ENSEMBLES} | later
        )


@pytest.mark.slow
def test_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert survey.main(TINY) == 0
    out = capsys.readouterr().out
    folder = here / "runs" / "tiny"
    results = json.loads((folder / "survey.json").read_text())
    names = ["plain_sgd", "sgd", "sgd + BN", "independent", "snapshot"]
    rows = {row["name"]: row for row in results["rows"]}
    assert sorted(rows) == sorted(names)
    for name, row in rows.items():
        assert name in out
        assert len(row["accuracy"]) == 2
        assert 1 <= row["accuracy_rank"]["low"] <= row["accuracy_rank"]["high"] <= 5
    # Read again from the records, at the rate that was chosen.
    plain = json.loads((folder / "plain" / "results.json").read_text())["rows"][1]
    assert np.mean(rows["sgd"]["accuracy"]) == pytest.approx(plain["test_accuracy"])
    assert rows["sgd"]["learning_rate"] == plain["learning_rate"]
    curve = plain["curve"]["validation_accuracy"][1:]
    assert np.mean(rows["sgd"]["speed"]) == pytest.approx(np.mean(curve))
    claims = {claim["name"] for claim in results["claims"]}
    assert "batch norm is faster" in claims
    assert "Adam is faster than momentum" not in claims
    assert (folder / "survey.png").stat().st_size > 10_000
    assert json.loads((folder / "batch_norm" / "config.json").read_text())["model_options"]

    again = folder / "survey.json"
    before = json.loads(again.read_text())
    assert survey.main(TINY) == 0
    assert capsys.readouterr().out.count("already done") == 4
    assert json.loads(again.read_text()) == before
    assert survey.main((*TINY[2:], "--steps", "15")) == 2
    assert "steps 10, now 15" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale", "huge"), "unknown scale 'huge'; valid: small, full"),
        (("--model", "resnet20"), "unknown model 'resnet20'; valid: mlp, cnn"),
        (("--task", "sst3"), "unknown task 'sst3'"),
        (("--seeds", "1"), "--seeds must be at least 2, got 1"),
        (("--steps", "3"), "5 members need at least 5 steps, got 3"),
        (("--name", "a/b"), "--name must be a plain folder name"),
    ],
)
def test_wrong_input(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert survey.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_another_folder_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "tiny").mkdir(parents=True)
    (here / "runs" / "tiny" / "thesis.txt").write_text("mine")
    assert survey.main((*TINY, "--overwrite")) == 2
    assert "is not a survey's folder" in capsys.readouterr().err
    assert (here / "runs" / "tiny" / "thesis.txt").read_text() == "mine"
