from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from models.transformer_translator import translate
from tests.models.test_models import count, forward

TINY = {"input_shape": (4, 3), "vocabulary_size": 9, "embedding_size": 8, "num_heads": 2}
TINY |= {"num_layers": 1, "feedforward_size": 6, "dropout_rate": 0.0}
SOURCE, TARGET = jnp.array([[5, 4, 8, 0]]), jnp.array([[1, 7, 3]])


def create(**options):
    return models.create("transformer_translator", **TINY | options)


def rows(*pairs):
    """Examples of sources and targets."""
    return jnp.concatenate([jnp.concatenate(pair, axis=1) for pair in pairs])


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        # The layers of Vaswani et al.'s base network, which are PyTorch's nn.Transformer() without
        # the two normalizations behind its stacks: 44,140,544 - 2 * 1,024.
        ({"pre_norm": True}, 37_000 * 512 + 44_140_544),
        (
            {"num_layers": 1, "source_vocabulary_size": 300, "tied": False},
            (2 * 37_000 + 300) * 512 + 44_138_496 // 6,
        ),
        (
            {"num_layers": 2, "embedding_size": 16, "feedforward_size": 10},
            37_000 * 16 + 2 * (12 * 256 + 4 * 160 + 24 * 16 + 20),
        ),
    ],
)
def test_parameters(options, parameters):
    options = {"input_shape": (30, 31), "vocabulary_size": 37_000} | options
    model = nnx.eval_shape(lambda: models.create("transformer_translator", **options))
    assert count(model) == parameters


@pytest.mark.parametrize("pre_norm", [False, True])
def test_who_sees_what(pre_norm):
    """A prediction sees the tokens of the source and the target tokens up to its position."""
    model = create(pre_norm=pre_norm)
    changed_targets = [(SOURCE, TARGET.at[0, t].set(8)) for t in range(3)]
    changed_source = (SOURCE.at[0, 2].set(6), TARGET)
    logits = np.asarray(forward(model, rows((SOURCE, TARGET), *changed_targets, changed_source)))
    assert logits.shape == (5, 3, 9)
    for t in range(3):
        np.testing.assert_array_equal(logits[1 + t, :t], logits[0, :t])
        assert (abs(logits[1 + t, t:] - logits[0, t:]).max(axis=-1) > 1e-6).all()
    assert (abs(logits[4] - logits[0]).max(axis=-1) > 1e-6).all()


def test_source_padding_changes_nothing():
    """Neither how much there is nor what its embedding is."""
    model, shorter = create(), create(input_shape=(3, 3))  # of the same seed
    x = rows((SOURCE, TARGET))
    logits = forward(model, x)
    less = forward(shorter, rows((SOURCE[:, :3], TARGET)))
    np.testing.assert_allclose(less, logits, rtol=1e-5, atol=1e-6)
    # Tied logits change for the padding token only.
    model.embedding.embedding[...] = model.embedding.embedding[...].at[0].add(3.0)
    np.testing.assert_allclose(forward(model, x)[..., 1:], logits[..., 1:], rtol=1e-5, atol=1e-6)


def test_a_source_of_padding_only_stays_finite():
    assert np.isfinite(forward(create(), rows((jnp.zeros_like(SOURCE), TARGET)))).all()


def test_vocabularies_are_shared_unless_told_otherwise():
    model = create(source_vocabulary_size=20, tied=False)
    x = rows((SOURCE, TARGET))
    logits = forward(model, x)
    # The source's own table reaches further.
    assert np.isfinite(forward(model, rows((SOURCE + 11, TARGET)))).all()
    model.linear.kernel[...] = 2 * model.linear.kernel[...]
    np.testing.assert_allclose(forward(model, x), 2 * logits, rtol=1e-5)
    assert np.isnan(forward(create(), rows((SOURCE + 11, TARGET)))).any()


def test_the_start():
    model = create(embedding_size=64, feedforward_size=128, vocabulary_size=500)
    np.testing.assert_allclose(np.std(model.embedding.embedding[...]), 1 / 8, rtol=0.03)
    layer = model.decoder[0]
    for linear, fans in (
        (layer.attention.projection, 128),
        (layer.cross.query, 128),
        (layer.cross.memory, 128),
        (layer.linear1, 192),
        (layer.linear2, 192),
    ):
        bound = (6 / fans) ** 0.5
        assert 0.99 * bound < abs(linear.kernel[...]).max() <= bound
        assert (linear.bias[...] == 0).all()


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt to repeat the source, three tokens and an end (2) behind them."""
    model = create(input_shape=(3, 4), embedding_size=16, feedforward_size=32, pre_norm=True)
    graphdef, params = nnx.split(model)
    source = jax.random.randint(jax.random.key(0), (256, 3), 3, 9)
    y = jnp.pad(source, ((0, 0), (0, 1)), constant_values=2)
    x = jnp.concatenate([source, jnp.ones((256, 1), jnp.int32), y[:, :-1]], axis=1)
    tx = optax.flatten(optax.adam(0.01))  # compiles faster

    def loss(params):
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(150):
        params, state, value = step(params, state)
        values.append(float(value))
    return nnx.merge(graphdef, params), values


def test_it_learns_to_repeat(trained):
    _, values = trained
    assert values[-1] < 0.1 * values[0]


def test_translate_takes_the_likeliest_tokens(trained):
    model, _ = trained
    model = nnx.clone(model)
    source = jnp.array([[3, 8, 5], [7, 7, 4]])
    tokens = translate(model, source, begin=1, end=2)
    np.testing.assert_array_equal(tokens, jnp.pad(source, ((0, 0), (0, 1)), constant_values=2))
    # Behind the first end token there is padding only.
    early = translate(model, source, begin=1, end=8)
    assert early.tolist() == [[3, 8, 0, 0], [7, 7, 4, 2]]


def test_translate_drops_nothing_and_leaves_the_model_alone():
    model = create(dropout_rate=0.5)
    before = jax.tree.leaves(nnx.state(model))
    first, second = (translate(model, SOURCE, begin=1, end=2) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == SOURCE.dtype
    assert not model.dropout.deterministic
    for one, two in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert one is two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (8,)}, r"input_shape=\(source_length, target_length\) .*got \(8,\)"),
        ({"embedding_size": 9}, "even and a multiple of num_heads 2, got 9"),
        ({"dropout_rate": -0.1}, "dropout_rate must be at least 0 and below 1, got -0.1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"expects a batch of shape \(N, 7\), got \(2, 4\)"):
        create()(jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="expects integer token ids, got float32"):
        create()(jnp.ones((2, 7)))


def test_half_and_double_precision(x64):
    x = rows((SOURCE, TARGET))
    for options, inside, outside in (
        ({"param_dtype": "float64"}, jnp.float64, jnp.float64),
        ({"dtype": "bfloat16"}, jnp.bfloat16, jnp.float32),
    ):
        model = nnx.eval_shape(lambda options=options: create(**options))
        hidden = nnx.eval_shape(lambda m: m.decoder[0](m.embedding(x)), model)
        assert hidden.dtype == inside
        assert nnx.eval_shape(lambda m: m(x), model).dtype == outside
