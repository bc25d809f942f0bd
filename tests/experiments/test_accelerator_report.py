"""`python -m experiments.accelerator_report` measures what there is time for and continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import accelerator_report, cli
from experiments.runs.units import Store
from experiments.training.studies import accelerator
from experiments.training.studies.isolation import Outcome

MACHINE = {
    "device": "Some <Card>",
    "platform": "gpu",
    "devices": 2,
    "memory": 2**30,
    "cores": 8,
    **dict.fromkeys(("jax", "jaxlib", "optax", "flax", "python"), "1.0"),
}
UPDATE = {
    "status": "measured",
    "milliseconds": [1.0, 2.0, 3.0],
    "ratio": [1.0, 1.25, 1.5],
    "moved_bytes": 28_000_000,
    "bandwidth": [1e9, 2e9, 3e9],
    "of_limit": [1.0, 1.125, 1.5],
    "state_bytes": 2**29,
    "notes": ["a note"],
    "seconds": 2.0,
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device on which rows have the outcomes that the dictionary names; counts the calls."""
    outcomes: dict[str, Any] = {"calls": []}

    class Isolated:
        def __init__(self, make: Callable[..., Any], *args: Any):
            pass

        def __enter__(self) -> Isolated:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def call(self, name: str, seconds: float) -> Outcome:
            if name == "machine":
                return Outcome("done", MACHINE)
            outcomes["calls"].append(name)
            outcome = outcomes.get(name, Outcome("done", UPDATE))
            if isinstance(outcome, KeyboardInterrupt):
                raise outcome
            return outcome

    monkeypatch.setattr(accelerator_report, "Isolated", Isolated)
    return outcomes


def command(folder: Path, methods: str = "sgd,lamb,muon", *options: str) -> int:
    arguments = ["--quick", "--sections", "update", "--methods", methods, *options]
    return accelerator_report.main([*arguments, "--runs-dir", str(folder)])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "accelerator-some-card-quick/results.json").read_text())


def test_one_row_out_of_memory_costs_no_other(tmp_path: Path, device: dict[str, Any]) -> None:
    device["update/sgd"] = Outcome("out of memory", None, "5 GiB")
    assert command(tmp_path) == 0
    assert device["calls"] == ["update/adam", "update/muon", "update/sgd", "update/lamb"]
    records = {record["method"]: record for record in results(tmp_path)["records"]["update"]}
    assert records["sgd"]["status"] == "out of memory"
    assert records["sgd"]["reason"] == "5 GiB"
    assert records["lamb"]["milliseconds"] == [1.0, 2.0, 3.0]
    # What is finished stays; what went wrong is tried again.
    device["calls"].clear()
    assert command(tmp_path) == 0
    assert device["calls"] == ["update/sgd"]

    text = (tmp_path / "accelerator-some-card-quick/report.md").read_text()
    assert text.startswith("## Some \\<Card>\n")
    assert "figures of a CPU" not in text
    row = "| lamb | 2.00 (1.00–3.00) | 1.25 (1.00–1.50) | 0.03 | 2.00 | 1.12 (1.00–1.50) | 0.5 |"
    assert row in text
    assert "| update sgd | out of memory | 5 GiB |" in text
    assert "- adam, muon, lamb: a note" in text


def test_stopped_by_hand(
    tmp_path: Path, device: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    device["update/sgd"] = KeyboardInterrupt()
    assert command(tmp_path) == 130
    captured = capsys.readouterr()
    assert "update: sgd, lamb" in captured.out
    assert "interrupted; the same command continues" in captured.out
    assert "are kept in" in captured.err
    assert [row["method"] for row in results(tmp_path)["records"]["update"]] == ["adam", "muon"]
    assert results(tmp_path)["left_out"] == {"update": [{"method": "sgd"}, {"method": "lamb"}]}
    del device["update/sgd"]
    device["calls"].clear()
    assert command(tmp_path) == 0
    assert device["calls"] == ["update/sgd", "update/lamb"]
    assert results(tmp_path)["left_out"] == {}


def test_rows_begin_only_if_there_is_time(
    tmp_path: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(name: str, seconds: float) -> Outcome:
        clock[0] += 6.0
        return Outcome("done", UPDATE | {"seconds": 6.0})

    monkeypatch.setattr(accelerator_report.Isolated, "call", _machine_or(slow))
    assert command(tmp_path, "sgd,lamb,muon", "--budget-seconds", "14") == 0
    found = results(tmp_path)
    assert [row["method"] for row in found["records"]["update"]] == ["adam", "muon"]
    # 2 seconds are left: as many as a row was expected to take, but rows turned out to take 6.
    assert found["left_out"] == {"update": [{"method": "sgd"}, {"method": "lamb"}]}


def test_a_row_may_have_to_compile_its_base_first(
    tmp_path: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    quick = accelerator_report.QUICK
    rows = [row for row in accelerator.rows(quick, ["step", "input"]) if row.place][:3]
    assert [row.key for row in rows] == [
        "step/small_gpt-bf16-adam",
        "input/small_gpt-bf16",
        "step/small_gpt-bf16-muon",
    ]
    base, extra = quick.estimates["step"], quick.estimates["input"]
    store = Store(tmp_path)

    def run(seconds: float) -> list[str]:
        calls: list[str] = []

        def call(name: str, seconds: float) -> Outcome:
            calls.append(name)
            return Outcome("done", {"status": "measured", "seconds": 0.0})

        accelerator_report.run(rows[1:], store, call, seconds, cli.console(80, quiet=True))
        return calls

    # The base is compiled by whichever of its rows comes first, and once.
    assert run(base + extra - 1) == []
    assert run(base + extra) == ["input/small_gpt-bf16", "step/small_gpt-bf16-muon"]


def _machine_or(call: Callable[[str, float], Outcome]) -> Callable[..., Outcome]:
    def either(self: Any, name: str, seconds: float) -> Outcome:
        return Outcome("done", MACHINE) if name == "machine" else call(name, seconds)

    return either


def test_rows_that_hang_come_last(
    tmp_path: Path, device: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device["update/muon"] = Outcome("stopped", None, "took more than 60 s")
    device["update/sgd"] = KeyboardInterrupt()
    assert command(tmp_path) == 130
    del device["update/sgd"]
    device["calls"].clear()
    assert command(tmp_path) == 0
    assert device["calls"] == ["update/sgd", "update/lamb", "update/muon"]


def test_other_versions_are_not_mixed(
    tmp_path: Path,
    device: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(tmp_path) == 0
    monkeypatch.setitem(MACHINE, "jax", "2.0")
    assert command(tmp_path) == 2
    assert "holds an accelerator report with jax 1.0, now 2.0" in capsys.readouterr().err
    device["calls"].clear()
    assert command(tmp_path, "sgd", "--overwrite") == 0
    assert device["calls"] == ["update/adam", "update/sgd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--sections", "updates"],
            "unknown section 'updates' (did you mean 'update'?); valid: update, step",
        ),
        (["--methods", "foo"], "unknown method 'foo'; valid: adam"),
        (["--budget-seconds", "0"], "--budget-seconds must be at least 1"),
    ],
)
def test_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert accelerator_report.main([*arguments, "--runs-dir", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_quick_on_this_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, through a process of its own."""
    assert command(tmp_path, "stoch_grad_adam") == 0
    out = capsys.readouterr().out
    assert "These are figures of a CPU" in out
    assert "not measured" not in out
    (text,) = [path.read_text() for path in tmp_path.glob("*/report.md")]
    assert "| stoch\\_grad\\_adam |" in text
