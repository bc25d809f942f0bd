"""Access to files: which exist, how large they may be, and errors of one line."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

LIMIT_VARIABLE = "OPTAX_ACCEL_DATA_LIMIT"
_LIMIT = 512  # MiB; the largest file of the tasks, CIFAR-10's arrays, has 176


class DataError(ValueError):
    """A data set is missing or broken; the message is one line for the person at the keyboard.

    Args:
      message: what is wrong with which file, and what is expected. Characters that would not show
        as themselves, such as line breaks in names of files, are replaced by their escapes.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def limit() -> int:
    """The most bytes that the content of one file may have, unpacked.

    The limit is 512 MiB unless the environment variable OPTAX_ACCEL_DATA_LIMIT sets another number
    of MiB.

    Returns:
      The limit in bytes.

    Raises:
      DataError: the variable is not a whole number from 1 to 9,999,999.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(_LIMIT)
    if not re.fullmatch("[0-9]{1,7}", text) or not int(text):
        raise DataError(f"{LIMIT_VARIABLE} is {text[:40]!r}, expected a number of MiB such as 512")
    return int(text) * 2**20


def check_size(name: Any, size: int) -> None:
    """Checks that content is within `limit`.

    Args:
      name: what the error message begins with, such as the path.
      size: bytes of the content, unpacked.

    Raises:
      DataError: there are more bytes than `limit`.
    """
    if size > limit():
        raise DataError(
            f"{name}: {size} bytes when unpacked, allowed are {limit()}; set {LIMIT_VARIABLE} to a "
            "number of MiB to allow more"
        )


def plain_or_gzipped(path: Path) -> Path:
    """The path of a file that may be gzipped.

    Args:
      path: the path of the plain file.

    Returns:
      The path, or the path with .gz appended if only that exists.
    """
    gzipped = path.with_name(path.name + ".gz")
    return gzipped if exists(gzipped) and not exists(path) else path


def exists(path: Path) -> bool:
    """Whether the path exists, even if it cannot be read, like a dangling link."""
    return os.path.lexists(path)


def find(folder: Path, candidates: Iterable[Sequence[str]], what: str) -> list[Path]:
    """The first group of files of which at least one exists, plain or gzipped.

    Args:
      folder: the folder that should hold the files.
      candidates: groups of file names, the preferred group first.
      what: what the files hold, for the error message.

    Returns:
      The paths of the group's files, each with .gz where only that exists.

    Raises:
      DataError: no group has a file in the folder.
    """
    groups = [*candidates]
    for names in groups:
        paths = [plain_or_gzipped(folder / name) for name in names]
        if any(map(exists, paths)):
            return paths
    expected = " or ".join(" and ".join(names) for names in groups)
    raise DataError(f"{folder}: no {what} here, expected {expected} (also .gz)")


@contextlib.contextmanager
def reading(name: Any, expected: str) -> Iterator[None]:
    """Turns every error raised inside its block into a `DataError`.

    Damaged files raise nearly everything: `zipfile` alone has eight kinds of errors.

    Args:
      name: what the error message begins with, such as the path.
      expected: what the file should be, for the message.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        encoded = isinstance(error, UnicodeDecodeError) and "UTF-8" not in expected
        hint = "; save it in UTF-8" if encoded else ""
        raise DataError(
            f"{name}: unreadable, expected {expected} ({reason(error)}){hint}"
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Args:
      path: the file.

    Returns:
      The open file, of bytes.

    Raises:
      DataError: the file is larger than `limit`.
      OSError: the path names anything but a regular file, or cannot be opened.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for a writer
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise OSError(f"this is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")
    check_size(path, status.st_size)
    return path.open("rb")


def read_bytes(path: Path, expected: str, *, unpack: bool = True) -> bytes:
    """The content of a file.

    Args:
      path: the file.
      expected: what the file should be, for error messages.
      unpack: whether to unpack a gzipped file, which its first bytes tell, not its name.

    Returns:
      The bytes, unpacked.

    Raises:
      DataError: the file is not a regular one, cannot be read or is too large.
    """
    with reading(path, expected), open_regular(path) as file:
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


def reason(error: Exception) -> str:
    """The first line of an error's message, without the path that an `OSError` repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0][:200] if text else type(error).__name__
