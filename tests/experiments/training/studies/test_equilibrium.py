"""What the study of equilibrium models trains, and what its measures are."""

from __future__ import annotations

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments import protocols
from experiments.reporting.referee.equilibrium import IMPLICIT, PICTURES, STUDY, TEXT
from experiments.training.studies import equilibrium


def test_options_are_those_of_the_networks() -> None:
    for scale in STUDY.scales.values():
        for setting in scale.settings:
            model = models.EquilibriumLM if setting.name == TEXT else models.Mdeq
            known = inspect.signature(model.__init__).parameters
            assert set(setting.options["model"]) <= set(known)
            for contestant in setting.contestants:
                assert set(contestant.options) <= set(known)
            assert setting.options["pretrained"] < setting.options["steps"]
            assert setting.options["pretrained"] == 0 or setting.name == PICTURES


def test_plain_iterations_are_one_program_with_the_contestant_that_unrolls_them() -> None:
    for scale in STUDY.scales.values():
        for setting in scale.settings:
            if setting.name == PICTURES:
                unrolled = [c.options for c in setting.contestants if "solver" in c.options]
                assert unrolled == [equilibrium._PLAIN]


def test_the_rate_falls_as_a_cosine() -> None:
    tx = equilibrium.optimizer({"steps": 4, "weight_decay": 0.0}, jnp.float32(0.1))
    params = jnp.ones(1)
    state = tx.init(params)
    sizes = []
    for _ in range(4):
        updates, state = tx.update(jnp.ones(1), state, params)
        sizes.append(float(updates[0]))
    expected = [-0.1 * 0.5 * (1 + np.cos(np.pi * t / 4)) for t in range(4)]
    np.testing.assert_allclose(sizes, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_runner_trains_a_text(tmp_path: Path) -> None:
    """Equal starts for all contestants; the implicit gradient is in no direction but its own."""
    words = "to be or not to be that is the question " * 200
    (tmp_path / "tinyshakespeare.txt").write_text(words)
    setting = {
        "task": "tiny_shakespeare",
        "model": {"embedding_size": 8, "num_heads": 2, "feedforward_size": 8, "num_layers": 1}
        | {"max_steps": 8, "backward_steps": 8, "loop": "while"},
        "weight_decay": 0.0,
        "pretrained": 0,
        "length": 8,
        "steps": 2,
        "batch_size": 4,
        "held_out": 4,
    }
    runner = equilibrium.Runner(setting, tmp_path, tmp_path)
    options = {c.name: c.options for c in STUDY.scales["small"].settings[1].contestants}
    assert {len(jax.tree.leaves(runner.network(o, 0)[1])) for o in options.values()} == {16}
    (scores,) = runner.run(options[IMPLICIT], [(0.01, 0)])
    assert scores["time"] == 1.0
    assert scores["angle"] < 0.05
    assert scores["growth"] < 1.05
    assert 0 < scores["loss"] < 8  # the start: its logits are not small


def test_it_is_a_study_of_the_command() -> None:
    study, runner = protocols.STUDIES["equilibrium"]
    study.check()
    assert runner is equilibrium.Runner
