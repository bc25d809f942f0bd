"""Rows of the accelerator report: their order, their bytes, their work on the smallest networks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.methods import METHODS
from experiments.training.studies import accelerator, method_cost
from experiments.training.studies.accelerator import FULL, QUICK

TINY = dataclasses.replace(
    QUICK,
    parameters=1_000,
    workloads={"mlp": accelerator._zoo("mlp", (4, 4, 1), 3, 8, hidden_sizes=(4,))},
    repeats=1,
    calls=1,
    input_steps=1,
)


def test_networks_of_the_full_scale_have_their_published_sizes() -> None:
    sizes = {"gpt2_124m": 124_439_808, "resnet50": 25_557_032, "vit_s": 22_050_664}
    for name, workload in FULL.workloads.items():
        params = jax.eval_shape(lambda make=workload.make: accelerator.networks.split(make())[1])
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sizes[name]


def test_rows() -> None:
    every = accelerator.rows(FULL, tuple(FULL.estimates))
    keys = [row.key for row in every]
    assert len(set(keys)) == len(keys)
    # Every method whose update can be timed by itself; seven methods on each network.
    updated = {row.identity["method"] for row in every if row.group == "update"}
    alone = {n for n, m in METHODS.items() if not (m.per_worker or m.evaluates_network)}
    assert updated == alone
    steps = [row.identity for row in every if row.group == "step"]
    assert len(steps) == 3 * 2 * 7
    # The rows of a network and precision follow each other, the base first.
    places = [(i["network"], i["precision"]) for i in steps]
    assert places == sorted(places, key=places.index)
    assert all(i["method"] == "adam" for i in steps[::7])
    some = accelerator.rows(FULL, ["update", "step"], ["kfac"])
    assert {row.identity["method"] for row in some} == {"adam", "kfac"}


def test_bytes_of_updates() -> None:
    params = {"w": jax.ShapeDtypeStruct((10, 10), jnp.float32)}
    for tx, arrays in ((optax.sgd(0.1), 3), (optax.sgd(0.1, momentum=0.9), 5)):

        def update(grads, params, state, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        moved = method_cost.moved_bytes(update, params, params, jax.eval_shape(tx.init, params))
        assert moved == arrays * 400


def test_work() -> None:
    call = accelerator.worker(TINY)
    assert call("machine")["platform"] == "cpu"
    update = call("update/bulk_sgd")
    assert update["status"] == "measured"
    side = 10
    # Reads gradient, parameters, momentum and the basis of 10 directions; writes two of them.
    assert update["moved_bytes"] == pytest.approx(15 * 4 * 10 * side**2, rel=0.02)
    assert update["state_bytes"] > 11 * 4 * 10 * side**2

    base = call("step/mlp-bf16-adam")
    assert base["ratio"] is None
    assert base["step_bytes"] > base["state_bytes"] > 0
    parts = ("init_seconds", "compile_seconds", "run_seconds")
    assert base["first_seconds"] == pytest.approx(sum(base[part] for part in parts))
    step = call("step/mlp-bf16-kfac")
    assert step["status"] == "measured"
    assert step["ratio"][1] > 0
    assert step["first_ratio"] == pytest.approx(step["first_seconds"] / base["first_seconds"])
    assert step["state_bytes"] > base["state_bytes"]
    hidden = call("input/mlp-bf16")
    assert hidden["in_turn_milliseconds"] > hidden["delay_milliseconds"] > 0
    assert call("micro-batches/mlp-bf16")["micro_batches"] == 2


def test_what_does_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_limit", lambda: 1e9)
    record = accelerator.worker(FULL)("update/bulk_sgd")  # ten copies of 100 million parameters
    assert record["status"] == "does not fit"
    assert "100,000,000 parameters" in record["reason"]
    assert "free are 0.93" in record["reason"]


def test_float32_rows_say_how_matrices_are_multiplied() -> None:
    def precision() -> str:
        return str(jax.make_jaxpr(lambda x: x @ x)(jnp.zeros((2, 2))))

    with accelerator.matmul_precision("f32"):
        assert "HIGH" in precision()
    with accelerator.matmul_precision("bf16"):
        assert "HIGH" not in precision()
