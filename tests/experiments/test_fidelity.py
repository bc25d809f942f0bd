"""`python -m experiments.fidelity` as a person types it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from experiments import fidelity
from experiments.methods import METHODS
from experiments.methods.references import AUTHORS, FORMULA, references


def test_chosen_methods(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--methods", "qhm,kfac", "--evidence-dir", str(tmp_path))
    assert fidelity.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 of 2 methods held against a reference; all of them pass" in out
    assert "authors' code" in out
    assert "none" in out
    assert list(tmp_path.iterdir()) == []  # only the whole catalogue is kept


@pytest.mark.parametrize("wrong", [1e-8, math.nan])
def test_what_differs_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    wrong: float,
) -> None:
    """Also a difference that is not a number; and the rows of the whole catalogue are kept."""
    (reference,) = references("demon_sgd")[:1]
    iterates = {step: tuple(v + wrong for v in x) for step, x in reference.iterates.items()}
    changed = dataclasses.replace(reference, iterates=iterates)
    known = {"demon_sgd": [reference, changed], "kfac": []}
    monkeypatch.setattr(fidelity, "references", known.__getitem__)
    monkeypatch.setattr(fidelity, "METHODS", {name: METHODS[name] for name in known})
    assert fidelity.main(("--evidence-dir", str(tmp_path))) == 1
    assert "1 of 2 methods held against a reference; demon_sgd FAIL" in capsys.readouterr().out
    rows = json.loads((tmp_path / fidelity.FILE).read_text())["rows"]
    assert [row["passed"] for row in rows] == [True, False, None]
    page = fidelity.page(tmp_path / fidelity.FILE)
    assert page.count("| pass |") == page.count("| **fails** |") == 1
    assert "Without a recorded run: `kfac`." in page
    assert "| `adabound` | adabound 0.0.5 | `adabound.AdaBound(params, lr=0.01)` | 100 |" in page


def test_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main(("--methods", "qhn")) == 2
    assert "unknown method 'qhn' (did you mean 'qhm'?)" in capsys.readouterr().err


def test_all_references_belong_to_the_catalogue() -> None:
    kinds = {name: {each.kind for each in references(name)} for name in METHODS}
    assert kinds["adabound"] == {AUTHORS}
    assert kinds["demon_sgd"] == {FORMULA}
    assert kinds["kfac"] == set()
    assert sum(map(bool, kinds.values())) >= 40


@pytest.mark.slow
def test_the_whole_catalogue(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fidelity.main(("--evidence-dir", str(tmp_path))) == 0
