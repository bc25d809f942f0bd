"""Faults injected into real training runs; each has to be survived."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.training.studies.drill import Ground
from experiments.training.studies.faults import FAULTS, cut_in_half, flip_a_bit


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


def test_damage_is_what_it_says(tmp_path):
    (tmp_path / "small").write_bytes(b"1")
    (tmp_path / "large").write_bytes(bytes(10))
    flip_a_bit(tmp_path)
    assert (tmp_path / "large").read_bytes() == bytes(5) + b"\1" + bytes(4)
    cut_in_half(tmp_path)
    assert (tmp_path / "large").read_bytes() == bytes(5)
    assert (tmp_path / "small").read_bytes() == b"1"
