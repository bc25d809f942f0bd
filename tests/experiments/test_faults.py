"""Faults injected into real training runs; each has to be survived."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import fault_drill
from experiments.fault_drill import FAULTS, Failed, Ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(Path(tmp_path_factory.mktemp("faults")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, times, _) in FAULTS.items() if times])
def test_fault_is_survived(ground, name):
    fault, _, _ = FAULTS[name]
    outcome = fault(ground)
    assert outcome.lost
    assert min(outcome.lost) >= 0
    if name == "SIGKILL":
        assert len(outcome.lost) == 20
        # Checkpoints are five steps apart, and one is under way while the next steps are done.
        assert max(outcome.lost) <= 20


def test_drill_tells_what_was_not_survived(monkeypatch, capsys):
    def lost(ground):
        raise Failed("the metrics differ")

    def broken(ground):
        raise OSError("no such file")

    survived = fault_drill.Survived([3, 5], "twice")
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


def test_damage_is_what_it_says(tmp_path):
    (tmp_path / "small").write_bytes(b"1")
    (tmp_path / "large").write_bytes(bytes(10))
    fault_drill.flip_a_bit(tmp_path)
    assert (tmp_path / "large").read_bytes() == bytes(5) + b"\1" + bytes(4)
    fault_drill.cut_in_half(tmp_path)
    assert (tmp_path / "large").read_bytes() == bytes(5)
    assert (tmp_path / "small").read_bytes() == b"1"


def test_wrong_option(capsys):
    with pytest.raises(SystemExit) as stop:
        fault_drill.main(["--times", "3"])
    assert stop.value.code == 2
    assert "Valid options: --quick --seed" in capsys.readouterr().err
