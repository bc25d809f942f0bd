from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.vit import _cut
from tests.models.test_models import VIT, abstract, abstract_outputs, count, forward

IMAGENET = {"input_shape": (224, 224, 3), "num_classes": 1000}


def tiny(**options):
    return models.Vit(**VIT | {"input_shape": (8, 12, 2), "num_classes": 3} | options)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        # B and L: num_params in torchvision's documentation; all: from the list of layers.
        ("vit_ti", {}, 5_717_416),
        ("vit_s", {}, 22_050_664),
        ("vit_b", {}, 86_567_656),
        ("vit_l", {}, 304_326_632),
        ("vit_b", {"patch_size": 32}, 88_224_232),
        # Neither the token nor its position.
        ("vit_ti", {"pool": "mean"}, 5_717_416 - 2 * 192),
    ],
)
def test_parameters(name, options, parameters):
    model = abstract(name, **IMAGENET, **options)
    assert count(model) == parameters
    assert abstract_outputs(model, (2, 224, 224, 3)) == (2, 1000)


def open_head(model):
    """Gives the classifier weights, which start from zeros."""
    shape = model.linear.kernel.shape
    model.linear.kernel[...] = jax.random.normal(jax.random.key(7), shape)
    return model


def test_patches_are_those_of_a_strided_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 2))
    kernel = jax.random.normal(jax.random.key(1), (4, 4, 2, 8))
    axes = ("NHWC", "HWIO", "NHWC")
    convolved = jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=axes)
    tokens = _cut(x, 4) @ kernel.reshape(32, 8)
    assert tokens.shape == (2, 6, 8)
    np.testing.assert_allclose(tokens, convolved.reshape(2, 6, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_order_of_patches_matters_by_the_positions_only(pool):
    model = open_head(tiny(pool=pool))
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 2))
    turned = jnp.roll(x, 4, axis=2)  # moves whole patches
    assert abs(forward(model, x) - forward(model, turned)).max() > 1e-3
    model.positions[...] = jnp.zeros(model.positions.shape)
    np.testing.assert_allclose(forward(model, x), forward(model, turned), rtol=1e-4, atol=1e-5)


def test_pools():
    """Without layers: the token sees nothing of the image, the mean is that of the patches."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 2))
    model = open_head(tiny(num_layers=0))
    model.token[...] = jnp.arange(8.0)
    h = np.asarray(model.token[...] + model.positions[0])
    h = (h - h.mean()) / np.sqrt(h.var() + 1e-6)
    expected = np.broadcast_to(h @ np.asarray(model.linear.kernel), (2, 3))
    np.testing.assert_allclose(forward(model, x), expected, rtol=1e-4, atol=1e-5)
    model = open_head(tiny(num_layers=0, pool="mean"))
    assert model.token is None
    assert model.positions.shape == (6, 8)
    patches = np.asarray(x).reshape(2, 2, 4, 3, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 32)
    h = patches @ np.asarray(model.patches.kernel) + np.asarray(model.positions[...])
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    expected = h.mean(1) @ np.asarray(model.linear.kernel)
    np.testing.assert_allclose(forward(model, x), expected, rtol=1e-4, atol=1e-5)


def test_start():
    @jax.jit  # of what is not returned nothing is computed
    def start():
        model = tiny(embedding_size=64, num_heads=4)
        layer = model.layers[0]
        parts = layer.attention.projection.kernel, model.patches.kernel, model.positions
        return *(part[...] for part in parts), layer.linear1.bias[...], model.linear.kernel[...]

    projection, patches, positions, bias, classifier = start()
    bound = (6 / 128) ** 0.5
    assert 0.98 * bound < abs(projection).max() <= bound
    np.testing.assert_allclose(patches.std(), 32**-0.5, rtol=0.05)
    np.testing.assert_allclose(positions.std(), 0.02, rtol=0.1)
    assert 0 < abs(bias).max() < 1e-5
    assert (classifier == 0).all()


def test_dropout_double_precision_and_wrong_options(x64):
    kinds = nnx.RngState
    models_ = [nnx.eval_shape(lambda r=r: tiny(dropout_rate=r)) for r in (0.0, 0.1)]
    assert [len(jax.tree.leaves(nnx.state(m, kinds))) > 0 for m in models_] == [False, True]
    model = nnx.eval_shape(lambda: tiny(param_dtype="float64"))
    x = jax.ShapeDtypeStruct((2, 8, 12, 2), jnp.float64)
    assert nnx.eval_shape(lambda m, x: m(x), model, x).dtype == jnp.float64
    with pytest.raises(ValueError, match="unknown pool 'max'; valid: token, mean"):
        tiny(pool="max")
    with pytest.raises(ValueError, match="height and width multiples of 5, got"):
        tiny(patch_size=5)
