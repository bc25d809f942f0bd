r"""What training gains without another method: accumulation, mixed precision, prefetching.

    python -m experiments.brief_review --task cifar10_5k --data-dir DATA

Nokhwal et al. review three techniques on ResNet-50, ViT and EfficientNet-B0. Each network is
trained five times, for the same steps on the same batches from the same weights:

    baseline        float32, each batch read and augmented when it is needed
    accumulation    its gradient over --accumulate micro-batches, one after the other
    precision       computes in bfloat16 (or --precision f16, with a dynamic loss scale)
    prefetching     batches are made and moved to the device while it computes: what pinned memory
                    and asynchronous copies are in PyTorch
    all             the three together

and what is printed for each is the number of examples per second (median over windows of steps, the
first ones and evaluations left out), the memory of a step as the compiler plans it, and the test
accuracy. `--scale small`, for a CPU, takes pictures of 32 x 32 and one pass over a small data set:
accuracies then only say whether a variant learns as the baseline does. `runs/<name>/` holds
`results.json` and `brief_review.png`, `.svg`; the claims are judged by the referee's functions, and
their verdicts added to `evidence/brief_review.jsonl`.

A CPU computes bfloat16 and float16 by way of float32, and has no memory of its own to move batches
to; what the techniques are made for is a GPU or TPU.

References:
  Nokhwal, Chilakalapudi, Donekal, Nokhwal, Pahune, Chaudhary, `Accelerating neural network
  training: a brief review <https://arxiv.org/abs/2312.10024>`_, 2023. Their runs pin memory with
  and without the other techniques, so that its effect is not isolated there; here it is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from experiments import cli, data, progress, timing
from experiments.cli import UsageError
from experiments.reporting import brief_review as report
from experiments.reporting import figures
from experiments.runs import folders, ledger
from experiments.runs.records import RESULTS, read_json, read_record, versions, write_record
from experiments.runs.study import check_same_settings, kept
from experiments.training.options import Options as TrainingOptions
from experiments.training.plan import Plan, prepare
from experiments.training.program import build
from experiments.training.studies import forecast
from experiments.training.studies.throughput import WARM_UP, measure

PROG = "python -m experiments.brief_review"
PICTURE = "brief_review"
VARIANTS = ("baseline", "accumulation", "precision", "prefetching", "all")
LEARNING_RATE = 1e-3  # of Adam, the largest in their runs
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
      models: name and options for `models.create`, by the name that is shown.
      epochs: passes over the training split.
      batch_size: examples per step.
      accumulate: number of micro-batches of a batch.
      seeds: number of runs of each variant.
    """

    models: Mapping[str, tuple[str, dict[str, Any]]]
    epochs: int
    batch_size: int
    accumulate: int
    seeds: int


# The small one keeps the stems for ImageNet, which leave little of 32 x 32 pixels, to be quick.
SCALES = {
    "small": Scale(
        {
            "resnet50": ("resnet50", {}),
            "vit": ("vit_ti", {"patch_size": 8}),
            "efficientnet_b0": ("efficientnet_b0", {}),
        },
        epochs=1,
        batch_size=50,
        accumulate=2,
        seeds=1,
    ),
    "full": Scale(
        {
            "resnet50": ("resnet50", {"small_images": True}),
            "vit": ("vit_s", {"patch_size": 4}),
            "efficientnet_b0": ("efficientnet_b0", {"small_images": True}),
        },
        epochs=30,
        batch_size=128,
        accumulate=2,
        seeds=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options(data.FilesOptions, cli.DryRunOptions):
    """Train three networks with and without what makes training faster."""

    limits: ClassVar = {"accumulate": cli.Range(2, 10**6)}

    task: str = "cifar10_5k"
    """Data set of images; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    scale: str = "small"
    """small (minutes on a CPU) or full (hours on a GPU)."""
    models: str | None = None
    """Some of resnet50,vit,efficientnet_b0; default: all."""
    variants: str | None = None
    """Some of baseline,accumulation,precision,prefetching,all; default: all five."""
    precision: str = "bf16"
    """What mixed precision computes in: bf16 or f16."""
    accumulate: int | None = None
    """Micro-batches of a batch; default: the scale's."""
    augment: str = "crop,flip"
    """Random changes of training images: some of randaugment,crop,flip,cutout,mixup, or none."""
    batch_size: int | None = None
    """Examples per step; default: the scale's."""
    steps: int | None = None
    """Steps; default: the scale's number of passes."""
    seeds: int | None = None
    """Runs of each variant; default: the scale's."""
    name: str | None = None
    """Name of the run's folder; default: brief_review-<task>-<scale>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    evidence_dir: Path = ledger.FOLDER
    """The ledger's folder, to which the verdicts are added, but for those of a run with --steps."""
    overwrite: bool = False
    """Replace an earlier study of the same name, rather than continue it."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The checked options with their defaults.

    Attributes:
      plans: what is trained, by model, variant and seed.
      config: all that decides the numbers, as plain JSON.
      folder: where the results are kept.
    """

    plans: dict[tuple[str, str, int], Plan]
    config: dict[str, Any]
    folder: Path


def resolve(options: Options) -> Study:
    """Checks the options and fills in the defaults.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it.
    """
    options.check()
    cli.check_known("scale", options.scale, tuple(SCALES))
    scale = SCALES[options.scale]
    models = _chosen("model", options.models, tuple(scale.models))
    variants = _chosen("variant", options.variants, VARIANTS)
    cli.check_known("precision", options.precision, ("bf16", "f16"))
    changes = variant_options(options.accumulate or scale.accumulate, options.precision)
    task = data.load_task(options.task, data_dir=options.data_dir, **options.files)
    if task.defaults.kind != "classification" or len(task.input_shape) != 3:
        raise UsageError(f"task {task.name} is not a classification of images")
    default = f"brief_review-{data.short_name(options.task, options.data_dir)}-{options.scale}"
    folder = folders.locate(options.runs_dir, options.name, default)
    plans = {}
    for key in models:
        model, model_options = scale.models[key]
        for variant in variants:
            for seed in range(options.seeds or scale.seeds):
                baseline = TrainingOptions(
                    task=options.task,
                    data_dir=options.data_dir,
                    **options.files,
                    model=model,
                    model_options=json.dumps(model_options),
                    augment=options.augment or None,
                    method="adam",
                    learning_rate=LEARNING_RATE,
                    epochs=None if options.steps else scale.epochs,
                    steps=options.steps,
                    batch_size=options.batch_size or scale.batch_size,
                    seed=seed,
                    runs_dir=folder,
                    prefetch=0,
                )
                plans[key, variant, seed] = prepare(
                    dataclasses.replace(baseline, **changes[variant])
                )
    first = next(iter(plans.values()))
    if first.steps <= WARM_UP:
        raise UsageError(f"--steps must be more than {WARM_UP}, which are not timed")
    differing = {"model", "model_options", "seed", *changes["all"]}  # what differs between the runs
    config = {
        key: x for key, x in (first.config() | first.machine()).items() if key not in differing
    }
    config |= {
        "models": {key: scale.models[key] for key in models},
        "variants": {variant: changes[variant] for variant in variants},
        "seeds": options.seeds or scale.seeds,
    }
    return Study(plans, json.loads(json.dumps(config)), folder)


def variant_options(accumulate: int, precision: str) -> dict[str, dict[str, Any]]:
    """The options of `TrainingOptions` in which each variant differs from the baseline."""
    changes: dict[str, dict[str, Any]] = {
        "baseline": {},
        "accumulation": {"accumulate": accumulate},
        "precision": {"precision": precision},
        "prefetching": {"prefetch": 2},
    }
    together = {name: value for change in changes.values() for name, value in change.items()}
    return changes | {"all": together}


def _chosen(what: str, text: str | None, known: Sequence[str]) -> Sequence[str]:
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        cli.check_known(what, name, known)
    return names


def finished_records(study: Study, overwrite: bool) -> list[Record]:
    """The records of the runs that an interrupted study has finished.

    Raises:
      UsageError: the folder holds another study, or something else.
    """
    if folders.is_new(study.folder):
        return []
    folders.check_files(study.folder, [RESULTS, *figures.files(PICTURE)])
    path = study.folder / RESULTS
    read = read_json if overwrite else read_record  # what is replaced may be damaged
    saved = read(path) if os.path.lexists(path) else None
    if not isinstance(saved, dict) or saved.get("command") != PROG:
        raise UsageError(f"{study.folder} holds something else than {PROG}; give another --name")
    if overwrite:
        return []
    check_same_settings(study.folder, "a study", saved["config"], study.config, overwrite)
    records: list[Record] = saved["records"]
    return records


def dry_run(heading: str, study: Study, records: Sequence[Record], console: Console) -> int:
    """Prints what the study would take; returns the exit code."""
    done = {(record["model"], record["variant"], record["seed"]) for record in records}
    todo = [key for key in study.plans if key not in done]
    models = list(dict.fromkeys(model for model, _, _ in todo))
    lines = {"plan": heading, "runs": f"{len(study.plans)}, of which {len(done)} are finished"}
    seconds = 0.0
    with progress.show(console, "brief_review"):
        for model in progress.each(models, "{}: compiling".format):
            runs = [study.plans[key] for key in todo if key[0] == model]
            program = build(runs[0])
            found, speed = forecast.of_run(runs[0], program)
            seconds += sum(speed.seconds(plan.steps, 1) for plan in runs)
            lines[model] = f"{found['parameters']} parameters; memory {found['memory']}"
    lines["time"] = (
        f"about {cli.duration(seconds)} if all variants of a network took as long as the first "
        "one, of which a few steps were measured after compilation"
    )
    return cli.print_forecast(console, lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    with cli.usage():
        study = resolve(options)
    check = functools.partial(finished_records, study, options.overwrite)
    plan = next(iter(study.plans.values()))
    console = cli.console(100)
    heading = (
        f"{plan.task.name}: {cli.plural(len(study.plans), 'run')} of "
        f"{cli.plural(plan.steps, 'step')} of {cli.plural(plan.batch_size, 'example')} "
        f"-> {study.folder}"
    )
    if options.dry_run:
        return dry_run(heading, study, check(), console)
    with folders.claim(study.folder, check), kept(study.folder):
        records = check()
        console.print(heading, soft_wrap=True)
        machine = timing.machine()
        done = {(record["model"], record["variant"], record["seed"]) for record in records}
        todo = [key for key in study.plans if key not in done]
        with progress.show(console, "brief_review"):
            for model, variant, seed in progress.each(todo, "{0[0]} {0[1]}, seed {0[2]}".format):
                began = time.perf_counter()
                record = {"model": model, "variant": variant, "seed": seed}
                record |= measure(study.plans[model, variant, seed])
                records.append(record)
                result = {"machine": machine, "config": study.config, "records": records}
                write_record(study.folder / RESULTS, {"command": PROG, **result})
                console.print(
                    f"  {model} {variant}, seed {seed}: {record['examples_per_second']:.1f} "
                    f"examples / s; {time.perf_counter() - began:.0f} s with compilation"
                )
        order = {key: i for i, key in enumerate(study.plans)}
        records.sort(key=lambda record: order[record["model"], record["variant"], record["seed"]])
        if options.steps is None:
            about = {
                "scale": options.scale,
                "budget": {plan.task.name: cli.plural(plan.steps, "step")},
                "command": f"{PROG} --task {options.task} --scale {options.scale} "
                f"--seeds {study.config['seeds']}",
                "run": hashlib.sha256(json.dumps(study.config).encode()).hexdigest()[:8],
                "versions": versions(),
                "date": ledger.today(),
            }
            path = options.evidence_dir / "brief_review.jsonl"
            ledger.append(path, report.entries(records, about))
        rows = report.summarize(records)
        title = f"{plan.task.name}, {plan.steps} steps of {plan.batch_size}"
        figures.write(study.folder, PICTURE, report.picture(rows, title))
        console.print()
        console.print(report.table(rows))
        console.print(
            "\nx: over the baseline. Memory: what the compiler plans for a step, its arguments "
            f"included.\n{', '.join(f'{key} {value}' for key, value in machine.items())}"
        )
        console.print(f"picture: {study.folder / PICTURE}.png", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
