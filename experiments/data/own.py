"""Files of a person's own: their options, parts, labels and splits.

The tasks `image_folder`, `arrays`, `text`, `text_lm` and `table` read any file of their kind. What
they share is here: which files or columns hold which split, what the labels are, how examples are
divided where the files do not say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import cli
from experiments.data.drawing import hold_out
from experiments.data.readers.files import DataError, reading
from experiments.data.tasks import (
    CLASSES_OR_NUMBERS,
    GENERATIVE,
    OWN_TASKS,
    SPLITS,
    Defaults,
    Split,
    Task,
)

# The first word of the names of splits, as files, folders, arrays and columns have them.
_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# The tasks that an option belongs to.
_USED: Mapping[str, tuple[str, ...]] = {
    "image_size": ("image_folder", "imagenet_folder"),
    "x": ("arrays",),
    "y": ("arrays",),
    "text_column": ("text",),
    "label_column": ("text", "table"),
    "split_column": ("text", "table"),
    "ignore_columns": ("table",),
    "no_header": ("text", "table"),
    "problem_type": ("image_folder", *CLASSES_OR_NUMBERS),
    "no_standardize": ("image_folder", *CLASSES_OR_NUMBERS),
    "max_length": ("text", "text_lm"),
    **dict.fromkeys(("validation_fraction", "test_fraction", "split_seed"), OWN_TASKS),
}
PROBLEM_TYPES = ("classification", "regression")
_TYPES_OF_TASK = {
    "image_folder": ("classification", *GENERATIVE),
    "arrays": (*PROBLEM_TYPES, *GENERATIVE),
}
_IMAGE_SIZES = (1, 4096)
# In messages.
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class FilesOptions(cli.Options):
    """Files of your own, which the tasks image_folder, arrays, text, text_lm and table read."""

    image_size: int | None = None
    """Height and width of the pictures of image_folder (default: their own median, at most 224) and
    imagenet_folder (default: 224)."""
    x: str | None = None
    """Task arrays: name of the array of inputs, without _train or _test; default: x, images or
    features, whichever there is."""
    y: str | None = None
    """Task arrays: name of the array of labels, likewise; default: y, labels or targets."""
    text_column: str | None = None
    """Task text: column of the texts; default: the one called text, sentence or review, or what is
    left of two columns."""
    label_column: str | None = None
    """Tasks text and table: column of the labels; default: the one called label, target or
    class."""
    split_column: str | None = None
    """Tasks text and table: column that says of each row whether it is for train, validation or
    test; default: the files are named after their splits, or rows are drawn."""
    ignore_columns: str | None = None
    """Task table: columns that are no input, such as identifiers, separated by commas."""
    no_header: bool = False
    """Tasks text and table: line 1 of CSV or TSV is an example already; columns are called 1, 2 and
    so on."""
    problem_type: str | None = None
    """Tasks arrays and table: classification or regression; default: regression if the labels are
    numbers with a fraction. Tasks image_folder and arrays also: autoencoder or score_matching,
    which train a model (vae, ncsn) of the pictures themselves, without labels."""
    no_standardize: bool = False
    """Tasks image_folder, arrays and table: take inputs as they are, instead of subtracting the
    mean and dividing by the standard deviation of the training split."""
    max_length: int | None = None
    """Tasks text and text_lm: most words of a text (default: 100), and bytes of a window (default:
    128)."""
    validation_fraction: float = 0.15
    """Share of the examples that is held out for validation where the files name no such split."""
    test_fraction: float = 0.15
    """Share of the examples that is held out for the test where the files name no such split."""
    split_seed: int = 0
    """Seed of the drawing of held-out examples, which keeps the shares of the classes."""

    @property
    def files(self) -> dict[str, Any]:
        """These options by name, without those of the command that has them."""
        names = [field.name for field in dataclasses.fields(FilesOptions)]
        return {name: getattr(self, name) for name in names}

    def check_use(self, task: str) -> None:
        """Checks that the task uses the options that are given, and their values.

        Args:
          task: name of the task.

        Raises:
          DataError: the task does not use an option, or its value is not allowed.
        """
        for field in dataclasses.fields(FilesOptions):
            name, value = field.name, getattr(self, field.name)
            if value != field.default and task not in _USED[name]:
                *others, last = _USED[name]
                belongs = f"{', '.join(others)} and {last}" if others else last
                kind = "tasks" if len(_USED[name]) > 1 else "task"
                reason = "has sizes of its own" if name == "image_size" else "does not use it"
                raise DataError(f"{name} is for the {kind} {belongs}; {task} {reason}")
        smallest, largest = _IMAGE_SIZES
        size: Any = self.image_size
        if size is not None and not (isinstance(size, int) and smallest <= size <= largest):
            raise DataError(
                f"image_size must be a whole number between {smallest} and {largest}, got {size}"
            )
        types = _TYPES_OF_TASK.get(task, PROBLEM_TYPES)
        if self.problem_type not in (None, *types):
            raise DataError(cli.unknown("problem_type", str(self.problem_type), types))
        if self.validation_fraction + self.test_fraction >= 1:
            raise DataError(
                f"validation_fraction {self.validation_fraction:g} and test_fraction "
                f"{self.test_fraction:g} leave nothing to train on; their sum must be below 1"
            )


# Parts ------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split that a name of a file, folder, array or entry begins or ends with.

    >>> split_of("reviews.dev.tsv"), split_of("x_train"), split_of("Testing"), split_of("trains")
    ('validation', 'train', 'test', None)

    Args:
      name: the name.

    Returns:
      One of `SPLITS`, or None.
    """
    found = {_ALIASES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _ALIASES}
    return found.pop() if len(found) == 1 else None


def find_files(
    location: Path, fits: Callable[[Path], bool], expected: str
) -> dict[str, list[Path]]:
    """The files of a data set, by the splits that their names say.

    Args:
      location: a file, or a folder.
      fits: whether a file is of the right kind.
      expected: what kind that is, for error messages.

    Returns:
      Files by split; those whose names say none stand under "all".

    Raises:
      DataError: there is no such file.
    """
    if not location.is_dir():
        return {"all": [location]}
    with reading(location, "a folder of files"):
        inside = sorted(path for path in location.iterdir() if path.is_file())
    files = [path for path in inside if fits(path)]
    if not files:
        names = ", ".join(path.name for path in inside[:_SHOWN]) or "no file"
        raise DataError(f"{location}: expected {expected}; there is {names}")
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(split_of(path.name.partition(".")[0]) or split_of(path.name) or "all", [])
        found[split_of(path.name.partition(".")[0]) or split_of(path.name) or "all"].append(path)
    if len(found) > 1 and "all" in found:
        raise DataError(
            f"{found['all'][0]}: its name says none of train, validation and test, unlike that of "
            f"{next(found[split] for split in SPLITS if split in found)[0].name}"
        )
    return found


class Part(NamedTuple):
    """Examples of one split, or of all of them.

    Attributes:
      x: the inputs, anything with a length.
      y: the labels, as long.
    """

    x: Any
    y: np.ndarray


def split_by_column(where: Any, values: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each split, where a column says it.

    Args:
      where: what error messages begin with.
      values: the column.

    Returns:
      Numbers of rows by split.

    Raises:
      DataError: an entry names no split, or no row is for training.
    """
    names = np.array([split_of(str(value)) or "" for value in values])
    if (odd := np.flatnonzero(names == "")).size:
        raise DataError(
            f"{where}: the split of row {odd[0] + 1} is {str(values[odd[0]])[:40]!r}, expected "
            "train, validation or test"
        )
    return {split: np.flatnonzero(names == split) for split in SPLITS if (names == split).any()}


# Labels -----------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """Labels of examples, as networks take them.

    Attributes:
      y: int32 numbers of classes of shape (N,), or float32 of shape (N, outputs).
      classes: the names of the classes; empty for regression.
    """

    y: np.ndarray
    classes: tuple[str, ...]


def read_labels(where: str, values: np.ndarray, problem_type: str | None) -> Labels:
    """The labels of all examples.

    Args:
      where: what error messages begin with: the file, and which array or column.
      values: the labels as the file has them.
      problem_type: "classification" or "regression"; None decides by the type of the labels.

    Returns:
      The labels; classes are in the order of their numbers or names.

    Raises:
      DataError: a label is missing or not finite, there are several labels for one example where
        there can be one, or there are fewer than two classes.
    """
    if values.ndim > 1 and values.shape[1:] == (1,):
        values = values[:, 0]
    numbers = values.dtype.kind in "iuf"
    if values.dtype.kind == "f":
        missing = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    else:
        missing = np.array([value is None for value in values])
    if missing.any():
        first = np.flatnonzero(missing)[0] + 1
        raise DataError(
            f"{where}: {cli.plural(int(missing.sum()), 'label')} missing or not finite, the first "
            f"in row {first}; remove these rows"
        )
    if problem_type is None:
        problem_type = PROBLEM_TYPES[values.dtype.kind == "f"]
    if problem_type == "regression":
        if not numbers or values.ndim > 2:
            raise DataError(
                f"{where}: labels are {values.dtype} of shape {values.shape}, expected numbers of "
                "shape (N,) or (N, outputs) for regression"
            )
        return Labels(np.asarray(values.reshape(len(values), -1), np.float32), ())
    if values.ndim != 1:
        raise DataError(
            f"{where}: labels of shape {values.shape}, expected ({len(values)},), the class of "
            "each example"
        )
    if values.dtype.kind == "f":
        if (odd := np.flatnonzero(values != np.rint(values))).size:
            raise DataError(
                f"{where}: the label of row {odd[0] + 1} is {values[odd[0]]:g}, expected whole "
                "numbers or names of classes; give problem_type regression to predict numbers"
            )
        values = values.astype(np.int64)
    if not numbers:
        values = np.array([str(value) for value in values], object)
    names, y = np.unique(values, return_inverse=True)
    if not numbers and all(re.fullmatch("-?[0-9]{1,18}", name) for name in names):
        order = np.argsort([int(name) for name in names], kind="stable")
        names, y = names[order], np.argsort(order)[y]  # 2 before 10
    if len(names) < 2:
        raise DataError(f"{where}: all labels are {names[0]!s:.40}, expected at least 2 classes")
    return Labels(y.astype(np.int32), tuple(str(name) for name in names))


# Splits -----------------------------------------------------------------------------------------


def divide(
    where: Any, counts: Mapping[str, int], labels: Labels | int, options: FilesOptions
) -> tuple[list[np.ndarray], list[str]]:
    """Divides examples into training, validation and test split.

    Args:
      where: what error messages begin with.
      counts: the number of examples of each split that the files name, or under "all"; in this
        order the examples stand one behind the other.
      labels: their labels, whose classes keep their shares; a number of outputs, or none, for
        examples without classes.
      options: the fractions and the seed.

    Returns:
      The numbers of the examples of each split, and what to tell about them.

    Raises:
      DataError: no split is for training, or a split or a class has too few examples.
    """
    starts = np.cumsum([0, *counts.values()])
    rows = {
        split: np.arange(start, start + count)
        for (split, count), start in zip(counts.items(), starts, strict=False)
    }
    train = rows.pop("all", rows.pop("train", None))
    if train is None:
        raise DataError(f"{where}: no part for training; there is {' and '.join(rows)}")
    classes = labels.y if isinstance(labels, Labels) and labels.classes else None
    notes = []
    total = len(train)
    for split, fraction in (
        ("test", options.test_fraction),
        ("validation", options.validation_fraction),
    ):
        if split in rows:
            continue
        size = max(round(fraction * total), 1)
        train, rows[split] = _hold_out(where, train, size, classes, labels, options.split_seed)
        notes.append(f"{split}: {100 * fraction:g} % of the training examples, drawn")
    splits = [train, rows["validation"], rows["test"]]
    for split, numbers in zip(SPLITS, splits, strict=True):
        if not len(numbers):
            raise DataError(f"{where}: no {split} example, expected at least one")
    if classes is not None and isinstance(labels, Labels):
        unseen = np.setdiff1d(classes, classes[train])
        if unseen.size:
            raise DataError(
                f"{where}: class {labels.classes[unseen[0]]!r} has no training example; every "
                "class needs some"
            )
    return splits, notes[::-1]


def _hold_out(
    where: Any,
    rows: np.ndarray,
    size: int,
    classes: np.ndarray | None,
    labels: Labels | int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws rows, the same share of each class; returns those that are left and those drawn."""
    chosen = None if classes is None else classes[rows]
    if chosen is not None and isinstance(labels, Labels):
        numbers, count = np.unique(chosen, return_counts=True)
        size = max(size, len(numbers))
        if count.min() < 3:
            name = labels.classes[numbers[count.argmin()]]
            raise DataError(
                f"{where}: class {name!r} has {cli.plural(int(count.min()), 'example')}, expected "
                f"at least 3, one for each split; there are {len(numbers)} classes. Leave its "
                "examples out, or give problem_type regression if the labels are numbers to predict"
            )
    if size >= len(rows):
        raise DataError(
            f"{where}: {cli.plural(len(rows), 'example')}, too few to hold out {size} of them"
        )
    with reading(where, "enough examples of each class for every split"):
        left, drawn = hold_out(len(rows), size, classes=chosen, seed=seed)
    return np.sort(rows[left]), np.sort(rows[drawn])


# Tasks ------------------------------------------------------------------------------------------


def check_finite(where: str, x: np.ndarray) -> None:
    """Raises `DataError` if inputs hold NaN or infinite numbers."""
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
        raise DataError(
            f"{where}: NaN or infinite numbers in {cli.plural(len(rows), 'row')}, the first in row "
            f"{rows[0] + 1}; remove or replace them"
        )


def standardize(x: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, tuple[Any, Any]]:
    """Standardizes inputs by the training split, each feature or channel (the last axis).

    Args:
      x: all inputs.
      train: numbers of the training examples.

    Returns:
      The inputs as float32, and the mean and the deviation by which they were standardized.
    """
    axes = tuple(range(x.ndim - 1)) if x.ndim > 1 else (0,)
    mean, std = x[train].mean(axes, np.float64), x[train].std(axes, np.float64)
    # A feature that never changes, up to rounding.
    std = np.where(std <= 1e-6 * np.abs(mean), 1.0, std)
    return ((x - mean) / std).astype(np.float32), (mean, std)


def finish(
    name: str,
    where: Any,
    x: Any,
    labels: Labels,
    splits: Sequence[np.ndarray],
    defaults: Defaults,
    *,
    notes: Iterable[str] = (),
    vocabulary_size: int | None = None,
    pixels: tuple[Any, Any] | None = None,
) -> Task:
    """A task of labelled examples.

    Args:
      name: name of the task.
      where: what error messages begin with.
      x: the inputs of all examples, indexed by arrays of numbers.
      labels: their labels.
      splits: numbers of the examples of each split.
      defaults: how the task is trained; kind, loss and target are filled in.
      notes: what to tell about the data.
      vocabulary_size: number of token ids.
      pixels: mean and deviation of pictures.

    Returns:
      The task. Of labels that are numbers, each output is standardized.

    Raises:
      DataError: a split has no example.
    """
    y, notes = labels.y, [*notes]
    scale: tuple[float, ...] = ()
    if labels.classes:
        shares = np.bincount(y[splits[0]], minlength=len(labels.classes)) / len(splits[0])
        # Half the way from the largest class, which a constant answer gets right, to all.
        target = round(0.5 + 0.5 * float(shares.max()), 2)
        defaults = dataclasses.replace(defaults, target_accuracy=min(target, 0.99))
        notes.append(_describe_classes(labels.classes, shares))
    else:
        y, (mean, std) = standardize(y, splits[0])
        if (y[splits[0]].std(axis=0) < 1e-6).any():
            raise DataError(f"{where}: all labels are {mean[0]:g}, expected numbers that differ")
        defaults = dataclasses.replace(defaults, kind="regression", loss="mse")
        scale = (float(std[0]),) if len(std) == 1 else ()
        shown = ", ".join(f"{m:.4g} ± {s:.4g}" for m, s in zip(mean, std, strict=True))
        notes.append(
            f"labels are numbers, standardized by the training split ({shown}); always to predict "
            f"their mean is a loss of {0.5 * y.shape[1]:g}"
        )
    parts = [Split(x[rows], y[rows], pixels) for rows in splits]
    return Task(
        name=name,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        num_classes=len(labels.classes) or y.shape[1],
        input_shape=tuple(parts[0].x.shape[1:]),
        vocabulary_size=vocabulary_size,
        classes=labels.classes,
        label_scale=scale,
        notes=tuple(notes),
        own_defaults=defaults,
    )


def finish_generative(
    name: str, x: Any, splits: Sequence[np.ndarray], kind: str, notes: Iterable[str]
) -> Task:
    """A task whose labels are the pictures themselves.

    Args:
      name: name of the task.
      x: the pictures, indexed by arrays of numbers: float32 from 0 to 1.
      splits: numbers of the examples of each split.
      kind: one of `tasks.GENERATIVE`.
      notes: what to tell about the data.
    """
    parts = [Split(some, some, (0.0, 255.0)) for some in (x[rows] for rows in splits)]
    train, validation, test = parts
    return Task(
        name,
        train,
        validation,
        test,
        num_classes=0,
        input_shape=tuple(train.x.shape[1:]),
        notes=(*notes, "no labels: a model of the pictures, from 0 to 1, is trained"),
        own_defaults=GENERATIVE[kind],
    )


def _describe_classes(classes: Sequence[str], shares: np.ndarray) -> str:
    """The names of the classes and their shares of the training examples."""
    shown = [
        f"{name!s:.30} ({100 * share:.1f} %)"
        for name, share in zip(classes[:_SHOWN], shares[:_SHOWN], strict=True)
    ]
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return f"{len(classes)} classes: {', '.join(shown)}{more}"
