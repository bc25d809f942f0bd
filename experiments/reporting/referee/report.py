"""Results and verdicts of a study: made of the records of its runs, shown as tables."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments import cli
from experiments.methods import Method
from experiments.reporting import tables
from experiments.reporting.referee.judging import (
    LEAST_SETTINGS,
    drawn_view,
    interval,
    mean_view,
)
from experiments.reporting.referee.study import (
    Claim,
    Contestant,
    Judgement,
    Results,
    Scale,
    Study,
)
from experiments.reporting.summary import Record, diverged
from experiments.runs import ledger

Records = Mapping[str, Sequence[Record]]  # by the method's name


class Score(NamedTuple):
    """The end of a run.

    Attributes:
      error: share of wrong answers; 1 for a run that diverged.
      loss: infinite for a run that diverged.
      diverged: whether it did.
    """

    error: float
    loss: float
    diverged: bool


def runs_of(records: Sequence[Record]) -> dict[tuple[float, int], list[Record]]:
    """The records of each run by (learning rate, seed), in the order of the steps."""
    runs: dict[tuple[float, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        runs.setdefault((record["learning_rate"], record["seed"]), []).append(record)
    return runs


def score(run: Sequence[Record], split: str) -> Score:
    """The end of a run on the ``"validation"`` or the ``"test"`` split."""
    if diverged(run):
        return Score(1.0, math.inf, True)
    return Score(1.0 - run[-1][f"{split}_accuracy"], run[-1][f"{split}_loss"], False)


def trial_scores(contestant: Contestant, records: Records) -> list[list[Score]]:
    """The validation scores of every trial, one per tuning seed, in the order of the seeds."""
    scores = []
    for method in contestant.trials:
        runs = runs_of(records[method.name])
        for rate in method.learning_rates:
            of_rate = sorted((seed, run) for (other, seed), run in runs.items() if other == rate)
            scores.append([score(run, "validation") for _, run in of_rate])
    return scores


def choose(contestant: Contestant, records: Records, scale: Scale, seeds: int) -> list[Method]:
    """The trial with the lowest mean validation error, of equal ones that with the lowest loss.

    Args:
      contestant: who was tuned.
      records: of its trials.
      scale: how many tuning seeds decide, and whether for one final seed or for all.
      seeds: number of final seeds.

    Returns:
      For each final seed its method, with the one learning rate that was chosen.
    """
    trials = [(m, rate) for m in contestant.trials for rate in m.learning_rates]
    values = np.array(
        [[(s.error, s.loss) for s in each] for each in trial_scores(contestant, records)]
    )

    def best(number: int) -> Method:
        begin = scale.tuned(number) if scale.own_tuning else 0
        means = values[:, begin : begin + scale.tuning_seeds].mean(axis=1)
        method, rate = trials[min(range(len(trials)), key=lambda trial: tuple(means[trial]))]
        return dataclasses.replace(method, learning_rates=(rate,))

    return [best(number) for number in range(seeds)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bout:
    """What happened in one setting.

    Attributes:
      name: the setting's.
      target: validation accuracy to which the cost is counted.
      contestants: who took part.
      tuning: records of all trials.
      chosen: for each contestant, in their order, and each of its final seeds the method with the
        learning rate that was chosen.
      final: records of the final runs.
      costs: cost after each evaluation, by the name of a chosen method and the step.
    """

    name: str
    target: float
    contestants: Sequence[Contestant]
    tuning: Records
    chosen: Sequence[Sequence[Method]]
    final: Records
    costs: Mapping[str, Mapping[int, float]]


def results(study: Study, scale: str, bouts: Sequence[Bout]) -> Results:
    """Puts the records of a study's runs together.

    Args:
      study: the study.
      scale: which of its scales was run.
      bouts: what happened, in the order of the scale's settings.

    Returns:
      The results.
    """
    plan = study.scales[scale]
    members = {c.name: c for bout in bouts for c in bout.contestants}
    names = tuple(members)
    trials = max(contestant.size for contestant in members.values())
    shape = (len(bouts), len(names))
    errors = np.full((*shape, plan.seeds), np.nan)
    equal_errors = errors.copy() if study.equal_gradients else None
    tuned = np.full((*shape, trials, plan.tuned(plan.seeds)), np.nan)
    rates, costs = np.full((*shape, trials), np.nan), np.full((*shape, plan.most_seeds), np.nan)
    budgets, failed, runs = np.full(shape, np.nan), np.zeros(shape, int), 0
    first = plan.first_seed + plan.tuned(plan.most_seeds)
    for i, bout in enumerate(bouts):
        for contestant, chosen in zip(bout.contestants, bout.chosen, strict=True):
            at = i, names.index(contestant.name)
            scores = trial_scores(contestant, bout.tuning)
            tuned[at][: len(scores)] = [[s.error for s in e[: tuned.shape[-1]]] for e in scores]
            rates[at][: len(scores)] = [r for m in contestant.trials for r in m.learning_rates]
            failed[at] += sum(s.diverged for each in scores for s in each)
            runs += sum(map(len, scores)) + len(chosen)
            budgets[at] = max(max(bout.costs[method.name].values()) for method in chosen)
            for number, method in enumerate(chosen):
                cost = bout.costs[method.name]
                final = runs_of(bout.final[method.name])
                run = final[method.learning_rates[0], first + number]
                end = score(run, "test")
                failed[at] += end.diverged
                if number < plan.seeds:
                    errors[at][number] = end.error
                    if equal_errors is not None:
                        steps = run[-1]["step"]
                        scored = (r for r in run if "test_accuracy" in r)
                        there = [r for r in scored if r["gradient_evaluations"] <= steps]
                        equal_errors[at][number] = score(there, "test").error
                hits = (r["step"] for r in run if (r["validation_accuracy"] or 0) >= bout.target)
                # Before the first step there is nothing to pay.
                hit = next((step for step in hits if step > 0), None)
                costs[at][number] = math.inf if hit is None else cost[hit]
    return Results(
        settings=tuple(bout.name for bout in bouts),
        contestants=names,
        ranked=np.array([contestant.ranked for contestant in members.values()]),
        errors=errors,
        tuned=tuned,
        rates=rates,
        costs=costs,
        budgets=budgets,
        unit=study.unit,
        diverged=failed,
        runs=runs,
        equal_errors=equal_errors,
    )


def judge(study: Study, outcome: Results) -> dict[str, Judgement]:
    """What the results say about each claim, by its name."""
    return {claim.name: claim.judge(outcome) for claim in study.claims}


def note_tuning(
    study: Study, scale: str, bouts: Sequence[Bout], judgements: Mapping[str, Judgement]
) -> dict[str, Judgement]:
    """Judgements that say how the two compared contestants were tuned.

    Neighboring rates often have validation errors that differ by a few examples; then a verdict
    that rests on one tuning may be about the rates rather than about the methods, and says where
    these are different. Intervals of seeds that were tuned one by one contain that noise.

    Args:
      study: the study.
      scale: which of its scales was run.
      bouts: what happened in its settings.
      judgements: what the results say, by the claim's name.

    Returns:
      The same, with longer notes.
    """
    noted = dict(judgements)
    if study.scales[scale].own_tuning:
        return {
            name: dataclasses.replace(
                found, note="; ".join(filter(None, [found.note, "each seed tuned anew"]))
            )
            for name, found in noted.items()
        }
    for claim in study.claims:
        judge = getattr(claim.judge, "margin", claim.judge)
        pair = [str(getattr(judge, role, "")) for role in ("method", "rival")]
        among = getattr(judge, "among", ())
        if not all(pair):
            continue
        differ, settings = [], [bout for bout in bouts if not among or bout.name in among]
        for bout in settings:
            rates = {
                contestant.name: chosen[0].learning_rates[0]
                for contestant, chosen in zip(bout.contestants, bout.chosen, strict=True)
            }
            if rates[pair[0]] != rates[pair[1]]:
                differ.append(", ".join(f"{name} {rates[name]:g}" for name in pair))
        if differ:
            number = cli.plural(len(settings), "setting")
            words = f"tuned to other rates in {len(differ)} of {number}"
            found = noted[claim.name]
            note = "; ".join(filter(None, [found.note, f"{words}, in the first {differ[0]}"]))
            noted[claim.name] = dataclasses.replace(found, note=note)
    return noted


def open_contestants(study: Study, judgements: Mapping[str, Judgement]) -> list[str]:
    """Contestants of whom a sequential test wants to see more."""
    names: list[str] = []
    for claim in study.claims:
        if getattr(claim.judge, "sequential", False) and (
            judgements[claim.name].verdict == "undecided"
        ):
            names += [getattr(claim.judge, "method", ""), getattr(claim.judge, "rival", "")]
    return list(dict.fromkeys(names))


def ranks(outcome: Results) -> list[dict[str, Any]]:
    """One row per contestant, the best mean rank first, with the bootstrap's intervals.

    These are over settings and seeds, with fewer than `LEAST_SETTINGS` over seeds alone.
    """
    over = len(outcome.settings) >= LEAST_SETTINGS
    mean, drawn = mean_view(outcome), drawn_view(outcome, settings=over)
    between = functools.partial(interval, outcome, settings=over)
    place, places = mean.positions(ranked=False), drawn.positions(ranked=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # draws without any setting of a contestant
        low, high = between(np.nanmean(places, axis=-2))
        shares = {
            n: [view.top(n) / (~np.isnan(view.errors)).sum(axis=-2) for view in (mean, drawn)]
            for n in (1, 3)
        }
    rows = []
    for i, name in enumerate(outcome.contestants):
        taken = ~np.isnan(place[:, i])
        row = {
            "contestant": name,
            "ranked": bool(outcome.ranked[i]),
            "settings": int(taken.sum()),
            "rank": [float(np.mean(place[taken, i])), float(low[i]), float(high[i])],
            "diverged": int(outcome.diverged[:, i].sum()),
            "error": [None if math.isnan(x) else float(x) for x in mean.errors[:, i]],
        }
        if outcome.ranked[i]:
            for key, n in (("first", 1), ("top_three", 3)):
                share, others = (values[..., i] for values in shares[n])
                row[key] = [float(share), *map(float, between(others))]
        rows.append(row)
    return sorted(rows, key=lambda row: row["rank"][0])


def ranks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The contestants, the best mean rank first."""
    columns = ["contestant", "settings", "rank [95 %]", "first % [95 %]", "top three % [95 %]"]
    view = tables.table([*columns, "diverged"])

    def text(values: Sequence[float] | None, scale: float = 1.0) -> str:
        if values is None:
            return "not ranked"
        mean, low, high = (scale * value for value in values)
        return f"{mean:.3g} [{low:.3g}–{high:.3g}]"

    for row in rows:
        shares = (text(row.get(key), 100) for key in ("first", "top_three"))
        view.add_row(
            *(row["contestant"], str(row["settings"]), text(row["rank"])),
            *(*shares, str(row["diverged"])),
        )
    return view


def verdicts_table(claims: Sequence[Claim], judgements: Mapping[str, Judgement]) -> Table:
    """The claims with their verdicts, by their names."""
    view = tables.table(
        ["claim", "source", "here", "estimate [interval]", "seeds"], left=3, wrap=True
    )
    for claim in claims:
        found = judgements[claim.name]
        estimate, low, high = (
            "…" if x is None else f"{x:.3g}" for x in (found.estimate, found.low, found.high)
        )
        needed = ledger.what_would_decide(dataclasses.asdict(found))
        seeds = str(found.seeds) + (f", {needed}" if needed else "")
        view.add_row(
            f"({claim.name}) {claim.text}",
            claim.source,
            found.verdict + (f"; {found.note}" if found.note else ""),
            f"{estimate} [{low}, {high}]",
            seeds,
        )
    return view


def entries(
    claims: Sequence[Claim], judgements: Mapping[str, Judgement], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The lines of the ledger.

    Args:
      claims: the claims.
      judgements: what the runs say, by the claim's name.
      about: the fields that all lines share: ``study``, ``scale``, ``runs``, ``diverged``,
        ``unit``, ``budget``, ``command``, ``run``, ``versions`` and ``date``.

    Returns:
      One entry per claim.
    """
    return [
        {
            "claim": claim.name,
            "text": claim.text,
            "source": claim.source,
            "criterion": claim.criterion,
            **dataclasses.asdict(judgements[claim.name]),
            **about,
        }
        for claim in claims
    ]
