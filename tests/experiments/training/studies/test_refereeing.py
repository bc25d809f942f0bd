"""The runs of a study: fresh seeds, and the units of cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from experiments.methods import METHODS
from experiments.runs.records import write_record
from experiments.training.studies import comparison
from experiments.training.studies.refereeing import Arena


def test_costs(tmp_path: Path) -> None:
    plan = comparison.plan("digits", ["sgd", "extra_adam"], model="mlp", steps=10, seeds=1)
    fresh = dataclasses.replace(plan, first_seed=4, seeds=2)
    assert fresh.replicas(plan.methods[0])[:3] == [(0.01, 4), (0.01, 5), (0.03, 4)]
    arena = Arena(dataclasses.replace(plan, eval_every=4), 2, tmp_path)
    write_record(tmp_path / "seconds.json", {"seconds_per_step": {"sgd": 0.5, "extra_adam": 1.5}})
    share = 64 / len(plan.task.train.y)
    for unit, sgd, extra in (
        ("steps", 1, 1),
        ("gradients", 1, 2),
        ("passes", share, 2 * share),
        ("seconds", 0.5, 1.5),
    ):
        found = arena.costs(unit, plan.methods)
        assert found["sgd"] == pytest.approx({step: sgd * step for step in (4, 8, 10)}), unit
        assert found["extra_adam"] == pytest.approx({s: extra * s for s in (4, 8, 10)}), unit
    held = arena.costs("bytes", [METHODS["plain_sgd"], METHODS["adam"]])
    assert held["adam"][4] == held["adam"][10]
    assert held["adam"][4] / held["plain_sgd"][4] == pytest.approx(3, rel=1e-3)
