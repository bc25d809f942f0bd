"""Diagonals of operators against dense ones, and XDiag against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel.curvature import diagonal
from optax_accel.curvature.estimates import random_block
from tests.curvature.rotated_matrices import SIZE, operator, over_keys, split


def flat(tree):
    return np.concatenate([np.asarray(tree["a"]).reshape(*tree["b"].shape[:-1], 40), tree["b"]], -1)


def by_definition(matrix, probes):
    """The mean of the estimates, each with a span of its own, and its standard error."""
    samples = []
    for i in range(probes.shape[1]):
        others, _ = np.linalg.qr(matrix @ np.delete(probes, i, axis=1))
        projected = others @ (others.T @ matrix)
        rest = (matrix - projected) @ probes[:, i]
        samples.append(np.diag(projected) + probes[:, i] * rest)
    return np.mean(samples, axis=0), np.std(samples, axis=0, ddof=1) / len(samples) ** 0.5


@pytest.mark.parametrize("name", ["outliers", "indefinite", "random"])
def test_xdiag_is_what_its_definition_says(x64, name):
    product = operator(name)
    found = diagonal(product, key=1, num_products=21)
    assert (found.num_products, found.num_samples) == (20, 10)
    like = jax.tree.map(jnp.asarray, product.like)
    probes = flat(random_block(jax.random.key(1), jax.eval_shape(lambda: like), 10, "rademacher")).T
    want, error = by_definition(np.asarray(product.matrix), probes)
    np.testing.assert_allclose(flat(found.diagonal), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(flat(found.standard_error), error, rtol=1e-7, atol=1e-9)
    stochtrace = pytest.importorskip("matfree.stochtrace")
    if hasattr(stochtrace, "leave_one_out_xdiag"):
        with jax.numpy_rank_promotion("allow"):
            estimate = stochtrace.leave_one_out_xdiag()
            each = estimate(lambda v: product.matrix @ v, jnp.asarray(probes.T))
        np.testing.assert_allclose(flat(found.diagonal), np.mean(each, axis=0), atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_low_rank_matrices_are_exact(x64, dtype):
    product = operator("rank_deficient")
    exact = np.diag(product.matrix)
    product.matrix = product.matrix.astype(dtype)
    product.like = jax.tree.map(lambda x: x.astype(dtype), product.like)
    found = diagonal(product, key=0, num_products=16)
    atol = 1e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(flat(found.diagonal), exact, atol=atol)
    np.testing.assert_allclose(flat(found.standard_error), 0, atol=atol)


def test_estimates_are_unbiased_and_xdiag_is_better(x64):
    product = operator("outliers")
    exact = np.diag(product.matrix)
    errors = {}
    for method in ("xdiag", "hutchinson"):
        found = over_keys(
            lambda key, method=method: diagonal(product, key=key, num_products=16, method=method),
            300,
        )
        values, spread = flat(found.diagonal), flat(found.standard_error)
        deviations = np.std(values, axis=0)
        bias = np.mean(values, axis=0) - exact
        assert np.abs(bias / (deviations / 300**0.5)).max() < 4.5  # of 60 entries
        errors[method] = np.sqrt(np.mean((values - exact) ** 2))
        ratio = np.sqrt(np.mean(spread**2) / np.mean(deviations**2))
        assert 0.6 < ratio < 1.6, method
    assert errors["xdiag"] < errors["hutchinson"] / 5


def test_enough_products_make_it_exact(x64):
    product = operator("random")
    for method in ("xdiag", "hutchinson"):
        found = diagonal(product, key=0, num_products=SIZE, method=method)
        np.testing.assert_allclose(flat(found.diagonal), np.diag(product.matrix), atol=1e-12)
        assert (found.num_products, found.num_samples) == (SIZE, 0)
        assert not flat(found.standard_error).any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_numbers_of_any_size(scale):
    basis = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    factors = jnp.asarray(basis), jnp.float32(scale) * jnp.asarray(basis)
    found = diagonal(
        lambda v: factors[1].T @ (factors[0] @ v), key=0, num_products=8, like=basis[0]
    )
    np.testing.assert_allclose(found.diagonal / scale, np.sum(basis**2, axis=0), atol=1e-5)
    zero = diagonal(lambda v: 0 * v, key=0, num_products=8, like=jnp.zeros(12))
    assert not zero.diagonal.any()
    assert not zero.standard_error.any()


def test_one_sample_shows_no_spread():
    found = diagonal(
        lambda v: v, key=0, num_products=1, method="hutchinson", like=split(np.zeros(SIZE, "f"))
    )
    np.testing.assert_allclose(flat(found.diagonal), 1)
    assert np.isnan(flat(found.standard_error)).all()
    with pytest.raises(ValueError, match="`num_products` must be at least 4, got 3"):
        diagonal(lambda v: v, key=0, num_products=3, like=jnp.zeros(9))
    with pytest.raises(ValueError, match="`method` must be one of 'xdiag', 'hutchinson'"):
        diagonal(lambda v: v, key=0, method="xtrace", like=jnp.zeros(9))
