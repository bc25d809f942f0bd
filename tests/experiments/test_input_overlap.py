"""`python -m experiments.input_overlap` writes a timeline and says what is wrong."""

from __future__ import annotations

import json

import jax
import pytest

from experiments import input_overlap


@pytest.fixture(autouse=True)
def backend():
    """Starts JAX before a command in this process can change its devices."""
    assert len(jax.devices()) == 8


def test_command_writes_a_timeline(tmp_path, capsys):
    path = tmp_path / "trace.json"
    arguments = ["--steps", "2", "--rounds", "1", "--delay", "0.01", "--trace", str(path)]
    arguments += ["--html", str(tmp_path / "page.html")]
    assert input_overlap.main(arguments) == 0
    out = capsys.readouterr().out
    assert "delay of 10.00, in turn" in out
    assert f"timeline: {path}" in out
    assert ">delay of 10.00, in turn<" in (tmp_path / "page.html").read_text()
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans} == {"input", "step"}
    assert 2 <= len({event["tid"] for event in spans}) <= 3
    assert min(event["ts"] for event in spans) == 0
    assert all(event["dur"] > 0 for event in spans)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--delay", "0"], "--delay must be more than 0 and below 60, got 0.0"),
        (["--task", "foo"], "unknown task 'foo'"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert input_overlap.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
