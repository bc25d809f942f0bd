"""Solvers of optimistix, an optional package, in place of ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from optax_accel import equilibrium as eq
from optax_accel.equilibrium._optimistix import is_optimistix_solver

W = np.array([[0.5, 0.2], [0.1, 0.4]], np.float32)
X = np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(3, 2)


def f(z, w, x):
    return {"z": jnp.tanh(z["z"] @ w + x)}


def loss(w, solver, **options):
    z, report = oa.deq(f, {"z": jnp.zeros((3, 2))}, w, X, solver=solver, **options)
    return jnp.sum(jnp.sin(z["z"])), report


def test_only_classes_of_optimistix_are_taken():
    derived = type("Mine", (type("Theirs", (), {"__module__": "optimistix._solver"}),), {})
    assert is_optimistix_solver(derived())
    assert not is_optimistix_solver(eq.anderson())
    with pytest.raises(TypeError, match="or one of optimistix; got 3"):
        loss(W, 3)
    with pytest.raises(ValueError, match="`axis_name` 'i' needs a solver of optax_accel"):
        eq.solve(derived(), jnp.cos, jnp.ones((1, 1)), axis_name="i")
    with pytest.raises(ValueError, match="`corrections` needs a solver of optax_accel"):
        loss(W, derived(), corrections=2)


@pytest.mark.parametrize("name", ["FixedPointIteration", "Newton"])
@pytest.mark.parametrize("gradient", ["implicit", eq.phantom(20)])
def test_values_and_gradients_are_ours(name, gradient):
    optimistix = pytest.importorskip("optimistix")
    solver = getattr(optimistix, name)(rtol=1e-6, atol=1e-6)
    options = {"gradient": gradient, "backward_solver": eq.broyden(20, 1e-6)}
    (found, report), slope = jax.jit(
        jax.value_and_grad(lambda w: loss(w, solver, **options), has_aux=True)
    )(W)
    (expected, ours), expected_slope = jax.jit(
        jax.value_and_grad(lambda w: loss(w, eq.broyden(20, 1e-6), **options), has_aux=True)
    )(W)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-5)
    assert report.converged.all()
    assert report.steps.shape == ours.steps.shape == (3,)
    assert (report.residual < 1e-5).all()


def test_too_few_steps_are_reported_and_unrolled_gradients_pass_the_steps():
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.FixedPointIteration(rtol=1e-5, atol=1e-5)
    _, report = oa.deq(
        lambda z, w, x: w - z, jnp.zeros((2, 1)), jnp.ones((2, 1)), None, solver=solver
    )
    assert not report.converged.any()
    with pytest.raises(ValueError, match="2 of 2 examples did not reach their fixed point"):
        report.check()
    slope = jax.jit(jax.grad(lambda w: loss(w, solver, gradient="unrolled")[0]))(W)
    exact = jax.jit(jax.grad(lambda w: loss(w, eq.broyden(20, 1e-6))[0]))(W)
    np.testing.assert_allclose(slope, exact, rtol=1e-3, atol=1e-4)
