"""Slices of losses whose values, derivatives and directions are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accel as oa
from experiments.training.studies import landscape
from experiments.training.studies.landscape import Landscape, Point

EIGENVALUES = np.array([5.0, 3.0, 0.5, 0.25, 0.125, 0.0], np.float32)
CENTER = {"w": jnp.array([[0.5, -0.25], [1.0, 0.75]]), "b": jnp.array([0.5, -1.0])}


def vector(tree: Any) -> jax.Array:
    return jnp.concatenate([tree["w"].ravel(), tree["b"]])


def tree(values: Any) -> Any:
    values = jnp.asarray(values, jnp.float32)
    return {"w": values[:4].reshape(2, 2), "b": values[4:]}


# 1 + p^T diag(eigenvalues) p / 2.
QUADRATIC = oa.Objective(vector, lambda v: 1 + 0.5 * jnp.sum(EIGENVALUES * v**2))


def quadratic(x: np.ndarray) -> np.ndarray:
    return 1 + 0.5 * np.sum(EIGENVALUES * x**2, axis=-1)


def point(iterates: list[Any] | None = None, **changes: Any) -> Point:
    iterates = iterates or [
        tree([2.0, -1.0, 1.0, 0.75, 0.5, -1.0]),
        tree([1.0, 1.0, 1.0, 0.75, 0.5, -1.0]),
        CENTER,
    ]
    steps = [*range(len(iterates))]
    made = Point("a quadratic", QUADRATIC, iterates[-1], steps, iterates, 2, 8)
    return made._replace(**changes)


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_slices_of_a_quadratic(chunk: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6)).astype(np.float32)
    slices = Landscape(QUADRATIC, CENTER, {"x": tree(x), "y": tree(y)}, chunk)
    alphas, betas = np.linspace(-1, 1, 5), np.linspace(-2, 2, 4)
    origin = np.asarray(vector(CENTER))
    expected = quadratic(origin + alphas[:, None] * x)
    np.testing.assert_allclose(slices.line("x", alphas), expected, rtol=1e-6)
    moved = origin + alphas[None, :, None] * x + betas[:, None, None] * y
    np.testing.assert_allclose(slices.plane("x", "y", alphas, betas), quadratic(moved), rtol=1e-6)
    # A plane of one direction twice is the line of the sum.
    twice = slices.plane("x", "x", alphas, [1.0])
    np.testing.assert_allclose(twice[0], slices.line("x", alphas + 1), rtol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    objective = oa.Objective(lambda w: w, lambda w: jnp.log(w[0]))
    slices = Landscape(objective, jnp.ones(1), {"x": jnp.ones(1)}, chunk=2)
    assert np.isfinite(slices.line("x", [-2.0, -1.0, 0.0])).tolist() == [False, False, True]
    with np.errstate(invalid="ignore"):
        assert np.isnan(landscape.derivatives(lambda t: np.full(t.shape, np.nan), 1.0)).all()


def test_derivatives_from_values_in_float32() -> None:
    """A sharp direction with large higher derivatives, where any fixed width would be wrong."""

    def values(t: np.ndarray) -> np.ndarray:
        return np.float32(0.1 + 0.01 * t + np.cosh(40.0 * t) - 1)

    slope, second = landscape.derivatives(values, 1.0)
    assert slope == pytest.approx(0.01, rel=1e-2)
    assert second == pytest.approx(1600, rel=1e-3)


def test_filters_have_the_norms_of_the_weights() -> None:
    """A kernel of a convolution and a matrix by hand; biases do not move."""
    kernel = np.zeros((1, 2, 1, 2), np.float32)
    kernel[0, :, 0, 0], kernel[0, :, 0, 1] = (3, 4), (0, 2)  # norms 5 and 2
    params = {"conv": kernel, "dense": np.array([[1.0], [1.0]], np.float32), "b": np.ones(2)}
    direction = {
        "conv": np.ones_like(kernel),
        "dense": np.array([[0.0], [-4.0]], np.float32),
        "b": np.ones(2, np.float32),
    }
    found = landscape.filter_normalized(
        *(jax.tree.map(jnp.float32, t) for t in (direction, params))
    )
    np.testing.assert_allclose(found["conv"][0, :, 0, 0], 5 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(found["conv"][0, :, 0, 1], 2 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(found["dense"], [[0.0], [-np.sqrt(2)]], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], 0)
    # A filter that is drawn as zeros has no direction.
    still = jax.tree.map(jnp.zeros_like, direction)
    assert all(
        not leaf.any() for leaf in jax.tree.leaves(landscape.filter_normalized(still, params))
    )


def test_principal_directions_are_those_of_the_singular_vectors() -> None:
    rng = np.random.default_rng(1)
    rows = (rng.normal(size=(7, 6)) * [3, 1, 0.3, 0.1, 2, 0.5] + 10).astype(np.float32)
    basis, shares = landscape.principal_directions([tree(row) for row in rows], 3)
    centered = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    _, values, vectors = np.linalg.svd(centered, full_matrices=False)
    found = np.stack([vector(jax.tree.map(lambda x, i=i: x[i], basis)) for i in range(3)])
    products = found @ vectors[:3].T
    np.testing.assert_allclose(np.abs(np.diag(products)), 1, atol=1e-5)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(shares, values[:3] ** 2 / np.sum(values**2), rtol=1e-5)
    assert (found @ (rows[-1] - rows[0]) >= 0).all()  # the signs are not those of the day


def test_points_that_have_too_few_directions() -> None:
    with pytest.raises(ValueError, match="need at least 3 points of the training, got 2"):
        landscape.principal_directions([CENTER, CENTER], 2)
    line = [tree(np.full(6, i)) for i in (0.0, 1.0, 2.0)]
    with pytest.raises(ValueError, match="vary in fewer than 2 directions"):
        landscape.principal_directions(line, 2)


def test_all_directions_of_a_quadratic() -> None:
    found = landscape.measure(point(), landscape.KINDS, reach=0.5, resolution=5, seed=3)
    np.testing.assert_allclose(found["eigenvalues"], [5, 3], rtol=1e-5)
    assert found["converged"]
    weights = np.linalg.norm(np.asarray(CENTER["w"]))
    assert found["length"] == pytest.approx(weights, rel=1e-6)
    lines = {line["name"]: line for line in found["lines"]}
    assert [*lines] == [
        *("dominant 1", "dominant 2", "bulk", "random 1", "random 2"),
        *("trajectory 1", "trajectory 2"),
    ]
    assert lines["dominant 1"]["product"] == pytest.approx(5, rel=1e-5)
    assert lines["dominant 2"]["product"] == pytest.approx(3, rel=1e-5)
    assert 0 <= lines["bulk"]["product"] <= 0.5 + 1e-6  # outside of the two leading eigenvectors
    for line in lines.values():
        assert line["curvature"] == pytest.approx(line["product"], rel=1e-3, abs=1e-4)
    # Along an eigenvector the loss is known; its ends are `reach` weights' lengths away.
    origin = np.asarray(vector(CENTER))
    step = 0.5 * weights
    ends = [quadratic(origin + sign * step * np.eye(6)[0]) for sign in (-1, 1)]
    np.testing.assert_allclose(
        sorted(lines["dominant 1"]["losses"][i] for i in (0, -1)), sorted(ends), rtol=1e-5
    )
    # The loss at the point is the one in the middle of all slices.
    assert found["loss"] == pytest.approx(quadratic(origin), rel=1e-6)
    for plane in found["planes"]:
        assert plane["losses"][2][2] == pytest.approx(found["loss"], rel=1e-6)
    # The path of these three points lies in its plane whole, and ends at the point.
    trajectory = found["planes"][-1]
    assert (trajectory["x"], trajectory["y"]) == ("trajectory 1", "trajectory 2")
    path = np.array(trajectory["path"]) * weights
    np.testing.assert_allclose(path[-1], 0, atol=1e-6)
    distances = [np.linalg.norm(vector(p) - origin) for p in point().iterates]
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), distances, rtol=1e-5, atol=1e-6)
    assert np.abs(path).max() / weights < trajectory["alphas"][-1]
    assert sum(found["shares"]) == pytest.approx(1, rel=1e-6)
    assert landscape.evaluations(landscape.KINDS, 5) == 5 * 7 + 25 * 4


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="at least one direction, of the kinds dominant, bulk"):
        Landscape(QUADRATIC, CENTER, {})
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        Landscape(QUADRATIC, CENTER, {"x": CENTER}, chunk=0)
    endless = oa.Objective(vector, lambda v: jnp.sum(v) * jnp.inf)
    with pytest.raises(ValueError, match=r"loss at the end of the training is (inf|nan)"):
        landscape.measure(point(objective=endless), ["random"], reach=1.0, resolution=3, seed=0)
