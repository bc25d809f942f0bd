"""Train one model on one task with one method.

    python -m experiments.train --task digits --method demon_sgd
    python -m experiments.train --task digits --method demon_sgd --resume

A run is decided by its options alone: the same ones give the same numbers, and a run that was
interrupted or killed ends, after `--resume`, bit by bit where it would have ended. Its folder,
`runs/<name>/`, holds

    config.json             the options, what they came to, and the versions used
    metrics.jsonl, .csv     one line per step: loss, statistics of the method, validation
    tensorboard/            the same as event files
    checkpoints/            the latest checkpoints
    result.json             loss and accuracy on the test split, at the end
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import platform
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import models
from experiments import cli, data, engine, methods, parallel
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.cli import UsageError

PROG = "python -m experiments.train"
DEFAULT_EPOCHS = 10
# Examples per forward pass of an evaluation: keeps its activations small.
EVALUATION_BATCH = 1000
# Options that say where and how a run is kept, not what it computes.
NOT_COMPARED = ("data_dir", "checkpoint_every", "keep", "runs_dir", "name", "resume")

PyTree = Any
Row = dict[str, float | int | None]


@dataclasses.dataclass(frozen=True)
class Options:
    """Train one model on one task with one method."""

    task: str = "digits"
    """Data set: digits, mnist, mnist5k, cifar10, cifar10_5k, sst2 or sst2_1k."""
    data_dir: Path | None = None
    """Folder with the data files; default: OPTAX_ACCEL_DATA. Digits needs none."""
    model: str | None = None
    """Model: mlp, cnn, resnet20 or transformer; default: the task's own."""
    loss: str = "cross_entropy"
    """Loss: cross_entropy, or mse (half the squared distance to the one-hot label)."""
    method: str = "sgd"
    """Training method; an unknown name lists all."""
    learning_rate: float | None = None
    """Learning rate; default: the middle of the method's grid."""
    epochs: int | None = None
    """Passes over the training split; default: 10."""
    steps: int | None = None
    """Steps, instead of --epochs."""
    batch_size: int = 64
    """Examples per step, over all devices."""
    curvature_batch_size: int | None = None
    """Examples (fixed) for Hessian-vector products; default: twice the batch size."""
    seed: int = 0
    """Decides initial weights, batches and the method's own randomness."""
    parallel: str = "jit"
    """How devices are used: jit (global view), pmap or shard_map."""
    devices: int | None = None
    """Devices to use; default: all. On a CPU, so many virtual ones are made."""
    eval_every: int | None = None
    """Steps between validations; default: one epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: as --eval-every."""
    keep: int = 3
    """How many of the latest checkpoints are kept."""
    name: str | None = None
    """Name of the run's folder; default: train-<task>-<method>-<seed>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in that folder; options that are not given are taken from it."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs_dir / (self.name or f"train-{self.task}-{self.method}-{self.seed}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options, checked and completed."""

    task: data.Task
    model: str
    loss: str
    method: methods.Method
    learning_rate: float
    steps: int
    batch_size: int
    curvature_batch_size: int | None
    seed: int
    parallel: str
    devices: Sequence[jax.Device]
    eval_every: int
    checkpoint_every: int
    keep: int
    folder: Path

    def config(self) -> dict[str, Any]:
        """All that decides the numbers, as plain JSON."""
        return {
            "task": self.task.name,
            "train_examples": len(self.task.train),
            "data_checksum": zlib.crc32(np.ascontiguousarray(self.task.train.x).data),
            "model": self.model,
            "loss": self.loss,
            "method": self.method.name,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "curvature_batch_size": self.curvature_batch_size,
            "seed": self.seed,
            "parallel": self.parallel,
            "devices": len(self.devices),
            "platform": self.devices[0].platform,
            "eval_every": self.eval_every,
        }


# Options ----------------------------------------------------------------------------------------


def resolve(options: Options) -> Plan:
    """Checks the options and fills in the defaults.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it.
    """
    cli.check_known("task", options.task, data.TASKS)
    cli.check_known("model", options.model, models.list())
    cli.check_known("loss", options.loss, tuple(engine.LOSSES))
    cli.check_known("parallel mode", options.parallel, parallel.MODES)
    (method,) = methods.get_methods([options.method])
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--epochs and --steps exclude each other; give one")
    for name in (
        "epochs",
        "steps",
        "batch_size",
        "curvature_batch_size",
        "devices",
        "eval_every",
        "checkpoint_every",
        "keep",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= options.seed < 2**31:
        raise UsageError(f"--seed must be between 0 and 2**31 - 1, got {options.seed}")
    rate = options.learning_rate
    if rate is None:
        rate = method.learning_rates[len(method.learning_rates) // 2]
    if not 0 < rate < math.inf:
        raise UsageError(f"--learning-rate must be positive and finite, got {rate}")
    cli.check_folder_name(options.name)
    if options.curvature_batch_size is not None and method.refresh_every is None:
        raise UsageError(
            f"--curvature-batch-size: method {method.name} uses no curvature; leave it out"
        )

    devices = find_devices(options.devices)
    task = data.load_task(options.task, data_dir=options.data_dir)
    examples = len(task.train)
    curvature = options.curvature_batch_size
    if curvature is None and method.refresh_every is not None:
        most = min(2 * options.batch_size, examples)
        curvature = max(most - most % len(devices), 1)
    for option, size in (
        ("--batch-size", options.batch_size),
        ("--curvature-batch-size", curvature),
    ):
        if size is not None and size > examples:
            raise UsageError(
                f"{option} {size} is more than the {examples} training examples of {task.name}"
            )
        if size is not None:
            parallel.check_divisible(size, len(devices), option)

    per_epoch = examples // options.batch_size
    steps = options.steps or per_epoch * (options.epochs or DEFAULT_EPOCHS)
    eval_every = min(steps, options.eval_every or per_epoch)
    return Plan(
        task=task,
        model=options.model or task.default_model,
        loss=options.loss,
        method=method,
        learning_rate=rate,
        steps=steps,
        batch_size=options.batch_size,
        curvature_batch_size=curvature,
        seed=options.seed,
        parallel=options.parallel,
        devices=devices,
        eval_every=eval_every,
        checkpoint_every=options.checkpoint_every or eval_every,
        keep=options.keep,
        folder=options.folder,
    )


def find_devices(number: int | None) -> list[jax.Device]:
    """The devices to run on; makes virtual ones on a CPU.

    Raises:
      UsageError: there are not so many.
    """
    if number is not None:
        # Only possible before JAX starts its backends; afterwards what is there has to do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices()
    if number is not None and number > len(devices):
        raise UsageError(
            f"--devices {number}: there are only {len(devices)} of kind {devices[0].platform}; "
            "set JAX_PLATFORMS=cpu to use virtual ones"
        )
    return devices[:number]


def read_options(argv: Sequence[str] | None) -> Options:
    """The options given, over those of the run to resume.

    Raises:
      UsageError: there is no run to resume, or one that would be overwritten.
    """
    options = cli.parse(Options(), argv, PROG)
    path = options.folder / "config.json"
    if not options.resume:
        if path.exists():
            raise UsageError(
                f"{options.folder} holds a run; add --resume to continue it, or give another --name"
            )
        if options.folder.exists() and (
            not options.folder.is_dir() or any(options.folder.iterdir())
        ):
            raise UsageError(f"{options.folder} exists and holds no run; give another --name")
        return options
    if not path.exists():
        raise UsageError(
            f"nothing to resume: there is no {path}; leave out --resume to start a run"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["options"]
        for name in ("data_dir", "runs_dir"):
            saved[name] = None if saved[name] is None else Path(saved[name])
        default = dataclasses.replace(
            Options(**saved), name=options.name, runs_dir=options.runs_dir
        )
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not the config.json of a run; give another --name") from None
    return cli.parse(default, argv, PROG)


def open_folder(options: Options, config: dict[str, Any]) -> None:
    """Makes the run's folder, or checks that the one to resume is of the same run.

    Raises:
      UsageError: it is of another run; the message names the first difference.
    """
    path = options.folder / "config.json"
    if options.resume:
        saved = json.loads(path.read_text(encoding="utf-8")).get("run", {})
        for key in dict.fromkeys([*config, *saved]):
            if saved.get(key) != config.get(key):
                raise UsageError(
                    f"{options.folder} is a run with {key} {saved.get(key)}, now "
                    f"{config.get(key)}; resume it with the options it was started with, or give "
                    "another --name"
                )
        return
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {options.folder}: {error.strerror}") from None
    record = {"options": dataclasses.asdict(options), "run": config, "versions": versions()}
    record["options"] |= {"runs_dir": str(options.runs_dir), "resume": False}
    if options.data_dir is not None:
        record["options"]["data_dir"] = str(options.data_dir)
    cli.write_atomic(path, cli.to_json(record))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    names = ("jax", "jaxlib", "optax", "flax", "grain", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


# Metrics ----------------------------------------------------------------------------------------


def statistics(opt_state: PyTree) -> dict[str, jax.Array]:
    """What the optimizer's state tells about the run, as scalars: what there is of it."""
    found: dict[str, Any] = {
        "momentum": engine.find_in_state(opt_state, "momentum"),
        "alignment": engine.find_in_state(opt_state, "alignment"),
    }
    eigenvalues = engine.find_in_state(opt_state, "eigenvalues")
    if eigenvalues is not None:
        found["top_eigenvalue"] = jnp.max(eigenvalues)
    return {name: value for name, value in found.items() if value is not None}


class MetricFiles:
    """The metrics of a run as JSONL, CSV and TensorBoard event files, one row per step.

    Args:
      folder: the run's folder.
      columns: names of all numbers that a row can hold.
      step: rows up to this step are kept, later ones (of a run that was killed after its last
        checkpoint) are dropped.

    Raises:
      UsageError: the files hold fewer rows than that.
    """

    def __init__(self, folder: Path, columns: Sequence[str], step: int):
        self.columns = columns
        jsonl, table = folder / "metrics.jsonl", folder / "metrics.csv"
        header = ",".join(columns) + "\n"
        lines = self._first_lines(jsonl, step, None)
        try:
            rows: list[Row] = [json.loads(line) for line in lines]
        except ValueError:
            raise UsageError(f"{jsonl} is damaged; give another --name to start again") from None
        cli.write_atomic(table, header + "".join(self._first_lines(table, step, header)))
        cli.write_atomic(jsonl, "".join(lines))
        self.seconds = float(rows[-1]["seconds"] or 0) if rows else 0.0
        self._jsonl = jsonl.open("a", encoding="utf-8")
        self._csv = table.open("a", encoding="utf-8", newline="")
        # A killed run may have lost events that its writer still held in a queue, so the event
        # files are made anew from the rows.
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
        for row in rows:
            self._add_events(row)

    @staticmethod
    def _first_lines(path: Path, number: int, header: str | None) -> list[str]:
        if number == 0:
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if header is not None:
            lines = lines[1:] if lines[:1] == [header] else []
        if len(lines) < number:
            raise UsageError(
                f"{path} holds {len(lines)} of the {number} steps of the checkpoint; "
                "give another --name to start again"
            )
        return lines[:number]

    def write(self, rows: Sequence[Row]) -> None:
        """Adds rows and hands them to the operating system, so that a killed run leaves them."""
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, restval="", lineterminator="\n")
        for row in rows:
            writer.writerow(row)
            self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
            self._add_events(row)
        self._csv.write(table.getvalue())
        self._jsonl.flush()
        self._csv.flush()

    def _add_events(self, row: Row) -> None:
        for name, value in row.items():
            if value is not None and name not in ("step", "epoch", "seconds"):
                split, _, short = name.partition("_")
                tag = f"validation/{short}" if split == "validation" else f"train/{name}"
                self._events.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Closes all files."""
        self._jsonl.close()
        self._csv.close()
        self._events.close()


def number(value: Any) -> float | None:
    """A float for JSON: the digits that float32 carries, None for infinities and NaN."""
    value = float(value)
    return float(f"{value:.9g}") if math.isfinite(value) else None


# The run ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Turns the first Ctrl-C or SIGTERM into a question to ask between steps: which one was it?"""
    received: int | None = None

    def receive(signum: int, frame: Any) -> None:
        nonlocal received
        received = signum
        signal.signal(signum, previous[signum])  # the second one acts at once

    previous: dict[int, Any] = {
        signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    for signum in previous:
        signal.signal(signum, receive)
    try:
        yield lambda: received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def evaluate(
    compiled: Callable[..., dict[str, jax.Array]],
    runner: parallel.Parallel,
    state: engine.TrainState,
    split: data.Split,
) -> dict[str, float]:
    """Mean loss and accuracy over a split, batch by batch."""
    state = runner.get_state(state)
    totals = {"loss": 0.0, "accuracy": 0.0}
    # Whole multiples of the devices.
    size = max(EVALUATION_BATCH // runner.mesh.size, 1) * runner.mesh.size
    for start in range(0, len(split), size):
        x, y = split.x[start : start + size], split.y[start : start + size]
        even = len(y) % runner.mesh.size == 0
        x, y = jax.device_put((x, y), runner.sharded if even else runner.replicated)
        for name, value in compiled(state.params, state.rest, x, y).items():
            totals[name] += float(value) * len(y)
    return {name: total / len(split) for name, total in totals.items()}


def build(
    plan: Plan,
) -> tuple[nnx.GraphDef[Any], parallel.Parallel, engine.TrainState]:
    """Model, compiled step and first state of a plan.

    Raises:
      ValueError: the model does not take the task's examples, or the method not the model.
    """
    model = models.create(
        plan.model,
        input_shape=plan.task.input_shape,
        num_classes=plan.task.num_classes,
        vocabulary_size=plan.task.vocabulary_size,
        rngs=plan.seed,
    )
    graphdef, params, rest = engine.split(model)
    # No `axis_name`: an extrapolation is global, so that all parallel modes compute the same.
    tx = plan.method.build(
        plan.learning_rate,
        total_steps=plan.steps,
        num_classes=plan.task.num_classes,
        seed=plan.seed,
    )

    def step(
        state: engine.TrainState,
        batch: dict[str, jax.Array],
        curvature: dict[str, jax.Array] | None,
        *,
        refresh: bool | str | None,
        axis_name: str | None,
    ) -> tuple[engine.TrainState, dict[str, jax.Array]]:
        state, metrics = engine.train_step(
            tx,
            graphdef,
            state,
            batch["x"],
            batch["y"],
            curvature=None if curvature is None else (curvature["x"], curvature["y"]),
            refresh=refresh,
            loss=plan.loss,
            axis_name=axis_name,
        )
        return state, metrics | statistics(state.opt_state)

    state = engine.init_state(tx, params, rest)
    return graphdef, parallel.Parallel(plan.parallel, plan.devices, step), state


def train(
    plan: Plan,
    graphdef: nnx.GraphDef[Any],
    runner: parallel.Parallel,
    state: engine.TrainState,
    console: Console,
) -> int | None:
    """Runs a plan in its folder, from the latest checkpoint there on.

    Args:
      plan: what to run.
      graphdef: from `build`, like the following two.
      runner: see there.
      state: see there.
      console: where progress is shown.

    Returns:
      ``None`` at the end, or the number of the signal that interrupted the run.

    Raises:
      UsageError, CheckpointError: what is in the folder does not fit; it is left as it is.
    """
    task, method, folder = plan.task, plan.method, plan.folder
    compiled_evaluate = jax.jit(functools.partial(engine.evaluate, graphdef, loss=plan.loss))

    # Data.
    dataset = data.batches(task.train, batch_size=plan.batch_size, seed=plan.seed)
    batches = data.prefetch_to_device(iter(dataset.map(runner.shape_batch)), runner.sharded)
    curvature = None
    if plan.curvature_batch_size is not None:
        # Fixed: redrawn at every refresh, its noise alone would move the subspace.
        order = np.random.default_rng(plan.seed).permutation(len(task.train))
        rows = order[: plan.curvature_batch_size]
        curvature = runner.put_batch({"x": task.train.x[rows], "y": task.train.y[rows]})

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", plan.keep))
        start = 0
        if checkpoints.latest() is not None:
            start, state, position = checkpoints.restore(state)
            batches.set_state(position)
        columns = [
            *("step", "epoch", "loss", *jax.eval_shape(statistics, state.opt_state)),
            *("validation_loss", "validation_accuracy", "seconds"),
        ]
        files = MetricFiles(folder, columns, start)
        stack.callback(files.close)
        state = runner.put_state(state)
        signal_received = stack.enter_context(stop_signals())
        progress = stack.enter_context(
            Progress(
                TextColumn(f"{method.name} on {task.name}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=console,
            )
        )
        bar = progress.add_task("", total=plan.steps, completed=start, metrics="compiling")
        if start:
            console.print(f"resuming at step {start}")

        pending: list[tuple[Row, dict[str, jax.Array]]] = []
        fetched = began = time.monotonic()

        def fetch() -> None:
            """Waits for the steps under way and writes their metrics."""
            nonlocal fetched
            values = jax.device_get([metrics for _, metrics in pending])
            rows = []
            for (row, _), metrics in zip(pending, values, strict=True):
                numbers = {name: number(value) for name, value in metrics.items()}
                row |= numbers
                rows.append({name: row[name] for name in columns if name in row})
            pending.clear()
            files.write(rows)
            fetched = time.monotonic()
            shown = [
                f"{name} {rows[-1][name]:.4g}"
                for name in columns[2:-3]
                if rows[-1].get(name) is not None
            ]
            progress.update(bar, completed=rows[-1]["step"], metrics="  ".join(shown))

        # The loop.
        done = start
        stopped_by = None
        # XLA runs the convolutions of the Lanczos loop many times slower on a CPU (jax#12868).
        cold_start = plan.devices[0].platform != "cpu" or not models.is_convolutional(plan.model)
        while done < plan.steps and stopped_by is None:
            refresh = method.refresh(done, cold_start=cold_start)
            batch = next(batches)
            state, metrics = runner.step(state, batch, curvature if refresh else None, refresh)
            done += 1
            row: Row = {
                "step": done,
                "epoch": round(done / (len(task.train) // plan.batch_size), 4),
                "seconds": round(files.seconds + time.monotonic() - began, 3),
            }
            pending.append((row, metrics))
            stopped_by = signal_received()
            if done % plan.eval_every == 0 or done == plan.steps:
                scores = evaluate(compiled_evaluate, runner, state, task.validation)
                row |= {f"validation_{name}": number(score) for name, score in scores.items()}
                console.print(
                    f"step {done}: validation loss {scores['loss']:.4f}, "
                    f"accuracy {scores['accuracy']:.4f}"
                )
            save = done % plan.checkpoint_every == 0 or done == plan.steps or stopped_by is not None
            if save or len(pending) == parallel.FETCH_EVERY or time.monotonic() - fetched > 0.5:
                fetch()
            if save:
                checkpoints.save(done, runner.get_state(state), data=batches.get_state())

        if done < plan.steps:
            console.print(f"interrupted: saved step {done} of {plan.steps}")
            return stopped_by
        scores = evaluate(compiled_evaluate, runner, state, task.test)
        result = {
            "steps": done,
            "test_loss": number(scores["loss"]),
            "test_accuracy": number(scores["accuracy"]),
        }
        cli.write_atomic(folder / "result.json", cli.to_json(result))
    console.print(
        f"test loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.4f}; "
        f"metrics and checkpoints are in {folder}",
        soft_wrap=True,
    )
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    # Room for the metrics where the output goes to a file.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        options = read_options(argv)
        plan = resolve(options)
        setup = build(plan)
        open_folder(options, plan.config())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(
        f"{plan.task.name}, {plan.model}, {plan.method.name} at learning rate "
        f"{plan.learning_rate:g}: {plan.steps} steps of {plan.batch_size} examples on "
        f"{len(plan.devices)} {plan.devices[0].platform} device(s) -> {plan.folder}",
        soft_wrap=True,
    )
    try:
        stopped_by = train(plan, *setup, console)
    except (UsageError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second Ctrl-C
        stopped_by = signal.SIGINT
    if stopped_by is not None:
        print(f"to continue: {resume_command(plan.folder)}", file=sys.stderr)
        return 128 + stopped_by
    return 0


def resume_command(folder: Path) -> str:
    """The command that continues a run; all other options are in its folder."""
    words = ["--runs-dir", str(folder.parent), "--name", folder.name, "--resume"]
    return f"{PROG} {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
