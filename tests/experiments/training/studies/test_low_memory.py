"""What the study of low memory leaves to plain Adam, and how it reads ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accel as oa
from experiments.reporting.referee.low_memory import ADARANKGRAD, GALORE, LOOSE, STUDY
from experiments.training.studies import low_memory


def test_embeddings_and_positions_are_left_to_adam() -> None:
    params = {
        "embedding": {"embedding": jnp.ones((9, 4))},
        "positions": jnp.ones((6, 4)),
        "layers": {0: {"linear1": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}},
    }
    tx = oa.galore(0.1, 2, dimension_numbers=low_memory.projected)
    bases = optax.tree.get(jax.eval_shape(tx.init, params), "low_rank_basis")
    assert [leaf.shape for leaf in jax.tree.leaves(bases)] == [(4, 2)]


def test_ranks_of_a_run() -> None:
    """Twenty readings of two matrices: a tenth of the run has two."""
    readings = [[4.0, 4.0]] * 2 + [[4.0, 2.0]] * 16 + [[1.0, 2.0]] * 2
    scores = low_memory._of_ranks(readings, {"max_rank": 4})
    assert scores["fall"] == pytest.approx(3 / 8)
    assert scores["rank"] == pytest.approx((2 * 8 + 16 * 6 + 2 * 3) / (20 * 8))
    assert scores["rank of matrix 1"][:3] == [1.0, 1.0, 0.5]
    assert low_memory._of_ranks([[]], {"rank": 4}) == {"rank": 1.0}


def test_compared_contestants_have_the_same_rank_and_period() -> None:
    for scale in STUDY.scales.values():
        for setting in scale.settings:
            options = {each.name: each.options for each in setting.contestants}
            for name in {ADARANKGRAD, LOOSE} & options.keys():
                assert options[name]["max_rank"] == options[GALORE]["rank"]
                assert options[name]["refresh_every"] == options[GALORE]["refresh_every"]
