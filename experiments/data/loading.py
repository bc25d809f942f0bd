"""A task by name, from a folder of files or a hub."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.data import (
    detection,
    images,
    language,
    moving_digits,
    segmentation,
    sentences,
    translation,
)
from experiments.data.own import FilesOptions, check_finite
from experiments.data.own_tasks import LOADERS
from experiments.data.readers.files import DataError
from experiments.data.readers.hubs import hub_of
from experiments.data.tasks import (
    LOSSES,
    OWN_TASKS,
    SPLITS,
    TASKS,
    Defaults,
    Task,
    add_defaults,
    check_classification,
    check_classifier,
    find_task,
    short_name,
)

ENVIRONMENT_VARIABLE = "OPTAX_ACCEL_DATA"
# Each takes the name of the task, the folder and the hub.
_LOADERS: Mapping[str, Callable[[str, Path, str | None], Task]] = {
    **dict.fromkeys(("mnist", "mnist5k", "fashion_mnist", "vae_mnist"), images.load_mnist),
    **dict.fromkeys(("cifar10", "cifar10_5k", "cifar100", "ncsn_cifar10_5k"), images.load_cifar),
    **dict.fromkeys(("sst2", "sst2_1k"), sentences.load_sst2),
    **dict.fromkeys(("wikitext2", "tiny_shakespeare"), language.load_windows),
    "multi30k": translation.load_multi30k,
}


def load_task(name: str, *, data_dir: str | Path | None = None, **options: Any) -> Task:
    """Loads a task.

    Example:
      >>> from experiments.data import load_task
      >>> task = load_task("digits")
      >>> task.train.x.shape, task.input_shape, task.num_classes
      ((1077, 8, 8, 1), (8, 8, 1), 10)

    Args:
      name: one of `DEFAULTS`, or `MODULE:TASK`, which imports a module that registers the task.
      data_dir: folder with the files, or `hf:...` or `tfds:...`; `None` takes the value of the
        environment variable OPTAX_ACCEL_DATA. The digits need none, and `moving_digits_flow` takes
        them where there is no MNIST. For `OWN_TASKS` it is a file or folder of one's own, and has
        to be given.
      **options: how files of one's own are read, e.g. `label_column="price"`; the fields of
        `own.FilesOptions`, which describes them.

    Returns:
      The task.

    Raises:
      DataError: the name is unknown, a file is missing, damaged or larger than
        `readers.files.limit` when unpacked, an option is unknown or does not fit the task, or a
        split has no example.
    """
    find_task(name)
    files = _read_options(options)
    files.check_use(name)
    if name in OWN_TASKS:
        return LOADERS[name](_own_location(name, data_dir), files)
    if short_name(name) in _REGISTERED:
        return _load_registered(short_name(name), data_dir)
    if name in ("digits", "vae_digits", "ncsn_digits"):
        return images.load_digits(name)
    location = data_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    if name == "moving_digits_flow" and not _names_mnist(data_dir, location):
        return moving_digits.load_moving_digits(None)
    hub = None if hub_of(location) is None else str(location)
    if hub and name in ("imagenet_folder", "segmentation"):
        raise DataError(f"task {name!r} reads a folder with files, not {hub}")
    if name == detection.NAME:
        return _load_detection(hub, data_dir)
    folder = Path(hub) if hub else data_folder(name, data_dir)
    if name == "imagenet_folder":
        return images.load_imagenet(folder, files.image_size or 224)
    if name == "segmentation":
        return segmentation.load_membranes(folder)
    if name == "moving_digits_flow":
        return moving_digits.load_moving_digits(folder, hub)
    return _LOADERS[name](name, folder, hub)


def _load_detection(hub: str | None, data_dir: str | Path | None) -> Task:
    """The task of finding digits: those of a folder with MNIST's files, else the embedded ones."""
    if hub:
        raise DataError(
            f"task {detection.NAME!r} reads a folder with MNIST's files, not {hub}; without any it "
            "takes the embedded digits"
        )
    named = data_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    return detection.load_digits_detection(data_folder(detection.NAME, named) if named else None)


def load_classification(name: str, *, data_dir: str | Path | None = None, **options: Any) -> Task:
    """Loads a task for commands that compare classifiers of examples in memory.

    Args:
      name: name of the task, as `load_task` takes it.
      data_dir: folder or file, as `load_task` takes it.
      **options: how files of one's own are read, as `load_task` takes them.

    Returns:
      The task.

    Raises:
      DataError: the task is unknown or of another kind, or cannot be loaded.
    """
    check_classification(name)
    task = load_task(name, data_dir=data_dir, **options)
    check_classifier(task)
    return task


def _names_mnist(data_dir: str | Path | None, location: str | Path | None) -> bool:
    """Whether MNIST is to be read: a person names data, or its files are in the usual folder."""
    if data_dir or hub_of(location) is not None:
        return True
    return location is not None and images.has_mnist(Path(os.path.expanduser(location)))


def _read_options(options: dict[str, Any]) -> FilesOptions:
    valid = [field.name for field in dataclasses.fields(FilesOptions)]
    for option in options:
        if option not in valid:
            raise DataError(cli.unknown("option", option, valid))
    files = FilesOptions(**options)
    # The size of pictures has a message of its own.
    dataclasses.replace(files, image_size=None).check()
    return files


def _own_location(name: str, data_dir: str | Path | None) -> Path:
    """The file or folder that a person names; there is no default, which would be a surprise."""
    if not data_dir:
        raise DataError(f"task {name!r} reads files of your own: name them by --data-dir")
    if hub_of(data_dir) is not None:
        raise DataError(f"task {name!r} reads a file or folder, not {data_dir}")
    location = Path(os.path.expanduser(data_dir))
    if not os.path.exists(location):
        raise DataError(f"{location}: no such folder or file")
    return location


# Tasks of a person's own ------------------------------------------------------------------------

# Each takes the data directory, or None.
_REGISTERED: dict[str, Callable[[Path | None], Task]] = {}


def register(name: str, load: Callable[[Path | None], Task], defaults: Defaults) -> None:
    """Makes a task of one's own known by name.

    Commands find it by `--task MODULE:NAME`, where the module, which has to be importable from the
    folder in which the command runs, calls this function.

    Example:
      >>> import numpy as np
      >>> from experiments import data
      >>> def load_spirals(data_dir):
      ...     t = np.linspace(0.5, 3.0, 200, dtype=np.float32)
      ...     arm = np.stack([t * np.cos(3 * t), t * np.sin(3 * t)], axis=-1)
      ...     x = np.concatenate([arm, -arm])
      ...     y = np.repeat(np.arange(2, dtype=np.int32), 200)
      ...     splits = [data.Split(x[i::4], y[i::4]) for i in range(3)]
      ...     return data.make_task("spirals", splits, num_classes=2)
      >>> data.register("spirals", load_spirals, data.Defaults("mlp", learning_rate=0.1))
      >>> print(data.load_task("spirals").describe())
      data: 100 training, 100 validation and 100 test examples, (2,) of float32, 2 classes

    Args:
      name: its name, which can be part of the name of a folder; not that of a task of ours.
      load: takes the data directory, a `Path`, or None where none is given; returns the task,
        which has the same name. `make_task` makes one of three splits; inputs are float32 with
        any shape, or int32 token ids; labels int32 classes of shape (N,), or for the kind
        "regression" float32 of shape (N, outputs).
      defaults: how it is trained unless the command says otherwise: model, kind, loss, method.

    Raises:
      DataError: the name is none for a folder or taken by a task of ours, or the kind or the loss
        is unknown.
    """
    try:
        cli.check_folder_name(name)
    except cli.UsageError as error:
        raise DataError(f"name of a task: {error}") from error
    if name in TASKS:
        raise DataError(f"task {name!r} is one of ours; give yours another name")
    if defaults.kind not in LOSSES:
        raise DataError(cli.unknown("kind of task", defaults.kind, tuple(LOSSES)))
    if defaults.loss not in LOSSES[defaults.kind]:
        raise DataError(
            f"task {name!r}: loss {defaults.loss!r} does not fit the kind {defaults.kind}; valid: "
            f"{', '.join(LOSSES[defaults.kind])}"
        )
    _REGISTERED[name] = load
    add_defaults(name, defaults)


def _load_registered(name: str, data_dir: str | Path | None) -> Task:
    """A registered task, checked, as nobody else has looked at its arrays."""
    task = _REGISTERED[name](None if data_dir is None else Path(data_dir))
    if not isinstance(task, Task) or task.name != name:
        got = f"one named {task.name!r}" if isinstance(task, Task) else type(task).__name__
        raise DataError(f"task {name!r}: its function returns {got}, expected a Task of that name")
    for part in SPLITS:
        split = getattr(task, part)
        where = f"task {name!r}: {part}"
        if not len(split) or len(split.x) != len(split.y):
            raise DataError(f"{where} has {len(split.x)} inputs and {len(split.y)} labels")
        if tuple(split.x.shape[1:]) != tuple(task.train.x.shape[1:]):
            raise DataError(
                f"{where} inputs are of shape {split.x.shape}, expected examples like those of "
                f"train, {task.train.x.shape}"
            )
        if isinstance(split.x, np.ndarray):
            check_finite(f"{where} inputs", split.x)
        check_finite(f"{where} labels", split.y)
        if task.defaults.kind == "classification":
            low, high = split.y.min(), split.y.max()
            if split.y.dtype.kind not in "iu" or low < 0 or high >= task.num_classes:
                raise DataError(
                    f"{where} labels are {split.y.dtype} from {low} to {high}, expected integers "
                    f"from 0 to {task.num_classes - 1}"
                )
        elif task.defaults.kind == "regression" and split.y.shape[1:] != (task.num_classes,):
            raise DataError(
                f"{where} labels are of shape {split.y.shape}, expected "
                f"({len(split)}, {task.num_classes}): num_classes is the number of outputs"
            )
    return task


def data_folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder with the files of a task.

    Args:
      name: name of the task, for error messages.
      data_dir: the folder; `None` takes the value of the environment variable OPTAX_ACCEL_DATA.

    Returns:
      The folder, with `~` expanded.

    Raises:
      DataError: no folder is named, or the one named does not exist.
    """
    data_dir = data_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    if not data_dir:
        raise DataError(
            f"task {name!r} needs data files: name their folder by --data-dir or the environment "
            f"variable {ENVIRONMENT_VARIABLE} (the task 'digits' needs none)"
        )
    folder = Path(os.path.expanduser(data_dir))
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder, expected one with the files of task {name!r}")
    return folder
