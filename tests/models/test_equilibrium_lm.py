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
TOKENS = np.array([[1, 2, 3, 4, 5], [8, 7, 0, 6, 0]])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_parameters(num_layers):
    model = nnx.eval_shape(
        lambda: models.create("equilibrium_lm", **TINY, num_layers=num_layers, feedforward_size=3)
    )
    layer = 7 * 64 + 2 * 8 * 3 + 9 * 8 + 3
    assert count(model) == 2 * 9 * 8 + 9 + num_layers * layer


def test_no_position_sees_what_comes_later():
    model = models.create("equilibrium_lm", **TINY, loop="while", tolerance=1e-6, max_steps=30)
    tokens = jnp.asarray(TOKENS[:1])
    rows = jnp.concatenate([tokens, *(tokens.at[0, t].set(8) for t in range(5))])
    logits = np.asarray(forward(model, rows))
    for t in range(5):
        # A state is one vector for the solver: positions agree as far as it has converged.
        np.testing.assert_allclose(logits[1 + t, :t], logits[0, :t], atol=2e-4)
        assert (abs(logits[1 + t, t:] - logits[0, t:]).max(axis=-1) > 1e-3).all()


def test_the_output_is_a_fixed_point():
    model = models.create("equilibrium_lm", **TINY, loop="while", tolerance=1e-3, max_steps=30)
    z, report = nnx.jit(lambda model: model.equilibrium(jnp.asarray(TOKENS)))(model)
    assert report.converged.all()
    assert z.shape == (2, 5, 8)
    assert (report.steps > 2).all()
    assert float(jnp.std(z)) == pytest.approx(1, rel=1e-2)  # post-norm


def test_plain_iteration_is_a_tied_stack():
    """Four applications of the block, and its gradient by back-propagation through all of them."""
    options = {"solver": "fixed_point", "max_steps": 4, "gradient": "unrolled", "tolerance": 0.0}
    graphdef, params = nnx.split(models.create("equilibrium_lm", **TINY, **options, loop="while"))

    def outputs(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(jnp.asarray(TOKENS))))

    def by_hand(params):
        model = nnx.merge(graphdef, params)
        h = model.embedding(jnp.asarray(TOKENS))
        h = h + jnp.asarray(_attention.sinusoidal_positions(5, 8), h.dtype)[None]
        x = ([inject(h) for inject in model.injections], [(jnp.ones((1, 1, 1)),) * 2] * 2)
        z = jnp.zeros_like(h)
        for _ in range(4):
            z = model.cell(z, x)
        return jnp.sum(jnp.sin(model.linear(z)))

    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (outputs, by_hand))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_dropout_drops_whole_channels_in_train_mode_only():
    model = models.create("equilibrium_lm", **TINY, loop="while", dropout_rate=0.5, max_steps=3)
    train = nnx.jit(lambda model: model(jnp.asarray(TOKENS)))
    assert (train(model) != train(model)).any()
    model.eval()
    np.testing.assert_array_equal(train(model), train(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (8, 8)}, r"input_shape=\(length,\) for token ids, got \(8, 8\)"),
        ({"embedding_size": 9, "num_heads": 3}, "even and a multiple of num_heads 3, got 9"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"gradient": "exact"}, "unknown gradient 'exact'; valid: implicit, phantom, unrolled"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("equilibrium_lm", **TINY | options)
