r"""The survey's comparison, run again: families of training methods on real images, one budget.

    python -m experiments.survey --task mnist5k --scale small

The families are those of the survey of rapid training methods: stochastic gradients with and
without momentum, adaptive rates, cyclical rates, weight normalization (with and without batch
normalization), natural gradients and ensembles. Each contestant gets as many learning rates, seeds,
steps and batches as any other; an ensemble has these steps for all its members together. The rate
is chosen on the validation split, the test split is read once per run.

Two qualities are ranked: the test accuracy, and the speed, which is the mean of the validation
accuracy over the run (the area under its curve: no target that a slow method never reaches), at
the same rate. The seeds are drawn again and again with replacement, the same ones for all
contestants since these share initial weights and batches; the interval of a rank holds 95 % of what
comes out. Claims of the papers behind the survey are held against the same draws: a claim "holds
here" if the interval of its difference is above 0, "does not hold here" if it is below, and is
"undecided" otherwise.

`runs/<name>/` then holds

    plain/, batch_norm/     what `experiments.compare` writes, see there
    ensembles.json          accuracy and calibration of members and averages
    survey.json, .png       ranks and claims
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

import optax_accel as oa
from experiments import cli, methods
from experiments.cli import UsageError
from experiments.reporting import comparison, figures, tables
from experiments.reporting.statistics import mean_and_error
from experiments.reporting.summary import COMPARISON, diverged, summarize
from experiments.runs import folders
from experiments.runs.records import RESULTS, environment, read_record, write_record
from experiments.runs.study import kept
from experiments.training import comparison as training
from experiments.training import ensembles
from experiments.training.replicas import Plan, Record, Trainer

PROG = "python -m experiments.survey"
MODELS = ("mlp", "cnn")  # those with and without batch normalization
MEMBERS = 5  # of an ensemble, as in Huang et al., 2017, section 4
ENSEMBLES = ("independent", "snapshot")
PLAIN = (
    *("plain_sgd", "sgd", "nesterov_sgd"),
    *("adagrad", "adadelta", "rmsprop", "adam", "adamax", "nadam", "amsgrad"),
    *("adabound", "amsbound", "cyclical_sgd", "onecycle_sgd", "vtpc_sgd", "weight_norm_sgd"),
    *(name for name in ("kfac", "ekfac", "hessian_free") if name in methods.METHODS),
)
BATCH_NORM = ("sgd", "weight_norm_sgd")
BN = " + BN"  # marks a contestant that was trained with batch normalization
SCALES = {"small": (5, 1), "full": (10, 3)}  # seeds, and times the task's usual number of passes
DRAWS = 10_000
# What a survey's folder holds.
FILES, FOLDERS = ("ensembles.json", "survey.json", "survey.png"), ("plain", "batch_norm")


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Run the survey's comparison again: ranks with intervals, and what holds of its claims."""

    limits: ClassVar = {"seeds": cli.Range(2, 1_000)}  # one seed makes no interval

    task: str = "digits"
    """Data set of images to classify; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model: mlp or cnn; default: the task's own if it is one of them, else cnn."""
    scale: str = "small"
    """small (5 seeds, the task's usual number of passes) or full (10 seeds, three times that)."""
    seeds: int | None = None
    """Seeds, instead of the scale's."""
    steps: int | None = None
    """Steps, instead of the scale's."""
    batch_size: int = 64
    """Examples per step."""
    name: str | None = None
    """Name of the run's folder; default: survey-<task>-<scale>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace an earlier run of the same name."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim as a difference that is above 0 where it holds.

    Attributes:
      name: short.
      paper: who makes it.
      quality: ``accuracy``, ``speed``, ``member_accuracy`` or ``calibration``, of the contestants.
      better: the contestant that should have more of it.
      worse: the one that should have less; for ``of_members`` the same ensemble's members.
      of_members: whether `better`, an ensemble, is held against its own members.
    """

    name: str
    paper: str
    quality: str
    better: str
    worse: str
    of_members: bool = False


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


# Training ---------------------------------------------------------------------------------------


def resolve(options: Options) -> Plan:
    """Checks the options; returns the training of the contestants that are no ensembles.

    Raises:
      UsageError, data.DataError, ValueError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("scale", options.scale, tuple(SCALES))
    cli.check_known("model", options.model, MODELS)
    seeds, passes = SCALES[options.scale]
    plan = training.plan(
        options.task,
        PLAIN,
        data_dir=options.data_dir,
        model=options.model,
        seeds=seeds if options.seeds is None else options.seeds,
        steps=options.steps,
        epochs=passes * training.DEFAULT_EPOCHS.get(options.task, 10),
        batch_size=options.batch_size,
    )
    if plan.task.vocabulary_size is not None:
        raise UsageError(f"the survey is about images, {options.task} holds sentences")
    ensembles.snapshot_cycle(plan.steps, MEMBERS)
    return plan if plan.model in MODELS else dataclasses.replace(plan, model="cnn")


def train(plan: Plan, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Trains what is not finished yet; returns one row per contestant.

    Each row holds, besides the columns of the table, `accuracy`, `speed` (None for ensembles) and,
    for ensembles, `member_accuracy`, `calibration` and `member_calibration` (minus the calibration
    error) with one value per seed.
    """
    rows = []
    for panel, panel_plan in panel_plans(plan).items():
        console.print(f"{panel}: {cli.plural(len(panel_plan.methods), 'method')}")
        place = folder / panel
        outcome = training.train(panel_plan, place, Trainer(panel_plan), console)
        results = summarize(panel_plan.config(), panel_plan.methods, *outcome)
        cli.write_atomic(place / RESULTS, cli.to_json(results))
        comparison.write_all(place, results)
        for row in results["rows"]:
            mark = BN if panel == "batch_norm" else ""
            seeds = contestant(plan.seeds, row, outcome.records[row["method"]])
            rows.append(seeds | {"name": row["method"] + mark})
    console.print(f"ensembles of {MEMBERS}")
    return rows + train_ensembles(plan, folder / "ensembles.json", console)


def panel_plans(plan: Plan) -> dict[str, Plan]:
    """The comparisons that a survey is made of, by the folder of each."""
    return {"plain": plan, "batch_norm": batch_norm(plan)}


def batch_norm(plan: Plan) -> Plan:
    """The same training of the few methods that are compared with batch normalization."""
    return dataclasses.replace(
        plan, methods=methods.get_methods(BATCH_NORM), model_options={"norm": "batch"}
    )


def contestant(seeds: int, row: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """What is ranked of a method, by seed, from its row of a comparison and its records."""
    accuracy, speed = [], []
    for seed in range(seeds):
        own = [
            record
            for record in records
            if record["seed"] == seed and record["learning_rate"] == row["learning_rate"]
        ]
        own.sort(key=lambda record: record["step"])
        failed = diverged(own)
        accuracy.append(0.0 if failed else own[-1]["test_accuracy"])
        speed.append(float(np.mean([record["validation_accuracy"] or 0.0 for record in own[1:]])))
    return {
        "family": row["family"],
        "learning_rate": row["learning_rate"],
        "grid_edge": row["grid_edge"],
        "steps_to_target": row["steps_to_target"],
        "time_relative_to_base": row["time_relative_to_base"],
        "accuracy": accuracy,
        "speed": speed,
    }


def train_ensembles(plan: Plan, path: Path, console: Console) -> list[dict[str, Any]]:
    """Trains ensembles by SGD with momentum, a cosine cycle for each member; returns their rows."""
    if (record := read_record(path)) is not None:
        console.print("  already done")
        return record["rows"]
    method = methods.METHODS["sgd"]
    rows = []
    for kind in ENSEMBLES:
        begin = time.perf_counter()
        if kind == "snapshot":
            found = ensembles.train_snapshots(plan, method, method.learning_rates, MEMBERS)
        else:
            steps = plan.steps // MEMBERS
            found = ensembles.train_members(
                dataclasses.replace(plan, steps=steps),
                method,
                method.learning_rates,
                MEMBERS,
                schedule=functools.partial(
                    oa.snapshot_schedule, total_steps=steps, num_snapshots=1
                ),
            )
        rate = ensembles.best_rate(found)
        scores = [each.scores("test") for each in found if each.learning_rate == rate]
        edges = {min(method.learning_rates): "lowest", max(method.learning_rates): "highest"}
        row: dict[str, Any] = {
            "name": kind,
            "family": "ensembles",
            "learning_rate": rate,
            "grid_edge": edges.get(rate),
            "steps_to_target": None,
            "time_relative_to_base": None,
            "accuracy": [each["averages"][-1]["accuracy"] for each in scores],
            "speed": None,
            "calibration": [-each["averages"][-1]["calibration_error"] for each in scores],
        }
        for key, name, sign in (
            ("accuracy", "member_accuracy", 1),
            ("calibration_error", "member_calibration", -1),
        ):
            row[name] = [
                sign * float(np.mean([member[key] for member in each["members"]]))
                for each in scores
            ]
        rows.append(row)
        console.print(f"  {kind:<18} {time.perf_counter() - begin:.1f} s")
    write_record(path, {"rows": rows})
    return rows


# What comes out ---------------------------------------------------------------------------------


def draw(seeds: int, draws: int = DRAWS) -> np.ndarray:
    """Seeds drawn with replacement, `(draws, seeds)`: the same ones in every run."""
    return np.random.default_rng(0).integers(0, seeds, (draws, seeds))


def interval(values: Any) -> tuple[float, float]:
    """The range of 95 % of the values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def ranks(values: Any, drawn: np.ndarray) -> list[dict[str, float]]:
    """Ranks of contestants, 1 the best, ties shared, by the mean over the seeds.

    >>> [row["rank"] for row in ranks([[0.9, 0.8], [0.5, 0.6], [0.9, 0.8]], draw(2, 100))]
    [1.5, 3.0, 1.5]

    Args:
      values: `(contestants, seeds)`, more is better.
      drawn: the bootstrap's choices of seeds, from `draw`.

    Returns:
      For each contestant `rank`, of the mean over all seeds, and `low`, `high`, the ends of the
      bootstrap's 95 % interval.
    """
    values = np.asarray(values, np.float64)
    rank = rankdata(-values.mean(axis=1).round(12))
    redrawn = rankdata(-values[:, drawn].mean(axis=2).round(12), axis=0)
    return [
        {"rank": float(own), **dict(zip(("low", "high"), interval(others), strict=True))}
        for own, others in zip(rank, redrawn, strict=True)
    ]


def judge(claim: Claim, rows: Mapping[str, Mapping[str, Any]], drawn: np.ndarray) -> dict[str, Any]:
    """Holds a claim against the contestants' values.

    Args:
      claim: the claim.
      rows: the contestants by name.
      drawn: the bootstrap's choices of seeds, from `draw`.

    Returns:
      The claim with its `difference`, the mean over the seeds, the ends `low` and `high` of the
      bootstrap's 95 % interval, and the `verdict`.
    """
    worse = f"member_{claim.quality}" if claim.of_members else claim.quality
    difference = np.array(rows[claim.better][claim.quality]) - np.array(rows[claim.worse][worse])
    low, high = interval(difference[drawn].mean(axis=1))
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    return {
        **dataclasses.asdict(claim),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "verdict": f"{verdict} here" if verdict != "undecided" else verdict,
    }


def conclude(plan: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ranks and claims, as plain JSON."""
    drawn = draw(plan.seeds)
    result = [dict(row) for row in rows]
    for quality in ("accuracy", "speed"):
        ranked = [row for row in result if row[quality] is not None]
        for row, rank in zip(ranked, ranks([r[quality] for r in ranked], drawn), strict=True):
            row[f"{quality}_rank"] = rank
    by_name = {row["name"]: row for row in result}
    return {
        "config": plan.config(),
        "environment": environment(),
        "rows": sorted(result, key=lambda row: row["accuracy_rank"]["rank"]),
        "claims": [
            judge(claim, by_name, drawn)
            for claim in CLAIMS
            if {claim.better, claim.worse} <= set(by_name)
        ],
    }


# Output -----------------------------------------------------------------------------------------


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
        speed = "" if row["speed"] is None else f"{100 * np.mean(row['speed']):.2f}"
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
            style="bold" if claim["verdict"] == "holds here" else None,
        )
    return view


def picture(results: Mapping[str, Any]) -> Figure:
    """The ranks with their intervals, one panel for each quality."""
    rows = results["rows"]
    figure = Figure(figsize=(11, 1.5 + 0.28 * len(rows)), layout="constrained")
    families = list(dict.fromkeys(row["family"] for row in rows))
    for axes, quality in zip(figure.subplots(1, 2), ("accuracy", "speed"), strict=True):
        figures.frame(axes)
        shown = [row for row in rows if row[quality] is not None]
        shown.sort(key=lambda row: row[f"{quality}_rank"]["rank"])
        for place, row in enumerate(shown):
            rank = row[f"{quality}_rank"]
            color = figures.COLORS[families.index(row["family"]) % len(figures.COLORS)]
            axes.plot([rank["low"], rank["high"]], [place, place], color=color, linewidth=2)
            axes.plot(rank["rank"], place, "o", color=color)
        axes.set_yticks(range(len(shown)), [row["name"] for row in shown])
        axes.invert_yaxis()
        axes.set_xlabel(f"rank by {QUALITIES[quality]}, 1 is best")
    for family, color in zip(families, figures.COLORS, strict=False):
        figure.axes[0].plot([], [], "o-", color=color, label=family)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    config = results["config"]
    figure.suptitle(
        f"Survey on {config['task']}, {config['model']}: ranks and their 95 % intervals over "
        f"{cli.plural(config['seeds'], 'seed')}",
        x=0.01,
        ha="left",
    )
    return figure


QUALITIES = {"accuracy": "test accuracy", "speed": "speed (mean validation accuracy)"}


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan = resolve(options)
    default = f"survey-{options.task}-{options.scale}"
    folder = folders.locate(options.runs_dir, options.name, default)
    panels = [
        COMPARISON(folder / name, panel_plan.config(), overwrite=options.overwrite)
        for name, panel_plan in panel_plans(plan).items()
    ]

    def check() -> None:
        if not folders.is_new(folder) and not (folder / "plain").is_dir():
            raise UsageError(f"{folder} is not a survey's folder; give another --name")
        folders.check_files(folder, FILES, FOLDERS)
        for panel in panels:
            panel.check()

    console = cli.console(130)
    contestants = len(PLAIN) + len(BATCH_NORM) + len(ENSEMBLES)
    begin = time.perf_counter()
    with folders.claim(folder, check), kept(folder):
        if options.overwrite:
            (folder / "ensembles.json").unlink(missing_ok=True)
        for panel in panels:
            panel.open()
        console.print(
            f"{plan.task.name}, {plan.model}: {contestants} contestants x "
            f"{len(plan.methods[0].learning_rates)} learning rates x "
            f"{cli.plural(plan.seeds, 'seed')}, {cli.plural(plan.steps, 'step')} of "
            f"{cli.plural(plan.batch_size, 'example')} -> {folder}",
            soft_wrap=True,
        )
        results = conclude(plan, train(plan, folder, console))
        cli.write_atomic(folder / "survey.json", cli.to_json(results))
        cli.write_atomic(folder / "survey.png", figures.png(picture(results)))
    console.print()
    console.print(table(results))
    console.print()
    console.print(claims_table(results))
    console.print()
    held = sum(claim["verdict"] == "holds here" for claim in results["claims"])
    console.print(
        f"{held} of {len(results['claims'])} claims hold here. Accuracies: mean ± standard error "
        "over the seeds. Speed: mean validation accuracy over the run, in %. * an end of the "
        f"rates: beyond it may be a better one. {(time.perf_counter() - begin) / 60:.1f} minutes."
    )
    console.print(f"picture: {folder / 'survey.png'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
