"""Arrays of numbers: NumPy's `.npz` and `.npy` files and the IDX files of MNIST."""

from __future__ import annotations

import ast
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from experiments.data.readers.files import (
    DataError,
    check_size,
    open_regular,
    read_bytes,
    reading,
)

# Arrays by name, usually x_train, y_train, x_test and y_test.
Arrays = dict[str, np.ndarray]
EXAMPLES = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path, names: Sequence[str] = EXAMPLES, *, text: bool = False) -> Arrays:
    """Reads arrays of numbers from an `.npz` file, stored or deflated.

    Args:
      path: the file.
      names: names of the arrays to read; others are ignored.
      text: whether arrays of texts are allowed too.

    Returns:
      The arrays by name.

    Raises:
      DataError: the file is damaged, encrypted or too large, or an array is missing, duplicated or
        not made of numbers.
    """
    with reading(path, "an .npz file"), open_regular(path) as file:
        _check_directory(path, file)
        with zipfile.ZipFile(file) as archive:
            members: dict[str, list[zipfile.ZipInfo]] = {name: [] for name in names}
            for member in archive.infolist():
                if (name := member.filename.removesuffix(".npy")) in members:
                    members[name].append(member)
            if missing := [name for name in names if not members[name]]:
                raise DataError(
                    f"{path}: no array {', '.join(missing)}; expected {', '.join(names)}"
                )
            for name, alike in members.items():
                if len(alike) > 1:
                    raise DataError(f"{path}: {len(alike)} arrays {name}, expected one")
                _check_member(f"{path}: {name}", alike[0], path.stat().st_size)
            check_size(path, sum(member.file_size for (member,) in members.values()))
            arrays = {}
            for name, (member,) in members.items():
                with archive.open(member) as stream:
                    arrays[name] = _read_npy(f"{path}: {name}", stream, member.file_size, text)
            return arrays


def describe_npz(path: Path) -> dict[str, str]:
    """What an `.npz` file contains, read from the headers alone.

    Args:
      path: the file.

    Returns:
      The type and the shape of each array as text, by its name.

    Raises:
      DataError: the file is damaged, or a header is none of an array of numbers or texts.
    """
    with reading(path, "an .npz file"), open_regular(path) as file:
        _check_directory(path, file)
        described = {}
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                _check_member(f"{path}: {name}", member, path.stat().st_size)
                with archive.open(member) as stream:
                    dtype, shape, _, _ = _read_header(f"{path}: {name}", stream, True)
                described[name] = f"{dtype} of shape {shape}"
        return described


def read_npy(path: Path, *, text: bool = False) -> np.ndarray:
    """Reads an array of numbers from an `.npy` file.

    Args:
      path: the file.
      text: whether an array of texts is allowed too.

    Returns:
      The array.

    Raises:
      DataError: the file is damaged, too large or not made of numbers.
    """
    with reading(path, "an .npy file"), open_regular(path) as file:
        return _read_npy(str(path), file, path.stat().st_size, text)


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Raises `DataError` if a zip file's list of members is too long for a file of arrays."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 2**16 - 98))  # the longest comment, and the three records of the end
    tail = file.read()
    record = len(tail) - 22  # if the file has no comment
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
    """Raises `DataError` for a member that the file cannot hold or `zipfile` cannot read."""
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


def _read_npy(name: str, stream: Any, size: int, text: bool = False) -> np.ndarray:
    """Reads an array in NumPy's format from a stream of `size` bytes.

    `numpy.lib.format` would allocate the array that a header describes before it knows whether the
    stream holds as much.
    """
    dtype, shape, fortran, start = _read_header(name, stream, text)
    expected = math.prod(shape) * dtype.itemsize
    if start + expected != size:
        raise DataError(
            f"{name} has {size - start} bytes, expected {expected} for {dtype} of shape {shape}"
        )
    # Read to the end, where the checksum is compared.
    content = np.frombuffer(stream.read(expected + 1), dtype)
    return content.reshape(shape, order="F" if fortran else "C")


def _read_header(
    name: str, stream: Any, text: bool
) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Type, shape and order of an array in NumPy's format, and the bytes of its header."""
    start = stream.read(12)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise DataError(f"{name} starts with {start[:8]!r}, expected an array in NumPy's format")
    width, before = (2, 10) if start[6] == 1 else (4, 12)
    length = int.from_bytes(start[8 : 8 + width], "little")
    if length > 10_000:  # as many as NumPy allows
        raise DataError(f"{name} has a header of {length} bytes, allowed are 10000")
    header = start[before:] + stream.read(length + before - 12)
    types = r"[<>|=]?([biu][1248]|f[248])" + (r"|[<>|=]?U[1-9][0-9]{0,3}" if text else "")
    try:
        described = ast.literal_eval(header.decode("utf-8" if start[6] == 3 else "latin-1"))
        descr, fortran, shape = (described[key] for key in ("descr", "fortran_order", "shape"))
        if type(descr) is not str or not re.fullmatch(types, descr):
            expected = "numbers or texts" if text else "numbers"
            raise DataError(f"{name} is of type {str(descr)[:40]!r}, expected {expected}")
        dtype = np.dtype(descr)
        if type(shape) is not tuple or len(shape) > 8:
            raise ValueError("not the shape of an array")
        if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise ValueError("not the sizes of an array")
    except DataError:
        raise
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise DataError(f"{name} has a damaged header, expected one of numbers") from error
    return dtype, shape, bool(fortran), before + length


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an array of bytes in the format of yann.lecun.com/exdb/mnist.

    The format is a magic number, the size of each axis, then the bytes.

    Args:
      path: the file, gzipped or not.
      ndim: number of axes that the array must have.

    Returns:
      The array.

    Raises:
      DataError: the file is damaged or in another format, or the array has another number of axes
        or no entry.
    """
    content = read_bytes(path, "an IDX file, gzipped or not")
    # Two zero bytes, the type (8: unsigned bytes), the number of dimensions.
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
        raise DataError(
            f"{path}: starts with 0x{content[:4].hex()}, expected IDX magic number 0x{magic.hex()}"
        )
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
