"""The tracker that solves from scratch."""

from __future__ import annotations

import jax
import numpy as np

import optax_accel as oa
from tests.curvature.outlier_network import (
    PARAMS,
    K,
    exact,
    objective,
)


def test_exact_says_what_it_took() -> None:
    tracker = oa.ExactTracker(tolerance=1e-3)
    space = jax.jit(lambda p: tracker.refresh(tracker.init(p, K), objective(), p, p))(PARAMS)
    assert K < space.memory.num_products <= 20 * K
    np.testing.assert_allclose(space.eigenvalues, exact(PARAMS)[0], rtol=1e-3)
