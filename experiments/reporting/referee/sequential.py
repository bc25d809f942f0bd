r"""A one-sided test that may be looked at after every run, with a guaranteed level.

For differences :math:`d_1, d_2, \ldots` with a mean of at least 0 under the null hypothesis, and
:math:`\sigma`-sub-Gaussian (normal with at most that standard deviation, for example),

.. math::

  E_n = 2 \sqrt{\frac{\rho}{v + \rho}} \, \exp\Bigl(\frac{s^2}{2 (v + \rho)}\Bigr) \,
    \Phi\Bigl(\frac{s}{\sqrt{v + \rho}}\Bigr), \qquad s = -\sum_{i \le n} d_i, \quad v = n \sigma^2

is a supermartingale that starts at 1: the mean of likelihood ratios over a half-normal
distribution of the effect, with precision :math:`\rho`. By Ville's inequality it ever reaches
:math:`1 / \alpha` with probability at most :math:`\alpha`. So the test may stop at the first such
run, or at any other time, for whatever reason.

Costs to a target that some runs miss have no mean, and no sigma. Such a run counts as infinitely
expensive; then the sign of a difference is still known, and `SignTest` asks whether more than half
of the differences are below 0. With k of n of them and a uniform distribution of the share p on
(1/2, 1),

.. math::

  E_n = 2 \int_{1/2}^1 (2 p)^k (2 (1 - p))^{n - k} \, dp

is such a supermartingale as well. `decide` runs both tests at half of the level, so that neither
has to be chosen by looking at the runs.

References:
  Robbins, `Statistical methods related to the law of the iterated logarithm
  <https://doi.org/10.1214/aoms/1177696786>`_, Annals of Mathematical Statistics 41, 1970.

  Howard, Ramdas, McAuliffe, Sekhon, `Time-uniform, nonparametric, nonasymptotic confidence
  sequences <https://arxiv.org/abs/1810.08240>`_, Annals of Statistics 49, 2021: the one-sided
  normal mixture, and the beta-binomial one. :math:`\rho` is close to the best one for a given
  :math:`v`; none makes the test invalid.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import optimize, special, stats

from experiments.cli import UsageError

_MOST_RUNS = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequentialTest:
    """A test of "the mean is below 0" and of "the mean is above 0", each at its level.

    Attributes:
      sigma: standard deviation of a difference, declared before the first run.
      level: probability at most of a wrong "below", and of a wrong "above".
      planned: number of differences for which the test is sharpest; it is valid for any.
    """

    sigma: float
    level: float = 0.05
    planned: int = 10

    def __post_init__(self) -> None:
        if not (0 < self.sigma < math.inf and 0 < self.level < 0.5 and self.planned >= 1):
            raise UsageError(
                "a sequential test needs a positive sigma, a level between 0 and 0.5 and at least "
                f"1 planned run, got {self.sigma}, {self.level} and {self.planned}"
            )

    @property
    def precision(self) -> float:
        """Rho, from the planned number of differences."""
        odds = math.log(1 / (2 * self.level))
        return self.planned * self.sigma**2 / (2 * odds + math.log(1 + 2 * odds))

    def log_evidence(self, total: np.ndarray | float, count: np.ndarray | float) -> np.ndarray:
        """Logarithm of the evidence that the mean is above 0.

        Args:
          total: sum of the differences; minus that for the evidence that the mean is below 0.
          count: their number.

        Returns:
          The logarithm of E; the test rejects from ``log(1 / level)`` on.
        """
        precision = self.precision
        width = np.asarray(count) * self.sigma**2 + precision
        total = np.asarray(total, np.float64)
        shape = 0.5 * np.log(precision / width) + total**2 / (2 * width)
        return np.asarray(math.log(2) + shape + stats.norm.logcdf(total / np.sqrt(width)))

    def first_rejection(self, differences: np.ndarray) -> np.ndarray:
        """After how many differences the mean counts as above 0.

        Args:
          differences: (..., number), in the order of the runs; minus those to ask for a mean below
            0. Minus infinity is allowed: from there on the test does not reject.

        Returns:
          The numbers, counted from 1; 0 where the test does not reject.
        """
        totals = np.cumsum(differences, axis=-1)
        counts = np.arange(1, totals.shape[-1] + 1)
        known = np.isfinite(totals)
        evidence = self.log_evidence(np.where(known, totals, 0.0), counts)
        rejects = known & (evidence >= math.log(1 / self.level))
        return np.where(rejects.any(axis=-1), rejects.argmax(axis=-1) + 1, 0)

    def radius(self, count: int) -> float:
        """How far the mean of so many differences lies from the ends of its interval.

        Each end is wrong with probability at most `level`, for all counts at once.
        """

        def excess(total: float) -> float:
            return float(self.log_evidence(total, count)) - math.log(1 / self.level)

        high = self.sigma * math.sqrt(count)
        while excess(high) < 0:
            high *= 2
        return float(optimize.brentq(excess, 0.0, high)) / count

    def needed(self, mean: float) -> int | None:
        """The number of differences that would decide if their mean were this one.

        >>> SequentialTest(sigma=1.0).needed(1.0), SequentialTest(sigma=1.0).needed(0.0)
        (8, None)
        """
        low, high = 0, 1
        while self.radius(high) > abs(mean):
            low, high = high, 2 * high
            if high > _MOST_RUNS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.radius(middle) <= abs(mean) else (middle, high)
        return high

    def doubts_sigma(self, differences: np.ndarray) -> bool:
        """Whether differences vary more than sigma allows: a chi-square test at 1 %.

        Args:
          differences: finite numbers.
        """
        if len(differences) < 2:
            return False
        ratio = float(np.sum((differences - np.mean(differences)) ** 2)) / self.sigma**2
        return ratio > stats.chi2.ppf(0.99, len(differences) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignTest:
    """A test of "more than half of the differences have this sign", looked at after every run.

    Attributes:
      level: probability at most of a wrong rejection.
    """

    level: float = 0.05

    def log_evidence(self, signs: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Logarithm of the evidence.

        Args:
          signs: how many differences have the sign.
          count: how many differences there are.

        Returns:
          The logarithm of E; the test rejects from ``log(1 / level)`` on.
        """
        a, b = signs + 1.0, count - signs + 1.0
        inside = special.betaln(a, b) + stats.beta.logsf(0.5, a, b)
        return np.asarray((count + 1) * math.log(2) + inside)

    def first_rejection(self, signs: np.ndarray) -> np.ndarray:
        """After how many differences more than half count as having the sign.

        >>> [int(SignTest().first_rejection(np.ones(n, bool))) for n in (6, 7)]
        [0, 7]

        Args:
          signs: booleans, (..., number), in the order of the runs.

        Returns:
          The numbers, counted from 1; 0 where the test does not reject.
        """
        number = signs.shape[-1]
        counts, some = np.arange(1, number + 1), np.arange(number + 1)[:, None]
        # The least number of signs that rejects, of each number of differences.
        enough = self.log_evidence(np.minimum(some, counts), counts) >= math.log(1 / self.level)
        least = np.where(enough.any(axis=0), enough.argmax(axis=0), number + 1)
        rejects = np.cumsum(signs, axis=-1) >= least
        return np.where(rejects.any(axis=-1), rejects.argmax(axis=-1) + 1, 0)


def decide(
    test: SequentialTest, low: np.ndarray, high: np.ndarray, *, signs_only: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """After how many differences they count as below, and as above 0: by mean or by sign.

    Args:
      test: the test of the mean; its level is shared by both tests.
      low: lower bounds of the differences, (..., number), in the order of the runs.
      high: upper bounds; infinite for what has none.
      signs_only: whether the test of the mean does not count, because its sigma is wrong.

    Returns:
      Both numbers, counted from 1; 0 where neither test decides so.
    """
    half = dataclasses.replace(test, level=test.level / 2)
    sign = SignTest(level=test.level / 2)

    def first(lower: np.ndarray) -> np.ndarray:
        by_sign = sign.first_rejection(lower > 0)
        by_mean = 0 * by_sign if signs_only else half.first_rejection(lower)
        both = np.stack([by_sign, by_mean])
        return np.where(both.any(axis=0), np.where(both > 0, both, _MOST_RUNS).min(axis=0), 0)

    return first(-high), first(low)


def simulate(
    test: SequentialTest,
    mean: float,
    *,
    most: int,
    missed: float = 0.0,
    simulations: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """How often `decide` decides what on methods of a known effect.

    Args:
      test: the test, whose sigma is that of a difference.
      mean: the true mean of the differences.
      most: number of runs at which it gives up.
      missed: share of the rival's runs that miss the target within their budget, which is the same
        for the method.
      simulations: number of repetitions.
      seed: seed of the random numbers.

    Returns:
      Shares ``below``, ``above`` and ``undecided``, and ``runs``, the mean number of runs.
    """
    rng = np.random.default_rng(seed)
    spread = test.sigma / math.sqrt(2)
    ours = rng.normal(mean, spread, (simulations, most))
    theirs = rng.normal(0.0, spread, (simulations, most))
    budget = spread * stats.norm.isf(missed)
    reached = [np.where(cost > budget, np.inf, cost) for cost in (ours, theirs)]
    low = np.minimum(reached[0], budget) - reached[1]
    high = reached[0] - np.minimum(reached[1], budget)
    below, above = decide(test, low, high)
    ends = np.stack([np.where(side > 0, side, most + 1) for side in (above, below)])
    first = ends.min(axis=0)
    decided = first <= most
    is_above = decided & (ends[0] < ends[1])
    return {
        "below": float(np.mean(decided & ~is_above)),
        "above": float(np.mean(is_above)),
        "undecided": float(np.mean(~decided)),
        "runs": float(np.mean(np.minimum(first, most))),
    }
