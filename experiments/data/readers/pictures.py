"""Pictures: JPEG and PNG files, folders of them, and arrays of JPEG files."""

from __future__ import annotations

import collections
import io
import itertools
import math
import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.data.readers.arrays import Arrays, read_npz
from experiments.data.readers.files import DataError, check_size, read_bytes, reading, reason

_SUFFIXES = (".jpeg", ".jpg", ".png")
_FORMATS = ("JPEG", "PNG")
# The most pixels of one picture: where Pillow begins to warn, 256 MiB in RGB.
_MOST_PIXELS = 89_478_485
# Bytes of decoded pictures that are kept in memory.
_CACHE_BYTES = 2**30
# Up to this many bytes of pictures enter a checksum whole; of more bytes, this many files do.
_CHECKSUM_BYTES, _CHECKSUM_FILES = 2**28, 64


def decode(
    content: bytes, name: Any, mode: str | None, shape: tuple[int, ...] | None = None
) -> Image.Image:
    """Decodes a JPEG or PNG picture.

    Args:
      content: the bytes of the file.
      name: what the error message begins with.
      mode: mode of Pillow's to convert to; None keeps gray pictures gray and the rest in color.
      shape: height and width that the picture must have; None allows any.

    Returns:
      The picture.

    Raises:
      DataError: the picture is damaged, in another format, too large or of another shape.
    """
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
        raise DataError(
            f"{name}: not a readable picture, expected {expected}; replace or remove it"
        ) from error
    except Exception as error:  # a damaged picture can raise anything
        raise DataError(
            f"{name}: not a readable picture ({reason(error)}); replace or remove it"
        ) from error


def read_gray(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Reads a picture file in gray.

    Args:
      path: the file.
      shape: height and width that the picture must have; None allows any.

    Returns:
      An array of bytes of shape (height, width).

    Raises:
      DataError: the picture is damaged, neither JPEG nor PNG, or of another shape.
    """
    return np.asarray(decode(read_bytes(path, "a picture", unpack=False), path, "L", shape))


def shape_of(path: Path) -> tuple[int, int, int]:
    """Height, width and channels of a picture file, as its header says.

    Args:
      path: the file.

    Returns:
      The height and the width in pixels, and 1 for a gray picture or 3 for one in color.

    Raises:
      DataError: the file cannot be read, or is neither JPEG nor PNG.
    """
    content = read_bytes(path, "a picture", unpack=False)
    with reading(path, "a picture, " + " or ".join(_FORMATS)):
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        return image.height, image.width, 1 if image.mode in ("1", "L") else 3


def decode_jpegs(path: Path, shape: tuple[int, ...]) -> Arrays:
    """Reads an `.npz` file that holds JPEG files of one shape.

    For each of train and test there are three arrays: `jpeg_*`, the bytes of all pictures one after
    the other; `off_*`, where each picture begins and the last one ends; and `y_*`, the labels.

    Args:
      path: the file.
      shape: height, width and channels of each picture.

    Returns:
      The decoded pictures and their labels, `x_train`, `y_train`, `x_test` and `y_test`.

    Raises:
      DataError: the file or a picture in it is damaged or of another shape.
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
            x[i] = np.asarray(decode(jpeg[start:end].tobytes(), name, "RGB", shape[:2]))
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    return arrays


def list_images(folder: Path) -> list[Path]:
    """The picture files of a folder, shorter names first, so that 2.png comes before 10.png.

    Args:
      folder: the folder; folders inside it are not searched.

    Returns:
      The paths of the files whose names end with .jpeg, .jpg or .png.

    Raises:
      DataError: the folder cannot be read, or something that is not a file has a picture's name.
    """
    with reading(folder, "a folder of pictures"), os.scandir(folder) as entries:
        pictures = [e for e in entries if os.path.splitext(e.name)[1].lower() in _SUFFIXES]
        for entry in pictures:
            if not (os.path.isfile(entry) if entry.is_symlink() else entry.is_file()):
                raise DataError(f"{folder / entry.name}: not a regular file, expected a picture")
    names = sorted((entry.name for entry in pictures), key=lambda name: (len(name), name))
    return [folder / name for name in names]


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The picture files of a folder that holds one folder per class.

    Args:
      folder: the folder.

    Returns:
      The paths of each class under its name, which is that of its folder.

    Raises:
      DataError: there is no class, or a class has no pictures.
    """
    folders = []
    if os.path.isdir(folder):
        with reading(folder, "one folder for each class"):
            folders = sorted(path for path in folder.iterdir() if path.is_dir())
    classes = {path.name: list_images(path) for path in folders}
    if not classes:
        raise DataError(f"{folder}: expected one folder for each class, with its pictures")
    for name, paths in classes.items():
        if not paths:
            expected = ", ".join(_SUFFIXES)
            raise DataError(f"{folder / name}: no pictures here, expected files {expected}")
    return classes


def describe_others(folders: Iterable[Path]) -> str | None:
    """What else than pictures there is in the folders of `list_classes`, and is not read.

    Args:
      folders: folders of one folder per class.

    Returns:
      One line for people; None if there are only pictures.
    """
    classes = [path for folder in folders for path in folder.iterdir() if path.is_dir()]
    files = [path for inside in classes for path in inside.iterdir() if path.is_file()]
    others = [path.suffix.lower() for path in files if path.suffix.lower() not in _SUFFIXES]
    kinds = collections.Counter(suffix or "no suffix" for suffix in others)
    if not kinds:
        return None
    listed = ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common())
    return f"not read, as these are no pictures: {listed}; pictures are {', '.join(_SUFFIXES)}"


class ImageFiles:
    """Picture files as an array of examples, each read when it is first needed.

    `files[rows]`, for a slice or an array of numbers, is float32 of shape (rows, size, size,
    channels): the square in the middle of each picture, scaled to `size` and standardized. Pictures
    stay in memory, as bytes, until they fill 1 GiB.

    Args:
      paths: the files.
      size: height and width of an example.
      mean: mean of each channel, on the scale of bytes, 0 to 255.
      std: standard deviation of each channel, on the same scale.
      channels: 3 for pictures in color, 1 for gray ones.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        mean: np.ndarray,
        std: np.ndarray,
        channels: int = 3,
    ):
        self.shape = (len(paths), size, size, channels)
        self._paths = paths
        self._mean, self._std = mean.astype(np.float32), std.astype(np.float32)
        self._cache: dict[int, np.ndarray] = {}
        self._room = _CACHE_BYTES // (channels * size * size)
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
        """A checksum of the files.

        It covers the names and sizes of classes and files. Up to 256 MiB of files enter with their
        whole content; beyond that, the times of their last change enter instead, and the content
        of 64 files, evenly spread. Copy a large folder with its times (`cp -a`, `rsync -a`).

        Returns:
          A number of 32 bits.

        Raises:
          DataError: a file cannot be read.
        """
        try:
            stats = [path.stat() for path in self._paths]
        except OSError as error:
            raise DataError(f"{error.filename}: unreadable ({reason(error)})") from error
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
        mode = "L" if self.shape[-1] == 1 else "RGB"
        image = decode(read_bytes(path, "a picture", unpack=False), path, mode)
        # Cut before it is scaled: a thin picture, scaled as a whole, would become very long.
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        pixels = np.asarray(
            image.resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
            )
        ).reshape(self.shape[1:])
        with self._lock:
            if len(self._cache) < self._room:
                self._cache[number] = pixels
        return pixels
