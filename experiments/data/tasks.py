"""Data sets and input pipelines.

`load_task` gives a task by name: examples split into train, validation and test, and what a model
has to know about them. `batches` and `index_batches` are Grain pipelines over such examples; their
iterators save and restore their position (`get_state`, `set_state`) and so can be checkpointed.
`prefetch_to_device` moves them to the device in the background.

| task | train / validation / test | files |
|---|---|---|
| `digits` | 1077 / 360 / 360 | none: in scikit-learn |
| `mnist` | 55,000 / 5,000 / 10,000 | MNIST |
| `mnist5k` | 5,000 / 5,000 / 10,000 | MNIST |
| `fashion_mnist` | 55,000 / 5,000 / 10,000 | Fashion-MNIST |
| `cifar10` | 45,000 / 5,000 / 10,000 | CIFAR-10 |
| `cifar10_5k` | 5,000 / 5,000 / 10,000 | CIFAR-10 |
| | 5,000 / first half / second half of its test rows | or `cifar10_5k.npz`, preferred |
| `cifar100` | 45,000 / 5,000 / 10,000 | CIFAR-100, its 100 fine labels |
| `imagenet_folder` | 19/20 and 1/20 of `train` / `val` | `train/CLASS/*.jpg`, `val/CLASS/*.jpg` |
| `sst2` | 62,349 / 5,000 / 872 | SST-2 |
| `sst2_1k` | 1,000 / 1,000 / 872 | SST-2 |
| `wikitext2` | 59,675 / 6,218 / 7,016 windows | WikiText-2 |
| `tiny_shakespeare` | 7,842 / 435 / 435 windows | tinyshakespeare.txt |
| `multi30k` | 29,000 / 1,014 / 1,000 | Multi30k, English to German |
| `segmentation` | 384 / 48 / 48 crops of 24 / 3 / 3 pictures | ISBI 2012, membranes |
| `vae_mnist` | 55,000 / 5,000 / 10,000 | MNIST |

The sizes are those of the public files; the validation splits are ours where the files have none:
the last 5,000 training rows, and for the subsets (the first 5,000 training rows, of SST-2 1,000) as
many after them.

**Images.** MNIST is `mnist.npz` or the four IDX files, gzipped or not, in the data directory or its
`MNIST/raw` (where torchvision puts them); Fashion-MNIST `fashion_mnist.npz` or the four IDX files
in `fashion_mnist` or `FashionMNIST/raw`; CIFAR-10 `cifar10.npz`, the folder `cifar-10-batches-py`
or `cifar10_jpeg.npz` (see `readers.decode_jpegs`: lossy, so accuracies on it are not those of the
original); CIFAR-100 `cifar100.npz` or the folder `cifar-100-python`. An `.npz` file holds
`x_train`, `y_train`, `x_test` and `y_test`. Pixels are scaled to [0, 1]; CIFAR is then standardized
per pixel and channel by mean and standard deviation of the training split. `imagenet_folder` reads
its pictures when they are asked for (`readers.ImageFiles`) and standardizes each channel by
ImageNet's mean and deviation. `segmentation` cuts the pictures of `isbi_em.npz` (`x`, `y`: 1 cell,
0 membrane), or of the folders `membrane/train/image` and `membrane/train/label`, into squares of
128 pixels, standardized as a whole.

**SST-2** (GLUE's: sentences of film reviews, negative 0 or positive 1) is `sst2.train.tsv` and
`sst2.dev.tsv`, or `SST-2/train.tsv` and `SST-2/dev.tsv` as GLUE unpacks them, each plain or `.gz`;
the test split is `dev`, since GLUE keeps the labels of its own test rows. A sentence becomes a row
of token ids: 0 is padding, 1 a word that the training split does not have, and from 2 on stand the
lower-cased words of the training split, the most frequent first. Rows are as long as the longest of
the whole training file (52 words), at most 100; what is longer is cut. Preprocessing and subsets
follow Song et al., "Does SGD really happen in tiny subspaces?" (2024); the words are ours: their
code reads the 30,522 word pieces of distilbert-base-uncased; the words of 1,000 rows are 2,894.

**Language models** read a text as windows, one behind the other: `x` are the tokens of a window,
`y` the tokens that follow each of them. WikiText-2 (`wikitext2.train.txt`, `.valid`, `.test`, or
the folder `wikitext-2` with `train.txt` or `wiki.train.tokens` ...) is split at its blanks, a line
ends with `<eos>`: 33,278 different words, windows of 35. Tiny Shakespeare is `tinyshakespeare.txt`,
cut into 90, 5 and 5 per cent; its tokens are bytes, windows of 128. A model sees no window but its
own.

**Multi30k** (`multi30k.train.en`, `.de`, `multi30k.val...`, `multi30k.test_2016_flickr...`, or the
same in a folder `multi30k` without that beginning) is cut into 8,000 byte-pair pieces for both
languages by SentencePiece, learned from the training split. A row of `x` is the source, then the
target behind a begin token, each 40 pieces: padding 0, begin 1, end 2, unknown 3; a row of `y` is
the target and an end token. Labels of -1 are padding and count nothing.

**Files are not trusted.** Only regular files are opened, and of one file at most 512 MiB, counted
as they are unpacked; the environment variable OPTAX_ACCEL_DATA_LIMIT allows another number of MiB.
Pictures are JPEG or PNG of at most 89,478,485 pixels, lines of text at most 1,048,576 characters
long. Whatever is wrong with a file is one `DataError` of one line.

**From Hugging Face and TensorFlow Datasets.** A data directory `hf:...` or `tfds:...` names a data
set of theirs instead of a folder with files, see `readers.read_hub`: for the MNISTs and CIFARs,
`sst2`, the language models and `multi30k`.
"""

from __future__ import annotations

import collections
import functools
import io
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments.data import readers
from experiments.data.readers import Arrays, DataError

_ENVIRONMENT_VARIABLE = "OPTAX_ACCEL_DATA"
_SUBSETS = {"mnist5k": 5_000, "cifar10_5k": 5_000, "sst2_1k": 1_000}
_VALIDATION = 5_000
_MNIST_SHAPE = (28, 28)
_MNIST_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# Name, and folders of the IDX files.
_MNISTS = {
    "mnist": ("MNIST", (".", "MNIST/raw")),
    "fashion_mnist": ("Fashion-MNIST", ("fashion_mnist", "FashionMNIST/raw")),
}
_CIFAR_SHAPE = (32, 32, 3)
# Name, folder, its files, name of the labels in them.
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
_IMAGE_COLUMNS = (("image", "img"), ("label", "fine_label"))
# In bytes, as all of ImageNet has them.
_IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406])
_IMAGENET_STD = 255 * np.array([0.229, 0.224, 0.225])
_CROP = 128  # of `segmentation`
_IMAGE_SIZES = (1, 4096)
# (training file, development file) of SST-2.
_SST2_FILES = (("sst2.train.tsv", "sst2.dev.tsv"), ("SST-2/train.tsv", "SST-2/dev.tsv"))
_UNKNOWN, _FIRST_WORD = 1, 2  # token ids; padding is 0
_MAX_TOKENS = 100  # positions that the model of Song et al. knows
_WIKITEXT_FILES = (
    [f"wikitext2.{part}.txt" for part in ("train", "valid", "test")],
    [f"wikitext-2/{part}.txt" for part in ("train", "valid", "test")],
    [f"wikitext-2/wiki.{part}.tokens" for part in ("train", "valid", "test")],
)
_SPLITS = ("train", "validation", "test")
_WINDOWS = {"wikitext2": 35, "tiny_shakespeare": 128}
_LANGUAGES = ("en", "de")
_MULTI30K_PARTS = ("train", "val", "test_2016_flickr")
_PIECES = 8_000
_SENTENCE = 40  # pieces
_BEGIN, _END = 1, 2
IGNORED = -1  # the label that counts nothing


@dataclass(frozen=True)
class Defaults:
    """How a task is trained where nothing else is said: so that it learns.

    Attributes:
        model: Name of a model in `models`.
        target_accuracy: Validation accuracy that a good run of that model reaches; 0 where runs are
            not compared by it.
        kind: "classification", "segmentation", "language", "translation" or "autoencoder".
        model_options: Options of that model.
        loss: Name of a loss in `losses.LOSSES`.
        method: Name of a method in `methods`.
        learning_rate: Of that method; `None`: the middle of its grid.
        batch_size: Examples per step.
    """

    model: str
    target_accuracy: float = 0.0
    kind: str = "classification"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "cross_entropy"
    method: str = "sgd"
    learning_rate: float | None = None
    batch_size: int = 64


DEFAULTS: Mapping[str, Defaults] = MappingProxyType(
    {
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
            model_options={
                "embedding_size": 128,
                "num_layers": 4,
                "num_heads": 4,
                "dropout_rate": 0.1,
            },
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
        "vae_mnist": Defaults(
            "vae",
            kind="autoencoder",
            loss="elbo",
            method="adam",
            learning_rate=0.001,
            batch_size=100,
        ),
    }
)
TASKS: tuple[str, ...] = tuple(DEFAULTS)
# Tasks with one label for each example, and all examples in memory.
CLASSIFICATION: tuple[str, ...] = tuple(
    name
    for name, defaults in DEFAULTS.items()
    if defaults.kind == "classification" and name != "imagenet_folder"
)


# Losses that fit the labels of each kind of task.
LOSSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "classification": ("cross_entropy", "mse"),
        "segmentation": ("cross_entropy",),
        "language": ("cross_entropy",),
        "translation": ("cross_entropy",),
        "autoencoder": ("elbo",),
    }
)


def check_classification(name: str) -> None:
    """For commands that need one label for each example, and all of them in memory.

    Raises:
        DataError: The task is unknown or another one.
    """
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; valid: {', '.join(CLASSIFICATION)}")
    if name not in CLASSIFICATION:
        raise DataError(
            f"task {name!r} is for `train` only: this command compares classifiers of examples in "
            f"memory; valid: {', '.join(CLASSIFICATION)}"
        )


@dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
        x: Examples: float32, (N, height, width, channels), or token ids, int32, (N, length); for
            translation (N, source length + target length). An array, or `readers.ImageFiles`.
        y: Labels, int32: (N,); of each pixel (N, height, width), of each position (N, length), of
            which `IGNORED` counts nothing; or the examples themselves, for an autoencoder.
        pixels: For images mean and standard deviation with which `x` was standardized: the bytes of
            the file are `x * std + mean`. `None` for what are no images.
    """

    x: Any
    y: np.ndarray
    pixels: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Any) -> Split:
        """The split of these rows, a slice or an array of numbers."""
        return Split(self.x[rows], self.y[rows], self.pixels)

    def checksums(self) -> dict[str, int]:
        """Numbers that tell other examples, and other labels, from these."""
        examples = _checksum(self.x)
        return {"examples": examples, "labels": examples if self.y is self.x else _checksum(self.y)}


def _checksum(array: Any) -> int:
    if isinstance(array, readers.ImageFiles):
        return array.checksum()
    kind = f"{array.dtype.str} {array.shape}"
    return zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(kind.encode()))


@dataclass(frozen=True)
class Task:
    """A data set split for training, choosing and reporting.

    Attributes:
        name: One of `TASKS`.
        train: What is trained on.
        validation: What learning rates are chosen on.
        test: What is reported.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1. 0 where the model has no
            such number: it predicts tokens or reconstructs images.
        input_shape: Shape of one example; of a translation (source length, target length).
        vocabulary_size: Token ids are 0 to `vocabulary_size` - 1; `None` for images.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, ...]
    vocabulary_size: int | None = None

    @functools.cached_property
    def checksums(self) -> dict[str, dict[str, int]]:
        """Numbers that tell the data from others: of each split the examples and the labels.

        A run records them, so that it is never continued on other data. Those of files of pictures
        are described at `readers.ImageFiles.checksum`.
        """
        return {split: getattr(self, split).checksums() for split in _SPLITS}

    @property
    def defaults(self) -> Defaults:
        """How it is trained where nothing else is said."""
        return DEFAULTS[self.name]

    @property
    def default_model(self) -> str:
        """Name of a model in `models` that suits the task."""
        return self.defaults.model

    @property
    def target_accuracy(self) -> float:
        """Validation accuracy that a good run of the default model reaches."""
        return self.defaults.target_accuracy


def load_task(
    name: str, *, data_dir: str | Path | None = None, image_size: int | None = None
) -> Task:
    """Loads a task.

    Example:
        >>> task = load_task("digits")
        >>> task.train.x.shape, task.input_shape, task.num_classes
        ((1077, 8, 8, 1), (8, 8, 1), 10)

    Args:
        name: One of `TASKS`.
        data_dir: Folder with the files, or `hf:...` or `tfds:...`; default: the environment
            variable OPTAX_ACCEL_DATA. The digits need none.
        image_size: Height and width of `imagenet_folder`'s pictures, up to 4096; default: 224.

    Returns:
        The task.

    Raises:
        DataError: If the name is unknown, if a file is missing, broken or larger than
            `readers.limit` when unpacked, or if a split has no example.
    """
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; valid: {', '.join(TASKS)}")
    if image_size is not None and name != "imagenet_folder":
        raise DataError(f"image_size is for the task imagenet_folder; {name} has sizes of its own")
    smallest, largest = _IMAGE_SIZES
    whole = image_size is None or isinstance(image_size, int)
    if image_size is not None and not (whole and smallest <= image_size <= largest):
        raise DataError(
            f"image_size must be a whole number between {smallest} and {largest}, got {image_size}"
        )
    if name == "digits":
        return _digits()
    location = data_dir or os.environ.get(_ENVIRONMENT_VARIABLE)
    hub = None if readers.hub_of(location) is None else str(location)
    if hub and name in ("imagenet_folder", "segmentation"):
        raise DataError(f"task {name!r} reads a folder with files, not {hub}")
    folder = Path(hub) if hub else data_folder(name, data_dir)
    if name == "imagenet_folder":
        return _imagenet(folder, 224 if image_size is None else image_size)
    if name == "segmentation":
        return _segmentation(folder)
    if name == "multi30k":
        return _multi30k(folder, hub)
    if name in _WINDOWS:
        return _language(name, folder, hub)
    subset = _SUBSETS.get(name)
    if name.startswith("sst2"):
        path, sentences = _load_sst2(folder, hub)
        splits, size = _tokenize(_split(path, sentences, subset), _longest(sentences["x_train"]))
        return _task(name, splits, num_classes=2, vocabulary_size=size)
    if name.startswith("cifar"):
        classes = 100 if name == "cifar100" else 10
        path, images = _load_cifar(name, folder, hub, subset is not None)
        arrays = readers.checked(path, images, _CIFAR_SHAPE, classes)
        return _task(name, _standardize(_split(path, arrays, subset)), classes)
    path, images = _load_mnist("fashion_mnist" if "fashion" in name else "mnist", folder, hub)
    splits = _scale(_split(path, readers.checked(path, images, _MNIST_SHAPE, 10), subset))
    if name == "vae_mnist":
        return _task(name, [Split(s.x, s.x, s.pixels) for s in splits], num_classes=0)
    return _task(name, splits)


# Tasks -------------------------------------------------------------------------------------------


def _digits() -> Task:
    # Imported here because it takes longer than everything else in this module.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = (digits.images / 16.0).astype(np.float32)[..., np.newaxis]
    y = digits.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=y[rest], random_state=0)
    # Pixels lie between 0 and 16: as if 255 were the brightest.
    whole = Split(x, y, (0.0, 255.0))
    return _task("digits", [whole[rows] for rows in (train, validation, test)])


def _task(
    name: str,
    splits: Sequence[Split],
    num_classes: int = 10,
    vocabulary_size: int | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Task:
    for part, split in zip(_SPLITS, splits, strict=True):
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


def data_folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder with the files of a task: `data_dir`, or what OPTAX_ACCEL_DATA says.

    Raises:
        DataError: If neither is given, or there is no such folder.
    """
    data_dir = data_dir or os.environ.get(_ENVIRONMENT_VARIABLE)
    if not data_dir:
        raise DataError(
            f"task {name!r} needs data files: name their folder by --data-dir or the environment "
            f"variable {_ENVIRONMENT_VARIABLE} (the task 'digits' needs none)"
        )
    folder = Path(os.path.expanduser(data_dir))
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder, expected one with the files of task {name!r}")
    return folder


def _split(path: Path, arrays: Arrays, subset: int | None) -> list[Split]:
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


# Images -----------------------------------------------------------------------------------------


def _scale(splits: list[Split]) -> list[Split]:
    """To [0, 1], with an axis for the one channel."""
    scaled = []
    for split in splits:
        x = split.x.astype(np.float32)[..., np.newaxis]
        x /= np.float32(255)
        scaled.append(Split(x, split.y, (0.0, 255.0)))
    return scaled


def _standardize(splits: list[Split]) -> list[Split]:
    """Per pixel and channel; dividing by 255 first would change nothing."""
    train = splits[0].x
    # Sums of bytes and of their squares are exact, and need no copy of the data in floating point.
    mean = train.sum(axis=0, dtype=np.int64) / len(train)
    square = np.einsum("n...,n...->...", train, train, dtype=np.int64) / len(train)
    std = np.sqrt(square - mean**2)
    std[std == 0] = 1.0  # a pixel that never changes
    return [
        _standardized(split, mean.astype(np.float32), std.astype(np.float32)) for split in splits
    ]


def _standardized(split: Split, mean: Any, std: Any) -> Split:
    x = split.x.astype(np.float32)
    x -= mean
    x /= std
    return Split(x, split.y, (mean, std))


def _load_mnist(name: str, folder: Path, hub: str | None) -> tuple[Path, Arrays]:
    if hub:
        return folder, _hub_images(hub)
    npz = folder / f"{name}.npz"
    if readers.exists(npz):
        return npz, readers.read_npz(npz)
    title, places = _MNISTS[name]
    for place in (folder / place for place in places):
        paths = {k: readers.plain_or_gzipped(place / file) for k, file in _MNIST_FILES.items()}
        if any(map(readers.exists, paths.values())):
            return place, {k: readers.read_idx(p, 3 if "x" in k else 1) for k, p in paths.items()}
    raise DataError(
        f"{folder}: no {title} here, expected {npz.name} or {_MNIST_FILES['x_train']} and the "
        f"other three IDX files (also .gz) in {' or '.join(places)}"
    )


def _load_cifar(name: str, folder: Path, hub: str | None, subset: bool) -> tuple[Path, Arrays]:
    if hub:
        return folder, _hub_images(hub)
    name = name.removesuffix("_5k")
    names = [f"{name}_5k.npz"] * subset + [f"{name}.npz"]
    for path in (folder / name for name in names):
        if readers.exists(path):
            return path, readers.read_npz(path)
    title, place, files, labels = _CIFARS[name]
    if readers.exists(folder / place):
        return folder / place, readers.read_cifar(folder / place, files, labels)
    jpeg = folder / f"{name}_jpeg.npz"
    if readers.exists(jpeg):
        return jpeg, readers.decode_jpegs(jpeg, _CIFAR_SHAPE)
    raise DataError(
        f"{folder}: no {title} here, expected {', '.join(names)}, the folder {place} (from "
        f"{place.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz) or {jpeg.name}"
    )


def _hub_images(hub: str) -> Arrays:
    arrays: Arrays = {}
    for part, (images, labels) in readers.read_hub(hub, ("train", "test"), _IMAGE_COLUMNS).items():
        shapes = {np.shape(image) for image in images}
        if len(shapes) > 1:
            found = " and ".join(map(str, sorted(shapes)[:2]))
            raise DataError(f"{hub}: {part} pictures of shapes {found}, expected one shape")
        x = np.stack([np.asarray(image) for image in images])
        # TensorFlow Datasets keep the one channel of gray pictures.
        arrays[f"x_{part}"] = x[..., 0] if x.shape[-1:] == (1,) else x
        arrays[f"y_{part}"] = _hub_labels(hub, part, labels)
    return arrays


def _hub_labels(hub: str, part: str, labels: Sequence[Any]) -> np.ndarray:
    for label in labels:
        if not isinstance(label, int | np.integer) or not -(2**31) <= label < 2**31:
            raise DataError(f"{hub}: a label of {part} is {str(label)[:40]}, expected a number")
    return np.array(labels, np.int32)


def _hub_texts(
    hub: str, part: str, texts: Sequence[Any], expected: str = "a sentence"
) -> list[str]:
    """Texts of a hub, checked; of sentences, which `expected` says they are, none is empty."""
    for text in texts:
        usable = isinstance(text, str) and "\0" not in text
        if not usable or (expected == "a sentence" and not text.strip()):
            raise DataError(f"{hub}: a row of {part} is {str(text)[:40]!r}, expected {expected}")
    return [*texts]


def _imagenet(folder: Path, size: int) -> Task:
    classes = readers.list_classes(folder / "train")
    held_out = readers.list_classes(folder / "val")
    numbers = {name: i for i, name in enumerate(classes)}
    if unknown := sorted(held_out.keys() - numbers.keys()):
        raise DataError(f"{folder / 'val' / unknown[0]}: no such class in {folder / 'train'}")

    def split(files: Sequence[tuple[int, Path]]) -> Split:
        x = readers.ImageFiles([path for _, path in files], size, _IMAGENET_MEAN, _IMAGENET_STD)
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
    return _task("imagenet_folder", [split(kept), split(validation), split(test)], len(classes))


def _segmentation(folder: Path) -> Task:
    path, place = folder / "isbi_em.npz", folder / "membrane" / "train"
    if readers.exists(path):
        arrays = readers.read_npz(path, ("x", "y"))
        x, y = arrays["x"], arrays["y"]
    elif os.path.isdir(place / "image") and os.path.isdir(place / "label"):
        path = place
        files = [readers.list_images(place / kind) for kind in ("image", "label")]
        if [p.name for p in files[0]] != [p.name for p in files[1]] or not files[0]:
            raise DataError(f"{place}: expected pictures of the same names in image and label")
        size = None
        pictures = []
        for file in itertools.chain(*files):
            pictures.append(readers.read_gray(file, size))
            size = pictures[0].shape
            readers.check_size(place, sum(picture.size for picture in pictures))
        x, y = np.split(np.stack(pictures), 2)
        y = (y > 127).astype(np.uint8)
    else:
        raise DataError(
            f"{folder}: no ISBI membranes here, expected {path.name} or pictures in "
            "membrane/train/image and membrane/train/label"
        )
    if x.dtype != np.uint8 or x.ndim != 3 or min(x.shape[1:]) < _CROP or y.shape != x.shape:
        raise DataError(
            f"{path}: pictures are {x.dtype} of shape {x.shape}, labels of shape {y.shape}, "
            f"expected both (N, height, width), pictures uint8 of at least {_CROP} pixels a side"
        )
    if len(x) < 10:
        raise DataError(f"{path}: {len(x)} pictures, expected at least 10")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > 1:
        raise DataError(f"{path}: labels are {y.dtype} up to {y.max()}, expected 0 and 1")
    # They are slices of one block: neighbors are alike, so what is held out lies at its end.
    tenth = len(x) // 10
    bounds = (slice(-2 * tenth), slice(-2 * tenth, -tenth), slice(-tenth, None))
    mean, std = np.float32(x[bounds[0]].mean()), np.float32(x[bounds[0]].std() or 1)
    return _task(
        "segmentation",
        [
            _standardized(
                Split(_crops(x[b])[..., np.newaxis], _crops(y[b]).astype(np.int32)), mean, std
            )
            for b in bounds
        ],
        num_classes=2,
    )


def _crops(pictures: np.ndarray) -> np.ndarray:
    """Squares side by side; what is left over on the right and below is dropped."""
    rows, columns = (size // _CROP for size in pictures.shape[1:])
    grid = pictures[:, : rows * _CROP, : columns * _CROP]
    grid = grid.reshape(len(grid), rows, _CROP, columns, _CROP).swapaxes(2, 3)
    return grid.reshape(-1, _CROP, _CROP)


# Text -------------------------------------------------------------------------------------------


def _tokenize(splits: list[Split], length: int) -> tuple[list[Split], int]:
    """Rows of `length` token ids, and the number of different ids."""
    counts = collections.Counter(itertools.chain.from_iterable(map(_words, splits[0].x)))
    # Of equally frequent words the one that was read first.
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(), _FIRST_WORD)}
    tokenized = []
    for split in splits:
        rows = [[ids.get(word, _UNKNOWN) for word in _words(sentence)] for sentence in split.x]
        tokenized.append(Split(_padded(rows, length), split.y))
    return tokenized, _FIRST_WORD + len(ids)


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int = 0) -> np.ndarray:
    """Rows of equal length: cut, or filled up behind."""
    array = np.full((len(rows), length), padding, np.int32)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row[:length]
    return array


def _longest(sentences: np.ndarray) -> int:
    return min(max(len(_words(sentence)) for sentence in sentences), _MAX_TOKENS)


def _words(sentence: str) -> list[str]:
    return sentence.lower().split()


def _load_sst2(folder: Path, hub: str | None) -> tuple[Path, Arrays]:
    pairs: Sequence[Sequence[Any]]
    if hub:
        columns = readers.read_hub(hub, ("train", "validation"), [("sentence",), ("label",)])
        path = folder
        pairs = [
            (_hub_texts(hub, part, x), _hub_labels(hub, part, y))
            for part, (x, y) in columns.items()
        ]
        for _, y in pairs:
            if y.min() < 0 or y.max() > 1:
                raise DataError(
                    f"{hub}: labels lie between {y.min()} and {y.max()}, expected 0 and 1"
                )
    else:
        paths = readers.find(folder, _SST2_FILES, "SST-2")
        path, pairs = paths[0], [readers.read_sentences(path) for path in paths]
    (x_train, y_train), (x_test, y_test) = (
        (np.array(x, object), np.asarray(y, np.int32)) for x, y in pairs
    )
    return path, {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _language(name: str, folder: Path, hub: str | None) -> Task:
    length = _WINDOWS[name]
    paths: Sequence[Path]
    if hub:
        rows = readers.read_hub(hub, _SPLITS, [("text",)])
        texts = [
            "\n".join(line.removesuffix("\n") for line in _hub_texts(hub, part, lines, "a text"))
            for part, (lines,) in rows.items()
        ]
        paths = [folder] * len(texts)
    elif name == "wikitext2":
        paths = readers.find(folder, _WIKITEXT_FILES, "WikiText-2")
        texts = [readers.read_text(path) for path in paths]
    else:
        paths = 3 * readers.find(folder, [["tinyshakespeare.txt"]], "Tiny Shakespeare")
        text = readers.read_text(paths[0])
        bounds = (slice(9 * len(text) // 10), slice(9 * len(text) // 10, 19 * len(text) // 20))
        texts = [text[bounds[0]], text[bounds[1]], text[19 * len(text) // 20 :]]
    if name == "wikitext2":
        # In the order of the training text; other words, which its own files do not have, are the
        # one that stands for rare ones.
        ids: dict[str, int] = {}
        tokens: list[np.ndarray] = []
        for place, text in zip(paths, texts, strict=True):
            words = _words_and_ends(place, text)
            if not tokens:
                row = np.fromiter((ids.setdefault(word, len(ids)) for word in words), np.int32)
                unknown = ids.setdefault("<unk>", len(ids))
            else:
                row = np.fromiter((ids.get(word, unknown) for word in words), np.int32)
            tokens.append(row)
        size = len(ids)
    else:
        tokens = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        size = 256
    splits = []
    for path, part, row in zip(paths, _SPLITS, tokens, strict=True):
        windows = (len(row) - 1) // length
        if not windows:
            raise DataError(
                f"{path}: {len(row)} tokens for {part}, expected more than {length}, a window"
            )
        x, y = (row[i : i + windows * length].reshape(windows, length) for i in (0, 1))
        splits.append(Split(x, y))
    return _task(name, splits, num_classes=0, vocabulary_size=size)


def _words_and_ends(path: Path, text: str) -> Iterator[str]:
    for _, line in readers.lines(path, text):
        yield from line.split()
        yield "<eos>"


def _multi30k(folder: Path, hub: str | None) -> Task:
    import sentencepiece

    if hub:
        rows = readers.read_hub(hub, _SPLITS, [(language,) for language in _LANGUAGES])
        pairs = [
            [_hub_texts(hub, part, texts) for texts in columns] for part, columns in rows.items()
        ]
    else:
        pairs = []
        for part in _MULTI30K_PARTS:
            groups = [
                [f"{p}{part}.{lang}" for lang in _LANGUAGES] for p in ("multi30k.", "multi30k/")
            ]
            pairs.append(readers.read_pairs(readers.find(folder, groups, "Multi30k")))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain.from_iterable(pairs[0]),
            model_writer=model,
            model_type="bpe",
            vocab_size=_PIECES,
            hard_vocab_limit=False,  # a small text has fewer
            pad_id=0,
            bos_id=_BEGIN,
            eos_id=_END,
            unk_id=3,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{hub or folder}: SentencePiece learns no pieces from the training split; expected "
            "sentences of words, of up to 4192 bytes"
        ) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    splits = []
    for source, target in pairs:
        # Cut at once: a line may be long, and a number takes more room than a character.
        sources, targets = (
            [[*pieces.encode(sentence)[:_SENTENCE], _END] for sentence in part]
            for part in (source, target)
        )
        shifted = [[_BEGIN, *row[:-1]] for row in targets]
        x = np.concatenate([_padded(rows, _SENTENCE) for rows in (sources, shifted)], axis=1)
        splits.append(Split(x, _padded(targets, _SENTENCE, IGNORED)))
    return _task(
        "multi30k",
        splits,
        num_classes=0,
        vocabulary_size=pieces.get_piece_size(),
        input_shape=(_SENTENCE, _SENTENCE),
    )
