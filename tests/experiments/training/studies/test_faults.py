"""Faults injected into real training runs; each has to be survived."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.training.studies.drill import Ground
from experiments.training.studies.faults import FAULTS, cut_in_half, flip_a_bit

# Those of a quick drill, in shorter runs.
STEPS = 150
NAMED = {name: fault for name, (fault, _, quick) in FAULTS.items() if quick}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(Path(tmp_path_factory.mktemp("faults")), steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_fault_is_survived(ground, name):
    outcome = NAMED[name](ground)
    assert outcome.lost
    assert min(outcome.lost) >= 0
    if name == "SIGKILL, 3 times":
        assert len(outcome.lost) == 3
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
