"""Estimates, their confidence intervals and bands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from optax_accel.curvature import (
    Estimate,
    SpectralDensity,
    estimates,
    trace,
)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_quantiles_of_the_t_distribution(freedom, confidence):
    want = scipy.stats.t.ppf((1 + confidence) / 2, freedom)
    assert abs(estimates._student_quantile(confidence, freedom) / want - 1) < 1e-9


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
