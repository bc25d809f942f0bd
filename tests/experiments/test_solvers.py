"""`python -m experiments.solvers` runs on the digits; how fast anything is, it does not test."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import solvers
from optax_accel.curvature import blocks

TINY = ["--task", "digits", "--examples", "200", "--chunk", "100", "--steps", "10"]


@pytest.mark.slow  # compiling the tools' loops takes long
@pytest.mark.parametrize("budget_seconds", ["1e-9", "60"])
def test_every_solver_reaches_the_accuracy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    budget_seconds: str,
) -> None:
    monkeypatch.setattr(solvers, "FILTER_DEGREES", (0,))
    monkeypatch.setattr(solvers, "SCIPY_VECTORS", (4.0,))
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
    text = (tmp_path / "solvers-digits/results.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["name"] for line in lines] == [row["name"] for row in results["solvers"]]


def diagonal_search(budget_seconds: float, diagonal: jax.Array) -> solvers.Search:
    linear = jax.tree_util.Partial(jnp.multiply, diagonal)
    start = blocks.random(jax.random.key(0), diagonal)
    problem = solvers.Problem(diagonal, [linear], start, jnp.eye(4, 40), linear, 1)
    options = solvers.Options(k=2, budget_seconds=budget_seconds)
    exact = np.sort(diagonal)[::-1][:2].astype(np.float64)
    return solvers.Search(options, problem, exact, [start], loop_seconds=1.0)


def test_slow_tools_are_predicted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    search = diagonal_search(10, jnp.linspace(0, 1, 40) ** 4)
    assert search.affordable("x", 9) is None
    for tool in (search.matfree(20), search.lobpcg(20)):
        assert tool is not None
        assert tool.run is None
        assert tool.note.startswith("over 10 s")
    monkeypatch.setattr(solvers.importlib.util, "find_spec", lambda name: None)
    assert "pip install matfree" in search.matfree(20).note


def test_the_first_accurate_setting_is_taken() -> None:
    search = diagonal_search(10, jnp.linspace(0, 1, 40) ** 4)
    good = np.array(search.exact)
    tools = [
        solvers.Tool("wrong", "", lambda start: (good * 1.01, 1)),
        solvers.Tool("broken", "", lambda start: (good * np.nan, 2)),
        solvers.Tool("enough", "", lambda start: (good * (1 + 1e-5), 20)),
        solvers.Tool("dear", "", lambda start: (good, 30)),
    ]
    best = search.cheapest(tools)
    assert best is not None
    assert (best.name, best.found_products) == ("enough", 20)
    assert search.cheapest(tools[:2]) is None


def test_chunks_and_blocks_agree_with_the_whole(digits: solvers.data.Task) -> None:
    options = solvers.Options(task="digits", examples=120, steps=5, k=2)
    whole = solvers.make_problem(options, digits)
    parts = solvers.make_problem(solvers.dataclasses.replace(options, chunk=40), digits)
    assert (len(whole.linears), len(parts.linears)) == (1, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        whole.product(whole.gradient),
        parts.product(whole.gradient),
    )
    images = parts.products(parts.earlier)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5),
        images,
        parts.product(jax.tree.map(lambda leaf: leaf[1], parts.earlier)),
    )


@pytest.fixture
def digits() -> solvers.data.Task:
    return solvers.data.load_task("digits")


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
