"""`--dry-run` of `train`, `compare` and every study that takes minutes."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import jax
import pytest

from experiments import hlo
from experiments.training.options import Options
from experiments.training.plan import prepare
from experiments.training.program import build
from experiments.training.studies import forecast

# Small, so that what is measured is measured fast.
COMMANDS = {
    "accelerator_report": "--quick",
    "bench": "--methods demon_sgd",
    "brief_review": "--task digits --models mlp --variants baseline --steps 6 --batch-size 48",
    "ensembles": "--kind single --learning-rates 0.1 --seeds 2 --steps 8",
    "fault_drill": "--quick",
    "input_overlap": "--steps 5",
    "landscape": "--steps 8 --resolution 5",
    "launch": "-- train --steps 3",
    "lr_range_test": "--seeds 1 --steps 8",
    "natural_gradient": "--methods sgd --steps 20 --seeds 1",
    "scaling": "--devices 2 --methods sgd --modes jit --timed sgd",
    "solvers": "--task digits --steps 50",
    "step_cost": "--image-size 8 --batch-size 8 --accumulate 2",
    "subspace_study": "--scale tiny",
    "survey": "--learning-rates 0.1 --seeds 2 --steps 10",
    "trackers": "--task digits --batch-size 8",
    "train": "--steps 6",
}
COMPARE = "--methods sgd --learning-rates 0.1 --seeds 2 --steps 8"


@pytest.fixture(autouse=True)
def devices() -> None:
    """Starts JAX before a command in this process can change its devices."""
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plan_is_printed_and_nothing_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = importlib.import_module(f"experiments.{name}")
    if name == "survey":
        monkeypatch.setattr(command, "PLAIN", ("sgd",))
        monkeypatch.setattr(command, "BATCH_NORM", ("sgd",))
    if name == "brief_review":
        tiny = dataclasses.replace(command.SCALES["small"], models={"mlp": ("mlp", {})})
        monkeypatch.setitem(command.SCALES, "small", tiny)
    assert command.main(["--dry-run", *COMMANDS[name].split()]) == 0
    out = capsys.readouterr().out
    check(out)
    assert ("call: tx.update(grads, state, params" in out) == (name == "train")
    assert [*tmp_path.iterdir()] == []


def check(out: str) -> None:
    """What every dry run says, each in a line."""
    lines = out.splitlines()
    assert lines[-1] == "dry run: nothing was written"
    for about in ("plan", "runs", "time"):
        assert sum(bool(re.match(rf"{about} +\S", line)) for line in lines) == 1, out
    for about in ("parameters", "memory"):
        assert about in out


def test_what_is_finished_is_not_forecast_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = importlib.import_module("experiments.compare")
    monkeypatch.chdir(tmp_path)
    arguments = [*COMPARE.split(), "--name", "a"]
    assert compare.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    check(out)
    assert "\nruns        2, of which 0 are finished\n" in out
    assert [*tmp_path.iterdir()] == []
    assert compare.main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert compare.main([*arguments, "--dry-run"]) == 0
    assert "\nruns  2, of which 2 are finished\n" in capsys.readouterr().out
    # A plan that the folder refuses is refused before it is measured.
    assert compare.main([*arguments, "--dry-run", "--batch-size", "32"]) == 2
    assert "--batch-size 64, now 32" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.slow
def test_the_memory_of_a_run_is_that_of_its_largest_step() -> None:
    options = Options(
        method="bulk_sgd", steps=21, devices=1, batch_size=8, curvature_batch_size=256
    )
    plan = prepare(dataclasses.replace(options, model_options='{"hidden_sizes": [8]}'))
    program = build(plan)
    lines, _ = forecast.of_run(plan, program)
    runner, batches = program.runner, [plan.task.train.x[:n] for n in (8, 256)]
    batch, curvature = (
        runner.put_batch({"x": x, "y": plan.task.train.y[: len(x)]}) for x in batches
    )
    needed = {
        form: hlo.memory(
            runner.lower(program.shapes, batch, curvature if form else None, form).compile()
        ).total
        for form in (False, "warm", "cold")
    }
    assert max(needed.values()) > needed[False]
    assert lines["memory"].startswith(f"{forecast.size(max(needed.values()))} on each device")


def test_every_form_of_a_step_counts_as_often_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"cold": 100.0, False: 1.0, "warm": 11.0}

    def refresh(number: int) -> object:
        return "cold" if number == 0 else "warm" if number % 10 == 0 else False

    called: list[int] = []

    def timed(call):  # type: ignore[no-untyped-def]
        before = len(called)
        call()
        return None, sum(seconds[refresh(number)] for number in called[before:])

    monkeypatch.setattr(forecast.timing, "timed", timed)
    first, step = forecast.measure_steps(called.append, refresh, 10**9)
    assert first == 112  # each form once
    assert step == pytest.approx((180 * 1 + 19 * 11) / 200)
    assert forecast.Speed(first, step, 0.5).seconds(100, 4, times=3) == pytest.approx(
        first + 3 * (100 * step + 2)
    )
