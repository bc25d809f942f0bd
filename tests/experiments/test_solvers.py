"""`python -m experiments.solvers` runs on the digits; how fast anything is, it does not test."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from experiments import solvers
from experiments.training.studies import eigensolvers

TINY = ["--task", "digits", "--examples", "200", "--chunk", "100", "--steps", "10"]


@pytest.mark.slow  # compiling the tools' loops takes long
@pytest.mark.parametrize("budget_seconds", ["1e-9", "60"])
def test_every_solver_reaches_the_accuracy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    budget_seconds: str,
) -> None:
    monkeypatch.setattr(eigensolvers, "FILTER_DEGREES", (0,))
    monkeypatch.setattr(eigensolvers, "SCIPY_VECTORS", (4.0,))
    arguments = [*TINY, "--k", "2", "--rounds", "1", "--budget-seconds", budget_seconds]
    assert solvers.main([*arguments, "--runs-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for word in ("digits", "4,810 parameters", "scipy eigsh", "lobpcg", "own stop"):
        assert word in out

    results = json.loads((tmp_path / "solvers-digits/results.json").read_text())
    rows = {row["name"]: row for row in results["solvers"] if "milliseconds" in row}
    assert {"lanczos", "lanczos from the gradient", "scipy eigsh"} <= set(rows)
    assert ("jax lobpcg_standard" in rows) == (budget_seconds == "60")
    for row in results["solvers"]:
        if "milliseconds" in row:
            assert row["error"] <= 1e-4
            assert 0 < row["milliseconds"][0] <= row["milliseconds"][2]
            assert row["products"] >= 2
        else:
            assert row["note"]
    assert rows["lanczos"]["ratio"] == [1, 1, 1]
    assert rows["lanczos, confirm=False"]["products"] <= rows["lanczos"]["products"]
    assert "scipy eigsh, own stop" in rows
    densities = {row["name"]: row for row in results["densities"]}
    assert ("note" in densities["matfree, vmap"]) == (budget_seconds != "60")
    for name in ("matfree, lax.map", "matfree, vmap"):
        if "note" not in densities[name]:  # the same probes, so the same quadrature
            error = densities["spectral_density"]["error"]
            assert densities[name]["error"] == pytest.approx(error, abs=0.02)
    text = (tmp_path / "solvers-digits/results.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["name"] for line in lines] == [row["name"] for row in results["solvers"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--k", "0"], ["--k", "at least 1", "0"]),
        (["--k", "51"], ["--k must be at most 50, got 51"]),
        (["--tolerance", "2"], ["--tolerance must be more than 0 and below 1, got 2"]),
        (["--steps", "3"], ["--steps", "at least 5", "3"]),
        (["--budget-seconds", "0"], ["--budget-seconds", "positive"]),
        (["--task", "digit"], ["'digit'", "digits"]),
        (["--name", "a/b"], ["--name", "'a/b'"]),
        (["--tolerence", "1"], ["--tolerence", "--tolerance"]),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    try:
        code = solvers.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    for part in expected:
        assert part in error
