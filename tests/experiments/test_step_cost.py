"""The measurement of training steps."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from experiments import step_cost
from experiments.training import networks
from experiments.training.step import init_state
from tests.helpers import tree_allclose

SMALL = ["--model", "mlp", "--image-size", "8", "--batch-size", "16", "--accumulate", "4"]


def test_all_ways_make_the_same_step():
    graphdef, params, rest = networks.split(
        models.create("mlp", input_shape=(4, 4, 1), num_classes=3, hidden_sizes=(8,))
    )
    tx = optax.adam(0.1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4, 4, 1)), jnp.float32)
    y = jnp.arange(12) % 3
    ways = step_cost.ways(graphdef, tx, 4)
    found = {
        name: jax.jit(way)(init_state(tx, params, rest), x, y)[0] for name, way in ways.items()
    }
    assert list(found) == ["plain", "whole", "loop", "unrolled", "microbatching", "MultiSteps"]
    for state in found.values():
        tree_allclose(
            (state.params, state.opt_state), (found["whole"].params, found["whole"].opt_state)
        )
        assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), state.params, params))


@pytest.mark.slow
def test_command(capsys, tmp_path):
    file = tmp_path / "new" / "costs.json"
    options = ["--rounds", "1", "--only", "loop", "--json", str(file)]
    options += ["--html", str(tmp_path / "page.html")]
    assert step_cost.main([*SMALL, *options]) == 0
    out = capsys.readouterr().out
    results = json.loads(file.read_text())
    ((name, memory, _, milliseconds, _),) = step_cost.rows(results)
    assert name == "loop"
    assert results["command_line"].endswith("--accumulate 4 --only loop --rounds 1")
    assert "<h2>mlp, 16 in 4</h2>" in (tmp_path / "page.html").read_text()
    assert results["costs"]["loop"]["temp_bytes"] / 1e6 == pytest.approx(float(memory), abs=0.05)
    assert milliseconds in out
    assert "mlp, 16 in 4" in out
    assert "loop" in out
    assert "microbatching" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model foo", "unknown model 'foo'"),
        ("--precision f8", "unknown precision 'f8'"),
        ("--batch-size 15", "--batch-size 15 is not a multiple of --accumulate 4"),
        ("--only foo", "unknown way 'foo'; valid: plain, whole, loop"),
        (
            "--image-size 9000 --batch-size 2000000",
            "model mlp with 2000000 images of (9000, 9000, 3)",
        ),
        ("--image-size 99999", "--image-size must be at most 10000, got 99999"),
        ('--model-options {"hidden_sizes":7}', '--model-options {"hidden_sizes":7} do not fit'),
        ("--model-options 3", "--model-options is a JSON object"),
    ],
)
def test_wrong_option_is_one_clear_line(arguments, message, capsys):
    assert step_cost.main([*SMALL, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
