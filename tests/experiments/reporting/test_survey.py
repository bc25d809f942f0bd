"""Ranks of the contestants and verdicts on the claims."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from experiments.reporting import survey as report


def test_ranks_of_clear_winners_are_certain() -> None:
    values = np.array([[0.5, 0.6, 0.5], [0.9, 0.8, 0.9], [0.7, 0.7, 0.7]])
    for row, expected in zip(report.ranks(values, report.draw(3)), (3, 1, 2), strict=True):
        assert row == {"rank": expected, "low": expected, "high": expected}


def test_ranks_of_equals_are_shared_and_of_rivals_uncertain() -> None:
    equal = report.ranks([[0.5, 0.6]] * 4, report.draw(2))
    assert all(row == {"rank": 2.5, "low": 2.5, "high": 2.5} for row in equal)
    first, second = report.ranks([[0.9, 0.5], [0.6, 0.7]], report.draw(2))
    assert (first["rank"], second["rank"]) == (1, 2)
    assert (first["low"], first["high"], second["low"], second["high"]) == (1, 2, 1, 2)


def test_intervals_agree_with_scipy() -> None:
    """SciPy's percentile bootstrap of the mean."""
    rng = np.random.default_rng(1)
    rows = {
        name: {"accuracy": list(rng.normal(mean, 0.02, 8))} for name, mean in (("a", 1), ("b", 0.9))
    }
    claim = report.Claim("", "", "accuracy", "a", "b")
    verdict = report.judge(claim, rows, report.draw(8))
    difference = np.subtract(rows["a"]["accuracy"], rows["b"]["accuracy"])
    expected = stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=20_000, rng=rng
    ).confidence_interval
    np.testing.assert_allclose([verdict["low"], verdict["high"]], expected, atol=1e-3)
    assert verdict["difference"] == pytest.approx(difference.mean())


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ([0.9, 0.8, 0.9], "holds here"),
        ([0.5, 0.4, 0.6], "does not hold here"),
        ([0.9, 0.5, 0.7], "undecided"),
        ([0.7, 0.7, 0.7], "undecided"),
    ],
)
def test_verdicts(better: list[float], verdict: str) -> None:
    rows = {"a": {"speed": better}, "b": {"speed": [0.7, 0.7, 0.7]}}
    claim = report.Claim("", "", "speed", "a", "b")
    assert report.judge(claim, rows, report.draw(3))["verdict"] == verdict


def test_an_ensemble_is_held_against_its_members() -> None:
    rows = {"a": {"accuracy": [0.9, 0.8], "member_accuracy": [0.7, 0.7]}}
    claim = report.Claim("", "", "accuracy", "a", "a", of_members=True)
    assert report.judge(claim, rows, report.draw(2))["difference"] == pytest.approx(0.15)
