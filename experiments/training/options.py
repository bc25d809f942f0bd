"""The options of a run, in groups, and what they can be wrong in by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
from experiments import cli, data, methods
from experiments.cli import UsageError
from experiments.data import augmentation
from experiments.runs import folders, remote_runs
from experiments.runs.records import CONFIG
from experiments.training import losses, parallel
from experiments.training.precision import PRECISIONS

NON_FINITE = ("raise", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class DataOptions(cli.Options):
    """Data and how they are read."""

    task: str = "digits"
    """Data set; --list tasks shows all. MODULE:TASK is one that a module of yours registers."""
    data_dir: Path | None = None
    """Folder with the data files, a file or folder of your own, or a data set of Hugging Face
    (hf:...) or TensorFlow Datasets (tfds:...); default: OPTAX_ACCEL_DATA. The digits need none."""
    augment: str | None = None
    """Augmentations of the training images, separated by commas: any of randaugment, crop, flip,
    cutout, mixup."""
    follow: str = "none"
    """Let the loss decide on the next batch, for pictures with boxes: where small objects have less
    than --follow-threshold of the loss of the boxes (box) or of the classes (class), four pictures
    are stitched into each of the next batch. none: never."""
    follow_threshold: float | None = None
    """Share of the loss, with --follow; default 0.1."""
    data_workers: int = 0
    """Threads that read and augment batches ahead of time; with 0 the thread that moves batches to
    the device does it."""
    prefetch: int = 2
    """Batches kept ready on the device; with 0 each batch is read when it is needed."""


@dataclasses.dataclass(frozen=True)
class ModelOptions(cli.Options):
    """The model and its loss."""

    model: str | None = None
    """Model; default: the one of the task; --list models shows all."""
    model_options: str | None = None
    """Options of the model as JSON, e.g. '{"dropout_rate": 0.1}'; default: those of the task, if
    the model is the task's default too."""
    loss: str | None = None
    """Loss: cross_entropy, mse (half the squared distance to the one-hot label), margin (of a
    capsule network), elbo (of a variational autoencoder), score_matching (of a score network) or
    flow (absolute errors of optical flow) or detection (of a detector); default: the one of the
    task, or margin for the model capsnet."""
    label_smoothing: float = 0.0
    """Share of each label that training spreads evenly over all classes; cross_entropy only."""


@dataclasses.dataclass(frozen=True)
class MethodOptions(cli.Options):
    """The training method, and clipping, decay and averages around it."""

    method: str | None = None
    """Training method; default: the one of the task, mostly sgd; --list methods shows all."""
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
    """Passes over the training split; default: 10, or as many as make 500 steps with files of your
    own."""
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
class PrecisionOptions(cli.Options):
    """What the network computes in."""

    precision: str = "f32"
    """Precision of the network's computations: f32, bf16, or f16, which adds a dynamic loss scale.
    Parameters, loss and optimizer stay in float32."""
    value_fn_precision: str = "f32"
    """Precision where the method evaluates the network itself (gradients at other points,
    curvature): f32 or bf16."""


@dataclasses.dataclass(frozen=True)
class ParallelOptions(cli.Options):
    """Devices, and how they share the work; processes, see `experiments.launch`."""

    parallel: str = "jit"
    """Parallel mode: jit (global view), fsdp (the same, with parameters and optimizer state sharded
    over the devices), pmap or shard_map."""
    devices: int | None = None
    """Number of devices, over all processes; default: all. On a CPU that many virtual devices are
    made."""
    workers: int | None = None
    """Number of workers, for methods whose workers have their own parameters; default: one per
    device."""
    distributed: bool = False
    """Join a run of several processes, detected from SLURM, Open MPI, Kubernetes or Cloud TPU."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where the cluster cannot be detected."""
    processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, from 0, with --coordinator."""


@dataclasses.dataclass(frozen=True)
class FaultsOptions(cli.Options):
    """What is saved, when, and what happens when something goes wrong."""

    resume: bool = False
    """Continue the run in that folder, with its options unless others are given."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; default: the value of --eval-every."""
    keep: int = 3
    """Number of latest checkpoints to keep."""
    non_finite: str = "raise"
    """What to do when loss, parameters or moments are not finite: raise (end the run), skip (undo
    the step) or rollback (return to the latest checkpoint and continue after the bad batch)."""


@dataclasses.dataclass(frozen=True)
class OutputOptions(cli.DryRunOptions):
    """What is measured, printed and written."""

    eval_every: int | None = None
    """Steps between validations; default: one epoch, or more for 50 validations in all with files
    of your own."""
    norms_every: int = 1
    """Steps between those whose norms of gradient and update are in the metrics; they cost a few
    percent of the steps of small networks."""
    monitor: bool = False
    """Record the curvature that the optimizer sees (sharpness, effective sharpness against its
    stability threshold, alignments and more) in the metrics; the training stays the same."""
    monitor_every: int | None = None
    """Steps between records of --monitor; default: 1000."""
    log: str = "none"
    """Send the metrics to wandb (Weights & Biases), aim or mlflow, too, if that package is
    installed; a resumed run continues there. none: only to the run's folder."""
    profile: bool = False
    """Record a profile of a few steps, for TensorBoard and Perfetto, in the run's folder."""
    name: str | None = None
    """Name of the run's folder; default: train-<task>-<method>-<seed>."""
    runs_dir: Path = Path("runs")
    """Folder in which the run's folder is made."""
    list: str | None = None
    """tasks, models or methods: print all of them with a few words on each, then stop; without a
    word all three."""


@dataclasses.dataclass(frozen=True)
class Options(
    DataOptions,
    data.FilesOptions,
    ModelOptions,
    MethodOptions,
    LengthOptions,
    PrecisionOptions,
    ParallelOptions,
    FaultsOptions,
    OutputOptions,
):
    """Train one model on one task with one method."""

    @property
    def chosen_method(self) -> methods.Method:
        """The training method, or that of the task if none is named."""
        (method,) = methods.get_methods([self.method or data.find_task(self.task).method])
        return method

    @property
    def chosen_loss(self) -> str:
        """Name of the loss, or that of the model or the task if none is named."""
        return losses.choose(self.loss, self.model, data.find_task(self.task))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        name = self.name
        if name is None:
            task = data.short_name(self.task, self.data_dir)
            name = f"train-{task}-{self.chosen_method.name}-{self.seed}"
        return folders.locate(self.runs_dir, name, name)


def from_record(saved: Mapping[str, Any], folder: Path) -> Options:
    """The options of the run in a folder.

    Args:
      saved: the options as its `config.json` holds them.
      folder: the folder, which may have been moved since.

    Returns:
      The options, with the name and the place that the folder has now.

    Raises:
      UsageError: the record is not one of these options.
    """
    values = dict(saved)
    try:
        values["data_dir"] = None if values["data_dir"] is None else Path(values["data_dir"])
        options = Options(**values | {"name": folder.name, "runs_dir": folder.parent})
        options.check()
    except (KeyError, TypeError):
        raise UsageError(
            f"{folder / CONFIG} is of another version of this command; give another --name"
        ) from None
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG} is damaged: {error}; give another --name") from None
    return options


# What the options alone can be wrong in, beyond the types and ranges of `cli.Options.check`: names
# that have to be known, then options that have to fit each other.
NAMES: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("model", "model", models.list()),
    ("loss", "loss", tuple(losses.LOSSES)),
    ("--follow loss", "follow", ("none", *losses.GROUPS)),
    ("precision", "precision", tuple(PRECISIONS)),
    ("--value-fn-precision", "value_fn_precision", ("f32", "bf16")),
    ("parallel mode", "parallel", parallel.MODES),
    ("--non-finite policy", "non_finite", NON_FINITE),
    ("--log service", "log", ("none", *remote_runs.SERVICES)),
)
COMBINATIONS: tuple[cli.Rule[Options], ...] = (
    cli.Rule(
        lambda o: o.chosen_loss in data.losses_of(o.task),
        lambda o: (
            f"--loss {o.chosen_loss} does not fit the task {o.task}; valid: "
            f"{', '.join(data.losses_of(o.task))}"
        ),
    ),
    cli.Rule(
        lambda o: not o.label_smoothing or o.chosen_loss == "cross_entropy",
        lambda o: f"--label-smoothing is for the loss cross_entropy, not for {o.chosen_loss}",
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
        lambda o: o.curvature_batch_size is None or o.chosen_method.refresh_every is not None,
        lambda o: (
            f"--curvature-batch-size: method {o.chosen_method.name} uses no curvature; leave it out"
        ),
    ),
    cli.Rule(
        lambda o: o.monitor_every is None or o.monitor,
        lambda o: "--monitor-every is the period of --monitor; give both or leave it out",
    ),
    cli.Rule(
        lambda o: not o.monitor or not o.chosen_method.per_worker,
        lambda o: (
            f"--monitor watches parameters that all devices share, and method "
            f"{o.chosen_method.name} has workers with their own; leave it out"
        ),
    ),
    cli.Rule(
        lambda o: o.follow_threshold is None or o.follow != "none",
        lambda o: "--follow-threshold is the share of --follow; give both or leave it out",
    ),
    cli.Rule(
        lambda o: o.workers is None or o.chosen_method.per_worker,
        lambda o: (
            f"--workers: with method {o.chosen_method.name} all devices keep the same "
            "parameters; leave it out"
        ),
    ),
)


def check(options: Options) -> None:
    """Checks all that the options alone decide.

    Raises:
      ValueError: one line that says which option, what is allowed and how to fix it.
    """
    options.check()
    data.find_task(options.task)
    options.check_use(options.task)
    for kind, name, valid in NAMES:
        cli.check_known(kind, getattr(options, name), valid)
    _ = options.chosen_method  # has to be known
    augmentation.parse(options.augment or "")
    if options.log != "none" and not options.dry_run:
        remote_runs.load(options.log)  # before anything is written
    read_model_options(options.model_options)
    cli.enforce(COMBINATIONS, options)


# Of `--model-options`: the largest whole number, that of options which count layers or other parts
# that are made one by one, and the most entries of a list.
LARGEST, MOST_PARTS = 10**6, 1_000
PARTS = ("depth", "num_layers", "num_levels", "num_iterations")


def read_model_options(text: str | None) -> dict[str, Any] | None:
    """The options of `--model-options`; None if it is not given.

    Raises:
      UsageError: it is not a JSON object, or holds a number out of range.
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


# Where a model has no task of its own: the task with the images that suit it.
_TASK_OF_IMAGES, _TASK_OF_CAPSULES = "cifar10_5k", "mnist5k"


def tasks_of(model: str) -> tuple[str, ...]:
    """The tasks whose default model this is, without those that read a person's own files.

    Args:
      model: name of a model.

    Returns:
      Names of tasks, maybe none.
    """
    return tuple(
        name
        for name in data.TASKS
        if data.DEFAULTS[name].model == model and name not in data.OWN_TASKS
    )


def trained_by(model: str) -> str:
    """Options of this command that train a model, on a task with settings that suit it.

    >>> trained_by("ncsn"), trained_by("wrn_16_8")
    ('--task ncsn_digits', '--task cifar10_5k --model wrn_16_8')

    Args:
      model: name of a model.

    Returns:
      The options, as one types them.
    """
    if own := tasks_of(model):
        return f"--task {own[0]}"
    if losses.LOSS_OF_MODEL.get(model) == "margin":
        return f"--task {_TASK_OF_CAPSULES} --model {model} --method adam"
    return f"--task {_TASK_OF_IMAGES} --model {model}"


LISTS = ("tasks", "models", "methods")


def listing(what: str, tasks: Sequence[str] = data.TASKS) -> str:
    """What `--list` prints.

    Args:
      what: one of `LISTS`, or ``"all"``.
      tasks: the tasks that the command knows.

    Returns:
      Lines for the terminal.

    Raises:
      UsageError: there is no such list.
    """
    cli.check_known("list", what, (*LISTS, "all"))
    texts = {
        "tasks": "\n".join(
            f"  {name}: {defaults.kind}, model {defaults.model}, method {defaults.method}"
            for name, defaults in data.DEFAULTS.items()
            if name in tasks
        ),
        "models": models.describe({name: trained_by(name) for name in models.list()}),
        "methods": methods.describe([*methods.METHODS.values()]),
    }
    if what != "all":
        return texts[what]
    return "\n".join(f"{name}\n{text}" for name, text in texts.items())
