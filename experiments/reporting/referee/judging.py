"""Functions that judge claims: by ranks with bootstrap intervals, and by a sequential test.

The bootstrap draws the settings again with replacement, and for each drawn one its seeds, the same
ones for all its contestants, since these share initial weights and batches. So an interval says
what other settings of this kind would have shown; a claim about these very settings draws the seeds
alone. The percentiles are moved outwards as few settings (or seeds) ask for (`tail`). What it says
is approximate; with three seeds of a single setting an end of the interval is wrong in an eighth of
the cases, not in 2.5 %. The level of the sequential test is guaranteed.

A tuning is noisy, too: two equal methods are often tuned to different rates. If one tuning decides
for all final seeds, no interval over these seeds contains that noise. So a scale may tune every
final seed anew (`Scale.own_tuning`): then the differences of the seeds are independent, equal
methods differ by 0 in the mean, and interval and sequential test keep their levels without another
rule. Bouthillier et al. (section 3) call this the ideal estimator, and the one with a single tuning
biased. `simulate_tuning` shows both on equal methods. Where settings are drawn, each of which has a
tuning of its own, the noise is in their spread already.

References:
  Bouthillier et al., `Accounting for variance in machine learning benchmarks
  <https://arxiv.org/abs/2103.03098>`_, MLSys 2021.

  Hesterberg, `What teachers should know about the bootstrap: resampling in the undergraduate
  statistics curriculum <https://arxiv.org/abs/1411.5279>`_, The American Statistician 69, 2015: the
  expanded percentile interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.reporting.referee.sequential import SequentialTest, decide
from experiments.reporting.referee.study import FAILS, HOLDS, UNDECIDED, Judgement, Results

DRAWS = 5_000
COVERED = 0.95  # by a bootstrap interval
# From this number on the range of all draws covers the median of the settings with more than 95 %:
# with n settings all of them lie on one side of it with probability 2 / 2^n.
LEAST_SETTINGS = 6


class View(NamedTuple):
    """Means over seeds, with any number of leading axes, one for draws of the bootstrap.

    Attributes:
      results: what they are means of.
      settings: numbers of the settings in `results` that stand on the settings' axis; in a draw
        one may stand there several times, (..., settings).
      errors: on the test split, (..., settings, contestants).
      tuned: on the validation split, (..., settings, contestants, trials).
      equal_errors: on the test split at equal gradients, like `errors`; None where no claim is
        about these.
    """

    results: Results
    settings: np.ndarray
    errors: np.ndarray
    tuned: np.ndarray
    equal_errors: np.ndarray | None = None

    def number(self, name: str) -> int:
        """The number of a contestant."""
        return self.results.contestants.index(name)

    def positions(self, *, ranked: bool = True) -> np.ndarray:
        """The place of each contestant in each setting: 1 plus the number of those with less error.

        Args:
          ranked: whether those that are not ranked are left out; their place is NaN then.
        """
        errors = self.errors.round(12)
        if ranked:
            errors = np.where(self.results.ranked, errors, np.nan)
        better = (errors[..., None, :] < errors[..., :, None]).sum(axis=-1)
        return np.where(np.isnan(errors), np.nan, 1.0 + better)

    def top(self, places: int) -> np.ndarray:
        """Number of settings in which each contestant has one of the first places."""
        return np.sum(self.positions() <= places, axis=-2)


Margin = Callable[[View], np.ndarray]


def mean_view(results: Results) -> View:
    """The means over all seeds."""
    numbers = np.arange(len(results.settings))
    equal = results.equal_errors
    return View(
        *(results, numbers, results.errors.mean(axis=-1), results.tuned.mean(axis=-1)),
        None if equal is None else equal.mean(axis=-1),
    )


def drawn_view(results: Results, *, settings: bool, draws: int = DRAWS) -> View:
    """Means over seeds drawn with replacement, the same draws in every call.

    Args:
      results: the results.
      settings: whether the settings are drawn as well, and not the seeds alone.
      draws: number of draws, the leading axis.

    Returns:
      The view.
    """
    rng = np.random.default_rng(0)
    number = len(results.settings)
    drawn = np.broadcast_to(np.arange(number), (draws, number))
    if settings:
        drawn = rng.integers(number, size=(draws, number))

    def means(values: np.ndarray) -> np.ndarray:
        """Of values (settings, ..., seeds), by other seeds for each setting that was drawn."""
        seeds = values.shape[-1]
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=drawn.shape) / seeds
        found = np.empty((*drawn.shape, *values.shape[1:-1]))
        for setting, of_setting in enumerate(values):
            here = drawn == setting
            found[here] = np.tensordot(weights[here], of_setting, axes=(-1, -1))
        return found

    equal = results.equal_errors
    return View(
        *(results, drawn, means(results.errors), means(results.tuned)),
        None if equal is None else means(equal),
    )


def tail(results: Results, *, settings: bool) -> float:
    """Share of the draws that an interval leaves out at each end.

    The normal quantile of a percentile interval becomes Student's for the degrees of freedom of the
    settings, or of all seeds together where these alone are drawn, and makes up for the factor
    ``(n - 1) / n`` by which draws of n settings, or seeds, vary less than new ones would.

    Args:
      results: the results.
      settings: whether settings are drawn, and not the seeds alone.
    """
    number, _, seeds = results.errors.shape
    units, freedom = (number, number - 1) if settings else (seeds, number * (seeds - 1))
    quantile = stats.t.isf((1 - COVERED) / 2, freedom)
    return float(stats.norm.sf(np.sqrt(units / (units - 1)) * quantile))


def interval(
    results: Results, margins: np.ndarray, *, settings: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the bootstrap's interval, from values whose first axis are the draws."""
    out = tail(results, settings=settings)
    low, high = np.nanquantile(margins, [out, 1 - out], axis=0)
    return low, high


def simulate_tuning(
    rule: str,
    validation: np.ndarray,
    test: np.ndarray,
    *,
    spread: float,
    tuning_seeds: int = 3,
    seeds: int = 12,
    simulations: int = 10_000,
) -> float:
    """How often a 95 % interval over seeds tells two equal methods apart, both of them tuned.

    The intervals are Student's, which stand here for the bootstrap's.

    >>> flat, uneven = np.full(2, 0.05), np.array([0.05, 0.04])
    >>> simulate_tuning("once", flat, uneven, spread=0.005) > 0.4
    True
    >>> simulate_tuning("each seed", flat, uneven, spread=0.005) < 0.06
    True

    Args:
      rule: ``"once"`` for one tuning by the lowest mean error, ``"smallest"`` for the first trial
        within one standard error of that one (Breiman et al., 1984, section 3.4.3), both for all
        final seeds; ``"each seed"`` for a tuning of its own for each of these, on one seed.
      validation: true validation error of each trial.
      test: true test error of each trial.
      spread: standard deviation of the errors of a seed.
      tuning_seeds: seeds of the tuning.
      seeds: final seeds.
      simulations: number of repetitions.

    Returns:
      The share of the simulations in which the interval leaves 0 out.
    """
    rng = np.random.default_rng(0)
    everyone = np.arange(simulations)

    def method() -> np.ndarray:
        drawn = seeds if rule == "each seed" else tuning_seeds
        tuned = validation + rng.normal(0, spread, (simulations, drawn, len(validation)))
        if rule == "each seed":
            chosen = tuned.argmin(axis=-1)
        else:
            means = tuned.mean(axis=1)
            best = means.argmin(axis=-1)
            if rule == "smallest":
                error = tuned[everyone, :, best].std(axis=-1, ddof=1) / math.sqrt(tuning_seeds)
                best = (means <= (means[everyone, best] + error)[:, None]).argmax(axis=-1)
            chosen = best[:, None]
        found: np.ndarray = test[chosen] + rng.normal(0, spread, (simulations, seeds))
        return found

    differences = method() - method()
    pvalues = stats.ttest_1samp(differences, 0.0, axis=-1).pvalue
    return float(np.mean(pvalues < 1 - COVERED))


@dataclasses.dataclass(frozen=True)
class ByBootstrap:
    """Judges by a margin that is above 0 where a claim holds, and its bootstrap interval.

    The claim holds if all of the interval is above 0, and does not hold here if all of it is below.

    Attributes:
      margin: a function of a `View`, with its leading axes.
      strict: whether the claim needs a margin above 0; otherwise 0 is enough.
      tuned: whether the margin is one of the tuning's runs, whose seeds then count: with a single
        one there is no interval, and the claim stays undecided.
      settings: whether settings are drawn as well as seeds. Then the claim is about settings like
        these, and stays undecided with fewer than `LEAST_SETTINGS`; otherwise it is about these
        settings only.
    """

    margin: Margin
    strict: bool = True
    tuned: bool = False
    settings: bool = True

    def __call__(self, results: Results) -> Judgement:
        """Judges the results."""
        estimate = float(self.margin(mean_view(results)))
        seeds = (results.tuned if self.tuned else results.errors).shape[-1]
        number = len(results.settings)
        if seeds == 1:
            note = "one seed makes no interval"
            return Judgement(UNDECIDED, estimate, None, None, seeds, note=note)
        if self.settings and number < LEAST_SETTINGS:
            return Judgement(
                *(UNDECIDED, estimate, None, None, seeds),
                needed_settings=LEAST_SETTINGS,
                note=f"{number} of at least {LEAST_SETTINGS} settings that make an interval",
            )
        margins = self.margin(drawn_view(results, settings=self.settings))
        low, high = map(float, interval(results, margins, settings=self.settings))
        if self._holds(low):
            return Judgement(HOLDS, estimate, low, high, seeds)
        if not self._holds(high):
            return Judgement(FAILS, estimate, low, high, seeds)
        # The interval shrinks with the square root of the number of settings, or of seeds.
        reach = estimate - low if self._holds(estimate) else high - estimate
        if abs(estimate) < 1e-9 or reach <= 0:
            note = "the estimate is the border itself: no number of runs would decide"
            return Judgement(UNDECIDED, estimate, low, high, seeds, note=note)
        units = number if self.settings else seeds
        needed = max(units + 1, math.ceil(units * (reach / abs(estimate)) ** 2))
        found = Judgement(UNDECIDED, estimate, low, high, seeds)
        if self.settings:
            return dataclasses.replace(found, needed_settings=needed)
        return dataclasses.replace(found, needed_seeds=needed)

    def _holds(self, margin: float) -> bool:
        return margin > 0 if self.strict else margin >= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowerError:
    """Margin of "the method's test error is below the rival's plus a slack", the mean of settings.

    Attributes:
      method: name of the contestant that the claim is about.
      rival: name of the one that it is compared with.
      slack: by how much the method's error may be above the rival's; negative where it has to be
        below by more than nothing.
      among: names of the settings that count; all if empty.
      equal_gradients: whether errors are compared after equally many gradients, products counted,
        instead of equally many steps; see `Results.equal_errors`. The trials are those that were
        tuned for whole runs.
    """

    method: str
    rival: str
    slack: float = 0.0
    among: tuple[str, ...] = ()
    equal_gradients: bool = False

    def __call__(self, view: View) -> np.ndarray:
        """The margin of a view of all settings in their order, as draws of seeds alone are."""
        rows = _rows(view.results, self.among)
        errors = view.equal_errors if self.equal_gradients else view.errors
        assert errors is not None  # the study asked for them
        ours, theirs = (errors[..., view.number(name)] for name in (self.method, self.rival))
        return (theirs - ours)[..., rows].mean(axis=-1) + self.slack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Within:
    """Margin of "the method's value lies between two bounds", the mean of settings.

    Attributes:
      method: name of the contestant that the claim is about.
      low: the least value that the claim allows.
      high: the greatest one.
      among: names of the settings that count; all if empty.
    """

    method: str
    low: float = -math.inf
    high: float = math.inf
    among: tuple[str, ...] = ()

    def __call__(self, view: View) -> np.ndarray:
        """The distance from the nearer bound, positive between the two."""
        rows = _rows(view.results, self.among)
        values = view.errors[..., view.number(self.method)][..., rows].mean(axis=-1)
        return np.minimum(values - self.low, self.high - values)


@dataclasses.dataclass(frozen=True)
class AllOf:
    """Margin of a claim that says several things at once: the least of their margins.

    Attributes:
      margins: those of the parts, each a function of a `View`.
    """

    margins: tuple[Margin, ...]

    def __call__(self, view: View) -> np.ndarray:
        """The least margin of a view."""
        return np.min([margin(view) for margin in self.margins], axis=0)


@dataclasses.dataclass(frozen=True)
class InEverySeed:
    """Judges by the margin of each seed: a claim holds where all of them are above 0.

    This is the criterion of claims that say "in all seeds". It counts the seeds that were run and
    says nothing about others, so it never stays undecided, and its interval is their range; there
    is none where a margin is not finite.

    Attributes:
      margin: a function of a `View`.
    """

    margin: Margin

    def __call__(self, results: Results) -> Judgement:
        """Judges the results."""
        seeds = results.errors.shape[-1]
        found = [
            float(self.margin(mean_view(dataclasses.replace(results, errors=errors[..., None]))))
            for errors in np.moveaxis(results.errors, -1, 0)
        ]
        verdict = HOLDS if all(margin > 0 for margin in found) else FAILS
        note = f"{sum(margin > 0 for margin in found)} of {seeds} seeds"
        if not np.isfinite(found).all():  # a run diverged, or lacks the score: no number says how
            return Judgement(verdict, None, None, None, seeds, note=note)
        return Judgement(verdict, float(np.mean(found)), min(found), max(found), seeds, note=note)


def _rows(results: Results, names: tuple[str, ...]) -> list[int]:
    """The numbers of settings; of all of them if no name is given."""
    return [results.settings.index(name) for name in names or results.settings]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtMost:
    """Judges "the method reaches the target at no more than a share of the rival's cost".

    The difference of a seed is the logarithm of the method's cost, over the rival's times the
    share, averaged over the settings. `sequential.decide` asks whether its mean is below or above
    0, or its sign more often than not. A method's run that misses the target counts as infinitely
    expensive where the claim is to hold, and at the whole budget where it is to fail; a rival's run
    the other way round. So the level is kept whatever the runs would have cost in the end. Where
    the differences vary more than the declared sigma allows, their signs alone decide.

    Attributes:
      method: name of the contestant that the claim is about.
      rival: name of the one that it is compared with.
      share: of the rival's cost.
      test: the test, with its declared sigma and its level.
      among: names of the settings that count; all if empty.
      rival_among: names of as many settings whose costs of the rival are compared with, so that a
        method can be its own rival in another setting; the same ones if empty.
    """

    method: str
    rival: str
    share: float
    test: SequentialTest
    among: tuple[str, ...] = ()
    rival_among: tuple[str, ...] = ()
    sequential = True

    def differences(self, results: Results) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of the difference of each seed that was run."""
        at = _rows(results, self.among), results.contestants.index(self.method)
        rival_at = (
            _rows(results, self.rival_among or self.among),
            results.contestants.index(self.rival),
        )
        ours, theirs = results.costs[at], results.costs[rival_at]
        run = ~np.isnan(ours + theirs).any(axis=0)
        ours, theirs = ours[:, run], theirs[:, run]
        budget, rival_budget = results.budgets[at][:, None], results.budgets[rival_at][:, None]
        low = np.log(np.minimum(ours, budget) / self.share) - np.log(theirs)
        high = np.log(ours / self.share) - np.log(np.minimum(theirs, rival_budget))
        return low.mean(axis=0), high.mean(axis=0)

    def __call__(self, results: Results) -> Judgement:
        """Judges the results."""
        low, high = self.differences(results)
        seeds, test = len(low), self.test
        doubtful = any(test.doubts_sigma(x[np.isfinite(x)]) for x in (low, high))
        below, above = map(int, decide(test, low, high, signs_only=doubtful))
        exact = np.isfinite(low) & (low == high)
        mean = float(low.mean()) if exact.all() else None
        ends = (-math.inf, math.inf)
        if seeds:
            radius = test.radius(seeds)
            ends = float(low.mean()) - radius, float(high.mean()) + radius
        lower, upper = (math.exp(x) * self.share if math.isfinite(x) else None for x in ends)
        estimate = None if mean is None else math.exp(mean) * self.share
        missed = int((~exact).sum())
        note = f"{missed} of {seeds} seeds miss the target" if missed else ""
        if doubtful:
            words = f"the differences vary more than the declared sigma {test.sigma:g} allows"
            note = "; ".join(filter(None, [note, f"{words}, so signs alone decide"]))
            estimate, lower, upper = None, None, None
        if below or above:  # the earlier one: what comes after a decision does not change it
            verdict = HOLDS if below and (not above or below < above) else FAILS
            return Judgement(verdict, estimate, lower, upper, seeds, note=note)
        needed = None if mean is None or doubtful else test.needed(mean)
        return Judgement(UNDECIDED, estimate, lower, upper, seeds, needed, note=note)
