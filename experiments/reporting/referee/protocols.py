"""Studies of whole procedures of training as data, the tables of their scores, their verdicts.

The studies of `study` compare methods that differ in nothing but their training step. Here the
contestants may train in several phases, prune, forget or do without gradients: each is a name, the
options that its runner reads, and a grid of learning rates. The runner is a class in
`experiments.training.studies`, see `protocol_runs.Runner` there; `experiments.protocols` puts both
together. Claims are judged by the functions of `judging`, each on one of the study's measures.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from experiments import cli
from experiments.cli import UsageError
from experiments.reporting import tables
from experiments.reporting.referee import report, study
from experiments.reporting.referee.study import Judgement, Results, check_distinct, parts_of
from experiments.reporting.statistics import mean_and_error

Run = Mapping[str, Any]  # "learning_rate", "seed" and "scores", which are None where not finite
Runs = Mapping[str, Mapping[str, Sequence[Run]]]  # of each contestant in each setting
Chosen = Mapping[str, Mapping[str, float]]  # the rate of each contestant in each setting
VALIDATION = "validation"  # the score that chooses the rate, the lowest one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """What is judged of a run: a score that is better the lower it is.

    Attributes:
      text: what it is, for a person.
      worst: its value for a run that diverged.
      form: how tables show it, a format specification such as ``".4f"``; ``"%"`` for a share that
        they show in percent.
      optional: whether a run may have none without having diverged; claims see its worst value.
    """

    text: str
    worst: float
    form: str = "%"
    optional: bool = False


ERROR = Measure(text="share of wrong answers on the test split", worst=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """Who trains.

    Attributes:
      name: what tables and claims call it; the same in all settings.
      options: what the runner reads, plain JSON.
      learning_rates: those that it is tuned on; a single one is taken as it is.
    """

    name: str
    options: Mapping[str, Any]
    learning_rates: tuple[float, ...]

    @property
    def file(self) -> str:
        """The name without anything but lower-case letters, digits and points, for a file."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contestants train, with one budget.

    Attributes:
      name: a plain name; a folder is named after it.
      options: what the runner reads, plain JSON: data, network, numbers of steps.
      budget: the same budget in words, for the ledger.
      contestants: who trains, each with the same number of rates.
      files: whether it reads data files; it is left out where no folder of them is given.
    """

    name: str
    options: Mapping[str, Any]
    budget: str
    contestants: tuple[Contestant, ...]
    files: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a study is run.

    Attributes:
      settings: the settings.
      tuning_seeds: seeds of every rate in the tuning. They are not used again.
      seeds: fresh seeds of the final runs.
    """

    settings: tuple[Setting, ...]
    tuning_seeds: int
    seeds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim(study.Claim):
    """What somebody says about the contestants, and how it is judged.

    Attributes:
      measure: name of the measure that the judge sees as the `Results.errors`.
    """

    measure: str = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocols:
    """A study: all that decides what is run and how it is judged.

    Attributes:
      name: its name on the command line.
      summary: what it is about, in one line.
      free_rival: name of the contestant that costs nothing: what one does without the method.
      measures: what is judged, by the name of the score.
      scales: how much of it is run, by ``"smoke"``, whose verdicts are not recorded, ``"small"``,
        ``"medium"`` and ``"full"``.
      claims: what is judged. A claim is left out where one of its settings or contestants is.
      left_out: what of the original experiments is not part of it, for the person who reads it.
    """

    name: str
    summary: str
    free_rival: str
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...]
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=lambda: {"error": ERROR})
    left_out: str = ""

    def check(self) -> None:
        """Checks the study.

        Raises:
          UsageError: a claim has no criterion or an unknown measure, grids are unequal, names are
            used twice, the free rival is missing or a claim is about nobody in any scale.
        """
        check_distinct(f"study {self.name}: claim", [claim.name for claim in self.claims])
        for claim in self.claims:
            if not claim.criterion.strip():
                raise UsageError(
                    f"study {self.name}: claim {claim.name!r} has no criterion; write down when it "
                    "counts as true before anything runs"
                )
            cli.check_known(f"measure of claim {claim.name!r}", claim.measure, (*self.measures,))
        for scale in self.scales.values():
            check_distinct(f"study {self.name}: setting", [s.name for s in scale.settings])
            if scale.seeds < 2 or scale.tuning_seeds < 1:
                raise UsageError(
                    f"study {self.name} needs 1 or more seeds for tuning and 2 or more for the "
                    f"final runs, got {scale.tuning_seeds} and {scale.seeds}"
                )
            for setting in scale.settings:
                self._check_setting(setting)
        for claim in self.claims:
            if not any(self.takes_part(claim, scale.settings) for scale in self.scales.values()):
                raise UsageError(
                    f"study {self.name}: claim {claim.name!r} is about settings or contestants "
                    "that no scale has; add them"
                )

    def _check_setting(self, setting: Setting) -> None:
        names = [contestant.name for contestant in setting.contestants]
        check_distinct(f"{setting.name}: contestant", [each.file for each in setting.contestants])
        if self.free_rival not in names:
            raise UsageError(
                f"{setting.name} lacks {self.free_rival}, the rival that costs nothing; add it"
            )
        sizes = {each.name: len(each.learning_rates) for each in setting.contestants}
        for name, size in sizes.items():
            if size != sizes[names[0]] or size == 0:
                raise UsageError(
                    f"{setting.name}: {name} has {cli.plural(size, 'rate')}, {names[0]} has "
                    f"{sizes[names[0]]}; give every contestant the same number, at least 1"
                )

    def takes_part(self, claim: study.Claim, settings: Sequence[Setting]) -> bool:
        """Whether everything that a claim is about is in some settings, which is all of them.

        Args:
          claim: one of the claims.
          settings: those that are run.
        """
        by_name = {setting.name: {c.name for c in setting.contestants} for setting in settings}
        for part in parts_of(claim):
            among = getattr(part, "among", ()) or tuple(by_name)
            needed = {getattr(part, role, None) for role in ("method", "rival")} - {None}
            if not all(name in by_name and needed <= by_name[name] for name in among):
                return False
        return bool(by_name)

    def config(self, scale: str, settings: Sequence[Setting]) -> dict[str, Any]:
        """All that decides the numbers, as plain JSON, but for the data.

        Args:
          scale: name of the scale.
          settings: those of its settings that are run.
        """
        chosen = self.scales[scale]
        return {
            "protocols": self.name,
            "scale": scale,
            "tuning_seeds": chosen.tuning_seeds,
            "seeds": chosen.seeds,
            "claims": {claim.name: claim.criterion for claim in self.claims},
            "settings": {
                setting.name: {
                    "options": dict(setting.options),
                    "contestants": {
                        contestant.name: {
                            "options": dict(contestant.options),
                            "learning_rates": list(contestant.learning_rates),
                        }
                        for contestant in setting.contestants
                    },
                }
                for setting in settings
            },
        }


def choose(contestant: Contestant, tuning: Sequence[Run]) -> float:
    """The rate with the lowest mean validation score, of equal ones the lowest rate.

    Args:
      contestant: who was tuned.
      tuning: the runs on the tuning seeds; none for a contestant with a single rate.

    Returns:
      The rate. A rate of which a run diverged is worse than any other.
    """

    def mean(rate: float) -> float:
        found = [run["scores"][VALIDATION] for run in tuning if run["learning_rate"] == rate]
        return math.inf if None in found else float(np.mean(found)) if found else 0.0

    return min(sorted(contestant.learning_rates), key=mean)


def results(studied: Protocols, settings: Sequence[Setting], final: Runs, name: str) -> Results:
    """The final runs as the judges see them, with one measure as the errors.

    Args:
      studied: the study.
      settings: those that were run.
      final: the final runs, in the order of their seeds.
      name: of the measure.

    Returns:
      The results, NaN where a contestant does not take part or has no such score.
    """
    names = list(dict.fromkeys(c.name for setting in settings for c in setting.contestants))
    seeds = max(len(runs) for of_setting in final.values() for runs in of_setting.values())
    values = np.full((len(settings), len(names), seeds), np.nan)
    for i, setting in enumerate(settings):
        for contestant in setting.contestants:
            scores = [run["scores"] for run in final[setting.name][contestant.name]]
            found = [each.get(name, math.nan) for each in scores]
            worst = studied.measures[name].worst
            values[i, names.index(contestant.name)] = [worst if x is None else x for x in found]
    return Results.of_errors([setting.name for setting in settings], names, values, name)


def diverged(studied: Protocols, run: Run) -> bool:
    """Whether any score of a run is not finite that it cannot lack.

    Args:
      studied: the study.
      run: one of its runs.
    """
    optional = {name for name, measure in studied.measures.items() if measure.optional}
    return any(value is None for name, value in run["scores"].items() if name not in optional)


def judge(
    studied: Protocols, settings: Sequence[Setting], chosen: Chosen, final: Runs
) -> dict[Claim, Judgement]:
    """What the runs say about each claim whose settings and contestants take part.

    One tuning decides for all seeds, and neighboring rates often have validation scores that differ
    by little: a note says where the compared contestants were tuned to different rates, so that
    the verdict may be about these.

    Args:
      studied: the study.
      settings: those that were run.
      chosen: the rate of each contestant in each setting.
      final: the final runs.

    Returns:
      The judgements, in the order of the claims.
    """
    judgements = {}
    for claim in studied.claims:
        if studied.takes_part(claim, settings):
            found = claim.judge(results(studied, settings, final, claim.measure))
            note = "; ".join(filter(None, [found.note, *_other_rates(claim, chosen)]))
            judgements[claim] = dataclasses.replace(found, note=note)
    return judgements


def _other_rates(claim: Claim, chosen: Chosen) -> list[str]:
    """The compared contestants that have different rates, in the first setting where they do."""
    notes: dict[str, None] = {}
    for part in parts_of(claim):
        pair = [getattr(part, role, None) for role in ("method", "rival")]
        if None in pair:
            continue
        for name in getattr(part, "among", ()) or chosen:
            rates = {str(who): chosen[name][str(who)] for who in pair}
            if len(set(rates.values())) > 1:
                words = ", ".join(f"{who} {rate:g}" for who, rate in rates.items())
                notes[f"tuned to other rates: {words}"] = None
                break
    return list(notes)


def entries(judgements: Mapping[Claim, Judgement], about: Mapping[str, Any]) -> list[Any]:
    """The lines of the ledger: one for each claim, whose unit is its measure.

    Args:
      judgements: what the runs say.
      about: the fields that all lines share, see `report.entries`, but for ``unit``.
    """
    lines = []
    for claim, found in judgements.items():
        lines += report.entries([claim], {claim.name: found}, {"unit": claim.measure, **about})
    return lines


def scores_table(
    studied: Protocols, setting: Setting, chosen: Mapping[str, float], final: Mapping[str, Any]
) -> Table:
    """The contestants of one setting with their measures, the mean ± standard error over seeds.

    Args:
      studied: the study.
      setting: the setting.
      chosen: the rate of each contestant.
      final: the final runs of each contestant.
    """
    measured = {name for runs in final.values() for run in runs for name in run["scores"]}
    names = [name for name in studied.measures if name in measured]
    view = tables.table(["contestant", "rate", *names], left=1, wrap=True)
    for contestant in setting.contestants:
        cells = []
        for name in names:
            scores = [run["scores"] for run in final[contestant.name]]
            values = [each[name] for each in scores if name in each]
            finite = [value for value in values if value is not None]
            cells.append(_cell(studied.measures[name], finite, len(values) - len(finite)))
        ends = (min(contestant.learning_rates), max(contestant.learning_rates))
        edge = "*" if len(set(ends)) > 1 and chosen[contestant.name] in ends else ""
        view.add_row(contestant.name, f"{chosen[contestant.name]:g}{edge}", *cells)
    return view


def _cell(measure: Measure, values: Sequence[float], failed: int) -> str:
    lost = f"{failed} {'without' if measure.optional else 'diverged'}" if failed else ""
    if not values:
        return lost
    mean, error = mean_and_error(values)
    if measure.form == "%":
        text = tables.percent(mean, error)
    else:
        text = format(mean, measure.form)
        text += "" if not error else f" ± {format(error, measure.form)}"
    return "; ".join(filter(None, [text, lost]))
