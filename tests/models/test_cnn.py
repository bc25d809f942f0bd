from __future__ import annotations

import jax
import numpy as np
import pytest

import models
from tests.models.test_models import count


@pytest.mark.parametrize(
    ("input_shape", "parameters"), [((32, 32, 3), 30_634), ((28, 28, 1), 320 + 9_248 + 15_690)]
)
def test_parameters(input_shape, parameters):
    assert count(models.create("cnn", input_shape=input_shape, num_classes=10)) == parameters


def convolve(x, kernel, bias):
    """3x3 cross-correlation with zero padding, as a sum over the nine offsets."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return bias + sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def pool(x):
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def test_forward_is_the_formula():
    model = models.create("cnn", input_shape=(8, 4, 2), num_classes=3, channels=(5, 4))
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 8, 4, 2)))
    z = x
    for conv in (model.conv1, model.conv2):
        z = pool(np.maximum(convolve(z, np.asarray(conv.kernel), np.asarray(conv.bias)), 0))
    z = z.reshape(2, -1) @ np.asarray(model.linear.kernel) + np.asarray(model.linear.bias)
    np.testing.assert_allclose(model(x), z, rtol=1e-5, atol=1e-5)


def test_start_is_uniform_within_one_over_root_fan_in():
    model = models.create("cnn", input_shape=(32, 32, 3), num_classes=10)
    layers = (model.conv1, model.conv2, model.linear)
    for layer, fan_in in zip(layers, (27, 288, 2048), strict=True):
        bound = fan_in**-0.5
        assert abs(layer.bias[...]).max() <= bound
        assert abs(layer.kernel[...]).max() <= bound
        # 864 or more samples meet the standard deviation within 5 %.
        np.testing.assert_allclose(layer.kernel[...].std(), bound / 3**0.5, rtol=0.05)
