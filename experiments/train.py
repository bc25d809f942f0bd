"""Train one model on one task with one method.

    python -m experiments.train --task digits --method demon_sgd
    python -m experiments.train --task digits --method demon_sgd --resume

A run is decided by its options alone: the same ones give the same numbers, and a run that was
interrupted or killed ends, after `--resume`, bit by bit where it would have ended (on another
number of devices: up to rounding). Its folder, `runs/<name>/`, holds what `experiments.run_folder`
lists, and

    checkpoints/            the latest checkpoints
    result.json             scores of the test split, at the end

SIGTERM, with which clusters announce that they take a machine back, saves a checkpoint and ends the
run with exit code 0; Ctrl-C does the same with exit code 130. Of several processes (see
`experiments.cluster`) all compute and the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
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
from experiments import augmentation, cli, cluster, data, engine, methods, parallel, run_folder
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.cli import UsageError
from experiments.profiling import StepTrace
from experiments.run_folder import MetricFiles, Row, number

PROG = "python -m experiments.train"
DEFAULT_EPOCHS = 10
# Examples per forward pass of an evaluation: keeps its activations small.
EVALUATION_BATCH = 1000
# Of the dominant subspace, where a task has no classes to give their number.
DIRECTIONS = 10
NON_FINITE = ("raise", "skip", "rollback")
# So many steps skipped in a row, or so many rollbacks without a new checkpoint, end the run: what
# is wrong is then not a batch.
MAX_SKIPPED = 10
MAX_ROLLBACKS = 3

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Train one model on one task with one method."""

    task: str = "digits"
    """Data set; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files, or hf:... or tfds:..., a data set of Hugging Face or TensorFlow
    Datasets; default: OPTAX_ACCEL_DATA. Digits needs none."""
    image_size: int | None = None
    """Height and width of the pictures of imagenet_folder; default: 224."""
    model: str | None = None
    """Model; default: the task's own. An unknown name lists all."""
    model_options: str | None = None
    """Options of the model as JSON, e.g. '{"dropout_rate": 0.1}'; default: the task's, for its own
    model."""
    loss: str | None = None
    """Loss: cross_entropy, mse (half the squared distance to the one-hot label) or elbo (of a
    variational autoencoder); default: the task's own."""
    label_smoothing: float = 0.0
    """Share of each label that goes to all classes alike; cross_entropy only, in training only."""
    augment: str | None = None
    """Random changes of training images: some of randaugment,crop,flip,cutout,mixup."""
    method: str | None = None
    """Training method; default: the task's own, sgd for most. An unknown name lists all."""
    learning_rate: float | None = None
    """Learning rate; default: the task's for its own method, else the middle of the method's
    grid."""
    epochs: int | None = None
    """Passes over the training split; default: 10."""
    steps: int | None = None
    """Steps, instead of --epochs."""
    early_stopping: int | None = None
    """End after so many validations in a row without a lower loss than ever before."""
    batch_size: int | None = None
    """Examples per step, over all devices; default: the task's own, 64 for most."""
    curvature_batch_size: int | None = None
    """Examples (fixed) for Hessian-vector products; default: twice the batch size."""
    accumulate: int = 1
    """Micro-batches of a step, of which one is in memory at a time; on several devices each of them
    divides its part of the batch. Batch normalization sees one at a time."""
    precision: str = "f32"
    """What the network computes in: f32, bf16, or f16 with a dynamic loss scale, which bf16 does
    not need. Parameters, loss and optimizer are float32."""
    value_fn_precision: str = "f32"
    """What the network computes in where the method evaluates it itself (gradients elsewhere,
    curvature): f32 or bf16."""
    weight_decay: float = 0.0
    """Rate by which parameters shrink a step, times the learning rate, besides the method's own
    step; not biases and normalization."""
    clip: float | None = None
    """Longest gradient, over all parameters, that the method is given; longer ones are
    shortened."""
    ema: float | None = None
    """Decay of a moving average of weights and batch statistics, which is what is evaluated."""
    seed: int = 0
    """Decides initial weights, batches and the method's own randomness."""
    parallel: str = "jit"
    """How devices are used: jit (global view), fsdp (the same, with parameters and optimizer state
    spread over the devices), pmap or shard_map."""
    devices: int | None = None
    """Devices to use, of all processes; default: all. On a CPU, so many virtual ones are made."""
    workers: int | None = None
    """Workers of a method whose workers keep parameters of their own; default: one per device."""
    data_workers: int = 0
    """Threads that read and augment batches ahead; 0: one, which also moves them to the device."""
    prefetch: int = 2
    """Batches that wait on the device while it computes; 0: each is read when it is needed."""
    non_finite: str = "raise"
    """When loss, parameters or moments are not finite: raise (end the run), skip (leave the step
    out) or rollback (to the latest checkpoint, going on behind the batch that did it)."""
    eval_every: int | None = None
    """Steps between validations; default: one epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: as --eval-every."""
    keep: int = 3
    """How many of the latest checkpoints are kept."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Record a few steps for TensorBoard and Perfetto, into the run's folder."""
    name: str | None = None
    """Name of the run's folder; default: train-<task>-<method>-<seed>."""
    runs_dir: Path = Path("runs")
    """Where the run's folder is made."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in that folder; options that are not given are taken from it."""
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """One of several processes, which find each other by what SLURM, Open MPI, Kubernetes or a
    Cloud TPU tells them."""
    coordinator: str | None = None
    """The same, where nothing tells them: HOST:PORT of process 0."""
    processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, from 0, with --coordinator."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        method = self.method
        if self.name is None:
            cli.check_known("task", self.task, data.TASKS)
            method = data.DEFAULTS[self.task].method if method is None else method
            methods.get_methods([method])
        default = f"train-{self.task}-{method}-{self.seed}"
        return run_folder.locate(self.runs_dir, self.name, default)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options, checked and completed."""

    task: data.Task
    model: str
    model_options: dict[str, Any]
    loss: str
    label_smoothing: float
    augment: tuple[str, ...]
    method: methods.Method
    learning_rate: float
    steps: int
    early_stopping: int | None
    batch_size: int
    curvature_batch_size: int | None
    accumulate: int
    precision: str
    value_fn_precision: str
    weight_decay: float
    clip: float | None
    ema: float | None
    seed: int
    data_workers: int
    prefetch: int
    parallel: str
    devices: Sequence[jax.Device]
    workers: int | None
    non_finite: str
    eval_every: int
    checkpoint_every: int
    keep: int
    profile: bool
    folder: Path

    def config(self) -> dict[str, Any]:
        """All that decides the numbers, as plain JSON."""
        return {
            "task": self.task.name,
            "train_examples": len(self.task.train),
            "input_shape": list(self.task.input_shape),
            "data": self.task.checksums,
            "model": self.model,
            "model_options": self.model_options,
            "loss": self.loss,
            "label_smoothing": self.label_smoothing,
            "augment": list(self.augment),
            "method": self.method.name,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "early_stopping": self.early_stopping,
            "batch_size": self.batch_size,
            "curvature_batch_size": self.curvature_batch_size,
            "accumulate": self.accumulate,
            "precision": self.precision,
            "value_fn_precision": self.value_fn_precision,
            "weight_decay": self.weight_decay,
            "clip": self.clip,
            "ema": self.ema,
            "seed": self.seed,
            "workers": self.workers,
            "eval_every": self.eval_every,
        }

    def machine(self) -> dict[str, Any]:
        """All that decides the numbers up to rounding only."""
        return {
            "parallel": self.parallel,
            "devices": len(self.devices),
            "processes": jax.process_count(),
            "platform": self.devices[0].platform,
        }


# Options ----------------------------------------------------------------------------------------


def resolve(options: Options) -> Plan:
    """Checks the options and fills in the defaults.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it.
    """
    options.check()
    cli.check_known("task", options.task, data.TASKS)
    cli.check_known("model", options.model, models.list())
    defaults = data.DEFAULTS[options.task]
    loss = options.loss or defaults.loss
    engine.find_loss(loss, label_smoothing=options.label_smoothing)
    if loss not in data.LOSSES[defaults.kind]:
        raise UsageError(
            f"--loss {loss} does not fit the task {options.task}; valid: "
            f"{', '.join(data.LOSSES[defaults.kind])}"
        )
    augment = augmentation.parse(options.augment or "")
    model = options.model or defaults.model
    model_options = read_model_options(options.model_options)
    if model_options is None:
        model_options = dict(defaults.model_options) if model == defaults.model else {}
    cli.check_known("precision", options.precision, tuple(engine.PRECISIONS))
    cli.check_known("--value-fn-precision", options.value_fn_precision, ("f32", "bf16"))
    mixed = options.precision != "f32" or options.value_fn_precision != "f32"
    if mixed and "dtype" in model_options:
        raise UsageError("--precision decides the model's dtype; leave it out of --model-options")
    cli.check_known("parallel mode", options.parallel, parallel.MODES)
    cli.check_known("--non-finite policy", options.non_finite, NON_FINITE)
    (method,) = methods.get_methods([options.method or defaults.method])
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--epochs and --steps exclude each other; give one")
    rate = options.learning_rate
    if rate is None and method.name == defaults.method:
        rate = defaults.learning_rate
    if rate is None:
        rate = method.learning_rates[len(method.learning_rates) // 2]
    if options.curvature_batch_size is not None and method.refresh_every is None:
        raise UsageError(
            f"--curvature-batch-size: method {method.name} uses no curvature; leave it out"
        )
    if options.workers is not None and not method.per_worker:
        raise UsageError(
            f"--workers: with method {method.name} all devices keep the same parameters; leave it "
            "out"
        )

    devices = find_devices(options.devices)
    workers = (options.workers or len(devices)) if method.per_worker else None
    task = data.load_task(options.task, data_dir=options.data_dir, image_size=options.image_size)
    if augment:
        augmentation.Augmentation(
            task.train, augment, seed=options.seed, num_classes=task.num_classes
        )
    examples = len(task.train)
    batch_size = options.batch_size or defaults.batch_size
    curvature = options.curvature_batch_size
    if curvature is None and method.refresh_every is not None:
        most = min(2 * batch_size, examples)
        curvature = max(most - most % len(devices), 1)
    for option, size in (
        ("--batch-size", batch_size),
        ("--curvature-batch-size", curvature),
    ):
        if size is not None and size > examples:
            raise UsageError(
                f"{option} {size} is more than the {examples} training examples of {task.name}"
            )
        if size is not None:
            parallel.check_divisible(size, len(devices), option)
    if workers is not None:
        parallel.check_divisible(batch_size, workers, "--batch-size", "workers")
    share = batch_size // max(len(devices), workers or 1)
    if options.accumulate > share:
        raise UsageError(
            f"--accumulate {options.accumulate} is more than the {share} examples of a step on one "
            "device or worker"
        )

    per_epoch = examples // batch_size
    steps = options.steps or per_epoch * (options.epochs or DEFAULT_EPOCHS)
    if steps > cli.COUNT.high:
        raise UsageError(
            f"--epochs {options.epochs} are {steps} steps; give at most "
            f"{int(cli.COUNT.high) // per_epoch}"
        )
    eval_every = min(steps, options.eval_every or per_epoch)
    return Plan(
        task=task,
        model=model,
        model_options=model_options,
        loss=loss,
        label_smoothing=options.label_smoothing,
        augment=augment,
        method=method,
        learning_rate=rate,
        steps=steps,
        early_stopping=options.early_stopping,
        batch_size=batch_size,
        curvature_batch_size=curvature,
        accumulate=options.accumulate,
        precision=options.precision,
        value_fn_precision=options.value_fn_precision,
        weight_decay=options.weight_decay,
        clip=options.clip,
        ema=options.ema,
        seed=options.seed,
        data_workers=options.data_workers,
        prefetch=options.prefetch,
        parallel=options.parallel,
        devices=devices,
        workers=workers,
        non_finite=options.non_finite,
        eval_every=eval_every,
        checkpoint_every=options.checkpoint_every or eval_every,
        keep=options.keep,
        profile=options.profile,
        folder=options.folder,
    )


def check_same_data(task: data.Task) -> None:
    """Compares the data of all processes, each of which reads files of its own.

    Args:
      task: the task as this process has it.

    Raises:
      UsageError: a process has other data than process 0; raised on all processes.
    """
    names = [
        f"{kind} of the {split} split"
        for split in task.checksums
        for kind in ("examples", "labels")
    ]
    numbers = [number for split in task.checksums.values() for number in split.values()]
    everywhere = cluster.gather(np.array(numbers, np.uint32))
    for process, found in enumerate(everywhere):
        for name, differs in zip(names, found != everywhere[0], strict=True):
            if differs:
                raise UsageError(
                    f"process {process} has other {name} than process 0; give all processes a "
                    "--data-dir with the same files"
                )


# Of `--model-options`: the largest whole number, that of options which count layers or other parts
# that are made one by one, and the most entries of a list.
LARGEST, MOST_PARTS = 10**6, 1_000
PARTS = ("depth", "num_layers", "num_levels", "num_iterations")


def read_model_options(text: str | None) -> dict[str, Any] | None:
    """The options of `--model-options`; None if it is not given.

    Raises:
      UsageError: it is not a JSON object, or holds a number beyond all sense.
    """
    options = cli.read_json_object("--model-options", text)

    def check(name: str, value: Any, most: int) -> None:
        if isinstance(value, list):
            if len(value) > MOST_PARTS:
                raise UsageError(f"--model-options: {name} has more than {MOST_PARTS} entries")
            for part in value:
                check(name, part, most)
        elif isinstance(value, (int, float)) and not abs(value) <= most:
            raise UsageError(
                f"--model-options: {name} must be at most {most}, got {cli.shortened(str(value))}"
            )

    for name, value in (options or {}).items():
        check(name, value, MOST_PARTS if name in PARTS else LARGEST)
    return options


def find_devices(number: int | None) -> list[jax.Device]:
    """The devices to run on, those of all processes; makes virtual ones on a CPU.

    Raises:
      UsageError: there are not so many.
    """
    if number is not None and not jax.distributed.is_initialized():
        cluster.check_virtual_devices(number)
        # Only possible before JAX starts its backends; afterwards what is there has to do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices()
    if number is not None and number > len(devices):
        raise UsageError(
            f"--devices {number}: there are only {len(devices)} of kind {devices[0].platform}; "
            "set JAX_PLATFORMS=cpu to use virtual ones"
        )
    if number is not None and number < len(devices) and jax.process_count() > 1:
        raise UsageError(
            f"--devices {number}: the {jax.process_count()} processes have {len(devices)} and use "
            "all of them; leave it out"
        )
    return devices[:number]


def read_folder(given: Options, stack: contextlib.ExitStack) -> dict[str, Any] | None:
    """The record of the run to resume, whose folder is locked from then on; None for a new run.

    Raises:
      UsageError: there is no run to resume, one that would be overwritten, or one under way.
    """
    folder = given.folder
    if given.resume:
        record = run_folder.read_config(folder)
        stack.callback(run_folder.lock(folder).release)
        return record
    if (folder / run_folder.CONFIG).exists():
        run_folder.lock(folder).release()  # says so if it is under way
        raise UsageError(
            f"{folder} holds a run; add --resume to continue it, or give another --name"
        )
    if not run_folder.is_new(folder):
        raise UsageError(f"{folder} exists and holds no run; give another --name")
    return None


def read_options(argv: Sequence[str] | None, given: Options, record: Any) -> Options:
    """The options given, over those of the run to resume.

    Raises:
      UsageError: the record is not one of these options.
    """
    if record is None:
        return given
    saved = dict(record["options"])
    try:
        for name in ("data_dir", "runs_dir"):
            saved[name] = None if saved[name] is None else Path(saved[name])
        saved |= {"name": given.name, "runs_dir": given.runs_dir}
        default = Options(**saved)
        default.check()
    except (KeyError, TypeError):
        raise UsageError(
            f"{given.folder / run_folder.CONFIG} is of another version of this command; give "
            "another --name"
        ) from None
    except UsageError as error:
        raise UsageError(
            f"{given.folder / run_folder.CONFIG} is damaged: {error}; give another --name"
        ) from None
    return cli.parse(default, argv, PROG)


def open_folder(
    options: Options, plan: Plan, record: dict[str, Any] | None, stack: contextlib.ExitStack
) -> list[str]:
    """Makes and locks the folder of a new run, or checks that the one to resume is of this run.

    Returns:
      What to tell the person at the keyboard, e.g. that the run began on other devices.

    Raises:
      UsageError: it is of another run; the message names the first difference.
    """
    folder, machine = plan.folder, plan.machine()
    if record is None:
        stack.callback(run_folder.lock(folder).release)
        if (folder / run_folder.CONFIG).exists():  # another process was faster
            raise UsageError(
                f"{folder} holds a run; add --resume to continue it, or give another --name"
            )
        kept = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(options).items()
            if name not in ("resume", "distributed", "coordinator", "processes", "process_id")
        }
        run_folder.write_config(folder, kept, plan.config(), machine)
        return []
    run_folder.check_same(folder, record["run"], plan.config())
    now = {**machine, **run_folder.versions()}
    before = {**record["machine"], **record["versions"]}
    changes = [
        f"{name} {before.get(name)}, now {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    return [f"the run began with {'; '.join(changes)}: equal up to rounding"] if changes else []


# Metrics ----------------------------------------------------------------------------------------


def statistics(opt_state: PyTree) -> dict[str, jax.Array]:
    """What the optimizer's state tells about the run, as scalars: what there is of it."""
    found = {
        name: engine.find_in_state(opt_state, name)
        for name in ("momentum", "alignment", "consensus_distance", "loss_scale", "eigenvalues")
    }
    # Some methods call an array of the parameters' shapes their momentum.
    scalars = {name: value for name, value in found.items() if getattr(value, "shape", None) == ()}
    if found["eigenvalues"] is not None:
        scalars["top_eigenvalue"] = jnp.max(found["eigenvalues"])
    return scalars


# The run ----------------------------------------------------------------------------------------


class NonFiniteError(Exception):
    """The run met numbers that are not finite; the message is one line."""


def evaluate(
    compiled: Callable[..., dict[str, jax.Array]],
    runner: parallel.Parallel,
    state: engine.TrainState,
    task: data.Task,
    split: data.Split,
    workers: int = 0,
) -> dict[str, float]:
    """Scores of a split, read batch by batch; of several workers, of the mean of their parameters.

    Returns:
      ``loss``, where there are labels to predict ``accuracy``, both over the labels that count, and
      of language ``perplexity``, e to the loss.
    """
    state = engine.averaged(runner.consensus(state))
    totals: dict[str, float] = {}
    # Whole multiples of the devices.
    size = max(evaluation_batch(task) // runner.mesh.size, 1) * runner.mesh.size
    for batch in data.in_order(split, size, workers):
        number = len(batch["y"])
        sharding = runner.replicated if number % runner.mesh.size else runner.sharded
        x, y = (
            jax.make_array_from_callback(part.shape, sharding, part.__getitem__)
            for part in (batch["x"], batch["y"])
        )
        for name, value in compiled(state.params, state.rest, x, y).items():
            totals[name] = totals.get(name, 0.0) + float(value) * number
    counted = totals.pop("counted", float(len(split)))
    names = [name for name in ("loss", "accuracy") if name in totals]
    scores: dict[str, float] = {
        name: totals[name] / counted if counted else math.nan for name in names
    }
    if task.defaults.kind in ("language", "translation"):
        scores["perplexity"] = math.exp(min(scores["loss"], 700.0))
    return scores


def evaluation_batch(task: data.Task) -> int:
    """Examples per forward pass of an evaluation: keeps activations and outputs small."""
    outputs = task.train.y[0].size * (task.vocabulary_size or task.num_classes or 1)
    most = min(2**22 // math.prod(task.train.x.shape[1:]), 2**25 // outputs)
    return min(max(most, 1), EVALUATION_BATCH)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a plan compiles to.

    Attributes:
      runner: runs the step.
      make_state: makes the state before the first step; pure.
      evaluate: scores of ``(params, rest, x, y)``, see `engine.evaluate`.
      scores: names of the scores of a split, see `evaluate`.
    """

    runner: parallel.Parallel
    make_state: Callable[[], engine.TrainState]
    evaluate: Callable[..., dict[str, jax.Array]]
    scores: tuple[str, ...]


def build(plan: Plan) -> Program:
    """Model and step of a plan.

    Raises:
      ValueError: the model does not take the task's examples, or the method not the model.
    """
    precision, of_value_fn = (
        engine.PRECISIONS[name] for name in (plan.precision, plan.value_fn_precision)
    )

    def make_model(precision: engine.Precision) -> tuple[nnx.GraphDef[Any], PyTree, PyTree]:
        return engine.split(
            models.create(
                plan.model,
                input_shape=plan.task.input_shape,
                num_classes=plan.task.num_classes or None,
                vocabulary_size=plan.task.vocabulary_size,
                rngs=plan.seed,
                **plan.model_options,
                **precision.options,
            )
        )

    loss = engine.find_loss(plan.loss, label_smoothing=plan.label_smoothing)
    graphdefs: list[nnx.GraphDef[Any]] = []

    def make_arrays() -> PyTree:
        made = [make_model(chosen) for chosen in (precision, of_value_fn)]
        graphdefs.extend(graphdef for graphdef, _, _ in made)
        return made[0][1:]

    options = json.dumps(plan.model_options)
    with _explained(plan, options):
        arrays = jax.eval_shape(make_arrays)
    graphdef, value_fn_graphdef = graphdefs
    _check_memory(plan, arrays, f"model {plan.model} with the options {options}")
    evaluate = functools.partial(engine.evaluate, graphdef, loss=plan.loss)
    if plan.model_options != plan.task.defaults.model_options:
        with _explained(plan, options):  # an option such as a dtype is looked at by the first call
            train = plan.task.train
            jax.eval_shape(
                evaluate, *arrays, *(jnp.asarray(part[:1]) for part in (train.x, train.y))
            )
    seen = None
    if plan.method.needs_objective:
        static, _, rest = make_model(of_value_fn)
        x, y = (part[: plan.batch_size] for part in (plan.task.train.x, plan.task.train.y))
        seen = engine.objective(static, rest, jnp.asarray(x), jnp.asarray(y), loss=loss)
    # With an `axis_name` an extrapolation is local; without, all parallel modes compute the same.
    tx = plan.method.build(
        plan.learning_rate,
        total_steps=plan.steps,
        num_classes=plan.task.num_classes or DIRECTIONS,
        seed=plan.seed,
        axis_name=None if plan.workers is None else parallel.AXIS,
        num_workers=plan.workers or 1,
        objective=seen,
        likelihood=engine.LIKELIHOODS.get(plan.loss),
    )
    tx = engine.complete(
        tx,
        plan.learning_rate,
        clip=plan.clip,
        weight_decay=plan.weight_decay,
        precision=precision,
    )

    def make_state() -> engine.TrainState:
        _, params, rest = make_model(precision)
        return engine.init_state(tx, params, rest, average=plan.ema is not None)

    state = jax.eval_shape(make_state)  # for what is wrong with model and method
    _check_memory(plan, state, f"model and state of method {plan.method.name}")
    # XLA runs convolutions in a loop many times slower on a CPU (jax#12868).
    unroll = plan.devices[0].platform == "cpu" and models.is_convolutional(plan.model)

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
            loss=loss,
            axis_name=axis_name,
            per_worker=plan.workers is not None,
            skip_non_finite=plan.non_finite == "skip",
            accumulate=plan.accumulate,
            unroll=unroll,
            value_fn_graphdef=value_fn_graphdef,
            ema=plan.ema,
        )
        return state, metrics | statistics(state.opt_state)

    scores = ["loss"]
    if np.issubdtype(plan.task.train.y.dtype, np.integer):
        scores.append("accuracy")
    if plan.task.defaults.kind in ("language", "translation"):
        scores.append("perplexity")
    return Program(
        parallel.Parallel(plan.parallel, plan.devices, step, workers=plan.workers),
        make_state,
        jax.jit(evaluate),
        tuple(scores),
    )


@contextlib.contextmanager
def _explained(plan: Plan, options: str) -> Iterator[None]:
    """Says of an error while a model is made, whatever it is, which options it comes from."""
    try:
        yield
    except Exception as error:
        if plan.model_options == plan.task.defaults.model_options and isinstance(error, ValueError):
            raise
        raise UsageError(
            f"--model-options {cli.shortened(options)} do not fit the model {plan.model}: "
            f"{textwrap.shorten(str(error), 300)}"
        ) from error


def _check_memory(plan: Plan, arrays: PyTree, what: str) -> None:
    """Raises `UsageError` if arrays of these shapes do not fit into the plan's devices."""
    copies = 1 if plan.parallel == "fsdp" else len(plan.devices)
    need = copies * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    parallel.check_memory(need, what, plan.devices)


class Run:
    """A plan under way in its folder, from the latest checkpoint there on; a context manager.

    Args:
      plan: what to run.
      program: from `build`.
      console: where progress is shown.

    Raises:
      UsageError, CheckpointError: what is in the folder does not fit; it is left as it is.
    """

    def __init__(self, plan: Plan, program: Program, console: Console):
        self.plan, self.program, self.console = plan, program, console
        self.runner = program.runner
        # XLA runs the convolutions of the Lanczos loop many times slower on a CPU (jax#12868).
        on_cpu = plan.devices[0].platform == "cpu"
        self._cold_start = not (on_cpu and models.is_convolutional(plan.model))
        self._target = self.runner.abstract_state(program.make_state)
        self._columns = [
            *(
                "step",
                "epoch",
                "loss",
                *jax.eval_shape(statistics, jax.eval_shape(program.make_state).opt_state),
            ),
            *(f"validation_{name}" for name in program.scores),
            "seconds",
        ]
        self._files: MetricFiles | None = None  # only the main process has them
        # Steps under way: a row to complete, their metrics, the position in the data behind them.
        self._pending: list[tuple[Row, dict[str, jax.Array], Any]] = []
        self._rows: list[Row] = []  # complete, not yet written
        self._skipped = self._rollbacks = 0
        # The lowest validation loss so far, and the validations since then.
        self._best, self._worse = math.inf, 0

    def __enter__(self) -> Run:
        with contextlib.ExitStack() as stack:
            self._load_data()
            self._checkpoints = stack.enter_context(
                Checkpoints(
                    self.plan.folder / "checkpoints", self.plan.keep, warn=self.console.print
                )
            )
            stack.callback(self._batches.close)
            position = self._restore()
            if position is not None:
                self._batches.set_state(position)
            stack.callback(self._close_files)
            self._trace = None
            if self.plan.profile and cluster.is_main():
                self._trace = stack.enter_context(StepTrace(self.plan.folder / "profile"))
            self._progress = stack.enter_context(
                Progress(
                    TextColumn(f"{self.plan.method.name} on {self.plan.task.name}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[metrics]}", markup=False),
                    console=self.console,
                )
            )
            self._bar = self._progress.add_task(
                "", total=self.plan.steps, completed=self.done, metrics="compiling"
            )
            if self.done:
                self.console.print(f"resuming at step {self.done}")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _load_data(self) -> None:
        plan, train = self.plan, self.plan.task.train
        shard = grain.sharding.ShardByJaxProcess()
        dataset = data.batches(
            train,
            batch_size=plan.batch_size,
            seed=plan.seed,
            shard=shard,
            augment=plan.augment,
            num_classes=plan.task.num_classes,
            workers=plan.data_workers,
        )
        self._batches = data.prefetch_to_device(iter(dataset), self.runner.put_batch, plan.prefetch)
        self._curvature = None
        if plan.curvature_batch_size is not None:
            # Fixed: redrawn at every refresh, its noise alone would move the subspace.
            order = np.random.default_rng(plan.seed).permutation(len(train))
            rows = np.split(order[: plan.curvature_batch_size], shard.shard_count)[
                shard.shard_index
            ]
            self._curvature = self.runner.put_batch({"x": train.x[rows], "y": train.y[rows]})

    def _restore(self) -> Any:
        """Goes to the latest checkpoint, or to the start; returns the position in the data."""
        if self._checkpoints.latest() is None:
            self.done, position = 0, None
            self._best, self._worse = math.inf, 0
            self.state = self.runner.init(self.program.make_state)
        else:
            self.done, state, kept = self._checkpoints.restore(self._target)
            position, self._worse = kept["batches"], kept["worse"]
            self._best = math.inf if kept["best"] is None else kept["best"]
            self.state = self.runner.put_state(state)
        cluster.from_main(self._open_files)
        self._began = self._fetched = time.monotonic()
        return position

    def _open_files(self) -> None:
        self._close_files()
        self._files = MetricFiles(self.plan.folder, self._columns, self.done)

    def _close_files(self) -> None:
        if self._files is not None:
            self._files.close()

    def advance(self) -> None:
        """Starts one step."""
        refresh = self.plan.method.refresh(self.done, cold_start=self._cold_start)
        batch = next(self._batches)
        with contextlib.nullcontext() if self._trace is None else self._trace.step():
            self.state, metrics = self.runner.step(
                self.state, batch, self._curvature if refresh else None, refresh
            )
        if self._trace is not None and self._trace.done(metrics):
            self.console.print(f"profile: {self._trace.file}", soft_wrap=True)
        self.done += 1
        before = self._files.seconds if self._files else 0.0
        row: Row = {
            "step": self.done,
            "epoch": round(self.done / (len(self.plan.task.train) // self.plan.batch_size), 4),
            "seconds": round(before + time.monotonic() - self._began, 3),
        }
        self._pending.append((row, metrics, self._batches.get_state()))

    def is_due(self, every: int) -> bool:
        """Whether something is to be done behind this step; the last one is always due."""
        return self.done % every == 0 or self.done == self.plan.steps

    def wants_fetch(self) -> bool:
        """Whether so many steps are under way, or so long, that they are to be waited for."""
        # Several processes must do it at the same step: what they do then may need all of them.
        late = jax.process_count() == 1 and time.monotonic() - self._fetched > 0.5
        return late or len(self._pending) >= parallel.FETCH_EVERY

    def fetch(self) -> bool:
        """Waits for the steps under way.

        Returns:
          False if one of them made the run go back to an earlier step.

        Raises:
          NonFiniteError: one of them is not finite, and the policy has no (further) help.
        """
        pending, self._pending = self._pending, []
        values = jax.device_get([metrics for _, metrics, _ in pending])
        for (row, _, position), metrics in zip(pending, values, strict=True):
            finite = metrics.pop("finite")
            row |= {name: number(value) for name, value in metrics.items()}
            self._rows.append(row)
            if finite:
                self._skipped = 0
            elif not self._handle_non_finite(self._rows[-1], position):
                return False
        self._fetched = time.monotonic()
        return True

    def _handle_non_finite(self, row: Row, position: Any) -> bool:
        """Does what the policy says; False if the run went back."""
        step, policy = row["step"], self.plan.non_finite
        known = {name: row[name] for name in self._columns[2:-3] if name in row}
        known["last_loss"] = next((r["loss"] for r in self._rows[-2::-1] if r["loss"]), None)
        event: dict[str, Any] = {"step": step, "event": "not finite", "policy": policy, **known}
        numbers = ", ".join(f"{name} {value}" for name, value in known.items())
        message = f"step {step} is not finite ({numbers})".replace("None", "nan")
        if policy == "skip":
            self._skipped += 1
            self._tell(f"{message}: skipped", event)
            if self._skipped < MAX_SKIPPED:
                return True
            message = f"{message}: {MAX_SKIPPED} steps in a row were"
        else:
            event["where"] = not_finite(self.state)
            message += f"; first in the state: {event['where']}" if event["where"] else ""
        if policy == "rollback" and self._rollbacks < MAX_ROLLBACKS:
            self._rollbacks += 1
            self._rows.clear()
            self._pending.clear()
            self.wait()
            self._restore()
            # The batches up to the one that did it are not seen again.
            self._batches.set_state(position)
            self._tell(f"{message}: back to step {self.done}", event | {"back_to": self.done})
            return False
        self.write()
        self._tell("", event)
        hint = {
            "raise": "--resume with --non-finite skip or rollback, or start with a lower rate",
            "skip": "start with a lower --learning-rate, or look at the data",
            "rollback": f"{MAX_ROLLBACKS} rollbacks did not help; start with a lower rate",
        }[policy]
        raise NonFiniteError(f"{message}; {hint}")

    def _tell(self, message: str, event: dict[str, Any]) -> None:
        if message:
            self.console.print(message, soft_wrap=True)
        if self._files is not None:
            self._files.add_event(event)

    def validate(self) -> None:
        """Scores the validation split and adds that to the row of the latest step."""
        scores = self._evaluate(self.plan.task.validation)
        self._rows[-1] |= {f"validation_{name}": number(score) for name, score in scores.items()}
        self._worse = 0 if scores["loss"] < self._best else self._worse + 1
        self._best = min(scores["loss"], self._best)  # never NaN
        self.console.print(f"step {self.done}: validation {show_scores(scores)}")

    @property
    def stops_early(self) -> bool:
        """Whether the validation loss has not become lower for too long."""
        return self.plan.early_stopping is not None and self._worse >= self.plan.early_stopping

    def _evaluate(self, split: data.Split) -> dict[str, float]:
        plan = self.plan
        return evaluate(
            self.program.evaluate, self.runner, self.state, plan.task, split, plan.data_workers
        )

    def write(self) -> None:
        """Writes the rows that are complete."""
        rows = [{name: row[name] for name in self._columns if name in row} for row in self._rows]
        self._rows.clear()
        if self._files is None or not rows:
            return
        self._files.write(rows)
        shown = [
            f"{name} {rows[-1][name]:.4g}"
            for name in self._columns[2:-3]
            if rows[-1].get(name) is not None
        ]
        self._progress.update(self._bar, completed=rows[-1]["step"], metrics="  ".join(shown))

    def save(self) -> None:
        """Starts to save a checkpoint; what it needs of the files is written before."""
        self._checkpoints.save(
            self.done,
            self.runner.get_state(self.state),
            data={
                "batches": self._batches.get_state(),
                "best": self._best if math.isfinite(self._best) else None,
                "worse": self._worse,
            },
        )
        self._rollbacks = 0

    def wait(self) -> None:
        """Waits until all that was saved is on disk."""
        self._checkpoints.wait()

    def test(self) -> dict[str, Any]:
        """Scores the test split and writes the result."""
        scores = self._evaluate(self.plan.task.test)
        result = {"steps": self.done} | {
            f"test_{name}": number(score) for name, score in scores.items()
        }
        if cluster.is_main():
            cli.write_atomic(self.plan.folder / "result.json", cli.to_json(result))
        return result


def not_finite(state: PyTree) -> str | None:
    """Where a state is not finite, e.g. ``params/head/kernel (3 of 40 entries)``."""

    def count(leaf: jax.Array) -> jax.Array | None:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return None
        return jnp.sum(~jnp.isfinite(leaf))

    counts = jax.jit(lambda tree: jax.tree.map(count, tree))(state)
    sizes = {path: leaf.size for path, leaf in jax.tree.leaves_with_path(state)}
    for path, wrong in jax.tree.leaves_with_path(counts):
        if wrong and sizes[path] > 1:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"{name} ({wrong} of {sizes[path]} entries)"
    return None


def train(plan: Plan, program: Program, console: Console) -> int | None:
    """Runs a plan in its folder, from the latest checkpoint there on.

    Args:
      plan: what to run.
      program: from `build`.
      console: where progress is shown.

    Returns:
      ``None`` at the end, or the number of the signal that interrupted the run.

    Raises:
      UsageError, CheckpointError: what is in the folder does not fit; it is left as it is.
      NonFiniteError: the run met numbers that are not finite and could not go on.
      DataError: an example cannot be read.
    """
    with Run(plan, program, console) as run, cluster.stop_signals() as requested, cluster.guard():
        stopped_by = None
        while run.done < plan.steps and stopped_by is None and not run.stops_early:
            run.advance()
            stopped_by = requested()
            validate = run.is_due(plan.eval_every)
            save = run.is_due(plan.checkpoint_every) or stopped_by is not None
            if not (validate or save or run.wants_fetch()) or not run.fetch():
                continue
            if validate:
                run.validate()
            run.write()
            if save or run.stops_early:
                run.save()
        run.wait()
        if run.stops_early:
            console.print(
                f"stopped early at step {run.done}: {plan.early_stopping} validations in a row "
                "without a lower loss"
            )
        elif run.done < plan.steps:
            console.print(f"interrupted: saved step {run.done} of {plan.steps}")
            return stopped_by
        result = run.test()
    scores = {name: result[f"test_{name}"] for name in program.scores}
    console.print(
        f"test {show_scores(scores)}; metrics and checkpoints are in {plan.folder}",
        soft_wrap=True,
    )
    return None


def show_scores(scores: Mapping[str, float | None]) -> str:
    """Scores as the console shows them."""
    return ", ".join(
        f"{name} nan" if value is None else f"{name} {value:.4f}" for name, value in scores.items()
    )


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = cli.parse(Options(), argv, PROG)
    with contextlib.ExitStack() as stack:
        try:
            cluster.initialize(
                distributed=given.distributed,
                coordinator=given.coordinator,
                processes=given.processes,
                process_id=given.process_id,
                devices=given.devices,
            )
            record = cluster.from_main(lambda: read_folder(given, stack))
            options = read_options(argv, given, record)
            plan = resolve(options)
            check_same_data(plan.task)
            program = build(plan)
            notes = cluster.from_main(lambda: open_folder(options, plan, record, stack))
        except ValueError as error:
            return cli.fail(error)
        # Room for the metrics where the output goes to a file.
        console = cli.console(120, quiet=not cluster.is_main())
        cluster.advise(f"to continue: {resume_command(plan.folder)}")
        console.print(
            f"{plan.task.name}, {plan.model}, {plan.method.name} at learning rate "
            f"{plan.learning_rate:g}: {plan.steps} steps of {plan.batch_size} examples on "
            f"{len(plan.devices)} {plan.devices[0].platform} device(s) -> {plan.folder}",
            *notes,
            sep="\n",
            soft_wrap=True,
        )
        return run_and_report(plan, program, console)


def run_and_report(plan: Plan, program: Program, console: Console) -> int:
    """Runs a plan; returns the exit code."""
    to_continue = f"to continue: {resume_command(plan.folder)}"
    try:
        stopped_by = train(plan, program, console)
    except (UsageError, CheckpointError) as error:
        return fail(f"error: {error}", 2)
    except (NonFiniteError, data.DataError) as error:
        return fail(f"error: {error}", 1)
    except OSError as error:
        reason = error.strerror or error
        return fail(f"error: cannot write to {plan.folder}: {reason}\n{to_continue}", 1)
    except KeyboardInterrupt:  # the second Ctrl-C
        stopped_by = signal.SIGINT
    if stopped_by is None:
        return 0
    print(cli.printable(to_continue), file=sys.stderr)
    # A machine that is taken back is no failure.
    return 0 if stopped_by == signal.SIGTERM else 128 + stopped_by


def fail(message: str, code: int) -> int:
    """Tells what went wrong and returns the exit code; of several processes none waits for it."""
    if jax.process_count() > 1:
        cluster.abort(message, code)
    print(cli.printable(message), file=sys.stderr)
    return code


def resume_command(folder: Path) -> str:
    """The command that continues a run; all other options are in its folder."""
    words = ["--runs-dir", str(folder.parent), "--name", folder.name, "--resume"]
    return f"{PROG} {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(main())
