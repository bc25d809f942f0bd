"""Files of data sets: reads them, and says in one line what is wrong with them.

What the format of a file is, stands here; what becomes of it, in `experiments.data`.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import itertools
import math
import pickle
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

# The arrays of a file: x_train, y_train, x_test, y_test; images as bytes, sentences as objects.
Arrays = dict[str, np.ndarray]

EXAMPLES = ("x_train", "y_train", "x_test", "y_test")
HUBS = ("hf", "tfds")
_SUFFIXES = (".jpeg", ".jpg", ".png")
# Decoded images that are kept in memory, in bytes.
_CACHE_BYTES = 2**30
# Up to so many bytes of pictures enter a checksum as a whole; of more, so many files.
_CHECKSUM_BYTES, _CHECKSUM_FILES = 2**28, 64


class DataError(ValueError):
    """A data set is missing or broken; the message is one line for the person at the keyboard."""


# Bytes and text ---------------------------------------------------------------------------------


def plain_or_gzipped(path: Path) -> Path:
    """The path, or the one with .gz behind it if only that exists."""
    gzipped = path.with_name(path.name + ".gz")
    return gzipped if gzipped.exists() and not path.exists() else path


def find(folder: Path, candidates: Iterable[Sequence[str]], what: str) -> list[Path]:
    """The first group of files (also .gz) of which one is there.

    Raises:
        DataError: There is none.
    """
    groups = [*candidates]
    for names in groups:
        paths = [plain_or_gzipped(folder / name) for name in names]
        if any(path.exists() for path in paths):
            return paths
    expected = " or ".join(" and ".join(names) for names in groups)
    raise DataError(f"{folder}: no {what} here, expected {expected} (also .gz)")


def read_bytes(path: Path, expected: str) -> bytes:
    """The content of a file, gzipped or not."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable, expected {expected} ({_reason(error)})") from error


def read_text(path: Path, expected: str = "text in UTF-8, gzipped or not") -> str:
    """The text of a file, gzipped or not."""
    try:
        text = read_bytes(path, expected).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: unreadable, expected {expected} ({_reason(error)})") from error
    return text.replace("\r\n", "\n")


def read_pairs(paths: Sequence[Path]) -> list[list[str]]:
    """The lines of several files, of equal number: a sentence in several languages."""
    columns = [read_text(path).removesuffix("\n").split("\n") for path in paths]
    numbers = [len(lines) for lines in columns]
    if len(set(numbers)) > 1:
        raise DataError(
            f"{paths[1]}: {numbers[1]} lines, expected {numbers[0]}, one for each of {paths[0]}"
        )
    for path, lines in zip(paths, columns, strict=True):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise DataError(f"{path}: line {number} is empty, expected a sentence")
    return columns


def read_sentences(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sentences and labels of a file in GLUE's format: a header, then sentence, tab, label."""
    text = read_text(path, "sentences and labels in UTF-8, gzipped or not")
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


# Pictures ---------------------------------------------------------------------------------------


def decode_jpegs(path: Path, shape: tuple[int, ...]) -> Arrays:
    """An `.npz` file of JPEG files of one shape: their bytes one after the other.

    For train and test: `jpeg_*`, the bytes; `off_*`, where each picture begins, and the end; `y_*`.
    """
    names = [f"{kind}_{part}" for part in ("train", "test") for kind in ("jpeg", "off", "y")]
    content = read_npz(path, names)
    arrays: Arrays = {}
    for part in ("train", "test"):
        jpeg, offsets = content[f"jpeg_{part}"].tobytes(), content[f"off_{part}"]
        x = np.empty((len(offsets) - 1, *shape), np.uint8)
        for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            name = f"{path}: {part} picture {i}"
            pixels = np.asarray(_decode(jpeg[start:end], name, "RGB"))
            if pixels.shape != shape:
                raise DataError(f"{name} is of shape {pixels.shape}, expected {shape}")
            x[i] = pixels
        arrays |= {f"x_{part}": x, f"y_{part}": content[f"y_{part}"]}
    return arrays


def _decode(content: bytes, name: Any, mode: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content)).convert(mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name}: not a readable picture ({_reason(error)})") from error


def read_gray(path: Path) -> np.ndarray:
    """A picture file in gray: bytes, (height, width)."""
    return np.asarray(_decode(read_bytes(path, "a picture"), path, "L"))


def list_images(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; numbers in names count as numbers."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES]
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The picture files of a folder with one folder for each class.

    Raises:
        DataError: There is no class, or one without pictures.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    classes = {path.name: list_images(path) for path in folders}
    if not classes:
        raise DataError(f"{folder}: expected one folder for each class, with its pictures")
    for name, paths in classes.items():
        if not paths:
            expected = ", ".join(_SUFFIXES)
            raise DataError(f"{folder / name}: no pictures here, expected files {expected}")
    return classes


class ImageFiles:
    """Picture files that are read when they are asked for, as an array of examples.

    `files[rows]`, for a slice or an array of numbers, is float32 of shape (rows, size, size, 3):
    each picture with its shorter side scaled to `size`, the middle of the longer one, standardized.
    Pictures that were read stay in memory, as bytes, as long as there are 1 GiB for them.

    Args:
        paths: The files.
        size: Height and width.
        mean: Of each channel, in bytes.
        std: Of each channel, in bytes.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, paths: Sequence[Path], size: int, mean: np.ndarray, std: np.ndarray):
        self.shape = (len(paths), size, size, 3)
        self._paths = paths
        self._mean, self._std = mean.astype(np.float32), std.astype(np.float32)
        self._cache: dict[int, np.ndarray] = {}
        self._room = _CACHE_BYTES // (3 * size * size)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: Any) -> np.ndarray:
        numbers = np.arange(len(self))[rows]
        x = np.empty((len(numbers), *self.shape[1:]), np.float32)
        for example, number in zip(x, numbers.tolist(), strict=True):
            example[:] = self._read(number)
        x -= self._mean
        x /= self._std
        return x

    def checksum(self) -> int:
        """A number that tells these files from others.

        It covers the names of classes and files and their sizes. Up to 256 MiB of files are read
        as a whole; of more than that the times of the last change count, and the content of 64
        files, evenly spread. A large folder has to be copied with its times (`cp -a`, `rsync -a`).

        Raises:
            DataError: A file cannot be read.
        """
        try:
            stats = [path.stat() for path in self._paths]
        except OSError as error:
            raise DataError(f"{error.filename}: unreadable ({_reason(error)})") from error
        read, number = self._paths, 0
        large = sum(stat.st_size for stat in stats) > _CHECKSUM_BYTES
        if large:
            read = self._paths[:: math.ceil(len(self._paths) / _CHECKSUM_FILES)]
        for path, stat in zip(self._paths, stats, strict=True):
            line = f"{path.parent.name}/{path.name} {stat.st_size} {stat.st_mtime_ns * large}\n"
            number = zlib.crc32(line.encode(errors="surrogateescape"), number)
        for path in read:
            number = zlib.crc32(read_bytes(path, "a picture"), number)
        return number

    def _read(self, number: int) -> np.ndarray:
        if number in self._cache:
            return self._cache[number]
        path, size = self._paths[number], self.shape[1]
        image = _decode(read_bytes(path, "a picture"), path, "RGB")
        scale = size / min(image.size)
        width, height = (max(size, round(length * scale)) for length in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        with self._lock:
            if len(self._cache) < self._room:
                self._cache[number] = pixels
        return pixels


# Data sets of Hugging Face and TensorFlow -------------------------------------------------------


def hub_of(location: Any) -> str | None:
    """What stands in front of a location, `hf:...` or `tfds:...`; None if neither does."""
    kind, colon, _ = str(location).partition(":")
    return kind if colon and kind in HUBS else None


def read_hub(
    location: str, splits: Sequence[str], columns: Sequence[Sequence[str]]
) -> dict[str, list[list[Any]]]:
    """Columns of a data set that `datasets` or `tensorflow_datasets` manages.

    `hf:FOLDER` is a folder that `Dataset.save_to_disk` wrote, `hf:NAME` or `hf:NAME:CONFIGURATION`
    what `datasets.load_dataset` finds under that name (in its cache, when offline). `tfds:FOLDER`
    is a version's folder (with `dataset_info.json`), `tfds:NAME` a data set that is prepared in
    `~/tensorflow_datasets`; its files must be ArrayRecord (`file_format="array_record"`), which
    needs no TensorFlow.

    Args:
        location: As above.
        splits: Names of the splits.
        columns: The names that each column may have, e.g. `[("image", "img"), ("label",)]`.

    Returns:
        For each split the columns, as lists.

    Raises:
        DataError: The package or the data set is missing, or a split or column.
    """
    kind, _, name = location.partition(":")
    read = {"hf": _hugging_face, "tfds": _tensorflow}[kind]
    try:
        found = read(name, splits)
    except DataError:
        raise
    except Exception as error:  # whatever these packages raise
        raise DataError(f"{location}: unreadable ({_reason(error)})") from error
    tables = {}
    for split in splits:
        rows = found[split]
        if not len(rows):
            raise DataError(f"{location}: split {split} is empty")
        present = rows[0].keys()
        chosen = [next((name for name in names if name in present), None) for names in columns]
        for names, one in zip(columns, chosen, strict=True):
            if one is None:
                raise DataError(
                    f"{location}: split {split} has columns {', '.join(present)}, expected "
                    f"{' or '.join(names)}"
                )
        values = [[_plain(row[name]) for name in chosen] for row in rows]
        tables[split] = [[*column] for column in zip(*values, strict=True)]
    return tables


def _hugging_face(name: str, splits: Sequence[str]) -> Any:
    datasets = _import("datasets", "hf")
    if Path(name).expanduser().is_dir():
        found = datasets.load_from_disk(str(Path(name).expanduser()))
    else:
        path, _, configuration = name.partition(":")
        found = datasets.load_dataset(path, configuration or None)
    present = found.keys() if isinstance(found, dict) else ["one without a name"]
    return {split: found[split] for split in _known("hf", name, splits, present)}


def _tensorflow(name: str, splits: Sequence[str]) -> Any:
    tfds = _import("tensorflow_datasets", "tfds")
    folder = Path(name).expanduser()
    builder = tfds.builder_from_directory(str(folder)) if folder.is_dir() else tfds.builder(name)
    known = _known("tfds", name, splits, builder.info.splits.keys())
    return {split: builder.as_data_source(split=split) for split in known}


def _import(package: str, hub: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = package.replace("_", "-")
        raise DataError(
            f"{hub}: needs the package {install}, which cannot be imported ({_reason(error)}); "
            f"install it with: pip install {install}"
        ) from error


def _known(hub: str, name: str, splits: Sequence[str], present: Iterable[str]) -> Sequence[str]:
    names = [*present]
    for split in splits:
        if split not in names:
            raise DataError(
                f"{hub}:{name}: no split {split}, expected {', '.join(splits)} (there are "
                f"{', '.join(names)})"
            )
    return splits


def _plain(value: Any) -> Any:
    """A value as NumPy array, number or text."""
    if isinstance(value, bytes):
        return value.decode()
    return np.asarray(value) if isinstance(value, Image.Image) else value


# Arrays -----------------------------------------------------------------------------------------


def read_npz(path: Path, names: Sequence[str] = EXAMPLES) -> Arrays:
    """The arrays of these names in an `.npz` file."""
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
    return arrays


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads the format of yann.lecun.com/exdb/mnist: magic number, sizes, bytes."""
    content = read_bytes(path, "an IDX file, gzipped or not")
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


def read_cifar(folder: Path, files: dict[str, list[str]], labels: bytes) -> Arrays:
    """The arrays of CIFAR's folder of python batches.

    Args:
        folder: The folder.
        files: Names of the files of train and test.
        labels: Name of the labels in them.
    """
    arrays: Arrays = {}
    for part, names in files.items():
        read = [_read_cifar_batch(folder / name, labels) for name in names]
        arrays[f"x_{part}"] = np.concatenate([x for x, _ in read])
        arrays[f"y_{part}"] = np.concatenate([y for _, y in read])
    return arrays


def _read_cifar_batch(path: Path, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = _ArraysUnpickler(file, encoding="bytes").load()
        x = np.asarray(content[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return x, np.asarray(content[labels])
    except Exception as error:  # a damaged pickle can raise anything
        expected = f"a CIFAR python batch: a pickle of data and {labels.decode()}"
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


def checked(
    path: Path | str, arrays: Arrays, image_shape: tuple[int, ...], num_classes: int
) -> Arrays:
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
        if y.min() < 0 or y.max() >= num_classes:
            raise DataError(
                f"{path}: {part} labels lie between {y.min()} and {y.max()}, expected 0 to "
                f"{num_classes - 1}"
            )
        arrays[f"y_{part}"] = y.astype(np.int32)
    return arrays


def _reason(error: Exception) -> str:
    """The first line of an error's message, without the path that stands before it anyway."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
