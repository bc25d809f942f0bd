"""Ranks of the contestants, verdicts on the claims, and their lines of the ledger."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.reporting import survey as report
from experiments.reporting.referee.study import FAILS, HOLDS, UNDECIDED
from experiments.runs import ledger

CONFIG = {"task": "digits", "steps": 10}


def row(name: str, accuracy: list[float], **more: Any) -> dict[str, Any]:
    return {"name": name, "accuracy": accuracy, "speed": accuracy, **more}


@pytest.mark.parametrize(
    ("momentum", "verdict"),
    [
        ([0.9, 0.8, 0.9], HOLDS),
        ([0.5, 0.4, 0.6], FAILS),
        ([0.9, 0.5, 0.7], UNDECIDED),
    ],
)
def test_verdicts(momentum: list[float], verdict: str) -> None:
    """Of the claims about those who take part, by the referee's functions."""
    rows = [row("sgd", momentum), row("plain_sgd", [0.7, 0.7, 0.7])]
    results = report.conclude(CONFIG, rows)
    (claim,) = results["claims"]
    assert claim["name"] == "momentum is faster than plain SGD"
    assert claim["verdict"] == verdict
    assert claim["difference"] == pytest.approx(sum(momentum) / 3 - 0.7)
    assert claim["low"] < claim["difference"] < claim["high"]
    ranks = {each["name"]: each["accuracy_rank"]["rank"] for each in results["rows"]}
    assert ranks["sgd"] == (2 if verdict == FAILS else 1)
    about = dict.fromkeys(("scale", "command", "run", "date"), "") | {"versions": {}}
    (line,) = report.entries(results, about)
    assert set(line) >= set(ledger.FIELDS)
    assert (line["claim"], line["verdict"], line["runs"], line["seeds"]) == ("a", verdict, 6, 3)


def test_an_ensemble_is_held_against_its_members() -> None:
    more = {"member_accuracy": [0.7, 0.7], "calibration": [-0.1, -0.1], "speed": None}
    rows = [row("independent", [0.9, 0.8], **more, member_calibration=[-0.3, -0.2])]
    results = report.conclude(CONFIG, [*rows, row("sgd", [0.6, 0.6])])
    found = {claim["quality"]: claim["difference"] for claim in results["claims"]}
    assert found == {"accuracy": pytest.approx(0.15), "calibration": pytest.approx(0.15)}
    assert results["rows"][0]["accuracy_rank"] == {"rank": 1.0, "low": 1.0, "high": 1.0}
    assert "speed_rank" not in results["rows"][0]
