"""Gauss-Newton in batch space: dense solutions for all losses and solvers, replicas, training."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from tests.helpers import (
    classification,
    mlp_apply,
    mlp_init,
    over_workers,
    tree_allclose,
    tree_equal,
)

X, Y = (a[:8] for a in classification())
PARAMS = jax.tree.map(np.asarray, mlp_init((2, 6, 3)))
MASK = np.array([1.0, 1, 0, 1, 2, 1, 1, 1])
SOLVERS = ("cg", "cholesky")


def double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def one_hot(y: Any) -> jax.Array:
    return jax.nn.one_hot(y, 3)


# Losses of outputs, labels and weights of the examples. The last two show no likelihood.
LOSSES: dict[str, Any] = {
    "squares": lambda out, y, w: 0.5 * jnp.mean(jnp.sum((out - one_hot(y)) ** 2, axis=-1)),
    "masked cross entropy": lambda out, y, w: (
        jnp.sum(w * optax.softmax_cross_entropy_with_integer_labels(out, y)) / jnp.sum(w)
    ),
    "bernoulli": lambda out, y, w: jnp.mean(
        jnp.sum(optax.sigmoid_binary_cross_entropy(out, one_hot(y)), axis=-1)
    ),
    "pseudo-Huber": lambda out, y, w: jnp.mean(
        jnp.sqrt(1 + jnp.sum((out - one_hot(y)) ** 2, axis=-1))
    ),
}


def objective_of(loss: str, axis_name: str | None = None, x: Any = X, y: Any = Y, w: Any = MASK):
    weight = (lambda: jnp.sum(w)) if loss == "masked cross entropy" else None
    return oa.Objective(
        lambda params: mlp_apply(params, jnp.asarray(x, params["layer0"]["w"].dtype)),
        lambda out: LOSSES[loss](out, y, jnp.asarray(w, out.dtype)),
        axis_name,
        weight=weight,
    )


def flat(tree: Any) -> jax.Array:
    return jax.flatten_util.ravel_pytree(tree)[0]


def dense_solution(objective: oa.Objective, params: Any, gradient: Any, damping: float) -> Any:
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    product = objective.gauss_newton(params)
    matrix = jax.vmap(lambda v: flat(product(unravel(v))))(jnp.eye(vector.size))
    return jnp.linalg.solve(matrix + damping * jnp.eye(vector.size), flat(gradient))


def settings_of(solver: str) -> dict[str, Any]:
    return {"solver": solver, "tolerance": 0.0, "max_iterations": 60, "block_size": 7}


@pytest.mark.parametrize(
    "loss",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "bernoulli" else []) for n in LOSSES],
)
def test_is_the_dense_solution(x64, loss):
    """For the gradient of the batch and, with weight decay, one that is not in its row space."""
    objective, params = objective_of(loss), double(PARAMS)
    likelihood = "bernoulli" if loss == "bernoulli" else None

    @jax.jit
    def run(params: Any) -> Any:
        own = objective.grad(params)
        other = jax.tree.map(lambda g, p: g + 0.1 * p, own, params)
        results = []
        for gradient in (own, other):
            exact = dense_solution(objective, params, gradient, 0.01)
            for solver in SOLVERS:
                tx = oa.scale_by_batch_gauss_newton(
                    damping=0.01, likelihood=likelihood, **settings_of(solver)
                )
                new, state = tx.update(gradient, tx.init(params), params, value_fn=objective)
                results.append((flat(new), exact, state))
        return results

    for (new, exact, state), solver in zip(run(params), SOLVERS * 2, strict=True):
        np.testing.assert_allclose(new, exact, rtol=1e-8, atol=1e-9)
        assert state.solver_residual < 1e-9
        assert (state.solver_iterations > 0) == (solver == "cg")


@pytest.mark.parametrize(
    "loss", [pytest.param("squares", marks=[pytest.mark.slow]), "masked cross entropy"]
)
def test_replicas_share_the_rows(x64, loss):
    """Examples of different weights on two replicas are one batch, to both solvers."""

    def direction(x: Any, y: Any, w: Any, axis_name: str | None) -> Any:
        objective, params = objective_of(loss, axis_name, x, y, w), double(PARAMS)
        gradient, results = objective.grad(params), []
        for solver in SOLVERS:
            tx = oa.scale_by_batch_gauss_newton(damping=0.05, **settings_of(solver))
            new, state = tx.update(gradient, tx.init(params), params, value_fn=objective)
            results.append((new, state.solver_iterations))
        return results

    x = np.float64(X)
    want = jax.jit(lambda: direction(x, Y, MASK, None))()
    split = [a.reshape(2, 4, *a.shape[1:]) for a in (x, Y, MASK)]
    each = over_workers("shard_map", lambda *a: direction(*a, "workers"), 2)(*split)
    for (new, iterations), (many, its) in zip(want, jax.block_until_ready(each), strict=True):
        tree_allclose(jax.tree.map(lambda leaf: leaf[1], many), new, rtol=1e-8, atol=1e-10)
        assert abs(its[0] - iterations) <= 1  # the last one is a matter of rounding


def test_little_damping_loses_no_digits_in_float32():
    """The Sherman-Morrison-Woodbury formula alone would lose a factor of curvature / damping."""
    objective, params = objective_of("masked cross entropy"), jax.tree.map(jnp.float32, PARAMS)

    @jax.jit
    def solutions(params: Any) -> Any:
        gradient, results = objective.grad(params), []
        for solver in SOLVERS:
            settings = settings_of(solver) | {"tolerance": 1e-6, "max_iterations": 200}
            tx = oa.scale_by_batch_gauss_newton(damping=1e-4, **settings)
            new, _ = tx.update(gradient, tx.init(params), params, value_fn=objective)
            results.append(flat(new))
        return results

    found = map(np.asarray, solutions(params))
    with jax.enable_x64(True):
        exact = np.asarray(
            jax.jit(lambda p: dense_solution(objective, p, objective.grad(p), 1e-4))(double(params))
        )
    for new in found:
        assert np.linalg.norm(new - exact) < 5e-3 * np.linalg.norm(exact)


def test_cholesky_with_damping_that_rounding_hides():
    """It is raised to what remains: 0 would divide by 0, and 1e-9 magnify rounding errors."""
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3)  # of rank 2
    objective = oa.Objective(lambda w: x @ w, lambda out: 0.5 * jnp.sum((out - 1) ** 2))
    w = jnp.zeros((3, 1))
    exact = np.linalg.lstsq(x, np.ones((4, 1)), rcond=1e-5)[0]
    tx, grads = oa.scale_by_batch_gauss_newton(solver="cholesky"), objective.grad(w)

    @jax.jit
    def solve(damping: Any) -> jax.Array:
        return tx.update(grads, tx.init(w), w, value_fn=objective, damping=damping)[0]

    for damping in (0.0, 1e-9):
        step = -solve(damping)
        np.testing.assert_allclose(x @ step, x @ exact, rtol=1e-2)
        # Along the direction that no output sees, the damping that remains magnifies rounding
        # errors, of the size of which it is, as the machine rounds them.
        np.testing.assert_allclose(step, exact, rtol=5e-2)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.float64, marks=[pytest.mark.slow])]
)
def test_gradients_of_another_batch_are_as_accurate(x64, dtype):
    """Residuals are relative to the gradient, whatever it is; no gradient gives no update."""
    name, exact = "masked cross entropy", double(PARAMS)
    objective = objective_of(name)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    other = objective_of(name, x=1.7 * X[::-1]).grad(exact)
    gradients = [
        other,
        optax.tree.scale(1e-30, objective.grad(exact)),
        optax.tree.zeros_like(exact),
    ]
    tolerance = {jnp.float32: 1e-4, jnp.float64: 1e-10}[dtype]
    tx = oa.scale_by_batch_gauss_newton(tolerance=tolerance)

    @jax.jit
    def solutions(gradient: Any, damping: Any) -> Any:
        new, state = tx.update(
            gradient, tx.init(params), params, value_fn=objective, damping=damping
        )
        wide = double(gradient)
        product = objective.gauss_newton(exact)(double(new))
        left = jax.tree.map(lambda g, v, p: g - p - damping * v, wide, double(new), product)
        return new, optax.tree.norm(left) / optax.tree.norm(wide), state

    for gradient in gradients:
        gradient = jax.tree.map(lambda leaf: leaf.astype(dtype), gradient)
        for damping in (1e-3, 0.1, 10.0):
            new, residual, state = solutions(gradient, damping)
            if not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient)):
                tree_equal(new, gradient)
            else:
                assert residual < 1.1 * tolerance
                assert state.solver_residual < tolerance


def test_stops_early_where_conjugate_gradients_on_the_parameters_do(x64):
    objective, params = objective_of("masked cross entropy"), double(PARAMS)

    @jax.jit
    def solutions(params: Any) -> Any:
        gradient, product = objective.grad(params), objective.gauss_newton(params)

        def matrix(v: Any) -> Any:
            return jax.tree.map(lambda g, v: g + 1e-3 * v, product(v), v)

        results = []
        for number in (1, 4):
            settings = {"max_iterations": number, "tolerance": 0.0}
            tx = oa.scale_by_batch_gauss_newton(damping=1e-3, **settings)
            new, state = tx.update(gradient, tx.init(params), params, value_fn=objective)
            want, _ = jax.scipy.sparse.linalg.cg(matrix, gradient, maxiter=number, tol=0.0)
            left = optax.tree.norm(optax.tree.sub(gradient, matrix(new)))
            results.append((new, want, state, left / optax.tree.norm(gradient)))
        return results

    for number, (new, want, state, residual) in zip((1, 4), solutions(params), strict=True):
        tree_allclose(new, want, rtol=1e-8, atol=1e-10)
        assert state.solver_iterations == number
        np.testing.assert_allclose(state.solver_residual, residual, rtol=1e-5)


def test_mask_and_curvature_of_another_batch(x64):
    objective, params = objective_of("squares"), double(PARAMS)
    part = objective_of("squares", x=X[:4], y=Y[:4])
    mask = {"layer0": False, "layer1": True}
    tx = oa.scale_by_batch_gauss_newton(damping=0.1, mask=mask, **settings_of("cg"))
    gradient = objective.grad(params)

    @jax.jit
    def update(gradient: Any) -> Any:
        others = {"value_fn": objective, "curvature_value_fn": part}
        return tx.update(gradient, tx.init(params), params, **others)[0]

    new = update(gradient)
    tree_equal(new["layer0"], gradient["layer0"])
    inner = part.precompose(lambda layer: {**params, "layer1": layer})
    exact = dense_solution(inner, params["layer1"], gradient["layer1"], 0.1)
    np.testing.assert_allclose(flat(new["layer1"]), exact, rtol=1e-8, atol=1e-10)


def test_fits_more_parameters_than_examples_in_a_few_steps():
    """27 parameters and 8 examples; the damping adapts on its own."""
    objective = objective_of("squares")
    tx, params = oa.batch_gauss_newton(), jax.tree.map(jnp.float32, PARAMS)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(objective.grad(params), state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(15):
        params, state = step(params, state)
    assert objective(params) < 0.02
    assert state.damping_value < 1
    assert optax.tree.get(state, "solver_iterations") > 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": "lu"}, ValueError, "`solver` must be one of 'cg', 'cholesky'; got 'lu'"),
        ({"damping": 0.0}, ValueError, "`damping` must lie in"),
        ({"max_iterations": 0}, ValueError, "`max_iterations` must be at least 1"),
        ({"tolerance": -1.0}, ValueError, "`tolerance` must lie in"),
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1"),
        ({"likelihood": "poisson"}, ValueError, "`likelihood` must be one of 'categorical'"),
    ],
)
def test_wrong_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        oa.batch_gauss_newton(**settings)


def test_says_what_is_missing():
    tx, params = oa.scale_by_batch_gauss_newton(), jnp.ones(300)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the extra argument `value_fn` to take"):
        tx.update(params, state, params)
    many = oa.Objective(lambda w: w[None], lambda out: jnp.sum(jnp.cosh(out)))
    with pytest.raises(ValueError, match=r"most 256 outputs; this network has 300.*'gaussian'"):
        tx.update(params, state, params, value_fn=many)
    for outputs, error, message in (
        (lambda w: w[:0, None], ValueError, r"must not be empty; got the shapes \[\(0, 1\)\]"),
        (lambda w: w.astype(int), TypeError, "floating-point numbers; got the dtypes int32"),
    ):
        objective = oa.Objective(outputs, lambda out: jnp.sum(1.0 * out**2))
        with pytest.raises(error, match=message):
            tx.update(params, state, params, value_fn=objective)
    with pytest.raises(TypeError, match="real floating-point parameters"):
        tx.init(jnp.arange(3))
