"""Pickles that are not batches of CIFAR's."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest

from tests.experiments.data.readers.helpers import read_batch, refused

LABELS = b"C\x06labels"  # opcodes of protocol 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Puts what is on the stack at a place of the memo that has to be made first.
        (b"\x80\x03}r\xff\xff\xff\x7f.", "memo entry 2147483647 of 2"),
        (b"\x80\x03}p4294967295\n.", "memo entry 4294967295 of 2"),
        (b"\x80\x03}p-1\n.", "memo entry -1 of 2"),
        # Promises bytes.
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40), "unreadable, expected a CIFAR python batch"),
        # Makes an array, of whatever is in memory, instead of filling one.
        (b"\x80\x03}(C\x04datacnumpy\nndarray\nJ\x00\x00\x00\x40\x85R" + LABELS + b"]u.", "data"),
        (b"\x80\x03}(C\x04datacnumpy\nndarray\nX\x01\0\0\0b" + LABELS + b"]u.", "data"),
        # Lists in lists, each ten times.
        (b"\x80\x03}(C\x04dataN" + LABELS + b"](K\x01K\x01]h\0e" + b"u.", "unreadable"),
        (pickle.dumps({b"data": 1, b"labels": [[1]]}), "labels is not a list of integers"),
        (pickle.dumps({b"data": 1, b"labels": [1.0]}), "labels is not a list of integers"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "data is not an array of bytes"),
        (pickle.dumps({b"data": np.zeros(3072), b"labels": [1]}, protocol=2), "not an array of"),
        # Makes one text into bytes again and again.
        (b"\x80\x03c_codecs\nencode\nq\0X\x40\0\0\0" + b"a" * 64 + b"q\1X\6\0\0\0latin1q\2"
         + 9 * b"h\0h\1h\2\x86R" + b".", "bytes in a form that Python does not write"),
        (b"\x80\x03c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0zip\x86R.", "a form that Python does not"),
        (b"\x80\x03c_codecs\nencode\n}X\4\0\0\0roomJ\0\0\0\x40sb.", "an encoder has no state"),
        (b"\x80\x03cnumpy\nfromfile\n.", "numpy.fromfile does not belong in a data file"),
    ],
)  # fmt: skip
def test_pickles_of_cifar(path, content, message):
    path.write_bytes(content)
    with refused(message):
        read_batch(path)
