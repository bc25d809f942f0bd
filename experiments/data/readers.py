"""Files of data sets: reads them, and says in one line what is wrong with them.

What the format of a file is, stands here; what becomes of it, in `experiments.data`.

A file may be damaged, or made to do harm. Whatever is wrong with one ends in a `DataError`, and
nothing is allocated on the word of a header alone: sizes are compared with what the file can hold
and with `limit`, 512 MiB of unpacked content, before anything of that size is made. Only regular
files are opened, only JPEG and PNG reach Pillow, and no pickle creates anything but numbers.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import importlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# The arrays of a file: x_train, y_train, x_test, y_test; images as bytes, sentences as objects.
Arrays = dict[str, np.ndarray]

EXAMPLES = ("x_train", "y_train", "x_test", "y_test")
HUBS = ("hf", "tfds")
LIMIT_VARIABLE = "OPTAX_ACCEL_DATA_LIMIT"
_LIMIT = 512  # MiB; the largest file of the tasks, CIFAR-10's arrays, has 176
_SUFFIXES = (".jpeg", ".jpg", ".png")
_FORMATS = ("JPEG", "PNG")
# Of one picture; where Pillow begins to warn, 256 MiB in RGB.
_MOST_PIXELS = 89_478_485
_LONGEST_LINE, _MOST_LINES = 2**20, 2**22
# Decoded images that are kept in memory, in bytes.
_CACHE_BYTES = 2**30
# Up to so many bytes of pictures enter a checksum as a whole; of more, so many files.
_CHECKSUM_BYTES, _CHECKSUM_FILES = 2**28, 64


class DataError(ValueError):
    """A data set is missing or broken; the message is one line for the person at the keyboard.

    Args:
        message: What is wrong with which file, and what is expected. Characters that would not show
            as themselves, such as line breaks in names of files, are replaced by their escapes.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


# Bytes and text ---------------------------------------------------------------------------------


def limit() -> int:
    """Bytes that the content of one file may have, unpacked.

    They are 512 MiB, or as many MiB as the environment variable OPTAX_ACCEL_DATA_LIMIT says.

    Raises:
        DataError: The variable is no whole number from 1 to 9,999,999.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_LIMIT)
    if not re.fullmatch("[0-9]{1,7}", text) or not int(text):
        raise DataError(f"{LIMIT_VARIABLE} is {text[:40]!r}, expected a number of MiB such as 512")
    return int(text) * 2**20


def check_size(name: Any, size: int) -> None:
    """Raises `DataError` if the content of what has this name has more bytes than `limit`."""
    if size > limit():
        raise DataError(
            f"{name}: {size} bytes when unpacked, allowed are {limit()}; set {LIMIT_VARIABLE} to a "
            "number of MiB to allow more"
        )


def plain_or_gzipped(path: Path) -> Path:
    """The path, or the one with .gz behind it if only that exists."""
    gzipped = path.with_name(path.name + ".gz")
    return gzipped if exists(gzipped) and not exists(path) else path


def exists(path: Path) -> bool:
    """Whether anything has this name, also what cannot be read, such as a dangling link."""
    return os.path.lexists(path)


def find(folder: Path, candidates: Iterable[Sequence[str]], what: str) -> list[Path]:
    """The first group of files (also .gz) of which one is there.

    Args:
        folder: Where to look.
        candidates: Groups of names, the preferred one first.
        what: What they hold, for the message.

    Raises:
        DataError: There is none.
    """
    groups = [*candidates]
    for names in groups:
        paths = [plain_or_gzipped(folder / name) for name in names]
        if any(map(exists, paths)):
            return paths
    expected = " or ".join(" and ".join(names) for names in groups)
    raise DataError(f"{folder}: no {what} here, expected {expected} (also .gz)")


@contextlib.contextmanager
def _reading(name: Any, expected: str) -> Iterator[None]:
    """Turns whatever is raised while something is read into a `DataError`.

    Damaged files raise nearly everything: `zipfile` alone has eight kinds of errors.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: unreadable, expected {expected} ({_reason(error)})") from error


def _open(path: Path) -> BinaryIO:
    """Opens a regular file that is not larger than the limit."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for who writes to it
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise OSError(f"this is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, no file")
    check_size(path, status.st_size)
    return path.open("rb")


def read_bytes(path: Path, expected: str, *, unpack: bool = True) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        expected: What it should be, for messages.
        unpack: Whether the file may be gzipped; it is looked at, its name does not count.

    Raises:
        DataError: It is no regular file, it cannot be read, or it is too large.
    """
    with _reading(path, expected), _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size)
        if not unpack or content[:2] != b"\x1f\x8b":
            return content
        # Read twice, the first time to count: what is too large is never in memory.
        size = 0
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            while chunk := stream.read(2**20):
                size += len(chunk)
                check_size(path, size)
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            return stream.read(size)


def read_text(path: Path, expected: str = "text in UTF-8, gzipped or not") -> str:
    """The text of a file, gzipped or not."""
    with _reading(path, expected):
        text = read_bytes(path, expected).decode()
        if (position := text.find("\0")) >= 0:
            raise ValueError(f"character {position} is NUL")
    return text.replace("\r\n", "\n")


def lines(path: Any, text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line of a text, from 1.

    Raises:
        DataError: A line has more than 1,048,576 characters, or there are more than 4,194,304.
    """
    start, number = 0, 0
    while start < len(text) or not number:
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        number += 1
        if number > _MOST_LINES:
            raise DataError(f"{path}: more lines than the {_MOST_LINES} that are allowed")
        if end - start > _LONGEST_LINE:
            raise DataError(
                f"{path}: line {number} has {end - start} characters, allowed are {_LONGEST_LINE}"
            )
        yield number, text[start:end]
        start = end + 1


def read_pairs(paths: Sequence[Path]) -> list[list[str]]:
    """The lines of several files, of equal number: a sentence in several languages."""
    columns = []
    for path in paths:
        column: list[str] = []
        for number, line in lines(path, read_text(path)):
            if not line.strip():
                raise DataError(f"{path}: line {number} is empty, expected a sentence")
            column.append(line)
        columns.append(column)
    numbers = [len(column) for column in columns]
    if len(set(numbers)) > 1:
        raise DataError(
            f"{paths[1]}: {numbers[1]} lines, expected {numbers[0]}, one for each of {paths[0]}"
        )
    return columns


def read_sentences(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sentences and labels of a file in GLUE's format: a header, then sentence, tab, label."""
    sentences, labels = [], []
    text = read_text(path, "sentences and labels in UTF-8, gzipped or not")
    for number, line in lines(path, text):
        if number == 1:
            if line.split() != ["sentence", "label"]:
                raise DataError(
                    f"{path}: line 1 is {line[:40]!r}, expected the header 'sentence', tab, 'label'"
                )
            continue
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

    Args:
        path: The file.
        shape: Height, width and channels of each picture.

    Raises:
        DataError: The file or a picture in it is damaged or of another shape.
    """
    names = [f"{kind}_{part}" for part in ("train", "test") for kind in ("jpeg", "off", "y")]
    content = read_npz(path, names)
    arrays: Arrays = {}
    for part in ("train", "test"):
        jpeg, offsets, y = (content[f"{kind}_{part}"] for kind in ("jpeg", "off", "y"))
        if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
            raise DataError(
                f"{path}: jpeg_{part} is {jpeg.dtype} of shape {jpeg.shape}, expected uint8 of "
                "one axis"
            )
        if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
            raise DataError(
                f"{path}: off_{part} is {offsets.dtype} of shape {offsets.shape}, expected "
                "integers of one axis, the beginning of each picture and the end of the last"
            )
        if offsets[0] < 0 or offsets[-1] > len(jpeg) or (offsets[1:] <= offsets[:-1]).any():
            raise DataError(
                f"{path}: off_{part} goes from {offsets[0]} to {offsets[-1]}, expected numbers "
                f"from 0 to {len(jpeg)}, each larger than the one before"
            )
        number = len(offsets) - 1
        if y.shape[:1] != (number,):
            raise DataError(
                f"{path}: y_{part} is of shape {y.shape}, expected ({number},), one per picture"
            )
        check_size(path, number * math.prod(shape))
        x = np.empty((number, *shape), np.uint8)
        for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            name = f"{path}: {part} picture {i}"
            x[i] = np.asarray(_decode(jpeg[start:end].tobytes(), name, "RGB", shape[:2]))
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    return arrays


def _decode(
    content: bytes, name: Any, mode: str | None, shape: tuple[int, ...] | None = None
) -> Image.Image:
    """A picture of a mode of Pillow's (default: its own, gray or color), of any shape or of one."""
    try:
        # Other formats could do anything: for PostScript Pillow starts Ghostscript.
        image: Image.Image = Image.open(io.BytesIO(content), formats=_FORMATS)
        width, height = image.size
        if shape is not None and (height, width) != shape:
            raise DataError(f"{name} is of shape {(height, width)}, expected {shape}")
        if not 0 < width * height <= _MOST_PIXELS:
            raise DataError(
                f"{name}: a picture of {width} x {height} pixels, allowed are {_MOST_PIXELS}"
            )
        mode = mode or ("L" if image.mode == "L" else "RGB")
        image.load()
        return image if image.mode == mode else image.convert(mode)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        expected = " or ".join(_FORMATS)
        raise DataError(f"{name}: not a readable picture, expected {expected}") from error
    except Exception as error:  # a damaged picture can raise anything
        raise DataError(f"{name}: not a readable picture ({_reason(error)})") from error


def read_gray(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A picture file in gray: bytes, (height, width).

    Args:
        path: The file.
        shape: Height and width that it has to have; default: any.

    Raises:
        DataError: It is damaged, neither JPEG nor PNG, or of another shape.
    """
    return np.asarray(_decode(read_bytes(path, "a picture", unpack=False), path, "L", shape))


def list_images(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; numbers in names count as numbers.

    Raises:
        DataError: The folder cannot be read, or something else has the name of a picture.
    """
    with _reading(folder, "a folder of pictures"), os.scandir(folder) as entries:
        pictures = [e for e in entries if os.path.splitext(e.name)[1].lower() in _SUFFIXES]
        for entry in pictures:
            if not (os.path.isfile(entry) if entry.is_symlink() else entry.is_file()):
                raise DataError(f"{folder / entry.name}: not a regular file, expected a picture")
    names = sorted((entry.name for entry in pictures), key=lambda name: (len(name), name))
    return [folder / name for name in names]


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The picture files of a folder with one folder for each class.

    Raises:
        DataError: There is no class, or one without pictures.
    """
    folders = []
    if os.path.isdir(folder):
        with _reading(folder, "one folder for each class"):
            folders = sorted(path for path in folder.iterdir() if path.is_dir())
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
    the square in the middle of each picture, scaled to `size` and standardized. Pictures that were
    read stay in memory, as bytes, as long as there are 1 GiB for them.

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
        large = sum(status.st_size for status in stats) > _CHECKSUM_BYTES
        if large:
            read = self._paths[:: math.ceil(len(self._paths) / _CHECKSUM_FILES)]
        for path, status in zip(self._paths, stats, strict=True):
            line = f"{path.parent.name}/{path.name} {status.st_size} {status.st_mtime_ns * large}\n"
            number = zlib.crc32(line.encode(errors="surrogateescape"), number)
        for path in read:
            number = zlib.crc32(read_bytes(path, "a picture", unpack=False), number)
        return number

    def _read(self, number: int) -> np.ndarray:
        if number in self._cache:
            return self._cache[number]
        path, size = self._paths[number], self.shape[1]
        image = _decode(read_bytes(path, "a picture", unpack=False), path, "RGB")
        # Cut before it is scaled: a thin picture, scaled as a whole, would become very long.
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        pixels = np.asarray(
            image.resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
            )
        )
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
        For each split the columns, as lists: pictures, which must be JPEG or PNG, as arrays of
        bytes, texts as `str`.

    Raises:
        DataError: The package or the data set is missing or damaged, or a split or column is, or
            the values take more memory than `limit`.
    """
    kind, _, name = location.partition(":")
    read = {"hf": _hugging_face, "tfds": _tensorflow}[kind]
    tables = {}
    with _reading(location, f"a data set with {', '.join(splits)}"):
        size = 0
        for split, (present, rows) in read(name, splits, columns).items():
            for names in columns:
                if _chosen(names, present) is None:
                    raise DataError(
                        f"{location}: split {split} has columns {', '.join(present)[:200]}, "
                        f"expected {' or '.join(names)}"
                    )
            values: list[list[Any]] = [[] for _ in columns]
            for number, row in enumerate(rows):
                for column, names in zip(values, columns, strict=True):
                    value = _plain(row[_chosen(names, present)], f"{location}: {split} {number}")
                    size += getattr(value, "nbytes", 0) or len(str(value))
                    column.append(value)
                check_size(location, size)
            if not values[0]:
                raise DataError(f"{location}: split {split} is empty")
            tables[split] = values
    return tables


# Names of the columns of a split, and its rows.
_Table = tuple[list[str], Iterable[Any]]


def _chosen(names: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _hugging_face(
    name: str, splits: Sequence[str], columns: Sequence[Sequence[str]]
) -> dict[str, _Table]:
    datasets = _import("datasets", "hf")
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        _check_regular(folder)
        for file in Path(folder).rglob("*.arrow"):
            _check_uncompressed(file)
        found = datasets.load_from_disk(folder)
    else:
        path, _, configuration = name.partition(":")
        found = datasets.load_dataset(path, configuration or None)
    present = found.keys() if isinstance(found, dict) else ["one without a name"]

    def table(split: Any) -> _Table:
        # Not as its own features would: they open pictures of any format.
        plain = split.with_format("arrow")
        names = [n for n in (_chosen(names, split.column_names) for names in columns) if n]
        for column in names:
            kind = str(split.data.schema.field(column).type)
            # One long value may stand there for any number of rows.
            if re.search("dictionary|run_end|view", kind):
                raise DataError(f"hf:{name}: column {column} is of type {kind[:40]}, expected rows")
        # A damaged file could else make pyarrow read what lies beside it in memory.
        split.data.validate(full=True)

        def rows() -> Iterator[Any]:
            for batch in plain.iter(batch_size=1000):
                yield from batch.select(names).to_pylist()

        return split.column_names, rows()

    return {split: table(found[split]) for split in _known("hf", name, splits, present)}


def _tensorflow(
    name: str, splits: Sequence[str], columns: Sequence[Sequence[str]]
) -> dict[str, _Table]:
    tfds = _import("tensorflow_datasets", "tfds")
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        _check_regular(folder)
        _check_features(Path(folder) / "features.json")
        builder = tfds.builder_from_directory(folder)
    else:
        builder = tfds.builder(name)
    known = _known("tfds", name, splits, builder.info.splits.keys())
    features = builder.info.features
    # Not as its own features would: they open pictures of any format.
    decoders = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return {
        split: ([*features], builder.as_data_source(split=split, decoders=decoders or None))
        for split in known
    }


def _check_regular(folder: str) -> None:
    """Raises `DataError` if a folder holds anything but files and folders."""
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            if not os.path.isfile(path):
                raise DataError(f"{path}: not a regular file, expected one of a data set")


def _check_uncompressed(path: Path) -> None:
    """Raises `DataError` if a table in Arrow's stream format is compressed, as none of theirs is.

    It would be unpacked as a whole, before anybody knows its size. Whether it is stands in the
    header of each batch, a flatbuffer: `Message.header`, its third field, is a `RecordBatch`, whose
    fourth field is there if the batch is compressed (arrow.apache.org/docs/format/Columnar.html).
    """
    pyarrow = _import("pyarrow", "hf")
    with pyarrow.memory_map(str(path)) as source:
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            if message.type == "schema":
                continue
            content = message.metadata.to_pybytes()

            (root,) = struct.unpack_from("<I", content)
            header = _flatbuffer_field(content, root, 2)
            header += struct.unpack_from("<I", content, header)[0]
            if message.type != "record batch" or _flatbuffer_field(content, header, 3):
                raise DataError(f"{path}: compressed or with a dictionary, expected plain batches")


def _flatbuffer_field(content: bytes, table: int, number: int) -> int:
    """Where a field of a table of a flatbuffer begins; 0 if it is not there."""
    fields = table - int(struct.unpack_from("<i", content, table)[0])
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", content, fields)[0]:
        return 0
    offset = int(struct.unpack_from("<H", content, fields + place)[0])
    return table + offset if offset else 0


def _check_features(path: Path) -> None:
    """Raises `DataError` if the features of a data set name a module that is not their package's.

    Whatever module stands there would be imported.
    """

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            named = key in ("type", "pythonClassName", "python_class_name")
            if named and isinstance(value, str) and not value.startswith("tensorflow_datasets."):
                raise DataError(f"{path}: a feature is {value[:80]}, expected one of theirs")

    json.loads(read_text(path, "features of a data set"), object_pairs_hook=check)


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
                f"{', '.join(names)[:200]})"
            )
    return splits


def _plain(value: Any, name: str) -> Any:
    """A value of a hub's table as array, number or text."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # a picture of Hugging Face's
        content = value["bytes"]
        if content is None:
            content = read_bytes(Path(str(value["path"])), "a picture", unpack=False)
        return np.asarray(_decode(content, name, None))
    if isinstance(value, bytes):
        if value[:3] == b"\xff\xd8\xff" or value[:4] == b"\x89PNG":
            return np.asarray(_decode(value, name, None))
        return value.decode()
    return np.asarray(value) if isinstance(value, list) else value


# Arrays -----------------------------------------------------------------------------------------


def read_npz(path: Path, names: Sequence[str] = EXAMPLES) -> Arrays:
    """The arrays of these names in an `.npz` file: numbers, stored or deflated.

    Args:
        path: The file.
        names: Names of the arrays; others are not looked at.

    Raises:
        DataError: The file is damaged, encrypted or too large, or an array is missing, there twice
            or none of numbers.
    """
    with _reading(path, "an .npz file"), _open(path) as file:
        _check_directory(path, file)
        with zipfile.ZipFile(file) as archive:
            found: dict[str, list[zipfile.ZipInfo]] = {name: [] for name in names}
            for member in archive.infolist():
                if (name := member.filename.removesuffix(".npy")) in found:
                    found[name].append(member)
            if missing := [name for name, members in found.items() if not members]:
                raise DataError(
                    f"{path}: no array {', '.join(missing)}; expected {', '.join(names)}"
                )
            for name, members in found.items():
                if len(members) > 1:
                    raise DataError(f"{path}: {len(members)} arrays {name}, expected one")
                _check_member(f"{path}: {name}", members[0], path.stat().st_size)
            check_size(path, sum(member.file_size for (member,) in found.values()))
            arrays = {}
            for name, (member,) in found.items():
                with archive.open(member) as stream:
                    arrays[name] = _read_npy(f"{path}: {name}", stream, member.file_size)
            return arrays


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Raises `DataError` if the list of a zip file's members is too long to be one of arrays."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 2**16 - 98))  # the longest comment, and the three records of the end
    tail = file.read()
    record = len(tail) - 22  # where there is no comment
    if tail[record:][:4] != b"PK\5\6":
        record = tail.rfind(b"PK\5\6")
    size = int.from_bytes(tail[record + 12 : record + 16], "little") if record >= 0 else 0
    if record >= 20 and tail[record - 20 :][:4] == b"PK\6\7":  # of more than 4 GiB
        wide = tail[max(record - 76, 0) : record - 20]
        size = int.from_bytes(wide[40:48], "little") if wide[:4] == b"PK\6\6" else 2**64
    if size > 2**20:
        raise DataError(f"{path}: a list of members of {size} bytes, allowed are {2**20}")
    file.seek(0)


def _check_member(name: str, member: zipfile.ZipInfo, length: int) -> None:
    """Raises `DataError` for what a file of this length cannot hold, or zipfile not read."""
    packed, size = min(member.compress_size, length), member.file_size
    if member.flag_bits & 0x41:
        raise DataError(f"{name} is encrypted, expected an array without a password")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{name} is compressed by method {member.compress_type}, expected 0 (stored) or 8 "
            "(deflated), as NumPy writes"
        )
    # Deflate makes at most 1032 bytes of one.
    if size > (packed if member.compress_type == zipfile.ZIP_STORED else 1032 * packed):
        raise DataError(f"{name}: {packed} bytes cannot hold the {size} that the file promises")


def _read_npy(name: str, stream: Any, size: int) -> np.ndarray:
    """An array of numbers in NumPy's format, of which so many bytes are there.

    `numpy.lib.format` is not asked: it makes the array that a header describes before it knows
    whether there is one.
    """
    start = stream.read(12)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise DataError(f"{name} starts with {start[:8]!r}, expected an array in NumPy's format")
    width, before = (2, 10) if start[6] == 1 else (4, 12)
    length = int.from_bytes(start[8 : 8 + width], "little")
    if length > 10_000:  # as many as NumPy allows
        raise DataError(f"{name} has a header of {length} bytes, allowed are 10000")
    header = start[before:] + stream.read(length + before - 12)
    try:
        described = ast.literal_eval(header.decode("utf-8" if start[6] == 3 else "latin-1"))
        descr, fortran, shape = (described[key] for key in ("descr", "fortran_order", "shape"))
        if type(descr) is not str or not re.fullmatch(r"[<>|=]?([biu][1248]|f[248])", descr):
            raise DataError(f"{name} is of type {str(descr)[:40]!r}, expected numbers")
        dtype = np.dtype(descr)
        if type(shape) is not tuple or len(shape) > 8:
            raise ValueError("no shape of an array")
        if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise ValueError("no sizes of an array")
    except DataError:
        raise
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise DataError(f"{name} has a damaged header, expected one of numbers") from error
    expected = math.prod(shape) * dtype.itemsize
    if before + length + expected != size:
        raise DataError(
            f"{name} has {size - before - length} bytes, expected {expected} for {dtype} of shape "
            f"{shape}"
        )
    # Read to the end, where the checksum is compared.
    content = np.frombuffer(stream.read(expected + 1), dtype)
    return content.reshape(shape, order="F" if fortran else "C")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads the format of yann.lecun.com/exdb/mnist: magic number, sizes, bytes.

    Args:
        path: The file, gzipped or not.
        ndim: Number of axes.

    Raises:
        DataError: It is none, or one of another number of axes, without entries or damaged.
    """
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
    if 0 in shape:
        raise DataError(f"{path}: an array of shape {shape}, expected at least one entry")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(folder: Path, files: dict[str, list[str]], labels: bytes) -> Arrays:
    """The arrays of CIFAR's folder of python batches.

    Args:
        folder: The folder.
        files: Names of the files of train and test.
        labels: Name of the labels in them.

    Raises:
        DataError: A file is damaged.
    """
    arrays: Arrays = {}
    for part, names in files.items():
        read = [_read_cifar_batch(folder / name, labels) for name in names]
        arrays[f"x_{part}"] = np.concatenate([x for x, _ in read])
        arrays[f"y_{part}"] = np.concatenate([y for _, y in read])
    return arrays


def _read_cifar_batch(path: Path, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    expected = f"a CIFAR python batch: a pickle of data and {labels.decode()}"
    content = read_bytes(path, expected, unpack=False)
    with _reading(path, expected):
        _check_pickle(content)
        batch = _PlainUnpickler(content).load()
        if type(batch) is not dict or not {b"data", labels} <= batch.keys():
            raise ValueError("no dictionary of them")
        x, y = batch[b"data"], batch[labels]
        if type(y) is not list or not all(type(label) is int for label in y):
            raise ValueError(f"{labels.decode()} is no list of integers")
        if type(x) is not _Recorded:
            raise ValueError("data is no array of bytes")
        return x.array().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(y)


def _check_pickle(content: bytes) -> None:
    """Raises `ValueError` for a pickle that would take more memory than it has bytes.

    `pickle` believes lengths and numbers of memo entries: ten bytes can make it allocate terabytes.
    `pickletools` reads lengths with care, the numbers are compared here.
    """
    for count, (opcode, number, _) in enumerate(pickletools.genops(content)):
        if opcode.name.endswith("PUT") and not 0 <= (number or 0) <= count:
            raise ValueError(f"memo entry {number} of {count}")


class _Recorded:
    """What stands for a name in a pickle: remembers how it was called and filled."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()):
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> _Recorded:
        return _Recorded(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array of bytes of which this is the record."""
        _, shape, dtype, fortran, content = self.state
        if self.name != "_reconstruct" or dtype.arguments[0] not in ("u1", b"u1") or fortran:
            raise ValueError("data is no array of bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Encoder:
    """Makes bytes of the texts as which Python 3 writes them for Python 2, up to so many."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, text: str, encoding: Any) -> bytes:
        self.room -= len(text)
        if self.room < 0 or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("bytes in no form that Python writes")
        return text.encode("latin-1")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("an encoder has no state")


class _PlainUnpickler(pickle.Unpickler):
    """Makes built-in containers and records of NumPy arrays only, so that no file can run code."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        # One for all: a text may stand in a pickle once and be meant a thousand times.
        self._encoder = _Encoder(len(content))

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 1, which wrote the original files, and NumPy 2 have arrays in different places.
        if (module, name) not in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        ):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a data file")
        return self._encoder if name == "encode" else _Recorded(name)


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
    return text.splitlines()[0][:200] if text else type(error).__name__
