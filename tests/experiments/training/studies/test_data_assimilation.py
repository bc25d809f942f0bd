"""The study of data assimilation: equal budgets and grids, and scores that mean what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.reporting.referee.data_assimilation import ENKF, STUDY
from experiments.training.studies.data_assimilation import Runner


def test_contestants_cost_the_same_but_for_the_filter_and_try_as_many_settings() -> None:
    STUDY.check()
    for setting in STUDY.scales["small"].settings:
        runner = Runner(setting.options, None, Path())
        costs = {c.name: runner.gradients(c.options) for c in setting.contestants}
        members = setting.options["members"]
        assert costs.pop(ENKF) == members / 2
        assert set(costs.values()) == {2 * members}
        assert {len(c.learning_rates) for c in setting.contestants} == {4}


def test_scores_of_an_ensemble() -> None:
    (setting,) = STUDY.scales["smoke"].settings
    options = next(c.options for c in setting.contestants if c.options["kind"] == "esmda")
    one, other = Runner(setting.options, None, Path()).run(options, [(1.0, 0), (1.0, 1)])
    assert one != other
    assert one["rmse"] > 0
    assert len(one["spread"]) == 5
    np.testing.assert_allclose(one["rise"], np.diff(one["spread"]).max(), rtol=1e-3, atol=1e-6)
    assert one["rank"] <= 7  # of 8 members
