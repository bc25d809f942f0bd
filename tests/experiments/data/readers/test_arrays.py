"""Headers and lists of members that promise more than their files hold."""

from __future__ import annotations

import io
import os
import struct
import zipfile

import numpy as np
import pytest

from experiments.data.readers.arrays import read_idx, read_npz
from tests.experiments.data.readers.helpers import EXAMPLES, PICTURES, refused


def write_npz(path, changed=None, content=b"", **info):
    """A file whose array `x_train`, or one of another name, has this content."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in EXAMPLES.items():
            file = io.BytesIO()
            np.save(file, array)
            if name != "x_train" or changed is None:
                archive.writestr(f"{name}.npy", file.getvalue())
            else:
                archive.writestr(changed, content or file.getvalue(), **info)


def npy(shape, descr="'|u1'", version=1, content=b"", length=None):
    """The header of an array in NumPy's format."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("(1000000000, 28, 28)"), "x_train has 0 bytes, expected 784000000000 for uint8"),
        (npy(f"({2**70}, 8)"), "x_train has a damaged header"),
        (npy("(-2, -2)", content=bytes(4)), "x_train has a damaged header"),
        (npy("(True,)", content=b"1"), "x_train has a damaged header"),
        (npy("[4]", content=bytes(4)), "x_train has a damaged header"),
        (npy("(4,)", content=bytes(9)), "x_train has 9 bytes, expected 4 for uint8 of shape"),
        (npy("(1,) * 10**9"), "x_train has a damaged header"),
        (npy("(" * 4_000), "x_train has a damaged header"),
        (npy("(4,)", "'|O'", content=bytes(32)), "x_train is of type '|O', expected numbers"),
        (npy("(4,)", "'<U1'", content=bytes(16)), "x_train is of type '<U1'"),
        (npy("(4,)", "'<c16'", content=bytes(64)), "x_train is of type '<c16'"),
        (npy("(4,)", "'i1,i1'", content=bytes(8)), "x_train is of type 'i1,i1'"),
        (npy("(4,)", "[('a', 'i1')]", content=bytes(4)), r"x_train is of type \"\[\('a', 'i1'"),
        (npy("(4,)", version=4, content=bytes(4)), "expected an array in NumPy's format"),
        (npy("(4,)", version=2, length=2**31), "a header of 2147483648 bytes, allowed are 10000"),
        (npy("(4,)", length=9), "x_train has a damaged header"),
        (b"\x93NUMPY", "expected an array in NumPy's format"),
        (b"text", "expected an array in NumPy's format"),
    ],
)
def test_headers_of_arrays(path, content, message):
    write_npz(path, "x_train.npy", content)
    with refused(message.replace("|", r"\|")):
        read_npz(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_all_versions_of_the_format_of_arrays(path, version):
    array = np.asfortranarray(PICTURES.astype(">i2"))
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(version, 0))
    write_npz(path, "x_train.npy", file.getvalue())
    np.testing.assert_array_equal(read_npz(path)["x_train"], PICTURES)


def test_members_that_cannot_be_read(path):
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_npz(path, "x_train.npy", compress_type=method)
        with refused(f"x_train is compressed by method {method}, expected 0 .* or 8"):
            read_npz(path)
    for name in ("../x_train.npy", "/x_train.npy", "x_train.npy/"):
        write_npz(path, name)
        with refused("no array x_train; expected x_train, y_train"):
            read_npz(path)
    for name in ("y_train.npy", "y_train"):
        with pytest.warns(UserWarning, match="Duplicate") if "." in name else open(os.devnull):
            write_npz(path, "x_train.npy")
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, b"")
        with refused("2 arrays y_train, expected one"):
            read_npz(path)
    write_npz(path)
    whole = path.read_bytes()
    # In the list of members: flags, method, size before and after.
    entry = whole.index(b"PK\1\2")
    for position, value, message in (
        (8, struct.pack("<H", 1), "x_train is encrypted"),
        (8, struct.pack("<H", 0x41), "x_train is encrypted"),
        (10, struct.pack("<H", 99), "x_train is compressed by method 99"),
        (24, struct.pack("<I", 2**28), "384 bytes cannot hold the 268435456 that the file"),
        (20, struct.pack("<II", 2**28, 2**28), "bytes cannot hold the 268435456"),
        (16, bytes(4), "Bad CRC-32"),
    ):
        changed = bytearray(whole)
        changed[entry + position : entry + position + len(value)] = value
        path.write_bytes(changed)
        with refused(message):
            read_npz(path)


def test_a_list_of_a_million_members_is_not_read(path):
    entry = b"PK\1\2" + bytes(42)
    count = 2**15
    end = struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, count, count, count * len(entry), 0, 0)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, count * len(entry), 0)
    wide += struct.pack("<4sIQI", b"PK\6\7", 0, count * len(entry), 1)
    for content in (end, end[:-2] + b"\2\0ok", wide + end[:12] + bytes(8) + end[20:]):
        path.write_bytes(count * entry + content)
        with refused("a list of members of 1507328 bytes, allowed are 1048576"):
            read_npz(path)


@pytest.mark.parametrize("shape", [(0, 2**32 - 1, 2**32 - 1), (2**32 - 1,) * 3, (0, 0, 0)])
def test_sizes_of_idx_files(path, shape):
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *shape))
    with refused("at least one entry" if 0 in shape else "16 bytes, expected 79228162458924105"):
        read_idx(path, 3)
