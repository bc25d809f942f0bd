"""What a survey of training methods shows: ranks with intervals, and what holds of the claims.

Two qualities are ranked: the test accuracy, and the speed, which is the mean of the validation
accuracy over the run (the area under its curve: no target that a slow method never reaches), at
the same rate. Ranks, intervals over seeds and verdicts are those of the referee
(`experiments.reporting.referee.judging`): the seeds are drawn with replacement, the same ones for
all contestants since these share initial weights and batches, and a claim of the papers behind the
survey holds if all of the interval of its difference is above 0. One tuning decides for all seeds.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments import cli
from experiments.reporting import figures, tables
from experiments.reporting.referee import report as referee
from experiments.reporting.referee.judging import ByBootstrap, LowerError
from experiments.reporting.referee.study import HOLDS, Judgement, Results
from experiments.reporting.statistics import grid_edge, mean_and_error
from experiments.reporting.summary import Record, diverged
from experiments.runs.records import environment

BN = " + BN"  # marks a contestant that was trained with batch normalization
MEMBERS = "'s members"  # marks those of an ensemble
QUALITIES = {"accuracy": "test accuracy", "speed": "speed (mean validation accuracy)"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim as a difference that is above 0 where it holds.

    Attributes:
      name: short.
      paper: who makes it.
      quality: what is compared: ``accuracy``, ``speed`` or ``calibration``.
      better: the contestant that should have more of it.
      worse: the one that should have less; with `of_members` the same ensemble again.
      of_members: whether `better`, an ensemble, is held against its own members.
    """

    name: str
    paper: str
    quality: str
    better: str
    worse: str
    of_members: bool = False

    @property
    def margin(self) -> ByBootstrap:
        """Its judge: the difference with its interval over the seeds."""
        rival = self.worse + MEMBERS if self.of_members else self.worse
        return ByBootstrap(LowerError(method=self.better, rival=rival), settings=False)

    def named(self, name: str) -> referee.Claim:
        """The claim as the ledger has it, with a name of its own."""
        rival = self.worse + MEMBERS if self.of_members else self.worse
        return referee.Claim(
            name=name,
            text=self.name,
            source=self.paper,
            criterion=f"{self.quality} of {self.better}, less that of {rival}, > 0: all of the "
            "95 % bootstrap interval over seeds",
            judge=self.margin,
        )


# The survey's own wording is not at hand: these are the claims of the papers behind its families.
CLAIMS = (
    Claim("momentum is faster than plain SGD", "Polyak, 1964", "speed", "sgd", "plain_sgd"),
    Claim("Nesterov's is faster than momentum", "Nesterov, 1983", "speed", "nesterov_sgd", "sgd"),
    Claim("Adam is faster than momentum", "Kingma and Ba, 2015", "speed", "adam", "sgd"),
    Claim("momentum generalizes better than Adam", "Wilson, 2017", "accuracy", "sgd", "adam"),
    Claim("AMSGrad generalizes better than Adam", "Reddi, 2018", "accuracy", "amsgrad", "adam"),
    Claim("AdaBound is faster than momentum", "Luo, 2019", "speed", "adabound", "sgd"),
    Claim("AdaBound generalizes better than Adam", "Luo, 2019", "accuracy", "adabound", "adam"),
    Claim("cyclical rates are faster", "Smith, 2017", "speed", "cyclical_sgd", "sgd"),
    Claim("cyclical rates are more accurate", "Smith, 2017", "accuracy", "cyclical_sgd", "sgd"),
    Claim("1cycle is more accurate", "Smith and Topin, 2017", "accuracy", "onecycle_sgd", "sgd"),
    Claim("weight norm is faster", "Salimans, 2016", "speed", "weight_norm_sgd", "sgd"),
    Claim("batch norm is faster", "Ioffe and Szegedy, 2015", "speed", "sgd" + BN, "sgd"),
    Claim(
        "weight norm helps on top of batch norm",
        "the survey",
        "speed",
        "weight_norm_sgd" + BN,
        "sgd" + BN,
    ),
    Claim("K-FAC is faster than momentum", "Martens and Grosse, 2015", "speed", "kfac", "sgd"),
    Claim("Hessian-free is faster", "Martens, 2010", "speed", "hessian_free", "sgd"),
    Claim("snapshots beat one network", "Huang, 2017", "accuracy", "snapshot", "sgd"),
    Claim("an average beats its members", "Huang, 2017", "accuracy", "snapshot", "snapshot", True),
    Claim(
        "an average beats its members",
        "Lakshminarayanan, 2017",
        "accuracy",
        *("independent", "independent"),
        of_members=True,
    ),
    Claim(
        "an average is better calibrated",
        "Lakshminarayanan, 2017",
        "calibration",
        *("independent", "independent"),
        of_members=True,
    ),
)


def contestant(row: Mapping[str, Any], records: Sequence[Record], seeds: int) -> dict[str, Any]:
    """What is ranked of a method.

    Args:
      row: its row of a comparison.
      records: of its runs, one per run (learning rate x seed) and evaluation.
      seeds: number of seeds.

    Returns:
      Columns of the row, and `accuracy` and `speed` with one value per seed.
    """
    accuracy, speed = [], []
    for seed in range(seeds):
        run = [
            record
            for record in records
            if record["seed"] == seed and record["learning_rate"] == row["learning_rate"]
        ]
        run.sort(key=lambda record: record["step"])
        accuracy.append(0.0 if diverged(run) else run[-1]["test_accuracy"])
        speed.append(float(np.mean([record["validation_accuracy"] or 0.0 for record in run[1:]])))
    columns = ("family", "learning_rate", "grid_edge", "steps_to_target", "time_relative_to_base")
    return {key: row[key] for key in columns} | {"accuracy": accuracy, "speed": speed}


def ensemble(
    name: str, rate: float, rates: Sequence[float], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What is ranked of a kind of ensembles, and of its members.

    Args:
      name: the kind.
      rate: the learning rate that was chosen.
      rates: those it was chosen from.
      scores: on the test split, one per seed: `{"members": ..., "averages": ...}`.

    Returns:
      The columns of `contestant`, without a speed, and `calibration` (minus the calibration error),
      `member_accuracy` and `member_calibration` with one value per seed.
    """

    def of_members(key: str) -> list[float]:
        return [float(np.mean([member[key] for member in each["members"]])) for each in scores]

    return {
        "name": name,
        "family": "ensembles",
        "learning_rate": rate,
        "grid_edge": grid_edge(rate, rates),
        "steps_to_target": None,
        "time_relative_to_base": None,
        "accuracy": [each["averages"][-1]["accuracy"] for each in scores],
        "speed": None,
        "calibration": [-each["averages"][-1]["calibration_error"] for each in scores],
        "member_accuracy": of_members("accuracy"),
        "member_calibration": [-error for error in of_members("calibration_error")],
    }


def outcome(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], quality: str) -> Results:
    """What the runs say about one quality, as results of the referee with minus it as the error.

    Args:
      config: the settings of the survey.
      rows: one per contestant; those without the quality are left out.
      quality: ``accuracy``, ``speed`` or ``calibration``.

    Returns:
      The results of one setting. The members of an ensemble are a contestant, too.
    """
    values = {row["name"]: row[quality] for row in rows if row.get(quality) is not None}
    key = f"member_{quality}"
    values |= {f"{row['name']}{MEMBERS}": row[key] for row in rows if key in row}
    errors = -np.array(list(values.values()), np.float64)[None]
    return Results.of_errors([config["task"]], list(values), errors, "steps")


def conclude(config: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ranks the contestants and judges the claims.

    Args:
      config: the settings of the survey.
      rows: one per contestant, made by `contestant` or `ensemble`.

    Returns:
      Settings, versions and hardware, the rows with their ranks, the most accurate first, and the
      claims with their verdicts, as plain JSON.
    """
    result = [dict(row) for row in rows]
    for quality in ("accuracy", "speed"):
        alone = [{"name": row["name"], quality: row[quality]} for row in result]
        ranks = {r["contestant"]: r["rank"] for r in referee.ranks(outcome(config, alone, quality))}
        for row in result:
            if row["name"] in ranks:
                row[f"{quality}_rank"] = dict(
                    zip(("rank", "low", "high"), ranks[row["name"]], strict=True)
                )
    return {
        "config": config,
        "environment": environment(),
        "rows": sorted(result, key=lambda row: row["accuracy_rank"]["rank"]),
        "claims": [
            {
                **dataclasses.asdict(claim),
                "difference": found.estimate,
                "low": found.low,
                "high": found.high,
                "verdict": found.verdict,
            }
            for claim, found in judge(config, rows).items()
        ],
    }


def judge(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[Claim, Judgement]:
    """What the runs say about the claims whose contestants take part.

    Args:
      config: the settings of the survey.
      rows: one per contestant.

    Returns:
      The judgements, in the order of `CLAIMS`.
    """
    names = {row["name"] for row in rows}
    results = {q: outcome(config, rows, q) for q in ("accuracy", "speed", "calibration")}
    return {
        claim: claim.margin(results[claim.quality])
        for claim in CLAIMS
        if {claim.better, claim.worse} <= names
    }


def entries(results: Mapping[str, Any], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the ledger.

    Args:
      results: what `conclude` returns.
      about: the fields ``scale``, ``command``, ``run``, ``versions`` and ``date`` of all lines.

    Returns:
      One entry per claim, named by its place in `CLAIMS`.
    """
    config, rows = results["config"], results["rows"]
    shared = {
        "study": "survey",
        "unit": "steps",
        "budget": {config["task"]: cli.plural(config["steps"], "step")},
        "runs": sum(len(row["accuracy"]) for row in rows),
        "diverged": sum(value == 0 for row in rows for value in row["accuracy"]),
    }
    lines = []
    for claim, found in judge(config, rows).items():
        name = string.ascii_lowercase[CLAIMS.index(claim)]
        lines += referee.entries([claim.named(name)], {name: found}, {**shared, **about})
    return lines


def _rank(row: Mapping[str, Any], quality: str) -> str:
    rank = row.get(f"{quality}_rank")
    return "" if rank is None else f"{rank['rank']:g} [{rank['low']:g}–{rank['high']:g}]"


def table(results: Mapping[str, Any]) -> Table:
    """The contestants, the most accurate first."""
    target = f"{100 * results['config']['target']:g}%"
    columns = ["contestant", "family", "rate", "test accuracy %", "rank [95 %]"]
    columns += ["speed", "rank [95 %]", f"steps to {target}"]
    view = tables.table(columns, left=2)
    for row in results["rows"]:
        speed = "" if row["speed"] is None else tables.percent(float(np.mean(row["speed"])))
        steps = row["steps_to_target"]
        view.add_row(
            row["name"],
            row["family"],
            f"{row['learning_rate']:g}" + ("*" if row["grid_edge"] else ""),
            tables.percent(*mean_and_error(row["accuracy"])),
            _rank(row, "accuracy"),
            speed,
            _rank(row, "speed"),
            "" if steps is None else f"{steps:,.0f}",
        )
    return view


def claims_table(results: Mapping[str, Any]) -> Table:
    """The claims with their differences in percentage points."""
    columns = ["claim", "paper", "here", "difference of", "points [95 %]"]
    view = tables.table(columns, left=4, wrap=True)
    for claim in results["claims"]:
        low, mean, high = (100 * claim[key] for key in ("low", "difference", "high"))
        rival = f"{claim['worse']}'s members" if claim["of_members"] else claim["worse"]
        view.add_row(
            *(claim[key] for key in ("name", "paper", "verdict")),
            f"{claim['quality']}: {claim['better']} - {rival}",
            f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
            style="bold" if claim["verdict"] == HOLDS else None,
        )
    return view


@figures.styled
def picture(results: Mapping[str, Any]) -> Figure:
    """The ranks with their intervals, one panel for each quality."""
    rows = results["rows"]
    figure = Figure(figsize=(11, 1.5 + 0.28 * len(rows)))
    families = dict.fromkeys(row["family"] for row in rows)
    # There are more families than colors: the marker tells apart those that share one.
    pairs = itertools.product(figures.MARKERS, figures.COLORS)
    looks = {
        family: (color, marker) for family, (marker, color) in zip(families, pairs, strict=False)
    }
    for axes, quality in zip(figure.subplots(1, 2), ("accuracy", "speed"), strict=True):
        shown = [row for row in rows if row[quality] is not None]
        shown.sort(key=lambda row: row[f"{quality}_rank"]["rank"])
        for place, row in enumerate(shown):
            rank = row[f"{quality}_rank"]
            color, marker = looks[row["family"]]
            axes.plot([rank["low"], rank["high"]], [place, place], color=color, linewidth=2)
            axes.plot(rank["rank"], place, marker, color=color)
        axes.set_yticks(range(len(shown)), [row["name"] for row in shown])
        axes.invert_yaxis()
        axes.set_xlabel(f"rank by {QUALITIES[quality]}, 1 is best")
    for family, (color, marker) in looks.items():
        figure.axes[0].plot([], [], f"{marker}-", color=color, label=family)
    figure.legend(loc="outside lower center", ncols=4)
    config = results["config"]
    figure.suptitle(
        f"Survey on {config['task']}, {config['model']}: ranks and their 95 % intervals over "
        f"{cli.plural(config['seeds'], 'seed')}",
        x=0.01,
        ha="left",
    )
    return figure
