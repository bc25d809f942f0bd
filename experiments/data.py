"""Data sets and input pipelines.

`load_task` gives a task by name: arrays split into train, validation and test, and what a model has
to know about them. `batches` and `index_batches` are Grain pipelines over such arrays; their
iterators save and restore their position (`get_state`, `set_state`) and so can be checkpointed.

| task | train / validation / test | files |
|---|---|---|
| `digits` | 1077 / 360 / 360 | none: in scikit-learn |
| `mnist` | 55,000 / 5,000 / 10,000 | MNIST |
| `mnist5k` | 5,000 / 5,000 / 10,000 | MNIST |
| `cifar10` | 45,000 / 5,000 / 10,000 | CIFAR-10 |
| `cifar10_5k` | 5,000 / 5,000 / 10,000 | CIFAR-10 |
| | 5,000 / first half / second half of its test rows | or `cifar10_5k.npz`, preferred |
| `sst2` | 62,349 / 5,000 / 872 | SST-2 |
| `sst2_1k` | 1,000 / 1,000 / 872 | SST-2 |

MNIST is `mnist.npz` or the four IDX files, gzipped or not, in the data directory or its `MNIST/raw`
(where torchvision puts them); CIFAR-10 is `cifar10.npz` or the folder `cifar-10-batches-py`. An
`.npz` file holds `x_train`, `y_train`, `x_test` and `y_test`. Pixels are scaled to [0, 1]; CIFAR-10
is then standardized per pixel and channel by mean and standard deviation of the training split.

SST-2 (GLUE's: sentences of film reviews, negative 0 or positive 1) is `sst2.train.tsv` and
`sst2.dev.tsv`, or `SST-2/train.tsv` and `SST-2/dev.tsv` as GLUE unpacks them, each plain or `.gz`;
the test split is `dev`, since GLUE keeps the labels of its own test rows. A sentence becomes a row
of token ids: 0 is padding, 1 a word that the training split does not have, and from 2 on stand the
lower-cased words of the training split, the most frequent first. Rows are as long as the longest of
the whole training file (52 words), at most 100; what is longer is cut.

The subsets are the first 5,000 (SST-2: 1,000) training rows, and validation as many after them;
without subset, validation is the last 5,000. Preprocessing and subsets follow Song et al., "Does
SGD really happen in tiny subspaces?" (2024). The validation splits are ours, and so are the words:
their code reads the 30,522 word pieces of distilbert-base-uncased; the words of 1,000 rows are
2,894.
"""

from __future__ import annotations

import codecs
import collections
import functools
import gzip
import itertools
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

TASKS: tuple[str, ...] = (
    *("digits", "mnist", "mnist5k", "cifar10", "cifar10_5k"),
    *("sst2", "sst2_1k"),
)

# The arrays of a file: x_train, y_train, x_test, y_test; images as bytes, sentences as objects.
Arrays = dict[str, np.ndarray]

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
_CIFAR_SHAPE = (32, 32, 3)
_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
# (training file, development file) of SST-2.
_SST2_FILES = (("sst2.train.tsv", "sst2.dev.tsv"), ("SST-2/train.tsv", "SST-2/dev.tsv"))
_UNKNOWN, _FIRST_WORD = 1, 2  # token ids; padding is 0
_MAX_TOKENS = 100  # positions that the model of Song et al. knows


class DataError(ValueError):
    """A data set is missing or broken; the message is one line for the person at the keyboard."""


@dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
        x: Examples: float32, (N, height, width, channels), or token ids, int32, (N, length).
        y: Labels, int32, (N,).
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Task:
    """A data set split for training, choosing and reporting.

    Attributes:
        name: One of `TASKS`.
        train: What is trained on.
        validation: What learning rates are chosen on.
        test: What is reported.
        num_classes: Number of classes; labels are 0 to `num_classes` - 1.
        input_shape: Shape of one example.
        default_model: Name of a model in `models` that suits the task.
        target_accuracy: Validation accuracy that a good run of the default model reaches.
        vocabulary_size: Token ids are 0 (padding) to `vocabulary_size` - 1; `None` for images.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, ...]
    default_model: str
    target_accuracy: float
    vocabulary_size: int | None = None


def load_task(name: str, *, data_dir: str | Path | None = None) -> Task:
    """Loads a task.

    Example:
        >>> task = load_task("digits")
        >>> task.train.x.shape, task.input_shape, task.num_classes
        ((1077, 8, 8, 1), (8, 8, 1), 10)

    Args:
        name: One of `TASKS`.
        data_dir: Folder with the files; default: the environment variable OPTAX_ACCEL_DATA. The
            digits need none.

    Returns:
        The task.

    Raises:
        DataError: If the name is unknown or a file is missing or broken.
    """
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; valid: {', '.join(TASKS)}")
    if name == "digits":
        return _digits()
    folder = data_folder(name, data_dir)
    subset = _SUBSETS.get(name)
    if name.startswith("mnist"):
        splits = _scale(_split(*_load_mnist(folder), subset))
        return _task(name, splits, "mlp", 0.92 if subset else 0.97)
    if name.startswith("cifar10"):
        splits = _standardize(_split(*_load_cifar(folder, subset is not None), subset))
        return _task(name, splits, *(("cnn", 0.50) if subset else ("resnet20", 0.80)))
    path, sentences = _load_sst2(folder)
    splits, size = _tokenize(_split(path, sentences, subset), _longest(sentences["x_train"]))
    target = 0.58 if subset else 0.68
    return _task(name, splits, "transformer", target, num_classes=2, vocabulary_size=size)


def index_batches(
    n: int,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.DatasetIterator[np.ndarray]:
    """Random batches of indices, for data that already lie on the device.

    Each epoch is a new random order of all `n` indices, cut into batches; what is left over is
    dropped.

    Example:
        >>> iterator = index_batches(10, batch_size=4, seed=0)
        >>> next(iterator).shape
        (4,)
        >>> state = iterator.get_state()
        >>> batch = next(iterator)
        >>> iterator.set_state(state)
        >>> bool((next(iterator) == batch).all())
        True

    Args:
        n: Number of examples.
        batch_size: Examples per batch, at most `n`.
        seed: Decides the order; any two seeds give unrelated ones.
        num_epochs: Number of passes; `None` never ends.
        shard: Gives one process its part of each batch, see `batches`; default: whole batches.

    Returns:
        A checkpointable iterator of int32 arrays of shape (batch_size,), or of one shard's part.
    """
    return iter(_index_dataset(n, batch_size, seed, num_epochs, shard))


def batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Random batches of examples, in the order that `index_batches` gives.

    Several processes share the work: with `shard=grain.sharding.ShardByJaxProcess()` process i of
    n reads the i-th of n equal parts of each batch. The parts, one after the other, are the batch
    of a single process, and the position counts whole batches: saved by n processes, it serves any
    other number.

    Example:
        >>> iterator = iter(batches(load_task("digits").train, batch_size=32, seed=0))
        >>> batch = next(iterator)
        >>> batch["x"].shape, batch["y"].shape
        ((32, 8, 8, 1), (32,))

    Args:
        split: The examples.
        batch_size: Examples per batch, over all processes; at most the number of examples.
        seed: Decides the order; any two seeds give unrelated ones.
        num_epochs: Number of passes; `None` never ends.
        shard: The part of each batch to read; default: all of it.

    Returns:
        A Grain data set of `{"x", "y"}`; its iterators are checkpointable.
    """
    indices = _index_dataset(len(split), batch_size, seed, num_epochs, shard)
    return indices.map(lambda index: {"x": split.x[index], "y": split.y[index]})


def prefetch_to_device(
    iterator: Iterator[Any], put: Callable[[Any], Any] = jax.device_put, size: int = 2
) -> DevicePrefetcher:
    """Moves batches to the device ahead of their use, so that transfer and computation overlap.

    Example:
        >>> iterator = iter(batches(load_task("digits").train, batch_size=32, seed=0))
        >>> batch = next(prefetch_to_device(iterator))
        >>> type(batch["x"]).__name__, batch["x"].shape
        ('ArrayImpl', (32, 8, 8, 1))

    Args:
        iterator: Gives pytrees of arrays; a Grain iterator where the position is to be saved.
        put: Places a batch, e.g. `Parallel.put_batch`, which makes global arrays of what each
            process has; default: on the default device.
        size: Number of batches under way.

    Returns:
        An iterator of the same batches on the device. Its `get_state` and `set_state` count the
        batches it gave out, not those under way.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return DevicePrefetcher(iterator, put, size)


class DevicePrefetcher(Iterator[Any]):
    """What `prefetch_to_device` returns."""

    def __init__(self, iterator: Any, put: Callable[[Any], Any], size: int):
        self._iterator = iterator
        self._put = put
        self._size = size
        # Batches on their way, each with the position of the iterator behind it.
        self._queue: collections.deque[tuple[Any, Any]] = collections.deque()
        self._state: Any = self._position()

    def __next__(self) -> Any:
        while len(self._queue) < self._size:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            self._queue.append((self._put(batch), self._position()))
        if not self._queue:
            raise StopIteration
        batch, self._state = self._queue.popleft()
        return batch

    def get_state(self) -> Any:
        """Position behind the last batch that was given out."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Continues at a position that `get_state` gave."""
        self._queue.clear()
        self._iterator.set_state(state)
        self._state = state

    def _position(self) -> Any:
        return self._iterator.get_state() if hasattr(self._iterator, "get_state") else None


def _index_dataset(
    n: int,
    batch_size: int,
    seed: int,
    num_epochs: int | None,
    shard: grain.sharding.ShardOptions | None,
) -> grain.IterDataset[np.ndarray]:
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} examples, got {batch_size}")
    shard = shard or grain.sharding.NoSharding()
    size, rest = divmod(batch_size, shard.shard_count)
    if rest:
        raise ValueError(
            f"batch_size {batch_size} does not split evenly over {shard.shard_count} processes; "
            f"use a multiple of {shard.shard_count}"
        )
    parts = n // batch_size * shard.shard_count  # of an epoch's batches

    # Grain's own `shuffle` and `batch` cost 13 microseconds per example on one core, more than a
    # small model's training step, and start epoch e of seed s + 1 in the order of epoch e + 1 of
    # seed s. One permutation per epoch costs 10 microseconds per batch, and seeds are unrelated.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(n).astype(np.int32)

    def part(index: int, _: int) -> np.ndarray:
        epoch, position = divmod(index, parts)
        return order(epoch)[position * size : (position + 1) * size]

    # Read in the calling thread: a batch is ready sooner than a thread hands it over.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.range(parts).repeat(num_epochs).map_with_index(part)
    return dataset[shard.shard_index :: shard.shard_count].to_iter_dataset(options)


def _digits() -> Task:
    # Imported here because it takes longer than everything else in this module.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = (digits.images / 16.0).astype(np.float32)[..., np.newaxis]
    y = digits.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=y[rest], random_state=0)
    splits = [Split(x[rows], y[rows]) for rows in (train, validation, test)]
    return _task("digits", splits, "mlp", 0.95)


def _task(
    name: str,
    splits: list[Split],
    model: str,
    target: float,
    num_classes: int = 10,
    vocabulary_size: int | None = None,
) -> Task:
    train, validation, test = splits
    return Task(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        input_shape=train.x.shape[1:],
        default_model=model,
        target_accuracy=target,
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
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with the files of task {name!r}")
    return folder


def _split(path: Path, arrays: Arrays, subset: int | None) -> list[Split]:
    x, y = arrays["x_train"], arrays["y_train"]
    test = Split(arrays["x_test"], arrays["y_test"])
    if len(y) == subset:
        half = len(test) // 2
        return [
            Split(x, y),
            Split(test.x[:half], test.y[:half]),
            Split(test.x[half:], test.y[half:]),
        ]
    size = subset or _VALIDATION
    start = subset or len(y) - size
    rows = slice(start, start + size)
    validation = Split(x[rows], y[rows])
    if start < 1 or len(validation) < size:
        needed = f"{start + size}" if subset else f"more than {size}"
        raise DataError(f"{path}: {len(y)} training examples, expected {needed}")
    return [Split(x[:start], y[:start]), validation, test]


def _scale(splits: list[Split]) -> list[Split]:
    """To [0, 1], with an axis for the one channel."""
    return [Split(s.x.astype(np.float32)[..., np.newaxis] / np.float32(255), s.y) for s in splits]


def _standardize(splits: list[Split]) -> list[Split]:
    """Per pixel and channel; dividing by 255 first would change nothing."""
    train = splits[0].x
    # Sums of bytes and of their squares are exact, and need no copy of the data in floating point.
    mean = train.sum(axis=0, dtype=np.int64) / len(train)
    square = np.einsum("n...,n...->...", train, train, dtype=np.int64) / len(train)
    std = np.sqrt(square - mean**2)
    std[std == 0] = 1.0  # a pixel that never changes
    standardized = []
    for split in splits:
        x = split.x.astype(np.float32)
        x -= mean.astype(np.float32)
        x /= std.astype(np.float32)
        standardized.append(Split(x, split.y))
    return standardized


def _tokenize(splits: list[Split], length: int) -> tuple[list[Split], int]:
    """Rows of `length` token ids, and the number of different ids."""
    counts = collections.Counter(itertools.chain.from_iterable(map(_words, splits[0].x)))
    # Of equally frequent words the one that was read first.
    ids = {word: i for i, (word, _) in enumerate(counts.most_common(), _FIRST_WORD)}
    tokenized = []
    for split in splits:
        x = np.zeros((len(split), length), np.int32)
        for row, sentence in zip(x, split.x, strict=True):
            tokens = [ids.get(word, _UNKNOWN) for word in _words(sentence)[:length]]
            row[: len(tokens)] = tokens
        tokenized.append(Split(x, split.y))
    return tokenized, _FIRST_WORD + len(ids)


def _longest(sentences: np.ndarray) -> int:
    return min(max(len(_words(sentence)) for sentence in sentences), _MAX_TOKENS)


def _words(sentence: str) -> list[str]:
    return sentence.lower().split()


def _load_mnist(folder: Path) -> tuple[Path, Arrays]:
    npz = folder / "mnist.npz"
    if npz.exists():
        return npz, _read_npz(npz, _MNIST_SHAPE)
    for place in (folder, folder / "MNIST" / "raw"):
        paths = {key: _plain_or_gzipped(place / name) for key, name in _MNIST_FILES.items()}
        if any(path.exists() for path in paths.values()):
            arrays = {key: _read_idx(path, 3 if "x" in key else 1) for key, path in paths.items()}
            return place, _checked(place, arrays, _MNIST_SHAPE)
    raise DataError(
        f"{folder}: no MNIST here, expected mnist.npz or {_MNIST_FILES['x_train']} and the other "
        "three IDX files (also .gz, also in MNIST/raw)"
    )


def _plain_or_gzipped(path: Path) -> Path:
    gzipped = path.with_name(path.name + ".gz")
    return gzipped if gzipped.exists() and not path.exists() else path


def _read_plain_or_gzipped(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _load_cifar(folder: Path, subset: bool) -> tuple[Path, Arrays]:
    for name in ["cifar10_5k.npz"] * subset + ["cifar10.npz"]:
        if (folder / name).exists():
            return folder / name, _read_npz(folder / name, _CIFAR_SHAPE)
    place = folder / _CIFAR_FOLDER
    if not place.is_dir():
        npz = "cifar10_5k.npz, cifar10.npz" if subset else "cifar10.npz"
        raise DataError(
            f"{folder}: no CIFAR-10 here, expected {npz} or the folder {_CIFAR_FOLDER} (from "
            "cifar-10-python.tar.gz)"
        )
    arrays: Arrays = {}
    for part, names in _CIFAR_FILES.items():
        read = [_read_cifar_batch(place / name) for name in names]
        arrays[f"x_{part}"] = np.concatenate([x for x, _ in read])
        arrays[f"y_{part}"] = np.concatenate([y for _, y in read])
    return place, _checked(place, arrays, _CIFAR_SHAPE)


def _load_sst2(folder: Path) -> tuple[Path, Arrays]:
    for names in _SST2_FILES:
        paths = [_plain_or_gzipped(folder / name) for name in names]
        if any(path.exists() for path in paths):
            (x_train, y_train), (x_test, y_test) = map(_read_sentences, paths)
            arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
            return paths[0], arrays
    raise DataError(
        f"{folder}: no SST-2 here, expected {' and '.join(_SST2_FILES[0])} or "
        f"{' and '.join(_SST2_FILES[1])} of GLUE (also .gz)"
    )


def _read_sentences(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sentences and labels of a file in GLUE's format: a header, then sentence, tab, label."""
    try:
        text = _read_plain_or_gzipped(path).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        expected = "sentences and labels in UTF-8, gzipped or not"
        raise DataError(f"{path}: unreadable, expected {expected} ({_reason(error)})") from error
    header, *lines = text.removesuffix("\n").split("\n")
    if header.split() != ["sentence", "label"]:
        raise DataError(
            f"{path}: line 1 is {header[:40]!r}, expected the header 'sentence', tab, 'label'"
        )
    sentences, labels = [], []
    for number, line in enumerate(lines, start=2):
        sentence, _, label = line.rpartition("\t")
        if not sentence.strip() or label.strip() not in ("0", "1"):
            raise DataError(
                f"{path}: line {number} is {line[:40]!r}, expected a sentence, a tab and 0 or 1"
            )
        sentences.append(sentence)
        labels.append(int(label))
    if not labels:
        raise DataError(f"{path}: no line after the header, expected sentences and labels")
    return np.array(sentences, object), np.array(labels, np.int32)


def _read_npz(path: Path, image_shape: tuple[int, ...]) -> Arrays:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        # Opened here, because NumPy leaves a damaged file open.
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            present = getattr(content, "files", ())  # a single array has none
            arrays = {name: content[name] for name in names if name in present}
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz file ({_reason(error)})") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(f"{path}: no array {', '.join(missing)}; expected {', '.join(names)}")
    return _checked(path, arrays, image_shape)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads the format of yann.lecun.com/exdb/mnist: magic number, sizes, bytes."""
    try:
        content = _read_plain_or_gzipped(path)
    except (OSError, EOFError, zlib.error) as error:
        expected = "an IDX file, gzipped or not"
        raise DataError(f"{path}: unreadable, expected {expected} ({_reason(error)})") from error
    # Two zero bytes, the type (8: unsigned bytes), the number of dimensions.
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
        found = content[:4].hex()
        raise DataError(f"{path}: starts with 0x{found}, expected IDX magic number 0x{magic.hex()}")
    header = 4 + 4 * ndim
    shape = tuple(np.frombuffer(content[4:header].ljust(4 * ndim, b"\0"), ">u4").tolist())
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: {len(content)} bytes, expected {header + math.prod(shape)} for {shape}; "
            "the file is truncated or damaged"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _ArraysUnpickler(file, encoding="bytes").load()
        x = np.asarray(content[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return x, np.asarray(content[b"labels"])
    except Exception as error:  # a damaged pickle can raise anything
        expected = "a CIFAR-10 python batch: a pickle of data and labels"
        raise DataError(f"{path}: unreadable, expected {expected} ({_reason(error)})") from error


class _ArraysUnpickler(pickle.Unpickler):
    """Knows NumPy arrays and built-in containers only, so that no file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            # Where NumPy 1, which wrote the original files, and NumPy 2 have it.
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a data file")
        return allowed[module, name]


_reconstruct = np.empty(0).__reduce__()[0]  # NumPy has no public name for it


def _checked(path: Path, arrays: Arrays, image_shape: tuple[int, ...]) -> Arrays:
    """Images as bytes and labels as a vector of int32, of equal number."""
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
        if y.min() < 0 or y.max() > 9:
            raise DataError(
                f"{path}: {part} labels lie between {y.min()} and {y.max()}, expected 0 to 9"
            )
        arrays[f"y_{part}"] = y.astype(np.int32)
    return arrays


def _reason(error: Exception) -> str:
    """The first line of an error's message, without the path that stands before it anyway."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
