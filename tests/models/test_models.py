"""What all models have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models

INPUT_SHAPE = (8, 8, 3)
# What each reads, besides images of that shape.
OPTIONS = {"transformer": {"input_shape": (6,), "vocabulary_size": 11, "feedforward_size": 32}}


@pytest.fixture(scope="module", params=models.list())
def name(request):
    return request.param


def create(name, num_classes=7, **options):
    defaults = {"input_shape": INPUT_SHAPE} | OPTIONS.get(name, {})
    return models.create(name, num_classes=num_classes, **defaults | options)


def examples(name, n):
    key = jax.random.key(0)
    if name == "transformer":
        return jax.random.randint(key, (n, 6), 0, 11)
    return jax.random.normal(key, (n, *INPUT_SHAPE))


def forward(model, x):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_names():
    assert models.list() == ("mlp", "cnn", "resnet20", "transformer")
    convolutional = [name for name in models.list() if models.is_convolutional(name)]
    assert convolutional == ["cnn", "resnet20"]


def test_logits(name):
    logits = forward(create(name), examples(name, 4))
    assert logits.shape == (4, 7)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_half_precision_computes_low_and_returns_float32(name):
    x = examples(name, 4)
    logits = forward(create(name, dtype=jnp.bfloat16), x)
    full = forward(create(name), x)
    assert logits.dtype == jnp.float32
    # A few roundings to 8 bits of mantissa lie between the two, so they are close, not equal.
    np.testing.assert_allclose(logits, full, atol=0.02)
    assert (logits != full).any()

    model = create(name, param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}


def test_the_seed_decides_the_weights_and_not_the_structure(name):
    one, same, other = (nnx.split(create(name, rngs=seed)) for seed in (0, 0, 1))
    # Equal graph definitions let a compiled step serve all seeds.
    assert one[0] == same[0] == other[0]
    weights = [
        jnp.concatenate([p.ravel() for p in jax.tree.leaves(m[1])]) for m in (one, same, other)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_seed_and_rngs_agree(name):
    by_seed = create(name, rngs=3)
    by_rngs = create(name, rngs=nnx.Rngs(3))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(by_seed), nnx.state(by_rngs))


def test_many_models_at_once_by_vmap():
    seeds = [models.create("mlp", input_shape=(4,), num_classes=2, rngs=s) for s in range(3)]
    graphdef, _ = nnx.split(seeds[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(m) for m in seeds))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    logits = jax.vmap(lambda state: nnx.merge(graphdef, state)(x))(stacked)
    for model, one in zip(seeds, logits, strict=True):
        np.testing.assert_allclose(model(x), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 1), (4, 192), (8, 8, 3)])
def test_wrong_input_names_the_expected_shape(name, shape):
    model = create(name)
    expected = r"\(N, 6\)" if name == "transformer" else r"\(N, 8, 8, 3\)"
    with pytest.raises(ValueError, match=f"expects a batch of shape {expected}"):
        model(jnp.ones(shape))


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
@pytest.mark.parametrize("shape", [(64,), (8, 8), (6, 8, 3), (8, 10, 3)])
def test_images_of_an_impossible_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        models.create(name, input_shape=shape, num_classes=10)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(
        ValueError, match="unknown model 'vit'; valid: mlp, cnn, resnet20, transformer"
    ):
        models.create("vit", input_shape=INPUT_SHAPE, num_classes=7)
    with pytest.raises(ValueError, match="valid: mlp, cnn, resnet20, transformer"):
        models.is_convolutional("vit")
    with pytest.raises(ValueError, match="no option 'depth'; valid: hidden_sizes, activation"):
        models.create("mlp", input_shape=INPUT_SHAPE, num_classes=7, depth=3)
    with pytest.raises(ValueError, match="unknown activation 'sine'; valid: gelu, relu, tanh"):
        models.create("cnn", input_shape=INPUT_SHAPE, num_classes=7, activation="sine")
    with pytest.raises(ValueError, match="valid: identity, projection"):
        models.create("resnet20", input_shape=INPUT_SHAPE, num_classes=7, shortcut="gated")


def test_token_ids_and_images_are_told_apart():
    with pytest.raises(ValueError, match=r"needs vocabulary_size, the number of different token"):
        models.create("transformer", input_shape=(6,), num_classes=2)
    with pytest.raises(ValueError, match=r"'mlp' has no vocabulary_size .*with it: transformer"):
        models.create("mlp", input_shape=(6,), num_classes=2, vocabulary_size=11)
    with pytest.raises(ValueError, match="'mlp' needs num_classes, the number of outputs"):
        models.create("mlp", input_shape=(6,))


def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(name):
    graphdef, params, rest = nnx.split(create(name, num_classes=4), nnx.Param, ...)
    x = examples(name, 16)
    y = jnp.arange(16) % 4

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(params)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, step(params)[1])
    assert step(params)[0] < before


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_batch_normalization(name):
    """In front of the activation: the scale of the weights behind it changes nothing."""
    x = jax.random.normal(jax.random.key(1), (6, *INPUT_SHAPE))
    model = models.create(name, input_shape=INPUT_SHAPE, num_classes=10, norm="batch", rngs=0)
    first = model.layers[0] if name == "mlp" else model.conv1
    before = np.asarray(model(x))
    first.kernel[...] *= 3
    first.bias[...] *= 3
    np.testing.assert_allclose(model(x), before, rtol=1e-3, atol=1e-3)
    statistics = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert len(statistics) == 2 * (2 if name == "cnn" else len(model.norms))
    with pytest.raises(ValueError, match=r"unknown norm 'layer'; valid: None, 'batch'"):
        models.create(name, input_shape=INPUT_SHAPE, num_classes=10, norm="layer")
