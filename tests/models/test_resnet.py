from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.resnet import _Block, _Layers
from tests.models.test_models import count, forward


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 269_722), ({"shortcut": "identity"}, 269_722), ({"shortcut": "projection"}, 272_474)],
)
def test_parameters(options, parameters):
    model = models.create("resnet20", input_shape=(32, 32, 3), num_classes=10, **options)
    assert count(model) == parameters


def test_twenty_layers_have_weights():
    model = models.create("resnet20", input_shape=(32, 32, 3), num_classes=10)
    kinds = [type(module) for _, module in nnx.iter_modules(model)]
    assert kinds.count(nnx.Conv) + kinds.count(nnx.Linear) == 20


def test_images_are_halved_twice():
    model = models.create("resnet20", input_shape=(8, 16, 3), num_classes=10)
    x = jnp.ones((1, 8, 16, 16))
    shapes = []
    for block in model.blocks:
        x = block(x)
        shapes.append(x.shape[1:])
    assert shapes == [(8, 16, 16)] * 3 + [(4, 8, 32)] * 3 + [(2, 4, 64)] * 3


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_a_block_whose_branch_is_off_is_its_shortcut(shortcut):
    layers = _Layers(None, None, "float32", nnx.Rngs(0))
    block = _Block(layers, 2, 4, 2, shortcut)
    block.norm2.scale[...] = jnp.zeros(4)
    x = jax.random.normal(jax.random.key(0), (3, 4, 6, 2))
    out = block(x)
    assert out.shape == (3, 2, 3, 4)
    if shortcut == "identity":
        expected = np.concatenate([x[:, ::2, ::2], np.zeros((3, 2, 3, 2))], axis=-1)
    else:
        conv, norm = block.projection.layers
        expected = norm(x[:, ::2, ::2] @ conv.kernel[0, 0])
    np.testing.assert_allclose(out, np.maximum(expected, 0), rtol=1e-5, atol=1e-5)


def test_train_mode_normalizes_by_the_batch_and_eval_mode_by_the_running_average():
    model = models.create("resnet20", input_shape=(4, 4, 3), num_classes=10)
    x = 3 + jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    hidden = model.conv(x)
    model(x)
    # Decay 0.9 from the initial mean 0.
    np.testing.assert_allclose(
        model.norm.mean[...], 0.1 * hidden.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    statistics = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    alone = nnx.view(model, use_running_average=True)
    model.eval()
    logits = forward(model, x)
    jax.tree.map(np.testing.assert_array_equal, statistics, nnx.state(model, nnx.BatchStat))
    # In eval mode an example does not depend on its batch; a view does the same as eval().
    np.testing.assert_allclose(forward(alone, x[:1]), logits[:1], rtol=1e-4, atol=1e-4)


def test_statistics_are_shared_over_a_replica_axis():
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    whole = models.create("resnet20", input_shape=(4, 4, 3), num_classes=10)
    shared = models.create("resnet20", input_shape=(4, 4, 3), num_classes=10, axis_name="replica")
    graphdef, state = nnx.split(shared)
    logits = jax.vmap(lambda x: nnx.merge(graphdef, state, copy=True)(x), axis_name="replica")(
        x.reshape(2, 4, 4, 4, 3)
    )
    np.testing.assert_allclose(logits.reshape(8, 10), forward(whole, x), rtol=1e-3, atol=1e-3)


def test_convolutions_start_from_he_normal():
    model = models.create("resnet20", input_shape=(8, 8, 3), num_classes=10)
    kernel = model.blocks[-1].conv2.kernel[...]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
    assert (model.norm.scale[...] == 1).all()
    assert (model.norm.bias[...] == 0).all()
