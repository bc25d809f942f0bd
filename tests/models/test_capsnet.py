from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import capsnet
from tests.models.test_models import CAPSNET, abstract, abstract_outputs, count, forward

MNIST = {"input_shape": (28, 28, 1), "num_classes": 10}
CONVOLUTIONS = (81 + 1) * 256 + (81 * 256 + 1) * 256
CAPSULES = 6 * 6 * 32 * 8 * 10 * 16
DECODER = (160 + 1) * 512 + 513 * 1024 + 1025 * 784


@pytest.mark.parametrize("decoder", [True, False])
def test_parameters(decoder):
    """From the list of layers; the paper rounds to 8.2 and 6.8 million (section 5)."""
    model = abstract("capsnet", **MNIST, reconstruction=decoder)
    assert count(model) == CONVOLUTIONS + CAPSULES + DECODER * decoder
    assert count(model) == (8_215_568 if decoder else 6_804_224)
    assert abstract_outputs(model, (2, 28, 28, 1)) == (2, 10)


def test_squash_is_its_formula():
    vectors = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    out = capsnet.squash(jnp.asarray(vectors))
    np.testing.assert_allclose(out[0], vectors[0] / 5 * 25 / 26, rtol=1e-6)
    np.testing.assert_allclose(out[1], vectors[1] / 0.5 * 0.25 / 1.25, rtol=1e-6)
    assert (out[2] == 0).all()
    slope = jax.grad(lambda v: (capsnet.squash(v) + capsnet.lengths(v)[:, None]).sum())
    assert np.isfinite(slope(jnp.asarray(vectors))).all()


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_routing_is_procedure_1(num_iterations):
    predictions = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    capsules, coefficients = capsnet.route(predictions, num_iterations)
    for u, v, c in zip(np.asarray(predictions), capsules, coefficients, strict=True):
        b = np.zeros((5, 3))
        for _ in range(num_iterations):
            weights = np.exp(b) / np.exp(b).sum(1, keepdims=True)
            s = np.stack([sum(weights[i, j] * u[i, j] for i in range(5)) for j in range(3)])
            norm = np.linalg.norm(s, axis=1, keepdims=True)
            expected = norm**2 / (1 + norm**2) * s / norm
            b = b + np.einsum("ijd,jd->ij", u, expected)
        np.testing.assert_allclose(v, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c, weights, rtol=1e-5)
    np.testing.assert_allclose(coefficients.sum(-1), 1, rtol=1e-6)


def test_capsules_that_agree_are_routed_to_their_class():
    """All capsules predict the same for class 0, and opposite things for class 1."""
    predictions = jnp.ones((1, 4, 2, 3)).at[0, ::2, 1].set(-1.0)
    capsules, coefficients = capsnet.route(predictions, 3)
    assert (coefficients[..., 0] > 0.9).all()
    length = capsnet.lengths(capsules)[0]
    assert length[0] > 0.9
    assert length[1] < 0.01
    np.testing.assert_allclose(capsnet.route(predictions, 1)[1], 0.5, rtol=1e-6)


def test_outputs_are_lengths_and_the_decoder_sees_one_class():
    options = CAPSNET | {"reconstruction": True, "hidden_sizes": (5,), "length_scale": 1.0}
    model = models.CapsNet(**options, input_shape=(9, 8, 2), num_classes=3)
    graphdef, state = nnx.split(model)
    x = jax.random.uniform(jax.random.key(0), (4, 9, 8, 2))
    labels = jnp.array([0, 1, 2, 1])

    @jax.jit
    def run(state, x):
        model = nnx.merge(graphdef, state)
        capsules = model.class_capsules(x)
        others = jnp.where(jax.nn.one_hot(labels, 3)[:, :, None] == 1, capsules, 7.0)
        images = [model.reconstruct(c, labels) for c in (capsules, others, capsules + 1)]
        return model(x), capsules, images

    outputs, capsules, images = run(state, x)
    assert capsules.shape == (4, 3, 16)
    np.testing.assert_allclose(outputs, jnp.linalg.norm(capsules, axis=-1), rtol=1e-4)
    assert 0 < outputs.min() < outputs.max() < 1
    assert images[0].shape == x.shape
    assert 0 < images[0].min() < images[0].max() < 1
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()


def test_losses_are_their_formulas():
    lengths = jnp.array([[0.95, 0.05, 0.1], [0.5, 0.6, 0.0]])
    loss = capsnet.margin_loss(lengths, jnp.array([0, 0]))
    np.testing.assert_allclose(loss, [0, 0.4**2 + 0.5 * 0.5**2], atol=1e-6)
    images = jnp.zeros((2, 2, 2, 1))
    loss = capsnet.reconstruction_loss(images, images.at[1].set(3.0))
    np.testing.assert_allclose(loss, [0, 0.0005 * 36], rtol=1e-6)


def test_with_labels_the_model_also_rebuilds_the_images():
    options = CAPSNET | {"reconstruction": True, "hidden_sizes": (5,)}
    model = models.CapsNet(**options, input_shape=(9, 8, 1), num_classes=3)
    x, labels = jax.random.uniform(jax.random.key(0), (2, 9, 8, 1)), jnp.array([2, 0])
    outputs = model(x, labels)
    np.testing.assert_array_equal(outputs["lengths"], model(x))
    expected = model.reconstruct(model.class_capsules(x), labels)
    np.testing.assert_array_equal(outputs["images"], expected)
    np.testing.assert_array_equal(outputs["inputs"], x)


@pytest.mark.slow
def test_training_by_the_margin_loss():
    options = CAPSNET | {"length_scale": 1.0}
    model = models.CapsNet(**options, input_shape=(8, 8, 1), num_classes=2)
    graphdef, params = nnx.split(model)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    y = jnp.arange(8) % 2
    x = x.at[::2, :, :4].add(2.0)
    loss = lambda p: capsnet.margin_loss(nnx.merge(graphdef, p)(x), y).mean()  # noqa: E731
    step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.3 * g, p, jax.grad(loss)(p)))
    before = loss(params)
    for _ in range(20):
        params = step(params)
    assert loss(params) < 0.5 * before
    assert (forward(nnx.merge(graphdef, params), x).argmax(-1) == y).mean() > 0.7


def test_wrong_options():
    with pytest.raises(ValueError, match=r"at least 2 kernel_size - 1 = 17, got input_shape \(16,"):
        models.create("capsnet", input_shape=(16, 28, 1), num_classes=10)
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        models.create("capsnet", **MNIST, num_iterations=0)
    model = models.CapsNet(**CAPSNET, input_shape=(8, 8, 1), num_classes=2)
    with pytest.raises(ValueError, match="made with reconstruction=False"):
        model.reconstruct(jnp.ones((1, 2, 16)), jnp.zeros(1, int))
