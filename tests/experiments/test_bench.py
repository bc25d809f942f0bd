"""`python -m experiments.bench` runs and prints; how fast anything is, it does not test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import bench, timing


def test_ratios_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers/bench.json"
    arguments = ["--repeats", "2", "--parameters", "1000", "--json", str(path)]
    assert bench.main([*arguments, "--methods", "demon_sgd,extrap_sgd_past"]) == 0
    out = capsys.readouterr().out
    assert "jax" in out
    assert "update + apply, 1,000 parameters" in out
    assert "<= 1.05" in out
    assert "<= 1.10" in out

    results = json.loads(path.read_text())
    # Extragradient evaluates gradients inside its update: only its whole step is timed.
    assert [row["name"] for row in results["update"]] == ["sgd", "demon_sgd"]
    names = [row["name"] for row in results["step"]]
    assert names == ["sgd", "demon_sgd", "nesterov_sgd", "extrap_sgd_past"]
    assert [row["name"] for row in results["compile"]] == names
    assert [row["target"] for row in results["compile"]] == [None, 2.0, None, 2.0]
    for row in results["update"] + results["step"] + results["compile"]:
        low, median, high = row["milliseconds"]
        assert 0 < low <= median <= high
        assert (row["ratio"] is None) == (row["base"] is None)


def test_curvature_methods_only_project_in_the_update(tmp_path: Path) -> None:
    from experiments.methods import METHODS

    sgd, bulk = bench.update_cases("sgd", [METHODS["sgd"], METHODS["bulk_sgd"]], 1000)
    assert (sgd.base, bulk.base) == (None, "sgd")
    rows = timing.measure([sgd, bulk], repeats=1)
    assert [row["target"] for row in rows] == [None, None]


def test_forms_of_natural_gradients_are_cases_of_their_own() -> None:
    from experiments.methods import METHODS

    group = [METHODS[name] for name in ("sgd", "kfac", "hessian_free")]
    cases = bench.natural_cases("sgd", group)
    named = [(case.name, case.base, case.period, case.target) for case in cases]
    assert named == [
        ("sgd", None, 1, None),
        ("kfac", "sgd", 10, 5.0),
        ("kfac, between", "sgd", 1, 2.0),
    ]
    assert cases[2].time() > 0
    assert cases[2].step == 1
    assert bench.natural_cases("sgd", [METHODS["sgd"], METHODS["demon_sgd"]]) == []
    names = [case.name for case in bench.compile_cases("sgd", group)]
    assert names == ["sgd", "kfac, inverses", "kfac, factors", "kfac, between", "hessian_free"]


def test_targets_are_known_methods() -> None:
    from experiments.methods import METHODS

    targets = (
        bench.UPDATE_TARGETS,
        bench.STEP_TARGETS,
        bench.CYCLE_TARGETS,
        bench.BETWEEN_TARGETS,
    )
    assert set().union(*targets) <= set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--repeats", "0"], ["--repeats", "at least 1", "0"]),
        (["--methods", "sgd,demon"], ["'demon'", "demon_sgd"]),
        (["--methods", "sgd"], ["base methods"]),
        (["--repeat", "3"], ["--repeat", "--repeats"]),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    try:
        code = bench.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    for part in expected:
        assert part in error


@pytest.mark.parametrize(("median", "word"), [(1.05, "pass"), (1.06, "FAIL")])
def test_verdict(median: float, word: str) -> None:
    assert word in bench.verdict({"target": 1.05, "ratio": [1.0, median, 1.1]})
