r"""The survey's comparison, run again: families of training methods on real images, one budget.

    python -m experiments.survey --task mnist5k --scale small

The families are those of the survey of rapid training methods: stochastic gradients with and
without momentum, adaptive rates, cyclical rates, weight normalization (with and without batch
normalization), natural gradients and ensembles. Each contestant gets as many learning rates, seeds,
steps and batches as any other; an ensemble has these steps for all its members together. The rate
is chosen on the validation split, the test split is read once per run.

How contestants are ranked and claims of the papers are judged: `experiments.reporting.survey`.
`runs/<name>/` then holds

    plain/, batch_norm/     what `experiments.compare` writes: config, metrics, table, pictures
    ensembles.json          accuracy and calibration of members and averages
    survey.json, .png, .svg ranks and claims

and `evidence/survey.jsonl`, the ledger, one line more for each verdict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from experiments import cli, data, methods, progress
from experiments.cli import UsageError
from experiments.reporting import comparison, figures
from experiments.reporting import survey as report
from experiments.reporting.referee.study import HOLDS
from experiments.reporting.summary import COMPARISON, summarize
from experiments.reporting.survey import BN
from experiments.runs import folders, ledger
from experiments.runs.records import RESULTS, read_record, versions, write_record
from experiments.runs.study import kept
from experiments.training.replicas import Plan, Trainer
from experiments.training.studies import comparison as training
from experiments.training.studies import ensembles, forecast

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
SCALES = {"small": (5, 1), "full": (10, 3)}  # seeds, and times the task's usual number of passes
# What a survey's folder holds.
FILES = ("ensembles.json", "survey.json", *figures.files("survey"))
FOLDERS = ("plain", "batch_norm")


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Run the survey's comparison again: ranks with intervals, claims with verdicts."""

    limits: ClassVar = {"seeds": cli.Range(2, 1_000)}  # one seed makes no interval

    task: str = "digits"
    """Data set of images to classify; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model: mlp or cnn; default: the task's own if it is one of them, else cnn."""
    scale: str = "small"
    """small (5 seeds, the task's usual number of passes) or full (10 seeds, three times that)."""
    learning_rates: str | None = None
    """Rates that every method is tuned on, separated by commas, such as 0.01,0.1; default: the grid
    of each method."""
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
    evidence_dir: Path = ledger.FOLDER
    """The ledger's folder, to which the verdicts are added, but for those of a run with --steps."""
    overwrite: bool = False
    """Replace an earlier run of the same name."""


def resolve(options: Options) -> Plan:
    """Checks the options; returns the training of the contestants that are not ensembles.

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
        learning_rates=cli.read_rates("--learning-rates", options.learning_rates),
        data_dir=options.data_dir,
        files=options.files,
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
            records = outcome.records[row["method"]]
            rows.append(
                report.contestant(row, records, plan.seeds) | {"name": row["method"] + mark}
            )
    console.print(f"ensembles of {MEMBERS}")
    return rows + train_ensembles(plan, folder / "ensembles.json", console)


def panel_plans(plan: Plan) -> dict[str, Plan]:
    """The comparisons that a survey is made of, by the folder of each."""
    again = [method for method in plan.methods if method.name in BATCH_NORM]
    batch_norm = dataclasses.replace(plan, methods=again, model_options={"norm": "batch"})
    return {"plain": plan, "batch_norm": batch_norm}


def train_ensembles(plan: Plan, path: Path, console: Console) -> list[dict[str, Any]]:
    """Trains ensembles by SGD with momentum, a cosine cycle for each member; returns their rows."""
    if (record := read_record(path)) is not None:
        console.print("  already done")
        return record["rows"]
    (method,) = (method for method in plan.methods if method.name == "sgd")
    rates = method.learning_rates
    rows = []
    for kind in ENSEMBLES:
        begin = time.perf_counter()
        with progress.show(console, kind, len(rates) * plan.seeds * plan.steps):
            trained = ensembles.train_kind(kind, plan, method, rates, MEMBERS)
        best = ensembles.best_rate(trained)
        scores = [each.scores("test") for each in trained if each.learning_rate == best]
        rows.append(report.ensemble(kind, best, rates, scores))
        console.print(f"  {kind:<18} {time.perf_counter() - begin:.1f} s")
    write_record(path, {"rows": rows})
    return rows


def dry_run(heading: str, plan: Plan, console: Console) -> int:
    """Prints what a whole survey would take; returns the exit code."""
    shares = []
    with progress.show(console, "survey"):
        for panel in panel_plans(plan).values():
            trainer = Trainer(panel)
            for method in progress.each(panel.methods, "{0.name}: compiling".format):
                shares.append(forecast.of_method(trainer, method, panel.replicas(method)))
        (sgd,) = (method for method in plan.methods if method.name == "sgd")
        kinds, rates = len(ENSEMBLES), sgd.learning_rates
        seconds = forecast.of_ensembles(Trainer(plan), sgd, kinds, rates)
    runs = sum(share.runs for share in shares)
    lines = {
        "plan": heading,
        "runs": f"{runs} of single networks, {kinds * len(rates) * plan.seeds} ensembles of "
        f"{MEMBERS}; those that are finished are counted, too",
        **forecast.of_shares(Trainer(plan), shares),
    }
    seconds += sum(share.seconds for share in shares)
    lines["time"] = (
        f"about {cli.duration(seconds)}, from steps measured after compilation, with compilation "
        "and validations"
    )
    return cli.print_forecast(console, lines)


def command(options: Options) -> str:
    """The command line that runs a survey again, without the folder of its data files."""
    words = [PROG, "--task", options.task, "--scale", options.scale]
    for name in ("model", "seeds", "learning_rates"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.task != "digits":
        words += ["--data-dir", "DATA"]
    return " ".join(words)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan = resolve(options)
    default = f"survey-{data.short_name(options.task, options.data_dir)}-{options.scale}"
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
    heading = (
        f"{plan.task.name}, {plan.model}: {contestants} contestants x "
        f"{len(plan.methods[0].learning_rates)} learning rates x "
        f"{cli.plural(plan.seeds, 'seed')}, {cli.plural(plan.steps, 'step')} of "
        f"{cli.plural(plan.batch_size, 'example')} -> {folder}"
    )
    if options.dry_run:
        check()
        return dry_run(heading, plan, console)
    with folders.claim(folder, check), kept(folder):
        if options.overwrite:
            (folder / "ensembles.json").unlink(missing_ok=True)
        for panel in panels:
            panel.open()
        console.print(heading, soft_wrap=True)
        results = report.conclude(plan.config(), train(plan, folder, console))
        cli.write_atomic(folder / "survey.json", cli.to_json(results))
        figures.write(folder, "survey", report.picture(results))
        if options.steps is None:
            config = json.dumps(plan.config())
            about = {
                "scale": options.scale,
                "command": command(options),
                "run": hashlib.sha256(config.encode()).hexdigest()[:8],
                "versions": versions(),
                "date": ledger.today(),
            }
            ledger.append(options.evidence_dir / "survey.jsonl", report.entries(results, about))
    console.print()
    console.print(report.table(results))
    console.print()
    console.print(report.claims_table(results))
    console.print()
    held = sum(claim["verdict"] == HOLDS for claim in results["claims"])
    console.print(
        f"{held} of {len(results['claims'])} claims hold here (bold). Accuracies: mean ± standard "
        "error over the seeds. Speed: mean validation accuracy over the run, in %. * an end of the "
        f"rates: beyond it may be a better one. {(time.perf_counter() - begin) / 60:.1f} minutes."
    )
    console.print(f"picture: {folder / 'survey.png'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
