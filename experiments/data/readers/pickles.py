"""CIFAR's Python batches: pickles of which no code is run."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.readers.arrays import Arrays
from experiments.data.readers.files import read_bytes, reading


def read_cifar(folder: Path, files: dict[str, list[str]], labels: bytes) -> Arrays:
    """Reads CIFAR's folder of Python batches.

    Args:
      folder: the folder.
      files: names of the files, under the keys ``"train"`` and ``"test"``.
      labels: key of the labels in the files, such as ``b"fine_labels"``.

    Returns:
      The arrays `x_train`, `y_train`, `x_test` and `y_test`.

    Raises:
      DataError: a file is damaged or holds anything but pictures and labels.
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
    with reading(path, expected):
        _check_pickle(content)
        batch = _PlainUnpickler(content).load()
        if type(batch) is not dict or not {b"data", labels} <= batch.keys():
            raise ValueError("not a dictionary of them")
        x, y = batch[b"data"], batch[labels]
        if type(y) is not list or not all(type(label) is int for label in y):
            raise ValueError(f"{labels.decode()} is not a list of integers")
        if type(x) is not _Recorded:
            raise ValueError("data is not an array of bytes")
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
    """Stands for a class or function that a pickle names; records its arguments and state."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()):
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> _Recorded:
        return _Recorded(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array of bytes that was recorded."""
        _, shape, dtype, fortran, content = self.state
        if self.name != "_reconstruct" or dtype.arguments[0] not in ("u1", b"u1") or fortran:
            raise ValueError("data is not an array of bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Encoder:
    """Makes bytes of the text that Python 3 writes in their place for Python 2, `room` at most."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, text: str, encoding: Any) -> bytes:
        self.room -= len(text)
        if self.room < 0 or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("bytes in a form that Python does not write")
        return text.encode("latin-1")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("an encoder has no state")


class _PlainUnpickler(pickle.Unpickler):
    """Makes built-in containers and records of NumPy arrays only, so that no file can run code."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        # One for the whole pickle, which may refer to a single text a thousand times.
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
