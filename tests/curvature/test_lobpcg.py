"""LOBPCG on operators with prescribed spectra, against dense solutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from optax_accel.curvature import lobpcg
from tests.curvature.eigenproblems import check, like, operator


def test_lobpcg_agrees(x64):
    pairs = lobpcg(
        operator("outliers"), like(), 3, key=jax.random.key(0), num_products=2000, tolerance=1e-8
    )
    check(pairs, "outliers", "algebraic", 3, 1e-9)
    assert pairs.converged.all()
    assert pairs.num_products < 2000
    cut = lobpcg(operator("random"), like(), 3, key=jax.random.key(0), num_products=18)
    assert cut.num_products == 18
    assert not cut.converged.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_directions": 2}, "5 \\* `num_directions` < dimension, got 2 and 10"),
        ({"num_products": 5}, "at least 6 \\* `num_directions`, 6, got 5"),
        ({"key": None}, "needs a `key`"),
    ],
)
def test_lobpcg_refuses_what_it_cannot_do(changes, message):
    options = {"num_directions": 1, "num_products": 9, "key": jax.random.key(0), **changes}
    with pytest.raises(ValueError, match=message):
        lobpcg(lambda v: v, jnp.ones(10), **options)
