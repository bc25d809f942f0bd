"""A task by name, from a folder of files or a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.data import images, language, segmentation, sentences, translation
from experiments.data.readers.files import DataError
from experiments.data.readers.hubs import hub_of
from experiments.data.tasks import TASKS, Task

ENVIRONMENT_VARIABLE = "OPTAX_ACCEL_DATA"
_IMAGE_SIZES = (1, 4096)
# Each takes the name of the task, the folder and the hub.
_LOADERS: Mapping[str, Callable[[str, Path, str | None], Task]] = {
    **dict.fromkeys(("mnist", "mnist5k", "fashion_mnist", "vae_mnist"), images.load_mnist),
    **dict.fromkeys(("cifar10", "cifar10_5k", "cifar100"), images.load_cifar),
    **dict.fromkeys(("sst2", "sst2_1k"), sentences.load_sst2),
    **dict.fromkeys(("wikitext2", "tiny_shakespeare"), language.load_windows),
    "multi30k": translation.load_multi30k,
}


def load_task(
    name: str, *, data_dir: str | Path | None = None, image_size: int | None = None
) -> Task:
    """Loads a task.

    Example:
      >>> from experiments.data import load_task
      >>> task = load_task("digits")
      >>> task.train.x.shape, task.input_shape, task.num_classes
      ((1077, 8, 8, 1), (8, 8, 1), 10)

    Args:
      name: one of `TASKS`.
      data_dir: folder with the files, or `hf:...` or `tfds:...`; `None` takes the value of the
        environment variable OPTAX_ACCEL_DATA. The digits need none.
      image_size: height and width of `imagenet_folder`'s pictures, up to 4096; `None` means 224.

    Returns:
      The task.

    Raises:
      DataError: the name is unknown, a file is missing, damaged or larger than
        `readers.files.limit` when unpacked, or a split has no example.
    """
    if name not in TASKS:
        raise DataError(cli.unknown("task", name, TASKS))
    if image_size is not None:
        _check_image_size(name, image_size)
    if name == "digits":
        return images.load_digits()
    location = data_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    hub = None if hub_of(location) is None else str(location)
    if hub and name in ("imagenet_folder", "segmentation"):
        raise DataError(f"task {name!r} reads a folder with files, not {hub}")
    folder = Path(hub) if hub else data_folder(name, data_dir)
    if name == "imagenet_folder":
        return images.load_imagenet(folder, image_size or 224)
    if name == "segmentation":
        return segmentation.load_membranes(folder)
    return _LOADERS[name](name, folder, hub)


def _check_image_size(name: str, size: Any) -> None:
    if name != "imagenet_folder":
        raise DataError(f"image_size is for the task imagenet_folder; {name} has sizes of its own")
    smallest, largest = _IMAGE_SIZES
    if not (isinstance(size, int) and smallest <= size <= largest):
        raise DataError(
            f"image_size must be a whole number between {smallest} and {largest}, got {size}"
        )


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
