from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from tests.models.test_models import VGG, abstract, abstract_outputs, count, forward

IMAGENET = {"input_shape": (224, 224, 3), "num_classes": 1000}
CIFAR = {"input_shape": (32, 32, 3), "num_classes": 100}
CONVOLUTIONS = 14_723_136  # of 16 layers, with batch normalization


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        # num_params in torchvision's documentation.
        ("vgg11", IMAGENET, 132_863_336),
        ("vgg16", IMAGENET, 138_357_544),
        ("vgg11_bn", IMAGENET, 132_868_840),
        ("vgg16_bn", IMAGENET, 138_365_992),
        # From the list of layers: a hidden layer of 512 units, or none.
        ("vgg16_cifar", CIFAR, CONVOLUTIONS + 513 * 512 + 513 * 100),
        ("vgg16_bn", CIFAR | {"hidden_sizes": ()}, CONVOLUTIONS + 513 * 100),
        ("vgg11_cifar", CIFAR, 9_225_984 + 513 * 512 + 513 * 100),
    ],
)
def test_parameters(name, options, parameters):
    model = abstract(name, **options, dropout_rate=0.0)
    assert count(model) == parameters
    kinds = [type(module) for _, module in nnx.iter_modules(model)]
    if options is IMAGENET:
        # The name counts the layers with weights.
        assert f"vgg{kinds.count(nnx.Conv) + kinds.count(nnx.Linear)}" == name.removesuffix("_bn")
        assert abstract_outputs(model, (2, 224, 224, 3)) == (2, 1000)


def test_forward_is_the_formula():
    """One pixel that only the middle of each kernel can see."""
    options = {"input_shape": (32, 32, 1), "num_classes": 3, "norm": None}
    model = models.Vgg(**VGG | options)
    x = jnp.zeros((2, 32, 32, 1)).at[0, 0, 0].set(2.0).at[1, 0, 0].set(-1.0)
    z = np.array([[2.0], [-1.0]])
    for stage in model.stages:
        for layer in stage:
            middle = jnp.zeros_like(layer.conv.kernel[...]).at[1, 1].set(layer.conv.kernel[1, 1])
            layer.conv.kernel[...] = middle
            z = np.maximum(z @ np.asarray(middle[1, 1]), 0)
    hidden, last = model.layers
    hidden.kernel[...] *= 100
    z = np.maximum(z @ np.asarray(hidden.kernel), 0) @ np.asarray(last.kernel)
    assert (z != 0).any()
    np.testing.assert_allclose(forward(model, x), z, rtol=1e-4, atol=1e-9)


def test_start():
    @jax.jit  # of what is not returned nothing is computed
    def start():
        model = models.Vgg(**VGG | {"num_classes": 3, "width": 16, "hidden_sizes": (64, 64)})
        conv, linear = model.stages[3][1].conv, model.layers[0]
        return conv.kernel[...], linear.kernel[...], [conv.bias[...], linear.bias[...]]

    conv, linear, biases = start()
    np.testing.assert_allclose(conv.std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(linear.std(), 0.01, rtol=0.05)
    assert all((bias == 0).all() for bias in biases)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_is_behind_the_hidden_layers(rate):
    options = VGG | {"num_classes": 3, "dropout_rate": rate}
    model = nnx.eval_shape(lambda: models.Vgg(**options))
    assert [dropout.rate for dropout in model.dropouts] == [rate]
    # Without it there is no random state.
    assert len(jax.tree.leaves(nnx.state(model, nnx.RngState))) == (2 if rate else 0)


def test_wrong_options():
    with pytest.raises(ValueError, match="height and width multiples of 32, got"):
        models.create("vgg16", input_shape=(28, 28, 1), num_classes=10)
    with pytest.raises(ValueError, match=r"depth must be one of 11, 13, 16, 19, got 12"):
        models.Vgg(**CIFAR, depth=12)
    with pytest.raises(ValueError, match="no option 'norm'"):
        models.create("vgg16_bn", **CIFAR, norm="group")
