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
        return folders.locate(self.runs_dir, self.name, default)


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
    losses.find_loss(loss, label_smoothing=options.label_smoothing)
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
    cli.check_known("precision", options.precision, tuple(PRECISIONS))
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
