"""The options of a run, and the plan they come to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

import models
from experiments import cli, data, methods
from experiments.cli import UsageError
from experiments.data import augmentation
from experiments.runs import folders
from experiments.training import cluster, losses, parallel
from experiments.training.precision import PRECISIONS

DEFAULT_EPOCHS = 10
NON_FINITE = ("raise", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class DataOptions(cli.Options):
    """Data and how they are read."""

    task: str = "digits"
    """Data set; an unknown name lists all."""
    data_dir: Path | None = None
    """Folder with the data files, or a data set of Hugging Face (hf:...) or TensorFlow Datasets
    (tfds:...); default: OPTAX_ACCEL_DATA. The digits need none."""
    image_size: int | None = None
    """Height and width of the images of imagenet_folder; default: 224."""
    augment: str | None = None
    """Augmentations of the training images, separated by commas: any of randaugment, crop, flip,
    cutout, mixup."""
    data_workers: int = 0
    """Threads that read and augment batches ahead of time; with 0 the thread that moves batches to
    the device does it."""
    prefetch: int = 2
    """Batches kept ready on the device; with 0 each batch is read when it is needed."""


@dataclasses.dataclass(frozen=True)
class ModelOptions(cli.Options):
    """The model and its loss."""

    model: str | None = None
    """Model; default: the one of the task. An unknown name lists all."""
    model_options: str | None = None
    """Options of the model as JSON, e.g. '{"dropout_rate": 0.1}'; default: those of the task, if
    the model is the task's default too."""
    loss: str | None = None
    """Loss: cross_entropy, mse (half the squared distance to the one-hot label) or elbo (of a
    variational autoencoder); default: the one of the task."""
    label_smoothing: float = 0.0
    """Share of each label that training spreads evenly over all classes; cross_entropy only."""
    precision: str = "f32"
    """Precision of the network's computations: f32, bf16, or f16, which adds a dynamic loss scale.
    Parameters, loss and optimizer stay in float32."""
    value_fn_precision: str = "f32"
    """Precision where the method evaluates the network itself (gradients at other points,
    curvature): f32 or bf16."""


@dataclasses.dataclass(frozen=True)
class MethodOptions(cli.Options):
    """The training method, and clipping, decay and averages around it."""

    method: str | None = None
    """Training method; default: the one of the task, mostly sgd. An unknown name lists all."""
    learning_rate: float | None = None
    """Learning rate; default: the one of the task for its default method, otherwise the middle of
    the method's grid."""
    curvature_batch_size: int | None = None
    """Examples used for Hessian-vector products, the same ones throughout; default: twice the batch
    size."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step multiplies the parameters by 1 - learning rate x this;
    biases and normalization layers are left out."""
    clip: float | None = None
    """Gradients with a larger norm, over all parameters, are scaled down to this norm."""
    ema: float | None = None
    """Decay of a moving average of weights and batch statistics; the average is what is
    evaluated."""
    seed: int = 0
    """Seed of the initial weights, the batches and the method."""


@dataclasses.dataclass(frozen=True)
class LengthOptions(cli.Options):
    """How many steps, of how many examples each."""

    epochs: int | None = None
    """Passes over the training split; default: 10."""
    steps: int | None = None
    """Steps, instead of --epochs."""
    early_stopping: int | None = None
    """Stop after this many validations in a row without a new lowest loss."""
    batch_size: int | None = None
    """Examples per step, over all devices; default: the one of the task, mostly 64."""
    accumulate: int = 1
    """Micro-batches per step. One is in memory at a time, and batch normalization sees one at a
    time; each device divides its part of the batch."""


@dataclasses.dataclass(frozen=True)
class DeviceOptions(cli.Options):
    """Devices, and how they share the work."""

    parallel: str = "jit"
    """Parallel mode: jit (global view), fsdp (the same, with parameters and optimizer state sharded
    over the devices), pmap or shard_map."""
    devices: int | None = None
    """Number of devices, over all processes; default: all. On a CPU that many virtual devices are
    made."""
    workers: int | None = None
    """Number of workers, for methods whose workers have their own parameters; default: one per
    device."""


@dataclasses.dataclass(frozen=True)
class FolderOptions(cli.Options):
    """What is saved, when and where."""

    eval_every: int | None = None
    """Steps between validations; default: one epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: the value of --eval-every."""
    keep: int = 3
    """Number of latest checkpoints to keep."""
    non_finite: str = "raise"
    """What to do when loss, parameters or moments are not finite: raise (end the run), skip (undo
    the step) or rollback (return to the latest checkpoint and continue after the bad batch)."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Record a profile of a few steps, for TensorBoard and Perfetto, in the run's folder."""
    name: str | None = None
    """Name of the run's folder; default: train-<task>-<method>-<seed>."""
    runs_dir: Path = Path("runs")
    """Folder in which the run's folder is made."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in that folder, with its options unless others are given."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions(cli.Options):
    """Runs of several processes; see `experiments.launch` for one machine."""

    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Join a run of several processes, detected from SLURM, Open MPI, Kubernetes or Cloud TPU."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where the cluster cannot be detected."""
    processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, from 0, with --coordinator."""


@dataclasses.dataclass(frozen=True)
class Options(
    DataOptions,
    ModelOptions,
    MethodOptions,
    LengthOptions,
    DeviceOptions,
    FolderOptions,
    ProcessOptions,
):
    """Train one model on one task with one method."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        method = self.method
        if self.name is None:
            cli.check_known("task", self.task, data.TASKS)
            method = data.DEFAULTS[self.task].method if method is None else method
            methods.get_methods([method])
        default = f"train-{self.task}-{method}-{self.seed}"
        return folders.locate(self.runs_dir, self.name, default)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options of a run, and all that they come to.

    Attributes:
      options: the options themselves, for what they say as it stands.
      task: the data.
      devices: the devices of all processes.
      method: the training method.
      model: name of the model.
      model_options: options of the model.
      loss: name of the loss.
      augment: names of the augmentations.
      learning_rate: learning rate of the method.
      steps: number of steps.
      batch_size: examples per step, over all devices.
      curvature_batch_size: examples for Hessian-vector products; `None` for a method without.
      workers: workers with parameters of their own; `None` where all devices share one state.
      eval_every: steps between validations.
      checkpoint_every: steps between checkpoints.
    """

    options: Options
    task: data.Task
    devices: Sequence[jax.Device]
    method: methods.Method
    model: str
    model_options: dict[str, Any]
    loss: str
    augment: tuple[str, ...]
    learning_rate: float
    steps: int
    batch_size: int
    curvature_batch_size: int | None
    workers: int | None
    eval_every: int
    checkpoint_every: int

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.options.folder

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass over the training split."""
        return len(self.task.train) // self.batch_size

    @property
    def loops_convolutions_slowly(self) -> bool:
        """Whether XLA would run convolutions in a loop, many times slower (jax#12868)."""
        return self.devices[0].platform == "cpu" and models.is_convolutional(self.model)

    def is_due(self, step: int, every: int) -> bool:
        """Whether something is to be done behind a step; behind the last one it always is."""
        return step % every == 0 or step == self.steps

    def refresh_at(self, step: int) -> bool | str | None:
        """The static `refresh` argument of a step, counted from 0; see `Method.refresh`."""
        # The Lanczos iteration of a cold start is a loop.
        return self.method.refresh(step, cold_start=not self.loops_convolutions_slowly)

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
            "label_smoothing": self.options.label_smoothing,
            "augment": list(self.augment),
            "method": self.method.name,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "early_stopping": self.options.early_stopping,
            "batch_size": self.batch_size,
            "curvature_batch_size": self.curvature_batch_size,
            "accumulate": self.options.accumulate,
            "precision": self.options.precision,
            "value_fn_precision": self.options.value_fn_precision,
            "weight_decay": self.options.weight_decay,
            "clip": self.options.clip,
            "ema": self.options.ema,
            "seed": self.options.seed,
            "workers": self.workers,
            "eval_every": self.eval_every,
        }

    def machine(self) -> dict[str, Any]:
        """All that decides the numbers up to rounding only."""
        return {
            "parallel": self.options.parallel,
            "devices": len(self.devices),
            "processes": jax.process_count(),
            "platform": self.devices[0].platform,
        }


def prepare(options: Options) -> Plan:
    """Checks the options, finds the devices, reads the data.

    Args:
      options: the options of the run.

    Returns:
      The plan.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it. What can be
        told by the options alone is told before devices and data are touched.
    """
    check(options)
    devices = find_devices(options.devices)
    task = data.load_task(options.task, data_dir=options.data_dir, image_size=options.image_size)
    return resolve(options, task, devices)


# What the options alone can be wrong in, beyond the types and ranges of `cli.Options.check`: names
# that have to be known, then options that have to fit each other.
NAMES: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("task", "task", data.TASKS),
    ("model", "model", models.list()),
    ("loss", "loss", tuple(losses.LOSSES)),
    ("precision", "precision", tuple(PRECISIONS)),
    ("--value-fn-precision", "value_fn_precision", ("f32", "bf16")),
    ("parallel mode", "parallel", parallel.MODES),
    ("--non-finite policy", "non_finite", NON_FINITE),
)
COMBINATIONS: tuple[cli.Rule[Options], ...] = (
    cli.Rule(
        lambda o: _loss(o) in data.LOSSES[data.DEFAULTS[o.task].kind],
        lambda o: (
            f"--loss {_loss(o)} does not fit the task {o.task}; valid: "
            f"{', '.join(data.LOSSES[data.DEFAULTS[o.task].kind])}"
        ),
    ),
    cli.Rule(
        lambda o: not o.label_smoothing or _loss(o) == "cross_entropy",
        lambda o: f"--label-smoothing is for the loss cross_entropy, not for {_loss(o)}",
    ),
    cli.Rule(
        lambda o: (
            (o.precision, o.value_fn_precision) == ("f32", "f32")
            or "dtype" not in (read_model_options(o.model_options) or {})
        ),
        lambda o: "--precision decides the model's dtype; leave it out of --model-options",
    ),
    cli.Rule(
        lambda o: o.epochs is None or o.steps is None,
        lambda o: "--epochs and --steps exclude each other; give one",
    ),
    cli.Rule(
        lambda o: o.curvature_batch_size is None or _method(o).refresh_every is not None,
        lambda o: (
            f"--curvature-batch-size: method {_method(o).name} uses no curvature; leave it out"
        ),
    ),
    cli.Rule(
        lambda o: o.workers is None or _method(o).per_worker,
        lambda o: (
            f"--workers: with method {_method(o).name} all devices keep the same "
            "parameters; leave it out"
        ),
    ),
)


def _no_more_than_examples(name: str) -> cli.Rule[Plan]:
    return cli.Rule(
        lambda p: (getattr(p, name) or 0) <= len(p.task.train),
        lambda p: (
            f"--{name.replace('_', '-')} {getattr(p, name)} is more than the {len(p.task.train)} "
            f"training examples of {p.task.name}"
        ),
    )


# What they can be wrong in for these data and devices.
SIZES: tuple[cli.Rule[Plan], ...] = (
    _no_more_than_examples("batch_size"),
    _no_more_than_examples("curvature_batch_size"),
    cli.Rule(
        lambda p: p.options.accumulate <= _share(p),
        lambda p: (
            f"--accumulate {p.options.accumulate} is more than the {_share(p)} examples of a step "
            "on one device or worker"
        ),
    ),
    cli.Rule(
        lambda p: p.steps <= cli.COUNT.high,
        lambda p: (
            f"--epochs {p.options.epochs} are {p.steps} steps; give at most "
            f"{int(cli.COUNT.high) // p.steps_per_epoch}"
        ),
    ),
)


def _loss(options: Options) -> str:
    return options.loss or data.DEFAULTS[options.task].loss


def _method(options: Options) -> methods.Method:
    (method,) = methods.get_methods([options.method or data.DEFAULTS[options.task].method])
    return method


def _share(plan: Plan) -> int:
    return plan.batch_size // max(len(plan.devices), plan.workers or 1)


def check(options: Options) -> None:
    """Checks all that the options alone decide.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it.
    """
    options.check()
    for kind, name, valid in NAMES:
        cli.check_known(kind, getattr(options, name), valid)
    _method(options)
    augmentation.parse(options.augment or "")
    cli.enforce(COMBINATIONS, options)


def resolve(options: Options, task: data.Task, devices: Sequence[jax.Device]) -> Plan:
    """Fills in the defaults; pure.

    Args:
      options: options that `check` has passed.
      task: their task.
      devices: the devices to run on.

    Returns:
      The plan.

    Raises:
      ValueError: a size does not fit the data or the devices, in one line.
    """
    defaults, method = task.defaults, _method(options)
    model = options.model or defaults.model
    model_options = read_model_options(options.model_options)
    if model_options is None:
        model_options = dict(defaults.model_options) if model == defaults.model else {}
    rate = options.learning_rate
    if rate is None and method.name == defaults.method:
        rate = defaults.learning_rate
    if rate is None:
        rate = method.learning_rates[len(method.learning_rates) // 2]
    examples = len(task.train)
    batch_size = options.batch_size or defaults.batch_size
    curvature = options.curvature_batch_size
    if curvature is None and method.refresh_every is not None:
        most = min(2 * batch_size, examples)
        curvature = max(most - most % len(devices), 1)
    per_epoch = examples // batch_size
    steps = options.steps or per_epoch * (options.epochs or DEFAULT_EPOCHS)
    eval_every = min(steps, options.eval_every or per_epoch)
    plan = Plan(
        options=options,
        task=task,
        devices=devices,
        method=method,
        model=model,
        model_options=model_options,
        loss=_loss(options),
        augment=augmentation.parse(options.augment or ""),
        learning_rate=rate,
        steps=steps,
        batch_size=batch_size,
        curvature_batch_size=curvature,
        workers=(options.workers or len(devices)) if method.per_worker else None,
        eval_every=eval_every,
        checkpoint_every=options.checkpoint_every or eval_every,
    )
    cli.enforce(SIZES, plan)
    if plan.augment:  # refuses examples that are no images
        augmentation.Augmentation(
            task.train, plan.augment, seed=options.seed, num_classes=task.num_classes
        )
    parallel.check_divisible(batch_size, len(devices), "--batch-size")
    if curvature is not None:
        parallel.check_divisible(curvature, len(devices), "--curvature-batch-size")
    if plan.workers is not None:
        parallel.check_divisible(batch_size, plan.workers, "--batch-size", "workers")
    return plan


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
