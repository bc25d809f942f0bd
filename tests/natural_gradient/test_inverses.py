"""Inverses, eigenvectors and changes of basis against explicit matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel._means import vary_over
from optax_accel.natural_gradient import inverses
from optax_accel.natural_gradient.factors import Kronecker, gram
from tests.helpers import over_workers


@pytest.mark.parametrize("size", [3, 401])
def test_wide_factors(x64, size):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2 * size, size)))
    matrix = gram(rows, (size, size)) / len(rows)
    want = np.asarray(rows).T @ np.asarray(rows) / len(rows)
    np.testing.assert_allclose(matrix, want, rtol=1e-12, atol=1e-12)
    inverse = inverses.damped_inverse(matrix, jnp.asarray(0.1))
    np.testing.assert_allclose(inverse @ (want + 0.1 * np.eye(size)), np.eye(size), atol=1e-12)


def test_ill_conditioned_factors_keep_their_digits():
    """A condition number of 1e5 leaves float32 two to three of its seven digits."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(105, 105)))
    matrix = ((basis * np.logspace(-5, 0, 105)) @ basis.T).astype(np.float32)
    got = inverses.damped_inverse(jnp.asarray(matrix), jnp.asarray(0.0))
    want = np.linalg.inv(matrix.astype(np.float64))
    assert np.linalg.norm(got - want) < 3e-3 * np.linalg.norm(want)


def test_diagonal_factors_and_split_damping(x64):
    values = np.array([1.0, 3.0])
    got = inverses.damped_inverse(jnp.asarray(values), jnp.asarray(0.1, jnp.float32))
    np.testing.assert_allclose(got, 1 / (values + np.float32(0.1)), rtol=1e-12)
    # Mean eigenvalues 4 and 1, 2 and 0 (nothing to go by): pi is 2 and 1.
    factors = [4 * np.eye(3), np.ones(2), np.diag([1.0, 2.0, 3.0]), np.zeros((2, 2))]
    strengths = inverses.split_damping([jnp.asarray(f) for f in factors], 0.01)
    np.testing.assert_allclose(strengths, [0.2, 0.05, 0.1, 0.1], rtol=1e-6)


def test_traces():
    """Of square matrices the diagonal, of all else everything."""
    shapes = [(3, 3), (2, 5), (4,), (5, 5), (), (2, 2, 2)]
    arrays = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes]
    want = [np.trace(a) if a.shape in ((3, 3), (5, 5)) else a.sum() for a in arrays]
    np.testing.assert_allclose(inverses.traces([jnp.asarray(a) for a in arrays]), want, rtol=1e-5)
    assert inverses.traces([]).shape == (0,)


def test_second_moments_follow_the_basis(x64):
    rng = np.random.default_rng(0)

    def basis(*sizes: int) -> Kronecker:
        return Kronecker(
            *(
                inverses.Eigen(jnp.ones(n), jnp.asarray(np.linalg.qr(rng.normal(size=(n, n)))[0]))
                for n in sizes
            )
        )

    old, new, moments = basis(3, 2), basis(3, 2), rng.uniform(size=(3, 2))
    u, v = (np.kron(b.inputs.eigenvectors, b.outputs.eigenvectors) for b in (old, new))
    matrix = (u * np.ravel(moments)) @ u.T
    got = inverses.change_basis(jnp.asarray(moments), old, new)
    np.testing.assert_allclose(np.ravel(got), np.diagonal(v.T @ matrix @ v), rtol=1e-12)


def test_each_inverse_is_computed_once():
    """By one device of the axis; and sent to the others in one all-reduce with the others."""
    calls = []

    def function(factor: jax.Array) -> jax.Array:
        jax.debug.callback(lambda index: calls.append(int(index)), jax.lax.axis_index("workers"))
        return 2 * factor

    def worker(_: Any) -> Any:
        factors = [(jnp.full((n, n), float(n)),) for n in (5, 1, 4, 2, 3)]
        return inverses.share(
            function, factors, "workers", lambda tree: vary_over(tree, "workers"), [False] * 5
        )

    results = over_workers("shard_map", worker, 4)(jnp.zeros((4, 1)))
    jax.effects_barrier()
    for n, result in zip((5, 1, 4, 2, 3), results, strict=True):
        np.testing.assert_array_equal(result, np.full((4, n, n), 2.0 * n))
    # The largest alone, the smallest two together.
    assert sorted(calls) == [0, 1, 2, 3, 3]
