"""The plan of a run: what its options come to for these data and devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from experiments import cli, data, methods
from experiments.cli import UsageError
from experiments.data import augmentation
from experiments.data.following import PER_STITCHED, THRESHOLD
from experiments.training import cluster, losses, monitoring, parallel
from experiments.training.options import Options, check, read_model_options, tasks_of

# Validations that are printed where nobody says how many there are to be.
MOST_LINES = 20
# Steps between records of the curvature, as in `optax_accel.monitor_curvature`.
MONITOR_EVERY = 1000


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

    @functools.cached_property
    def folder(self) -> Path:
        """The run's folder."""
        return self.options.folder

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass over the training split."""
        return len(self.task.train) // self.batch_size

    @functools.cached_property
    def loops_convolutions_slowly(self) -> bool:
        """Whether XLA would run convolutions in a loop, many times slower (jax#12868)."""
        return self.devices[0].platform == "cpu" and models.is_convolutional(self.model)

    @property
    def follows(self) -> bool:
        """Whether the loss decides of which kind the next batch is."""
        return self.options.follow != "none"

    def is_due(self, step: int, every: int) -> bool:
        """Whether something is to be done behind a step; behind the last one it always is."""
        return step % every == 0 or step == self.steps

    def is_shown(self, step: int) -> bool:
        """Whether a validation is printed; of many that nobody asked for, about 20 are."""
        if self.options.eval_every is not None:
            return True
        number = math.ceil(self.steps / self.eval_every)
        return self.is_due(step, self.eval_every * math.ceil(number / MOST_LINES))

    def refresh_at(self, step: int) -> bool | str | None:
        """The static `refresh` argument planned for a step from 0 on; see `Method.refresh`."""
        return self._with_records(step, self.method.refresh(step, **self._refresh_options))

    def refresh_schedule(self) -> Callable[[int, Any], Any]:
        """The static `refresh` argument of each step of a run; see `Method.schedule`."""
        schedule = self.method.schedule(**self._refresh_options)
        return lambda step, state: self._with_records(step, schedule(step, state))

    @property
    def follow_threshold(self) -> float | None:
        """The share of the loss below which a stitched batch follows; None without `--follow`."""
        if not self.follows:
            return None
        given = self.options.follow_threshold
        return THRESHOLD if given is None else given

    @property
    def monitor_every(self) -> int | None:
        """Steps between records of the curvature; None without a monitor."""
        if not self.options.monitor:
            return None
        return self.options.monitor_every or MONITOR_EVERY

    @property
    def parts(self) -> int:
        """Parts in which a step sees its batch: micro-batches on each of the replicas."""
        replicas = self.options.parallel in ("pmap", "shard_map")
        return self.options.accumulate * (len(self.devices) if replicas else 1)

    def _with_records(self, step: int, refresh: Any) -> Any:
        every = self.monitor_every
        if every is None:
            return refresh
        return monitoring.joined_refresh(refresh, step, every)

    @property
    def _refresh_options(self) -> dict[str, Any]:
        # The Lanczos iteration of a cold start is a loop.
        cold_start = not self.loops_convolutions_slowly
        return {"cold_start": cold_start, "steps_per_epoch": self.steps_per_epoch}

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
            "follow": self.options.follow,
            "follow_threshold": self.follow_threshold,
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
            "norms_every": self.options.norms_every,
        } | ({} if self.monitor_every is None else {"monitor_every": self.monitor_every})

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
    task = data.load_task(options.task, data_dir=options.data_dir, **options.files)
    return resolve(options, task, devices)


def _no_more_than_examples(name: str) -> cli.Rule[Plan]:
    return cli.Rule(
        lambda p: (getattr(p, name) or 0) <= len(p.task.train),
        lambda p: (
            f"--{name.replace('_', '-')} {getattr(p, name)} is more than the {len(p.task.train)} "
            f"training examples of {p.task.name}"
        ),
    )


def _kinds(model: str) -> set[str]:
    """The kinds of tasks that a model is made for."""
    kinds = {data.DEFAULTS[task].kind for task in tasks_of(model)} or {"classification"}
    return kinds | ({"regression"} if "classification" in kinds else set())


def _with_problem_type(plan: Plan) -> str:
    """How a model of pictures is trained on a person's own."""
    kinds = sorted(_kinds(plan.model) & data.GENERATIVE.keys())
    own = plan.task.name in data.OF_PICTURES
    return f", or with --problem-type {kinds[0]}" if own and kinds else ""


def _rebuilds_other_pixels(plan: Plan) -> bool:
    """Whether a capsule network is to rebuild values that its decoder cannot have."""
    rebuilds = plan.model == "capsnet" and plan.model_options.get("reconstruction", True)
    if plan.loss != "margin" or not rebuilds:
        return False
    x = plan.task.train.x
    return not isinstance(x, np.ndarray) or x.min() < 0 or x.max() > 1


# What they can be wrong in for these data, and for these devices.
SIZES: tuple[cli.Rule[Plan], ...] = (
    cli.Rule(
        lambda p: p.task.defaults.kind in _kinds(p.model) or p.model == p.task.default_model,
        lambda p: (
            f"model {p.model} does not fit the task {p.task.name} ({p.task.defaults.kind}); its "
            f"own is {p.task.default_model}, and {p.model} is trained by --task "
            f"{', '.join(tasks_of(p.model)) or 'digits and other tasks of classes'}"
            f"{_with_problem_type(p)}"
        ),
    ),
    cli.Rule(
        lambda p: not _rebuilds_other_pixels(p),
        lambda p: (
            f"the decoder of {p.model} rebuilds pixels from 0 to 1, and those of {p.task.name} "
            """are standardized: leave it out by --model-options '{"reconstruction": false}'"""
        ),
    ),
    cli.Rule(
        lambda p: p.loss in data.LOSSES[p.task.defaults.kind],
        lambda p: (
            f"--loss {p.loss} does not fit the task {p.task.name}, whose labels are for "
            f"{p.task.defaults.kind}; valid: {', '.join(data.LOSSES[p.task.defaults.kind])}"
        ),
    ),
    cli.Rule(
        lambda p: not p.options.label_smoothing or p.loss == "cross_entropy",
        lambda p: f"--label-smoothing is for the loss cross_entropy, not for {p.loss}",
    ),
    cli.Rule(
        lambda p: p.loss != "margin" or losses.LOSS_OF_MODEL.get(p.model) == "margin",
        lambda p: (
            f"--loss margin is of the lengths of capsules, which the model {p.model} has not; "
            "give --model capsnet or another loss"
        ),
    ),
    cli.Rule(
        lambda p: p.loss != "margin" or "mixup" not in p.augment,
        lambda p: (
            "--augment mixup mixes labels, and the loss margin takes one class per image; "
            "leave one of them out"
        ),
    ),
    cli.Rule(
        lambda p: not p.augment or p.task.defaults.kind != "detection",
        lambda p: f"--augment does not move boxes, the labels of {p.task.name}; leave it out",
    ),
    cli.Rule(
        lambda p: not p.follows or p.task.defaults.kind == "detection",
        lambda p: (
            f"--follow {p.options.follow} is for pictures with boxes, such as those of "
            f"digits_detection, not for {p.task.name}; leave it out"
        ),
    ),
    cli.Rule(
        lambda p: not p.follows or PER_STITCHED * p.batch_size <= len(p.task.train),
        lambda p: (
            f"--follow: a stitched batch of {p.batch_size} takes {PER_STITCHED * p.batch_size} of "
            f"the {len(p.task.train)} training pictures of {p.task.name}; use a --batch-size of at "
            f"most {len(p.task.train) // PER_STITCHED}"
        ),
    ),
    _no_more_than_examples("batch_size"),
    _no_more_than_examples("curvature_batch_size"),
)
SHARES: tuple[cli.Rule[Plan], ...] = (
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


def _share(plan: Plan) -> int:
    return plan.batch_size // max(len(plan.devices), plan.workers or 1)


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
    defaults, method = task.defaults, options.chosen_method
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
    most = min(defaults.batch_size, examples)
    few = most - most % len(devices) if most < defaults.batch_size else most  # of a small data set
    batch_size = options.batch_size or few or most
    curvature = options.curvature_batch_size
    if curvature is None and method.refresh_every is not None:
        most = min(2 * batch_size, examples)
        curvature = max(most - most % len(devices), 1)
    per_epoch = examples // batch_size
    steps = options.steps or per_epoch * (options.epochs or data.default_epochs(task, batch_size))
    often = max(per_epoch, steps // 50) if task.name in data.OWN_TASKS else per_epoch
    eval_every = min(steps, options.eval_every or often)
    plan = Plan(
        options=options,
        task=task,
        devices=devices,
        method=method,
        model=model,
        model_options=model_options,
        loss=losses.choose(options.loss, model, defaults),
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
    if plan.augment:  # refuses examples that are not images
        augmentation.Augmentation(
            task.train, plan.augment, seed=options.seed, num_classes=task.num_classes
        )
    parallel.check_divisible(batch_size, len(devices), "--batch-size")
    if curvature is not None:
        parallel.check_divisible(curvature, len(devices), "--curvature-batch-size")
    if plan.workers is not None:
        parallel.check_divisible(batch_size, plan.workers, "--batch-size", "workers")
    cli.enforce(SHARES, plan)
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
