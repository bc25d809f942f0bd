"""Products with inverses against dense solutions and SciPy, in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import optax_accel as oa
from optax_accel import curvature
from optax_accel.curvature import inverse_product, nystrom
from tests.curvature.rotated_matrices import SIZE, operator, split

RIGHT = np.random.default_rng(0).normal(size=SIZE)


def flat(tree):
    return np.asarray(jnp.concatenate([tree["a"].ravel(), tree["b"]]))


@pytest.mark.parametrize("loop", ["host", "graph"])
def test_conjugate_gradients_are_those_of_scipy(x64, loop):
    product, damping = operator("outliers"), 0.5
    matrix = np.asarray(product.matrix) + damping * np.eye(SIZE)
    right = split(jnp.asarray(RIGHT))
    found = inverse_product(product, right, damping=damping, tolerance=1e-9, loop=loop)
    iterates = []
    scipy.sparse.linalg.cg(
        matrix, RIGHT, rtol=1e-9, atol=0.0, callback=lambda x: iterates.append(x.copy())
    )
    iterations = int(found.num_products) - 1
    assert bool(found.converged)
    assert abs(iterations - len(iterates)) <= 1
    np.testing.assert_allclose(flat(found.solution), np.linalg.solve(matrix, RIGHT), atol=1e-8)
    # Every residual is the true one, and the last is measured.
    history = np.asarray(found.residual_norms)
    assert np.isnan(history[iterations + 1 :]).all()
    true = [np.linalg.norm(RIGHT - matrix @ x) / np.linalg.norm(RIGHT) for x in iterates[:8]]
    np.testing.assert_allclose(history[1:9], true, rtol=1e-5)
    np.testing.assert_allclose(found.residual_norm, history[iterations], rtol=1e-3)
    assert 0.5 <= float(found.smallest_curvature) <= 50.5


def test_a_start_and_a_preconditioner_save_products(x64):
    product, damping = operator("outliers"), 1e-2
    right = split(jnp.asarray(RIGHT))
    plain = inverse_product(product, right, damping=damping, tolerance=1e-8)
    exact = np.linalg.inv(np.asarray(product.matrix) + damping * np.eye(SIZE))
    precise = nystrom(product, 30, key=0).inverse(damping)
    helped = inverse_product(
        product, right, damping=damping, tolerance=1e-8, preconditioner=precise
    )
    assert bool(plain.converged)
    assert bool(helped.converged)
    assert int(helped.num_products) < int(plain.num_products) / 1.3
    np.testing.assert_allclose(flat(helped.solution), exact @ RIGHT, rtol=1e-5, atol=1e-7)
    again = inverse_product(product, right, damping=damping, tolerance=1e-6, start=helped.solution)
    assert int(again.num_products) == 2  # one for the start, one for the measurement
    assert bool(again.converged)


def test_the_series_has_the_terms_that_it_should(x64):
    product, right = operator("clustered"), split(jnp.asarray(RIGHT))
    matrix = np.asarray(product.matrix) + np.eye(SIZE)
    found = inverse_product(
        product, right, damping=1.0, method="neumann", step_size=0.1, max_iterations=7
    )
    want, term = np.zeros(SIZE), RIGHT
    for _ in range(7):
        want, term = want + 0.1 * term, term - 0.1 * matrix @ term
    np.testing.assert_allclose(flat(found.solution), want, rtol=1e-10)
    assert not bool(found.converged)
    assert int(found.num_products) == 8
    # With a step of its own it converges, though not as fast as conjugate gradients.
    found = inverse_product(product, right, damping=1.0, method="neumann")
    assert bool(found.converged)
    np.testing.assert_allclose(flat(found.solution), np.linalg.solve(matrix, RIGHT), atol=1e-4)
    best = inverse_product(product, right, damping=1.0)
    assert int(best.num_products) < int(found.num_products) - 10
    # A step that is too long is given up early.
    wild = inverse_product(product, right, damping=1.0, method="neumann", step_size=1.0)
    assert not bool(wild.converged)
    assert int(wild.num_products) < 10


def test_negative_curvature_is_reported(x64):
    product = operator("indefinite")
    found = inverse_product(product, split(jnp.asarray(RIGHT)))
    assert not bool(found.converged)
    assert float(found.smallest_curvature) < 0
    assert np.isfinite(flat(found.solution)).all()


def test_solutions_of_many_systems_at_once(x64):
    product = operator("outliers")
    rights = jnp.asarray(np.random.default_rng(1).normal(size=(3, SIZE)))
    dampings = jnp.array([0.1, 1.0, 10.0])

    @jax.jit
    @jax.vmap
    def solve(right, damping):
        return inverse_product(product, split(right), damping=damping, tolerance=1e-8)

    found = solve(rights, dampings)
    assert found.converged.all()
    assert np.all(np.diff(found.num_products) < 0)  # more damping, fewer products
    for i, damping in enumerate(dampings):
        want = np.linalg.solve(product.matrix + damping * np.eye(SIZE), rights[i])
        got = flat(jax.tree.map(lambda x, i=i: x[i], found.solution))
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_numbers_of_any_size(scale):
    right = jnp.float32(scale) * jnp.array([1.0, 2.0, 0.0], jnp.float32)
    found = inverse_product(lambda v: 2 * v, right)
    np.testing.assert_allclose(found.solution, right / 2, rtol=1e-6)
    assert bool(found.converged)
    zero = inverse_product(lambda v: 2 * v, jnp.zeros(3))
    assert bool(zero.converged)
    assert not zero.solution.any()
    lost = inverse_product(lambda v: 2 * v, jnp.array([1.0, jnp.nan]))
    assert not bool(lost.converged)


def test_batches_larger_than_memory(x64):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=12)
    objective = oa.Objective(lambda w, x: x @ w["w"], lambda out, y: jnp.mean((out - y) ** 2) / 2)
    data = [{"x": x[i : i + 5], "y": y[i : i + 5]} for i in (0, 5, 10)]
    operator = curvature.hessian(objective, {"w": jnp.zeros(4)}, batches=data)
    gradient = {"w": jnp.asarray(-x.T @ y / 12)}
    found = inverse_product(operator, gradient, damping=0.1, tolerance=1e-9)
    want = np.linalg.solve(x.T @ x / 12 + 0.1 * np.eye(4), ravel_pytree(gradient)[0])
    np.testing.assert_allclose(found.solution["w"], want, rtol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, r"`damping` must lie in \[0"),
        ({"method": "lu"}, "`method` must be one of 'cg', 'neumann'"),
        ({"tolerance": 0.0}, r"`tolerance` must lie in \(0"),
        ({"max_iterations": 0}, "`max_iterations` must be at least 1, got 0"),
        ({"step_size": 0.1}, "`step_size` is that of method='neumann'"),
        ({"loop": "scan"}, "`loop` must be one of 'graph', 'host'"),
        ({"preconditioner": np.eye(2)}, "`preconditioner` must be a function that multiplies"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        inverse_product(lambda v: v, jnp.ones(2), **arguments)


def test_wrong_vectors_are_refused():
    params = {"w": jnp.ones(2), "b": jnp.ones(())}
    objective = oa.Objective(lambda p: p["w"] * p["b"], lambda out: jnp.sum(out**2) / 2)
    operator = curvature.gauss_newton(objective, params, where={"w": True, "b": False})
    gradient = objective.grad(params)
    with pytest.raises(ValueError, match=r"`vector`: .*such as \['b'\]; cut .* operator.select"):
        inverse_product(operator, gradient)
    with pytest.raises(ValueError, match=r"`vector`: .* a dict, got an array"):
        inverse_product(operator, jnp.ones(2))
    vector = operator.select(gradient)
    with pytest.raises(ValueError, match=r"`start`: .*'w'.* must have the shape \(2,\), got \(\)"):
        inverse_product(operator, vector, start={**vector, "w": jnp.ones(())})
    # The block of "w" is the identity.
    found = inverse_product(operator, vector, damping=1.0)
    np.testing.assert_allclose(found.solution["w"], gradient["w"] / 2)
    with pytest.raises(TypeError, match=r"preconditioner=approximation.inverse\(damping\)"):
        inverse_product(operator, vector, preconditioner=nystrom(operator, 1, key=0))
