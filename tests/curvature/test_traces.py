"""Traces, norms and energy shares of operators with prescribed spectra."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from optax_accel import curvature
from optax_accel.curvature import (
    energy_shares,
    frobenius_norm,
    trace,
)
from tests.curvature.rotated_matrices import (
    ROTATION,
    SIZE,
    SPECTRA,
    Matrix,
    operator,
    over_keys,
    split,
)


def check_calibration(values, errors, truth):
    """The truth lies within 2 and 3 standard errors as often as for a normal distribution.

    Nearly: 20 to 30 samples estimate their spread with an error, and squares are skewed.
    """
    deviation = np.abs(values - truth) / errors
    assert 0.88 <= np.mean(deviation < 2) <= 0.99
    assert np.mean(deviation < 3) >= 0.97
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize(("method", "num_products"), [("hutch++", 54), ("hutchinson", 24)])
def test_error_bars_of_trace_and_norm_are_calibrated(x64, method, num_products):
    eigenvalues = SPECTRA["indefinite"]
    settings = {"num_products": num_products, "method": method}
    matrix = operator("indefinite")
    by_trace, by_norm = over_keys(
        lambda key: tuple(
            estimate(matrix, key=key, **settings)[:2] for estimate in (trace, frobenius_norm)
        ),
        300,
    )
    check_calibration(*by_trace, eigenvalues.sum())
    check_calibration(*by_norm, np.linalg.norm(eigenvalues))


def test_hutch_plus_plus_is_more_precise_on_outliers(x64):
    errors = {
        method: over_keys(
            lambda key, m=method: trace(operator("outliers"), key=key, num_products=30, method=m),
            50,
        )[1].mean()
        for method in ("hutch++", "hutchinson")
    }
    assert 5 * errors["hutch++"] < errors["hutchinson"]


@pytest.mark.parametrize("name", SPECTRA)
def test_enough_products_make_it_exact(x64, name):
    product, eigenvalues = operator(name), SPECTRA[name]
    value, error, num_products, _ = trace(product, key=0, num_products=100)
    np.testing.assert_allclose(value, eigenvalues.sum(), rtol=1e-10)
    assert (error, num_products) == (0, SIZE)
    value, error, num_products, _ = frobenius_norm(product, key=0, num_products=60)
    np.testing.assert_allclose(value, np.linalg.norm(eigenvalues), rtol=1e-10)
    assert (error, num_products) == (0, SIZE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hutch_plus_plus_is_exact_for_low_rank(x64, dtype):
    eigenvalues = SPECTRA["rank_deficient"]
    matrix = jnp.asarray((ROTATION * eigenvalues) @ ROTATION.T, dtype)
    tolerance = 100 * jnp.finfo(dtype).eps
    for estimate, want in ((trace, eigenvalues.sum()), (frobenius_norm, np.sqrt(54))):
        value, error, count, _ = estimate(Matrix(matrix), key=0, num_products=30)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, want, rtol=tolerance)
        assert error < tolerance * want
        assert count == 30


def test_zero_matrices_and_empty_trees():
    for estimate in (trace, frobenius_norm):
        got = estimate(lambda v: 0 * v, key=0, num_products=12, like=jnp.ones(50))
        assert got[:2] == (0, 0)
        assert estimate(lambda v: v, key=0, like={}) == (0, 0, 0, 0)


def top_basis(k):
    return split(jnp.asarray(ROTATION[:, :k].T))


def test_golden_energy_shares(x64):
    """Spec B: f = w1 w2, target 5, w = (2, 3), the leading eigenvector of the Hessian."""
    objective = oa.Objective(lambda w: w[0] * w[1], lambda f: 0.5 * (f - 5) ** 2)
    w = jnp.array([2.0, 3.0])
    u = jnp.array([[0.8174155605, 0.5760484368]])
    want = {
        curvature.hessian: (194.1294468576 / 195, 13.9330343737 / 13),
        curvature.gauss_newton: (168.8868020068 / 169, 12.9912924621 / 13),
        curvature.functional_hessian: (1 / 2, np.inf),  # its trace is zero
    }
    for build, (frobenius, by_trace) in want.items():
        shares = energy_shares(build(objective, w), u, key=0)
        np.testing.assert_allclose(shares.frobenius.value, frobenius, rtol=1e-9)
        assert shares.frobenius[1:] == (0, 3, 0)
        if np.isfinite(by_trace):
            np.testing.assert_allclose(shares.trace.value, by_trace, rtol=1e-9)
        else:
            assert not abs(shares.trace.value) < 1e6


@pytest.mark.parametrize("name", ["random", "outliers"])
def test_error_bars_of_shares_are_calibrated(x64, name):
    eigenvalues, k = SPECTRA[name], 3
    energy = eigenvalues**2
    product, basis = operator(name), top_basis(k)
    shares = functools.partial(energy_shares, product, basis, num_probes=24)
    frobenius, by_trace = over_keys(lambda key: [s[:2] for s in shares(key=key)], 300)
    values, errors = frobenius
    check_calibration(values, errors, energy[:k].sum() / energy.sum())
    assert np.all((values >= 0) & (values <= 1))
    if name == "outliers":
        check_calibration(*by_trace, eigenvalues[:k].sum() / eigenvalues.sum())


def test_shares_at_the_borders(x64):
    product = operator("random")
    every = energy_shares(product, top_basis(SIZE), key=0)
    np.testing.assert_allclose([every.frobenius.value, every.trace.value], 1, rtol=1e-10)
    none = energy_shares(product, top_basis(0), key=0)
    assert (none.frobenius.value, none.trace.value) == (0, 0)
    zero = energy_shares(lambda v: jax.tree.map(jnp.zeros_like, v), top_basis(2), key=0)
    assert np.isnan(zero.frobenius.value)
    assert np.isnan(zero.trace.value)


@pytest.mark.parametrize("size", [1e-25, 1e20, 1e30])
@pytest.mark.parametrize("name", ["outliers", "rank_deficient"])
def test_squares_neither_overflow_nor_underflow(name, size):
    matrix = jnp.asarray((ROTATION * SPECTRA[name]) @ ROTATION.T, jnp.float32)
    small, large = Matrix(matrix), Matrix(jnp.float32(size) * matrix)
    for estimate in (trace, frobenius_norm):
        for settings in ({}, {"num_products": 24}, {"num_products": 9, "method": "hutchinson"}):
            want, got = (estimate(each, key=0, **settings) for each in (small, large))
            np.testing.assert_allclose(got.value / size, want.value, rtol=1e-4)
            tolerance = 1e-4 * want.value if name == "rank_deficient" else 0
            error = got.standard_error / size
            np.testing.assert_allclose(error, want.standard_error, rtol=1e-2, atol=tolerance)
    basis = jax.tree.map(jnp.float32, top_basis(2))
    for num_probes in (12, SIZE):
        want, got = (
            energy_shares(each, basis, key=0, num_probes=num_probes) for each in (small, large)
        )
        for one, other in zip(want, got, strict=True):
            np.testing.assert_allclose(other[:2], one[:2], rtol=1e-3)


@pytest.mark.parametrize(
    ("function", "settings", "error", "message"),
    [
        (trace, {"num_products": 2}, ValueError, "`num_products` must be at least 3"),
        (trace, {"method": "exact"}, ValueError, "`method` must be one of"),
        (frobenius_norm, {"num_products": 10.0}, TypeError, "`num_products` must be an integer"),
    ],
)
def test_errors(function, settings, error, message):
    settings = {"key": 0, "like": jnp.ones(100), **settings}
    with pytest.raises(error, match=message):
        function(lambda v: v, **settings)


def test_energy_shares_need_probes():
    with pytest.raises(ValueError, match="`num_probes` must be at least 1"):
        energy_shares(lambda v: v, jnp.eye(1, 4), key=0, num_probes=0)
