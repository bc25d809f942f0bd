"""Counts and costs of what methods send are those that one expects."""

from __future__ import annotations

import jax
import pytest

from experiments import data
from experiments.hlo import Cost, split, total_cost
from experiments.methods import METHODS
from experiments.training.studies.communication import (
    TOPOLOGIES,
    Programs,
    counts,
    entries,
    on_paper,
)

DEVICES = 8


@pytest.fixture(scope="module")
def programs():
    return Programs(data.load_task("digits"), "mlp", 64, jax.devices()[:DEVICES])


def rows(programs, method, mode):
    """By kind of step: calls, copies of the parameters to within a hundredth."""
    return {
        row["step"]: (row["calls"], pytest.approx(row["bytes"] / programs.copy, abs=0.01))
        for row in counts(programs, METHODS[method], mode)
    }


@pytest.mark.parametrize("mode", ["jit", "shard_map"])
@pytest.mark.parametrize("method", ["sgd", "adam", "extrap_sgd_local", "extrap_sgd_past_local"])
def test_one_all_reduce_a_step(programs, method, mode):
    assert rows(programs, method, mode) == {"each": ({"all-reduce": 1}, 1)}


def test_global_extrapolation_takes_two(programs):
    assert rows(programs, "extrap_sgd", "shard_map") == {"each": ({"all-reduce": 2}, 2)}


def test_a_refresh_sends_the_product_with_each_direction(programs):
    found = rows(programs, "bulk_sgd_gradient", "shard_map")
    assert found == {
        "each": ({"all-reduce": 1}, 1),
        "refresh, 1 in 50": ({"all-reduce": 1}, 1 + programs.num_classes),
    }
    first, _ = counts(programs, METHODS["bulk_sgd_gradient"], "shard_map")
    # 2 (n - 1) / n of them for 8 workers.
    assert first["mean"] / programs.copy == pytest.approx(1.75 * (1 + 10 / 50), abs=0.01)


def test_decentralized_steps_send_to_neighbors(programs):
    arrays = len(jax.tree.leaves(programs.params))
    found = rows(programs, "decentlam", "shard_map")
    assert found["each"] == ({"collective-permute": 5 * arrays}, 5)
    assert found["each, at times"] == ({"all-reduce": 2}, 1)  # the consensus distance


def test_fsdp_gathers_parameters(programs):
    (row,) = counts(programs, METHODS["sgd"], "fsdp")
    assert row["calls"]["all-gather"] >= 1
    # The gradient of all parameters, and the large ones gathered.
    large = 4 * sum(x.size for x in jax.tree.leaves(programs.params) if x.size >= 4096)
    assert row["bytes"] == programs.copy + large


@pytest.mark.parametrize(
    "name", ["sgd", "post_local_sgd, H = 32", *(f"dmsgd, {t}" for t in TOPOLOGIES)]
)
def test_paper_agrees_with_programs_for_fewer_devices(programs, name):
    (entry,) = (entry for entry in entries(list(METHODS)) if entry.name == name)
    (phase,) = entry.method.phases
    alone, *paper = (on_paper(programs, entry, workers) for workers in (1, 2, 4))
    assert alone == Cost(0, 0)
    for workers, found_on_paper in zip((2, 4), paper, strict=True):
        found = programs.collectives(entry.method, "shard_map", phase, workers)
        always, sometimes = split(found)
        expected = total_cost(always)
        if entry.every is not None:
            expected += total_cost(sometimes[-1]) * (1 / entry.every)
        assert found_on_paper == pytest.approx(expected)


def test_paper_for_many_workers(programs):
    """The numbers that one expects, in copies of the parameters."""
    paper = {e.name: on_paper(programs, e, 1024) for e in entries(["sgd"])}
    assert paper["sgd"].sent / programs.copy == pytest.approx(2 * 1023 / 1024)
    assert paper["sgd"].hops == 2 * 1023
    arrays = len(jax.tree.leaves(programs.params))
    sends = {
        entry.name.removeprefix("dmsgd, "): on_paper(programs, entry, 1024)
        for entry in entries(["dmsgd"])
    }
    for name, number in {
        "ring": 2,
        "exponential": 10,
        "symmetric exponential": 19,
        "one-peer exponential": 1,
        "2-D mesh": 4,
    }.items():
        assert sends[name].sent / programs.copy == pytest.approx(number)
        assert sends[name].hops == pytest.approx(number * arrays)
    assert sends["complete"] == paper["sgd"]
