from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from tests.models.test_models import count, forward

TINY = {"input_shape": (5,), "vocabulary_size": 9, "hidden_size": 4, "dropout_rate": 0.0}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # Zaremba et al., medium, Penn Treebank: two tables, bias, 2 layers (8 H² + 4 H).
        ({"vocabulary_size": 10_000}, 19_775_200),
        ({"vocabulary_size": 10_000, "tied": True}, 19_775_200 - 6_500_000),
        # WikiText-2, 3 x 650.
        (
            {"vocabulary_size": 33_278, "tied": True, "num_layers": 3},
            33_278 * 651 + 3 * (8 * 650**2 + 4 * 650),
        ),
    ],
)
def test_parameters(options, parameters):
    options = {"input_shape": (35,)} | options
    assert count(nnx.eval_shape(lambda: models.create("lstm_lm", **options))) == parameters


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(model, tokens, forget_bias):
    """One example, one time, one layer after the other."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    table = p["embedding"]["embedding"]
    out = p["linear"]["kernel"] if "linear" in p else table.T
    logits = np.zeros((*tokens.shape, len(table)))
    for n, row in enumerate(tokens):
        states = {i: (np.zeros(4), np.zeros(4)) for i in p["layers"]}
        for t, token in enumerate(row):
            x = table[token]
            for i, layer in p["layers"].items():
                h, c = states[i]
                gates = x @ layer["input"]["kernel"] + layer["input"]["bias"]
                gates = gates + h @ layer["recurrent"]["kernel"]
                c = sigmoid(gates[4:8] + forget_bias) * c + sigmoid(gates[:4]) * np.tanh(
                    gates[8:12]
                )
                x = sigmoid(gates[12:]) * np.tanh(c)
                states[i] = (x, c)
            logits[n, t] = x @ out + p["bias"]
    return logits


@pytest.mark.parametrize(
    "options", [{}, {"tied": True, "num_layers": 3, "forget_bias": 1.5}], ids=["plain", "tied"]
)
def test_forward_is_the_formula(x64, options):
    # Far enough from zero for the gates to be no straight lines.
    options = {"init_bound": 1.0, "param_dtype": "float64"} | options
    model = models.create("lstm_lm", **TINY, **options)
    tokens = np.array([[1, 2, 3, 4, 5], [8, 8, 0, 6, 0]])
    logits = forward(model, jnp.asarray(tokens))
    assert logits.dtype == jnp.float64
    expected = by_hand(model, tokens, options.get("forget_bias", 0.0))
    np.testing.assert_allclose(logits, expected, rtol=1e-12)


def test_all_start_within_the_bound():
    model = models.create("lstm_lm", input_shape=(3,), vocabulary_size=300, hidden_size=20)
    for p in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert 0.045 < abs(p).max() <= 0.05
        np.testing.assert_allclose(p.std(), 0.05 / 3**0.5, rtol=0.15)


def test_tied_weights_get_the_sum_of_both_gradients(x64):
    options = {"param_dtype": "float64", "init_bound": 0.5}
    tied, untied = (models.create("lstm_lm", **TINY, **options, tied=t) for t in (True, False))
    nnx.update(untied, nnx.state(tied))
    untied.linear.kernel[...] = tied.embedding.embedding[...].T
    tokens = jnp.array([[1, 2, 3, 4, 5]])

    def gradient(model):
        graphdef, params = nnx.split(model)
        return jax.jit(jax.grad(lambda p: jnp.sin(nnx.merge(graphdef, p)(tokens)).sum()))(params)

    one, two = gradient(tied), gradient(untied)
    both = two["embedding"]["embedding"][...] + two["linear"]["kernel"][...].T
    np.testing.assert_allclose(one["embedding"]["embedding"][...], both, rtol=1e-10)


def test_dropout_is_where_zaremba_has_it():
    """On the way into each layer and out of the last, not from one time to the next."""
    tokens = jnp.ones((3, 5), jnp.int32)
    plain = models.create("lstm_lm", **TINY)
    assert not jax.tree.leaves(nnx.state(plain, nnx.Not(nnx.Param)))
    model = models.create("lstm_lm", **TINY | {"dropout_rate": 0.5})
    graphdef, state = nnx.split(model)

    @jax.jit
    def masks(state):
        x = jnp.ones((30, 5, 4))
        return [dropout(x) for dropout in nnx.merge(graphdef, state).dropouts for _ in range(2)]

    drawn = masks(state)
    assert len(drawn) == 2 * 3
    assert all(set(np.unique(mask)) == {0.0, 2.0} for mask in drawn)
    # From place to place and from call to call they differ.
    assert len({np.asarray(mask).tobytes() for mask in drawn}) == len(drawn)
    model.eval()
    nnx.update(plain, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(forward(model, tokens), forward(plain, tokens), rtol=1e-5, atol=1e-6)


def test_replicas_of_a_mesh():
    """The state of zeros in front of the scan varies over the replicas as the inputs do."""
    model = models.create("lstm_lm", **TINY)
    graphdef, state = nnx.split(model)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jax.random.randint(jax.random.key(0), (8, 5), 0, 9)
    parts = jax.jit(
        jax.shard_map(
            lambda x: nnx.merge(graphdef, state)(x),
            mesh=mesh,
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
        )
    )(tokens)
    np.testing.assert_allclose(parts, forward(model, tokens), rtol=1e-5, atol=1e-6)


def test_half_precision():
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    low = forward(models.create("lstm_lm", **TINY, dtype=jnp.bfloat16), tokens)
    assert low.dtype == jnp.float32
    full = forward(models.create("lstm_lm", **TINY), tokens)
    np.testing.assert_allclose(low, full, atol=2e-3)  # values below 0.1, rounded to 8 bits
    assert (low != full).any()


def test_wrong_options():
    with pytest.raises(ValueError, match=r"LstmLM needs input_shape=\(length,\) for token ids"):
        models.create("lstm_lm", **TINY | {"input_shape": (8, 8)})
    with pytest.raises(ValueError, match="dropout_rate must be at least 0 and below 1, got 1"):
        models.create("lstm_lm", **TINY | {"dropout_rate": 1})
    with pytest.raises(ValueError, match="LstmLM expects integer token ids, got float32"):
        models.create("lstm_lm", **TINY)(jnp.ones((2, 5)))
