from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _attention

WIDTH, HEADS = 6, 2


def layers(**options):
    sizes = {"width": WIDTH, "num_heads": HEADS, "hidden": 5}
    defaults = {"activation": "tanh", "dropout_rate": 0.0, "dtype": None, "param_dtype": "float64"}
    return _attention.Layers(**sizes, **defaults | options, rngs=nnx.Rngs(0))


def run(module, *args):
    return _run(*nnx.split(module), args)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, args):
    return nnx.merge(graphdef, state)(*args)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def moved(module):
    """With numbers in place of the zeros and ones that biases and scales start from."""
    state = nnx.state(module)
    for i, leaf in enumerate(jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))):
        leaf[...] = leaf[...] + 0.3 * normal(i, *leaf.shape)
    nnx.update(module, state)
    return module


def linear(layer, x):
    return np.asarray(x) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def test_cross_attention_is_the_formula(x64):
    """One query and one head at a time, without the keys that the mask hides."""
    attention = moved(_attention.CrossAttention(layers()))
    x, memory = normal(1, 2, 3, WIDTH), normal(2, 2, 4, WIDTH)
    visible = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    result = run(attention, x, memory, visible[:, None, None, :])
    keys, values = np.split(linear(attention.memory, memory), 2, axis=-1)
    mixed = np.zeros_like(x)
    size = WIDTH // HEADS
    for n, t, head in np.ndindex(2, 3, HEADS):
        part = slice(head * size, (head + 1) * size)
        query = linear(attention.query, x[n, t])[part]
        weights = np.exp(keys[n, visible[n], part] @ query / size**0.5)
        mixed[n, t, part] = weights / weights.sum() @ values[n, visible[n], part]
    assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, linear(attention.output, mixed), rtol=1e-12)


def test_attention_to_itself_is_cross_attention_with_itself(x64):
    attention = moved(_attention.Attention(layers()))
    cross = _attention.CrossAttention(layers())
    for name in ("kernel", "bias"):
        both = getattr(attention.projection, name)[...]
        getattr(cross.query, name)[...] = both[..., :WIDTH]
        getattr(cross.memory, name)[...] = both[..., WIDTH:]
        getattr(cross.output, name)[...] = getattr(attention.output, name)[...]
    x = jnp.asarray(normal(1, 2, 4, WIDTH))
    mask = _attention.causal_mask(4)
    masked = run(attention, x, mask)
    np.testing.assert_allclose(masked, run(cross, x, x, mask), rtol=1e-12)
    np.testing.assert_allclose(
        run(attention, x), run(attention, x, jnp.ones_like(mask)), rtol=1e-12
    )
    assert abs(run(attention, x) - masked).max() > 1e-3


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_adds_its_parts(x64, pre_norm):
    layer = moved(_attention.Layer(layers(), pre_norm=pre_norm, cross=True))
    x, memory = (jnp.asarray(normal(i, 2, 3, WIDTH)) for i in (1, 2))

    def norm(norm, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    def add(x, norm_layer, part):
        if pre_norm:
            return x + part(norm(norm_layer, x))
        return norm(norm_layer, x + part(x))

    h = add(np.asarray(x), layer.norm1, lambda h: np.asarray(run(layer.attention, h)))
    h = add(h, layer.cross_norm, lambda h: np.asarray(run(layer.cross, h, memory)))
    h = add(h, layer.norm2, lambda h: linear(layer.linear2, np.tanh(linear(layer.linear1, h))))
    np.testing.assert_allclose(run(layer, x, None, memory), h, rtol=1e-9)


def test_a_pre_norm_layer_without_outputs_changes_nothing():
    options = {"residual_init": nnx.initializers.zeros_init(), "param_dtype": "float32"}
    options["bias_init"] = nnx.initializers.zeros_init()
    layer = _attention.Layer(layers(**options), pre_norm=True, cross=True)
    x = jnp.asarray(normal(1, 2, 3, WIDTH), jnp.float32)
    np.testing.assert_array_equal(run(layer, x, None, x), x)


def test_masks():
    assert _attention.causal_mask(3)[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    tokens = jnp.array([[7, 0, 3]])
    assert _attention.padding_mask(tokens, 0).tolist() == [[[[True, False, True]]]]


def test_query_key_and_value_start_as_one_matrix_or_each_for_itself():
    wide = {"width": 64, "param_dtype": "float32"}
    wide |= {"hidden": 5, "num_heads": 2, "activation": "relu", "dropout_rate": 0.0, "dtype": None}
    glorot = nnx.initializers.glorot_uniform()
    for init, fans in ((None, 64 + 3 * 64), (glorot, 64 + 64)):
        made = _attention.Layers(**wide, kernel_init=init, rngs=nnx.Rngs(0)).projection(3)
        bound = (6 / fans) ** 0.5
        for kernel in np.split(np.asarray(made.kernel[...]), 3, axis=1):
            assert 0.99 * bound < abs(kernel).max() <= bound
        assert (made.bias[...] == 0).all()
