"""`python -m experiments.bench` runs and prints; how fast anything is, it does not test."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

import optax_accel as oa
from experiments import bench
from experiments.methods import METHODS
from experiments.training.studies import equilibrium_cost, first_step, method_cost
from experiments.training.studies.method_cost import Network


def test_ratios_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers/bench.json"
    arguments = ["--repeats", "2", "--parameters", "1000", "--json", str(path)]
    page = tmp_path / "pages/bench.html"
    arguments += ["--first-steps", "0", "--html", str(page)]
    arguments += ["--methods", "demon_sgd,extrap_sgd_past", "--tables", "update,step,compile"]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    assert "jax" in out
    assert "update + apply, 1,000 parameters" in out
    assert "of the limit" in out
    assert "bandwidth of a copy, beside each base: " in out
    assert "<= 1.05" in out
    assert "<= 1.10" in out

    shown = page.read_text()
    assert "<h2>update + apply, 1,000 parameters</h2>" in shown
    assert '<tr class="best"><td title="method: sgd">sgd</td>' in shown  # a base
    results = json.loads(path.read_text())
    # Extragradient evaluates gradients inside its update: only its whole step is timed.
    assert [row["name"] for row in results["update"]] == ["sgd", "demon_sgd"]
    for row in results["update"]:
        # Gradient, parameters and momentum are read, the last two written; and a few scalars.
        assert 5 * 4000 <= row["bytes"] < 5 * 4000 + 100
        assert row["bandwidth"] > 0
        time = row["milliseconds"][1] / 1e3
        assert row["of_limit"] == pytest.approx(time * row["bandwidth"] / row["bytes"])
    names = [row["name"] for row in results["step"]]
    assert names == ["sgd", "demon_sgd", "nesterov_sgd", "extrap_sgd_past"]
    assert [row["name"] for row in results["compile"]] == names
    assert [row["target"] for row in results["compile"]] == [None, 2.0, None, 2.0]
    for row in results["update"] + results["step"] + results["compile"]:
        low, median, high = row["milliseconds"]
        assert 0 < low <= median <= high
        assert (row["ratio"] is None) == (row["base"] is None)


def test_low_memory_between_refreshes_and_with_one() -> None:
    def network() -> Network:
        return Network(2, "mlp", (6, 6, 1), hidden_sizes=(33,))

    group = [METHODS[name] for name in ("adam", "galore", "sift")]
    cases = method_cost.low_memory_cases("adam", group, network)
    compilations = method_cost.low_memory_compile_cases("adam", group, network)
    names = ["adam", "galore, between", "galore, refresh", "sift, between"]
    assert [case.name for case in cases] == [case.name for case in compilations] == names
    assert [case.target for case in cases] == [None, 1.15, 3.0, 1.15]
    assert [case.target for case in compilations] == [None, 2.0, 2.0, 2.0]
    for case, renews in zip(cases[1:3], (False, True), strict=True):
        before = max(abs(basis).max() for basis in _bases(case.carry))
        assert case.time() > 0
        assert before == 0
        assert (max(abs(basis).max() for basis in _bases(case.carry)) > 0) == renews
    assert method_cost.low_memory_cases("adam", group[:1], network) == []


def _bases(state: Any) -> list[Any]:
    return jax.tree.leaves(optax.tree.get(state.opt_state, "low_rank_basis"))


def test_what_a_monitor_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(2, "mlp", (3, 3, 1), hidden_sizes=(4,))
    monkeypatch.setattr(first_step, "NETWORKS", {"tiny": lambda: network})
    console = Console(width=120, record=True, file=io.StringIO())
    found = bench.monitor_tables(1, console)["tiny"]
    between, record = (row["ratio"][1] for row in found["rows"][1:])
    assert found["time"] == pytest.approx(between - 1 + (record - between) / 1000)
    # A start vector for each of two operators, and some numbers.
    assert 2 < found["memory"] < 2 + 80 / 80
    text = console.export_text()
    assert "curvature watched, tiny" in text
    assert ("pass" if found["time"] <= 0.05 else "FAIL") in text


def _block(examples: int, width: int) -> equilibrium_cost.Block:
    def f(z: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(z @ w) @ w + x)

    w, x = 0.5 * jnp.eye(width), jnp.ones((examples, width))
    return equilibrium_cost.Block(f, jnp.zeros_like(x), w, x, "while")


def test_what_a_fixed_point_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = _block(32, 16)
    monkeypatch.setattr(equilibrium_cost, "NETWORKS", {"tiny": lambda: block})
    for name, steps in (("STEPS", 6), ("FEW_STEPS", 2)):
        monkeypatch.setattr(equilibrium_cost, name, steps)
    console = Console(width=120, record=True, file=io.StringIO())
    found = bench.equilibrium_tables(1, console)["tiny"]
    assert [row["target"] for row in found["by_hand"] + found["phantom"]] == [None, 1.15, None, 0.6]
    sizes = {row["name"]: row["bytes"] for row in found["memory"]}
    again = sizes["implicit, jax.checkpoint"]
    assert sizes["one block"][1] < 2 * again[1] < 2 * sizes["implicit"][1]
    assert again[1] < 1.02 * again[0] + 500  # the residuals that are reported
    assert sizes["unrolled"][1] > 1.5 * sizes["unrolled"][0]
    text = console.export_text()
    assert "planned memory, 2 and 6 steps, tiny" in text
    assert ("<= 1.10 pass" in text) or ("<= 1.10 FAIL" in text)


def test_the_hand_written_loop_gives_the_same_gradient() -> None:
    block = _block(3, 2)
    hand, layer = (
        jax.jit(call)(*block.arguments)
        for call in (
            equilibrium_cost.by_hand(block, 12, 12),
            equilibrium_cost.layer(block, "implicit", oa.equilibrium.anderson(12, 0.0)),
        )
    )
    chex.assert_trees_all_close(hand, layer, rtol=1e-2, atol=1e-3)


def test_time_to_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(1))  # other tests need them
    network = Network(8, "mlp", (3, 3, 1), hidden_sizes=(4,))
    rows = first_step.rows(network, [METHODS["sgd"], METHODS["bulk_sgd"]], repeats=1)
    assert [row["name"] for row in rows] == ["adam", "sgd", "bulk_sgd"]
    assert [row["products"] for row in rows] == [0, 0, 30]  # the cold start
    assert len(cleared) == 3
    for row in rows:
        assert 0 < row["run"] < row["step"]
        assert row["passes"] == (row["ratio"][1] <= 3 and row["init"] <= 0.5)
    assert rows[0]["ratio"] == [1, 1, 1]

    rows[1]["passes"], rows[2]["passes"] = True, False
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(bench.first_step_table("time to the first step, tiny", rows))
    lines = console.export_text().splitlines()
    assert "<= 3 times Adam, init <= 0.5 s" in lines[0]
    verdicts = {line.split()[0]: line.split()[-1] for line in lines[3:] if line}
    assert (verdicts["sgd"], verdicts["bulk_sgd"]) == ("pass", "FAIL")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--repeats", "0"], ["--repeats", "at least 1", "0"]),
        (["--methods", "sgd,demon"], ["'demon'", "demon_sgd"]),
        (["--methods", "sgd"], ["base methods"]),
        (["--tables", "step,steps"], ["'steps'", "low_memory"]),
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
