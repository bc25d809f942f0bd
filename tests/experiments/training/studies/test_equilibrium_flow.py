"""The optimizer of the study of equilibrium flow, and what its contestants share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

from experiments.reporting.referee.equilibrium_flow import LONG, ONE, STUDY, THREE
from experiments.training.studies import equilibrium_flow


def test_the_rate_rises_and_falls_linearly_and_gradients_are_clipped() -> None:
    tx = equilibrium_flow.optimizer(0.1, 40)
    params = {"w": jnp.zeros(4)}
    state, lengths = tx.init(params), []
    for _ in range(40):
        # Of a constant gradient Adam makes steps of the length of its rate.
        updates, state = tx.update({"w": jnp.full(4, 100.0)}, state, params)
        lengths.append(float(-updates["w"][0]))
    expected = np.concatenate([[0, 0.05], 0.1 * (1 - np.arange(38) / 38)])
    np.testing.assert_allclose(lengths, expected, rtol=1e-3, atol=1e-6)
    small = optax.tree.get(state, "mu")["w"]
    assert float(jnp.linalg.norm(small)) <= 1


def test_contestants_differ_in_their_outputs_alone() -> None:
    for scale in STUDY.scales.values():
        for setting in scale.settings:
            options = {each.name: dict(each.options) for each in setting.contestants}
            assert options[ONE] == {"corrections": 1, "phantom_steps": 1}
            assert options[THREE] == {"corrections": 3, "phantom_steps": 1}
            assert len({each.learning_rates for each in setting.contestants}) == 1
            assert setting.options["solver_steps"] % 3 == 0
            if LONG in options:  # as many differentiated updates as with three corrections
                assert options[LONG] == {"corrections": 1, "phantom_steps": 3}
