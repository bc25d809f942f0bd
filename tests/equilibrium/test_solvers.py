"""Solvers of fixed points: golden tables, stops, frozen and diverging examples, dtypes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_accel import equilibrium as eq

W = np.array([[0.5, 0.2], [0.1, 0.4]])
FIXED_POINT = np.array([20 / 7, 15 / 7])


def linear(z):
    return z @ jnp.asarray(W.T, z.dtype) + jnp.ones((1, 2), z.dtype)


@functools.partial(jax.jit, static_argnames="solver")
def solved(solver, z0):
    return eq.solve(solver, linear, z0)


def test_golden_anderson(x64):
    """The residual after k evaluations, and f at the best iterate."""
    z0 = jnp.zeros((1, 2))
    golden = [2**0.5, 0.8602325267, 0.1192779488, 0.0007013990, 0.0001412408, 0.0000783407]
    z, report = solved(eq.anderson(6, 0.0), z0)
    np.testing.assert_allclose(report.residuals[:, 0], golden, atol=1e-10)
    np.testing.assert_allclose(z[0], W @ [2.857033175, 2.1429104728] + 1, atol=1e-9)
    z, report = solved(eq.anderson(3, 0.0), z0)
    np.testing.assert_allclose(z[0], W @ [2.6462962963, 2.1759259259] + 1, atol=1e-9)
    assert report.steps[0] == 3


def test_golden_mixing_weights(x64):
    residuals = np.array([[1.0, 1.0], [0.7, 0.5]])
    weights, solved = eq.solvers.mixing_weights(
        jnp.asarray(residuals @ residuals.T)[None], jnp.ones(2, bool), 1e-4, 0.0
    )
    np.testing.assert_allclose(weights[0], [-1.3518518519, 2.3518518519], atol=1e-9)
    assert solved.all()


def test_golden_broyden(x64):
    golden = [2**0.5, 0.8602325267, 0.106066017, 0.0312128879]
    z, report = solved(eq.broyden(4, 0.0), jnp.zeros((1, 2)))
    np.testing.assert_allclose(report.residuals[:4, 0], golden, atol=1e-9)
    assert report.residuals.shape == (5, 1)
    assert report.residual[0] < 1e-14
    np.testing.assert_allclose(z[0], FIXED_POINT, atol=1e-14)
    z, _ = solved(eq.broyden(2, 0.0), jnp.zeros((1, 2)))
    np.testing.assert_allclose(z[0], [2.75, 2.25], atol=1e-12)


def test_golden_plain_iteration(x64):
    z, report = solved(eq.fixed_point(3, 0.0), jnp.zeros((1, 2)))
    expected = np.zeros(2)
    for _ in range(3):
        expected = W @ expected + 1
    np.testing.assert_allclose(z[0], expected, rtol=1e-15)
    assert report.steps[0] == 3


def test_a_relative_ridge_reaches_the_precision_of_the_dtype(x64):
    _, absolute = solved(eq.anderson(12, 0.0), jnp.zeros((1, 2)))
    _, relative = solved(eq.anderson(12, 0.0, ridge=0, relative_ridge=1e-10), jnp.zeros((1, 2)))
    assert absolute.residual[0] > 1e-7
    assert relative.residual[0] < 1e-13


@pytest.mark.parametrize(
    "solver", [eq.anderson(30, 1e-4), eq.broyden(30, 1e-4, memory=4), eq.fixed_point(60, 1e-4)]
)
def test_examples_stop_for_themselves_and_never_disturb_each_other(solver):
    """The first is solved at once, the second contracts, the third grows until it overflows."""

    def f(z, slope):
        grown = jnp.where(slope[:, None] > 1, 1e30 * (1 + z**2), jnp.tanh(slope[:, None] * z + 1))
        return jnp.where(slope[:, None] == 0, z, grown)

    slopes, z0 = jnp.array([0.0, 0.7, 2.0]), jnp.full((3, 4), 0.1)
    run = jax.jit(lambda z0, slopes: eq.solve(solver, lambda z: f(z, slopes), z0))
    z, report = run(z0, slopes)
    assert list(report.converged) == [True, True, False]
    assert report.steps[0] == 1
    assert 1 < report.steps[1] < solver.evaluations
    assert bool(jnp.isfinite(z).all())
    assert np.isnan(report.residuals[int(report.steps.max()) :]).all()
    np.testing.assert_allclose(f(z, slopes)[1], z[1], atol=1e-4)
    alone, _ = run(z0.at[2].set(0.1), slopes.at[2].set(0.0))
    np.testing.assert_array_equal(z[1], alone[1])  # without the diverging one beside it


def test_unrolled_is_the_same_and_report_teaches():
    z, report = solved(eq.anderson(8, 1e-3), jnp.zeros((2, 2)))
    other, unrolled = solved(eq.anderson(8, 1e-3, loop="unrolled"), jnp.zeros((2, 2)))
    np.testing.assert_allclose(z, other, rtol=1e-6)
    np.testing.assert_array_equal(report.steps, unrolled.steps)
    report.check()
    _, report = eq.solve(eq.fixed_point(5), lambda z: 3 * z + 1, jnp.zeros(2), batched=False)
    assert report.residual.shape == ()
    with pytest.raises(ValueError, match=r"1 of 1 examples .* 5 evaluations; .*1\.41, .*contract"):
        report.check()


def test_states_are_pytrees_of_low_precision():
    z0 = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros((2, 2, 2))}
    f = lambda z: {"a": 0.5 * z["a"] + 1, "b": jnp.tanh(z["b"] + 1)}  # noqa: E731
    z, report = jax.jit(lambda z0: eq.solve(eq.anderson(20, 1e-2), f, z0))(z0)
    assert (z["a"].dtype, report.residual.dtype) == (jnp.bfloat16, jnp.float32)
    assert bool(report.converged.all())
    np.testing.assert_allclose(z["a"].astype(jnp.float32), 2, rtol=1e-2)


def test_broyden_stops_where_nothing_changes():
    """A residual of always 2e-3, near the tolerance, ends the search long before its last step."""

    def floor(z):
        angle = 1e4 * jnp.sum(z)
        return z + 2e-3 * jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    _, report = eq.solve(eq.broyden(60, 1e-3), floor, jnp.zeros(2), batched=False)
    assert (int(report.steps), bool(report.converged)) == (32, False)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: eq.anderson(1), ValueError, "`max_steps` must be at least 2, got 1"),
        (lambda: eq.anderson(memory=0), ValueError, "`memory` must be at least 1, got 0"),
        (lambda: eq.anderson(mixing=0), ValueError, r"`mixing` must lie in \(0, 1\], got 0"),
        (lambda: eq.anderson(ridge=-1), ValueError, "`ridge` must lie in"),
        (lambda: eq.broyden(memory=0), ValueError, "`memory` must be at least 1"),
        (lambda: eq.broyden(tolerance=-1), ValueError, "`tolerance` must lie in"),
        (lambda: eq.fixed_point(stop="l2"), ValueError, "`stop` must be .*'relative'"),
        (lambda: eq.fixed_point(loop="scan"), ValueError, "`loop` must be .*'unrolled'"),
        (lambda: eq.fixed_point(0), ValueError, "`max_steps` must be at least 1"),
    ],
)
def test_wrong_options(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("f", "z0", "error", "message"),
    [
        (lambda z: z[:, :1], jnp.zeros((3, 2)), ValueError, r"f\(z\) must have the shapes"),
        (lambda z: (z, z), jnp.zeros((3, 2)), ValueError, r"f\(z\) must have the structure"),
        (lambda z: z.astype("bfloat16"), jnp.zeros((3, 2)), ValueError, "to bfloat16"),
        (jnp.cos, jnp.zeros((3, 2), int), TypeError, "`z0` must be of floating-point arrays"),
        (jnp.cos, None, ValueError, "`z0` must contain arrays with entries, got none"),
        (jnp.cos, jnp.ones(()), ValueError, "`batched=False`"),
        (lambda z: z, (jnp.ones((3, 2)), jnp.ones((2, 3))), ValueError, "that of the examples"),
        (None, jnp.zeros((3, 2)), TypeError, r"`f` must be a function, called as f\(z\); got None"),
    ],
)
def test_solve_checks_what_it_is_given(f, z0, error, message):
    with pytest.raises(error, match=message):
        eq.solve(eq.anderson(), f, z0)
    with pytest.raises(TypeError, match="`solver` must be a solver"):
        eq.solve("anderson", f, z0)


def test_reports_say_where_f_is_not_finite_and_refuse_to_be_checked_in_jit():
    solver = eq.fixed_point(3, 0.0)
    _, report = eq.solve(solver, lambda z: z * jnp.nan, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=r"2 of 2 examples .*: f is not finite at z0"):
        report.check()
    with pytest.raises(TypeError, match="not known within jit"):
        jax.jit(lambda z: eq.solve(solver, jnp.cos, z)[1].check())(jnp.ones((2, 1)))
    _, report = eq.solve(solver, lambda z: z, jnp.ones((2, 1)))  # a residual of exactly 0
    assert list(report.steps) == [1, 1]
    report.check()
