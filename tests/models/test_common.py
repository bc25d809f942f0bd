from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import _common

# The axes of (N, height, width, groups, channels of a group) over which each takes its averages.
AXES = {"batch": (0, 1, 2), "layer": (3, 4), "group": (1, 2, 4), "instance": (1, 2)}


def make(norm, width, **options):
    options = {"dtype": None, "param_dtype": "float32", "rngs": nnx.Rngs(0)} | options
    return _common.normalization(norm, width, **options)


@pytest.mark.parametrize("norm", _common.NORMS)
def test_normalization_is_the_formula(norm):
    layer = make(norm, 6, epsilon=0.1)
    layer.scale[...], layer.bias[...] = 1.0 + jnp.arange(6.0), jnp.arange(6.0) / 7
    x = 2 + jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
    parts = np.asarray(x).reshape(3, 4, 5, 1, 6)
    mean = parts.mean(AXES[norm], keepdims=True)
    variance = parts.var(AXES[norm], keepdims=True)
    expected = ((parts - mean) / np.sqrt(variance + 0.1)).reshape(x.shape)
    expected = expected * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_groups_have_at_least_two_channels():
    widths = {16: 8, 24: 4, 64: 32, 200: 4, 256: 32, 7: 1, 2: 1}
    made = {n: nnx.eval_shape(lambda n=n: make("group", n)).num_groups for n in widths}
    assert made == widths
    x = jax.random.normal(jax.random.key(0), (3, 4, 5, 8))
    expected = np.asarray(x).reshape(3, 20, 4, 2)
    deviation = np.sqrt(expected.var((1, 3), keepdims=True) + 1e-5)
    expected = (expected - expected.mean((1, 3), keepdims=True)) / deviation
    np.testing.assert_allclose(make("group", 8)(x), expected.reshape(x.shape), atol=1e-5)


@pytest.mark.parametrize("norm", _common.NORMS)
def test_statistics_are_in_float32(norm):
    """Far from zero, bfloat16 would lose what differs from the mean."""
    x = 256 + 2 * jax.random.randint(jax.random.key(0), (2, 32, 32, 64), 0, 9)
    low = make(norm, 64, dtype=jnp.bfloat16)(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), make(norm, 64)(x * 1.0), atol=0.02)


def test_maximum_of_blocks_and_its_gradient():
    x = jnp.array([[3.0, 3.0, 1.0, 2.0], [0.0, 1.0, jnp.nan, 5.0]])[None, :, :, None]
    x = jnp.concatenate([x, 4.0 + x[:, ::-1]], axis=-1)
    out, back = jax.vjp(_common.halve_by_maximum, x)
    np.testing.assert_array_equal(out[0, 0], [[3, 7], [np.nan, np.nan]])
    (slope,) = back(jnp.ones_like(out))
    # One of each block gets all of it, of equal ones the first.
    np.testing.assert_array_equal(slope[0, :, :, 0], [[1, 0, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_array_equal(slope[0, :, :, 1], [[0, 0, 1, 0], [1, 0, 0, 0]])


def test_running_averages_are_in_float32_or_wider(x64):
    for kind, kept in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        layer = make("batch", 3, param_dtype=kind)
        assert {layer.mean.dtype, layer.var.dtype} == {jnp.dtype(kept)}
        assert layer.scale.dtype == kind
    layer(jnp.ones((4, 3)))
    assert layer.mean.dtype == jnp.float64


def test_no_normalization_is_the_identity_and_unknown_ones_are_refused():
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(make(None, 6)(x), x)
    with pytest.raises(ValueError, match="unknown norm 'mean'; valid: batch, layer, group, inst"):
        make("mean", 6)
    with pytest.raises(ValueError, match="which Mlp does not have"):
        models.create("mlp", input_shape=(4,), num_classes=2, norm="instance")
    with pytest.raises(ValueError, match=r"dropout_rate must be at least 0 and below 1, got 1\.5"):
        _common.Layers().dropout(1.5)
