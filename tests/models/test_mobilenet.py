from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _common
from models.mobilenet import InvertedResidual
from tests.models.test_models import abstract, abstract_outputs, count, forward

IMAGENET = {"input_shape": (224, 224, 3), "num_classes": 1000, "dropout_rate": 0.0}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 3_504_872),  # num_params in torchvision's documentation
        ({"small_images": True}, 3_504_872),
        # Table 4 of the paper has 6.9 million; the number is that of the layers.
        ({"width_multiplier": 1.4}, 6_108_776),
    ],
)
def test_parameters(options, parameters):
    assert count(abstract("mobilenet_v2", **IMAGENET, **options)) == parameters


@pytest.mark.parametrize(("small", "size"), [(False, 112), (True, 224)])
def test_pyramid(small, size):
    """Table 2 of the paper: 112, 56, 28, 14 and 7 pixels for 224; CIFAR's version divides by 8."""
    model = abstract("mobilenet_v2", **IMAGENET, small_images=small)
    shape, shapes = abstract_outputs(model.conv, (1, 224, 224, 3)), []
    assert shape == (1, size, size, 32)
    for block in model.blocks:
        shape = abstract_outputs(block, shape)
        shapes.append((shape[1], shape[3]))
    halved = [1, 1, 2, 3, 3, 4, 4] if small else [0, 1, 2, 3, 3, 4, 4]
    expected = [
        (size >> (n - small), channels)
        for n, channels, repeats in zip(
            halved, (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), strict=True
        )
        for _ in range(repeats)
    ]
    assert shapes == expected


def test_a_block_is_its_formula():
    block = InvertedResidual(_common.Layers(norm=None), 2, 6, 2, strides=1)
    x = np.asarray(4 * jax.random.normal(jax.random.key(0), (2, 4, 5, 2)))

    def relu6(x):
        return np.clip(x, 0, 6)

    h = relu6(x @ np.asarray(block.expand.kernel)[0, 0])
    kernel = np.asarray(block.filter.kernel)[:, :, 0]  # (3, 3, channels): one for each channel
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h = relu6(
        sum(padded[:, i : i + 4, j : j + 5] * kernel[i, j] for i in (0, 1, 2) for j in (0, 1, 2))
    )
    expected = x + h @ np.asarray(block.project.kernel)[0, 0]
    np.testing.assert_allclose(forward(block, x), expected, rtol=1e-4, atol=1e-4)
    assert (h == 6).any()


def test_the_input_is_added_only_where_the_shape_stays():
    zero = nnx.initializers.zeros_init()
    layers = _common.Layers(norm="layer", conv_init=zero)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    for fan_out, strides in ((2, 1), (2, 2), (3, 1)):
        out = forward(InvertedResidual(layers, 2, 2, fan_out, strides), x)
        expected = x if (fan_out, strides) == (2, 1) else jnp.zeros(out.shape)
        np.testing.assert_array_equal(out, expected)
