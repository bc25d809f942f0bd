"""Split networks and a batch for the tests of the training step."""

from __future__ import annotations

import pytest
from flax import nnx

from experiments.training import networks
from tests.experiments.training.small_networks import Mlp, NormDropout, make_batch


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def mlp():
    return networks.split(Mlp(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def norm_dropout():
    return networks.split(NormDropout(nnx.Rngs(0)))
