"""What a task is: a data set, split, and how a model is trained on it by default."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments import cli
from experiments.data.readers.arrays import Arrays
from experiments.data.readers.files import LIMIT_VARIABLE, DataError, reason
from experiments.data.readers.pictures import ImageFiles

SPLITS = ("train", "validation", "test")
# Of a dominant subspace, where a task has no classes to give their number.
DIRECTIONS = 10
# The label of positions that count for nothing, such as padding.
IGNORED = -1
# Training examples of the tasks that use a part of their data set.
SUBSETS = {"mnist5k": 5_000, "cifar10_5k": 5_000, "ncsn_cifar10_5k": 5_000, "sst2_1k": 1_000}
# Validation examples of the tasks that use all of it.
_VALIDATION = 5_000


@dataclass(frozen=True)
class Defaults:
    """How a task is trained unless the command says otherwise, with settings that learn.

    Attributes:
      model: name of a model in `models`.
      target_accuracy: validation accuracy that a good run of that model reaches; 0 for tasks whose
        runs are not compared by accuracy.
      kind: "classification", "regression", "segmentation", "detection", "language",
        "translation", "autoencoder", "score_matching" or "flow".
      model_options: options of the model.
      loss: name of a loss in `losses.LOSSES`.
      method: name of a method in `methods`.
      learning_rate: learning rate of the method; `None` takes the middle of its grid.
      batch_size: examples per step.
    """

    model: str
    target_accuracy: float = 0.0
    kind: str = "classification"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "cross_entropy"
    method: str = "sgd"
    learning_rate: float | None = None
    batch_size: int = 64


# With adam the same settings serve most data.
_OWN = Defaults("mlp", method="adam", learning_rate=0.001)
_SHAKESPEARE = {"embedding_size": 128, "num_layers": 4, "num_heads": 4, "dropout_rate": 0.1}
# Batches of 100 as in Demon's experiments (Chen et al., 2019, appendix).
_VAE = Defaults(
    "vae",
    kind="autoencoder",
    loss="elbo",
    method="adam",
    learning_rate=0.001,
    batch_size=100,
)
# Adam's rate and the batch of Song and Ermon (2019), appendix B, and of the authors' code, which
# trains widths of 64 (MNIST) and 128 (CIFAR-10) for 200,000 steps.
_NCSN = Defaults(
    "ncsn",
    kind="score_matching",
    loss="score_matching",
    method="adam",
    learning_rate=0.001,
    batch_size=128,
)
_TABLE: dict[str, Defaults] = {
    "digits": Defaults("mlp", 0.95),
    "mnist": Defaults("mlp", 0.97),
    "mnist5k": Defaults("mlp", 0.92),
    "fashion_mnist": Defaults("cnn", 0.87, learning_rate=0.01),
    "cifar10": Defaults("resnet20", 0.80),
    "cifar10_5k": Defaults("cnn", 0.50, learning_rate=0.01),
    "cifar100": Defaults("resnet20", 0.45),
    "imagenet_folder": Defaults("resnet18"),
    "sst2": Defaults("transformer", 0.68, method="adam", learning_rate=0.0003),
    "sst2_1k": Defaults("transformer", 0.58, method="adam", learning_rate=0.0003),
    "wikitext2": Defaults(
        "lstm_lm",
        kind="language",
        model_options={"hidden_size": 200, "tied": True, "dropout_rate": 0.2},
        method="adam",
        learning_rate=0.003,
        batch_size=32,
    ),
    "tiny_shakespeare": Defaults(
        "transformer_lm",
        kind="language",
        model_options=_SHAKESPEARE,
        method="adam",
        learning_rate=0.001,
        batch_size=32,
    ),
    "multi30k": Defaults(
        "transformer_translator",
        kind="translation",
        model_options={
            "embedding_size": 256,
            "num_layers": 3,
            "feedforward_size": 512,
            "pre_norm": True,
        },
        method="adam",
        learning_rate=0.0003,
        batch_size=128,
    ),
    "segmentation": Defaults(
        "unet",
        kind="segmentation",
        # A quarter of the paper's width, and what it did not know yet.
        model_options={"width": 16, "norm": "batch"},
        method="adam",
        learning_rate=0.001,
        batch_size=8,
    ),
    "moving_digits_flow": Defaults(
        "deq_flow", kind="flow", loss="flow", method="adam", learning_rate=0.001, batch_size=16
    ),
    "digits_detection": Defaults(
        "detector",
        kind="detection",
        loss="detection",
        method="adam",
        learning_rate=0.003,
        batch_size=16,
    ),
    "vae_mnist": _VAE,
    "vae_digits": dataclasses.replace(_VAE, model_options={"hidden_sizes": (256, 128)}),
    "ncsn_digits": dataclasses.replace(_NCSN, model_options={"width": 16}),
    "ncsn_cifar10_5k": dataclasses.replace(_NCSN, model_options={"width": 32}),
    "image_folder": dataclasses.replace(_OWN, model="cnn"),
    "arrays": _OWN,
    "text": dataclasses.replace(_OWN, model="transformer", learning_rate=0.0003),
    "text_lm": dataclasses.replace(
        _OWN,
        model="transformer_lm",
        kind="language",
        model_options=_SHAKESPEARE,
        batch_size=32,
    ),
    "table": _OWN,
}
# By name; `register` adds to them.
DEFAULTS: Mapping[str, Defaults] = MappingProxyType(_TABLE)
TASKS: tuple[str, ...] = tuple(DEFAULTS)
# Tasks that read a person's own files, and those of them whose labels may be classes or numbers.
OWN_TASKS = ("image_folder", "arrays", "text", "text_lm", "table")
CLASSES_OR_NUMBERS = ("arrays", "table")
# How a model of the pictures themselves is trained on them, by the kind of the model.
GENERATIVE: Mapping[str, Defaults] = MappingProxyType(
    {"autoencoder": _VAE, "score_matching": _TABLE["ncsn_cifar10_5k"]}
)
OF_PICTURES = ("image_folder", "arrays")
# Tasks with one label for each example, and all examples in memory.
CLASSIFICATION: tuple[str, ...] = tuple(
    name
    for name, defaults in DEFAULTS.items()
    if defaults.kind == "classification" and name != "imagenet_folder"
)
# Losses that fit the labels of each kind of task.
LOSSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "classification": ("cross_entropy", "mse", "margin"),
        "regression": ("mse",),
        "segmentation": ("cross_entropy",),
        "detection": ("detection",),
        "language": ("cross_entropy",),
        "translation": ("cross_entropy",),
        "autoencoder": ("elbo",),
        "score_matching": ("score_matching",),
        "flow": ("flow",),
    }
)


def add_defaults(name: str, defaults: Defaults) -> None:
    """Adds a task to `DEFAULTS`.

    Args:
      name: its name.
      defaults: its defaults.
    """
    _TABLE[name] = defaults


def find_task(name: str) -> Defaults:
    """The defaults of a task by name.

    Args:
      name: one of `DEFAULTS`, or `MODULE:TASK`, which imports a module that registers the task.

    Returns:
      Its defaults.

    Raises:
      DataError: the name is unknown, or the module cannot be imported or registers no such task.
    """
    module, colon, task = name.rpartition(":")
    if colon:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(module)
        except Exception as error:
            raise DataError(
                f"task {name!r}: the module {module!r} cannot be imported "
                f"({type(error).__name__}: {reason(error)})"
            ) from error
        if task not in DEFAULTS:
            own = [each for each in DEFAULTS if each not in TASKS]
            raise DataError(
                f"task {name!r}: the module {module!r} registers no task {task!r}, only "
                f"{', '.join(own) or 'none'}; call experiments.data.register in it"
            )
    elif name not in DEFAULTS:
        raise DataError(cli.unknown("task", name, tuple(DEFAULTS)))
    return DEFAULTS[task]


def short_name(name: str, location: Path | None = None) -> str:
    """The name of a task as folders of runs have it.

    It lacks the module that registers a task, and has the name of a file of one's own.

    >>> short_name("my_module:spirals"), short_name("table", Path("data/wine.csv"))
    ('spirals', 'table-wine')

    Args:
      name: name of the task, as `find_task` takes it.
      location: where the data are.

    Returns:
      A name.
    """
    if name in OWN_TASKS and location is not None:
        stem = re.sub(r"[^\w-]+", "-", location.resolve().name.partition(".")[0]).strip("-")
        return f"{name}-{stem[:60]}" if stem else name
    return name.rpartition(":")[2]


def default_epochs(task: Task, batch_size: int) -> int:
    """Passes over the training split where nobody says how many.

    Args:
      task: the task.
      batch_size: examples per step.

    Returns:
      10, or for a person's own files as many as make 500 steps, if these are more.
    """
    steps = max(len(task.train) // batch_size, 1)
    return max(10, -(-500 // steps)) if task.name in OWN_TASKS else 10


def losses_of(name: str) -> tuple[str, ...]:
    """The losses that a task may have, before its labels are known.

    Args:
      name: name of the task, as `find_task` takes it.

    Returns:
      Names of losses.
    """
    losses = LOSSES[find_task(name).kind]
    more = LOSSES["regression"] if name in CLASSES_OR_NUMBERS else ()
    if name in OF_PICTURES:
        more += tuple(defaults.loss for defaults in GENERATIVE.values())
    return tuple(dict.fromkeys((*losses, *more)))


def check_classification(name: str) -> None:
    """Checks a task for commands that need one label per example, and all examples in memory.

    Args:
      name: name of the task.

    Raises:
      DataError: the task is unknown, or its labels are no classes or its examples on disk.
    """
    valid = [each for each in DEFAULTS if each in CLASSIFICATION or each not in TASKS]
    if ":" not in name and name not in DEFAULTS:
        raise DataError(cli.unknown("task", name, valid))
    if find_task(name).kind != "classification" or name == "imagenet_folder":
        raise DataError(
            f"task {name!r} is for `train` only: this command compares classifiers of examples in "
            f"memory; valid: {', '.join(valid)}"
        )


def check_classifier(task: Task) -> None:
    """Checks what only the data tell: that labels are classes, and examples in memory.

    Args:
      task: the task.

    Raises:
      DataError: it is not so; the message says what to do.
    """
    if task.defaults.kind != "classification":
        raise DataError(
            f"task {task.name!r}: the labels are numbers ({task.defaults.kind}); this command "
            "compares classifiers, `train` takes any task"
        )
    if not isinstance(task.train.x, np.ndarray):
        raise DataError(
            f"task {task.name!r}: the pictures take more memory than allowed; give a smaller "
            f"--image-size, or set {LIMIT_VARIABLE} to a larger number of MiB"
        )


@dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
      x: the examples, an array or `ImageFiles`: images, float32 of shape (N, height, width,
        channels), or token ids, int32 of shape (N, length), which for translation is the length
        of the source plus that of the target.
      y: the labels, int32, of each example (N,), pixel (N, height, width) or position (N, length),
        where `IGNORED` counts for nothing; boxes of a picture (N, boxes, 5), float32, see
        `detection`; for an autoencoder and for score matching the examples themselves; for optical
        flow how each pixel moves, float32 (N, height, width, 2).
      pixels: mean and standard deviation by which images were standardized, so that the bytes of
        the file are `x * std + mean`; `None` for anything but images.
    """

    x: Any
    y: np.ndarray
    pixels: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Any) -> Split:
        """The examples and labels of these rows, a slice or an array of numbers."""
        return Split(self.x[rows], self.y[rows], self.pixels)

    def checksums(self) -> dict[str, int]:
        """Checksums of the examples and of the labels."""
        examples = _checksum(self.x)
        return {"examples": examples, "labels": examples if self.y is self.x else _checksum(self.y)}


def _checksum(array: Any) -> int:
    if isinstance(array, ImageFiles):
        return array.checksum()
    kind = f"{array.dtype.str} {array.shape}"
    return zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(kind.encode()))


@dataclass(frozen=True)
class Task:
    """A data set split for training, choosing and reporting.

    Attributes:
      name: one of `DEFAULTS`.
      train: the split to train on.
      validation: the split to choose learning rates on.
      test: the split to report.
      num_classes: number of classes; labels are 0 to `num_classes` - 1. It is 0 for models that
        predict tokens or reconstruct images, and for regression the number of outputs.
      input_shape: shape of one example; (source length, target length) for translation.
      vocabulary_size: number of token ids, which begin at 0; `None` for images.
      classes: the names of the classes, where there are any.
      label_scale: where one number is to predict, its standard deviation before the labels were
        standardized; empty otherwise.
      notes: what to tell about the data before training, a line each.
      own_defaults: how this task is trained where its data decide; `None` takes `DEFAULTS`.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, ...]
    vocabulary_size: int | None = None
    classes: tuple[str, ...] = ()
    label_scale: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    own_defaults: Defaults | None = None

    @functools.cached_property
    def checksums(self) -> dict[str, dict[str, int]]:
        """Checksums of the examples and labels of each split.

        A run records them, so that it is never continued on other data. `ImageFiles.checksum` says
        what those of picture files cover.
        """
        return {split: getattr(self, split).checksums() for split in SPLITS}

    @property
    def defaults(self) -> Defaults:
        """How the task is trained unless the command says otherwise."""
        return self.own_defaults or DEFAULTS[self.name]

    @property
    def num_directions(self) -> int:
        """Directions of a dominant subspace: one for each class, or 10 where there are none."""
        return DIRECTIONS if self.defaults.kind == "regression" else self.num_classes or DIRECTIONS

    def describe(self) -> str:
        """The sizes of the splits, the examples and their labels, as commands print them.

        >>> from experiments import data
        >>> print(data.load_task("digits").describe())
        data: 1,077 training, 360 validation and 360 test examples, (8, 8, 1) of float32, 10 classes

        Returns:
          One line, and one for each of the notes.
        """
        sizes = [f"{len(getattr(self, split)):,}" for split in SPLITS]
        shape = f"{tuple(self.input_shape)} of {self.train.x.dtype}"
        labels = {
            "classification": f", {self.num_classes} classes",
            "segmentation": f", {self.num_classes} classes of pixels",
            "detection": f", boxes of {self.num_classes} classes",
            "regression": f", {cli.plural(self.num_classes, 'number')} to predict",
        }.get(self.defaults.kind, "")
        tokens = f", {self.vocabulary_size:,} different tokens" if self.vocabulary_size else ""
        line = (
            f"data: {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test examples, "
            f"{shape}{tokens}{labels}"
        )
        return "\n".join([line, *(f"  {note}" for note in self.notes)])

    @property
    def default_model(self) -> str:
        """Name of a model in `models` that suits the task."""
        return self.defaults.model

    @property
    def target_accuracy(self) -> float:
        """Validation accuracy that a good run of the default model reaches."""
        return self.defaults.target_accuracy


def make_task(
    name: str,
    splits: Sequence[Split],
    num_classes: int = 10,
    vocabulary_size: int | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Task:
    """A task of its splits.

    Args:
      name: one of `DEFAULTS`.
      splits: training, validation and test split.
      num_classes: number of classes; 0 for models that predict tokens or reconstruct images.
      vocabulary_size: number of token ids; `None` for images.
      input_shape: shape of one example; `None` takes that of `x`.

    Returns:
      The task.

    Raises:
      DataError: a split has no example.
    """
    for part, split in zip(SPLITS, splits, strict=True):
        if not len(split):
            raise DataError(f"task {name!r}: no {part} example, expected at least one")
    train, validation, test = splits
    return Task(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        input_shape=input_shape or train.x.shape[1:],
        vocabulary_size=vocabulary_size,
    )


def split_arrays(name: str, path: Path, arrays: Arrays) -> list[Split]:
    """Splits the training rows of a data set into training and validation.

    The validation split is the last 5,000 training rows. A task that uses the first rows only
    validates on as many after them; if there are no rows after them, on half of the test rows.

    Args:
      name: name of the task.
      path: where the arrays come from, for the error message.
      arrays: `x_train`, `y_train`, `x_test` and `y_test`.

    Returns:
      Training, validation and test split.

    Raises:
      DataError: there are too few rows.
    """
    subset = SUBSETS.get(name)
    train = Split(arrays["x_train"], arrays["y_train"])
    test = Split(arrays["x_test"], arrays["y_test"])
    if len(train) == subset:
        half = len(test) // 2
        if not half:
            raise DataError(
                f"{path}: {len(test)} test example, expected at least 2: half of them, which "
                "become the validation split"
            )
        return [train, test[:half], test[half:]]
    size = subset or _VALIDATION
    start = subset or len(train) - size
    validation = train[start : start + size]
    if start < 1 or len(validation) < size:
        needed = f"{start + size}" if subset else f"more than {size}"
        raise DataError(f"{path}: {len(train)} training examples, expected {needed}")
    return [train[:start], validation, test]
