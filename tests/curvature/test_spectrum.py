"""Densities, traces, norms and energy shares of operators with prescribed spectra."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import PartitionSpec as P

import optax_accel as oa
from optax_accel import curvature
from optax_accel.curvature import (
    Estimate,
    SpectralDensity,
    energy_shares,
    frobenius_norm,
    spectral_density,
    spectrum,
    trace,
)

SIZE = 60
ROTATION = np.linalg.qr(np.random.default_rng(4).normal(size=(SIZE, SIZE)))[0]
SPECTRA = {
    "random": np.random.default_rng(5).normal(size=SIZE),
    "clustered": np.repeat([8.0, 2.0, 0.0], [5, 15, 40]),
    "indefinite": np.concatenate([[-30.0, 20.0], np.linspace(-1, 1, SIZE - 2)]),
    "outliers": np.concatenate([[50.0, 20.0, 10.0], np.linspace(0, 1, SIZE - 3)]),
    "rank_deficient": np.concatenate([[5.0, -4.0, 3.0, 2.0], np.zeros(SIZE - 4)]),
}
LIKE = {"a": np.zeros((5, 8)), "b": np.zeros(20)}


def split(flat):
    return {"a": flat[..., :40].reshape(*flat.shape[:-1], 5, 8), "b": flat[..., 40:]}


class Matrix:
    """A dense matrix as an operator on a pytree with two leaves."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.like = jax.tree.map(lambda x: x.astype(matrix.dtype), LIKE)

    def __call__(self, vector):
        return split(self.matrix @ jnp.concatenate([vector["a"].ravel(), vector["b"]]))

    def block(self, block):
        rows = block["a"].reshape(-1, 40)
        return split(jnp.concatenate([rows, block["b"]], axis=1) @ self.matrix)


def operator(name, rotation=ROTATION):
    return Matrix(jnp.asarray((rotation * SPECTRA[name]) @ rotation.T))


def over_keys(estimate, num):
    """The estimates for many keys; inside jit, where the loops are unrolled."""
    return jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), num))


def check_calibration(values, errors, truth):
    """The truth lies within 2 and 3 standard errors as often as for a normal distribution.

    Nearly: 20 to 30 samples estimate their spread with an error, and squares are skewed.
    """
    deviation = np.abs(values - truth) / errors
    assert 0.88 <= np.mean(deviation < 2) <= 0.99
    assert np.mean(deviation < 3) >= 0.97
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(len(values))


# -- spectral density ------------------------------------------------------------------------------


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
    monkeypatch.setattr(spectrum, "_draw", lambda *_: split(starts))
    density = spectral_density(operator("clustered"), key=0, num_probes=4, num_products=200)
    for probe in (0, 3):
        nodes, weights = density.nodes[probe], density.weights[probe]
        np.testing.assert_allclose(weights[np.abs(nodes - 2) < 1e-9], [1], rtol=1e-12)
        np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-12)
    for probe in (1, 2):
        np.testing.assert_allclose(density.nodes[probe], [0, 2, 8], atol=1e-9)


def test_density_of_the_zero_matrix_and_of_nothing():
    zero = spectral_density(lambda v: 0 * v, key=0, num_probes=2, like=jnp.ones(5))
    np.testing.assert_array_equal(zero.nodes, 0)
    np.testing.assert_array_equal(zero.weights, 1)
    nothing = spectral_density(lambda v: v, key=0, like={})
    assert nothing.nodes.shape == (8, 0)


# -- trace and norm --------------------------------------------------------------------------------


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


# -- energy shares ---------------------------------------------------------------------------------


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


# -- curvature operators ---------------------------------------------------------------------------


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
    for operator in operators:
        for got, expected in zip(everything(operator), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-3)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "settings", "error", "message"),
    [
        (spectral_density, {"num_probes": 0}, ValueError, "`num_probes` must be at least 1"),
        (spectral_density, {"num_products": 7}, ValueError, "`num_products` must be at least 8"),
        (spectral_density, {"probes": "uniform"}, ValueError, "`probes` must be one of"),
        (spectral_density, {"like": None}, TypeError, "give `like=`"),
        (spectral_density, {"key": 0.5}, TypeError, "`key` must be a PRNG key"),
        (trace, {"num_products": 2}, ValueError, "`num_products` must be at least 3"),
        (trace, {"method": "exact"}, ValueError, "`method` must be one of"),
        (frobenius_norm, {"num_products": 10.0}, TypeError, "`num_products` must be an integer"),
    ],
)
def test_errors(function, settings, error, message):
    settings = {"key": 0, "like": jnp.ones(100), **settings}
    with pytest.raises(error, match=message):
        function(lambda v: v, **settings)


def test_errors_of_the_rest():
    with pytest.raises(ValueError, match="`num_probes` must be at least 1"):
        energy_shares(lambda v: v, jnp.eye(1, 4), key=0, num_probes=0)
    density = spectral_density(lambda v: v, key=0, num_products=8, like=jnp.ones(4))
    with pytest.raises(ValueError, match="`width` must lie in"):
        density.density(jnp.zeros(3), width=0.0)
    with pytest.raises(ValueError, match="`order` must be at least 0"):
        density.moment(-1)


# -- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_quantiles_of_the_t_distribution(freedom, confidence):
    want = scipy.stats.t.ppf((1 + confidence) / 2, freedom)
    assert abs(spectrum._student_quantile(confidence, freedom) / want - 1) < 1e-9


EIGENVALUES = np.concatenate([[10.0, 7.0, 5.0, 4.0, 3.0], np.linspace(1.0, -0.3, 95)])


def random_weights(num_probes, repeats=1000):
    """Squared components of random signs along rotated eigenvectors."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(100, 100)))[0]
    return (rng.choice([-1.0, 1.0], size=(repeats, num_probes, 100)) @ rotation) ** 2


def test_intervals_cover_what_they_say():
    """As often as 0.95 within what is documented; two standard errors do not."""
    samples = random_weights(5) @ EIGENVALUES
    truth, covered, naive = EIGENVALUES.sum(), [], []
    for each in samples:
        error = each.std(ddof=1) / np.sqrt(5)
        low, high = Estimate(each.mean(), error, 5, num_samples=5).interval()
        covered.append(low <= truth <= high)
        naive.append(abs(each.mean() - truth) <= 1.96 * error)
    assert 0.91 <= np.mean(covered) <= 0.97
    assert np.mean(naive) < 0.88


def test_bands_cover_the_density():
    """Also where one eigenvalue stands alone, whose weight is far from normal."""
    weights, grid = random_weights(4, 300) / 100, np.array([10.0, 6.0, 3.5, 0.8, 0.3])
    bells = np.exp(-(((grid[:, None] - EIGENVALUES) / 0.3) ** 2) / 2) / (0.3 * np.sqrt(2 * np.pi))
    truth = bells.mean(axis=1)

    @jax.jit
    @jax.vmap
    def band(weights):
        nodes = jnp.broadcast_to(jnp.asarray(EIGENVALUES, weights.dtype), weights.shape)
        density = SpectralDensity(nodes, weights, 400, dimension=100)
        return density.band(grid, width=0.3), density.density(grid, width=0.3)

    (low, high), (mean, error) = jax.tree.map(np.asarray, band(jnp.asarray(weights, jnp.float32)))
    covered = np.mean((low <= truth) & (truth <= high), axis=0)
    assert np.all((covered >= 0.91) & (covered <= 0.985)), covered
    assert np.mean(np.abs(mean - truth) <= 1.96 * error) < 0.88


def test_estimates_know_their_samples():
    diagonal = jnp.linspace(1.0, 2.0, 30)
    options = {"key": jax.random.key(0), "like": diagonal}
    exact = trace(lambda v: diagonal * v, num_products=30, **options)
    assert exact.num_samples == 0
    assert exact.interval() == (exact.value, exact.value)
    assert trace(lambda v: diagonal * v, num_products=9, **options).num_samples == 3
    one = trace(lambda v: diagonal * v, num_products=1, method="hutchinson", **options)
    assert np.all(np.isnan(one.interval()))
    with pytest.raises(ValueError, match="`confidence` must lie in"):
        one.interval(1.0)
    with pytest.raises(ValueError, match="give SpectralDensity its `dimension`"):
        SpectralDensity(jnp.ones((2, 3)), jnp.ones((2, 3)) / 3, 6).band(jnp.ones(1))
