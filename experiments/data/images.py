"""The tasks on images with one label each: digits, MNIST, CIFAR and folders such as ImageNet's.

MNIST is `mnist.npz` or the four IDX files, gzipped or not, in the data directory or its `MNIST/raw`
(where torchvision puts them); Fashion-MNIST is `fashion_mnist.npz` or the four IDX files in
`fashion_mnist` or `FashionMNIST/raw`; CIFAR-10 is `cifar10.npz`, the folder `cifar-10-batches-py`
or `cifar10_jpeg.npz` (see `readers.pictures.decode_jpegs`; JPEG loses details, so accuracies on it
are not those of the original); CIFAR-100 is `cifar100.npz` or the folder `cifar-100-python`. An
`.npz` file holds `x_train`, `y_train`, `x_test` and `y_test`.

Pixels are scaled to [0, 1]; CIFAR is instead standardized per pixel and channel by the mean and the
standard deviation of the training split, except for models that draw images (`vae_*`, `ncsn_*`,
whose labels are the images themselves). `imagenet_folder` reads its pictures when they are needed
(`readers.pictures.ImageFiles`) and standardizes each channel by ImageNet's mean and deviation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.drawing import hold_out
from experiments.data.readers.arrays import Arrays, read_idx, read_npz
from experiments.data.readers.files import DataError, exists, plain_or_gzipped
from experiments.data.readers.hubs import check_labels, read_hub
from experiments.data.readers.pickles import read_cifar
from experiments.data.readers.pictures import ImageFiles, decode_jpegs, list_classes
from experiments.data.tasks import DEFAULTS, SUBSETS, Split, Task, make_task, split_arrays

_MNIST_SHAPE = (28, 28)
_MNIST_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# The name in messages, and the folders that may hold the IDX files.
_MNISTS = {
    "mnist": ("MNIST", (".", "MNIST/raw")),
    "fashion_mnist": ("Fashion-MNIST", ("fashion_mnist", "FashionMNIST/raw")),
}
_CIFAR_SHAPE = (32, 32, 3)
# The name in messages, the folder of Python batches, its files, and the key of the labels in them.
_CIFARS: dict[str, tuple[str, str, dict[str, list[str]], bytes]] = {
    "cifar10": (
        "CIFAR-10",
        "cifar-10-batches-py",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        b"labels",
    ),
    "cifar100": (
        "CIFAR-100",
        "cifar-100-python",
        {"train": ["train"], "test": ["test"]},
        b"fine_labels",
    ),
}
# Names that the hubs give to the columns of images and of labels.
_COLUMNS = (("image", "img"), ("label", "fine_label"))
# Of all of ImageNet, on the scale of bytes.
_IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406])
_IMAGENET_STD = 255 * np.array([0.229, 0.224, 0.225])


def load_digits(name: str = "digits") -> Task:
    """A task on the digits of scikit-learn.

    Args:
      name: name of the task.

    Returns:
      The task.
    """
    images, labels = read_digits()
    x = (images / 16.0).astype(np.float32)[..., np.newaxis]
    y = labels.astype(np.int32)
    rest, test = hold_out(len(y), 360, classes=y)
    train, validation = (rest[rows] for rows in hold_out(len(rest), 360, classes=y[rest]))
    # The file's pixels lie between 0 and 16; they are treated as if 255 were the brightest.
    whole = Split(x, y, (0.0, 255.0))
    return _make(name, [whole[rows] for rows in (train, validation, test)])


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as scikit-learn has them: images of numbers from 0 to 16, and labels.

    They come from scikit-learn's own file, because its import takes seconds.
    """
    spec = importlib.util.find_spec("sklearn")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(package, "datasets", "data", "digits.csv.gz")
        if path.exists():
            numbers = np.loadtxt(path, delimiter=",")
            return numbers[:, :-1].reshape(-1, 8, 8), numbers[:, -1].astype(np.int64)
    from sklearn import datasets

    digits = datasets.load_digits()
    return digits.images, digits.target


def _make(name: str, splits: Sequence[Split], num_classes: int = 10) -> Task:
    """A task of these splits; where the model draws images, the labels are the images."""
    if DEFAULTS[name].kind == "classification":
        return make_task(name, splits, num_classes)
    return make_task(name, [Split(s.x, s.x, s.pixels) for s in splits], num_classes=0)


def load_mnist(name: str, folder: Path, hub: str | None) -> Task:
    """A task on MNIST or Fashion-MNIST.

    Args:
      name: name of the task.
      folder: folder with the files.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged, or there are too few rows.
    """
    source = "fashion_mnist" if name == "fashion_mnist" else "mnist"
    path, arrays = (folder, _read_hub(hub)) if hub else _read_mnist(source, folder)
    splits = _scale(split_arrays(name, path, _checked(path, arrays, _MNIST_SHAPE, 10)))
    return _make(name, splits)


def has_mnist(folder: Path) -> bool:
    """Whether a folder holds files of MNIST, by their names."""
    places = [folder / place / _MNIST_FILES["x_train"] for place in _MNISTS["mnist"][1]]
    return exists(folder / "mnist.npz") or any(exists(plain_or_gzipped(p)) for p in places)


def _read_mnist(source: str, folder: Path) -> tuple[Path, Arrays]:
    npz = folder / f"{source}.npz"
    if exists(npz):
        return npz, read_npz(npz)
    title, places = _MNISTS[source]
    for place in (folder / place for place in places):
        paths = {key: plain_or_gzipped(place / file) for key, file in _MNIST_FILES.items()}
        if any(map(exists, paths.values())):
            return place, {key: read_idx(p, 3 if "x" in key else 1) for key, p in paths.items()}
    raise DataError(
        f"{folder}: no {title} here, expected {npz.name} or {_MNIST_FILES['x_train']} and the "
        f"other three IDX files (also .gz) in {' or '.join(places)}"
    )


def load_cifar(name: str, folder: Path, hub: str | None) -> Task:
    """A task on CIFAR-10 or CIFAR-100.

    Args:
      name: name of the task.
      folder: folder with the files.
      hub: data set to read instead, `hf:...` or `tfds:...`.

    Returns:
      The task.

    Raises:
      DataError: a file is missing or damaged, or there are too few rows.
    """
    classes = 100 if name == "cifar100" else 10
    path, arrays = (folder, _read_hub(hub)) if hub else _read_cifar(name, folder)
    arrays = _checked(path, arrays, _CIFAR_SHAPE, classes)
    splits = split_arrays(name, path, arrays)
    scaled = DEFAULTS[name].kind != "classification"
    return _make(name, _scale(splits) if scaled else _standardize(splits), classes)


def _read_cifar(name: str, folder: Path) -> tuple[Path, Arrays]:
    name = name.removeprefix("ncsn_")
    source = name.removesuffix("_5k")
    files = [f"{name}.npz"] * (name in SUBSETS) + [f"{source}.npz"]
    for path in (folder / file for file in files):
        if exists(path):
            return path, read_npz(path)
    title, place, batches, labels = _CIFARS[source]
    if exists(folder / place):
        return folder / place, read_cifar(folder / place, batches, labels)
    jpeg = folder / f"{source}_jpeg.npz"
    if exists(jpeg):
        return jpeg, decode_jpegs(jpeg, _CIFAR_SHAPE)
    raise DataError(
        f"{folder}: no {title} here, expected {', '.join(files)}, the folder {place} (from "
        f"{place.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz) or {jpeg.name}"
    )


def _read_hub(hub: str) -> Arrays:
    arrays: Arrays = {}
    for part, (images, labels) in read_hub(hub, ("train", "test"), _COLUMNS).items():
        shapes = {np.shape(image) for image in images}
        if len(shapes) > 1:
            two = " and ".join(map(str, sorted(shapes)[:2]))
            raise DataError(f"{hub}: {part} pictures of shapes {two}, expected one shape")
        x = np.stack([np.asarray(image) for image in images])
        # TensorFlow Datasets keep the one channel of gray pictures.
        arrays[f"x_{part}"] = x[..., 0] if x.shape[-1:] == (1,) else x
        arrays[f"y_{part}"] = check_labels(hub, part, labels)
    return arrays


def _checked(path: Path, arrays: Arrays, image_shape: tuple[int, ...], num_classes: int) -> Arrays:
    """Checks that images are bytes of this shape with a label each; makes the labels int32."""
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.shape[1:] != image_shape or len(x) == 0:
            expected = ", ".join(str(size) for size in ("N", *image_shape))
            raise DataError(
                f"{path}: {part} images are {x.dtype} of shape {x.shape}, expected uint8 of shape "
                f"({expected})"
            )
        if y.shape == (len(x), 1):  # as Keras stores CIFAR-10
            y = y[:, 0]
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise DataError(
                f"{path}: {part} labels are {y.dtype} of shape {y.shape}, expected integers of "
                f"shape ({len(x)},), one per image"
            )
        if y.min() < 0 or y.max() >= num_classes:
            raise DataError(
                f"{path}: {part} labels lie between {y.min()} and {y.max()}, expected 0 to "
                f"{num_classes - 1}"
            )
        arrays[f"y_{part}"] = y.astype(np.int32)
    return arrays


def _scale(splits: list[Split]) -> list[Split]:
    """Scales bytes to [0, 1], and adds an axis where there is a single channel."""
    scaled = []
    for split in splits:
        x = split.x.astype(np.float32)
        x = x[..., np.newaxis] if x.ndim == 3 else x
        x /= np.float32(255)
        scaled.append(Split(x, split.y, (0.0, 255.0)))
    return scaled


def _standardize(splits: list[Split]) -> list[Split]:
    """Standardizes each pixel and channel; dividing by 255 first would change nothing."""
    train = splits[0].x
    # Sums of bytes and of their squares are exact, and need no copy of the data in floating point.
    mean = train.sum(axis=0, dtype=np.int64) / len(train)
    square = np.einsum("n...,n...->...", train, train, dtype=np.int64) / len(train)
    std = np.sqrt(square - mean**2)
    std[std == 0] = 1.0  # a pixel that never changes
    return [
        standardized(split, mean.astype(np.float32), std.astype(np.float32)) for split in splits
    ]


def standardized(split: Split, mean: Any, std: Any) -> Split:
    """A split with standardized images.

    Args:
      split: images and their labels.
      mean: mean to subtract, a number or an array that broadcasts against an image.
      std: standard deviation to divide by, likewise.

    Returns:
      The images as float32 with the same labels; its `pixels` are the mean and the deviation.
    """
    x = split.x.astype(np.float32)
    x -= mean
    x /= std
    return Split(x, split.y, (mean, std))


def load_imagenet(folder: Path, size: int) -> Task:
    """The task `imagenet_folder`.

    Args:
      folder: folder with `train/CLASS/*.jpg` and `val/CLASS/*.jpg`.
      size: height and width of the examples.

    Returns:
      The task.

    Raises:
      DataError: a folder or picture is missing, or a class is unknown.
    """
    classes = list_classes(folder / "train")
    held_out = list_classes(folder / "val")
    numbers = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(held_out.keys() - numbers.keys()):
        raise DataError(f"{folder / 'val' / unknown[0]}: no such class in {folder / 'train'}")

    def split(files: Sequence[tuple[int, Path]]) -> Split:
        x = ImageFiles([path for _, path in files], size, _IMAGENET_MEAN, _IMAGENET_STD)
        return Split(x, np.array([y for y, _ in files], np.int32), (_IMAGENET_MEAN, _IMAGENET_STD))

    train, test = (
        [(numbers[name], path) for name, paths in part.items() for path in paths]
        for part in (classes, held_out)
    )
    # ImageNet's validation pictures are what results are reported on.
    if len(train) < 2:
        raise DataError(f"{folder / 'train'}: {len(train)} picture, expected at least 2")
    chosen = {*np.random.default_rng(0).permutation(len(train))[: max(1, len(train) // 20)]}
    kept = [file for i, file in enumerate(train) if i not in chosen]
    validation = [file for i, file in enumerate(train) if i in chosen]
    return make_task("imagenet_folder", [split(kept), split(validation), split(test)], len(classes))
