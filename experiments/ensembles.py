"""Ensembles: several networks whose predicted probabilities are averaged, for one training budget.

    python -m experiments.ensembles --task digits --members 5

All kinds take the same number of steps together, `--steps`:

    single          one network
    independent     each member a `--members`-th of the steps (rounded down), from weights of its
                    own and in a batch order of its own; all in one compiled program (`vmap`)
    snapshot        one network; its learning rate falls from the top to 0 once per member, and the
                    end of each such cycle is a member (Huang et al., 2017)

Each kind gets the best learning rate of the method's grid, by the validation accuracy of its
average; what is reported was measured on the test split: accuracy, negative log likelihood (NLL)
and calibration error of the members and of the averages over the last m of them. `runs/<name>/`
then holds

    results.json            the settings and all numbers, for each kind, seed, split and member
    ensembles.png, .svg     accuracy and calibration error over the number of members averaged
    report.html             the tables and the picture

What the calibration error is, and the papers: `experiments.training.studies.calibration` and
`experiments.training.studies.ensembles`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import cli, data, methods, progress, timing
from experiments.cli import UsageError
from experiments.reporting import ensembles as reporting
from experiments.reporting import figures, pages
from experiments.reporting.ensembles import Record
from experiments.runs import folders
from experiments.runs.records import number
from experiments.runs.study import check_results, claim_results, write_results
from experiments.training.replicas import Plan, Trainer
from experiments.training.studies import comparison, forecast
from experiments.training.studies.calibration import BINS
from experiments.training.studies.ensembles import (
    KINDS,
    SCHEDULES,
    best_rate,
    snapshot_cycle,
    train_kind,
    validate,
)

PROG = "python -m experiments.ensembles"
FILES = (*figures.files("ensembles"), "report.html")


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Train ensembles of each kind with one budget; compare accuracy and calibration."""

    task: str = "digits"
    """Data set to classify; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model; default: the task's own. An unknown name lists all."""
    kind: str = "all"
    """single, independent, snapshot, or all."""
    method: str = "sgd"
    """Training method; an unknown name lists all."""
    learning_rates: str | None = None
    """Rates to choose from, separated by commas, such as 0.01,0.1; default: the method's grid."""
    schedule: str = "cosine"
    """Schedule of single and independent members: cosine (one cycle, down to 0) or constant."""
    members: int = 5
    """Members of an ensemble."""
    steps: int | None = None
    """Steps of all members together; default: the task's usual number of passes."""
    batch_size: int = 64
    """Examples per step."""
    curvature_batch_size: int | None = None
    """Examples (fixed per seed) for Hessian-vector products; default: twice the batch size."""
    seeds: int = 3
    """Ensembles of each kind, which differ in initial weights and batch order."""
    bins: int = BINS
    """Bins of the calibration error."""
    name: str | None = None
    """Name of the run's folder; default: ensembles-<task>-<method>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""


def resolve(options: Options) -> tuple[Plan, list[str], list[float]]:
    """Checks the options; returns the plan for the whole budget, the kinds and the rates.

    Raises:
      ValueError: with one line that says what is allowed.
    """
    options.check()
    cli.check_known("kind", options.kind, (*KINDS, "all"))
    cli.check_known("method", options.method, tuple(methods.METHODS))
    cli.check_known("schedule", options.schedule, tuple(SCHEDULES))
    plan = comparison.plan(
        options.task,
        [options.method],
        learning_rates=cli.read_rates("--learning-rates", options.learning_rates),
        data_dir=options.data_dir,
        files=options.files,
        model=options.model,
        seeds=options.seeds,
        steps=options.steps,
        batch_size=options.batch_size,
        curvature_batch_size=options.curvature_batch_size,
    )
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    if kinds != ["single"] and options.members > plan.steps:
        raise UsageError(
            f"--members {options.members} is more than the {cli.plural(plan.steps, 'step')} "
            "that all members take together; raise --steps"
        )
    if "snapshot" in kinds:
        snapshot_cycle(plan.steps, options.members)
    return plan, kinds, [*plan.methods[0].learning_rates]


def run(options: Options, plan: Plan, kind: str, rates: Sequence[float]) -> Record:
    """Trains the ensembles of one kind at all rates; returns the results at the best one."""
    (method,) = plan.methods
    ensembles = train_kind(kind, plan, method, rates, options.members, options.schedule)
    best = best_rate(ensembles)
    chosen = [ensemble for ensemble in ensembles if ensemble.learning_rate == best]
    return {
        "kind": kind,
        "members": len(chosen[0].members),
        "steps": chosen[0].steps,
        "gradient_evaluations": chosen[0].gradient_evaluations,
        "learning_rate": best,
        "validation": [
            {"learning_rate": rate} | means for rate, means in validate(ensembles).items()
        ],
        "seeds": [
            {split: ensemble.scores(split, options.bins) for split in ensemble.labels}
            for ensemble in chosen
        ],
    }


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        plan, kinds, rates = resolve(options)
    default = f"ensembles-{data.short_name(options.task, options.data_dir)}-{options.method}"
    folder = folders.locate(options.runs_dir, options.name, default)
    console = cli.console(120)
    heading = (
        f"{plan.task.name}, {plan.model}, {options.method}: "
        f"{cli.plural(options.members, 'member')}, {cli.plural(plan.steps, 'step')} of "
        f"{cli.plural(plan.batch_size, 'example')} together, "
        f"{cli.plural(len(rates), 'rate')} x {cli.plural(plan.seeds, 'seed')} -> {folder}"
    )
    if options.dry_run:
        check_results(folder, PROG, FILES)
        return dry_run(heading, plan, len(kinds), rates, console)
    with claim_results(folder, PROG, FILES):
        console.print(heading, soft_wrap=True)
        records = []
        with progress.show(console, "ensembles"):
            # Steps of one network; members of a kind share them.
            progress.expect(len(kinds) * len(rates) * plan.seeds * plan.steps)
            for kind in kinds:
                begin = time.perf_counter()
                records.append(run(options, plan, kind, rates))
                console.print(f"  {kind:<12} {time.perf_counter() - begin:.1f} s")
        result = {"machine": timing.machine(), "kinds": records}
        write_results(folder, PROG, options, _plain(result))
        title = f"Ensembles on {options.task} with {options.method}, one budget"
        pictures = figures.write(folder, "ensembles", reporting.picture(records, title))
        for view in reporting.tables(records, rates):
            console.print()
            console.print(view)
        console.print()
        if any(reporting.on_edge(record, rates) for record in records):
            console.print("* an end of the rates: beyond it may be a better one")
        pages.write_study(
            folder / "report.html",
            title,
            PROG,
            options,
            printed=console.printed,
            pictures={"Accuracy and calibration": pictures["ensembles.svg"]},
        )
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return 0


def dry_run(heading: str, plan: Plan, kinds: int, rates: Sequence[float], console: Console) -> int:
    """Prints what the ensembles would take; returns the exit code."""
    (method,), trainer = plan.methods, Trainer(plan)
    with progress.show(console, "ensembles"):
        seconds = forecast.of_ensembles(trainer, method, kinds, rates)
    ensembles = kinds * len(rates) * plan.seeds
    lines = {
        "plan": heading,
        "runs": f"{ensembles} ensembles: {cli.plural(kinds, 'kind')} x "
        f"{cli.plural(len(rates), 'rate')} x {cli.plural(plan.seeds, 'seed')}",
        **forecast.of_shapes(plan.task, plan.model, plan.batch_size),
        "time": f"about {cli.duration(seconds)}, from steps of runs together, measured after "
        "compilation; without the predictions of the members",
    }
    return cli.print_forecast(console, lines)


def _plain(value: Any) -> Any:
    """For JSON: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return number(value) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
