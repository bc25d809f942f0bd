"""Judge claims about whole procedures of training: fine-tuning, pruning, skipped epochs.

    python -m experiments.protocols fine_tuning --scale small

As in `experiments.referee` a study is data whose claims have a criterion written down, every
contestant gets the same number of learning rates, which the validation split chooses from on seeds
of their own, and the final runs have fresh seeds and are read on the test split. All runs count;
one that diverged has failed. But the contestants need not share one training step: each is run by
code of the study, in `experiments.training.studies`. Settings that need data files are left out
where no folder of them is given. `runs/<name>/` then holds

    config.json             what was run: the same command continues it, another one is refused
    <setting>/              the scores of its runs, tuning and final
    results.json            chosen rates, scores, verdicts
    *.png, *.svg            of the edge of stability: its pictures

and `evidence/<study>.jsonl`, the ledger, one line more for each verdict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import cli, progress
from experiments.cli import UsageError
from experiments.reporting import edge_of_stability as pictures_of_edge_of_stability
from experiments.reporting import figures
from experiments.reporting.referee import continual as claims_of_continual
from experiments.reporting.referee import data_assimilation as claims_of_data_assimilation
from experiments.reporting.referee import edge_of_stability as claims_of_edge_of_stability
from experiments.reporting.referee import equilibrium as claims_of_equilibrium
from experiments.reporting.referee import equilibrium_flow as claims_of_equilibrium_flow
from experiments.reporting.referee import feedback as claims_of_feedback
from experiments.reporting.referee import fine_tuning as claims_of_fine_tuning
from experiments.reporting.referee import local_losses as claims_of_local_losses
from experiments.reporting.referee import low_memory as claims_of_low_memory
from experiments.reporting.referee import protocols as report
from experiments.reporting.referee import report as referee
from experiments.reporting.referee import sampled_operations as claims_of_sampled_operations
from experiments.reporting.referee import scale as claims_of_scale
from experiments.reporting.referee import skipped_epochs as claims_of_skipped_epochs
from experiments.reporting.referee.protocols import Protocols, Runs, Setting
from experiments.runs import folders, ledger
from experiments.runs.records import RESULTS, provenance, versions
from experiments.runs.study import StudyFolder
from experiments.training.studies import (
    continual,
    data_assimilation,
    edge_of_stability,
    equilibrium,
    equilibrium_flow,
    feedback,
    fine_tuning,
    local_losses,
    low_memory,
    sampled_operations,
    scale,
    skipped_epochs,
)
from experiments.training.studies.protocol_runs import FINAL, KEPT, TUNING, Ring, Runner

PROG = "python -m experiments.protocols"
# A runner is made of a setting's options, the folder of data files, and a folder of its own.
MakeRunner = Callable[[Mapping[str, Any], Path | None, Path], Runner]
STUDIES: dict[str, tuple[Protocols, MakeRunner]] = {
    study.name: (study, make)
    for study, make in (
        (claims_of_feedback.STUDY, feedback.Runner),
        (claims_of_continual.STUDY, continual.Runner),
        (claims_of_data_assimilation.STUDY, data_assimilation.Runner),
        (claims_of_edge_of_stability.STUDY, edge_of_stability.Runner),
        (claims_of_equilibrium_flow.STUDY, equilibrium_flow.Runner),
        (claims_of_equilibrium.STUDY, equilibrium.Runner),
        (claims_of_fine_tuning.STUDY, fine_tuning.Runner),
        (claims_of_local_losses.STUDY, local_losses.Runner),
        (claims_of_low_memory.STUDY, low_memory.Runner),
        (claims_of_sampled_operations.STUDY, sampled_operations.Runner),
        (claims_of_scale.STUDY, scale.Runner),
        (claims_of_skipped_epochs.STUDY, skipped_epochs.Runner),
    )
}
# What else a study draws of its final runs, and the names of these pictures.
PICTURES = {claims_of_edge_of_stability.STUDY.name: pictures_of_edge_of_stability}
DATA = "OPTAX_ACCEL_DATA"


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Judge claims about whole procedures of training by runs that can refute them."""

    study: str | None = None
    """Study: feedback, continual, data_assimilation, edge_of_stability, equilibrium,
    equilibrium_flow, fine_tuning, local_losses, low_memory, sampled_operations, scale or
    skipped_epochs; it may also stand first, without the option's name. Without one, a line on each
    is printed."""
    scale: str = "small"
    """smoke (to try a study out: its verdicts do not go into the ledger), small (minutes on two
    cores), medium or full."""
    settings: str | None = None
    """Settings to run, separated by commas; default: all, without a data folder those that need
    none. An unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA."""
    name: str | None = None
    """Name of the run's folder; default: the study, the scale and a hash of the settings."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    evidence_dir: Path = ledger.FOLDER
    """The ledger's folder; by default that of the checkout, which is under version control."""
    overwrite: bool = False
    """Replace an earlier run of the same name."""


def find_study(name: str | None) -> tuple[Protocols, MakeRunner]:
    """The study of a name, checked, and what makes its runners.

    Raises:
      UsageError: there is none, or it is not fair.
    """
    if name is None:
        lines = [f"  {name:<20} {study.summary}" for name, (study, _) in STUDIES.items()]
        raise UsageError("\n".join(["no study given; valid:", *lines]))
    cli.check_known("study", name, tuple(STUDIES))
    STUDIES[name][0].check()
    return STUDIES[name]


def choose_settings(study: Protocols, options: Options) -> list[Setting]:
    """The settings of the scale that are run.

    Raises:
      UsageError: one is unknown, or none is left without data files.
    """
    settings = study.scales[options.scale].settings
    if options.settings is not None:
        names = [name.strip() for name in options.settings.split(",")]
        for name in names:
            cli.check_known("setting", name, tuple(setting.name for setting in settings))
        return [setting for setting in settings if setting.name in names]
    if options.data_dir is None and not os.environ.get(DATA):
        settings = tuple(setting for setting in settings if not setting.files)
    if not settings:
        raise UsageError(
            f"all settings of {study.name}, {options.scale}, need data files; give their folder as "
            f"--data-dir or {DATA}"
        )
    return list(settings)


def train(
    study: Protocols,
    scale: str,
    settings: Sequence[Setting],
    rings: Sequence[Ring],
    console: Console,
) -> tuple[dict[str, dict[str, float]], Runs]:
    """Tunes every contestant and trains it on fresh seeds at the chosen rate.

    Returns:
      The chosen rates and the final runs, by the names of setting and contestant.
    """
    number, seeds = study.scales[scale].tuning_seeds, study.scales[scale].seeds
    chosen: dict[str, dict[str, float]] = {}
    final: dict[str, dict[str, Any]] = {}
    for setting, ring in zip(settings, rings, strict=True):
        console.print(f"{setting.name}: {cli.plural(len(setting.contestants), 'contestant')}")
        chosen[setting.name], final[setting.name] = {}, {}
        for contestant in setting.contestants:
            begin = time.perf_counter()
            rates = contestant.learning_rates
            trials = [(r, s) for r in rates for s in range(number)] if len(rates) > 1 else []
            options = contestant.options
            tuning = ring.train(TUNING, contestant.file, options, trials) if trials else []
            rate = report.choose(contestant, tuning)
            fresh = [(rate, seed) for seed in range(number, number + seeds)]
            final[setting.name][contestant.name] = ring.train(
                FINAL, contestant.file, options, fresh
            )
            chosen[setting.name][contestant.name] = rate
            console.print(f"  {contestant.name:<28} {time.perf_counter() - begin:.1f} s")
    return chosen, final


def count(study: Protocols, scale: str, setting: Setting, runner: Runner) -> tuple[int, float]:
    """Number of a setting's runs, and of the mini-batch gradients of all of them."""
    of_tuning, seeds = study.scales[scale].tuning_seeds, study.scales[scale].seeds
    runs, gradients = 0, 0.0
    for contestant in setting.contestants:
        rates = len(contestant.learning_rates)
        own = seeds + (rates * of_tuning if rates > 1 else 0)
        runs += own
        gradients += own * runner.gradients(contestant.options)
    return runs, gradients


def dry_run(
    heading: str,
    study: Protocols,
    scale: str,
    settings: Sequence[Setting],
    rings: Sequence[Ring],
    console: Console,
) -> int:
    """Prints what a whole study would take; returns the exit code."""
    runs, seconds = 0, 0.0
    for setting, ring in zip(settings, rings, strict=True):
        number, gradients = count(study, scale, setting, ring.runner)
        runs, seconds = runs + number, seconds + gradients * ring.runner.seconds()
    lines = {
        "plan": heading,
        "runs": f"{runs}, finished ones included",
        "time": f"about {cli.duration(seconds)} and the compilation: from mini-batch gradients of "
        "single runs, measured now; runs that are trained together take less",
    }
    return cli.print_forecast(console, lines)


def finished(final: Runs) -> list[report.Run]:
    """All final runs."""
    return [run for of_setting in final.values() for runs in of_setting.values() for run in runs]


def conclude(
    study: Protocols,
    options: Options,
    settings: Sequence[Setting],
    folder: Path,
    config: dict[str, Any],
    chosen: report.Chosen,
    final: Runs,
) -> list[dict[str, Any]]:
    """Judges the runs and writes results and pictures; returns the ledger's verdicts."""
    about = {
        "study": study.name,
        "scale": options.scale,
        "runs": len(finished(final)),
        "diverged": sum(report.diverged(study, run) for run in finished(final)),
        "budget": {setting.name: setting.budget for setting in settings},
        "command": command(study, options, settings),
        "run": hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8],
        "versions": versions(),
        "date": ledger.today(),
    }
    lines = report.entries(report.judge(study, settings, chosen, final), about)
    record = {"config": config, "chosen": chosen, "final": final, "verdicts": lines}
    record |= provenance(PROG, options)
    cli.write_atomic(folder / RESULTS, cli.to_json(record))
    if study.name in PICTURES:
        for name, figure in PICTURES[study.name].pictures(final):
            figures.write(folder, name, figure)
    return lines


def show(
    study: Protocols,
    settings: Sequence[Setting],
    chosen: report.Chosen,
    final: Runs,
    console: Console,
) -> None:
    """Prints scores and verdicts."""
    for setting in settings:
        scores = report.scores_table(study, setting, chosen[setting.name], final[setting.name])
        console.print()
        console.print(f"{setting.name}: {setting.budget}", soft_wrap=True)
        console.print(scores)
    console.print()
    judgements = report.judge(study, settings, chosen, final)
    if judgements:
        found = {claim.name: judgement for claim, judgement in judgements.items()}
        console.print(referee.verdicts_table(list(judgements), found))
        console.print()


def command(study: Protocols, options: Options, settings: Sequence[Setting]) -> str:
    """The command line that runs a study again, without the folder of its data files."""
    words = [PROG, study.name, "--scale", options.scale]
    if options.settings is not None:
        words += ["--settings", options.settings]
    if any(setting.files for setting in settings):
        words += ["--data-dir", "DATA"]
    return " ".join(words)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--study", *words]
    options = cli.parse(Options(), words, PROG)
    study, make_runner = find_study(options.study)
    cli.check_known("scale", options.scale, tuple(study.scales))
    settings = choose_settings(study, options)
    config = study.config(options.scale, settings)
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    folder = folders.locate(
        options.runs_dir, options.name, f"{study.name}-{options.scale}-{digest}"
    )
    with cli.usage():
        rings = [
            Ring(make_runner(s.options, options.data_dir, folder / s.name / KEPT), folder / s.name)
            for s in settings
        ]
    config["data"] = {s.name: ring.runner.config() for s, ring in zip(settings, rings, strict=True)}
    names = tuple(setting.name for setting in settings)
    drawn = PICTURES[study.name].names(names) if study.name in PICTURES else []
    files = (RESULTS, *figures.files(*drawn))
    place = StudyFolder(folder, config, "a study", "protocols", files, names, options.overwrite)
    console = cli.console(130)
    counted = [
        count(study, options.scale, setting, ring.runner)
        for setting, ring in zip(settings, rings, strict=True)
    ]
    heading = (
        f"{study.name}, {options.scale}: {', '.join(names)}; "
        f"{cli.plural(sum(runs for runs, _ in counted), 'run')} -> {folder}"
    )
    if options.dry_run:
        place.check()
        return dry_run(heading, study, options.scale, settings, rings, console)
    begin = time.perf_counter()
    with place.claim():
        console.print(heading, soft_wrap=True)
        for setting in study.scales[options.scale].settings:
            if setting.name not in names and options.settings is None:
                console.print(f"left out: {setting.name}, whose data files need --data-dir")
        if study.left_out:
            console.print(f"left out: {study.left_out}", soft_wrap=True)
        with progress.show(console, study.name, sum(work for _, work in counted)):
            chosen, final = train(study, options.scale, settings, rings, console)
        lines = conclude(study, options, settings, folder, config, chosen, final)
        added = 0
        if options.scale != "smoke":
            added = ledger.append(options.evidence_dir / f"{study.name}.jsonl", lines)
    show(study, settings, chosen, final, console)
    diverged = sum(report.diverged(study, run) for run in finished(final))
    console.print(
        f"{sum(runs for runs, _ in counted)} runs, of which {diverged} final ones diverged; "
        f"{cli.plural(added, 'verdict')} added to {options.evidence_dir}. Measures in %, or as "
        "they are: mean ± standard error. * an end of the rates: beyond it may be a better one. "
        f"{(time.perf_counter() - begin) / 60:.1f} minutes",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
