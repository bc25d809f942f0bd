"""Arrays of pictures that the tests of the data share."""

from __future__ import annotations

import pytest

from tests.experiments.data.files import arrays


@pytest.fixture(scope="module")
def mnist():
    return arrays((28, 28))


@pytest.fixture(scope="module")
def cifar():
    return arrays((32, 32, 3))
