"""The drill says what was survived, and what was not."""

from __future__ import annotations

import pytest

from experiments import fault_drill
from experiments.training.studies.drill import Failed, Ground
from experiments.training.studies.faults import Survived


def test_drill_tells_what_was_not_survived(monkeypatch, capsys):
    def lost(ground):
        raise Failed("the metrics differ")

    def broken(ground):
        raise OSError("no such file")

    survived = Survived([3, 5], "twice")
    faults = {"a": (lambda ground: survived, 1, 1), "b": (lost, 1, 1), "c": (broken, 1, 1)}
    monkeypatch.setattr(fault_drill, "FAULTS", faults)
    monkeypatch.setattr(Ground, "reference", None)
    assert fault_drill.main(["--quick"]) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "twice" in line)
    assert [word for word in row.split() if word not in "│┃"][:6] == [
        "a",
        "twice",
        "2",
        "2",
        "4.0",
        "5",
    ]
    assert "not survived: b: Failed: the metrics differ" in out
    assert "not survived: c: OSError: no such file" in out
    monkeypatch.setattr(fault_drill, "FAULTS", {"a": faults["a"]})
    assert fault_drill.main([]) == 0


def test_wrong_option(capsys):
    with pytest.raises(SystemExit) as stop:
        fault_drill.main(["--times", "3"])
    assert stop.value.code == 2
    assert "; python -m experiments.fault_drill --help shows all options" in capsys.readouterr().err
