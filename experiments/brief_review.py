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
accuracy. `--scale small`, for a CPU, takes pictures
of 32 x 32 and one pass over a small data set: accuracies then only say whether a variant learns as
the baseline does. `runs/<name>/` holds `results.json` and `brief_review.png`.

A CPU computes bfloat16 and float16 by way of float32, and has no memory of its own to move batches
to; what the techniques are made for is a GPU or TPU.

References:
  Nokhwal, Chilakalapudi, Donekal, Nokhwal, Pahune, Chaudhary, `Accelerating neural network
  training: a brief review <https://arxiv.org/abs/2312.10024>`_, 2023. Their runs pin memory with
  and without the other techniques, so that its effect is not isolated there; here it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import tyro
from matplotlib.figure import Figure
from rich.table import Table

from experiments import cli, data, timing
from experiments.cli import UsageError
from experiments.reporting import figures, tables
from experiments.reporting.statistics import mean_and_error
from experiments.runs import folders
from experiments.runs.records import (
    RESULTS,
    first_difference,
    number,
    read_json,
    read_record,
    write_record,
)
from experiments.training import parallel, settings
from experiments.training.program import build

PROG = "python -m experiments.brief_review"
PICTURE = "brief_review.png"
VARIANTS = ("baseline", "accumulation", "precision", "prefetching", "all")
# Steps that are not timed: compilation, and the first batches under way.
WARM_UP = 5
LEARNING_RATE = 1e-3  # of Adam, the largest in their runs
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large a study is.

    Attributes:
      models: by the name that is shown: name and options for `models.create`.
      epochs: passes over the training split.
      batch_size: examples per step.
      accumulate: micro-batches of it.
      seeds: runs of each variant.
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
class Options(cli.Options):
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
    """Random changes of training images, see `train`."""
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
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Drop what is in the folder; without, the same command continues an interrupted one."""


@dataclasses.dataclass(frozen=True)
class Study:
    """The options, checked and completed.

    Attributes:
      plans: what is trained, by model, variant and seed.
      config: all that decides the numbers, as plain JSON.
      folder: of the results.
    """

    plans: dict[tuple[str, str, int], settings.Plan]
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
    accumulate = options.accumulate or scale.accumulate
    task = data.load_task(options.task, data_dir=options.data_dir)
    if task.defaults.kind != "classification" or len(task.input_shape) != 3:
        raise UsageError(f"task {task.name} is no classification of images")
    changes: dict[str, dict[str, Any]] = {
        "baseline": {},
        "accumulation": {"accumulate": accumulate},
        "precision": {"precision": options.precision},
        "prefetching": {"prefetch": 2},
    }
    changes["all"] = {name: value for change in changes.values() for name, value in change.items()}
    default = f"brief_review-{options.task}-{options.scale}"
    folder = folders.locate(options.runs_dir, options.name, default)
    plans = {}
    for key in models:
        model, model_options = scale.models[key]
        for variant in variants:
            for seed in range(options.seeds or scale.seeds):
                own = settings.Options(
                    task=options.task,
                    data_dir=options.data_dir,
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
                )
                plan = settings.prepare(
                    dataclasses.replace(own, **{"prefetch": 0} | changes[variant])
                )
                plans[key, variant, seed] = plan
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


def _chosen(what: str, given: str | None, known: Sequence[str]) -> Sequence[str]:
    names = known if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        cli.check_known(what, name, known)
    return names


def run(plan: settings.Plan) -> Record:
    """Trains one network and measures it.

    Returns:
      ``examples_per_second``, ``bytes`` of a step, ``accuracy`` and ``loss`` on the test split.
    """
    program = build(plan)
    runner = program.runner
    dataset = data.batches(
        plan.task.train,
        batch_size=plan.batch_size,
        seed=plan.options.seed,
        shard=grain.sharding.ShardByJaxProcess(),
        augment=plan.augment,
        num_classes=plan.task.num_classes,
        workers=plan.options.data_workers,
    )
    state = runner.init(program.make_state)
    windows = []
    with contextlib.closing(
        data.prefetch_to_device(iter(dataset), runner.put_batch, plan.options.prefetch)
    ) as batches:
        timed, began = 0, time.perf_counter()
        for done, batch in enumerate(batches, start=1):
            if done == 1:
                planned = runner.lower(state, batch).compile().memory_analysis()
            state, metrics = runner.step(state, batch)
            # As `train` does it: the loop waits now and then, not for every step.
            if done in (WARM_UP, plan.steps) or (done - WARM_UP) % parallel.FETCH_EVERY == 0:
                jax.block_until_ready(metrics)
                now = time.perf_counter()
                if done > WARM_UP:
                    windows.append((done - timed) * plan.batch_size / (now - began))
                timed, began = done, now
            if done == plan.steps:
                break
    scores = program.evaluate(state, plan.task.test)
    return {
        "examples_per_second": statistics.median(windows),
        "bytes": planned.temp_size_in_bytes
        + planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        - planned.alias_size_in_bytes,
        "accuracy": number(scores["accuracy"]),
        "loss": number(scores["loss"]),
    }


# Results ----------------------------------------------------------------------------------------


def known_records(study: Study, overwrite: bool) -> list[Record]:
    """What an interrupted study has finished.

    Raises:
      UsageError: the folder holds another study, or something else.
    """
    path = study.folder / RESULTS
    if folders.is_new(study.folder):
        return []
    if not os.path.lexists(path):
        raise UsageError(f"{study.folder} holds something else than {PROG}; give another --name")
    folders.check_files(study.folder, [RESULTS, PICTURE])
    if overwrite:
        old = read_json(path)
        if not isinstance(old, dict) or old.get("command") != PROG:
            raise UsageError(f"{path} is not a result of this command; give another --name")
        return []
    record = read_record(path) or {}
    if record.get("command") != PROG:
        raise UsageError(f"{path} is not a result of this command; give another --name")
    if change := first_difference(record["config"], study.config):
        raise UsageError(
            f"{study.folder} holds a study with {change}; give another --name, or --overwrite to "
            "replace it"
        )
    records: list[Record] = record["records"]
    return records


def summarize(records: Sequence[Record]) -> list[Record]:
    """For each model and variant: medians and means over the seeds, and ratios to the baseline."""
    rows: list[Record] = []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["model"], record["variant"]), []).append(record)
    for (model, variant), group in groups.items():
        speed = statistics.median(record["examples_per_second"] for record in group)
        accuracies = [record["accuracy"] for record in group]
        finite = None not in accuracies
        mean, error = mean_and_error(accuracies) if finite else (None, None)
        rows.append(
            {
                "model": model,
                "variant": variant,
                "examples_per_second": speed,
                "bytes": group[0]["bytes"],
                "accuracy": mean,
                "accuracy_error": error,
            }
        )
    bases = {row["model"]: row for row in rows if row["variant"] == "baseline"}
    for row in rows:
        base = bases.get(row["model"])
        for key in ("examples_per_second", "bytes"):
            row[f"{key}_ratio"] = None if base is None else row[key] / base[key]
    return rows


def table(rows: Sequence[Record]) -> Table:
    """The variants of each model, one below the other."""
    view = tables.table(
        ["model", "variant", "examples / s", "x", "memory MB", "x", "test accuracy %"], left=2
    )
    shown = None
    for row in rows:
        ratios = [row["examples_per_second_ratio"], row["bytes_ratio"]]
        speed, memory = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        accuracy = row["accuracy"]
        view.add_row(
            "" if row["model"] == shown else row["model"],
            row["variant"],
            f"{row['examples_per_second']:.1f}",
            speed,
            f"{row['bytes'] / 1e6:.0f}",
            memory,
            "diverged" if accuracy is None else tables.percent(accuracy, row["accuracy_error"]),
        )
        shown = row["model"]
    return view


def picture(rows: Sequence[Record], title: str) -> Figure:
    """Speed, memory and accuracy as bars, the variants of a model side by side."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    width = 0.8 / len(variants)
    panels: dict[str, Callable[[Record], float]] = {
        "examples per second": lambda row: row["examples_per_second"],
        "memory of a step in MB": lambda row: row["bytes"] / 1e6,
        "test accuracy in %": lambda row: 100 * (row["accuracy"] or 0.0),
    }
    for axes, (label, value) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        figures.frame(axes)
        for i, variant in enumerate(variants):
            own = [row for row in rows if row["variant"] == variant]
            axes.bar(
                [models.index(row["model"]) + (i + 0.5) * width - 0.4 for row in own],
                [value(row) for row in own],
                width,
                color=figures.COLORS[i],
                label=variant,
            )
        axes.set_xticks(range(len(models)), models)
        axes.set_title(label, loc="left", fontsize="medium")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = cli.parse(Options(), argv, PROG)
    try:
        study = resolve(options)
    except ValueError as error:
        return cli.fail(error)
    with folders.claim(study.folder, lambda: known_records(study, options.overwrite)):
        records = known_records(study, options.overwrite)
        console = cli.console(100)
        plan = next(iter(study.plans.values()))
        console.print(
            f"{plan.task.name}: {cli.plural(len(study.plans), 'run')} of "
            f"{cli.plural(plan.steps, 'step')} of {cli.plural(plan.batch_size, 'example')} "
            f"-> {study.folder}",
            soft_wrap=True,
        )
        machine = timing.machine()
        done = {(record["model"], record["variant"], record["seed"]) for record in records}
        try:
            for (model, variant, seed), plan in study.plans.items():
                if (model, variant, seed) in done:
                    continue
                began = time.perf_counter()
                record = {"model": model, "variant": variant, "seed": seed} | run(plan)
                records.append(record)
                result = {"machine": machine, "config": study.config, "records": records}
                write_record(study.folder / RESULTS, {"command": PROG, **result})
                console.print(
                    f"  {model} {variant}, seed {seed}: {record['examples_per_second']:.1f} "
                    f"examples / s; {time.perf_counter() - began:.0f} s with compilation"
                )
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            return 130
        order = {key: i for i, key in enumerate(study.plans)}
        records.sort(key=lambda record: order[record["model"], record["variant"], record["seed"]])
        rows = summarize(records)
        title = f"{plan.task.name}, {plan.steps} steps of {plan.batch_size}"
        cli.write_atomic(study.folder / PICTURE, figures.png(picture(rows, title)))
        console.print()
        console.print(table(rows))
        console.print(
            "\nx: over the baseline. Memory: what the compiler plans for a step, its arguments "
            f"included.\n{', '.join(f'{key} {value}' for key, value in machine.items())}"
        )
        console.print(f"picture: {study.folder / PICTURE}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
