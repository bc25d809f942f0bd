from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from tests.models.test_models import count, forward

TINY = {"input_shape": (5,), "num_classes": 3, "vocabulary_size": 9}
TINY |= {"embedding_size": 8, "num_heads": 2, "feedforward_size": 6}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # As in Song et al. 2024, whose vocabulary has 30,522 entries.
        ({"vocabulary_size": 30_522}, 30_522 * 64 + 2 * 281_152 + 130),
        ({"vocabulary_size": 10, "num_layers": 1, "num_classes": 5}, 640 + 281_152 + 325),
        (
            {"vocabulary_size": 7, "embedding_size": 8, "num_heads": 4, "feedforward_size": 3},
            7 * 8 + 2 * (4 * 64 + 2 * 8 * 3 + 9 * 8 + 3) + 2 * 9,
        ),
    ],
)
def test_parameters(options, parameters):
    options = {"input_shape": (5,), "num_classes": 2} | options
    assert count(models.create("transformer", **options)) == parameters


def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def by_hand(model, tokens):
    """The network for one sentence at a time, head by head, without its padding as keys."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    logits = []
    for row in np.asarray(tokens):
        h = p["embedding"]["embedding"][row].copy()
        for i in range(len(row)):
            for j in range(0, h.shape[1], 2):
                angle = i / 10_000 ** (j / h.shape[1])
                h[i, j : j + 2] += np.sin(angle), np.cos(angle)
        for layer in p["layers"].values():
            parts = layer["attention"]
            qkv = h @ parts["projection"]["kernel"] + parts["projection"]["bias"]
            heads = TINY["num_heads"]
            q, k, v = (x.reshape(len(row), heads, -1) for x in np.split(qkv, 3, axis=1))
            q, k, v = (x.transpose(1, 0, 2) for x in (q, k, v))
            weights = np.exp(np.einsum("hid,hjd->hij", q, k) / q.shape[-1] ** 0.5) * (row != 0)
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hij,hjd->ihd", weights, v).reshape(h.shape)
            mixed = mixed @ parts["output"]["kernel"] + parts["output"]["bias"]
            norms = [(layer[f"norm{n}"]["scale"], layer[f"norm{n}"]["bias"]) for n in (1, 2)]
            h = layer_norm(h + mixed, *norms[0])
            hidden = np.maximum(h @ layer["linear1"]["kernel"] + layer["linear1"]["bias"], 0)
            h = layer_norm(
                h + hidden @ layer["linear2"]["kernel"] + layer["linear2"]["bias"], *norms[1]
            )
        logits.append(h.mean(0) @ p["linear"]["kernel"] + p["linear"]["bias"])
    return np.stack(logits)


@pytest.mark.slow
def test_forward_is_the_formula(x64):
    model = models.create("transformer", **TINY, param_dtype="float64")
    # Biases of attention and scales of norms start at 0 and 1, where they could hide a mistake.
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    model = nnx.merge(graphdef, jax.tree.unflatten(structure, noisy))
    tokens = jnp.array([[1, 2, 3, 4, 5], [8, 7, 0, 0, 0], [6, 0, 0, 0, 0]])
    logits = forward(model, tokens)
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, by_hand(model, tokens), rtol=1e-10)


def test_real_positions_do_not_see_padding():
    graphdef, state = nnx.split(models.create("transformer", **TINY).layers[0])
    layer = jax.jit(lambda x, mask: nnx.merge(graphdef, state)(x, mask))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    mask = jnp.array([True, True, True, False, False])[None, None, None]
    other = x.at[:, 3:].add(7.0)
    np.testing.assert_array_equal(layer(x, mask)[:, :3], layer(other, mask)[:, :3])
    # Nor does it matter how much padding there is; without the mask it would.
    short = layer(x[:, :3], mask[..., :3])
    np.testing.assert_allclose(layer(x, mask)[:, :3], short, rtol=1e-5, atol=1e-6)
    assert abs(layer(x, jnp.ones_like(mask))[:, :3] - short).max() > 1e-3


def test_a_sentence_of_padding_only_stays_finite():
    model = models.create("transformer", **TINY)
    tokens = jnp.zeros((2, 5), jnp.int32)
    graphdef, params = nnx.split(model)
    loss_and_grads = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graphdef, p)(tokens).sum()))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss_and_grads(params)))


def test_start_is_pytorchs():
    model = models.create("transformer", input_shape=(9,), num_classes=2, vocabulary_size=999)
    np.testing.assert_allclose(model.embedding.embedding[...].std(), 1.0, rtol=0.02)
    layer = model.layers[1]
    for linear, bound in (
        (layer.attention.projection, (6 / (64 + 192)) ** 0.5),
        (layer.attention.output, 64**-0.5),
        (layer.linear1, 64**-0.5),
        (layer.linear2, 2048**-0.5),
    ):
        assert abs(linear.kernel[...]).max() <= bound
        np.testing.assert_allclose(linear.kernel[...].std(), bound / 3**0.5, rtol=0.05)
    for linear in (layer.attention.projection, layer.attention.output):
        assert (linear.bias[...] == 0).all()
    for linear in (layer.linear1, layer.linear2, model.linear):
        assert 0 < abs(linear.bias[...]).max() <= linear.in_features**-0.5
    # Each layer is drawn, not copied.
    assert (model.layers[0].linear1.kernel[...] != layer.linear1.kernel[...]).any()


def test_hessian_product_forward_over_reverse(x64):
    options = {"activation": "tanh", "param_dtype": "float64"}
    graphdef, params = nnx.split(models.create("transformer", **TINY, **options))
    params = nnx.as_pure(params)
    tokens = jnp.array([[1, 2, 3, 4, 5], [8, 7, 0, 0, 0]])
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(1.0 + nnx.merge(graphdef, p)(tokens)))))
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    vector = jax.tree.map(lambda p, k: jax.random.normal(k, p.shape), params, keys)
    product = jax.jit(lambda p, v: jax.jvp(gradient, (p,), (v,))[1])(params, vector)
    step = 1e-5
    ahead, behind = (
        gradient(jax.tree.map(lambda p, v, s=sign: p + s * step * v, params, vector))
        for sign in (1, -1)
    )
    # Central differences: an error of order step squared beside values of order 1 to 10.
    jax.tree.map(
        lambda p, a, b: np.testing.assert_allclose(p, (a - b) / (2 * step), rtol=1e-5, atol=1e-6),
        *(product, ahead, behind),
    )


def test_dropout_drops_in_train_mode_only_and_brings_random_state_only_where_it_is():
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    plain = models.create("transformer", **TINY)
    assert len(jax.tree.leaves(nnx.state(plain, nnx.Not(nnx.Param)))) == 0
    model = models.create("transformer", **TINY, dropout_rate=0.5)
    train = nnx.jit(lambda model: model(tokens))
    assert (train(model) != train(model)).any()
    model.eval()
    nnx.update(plain, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(forward(model, tokens), forward(plain, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (8, 8, 1)}, r"input_shape=\(length,\) for token ids, got \(8, 8, 1\)"),
        ({"embedding_size": 12, "num_heads": 8}, "multiple of num_heads 8, got 12"),
        ({"embedding_size": 9, "num_heads": 3}, "even and a multiple of num_heads 3, got 9"),
        ({"dropout_rate": 1.0}, "dropout_rate must be at least 0 and below 1, got 1.0"),
        ({"activation": "sine"}, "unknown activation 'sine'; valid: gelu, relu, tanh"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("transformer", **TINY | options)


def test_tokens_are_integers():
    with pytest.raises(ValueError, match="expects integer token ids, got float32"):
        models.create("transformer", **TINY)(jnp.ones((2, 5)))
