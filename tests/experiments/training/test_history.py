"""The progress display says what a step is busy with."""

from __future__ import annotations

import io
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.methods import METHODS
from experiments.training.history import History
from experiments.training.program import Program


def test_activities_are_shown_until_there_are_metrics(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=150)
    columns = ["step", "epoch", "loss", "seconds"]
    with History(
        tmp_path,
        columns,
        steps=3,
        steps_per_epoch=3,
        batch_size=4,
        title="sgd",
        console=console,
    ) as history:
        history.begin(0)
        history.tell("finding the subspace (30 products)")
        history.add(1, {"loss": jnp.array(0.25), "finite": jnp.array(True)}, None)
        history._line.refresh()
        assert "finding the subspace (30 products)" in shown.getvalue()
        history.fetch()
        history.write()
        shown.truncate(0)
        history._line.refresh()
        assert "loss 0.25" in shown.getvalue()
        assert "finding" not in shown.getvalue()


def test_steps_without_a_record_have_no_numbers_of_the_monitor(tmp_path: Path) -> None:
    shown, names = io.StringIO(), ["sharpness", "stability_ratio", "skipped"]
    columns = ["step", "epoch", "loss", *(f"monitor/{name}" for name in names), "seconds"]
    about = {"steps": 2, "steps_per_epoch": 2, "batch_size": 4, "title": "sgd"}
    console = Console(file=shown, force_terminal=True, width=150)
    with History(tmp_path, columns, console=console, **about) as history:  # type: ignore[arg-type]
        history.begin(0)
        for step, values in enumerate([(3.0, 0.5, 0), (jnp.nan, jnp.nan, 0)], 1):
            metrics = {
                f"monitor/{name}": jnp.array(x) for name, x in zip(names, values, strict=True)
            }
            history.add(step, {"loss": jnp.array(0.25), "finite": jnp.array(True)} | metrics, None)
            history.fetch()
            history.write()
        history._line.refresh()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["monitor/sharpness"] == 3.0
    assert not {"monitor/sharpness", "monitor/stability_ratio"} & set(second)
    assert "loss 0.25  monitor/sharpness 3  monitor/stability_ratio 0.5" in shown.getvalue()
    assert "skipped" not in shown.getvalue()


def test_a_cold_start_names_its_products() -> None:
    def program(method: str, num_directions: int) -> Any:
        plan = types.SimpleNamespace(
            task=types.SimpleNamespace(num_directions=num_directions), method=METHODS[method]
        )
        params = {"w": jax.ShapeDtypeStruct((40, 40), jnp.float32)}
        shapes = types.SimpleNamespace(params=params)
        names = Program.__dataclass_fields__
        return Program(**dict.fromkeys(names) | {"plan": plan, "shapes": shapes})

    assert program("bulk_sgd", 3).cold_start("cold") == "finding the subspace (20 products)"
    assert program("bulk_sgd", 10).cold_start("cold") == "finding the subspace (30 products)"
    assert program("bulk_sgd", 3).cold_start("warm") is None
    assert program("sgd", 3).cold_start(None) is None
