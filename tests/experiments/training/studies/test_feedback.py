"""What the study of feedback alignment trains on, and how it measures angles."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reporting.referee.feedback import CDFA, SHARES, STUDY, named
from experiments.training.studies import feedback


def runner(**changes):
    setting = {"network": "tanh MLP", "task": "digits", "hidden_sizes": [3], "share": 0.1}
    return feedback.Runner(setting | {"steps": 8, "batch_size": 32} | changes, None, Path())


def test_parts_of_the_data_are_drawn_by_the_seed() -> None:
    (first, epoch), (again, _), (other, _) = (runner()._order(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (8, 32)
    assert epoch == 3  # 108 examples
    assert len(np.unique(first)) <= 108
    assert len(np.intersect1d(first, other)) < 60
    assert len(np.unique(runner(share=1.0, steps=33)._order(0)[0])) == 33 * 32


def test_angles_are_those_between_the_matrices_of_two_gradients() -> None:
    study = runner()
    _, params = study._network(0)
    x, y = study.batch(np.arange(8))
    options, key = {"kind": "dfa"}, jax.random.key(3)

    @jax.jit
    def both(params):
        aligned = study._aligned(options, params, key, x)
        gradients = [one.grad(params, x=x, y=y) for one in (study._objective, aligned)]
        return study._angles(options, params, params, key, x, y), gradients

    angles, (true, found) = jax.device_get(both(params))
    pairs = zip(jax.tree.leaves(true), jax.tree.leaves(found), strict=True)
    cosines = [
        np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs if a.ndim > 1
    ]
    np.testing.assert_allclose(np.cos(np.radians(angles)), cosines, atol=1e-5)
    assert jnp.shape(angles) == (2,)


def test_every_scale_has_the_settings_of_its_claims() -> None:
    for scale in ("small", "medium", "full"):
        settings = STUDY.scales[scale].settings
        assert all(STUDY.takes_part(claim, settings) for claim in STUDY.claims)
        with_cdfa = {s.name for s in settings if CDFA in {c.name for c in s.contestants}}
        assert with_cdfa == {named("CNN", share) for share in SHARES}
