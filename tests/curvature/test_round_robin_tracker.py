"""The tracker that makes one curvature product at every step."""

from __future__ import annotations

import jax

import optax_accel as oa
from tests.curvature.outlier_network import (
    PARAMS,
    K,
    objective,
)
from tests.helpers import tree_allclose, tree_equal


def test_round_robin_is_a_block_sweep_when_parameters_rest() -> None:
    block, robin = oa.BlockTracker(), oa.RoundRobinTracker()
    want, got = jax.jit(lambda p: (block.init(p, K), robin.init(p, K)))(PARAMS)
    tree_equal(got.basis, want.basis)
    want = jax.jit(lambda s: block.refresh(s, objective(), PARAMS, PARAMS, cold=False))(want)
    one = jax.jit(lambda s: robin.refresh(s, objective(), PARAMS, PARAMS, cold=False))
    for i in range(K):
        assert got.memory.position == i
        assert not got.ready
        got = one(got)
    assert got.memory.position == 0
    tree_allclose(got.basis, want.basis, rtol=1e-5)
    tree_allclose(got.eigenvalues, want.eigenvalues, rtol=1e-5)
