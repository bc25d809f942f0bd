"""What the tests of the readers share."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest

from experiments.data.readers.files import DataError
from experiments.data.readers.pickles import read_cifar
from experiments.data.readers.pictures import ImageFiles

MIB = 2**20


PICTURES = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)


EXAMPLES = {"x_train": PICTURES, "y_train": np.arange(4)}
EXAMPLES |= {"x_test": PICTURES, "y_test": np.arange(4)}


@contextlib.contextmanager
def refused(match, memory=8 * MIB):
    """A block that ends in a `DataError` of one line, having taken less memory than that."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match) as caught:
            yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def read_picture(path, size=16):
    return ImageFiles([path], size, np.zeros(3), np.ones(3))[[0]]


def read_batch(path):
    return read_cifar(path.parent, {"train": [path.name]}, b"labels")
