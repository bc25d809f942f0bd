"""How LocalMixer is trained in the study: which parts learn at which rate, what is standardized."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reporting.referee.local_losses import OURS, STUDY
from experiments.training.studies import local_losses


def test_the_classifier_has_a_tenth_of_the_gradient_and_only_matrices_decay() -> None:
    params = {
        "blocks": {0: {"mixed": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}},
        "linear": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    }
    tx = local_losses.optimizer(lambda step: 0.5)

    def update(params):
        return tx.update(params, tx.init(params), params)[0]

    updates = jax.tree.map(np.asarray, jax.jit(update)(params))
    mixed, linear = updates["blocks"][0]["mixed"], updates["linear"]
    np.testing.assert_allclose(mixed["kernel"], -0.5 * 1.0001, rtol=1e-6)
    np.testing.assert_allclose(mixed["bias"], -0.5, rtol=1e-6)
    np.testing.assert_allclose(linear["kernel"], -0.5 * 0.1001, rtol=1e-6)
    np.testing.assert_allclose(linear["bias"], -0.05, rtol=1e-6)
    names = ("patches", "mixed", "grouped")
    assert [leaf.shape for leaf in local_losses.selected(params, names)] == [(2,), (2,)]


def test_contestants_differ_in_what_they_are_named_for() -> None:
    for scale in ("small", "medium", "full"):
        for setting in STUDY.scales[scale].settings:
            options = {each.name: each.options for each in setting.contestants}
            assert len({str(sorted(each.items())) for each in options.values()}) == len(options)
            assert options[OURS]["locality"] == "group"
            assert [n for n, o in options.items() if o.get("perturb") == "weights"] == [
                "Forward, local, weights, 1 pass",
                "Forward, global, weights, 1 pass",
            ]
