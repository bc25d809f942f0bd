"""Judge the claims of a paper by runs that can refute them.

    python -m experiments.referee demon --scale small

A study is data: settings, contestants with the same number of trials, claims with a criterion
written down. The trials run on seeds of their own and are chosen by the validation split, once for
all final runs or, in studies whose intervals are over seeds alone, for each of them anew; the final
runs have fresh seeds and are read on the test split. All runs count, none is stopped for looking
bad, one that diverges has failed. Claims about costs are tested sequentially, with a guaranteed
level: while one is undecided its contestants get further seeds, up to the scale's most.
`--processes 2` shares the runs between two processes. `runs/<name>/` then holds

    config.json             what was run: the same command continues it, another one is refused
    <setting>/              the records of its runs, tuning and final
    results.json            ranks with intervals, chosen trials, verdicts

and `evidence/<study>.jsonl`, the ledger, one line more for each verdict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import cli, progress
from experiments.cli import UsageError
from experiments.reporting.referee import (
    demon,
    extrapolation,
    report,
    stoch_grad_adam,
    subspaces,
)
from experiments.reporting.referee.study import (
    Contestant,
    Judgement,
    Results,
    Scale,
    Setting,
    Study,
)
from experiments.runs import folders, ledger
from experiments.runs.records import RESULTS, versions
from experiments.runs.study import StudyFolder
from experiments.training.replicas import Plan
from experiments.training.studies import comparison, refereeing
from experiments.training.studies.refereeing import Arena

PROG = "python -m experiments.referee"
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        demon.STUDY,
        subspaces.STUDY,
        *stoch_grad_adam.STUDIES,
        *extrapolation.STUDIES,
    )
}
SCALES = ("small", "medium", "full")
KINDS = ("classification", "segmentation", "language")  # of tasks, all of which have an accuracy


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Judge the claims of a paper by runs that can refute them."""

    study: str | None = None
    """Study: demon, subspaces, stoch_grad_adam (also with _vit, _unet) or extrapolation (also with
    _lstm, _transformer); it may also stand first, without the option's name."""
    scale: str = "small"
    """small (minutes to an hour on two cores), medium or full (the paper's networks)."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    steps: int | None = None
    """Steps of every run instead of the settings' epochs, to try a study out; its verdicts do not
    go into the ledger."""
    name: str | None = None
    """Name of the run's folder; default: the study, the scale and a hash of the settings."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    evidence_dir: Path = ledger.FOLDER
    """The ledger's folder."""
    overwrite: bool = False
    """Replace an earlier run of the same name."""
    processes: int = 1
    """Number of processes that share the runs; the results are those of one process."""


def find_study(name: str | None) -> Study:
    """The study of a name, checked.

    Raises:
      UsageError: there is none, or it is not fair.
    """
    if name is None:
        raise UsageError(f"no study given; valid: {', '.join(STUDIES)}")
    cli.check_known("study", name, tuple(STUDIES))
    STUDIES[name].check()
    return STUDIES[name]


def plan(
    setting: Setting, scale: Scale, options: Options, *, equal_gradients: bool = False
) -> Plan:
    """The training of one setting's trials, which a study with such claims scores twice.

    Raises:
      UsageError, data.DataError, ValueError: with one line that says what is wrong.
    """
    made = comparison.plan(
        setting.task,
        ["sgd"],  # in place of whom the setting's own methods are put
        data_dir=options.data_dir,
        model=setting.model,
        seeds=scale.tuned(scale.most_seeds),
        epochs=setting.epochs,
        steps=options.steps,
        batch_size=setting.batch_size,
        target=setting.target,
        kinds=KINDS,
        examples=setting.examples,
    )
    methods = [method for contestant in setting.contestants for method in contestant.trials]
    model_options = dict(setting.model_options)
    return dataclasses.replace(
        made,
        task=refereeing.corrupted(made.task, setting.label_noise, setting.outliers),
        methods=methods,
        model_options=model_options,
        first_seed=scale.first_seed,
        workers=setting.workers,
        equal_gradients=equal_gradients,
    )


def train(
    study: Study, scale: str, arenas: Sequence[Arena], console: Console
) -> tuple[list[report.Bout], Results, dict[str, Judgement]]:
    """Trains and judges, with further seeds for claims that a sequential test has not decided."""
    chosen_scale = study.scales[scale]
    bouts: list[report.Bout] = []
    for setting, arena in zip(chosen_scale.settings, arenas, strict=True):
        tuned = chosen_scale.tuned(chosen_scale.seeds)
        arena.announce(len(setting.contestants), tuned, chosen_scale.seeds)
    for setting, arena in zip(chosen_scale.settings, arenas, strict=True):
        console.print(f"{setting.name}: {cli.plural(len(arena.plan.methods), 'method')}")
        methods, seeds = arena.plan.methods, chosen_scale.seeds
        tuning = arena.train_trials(methods, chosen_scale.tuned(seeds), console)
        chosen = [report.choose(c, tuning, chosen_scale, seeds) for c in setting.contestants]
        bout = report.Bout(
            name=setting.name,
            target=arena.plan.target,
            contestants=setting.contestants,
            tuning=tuning,
            chosen=chosen,
            final=arena.train_final(chosen, console),
            # A further seed may choose any trial, where it has a tuning of its own.
            costs=arena.costs(
                study.unit, methods if chosen_scale.own_tuning else [each[0] for each in chosen]
            ),
        )
        bouts.append(bout)
        arena.release()
    seeds = chosen_scale.seeds
    while True:
        outcome = report.results(study, scale, bouts)
        judgements = report.judge(study, outcome)
        names = report.open_contestants(study, judgements)
        if not names or seeds == chosen_scale.most_seeds:
            return bouts, outcome, judgements
        seeds += 1
        console.print(f"seed {seeds} of up to {chosen_scale.most_seeds} for {', '.join(names)}")
        for i, (bout, arena) in enumerate(zip(bouts, arenas, strict=True)):
            asked = [each for each in bout.contestants if each.name in names]
            bouts[i] = train_further(bout, arena, asked, chosen_scale, seeds, console)


def train_further(
    bout: report.Bout,
    arena: Arena,
    asked: Sequence[Contestant],
    scale: Scale,
    seeds: int,
    console: Console,
) -> report.Bout:
    """A bout with so many final seeds of some contestants, and the tuning that they need."""
    trials = [method for contestant in asked for method in contestant.trials]
    tuning = dict(bout.tuning)
    tuning.update(arena.train_trials(trials, scale.tuned(seeds), console))
    again = {each.name: report.choose(each, tuning, scale, seeds) for each in asked}
    return dataclasses.replace(
        bout,
        tuning=tuning,
        chosen=[
            again.get(contestant.name, before)
            for contestant, before in zip(bout.contestants, bout.chosen, strict=True)
        ],
        final={**bout.final, **arena.train_final(list(again.values()), console)},
    )


def dry_run(heading: str, study: Study, scale: str, arenas: list[Arena], console: Console) -> int:
    """Prints what a whole study would take; returns the exit code."""
    chosen, runs, least, most = study.scales[scale], 0, 0.0, 0.0
    named = {getattr(claim.judge, role, None) for claim in study.claims for role in _ROLES} - {None}
    with progress.show(console, "referee"):
        for setting, arena in zip(
            chosen.settings, progress.each(arenas, lambda arena: arena.folder.name), strict=True
        ):
            tuned = chosen.tuned(chosen.seeds)
            number, seconds, each = arena.forecast(len(setting.contestants), tuned, chosen.seeds)
            runs, least = runs + number, least + seconds
            most += seconds + each * len(named) * (chosen.most_seeds - chosen.seeds)
    further = len(named) * (chosen.most_seeds - chosen.seeds) * len(arenas)
    lines = {
        "plan": heading,
        "runs": f"{runs}, finished ones included, and up to {further} more where a sequential test "
        "asks for them",
        "time": f"about {least / 3600:.2f} hours ({cli.duration(least)}), with all further runs "
        f"{most / 3600:.2f}: from steps measured on the first method of each setting",
    }
    return cli.print_forecast(console, lines)


def command(study: Study, options: Options) -> str:
    """The command line that runs a study again, for the ledger.

    It says that a folder of data files is needed, but not where this machine has it.
    """
    words = [PROG, study.name, "--scale", options.scale]
    if any(setting.task != "digits" for setting in study.scales[options.scale].settings):
        words += ["--data-dir", "DATA"]
    return " ".join(words)


_ROLES = ("method", "rival")


def show(
    study: Study, results: dict[str, Any], judgements: dict[str, Judgement], console: Console
) -> None:
    """Prints ranks and verdicts."""
    console.print()
    console.print(report.ranks_table(results["ranks"]))
    console.print()
    console.print(report.verdicts_table(study.claims, judgements))
    console.print()


def make_plans(study: Study, options: Options) -> list[Plan]:
    """The training of each setting's trials; raises what `plan` raises."""
    scale = study.scales[options.scale]
    return [
        plan(setting, scale, options, equal_gradients=study.equal_gradients)
        for setting in scale.settings
    ]


def make_arenas(study: Study, options: Options, plans: Sequence[Plan], folder: Path) -> list[Arena]:
    """The arena of each setting, in the folder of the study's run."""
    scale = study.scales[options.scale]
    return [
        Arena(made, scale.most_seeds, folder / setting.name, options.processes)
        for made, setting in zip(plans, scale.settings, strict=True)
    ]


@contextlib.contextmanager
def helpers(study: Study, options: Options, folder: Path) -> Iterator[None]:
    """Further processes that do while a block runs what this one does, but for printing.

    They end with this one. What one of them leaves undone, because it is killed for example, the
    others do.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of XLA's threads
    started = [
        spawn.Process(target=_help, args=(study, options, folder), daemon=True)
        for _ in range(options.processes - 1)
    ]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _help(study: Study, options: Options, folder: Path) -> None:
    first = multiprocessing.parent_process()
    assert first is not None

    def end_with_it() -> None:
        first.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        arenas = make_arenas(study, options, make_plans(study, options), folder)
        train(study, options.scale, arenas, Console(quiet=True))


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--study", *words]
    options = cli.parse(Options(), words, PROG)
    study = find_study(options.study)
    cli.check_known("scale", options.scale, tuple(study.scales))
    scale = study.scales[options.scale]
    with cli.usage():
        plans = make_plans(study, options)
    trained = {s.name: refereeing.config(p) for s, p in zip(scale.settings, plans, strict=True)}
    config = study.config(options.scale) | {"trained": trained}
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    folder = folders.locate(
        options.runs_dir, options.name, f"{study.name}-{options.scale}-{digest}"
    )
    arenas = make_arenas(study, options, plans, folder)
    counts = sorted({len(setting.contestants) for setting in scale.settings})
    contestants = f"{' to '.join(map(str, counts))} contestants"
    heading = (
        f"{study.name}, {options.scale}: {cli.plural(len(plans), 'setting')} x "
        f"{contestants} x "
        f"{cli.plural(scale.settings[0].contestants[0].size, 'trial')}, "
        f"{cli.plural(scale.tuning_seeds, 'seed')} for {'each' if scale.own_tuning else 'the'} "
        f"tuning, {scale.seeds} to {scale.most_seeds} fresh ones"
        f"{' with a tuning each' if scale.own_tuning else ''} -> {folder}"
    )
    names = tuple(setting.name for setting in scale.settings)
    place = StudyFolder(
        folder, config, "a study", "tuning_seeds", (RESULTS,), names, options.overwrite
    )
    console = cli.console(130)
    if options.dry_run:
        place.check()
        return dry_run(heading, study, options.scale, arenas, console)
    begin = time.perf_counter()
    with place.claim():
        console.print(heading, soft_wrap=True)
        if study.left_out:
            console.print(f"left out: {study.left_out}", soft_wrap=True)
        with helpers(study, options, folder), progress.show(console, "referee"):
            bouts, outcome, judgements = train(study, options.scale, arenas, console)
        judgements = report.note_tuning(study, options.scale, bouts, judgements)
        about = {
            "study": study.name,
            "scale": options.scale,
            "runs": outcome.runs,
            "diverged": int(outcome.diverged.sum()),
            "unit": study.unit,
            "budget": {s.name: cli.plural(s.epochs, "epoch") for s in scale.settings},
            "command": command(study, options),
            "run": digest,
            "versions": versions(),
            "date": ledger.today(),
        }
        lines = report.entries(study.claims, judgements, about)
        results = {
            "config": config,
            "ranks": report.ranks(outcome),
            "chosen": {
                bout.name: {
                    contestant.name: [[method.name, method.learning_rates[0]] for method in chosen]
                    for contestant, chosen in zip(bout.contestants, bout.chosen, strict=True)
                }
                for bout in bouts
            },
            "verdicts": lines,
        }
        cli.write_atomic(folder / RESULTS, cli.to_json(results))
        added = 0
        if options.steps is None:
            added = ledger.append(options.evidence_dir / f"{study.name}.jsonl", lines)
    show(study, results, judgements, console)
    console.print(
        f"{outcome.runs} runs, of which {outcome.diverged.sum()} diverged; "
        f"{cli.plural(added, 'verdict')} added to {options.evidence_dir}; "
        f"{(time.perf_counter() - begin) / 60:.1f} minutes",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
