from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import _attention
from tests.models.test_models import count, forward

TINY = {"input_shape": (5,), "vocabulary_size": 9, "embedding_size": 8, "num_heads": 2}
TINY |= {"num_layers": 2, "dropout_rate": 0.0}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # GPT-2 small: the number of parameters of the checkpoint that OpenAI released.
        ({"vocabulary_size": 50_257, "input_shape": (1024,)}, 124_439_808),
        # By the layer list: table, positions, layers (4 E² + 2 E F + 9 E + F), last norm, output.
        (TINY, 9 * 8 + 5 * 8 + 2 * (4 * 64 + 2 * 8 * 32 + 9 * 8 + 32) + 16),
        (TINY | {"tied": False}, 2 * 9 * 8 + 5 * 8 + 2 * (4 * 64 + 2 * 8 * 32 + 9 * 8 + 32) + 16),
        (
            TINY | {"positions": "sinusoidal", "feedforward_size": 3, "num_layers": 1},
            9 * 8 + (4 * 64 + 2 * 8 * 3 + 9 * 8 + 3) + 16,
        ),
    ],
)
def test_parameters(options, parameters):
    assert count(nnx.eval_shape(lambda: models.create("transformer_lm", **options))) == parameters


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_no_position_sees_what_comes_later(positions):
    model = models.create("transformer_lm", **TINY, positions=positions)
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    rows = jnp.concatenate([tokens, *(tokens.at[0, t].set(8) for t in range(5))])
    logits = np.asarray(forward(model, rows))
    for t in range(5):
        np.testing.assert_array_equal(logits[1 + t, :t], logits[0, :t])
        assert (abs(logits[1 + t, t:] - logits[0, t:]).max(axis=-1) > 1e-6).all()


def test_forward_is_the_formula(x64):
    """Of all but the layers, whose own formula the tests of attention check."""
    for options in ({}, {"positions": "sinusoidal", "tied": False}):
        options = {"num_layers": 0, "param_dtype": "float64"} | options
        model = models.create("transformer_lm", **TINY | options)
        tokens = np.array([[1, 2, 3, 4, 5], [8, 7, 0, 6, 0]])
        table = np.asarray(model.embedding.embedding[...])
        h = table[tokens]
        if "positions" in options:
            h = h * 8**0.5 + _attention.sinusoidal_positions(5, 8)
        else:
            h = h + np.asarray(model.positions[...])
        h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
        out = np.asarray(model.linear.kernel[...]) if "tied" in options else table.T
        logits = forward(model, jnp.asarray(tokens))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, h @ out, rtol=1e-9, atol=1e-12)


def test_the_start_is_gpt2s():
    sizes = {"input_shape": (64,), "vocabulary_size": 99, "embedding_size": 64, "num_heads": 2}
    model = models.create("transformer_lm", **sizes, num_layers=2)
    layer = model.layers[1]
    for weights, spread in (
        (model.embedding.embedding, 0.02),
        (model.positions, 0.01),
        (layer.attention.projection.kernel, 0.02),
        (layer.linear1.kernel, 0.02),
        (layer.attention.output.kernel, 0.01),  # 0.02 / sqrt(2 * 2)
        (layer.linear2.kernel, 0.01),
    ):
        np.testing.assert_allclose(np.std(weights[...]), spread, rtol=0.05)
    for linear in (layer.attention.output, layer.linear1, layer.linear2):
        assert (linear.bias[...] == 0).all()


def test_dropout_drops_in_train_mode_only():
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    plain = models.create("transformer_lm", **TINY | {"num_layers": 1})
    assert not jax.tree.leaves(nnx.state(plain, nnx.Not(nnx.Param)))
    model = models.create("transformer_lm", **TINY | {"num_layers": 1, "dropout_rate": 0.5})
    train = nnx.jit(lambda model: model(tokens))
    assert (train(model) != train(model)).any()
    model.eval()
    nnx.update(plain, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(forward(model, tokens), forward(plain, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (8, 8)}, r"input_shape=\(length,\) for token ids, got \(8, 8\)"),
        ({"positions": "rotary"}, "unknown positions 'rotary'; valid: learned, sinusoidal"),
        ({"embedding_size": 9, "num_heads": 3}, "even and a multiple of num_heads 3, got 9"),
        ({"dropout_rate": 1.0}, "dropout_rate must be at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("transformer_lm", **TINY | options)


def test_tokens_are_integers():
    with pytest.raises(ValueError, match="TransformerLM expects integer token ids, got float32"):
        models.create("transformer_lm", **TINY)(jnp.ones((2, 5)))
