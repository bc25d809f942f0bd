from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from tests.models.test_models import count


@pytest.mark.parametrize(
    ("input_shape", "options", "parameters"),
    [
        ((28, 28, 1), {}, 199_210),  # 784-200-200-10, Song et al. 2024
        ((8, 8, 1), {}, 4_810),  # 64-64-10
        ((8, 8, 1), {"hidden_sizes": (64, 128, 64)}, 64 * 65 + 65 * 128 + 129 * 64 + 650),
        ((5,), {"hidden_sizes": ()}, 60),
    ],
)
def test_parameters(input_shape, options, parameters):
    model = models.create("mlp", input_shape=input_shape, num_classes=10, **options)
    assert count(model) == parameters


@pytest.mark.parametrize(
    ("activation", "function"), [("tanh", np.tanh), ("relu", lambda z: np.maximum(z, 0))]
)
def test_forward_is_the_formula(activation, function):
    options = {"hidden_sizes": (4, 3), "activation": activation}
    model = models.create("mlp", input_shape=(2, 3), num_classes=2, **options)
    weights = [(np.asarray(layer.kernel), np.asarray(layer.bias)) for layer in model.layers]
    x = np.asarray(jax.random.normal(jax.random.key(1), (5, 2, 3)))
    z = x.reshape(5, 6)
    for kernel, bias in weights[:-1]:
        z = function(z @ kernel + bias)
    z = z @ weights[-1][0] + weights[-1][1]
    np.testing.assert_allclose(model(x), z, rtol=1e-5, atol=1e-6)


def test_start_is_uniform_within_one_over_root_fan_in():
    model = models.create("mlp", input_shape=(28, 28, 1), num_classes=10)
    for layer, fan_in in zip(model.layers, (784, 200, 200), strict=True):
        bound = fan_in**-0.5
        for leaf in (layer.kernel[...], layer.bias[...]):
            assert jnp.abs(leaf).max() <= bound
        # A uniform distribution has the standard deviation bound / sqrt(3); 2,000 or more samples
        # meet it within 5 %.
        np.testing.assert_allclose(layer.kernel[...].std(), bound / 3**0.5, rtol=0.05)


def test_double_precision(x64):
    model = models.create("mlp", input_shape=(3,), num_classes=2, param_dtype="float64")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float64")}
    assert model(jnp.ones((1, 3))).dtype == jnp.float64
