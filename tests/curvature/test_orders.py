"""Orders "smallest" and "both", and residual norms: solvers and trackers against dense matrices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from optax_accel.curvature import blocks, lanczos
from optax_accel.curvature._block_krylov import block_krylov
from optax_accel.curvature.eigensolvers import sorting_key, would_lead
from tests.curvature import eigenproblems
from tests.curvature.outlier_network import PARAMS, K, as_matrix, hessian, objective
from tests.helpers import tree_equal

ORDERS = ("algebraic", "magnitude", "smallest", "both")


def test_what_leads_by_hand() -> None:
    values = jnp.array([-3.0, -1.0, 0.0, 2.0, 5.0])
    sort = {order: values[jnp.argsort(sorting_key(values, order))].tolist() for order in ORDERS}
    assert sort == {
        "algebraic": [5, 2, 0, -1, -3],
        "magnitude": [5, -3, 2, -1, 0],
        "smallest": [-3, -1, 0, 2, 5],
        "both": [5, -3, 2, -1, 0],
    }
    # The first of five is no eigenvalue.
    order = jnp.argsort(sorting_key(values, "both", 1).at[0].set(jnp.inf))
    assert values[order].tolist() == [5, -1, 2, 0, -3]
    leading = jnp.array([5.0, -3.0, 2.0])
    places = jnp.array([3.0, 1.0, -2.0, -4.0])
    assert would_lead(places, leading, "both").tolist() == [True, False, False, True]
    assert would_lead(places, leading[:1], "both").tolist() == [False] * 4
    assert would_lead(places, -leading[::-1], "smallest").tolist() == [False, False, False, False]


@pytest.mark.parametrize("order", ["smallest", "both"])
@pytest.mark.parametrize("spectrum", ["outliers", "clustered"])
def test_lanczos(x64: None, order: Any, spectrum: str) -> None:
    pairs = lanczos(
        eigenproblems.operator(spectrum),
        eigenproblems.like(),
        3,
        key=jax.random.key(0),
        num_products=80,
        order=order,
        tolerance=1e-6,
    )
    assert pairs.converged.all()
    eigenproblems.check(pairs, spectrum, order, 3, 2e-6)


@functools.partial(jax.jit, static_argnames=("depth", "order"))
def krylov(matrix: Any, basis: Any, depth: int, order: Any) -> Any:
    products = functools.partial(eigenproblems.multiply_block, matrix)
    return block_krylov(products, basis, depth=depth, order=order)


@pytest.mark.parametrize(("order", "depth"), [("smallest", 3), ("both", 5)])
@pytest.mark.parametrize("spectrum", ["negative", "rank 2"])
def test_block_krylov(x64: None, order: Any, depth: int, spectrum: str) -> None:
    """Orthonormal, with its residuals; exact where the space is all there is or exhausted."""
    matrix = eigenproblems.dense(spectrum)
    start = blocks.random_basis(jax.random.key(1), eigenproblems.like(), 8)
    values, basis, smallest, residuals = krylov(jnp.asarray(matrix), start, depth, order)
    rows = eigenproblems.as_matrix(basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(8), atol=1e-12)
    images = rows @ matrix
    np.testing.assert_allclose(np.einsum("ij,ij->i", rows, images), values, atol=1e-12)
    want = np.linalg.norm(images - np.asarray(values)[:, None] * rows, axis=1)
    np.testing.assert_allclose(residuals, want, atol=1e-12)
    exact = eigenproblems.leading(spectrum, order)
    if depth == 5 or spectrum == "rank 2":
        np.testing.assert_allclose(values, exact[:8], atol=1e-12)
        np.testing.assert_allclose(smallest, exact.min(), atol=1e-12)
    else:
        assert np.all(values >= exact[:8] - 1e-12)  # Cauchy's interlacing
        assert want.max() > 0.01


# -- along training --------------------------------------------------------------------------------

TRACKERS: dict[str, Any] = {
    "block, smallest": oa.BlockTracker(order="smallest", krylov_depth=6, residuals=True),
    "block, both": oa.BlockTracker(order="both", oversampling=1, residuals=True),
    "exact, smallest": oa.ExactTracker(order="smallest", residuals=True, cold_start_products=72),
    "exact, both": oa.ExactTracker(order="both", residuals=True, cold_start_products=72),
}
descend = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 0.1 * g, p, objective().grad(p)))


@functools.partial(jax.jit, static_argnames=("tracker", "cold"))
def refresh(space: Any, params: Any, tracker: Any, cold: bool) -> Any:
    return tracker.refresh(space, objective(), params, params, cold=cold)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "exact, smallest" else []) for n in TRACKERS],
)
def test_follows_its_end_of_the_spectrum_along_training(name: str) -> None:
    tracker = TRACKERS[name]
    params, space = PARAMS, tracker.init(PARAMS, K)
    assert space.residual_norms.tolist() == [0] * K
    exact_tracker = isinstance(tracker, oa.ExactTracker)
    for step in range(41):
        if step == 40 or (step % 4 == 0 and not exact_tracker):
            space = refresh(space, params, tracker, cold=step == 0 or exact_tracker)
            before = params
        params = descend(params)
    matrix = np.asarray(hessian(before), np.float64)
    values, vectors = np.linalg.eigh(matrix)
    places = [0, 1, 2] if tracker.order == "smallest" else [-1, 0, -2]
    scale = np.abs(values).max()
    np.testing.assert_allclose(space.eigenvalues, values[places], atol=2e-3 * scale)
    rows = as_matrix(space.basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(K), atol=1e-5)
    images = rows @ matrix
    want = np.linalg.norm(images - np.asarray(space.eigenvalues)[:, None] * rows, axis=1)
    # The bound of Lanczos after its second sequence is a sum over both.
    assert np.all(want <= np.asarray(space.residual_norms) + 1e-5 * scale)
    np.testing.assert_allclose(space.residual_norms, want, rtol=1, atol=1e-2 * scale)
    if tracker.order == "both":
        overlap = np.abs(rows[::2] @ vectors[:, [-1, -2]])
        np.testing.assert_allclose(np.diagonal(overlap), 1, atol=0.01)


def test_residuals_of_a_power_step_are_those_of_the_basis_before_it() -> None:
    """And nothing else changes."""
    plain, noted = oa.BlockTracker(), oa.BlockTracker(residuals=True)
    start = refresh(plain.init(PARAMS, K), PARAMS, plain, cold=True)
    params = descend(PARAMS)
    want = refresh(start, params, plain, cold=False)
    assert want.residual_norms is None
    kept = start._replace(residual_norms=jnp.zeros(K))
    got = refresh(kept, params, noted, cold=False)
    tree_equal(got._replace(residual_norms=None), want)
    rows, matrix = as_matrix(start.basis), np.asarray(hessian(params), np.float64)
    values, vectors = np.linalg.eigh(rows @ matrix @ rows.T)
    ritz = vectors.T[::-1] @ rows
    residuals = np.linalg.norm(ritz @ matrix - values[::-1, None] * ritz, axis=1)
    np.testing.assert_allclose(got.residual_norms, residuals, rtol=1e-3, atol=1e-5)


def test_residuals_of_a_round() -> None:
    tracker = oa.RoundRobinTracker(residuals=True)
    space = tracker.init(PARAMS, K)
    for step in range(K + 1):
        space = refresh(space, PARAMS, tracker, cold=step == 0)
    assert space.memory.position == 1
    rows, matrix = as_matrix(space.basis), np.asarray(hessian(PARAMS), np.float64)
    residuals = np.linalg.norm(
        rows @ matrix - np.asarray(space.eigenvalues)[:, None] * rows, axis=1
    )
    # The basis is one power step further than its residuals.
    assert np.all(residuals < np.asarray(space.residual_norms) + 1e-4)


def test_the_whole_space_is_exact_after_one_product_a_row() -> None:
    def quadratic(p: Any) -> jax.Array:
        return 0.5 * jnp.sum(jnp.array([3.0, -2.0, 1.0]) * p**2)

    for order, want in (("smallest", [-2, 1, 3]), ("both", [3, -2, 1])):
        tracker = oa.BlockTracker(order=order, residuals=True)  # type: ignore[arg-type]
        params = jnp.ones(3)
        assert tracker.num_products(params, 3, cold=False) == 3
        space = tracker.init(params, 5)
        for cold in (True, False):
            space = tracker.refresh(
                space, oa.Objective.from_value_fn(quadratic), params, params, cold=cold
            )
            np.testing.assert_allclose(space.eigenvalues, want, rtol=1e-5)
            np.testing.assert_allclose(space.residual_norms, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: oa.BlockTracker(order="largest"), ValueError, "'smallest', 'both'; got 'larg"),
        (
            lambda: oa.RoundRobinTracker(order="smallest"),
            ValueError,
            'order="smallest"` is for BlockTracker and ExactTracker',
        ),
        (
            lambda: oa.BlockTracker(order="both", power_iterations=2),
            ValueError,
            "`power_iterations` is 2, .*set `krylov_depth`",
        ),
        (lambda: oa.BlockTracker(krylov_depth=0), ValueError, "`krylov_depth` must be at least 1"),
        (lambda: oa.ExactTracker(residuals=1), TypeError, "`residuals` must be True or False"),
    ],
)
def test_wrong_input(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
