"""Spectral densities of operators with prescribed spectra."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import optax_accel as oa
from optax_accel import curvature
from optax_accel.curvature import (
    density,
    spectral_density,
    trace,
)
from tests.curvature.rotated_matrices import (
    ROTATION,
    SIZE,
    SPECTRA,
    Matrix,
    operator,
    split,
)


@pytest.mark.parametrize("name", SPECTRA)
def test_quadrature_is_exact_for_moments(x64, name):
    """Random signs see the diagonal exactly, so on a diagonal matrix every probe is exact."""
    product = operator(name, np.eye(SIZE))
    density = spectral_density(product, key=0, num_probes=4, num_products=24)
    eigenvalues = SPECTRA[name]
    assert density.num_products == 4 * density.nodes.shape[1]
    np.testing.assert_allclose(jnp.sum(density.weights, axis=1), 1, rtol=1e-12)
    for order in range(2 * density.nodes.shape[1]):
        got, error, *_ = density.moment(order)
        scale = np.mean(np.abs(eigenvalues) ** order)
        np.testing.assert_allclose(got, np.mean(eigenvalues**order), atol=1e-9 * scale)
        assert error < 1e-9 * scale


@pytest.mark.parametrize("name", ["random", "indefinite"])
def test_full_length_processes_give_the_smeared_spectrum(x64, name):
    product = operator(name, np.eye(SIZE))
    density = spectral_density(product, key=0, num_probes=4, num_products=4 * SIZE)
    eigenvalues = np.sort(SPECTRA[name])
    np.testing.assert_allclose(density.nodes[0], eigenvalues, atol=1e-8)
    grid = np.linspace(-3, 3, 7)
    bells = np.exp(-((grid[:, None] - eigenvalues[None]) ** 2) / (2 * 0.3**2))
    want = bells.mean(axis=1) / (0.3 * np.sqrt(2 * np.pi))
    got, error = density.density(grid, width=0.3)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)
    assert jnp.all(error < 1e-6)


@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
def test_density_lies_within_its_error_band(x64, probes):
    density = spectral_density(
        operator("outliers"), key=1, num_probes=40, num_products=1200, probes=probes
    )
    eigenvalues = SPECTRA["outliers"]
    np.testing.assert_allclose(density.nodes[:, -3:], [[10, 20, 50]] * 40, rtol=1e-6)
    grid = np.array([0.2, 0.5, 0.8, 10, 20, 50])
    bells = np.exp(-((grid[:, None] - eigenvalues[None]) ** 2) / (2 * 0.5**2))
    want = bells.mean(axis=1) / (0.5 * np.sqrt(2 * np.pi))
    got, error = density.density(grid, width=0.5)
    assert jnp.all((jnp.abs(got - want) < 4 * error)[:3])
    # The probes' weights of a lone eigenvalue are chi-squared, with variance 2.
    spread = want[3:] * np.sqrt(2 / 40)
    assert jnp.all(jnp.abs(got - want)[3:] < 3.5 * spread)
    assert jnp.all((error[3:] > 0.4 * spread) & (error[3:] < 2.5 * spread))
    line = np.linspace(-5, 60, 2000)
    default, _ = density.density(line)
    np.testing.assert_allclose(jnp.sum(default) * (line[1] - line[0]), 1, rtol=1e-3)


@pytest.mark.parametrize(("name", "num"), [("clustered", 3), ("rank_deficient", 5)])
def test_exhausted_processes_stop(x64, name, num):
    density = spectral_density(operator(name), key=0, num_probes=4, num_products=200)
    assert density.nodes.shape == (4, num)
    assert density.num_products == 4 * num
    want = np.unique(SPECTRA[name])
    np.testing.assert_allclose(density.nodes, np.tile(want, (4, 1)), atol=1e-9)


def test_a_process_that_ends_before_the_others(x64, monkeypatch):
    eigenvector = jnp.asarray(ROTATION[:, 7])  # of 2, with which the process ends at once
    starts = jnp.stack([eigenvector, eigenvector + jnp.ones(SIZE), jnp.ones(SIZE), eigenvector])
    monkeypatch.setattr(density, "random_block", lambda *_: split(starts))
    spectrum = spectral_density(operator("clustered"), key=0, num_probes=4, num_products=200)
    for probe in (0, 3):
        nodes, weights = spectrum.nodes[probe], spectrum.weights[probe]
        np.testing.assert_allclose(weights[np.abs(nodes - 2) < 1e-9], [1], rtol=1e-12)
        np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-12)
    for probe in (1, 2):
        np.testing.assert_allclose(spectrum.nodes[probe], [0, 2, 8], atol=1e-9)


@pytest.mark.parametrize("name", ["outliers", "clustered"])
def test_the_loop_in_the_graph_takes_the_same_steps(x64, name):
    """With the products one after the other, as on one CPU device, and all at once."""
    options = {"num_probes": 3, "num_products": 30}
    matrix = jnp.asarray((ROTATION * SPECTRA[name]) @ ROTATION.T)
    hosted = spectral_density(Matrix(matrix), key=0, **options)

    @functools.partial(jax.jit, static_argnames="devices")
    def compiled(matrix, devices):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "device_count", lambda: devices)
            return spectral_density(Matrix(matrix), key=0, loop="graph", **options)

    for devices in (1, 2):
        graph = compiled(matrix, devices)
        assert graph.num_products == 30
        for order in (1, 2, 3):
            got, want = graph.moment(order), hosted.moment(order)
            np.testing.assert_allclose(got.value, want.value, rtol=1e-10)
        places = jnp.array([0.5, 10.0, 50.0])
        got, want = (spectrum.density(places, width=0.5) for spectrum in (graph, hosted))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


def test_density_of_the_zero_matrix_and_of_nothing():
    zero = spectral_density(lambda v: 0 * v, key=0, num_probes=2, like=jnp.ones(5))
    np.testing.assert_array_equal(zero.nodes, 0)
    np.testing.assert_array_equal(zero.weights, 1)
    nothing = spectral_density(lambda v: v, key=0, like={})
    assert nothing.nodes.shape == (8, 0)


@pytest.mark.parametrize("size", [1e-25, 1e20, 1e30])
def test_squares_neither_overflow_nor_underflow(size):
    matrix = jnp.asarray((ROTATION * SPECTRA["outliers"]) @ ROTATION.T, jnp.float32)
    small, large = (
        spectral_density(Matrix(factor * matrix), key=0, num_probes=4, num_products=40)
        for factor in (jnp.float32(1), jnp.float32(size))
    )
    np.testing.assert_allclose(large.nodes / size, small.nodes, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(large.weights, small.weights, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(large.moment(1).value / size, small.moment(1).value, rtol=1e-4)
    np.testing.assert_allclose(large.moment(1)[1] / size, small.moment(1)[1], rtol=1e-3)
    grid = jnp.array([0.5, 10.0, 20.0, 50.0])
    for width in (0.5, None):
        of_large = (size * grid, None if width is None else size * width)
        for got, want in (
            (large.density(*of_large), small.density(grid, width)),
            (large.band(*of_large), small.band(grid, width)),
        ):
            np.testing.assert_allclose(jnp.stack(got) * size, jnp.stack(want), rtol=1e-2)


def predict(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(outputs, y):
    return 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1))


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(3)
    params = {"w": rng.normal(size=(8, 8)), "v": rng.normal(size=(8, 8))}
    batch = {"x": rng.normal(size=(16, 8)), "y": rng.normal(size=(16, 8))}
    return jax.tree.map(np.float32, (params, batch))


@pytest.mark.slow
def test_batches_and_shards_see_the_same_spectrum(network):
    params, batch = network
    build = functools.partial(curvature.hessian, oa.Objective(predict, loss))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, P("data"))
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 6], batch) for i in (0, 6, 12)]
    whole = build(params, **batch)
    operators = [
        build(params, batches=parts),
        build(jax.device_put(params, sharding), **jax.device_put(batch, sharding)),
    ]
    eigenvalues = np.linalg.eigvalsh(whole.dense())

    def everything(operator):
        density = spectral_density(operator, key=0, num_probes=4, num_products=24)
        return [
            *density.density(eigenvalues[-3:], width=0.1),
            *trace(operator, key=0)[:2],
        ]

    want = everything(whole)
    assert abs(want[2] - eigenvalues.sum()) < 4 * want[3]
    for other in operators:
        for got, expected in zip(everything(other), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_probes": 0}, ValueError, "`num_probes` must be at least 1"),
        ({"num_products": 7}, ValueError, "`num_products` must be at least 8"),
        ({"probes": "uniform"}, ValueError, "`probes` must be one of"),
        ({"loop": "device"}, ValueError, "`loop` must be one of"),
        ({"like": None}, TypeError, "give `like=`"),
        ({"key": 0.5}, TypeError, "`key` must be a PRNG key"),
    ],
)
def test_errors(settings, error, message):
    settings = {"key": 0, "like": jnp.ones(100), **settings}
    with pytest.raises(error, match=message):
        spectral_density(lambda v: v, **settings)


def test_errors_when_a_density_is_evaluated():
    density = spectral_density(lambda v: v, key=0, num_products=8, like=jnp.ones(4))
    with pytest.raises(ValueError, match="`width` must lie in"):
        density.density(jnp.zeros(3), width=0.0)
    with pytest.raises(ValueError, match="`order` must be at least 0"):
        density.moment(-1)
