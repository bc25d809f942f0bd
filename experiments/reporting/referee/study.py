"""A study as data: what is trained, tuned and claimed, checked before anything runs.

A `Study` has settings (`Setting`: task, model, budget), in each of which contestants
(`Contestant`: a method and its trials) get the same number of trials, and claims (`Claim`) whose
criterion is written down before the first run. `Results` is what the runs measured, and `Judgement`
what a claim's function makes of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import cli
from experiments.cli import UsageError
from experiments.methods import Method

# What a run costs until it reaches its target. A Hessian-vector product counts as two gradients of
# its own batch; a pass is as many gradients as show every training example once; bytes are those of
# the parameters and of the optimizer's state.
UNITS = ("steps", "gradients", "passes", "seconds", "bytes")
HOLDS, FAILS, UNDECIDED = "holds", "does not hold here", "undecided"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """A method with the trials that it is tuned by.

    Attributes:
      name: what tables and claims call it; the same in all settings.
      trials: entries of a catalogue, each with its learning rates: every rate of each is a trial.
      ranked: whether it takes part in the ranks.
    """

    name: str
    trials: tuple[Method, ...]
    ranked: bool = True

    @property
    def size(self) -> int:
        """The number of trials."""
        return sum(len(method.learning_rates) for method in self.trials)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contestants train, with one budget.

    Attributes:
      name: a plain name; a folder is named after it.
      task: the data set. Errors are shares of wrong classes: of its examples, of the pixels of
        pictures, or of the next tokens of texts.
      model: name of the model; None for the task's own.
      epochs: passes over the training split.
      contestants: who trains.
      batch_size: examples per step.
      target: validation accuracy to which the cost is counted; None for the task's own.
      model_options: options of the model besides its defaults.
      label_noise: share of the training labels that become random other ones.
      outliers: share of the training examples whose input becomes noise.
      examples: number of training examples that are used, the first ones; None for all.
      workers: how many workers share a batch, for methods that give each a state of its own.
    """

    name: str
    task: str
    model: str | None
    epochs: int
    contestants: tuple[Contestant, ...]
    batch_size: int = 64
    target: float | None = None
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label_noise: float = 0.0
    outliers: float = 0.0
    examples: int | None = None
    workers: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a study is run.

    Attributes:
      settings: the settings.
      tuning_seeds: seeds of every trial in one tuning. They are not used again.
      seeds: fresh seeds of the final runs.
      most_seeds: how many of these a sequential test may ask for.
      first_seed: the first seed of the tuning, after which the others follow: above those of an
        earlier run by which this scale was planned, so that no run of that one is judged again.
      own_tuning: whether every final seed has a tuning of its own, on other seeds than the rest, so
        that intervals over seeds hold the noise of the tuning as well; otherwise one tuning decides
        for all final seeds, and verdicts are about the trials that it chose.
    """

    settings: tuple[Setting, ...]
    tuning_seeds: int
    seeds: int
    most_seeds: int
    first_seed: int = 0
    own_tuning: bool = False

    def tuned(self, seeds: int) -> int:
        """Number of tuning seeds that so many final seeds need."""
        return self.tuning_seeds * (seeds if self.own_tuning else 1)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the runs say about a claim.

    Attributes:
      verdict: `HOLDS`, `FAILS` or `UNDECIDED`.
      estimate: of what the criterion is about; None if no run says anything about it.
      low: lower end of its interval; None for one without an end.
      high: its upper end; None for one without an end.
      seeds: final seeds that it rests on.
      needed_seeds: for an undecided claim the number of seeds, these included, that would decide it
        if the estimate stayed what it is; None if no number would, or more settings would.
      needed_settings: the same of settings, for a claim about more than the ones that were run.
      note: what else there is to say.
    """

    verdict: str
    estimate: float | None
    low: float | None
    high: float | None
    seeds: int
    needed_seeds: int | None = None
    needed_settings: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What the runs of a study measured. Where a contestant does not run, entries are NaN.

    Attributes:
      settings: names of the settings.
      contestants: names of the contestants.
      ranked: for each of these, whether it is ranked.
      errors: share of wrong answers on the test split, (settings, contestants, seeds); 1 for a run
        that diverged.
      tuned: the same on the validation split, (settings, contestants, trials, tuning seeds): all
        those of the first final seeds.
      rates: learning rates of the trials, (settings, contestants, trials).
      costs: cost until the target is reached, (settings, contestants, most seeds): infinite where
        it is not reached, NaN for seeds that were not run.
      budgets: cost of a whole run, (settings, contestants); of several chosen trials the highest.
      unit: what the costs count.
      diverged: number of diverged runs, tuning included, (settings, contestants).
      runs: number of all runs.
      equal_errors: the errors at equal gradients, like `errors`: at the last evaluation before a
        run has taken more gradients than the setting has steps, a Hessian product counting as two;
        None for a study without a claim about them.
    """

    settings: tuple[str, ...]
    contestants: tuple[str, ...]
    ranked: np.ndarray
    errors: np.ndarray
    tuned: np.ndarray
    rates: np.ndarray
    costs: np.ndarray
    budgets: np.ndarray
    unit: str
    diverged: np.ndarray
    runs: int
    equal_errors: np.ndarray | None = None

    @classmethod
    def of_errors(
        cls, settings: Sequence[str], contestants: Sequence[str], errors: np.ndarray, unit: str
    ) -> Results:
        """Results of runs of which only an error, or another value to keep low, is judged.

        Args:
          settings: names of the settings.
          contestants: names of the contestants.
          errors: the values, (settings, contestants, seeds).
          unit: what costs would count.

        Returns:
          The results, without a tuning and without costs.
        """
        nothing = np.zeros(errors.shape[:2])
        return cls(
            settings=tuple(settings),
            contestants=tuple(contestants),
            ranked=np.ones(len(contestants), bool),
            errors=errors,
            tuned=nothing[..., None, None],
            rates=nothing[..., None],
            costs=nothing[..., None],
            budgets=nothing,
            unit=unit,
            diverged=nothing.astype(int),
            runs=errors.size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What somebody says about the contestants, and how it is judged.

    Attributes:
      name: short, such as ``"a"``.
      text: the claim.
      source: who makes it, and where.
      criterion: when it counts as true, written down before the first run.
      judge: a function of the results. One with attributes ``method`` and ``rival`` and a true
        ``sequential`` (`judging.AtMost`) is asked again after each further seed of these two while
        it is undecided.
    """

    name: str
    text: str
    source: str
    criterion: str
    judge: Callable[[Results], Judgement]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """All that decides what is run and how it is judged.

    Attributes:
      name: its name on the command line.
      summary: what it is about, in one line.
      free_rival: name of the contestant that costs nothing: what one does without the method.
      unit: one of `UNITS`.
      scales: how much of it is run, by ``"small"``, ``"medium"`` and ``"full"``.
      claims: what is judged.
      left_out: what of the original experiments is not part of it, for the person who reads it.
    """

    name: str
    summary: str
    free_rival: str
    unit: str
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...]
    left_out: str = ""

    def check(self) -> None:
        """Checks the study.

        Raises:
          UsageError: its unit is unknown, a claim has no criterion, grids are unequal, names are
            used twice, the free rival is missing or a claim is about nobody who takes part.
        """
        cli.check_known("unit of cost", self.unit, UNITS)
        if not self.claims:
            raise UsageError(f"study {self.name} has no claim; give at least one")
        check_distinct(f"study {self.name}: claim", [claim.name for claim in self.claims])
        for claim in self.claims:
            if not claim.criterion.strip():
                raise UsageError(
                    f"study {self.name}: claim {claim.name!r} has no criterion; write down when it "
                    "counts as true before anything runs"
                )
        for scale in self.scales.values():
            check_distinct(f"study {self.name}: setting", [s.name for s in scale.settings])
            if not 2 <= scale.seeds <= scale.most_seeds or scale.tuning_seeds < 1:
                raise UsageError(
                    f"study {self.name} needs 1 or more seeds for tuning, 2 or more for the final "
                    f"runs and no fewer at most, got {scale.tuning_seeds}, {scale.seeds} and "
                    f"{scale.most_seeds}"
                )
            if scale.first_seed < 0:
                raise UsageError(f"study {self.name}: first_seed {scale.first_seed} is negative")
            for setting in scale.settings:
                self._check_setting(setting)
            self._check_among([setting.name for setting in scale.settings])

    def _check_among(self, settings: list[str]) -> None:
        """Every claim is about settings that there are."""
        for claim, part in self._parts():
            for role in ("among", "rival_among"):
                for name in getattr(part, role, ()):
                    cli.check_known(f"setting of claim {claim.name!r}", name, tuple(settings))

    @property
    def equal_gradients(self) -> bool:
        """Whether a claim is about errors at equal gradients."""
        return any(getattr(part, "equal_gradients", False) for _, part in self._parts())

    def _parts(self) -> Iterator[tuple[Claim, Any]]:
        """What judges each claim: its function, and the margin of one by the bootstrap."""
        for claim in self.claims:
            for part in parts_of(claim):
                yield claim, part

    def _check_setting(self, setting: Setting) -> None:
        names = [contestant.name for contestant in setting.contestants]
        check_distinct(f"{setting.name}: contestant", names)
        check_distinct(
            f"{setting.name}: trial",
            [method.name for contestant in setting.contestants for method in contestant.trials],
        )
        if self.free_rival not in names:
            raise UsageError(
                f"{setting.name} lacks {self.free_rival}, the rival that costs nothing; add it"
            )
        for name in ("label_noise", "outliers"):
            if not 0 <= (value := getattr(setting, name)) < 1:
                raise UsageError(
                    f"{setting.name}: {name} is a share of the examples, at least 0 and below 1, "
                    f"got {value}"
                )
        trials = [trial for contestant in setting.contestants for trial in contestant.trials]
        shared = any(trial.per_worker for trial in trials)
        if shared and (setting.workers < 2 or setting.batch_size % setting.workers):
            raise UsageError(
                f"{setting.name}: some methods have workers that share the batch; give 2 or more "
                f"of which the batch size is a multiple, got {setting.workers} and "
                f"{setting.batch_size}"
            )
        for claim, part in self._parts():
            for role in ("method", "rival"):
                if (who := getattr(part, role, None)) is not None and who not in names:
                    raise UsageError(
                        f"{setting.name} lacks {who}, which claim {claim.name!r} is about; add it"
                    )
        sizes = {contestant.name: contestant.size for contestant in setting.contestants}
        first = names[0]
        for name, size in sizes.items():
            if size != sizes[first] or size == 0:
                raise UsageError(
                    f"{setting.name}: {name} has {cli.plural(size, 'trial')}, {first} has "
                    f"{sizes[first]}; give every contestant the same number, at least 1"
                )

    def config(self, scale: str) -> dict[str, Any]:
        """All that decides the numbers, as plain JSON, but for the data."""
        chosen = self.scales[scale]
        return {
            "study": self.name,
            "scale": scale,
            "unit": self.unit,
            "tuning_seeds": chosen.tuning_seeds,
            "seeds": chosen.seeds,
            "most_seeds": chosen.most_seeds,
            "first_seed": chosen.first_seed,
            **({"own_tuning": True} if chosen.own_tuning else {}),
            "claims": {claim.name: claim.criterion for claim in self.claims},
            "contestants": {
                setting.name: {
                    contestant.name: {
                        method.name: list(method.learning_rates) for method in contestant.trials
                    }
                    for contestant in setting.contestants
                }
                for setting in chosen.settings
            },
        }


def parts_of(claim: Claim) -> Iterator[Any]:
    """What judges a claim: its function, its margin, and the margins that this one is made of.

    Args:
      claim: the claim.

    Returns:
      Objects that may have attributes ``method``, ``rival``, ``among`` and others.
    """
    margin = getattr(claim.judge, "margin", None)
    yield claim.judge
    yield margin
    yield from getattr(margin, "margins", ())


def check_distinct(what: str, names: list[str]) -> None:
    """Raises `UsageError` if a name is used twice; `what` says of what these are the names."""
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{what} {name!r} is there more than once; give each its own name")
