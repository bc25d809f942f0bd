from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import _common
from models.wide_resnet import _Block
from tests.models.test_models import abstract, abstract_outputs, count, forward

CIFAR = {"input_shape": (32, 32, 3), "num_classes": 10}


@pytest.mark.parametrize(
    # Table 4 of the paper has 36.5 and 11.0 million.
    ("name", "parameters"),
    [("wrn_28_10", 36_479_194), ("wrn_16_8", 10_961_370)],
)
def test_parameters(name, parameters):
    model = abstract(name, **CIFAR)
    assert count(model) == parameters
    assert len(model.blocks) == (12 if name == "wrn_28_10" else 6)
    assert abstract_outputs(model, (2, 32, 32, 3)) == (2, 10)


def convolve(x, kernel, strides):
    """Cross-correlation with zero padding of half the kernel's size."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )
    return out[:, ::strides, ::strides]


@pytest.mark.parametrize(("fan_out", "strides"), [(3, 1), (5, 2)])
def test_a_block_is_its_formula(fan_out, strides):
    block = _Block(_common.Layers(norm="layer"), 3, fan_out, strides, dropout_rate=0.0)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 4, 6, 3)))

    def norm_and_relu(x):
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return np.maximum((x - x.mean(-1, keepdims=True)) / deviation, 0)

    h = norm_and_relu(x)
    y = convolve(h, np.asarray(block.conv1.kernel), strides)
    y = convolve(norm_and_relu(y), np.asarray(block.conv2.kernel), 1)
    # The shortcut that changes the shape sees the normalized input, the other one the input.
    y += x if fan_out == 3 else convolve(h, np.asarray(block.shortcut.kernel), strides)
    np.testing.assert_allclose(forward(block, x), y, rtol=1e-4, atol=1e-4)


def test_dropout_is_between_the_convolutions():
    layers = _common.Layers(norm="layer")
    block = _Block(layers, 3, 3, 1, dropout_rate=0.5)
    block.conv2.kernel[...] = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    block.conv1.kernel[...] = block.conv2.kernel[...]
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 3))
    branch = forward(block, x) - x
    block.eval()
    full = forward(block, x) - x
    # Some are left out, the others doubled.
    dropped = branch == 0
    assert 0.3 < dropped[full > 0].mean() < 0.7
    np.testing.assert_allclose(branch, np.where(dropped, 0, 2 * full), rtol=1e-4, atol=1e-5)


def test_wrong_depth():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4 .*, got 20"):
        models.WideResNet(**CIFAR, depth=20)
