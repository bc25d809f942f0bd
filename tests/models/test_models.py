"""What all models have in common."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from models import _common, _registry

INPUT_SHAPE = (8, 8, 3)


class Tiny(NamedTuple):
    """A small member of one architecture, for what all of them have in common."""

    model: type[Any]
    options: Mapping[str, Any] = MappingProxyType({})
    num_tokens: int | None = None  # it reads token ids below this number; None: images

    def create(self, num_classes=7, **options):
        sizes = {"num_classes": num_classes, "vocabulary_size": self.num_tokens}
        if "num_classes" not in inspect.signature(self.model.__init__).parameters:
            sizes = {"vocabulary_size": num_classes}  # the next token is the class
        sizes = {name: size for name, size in sizes.items() if size is not None}
        defaults = {"input_shape": INPUT_SHAPE} | sizes
        return self.model(**defaults | dict(self.options) | options)

    def examples(self, n):
        key = jax.random.key(0)
        shape = (n, *self.options.get("input_shape", INPUT_SHAPE))
        if self.num_tokens is None:
            return jax.random.normal(key, shape)
        return jax.random.randint(key, shape, 0, self.num_tokens)


# For those that do not accept images of (32, 32, 3) or 64 token ids.
INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "transformer_translator": (10, 12),
    "deq_flow": (32, 32, 2),
}
VGG = {"input_shape": (32, 32, 3), "depth": 11, "width": 2, "hidden_sizes": (8,)}
VGG |= {"dropout_rate": 0.0, "norm": "batch"}
MOBILENET = {"stages": [(1, 8, 1, 1), (2, 8, 2, 1)], "dropout_rate": 0.0, "small_images": True}
EFFICIENTNET = {"stages": [(1, 3, 1, 8, 1), (2, 5, 2, 8, 2)], "small_images": True}
EFFICIENTNET |= {"dropout_rate": 0.0, "drop_path_rate": 0.0}
VIT = {"patch_size": 4, "embedding_size": 8, "num_layers": 1, "num_heads": 2}
VIT |= {"feedforward_size": 16}
CAPSNET = {"channels": 4, "capsule_types": 2, "kernel_size": 3, "reconstruction": False}
CAPSNET |= {"length_scale": 10.0}
# Few steps, differentiated: a fixed point is as exact as its solver.
STEPS = {"solver": "fixed_point", "max_steps": 2, "gradient": "unrolled", "dropout_rate": 0.0}
MDEQ = {"width": 4, "num_groups": 2, "expansion": 1, "head_channels": (2, 2), "final_channels": 4}
# One entry for each architecture that classifies; the others have their own tests.
TINY = {
    "mlp": Tiny(models.Mlp),
    "cnn": Tiny(models.Cnn),
    "cifar_resnet": Tiny(models.CifarResNet, {"depth": 8}),
    "resnet": Tiny(models.ResNet, {"depth": 10, "width": 4, "small_images": True}),
    "wide_resnet": Tiny(models.WideResNet, {"depth": 10, "widening_factor": 1, "width": 4}),
    "vgg": Tiny(models.Vgg, VGG),
    "mobilenet": Tiny(models.MobileNetV2, MOBILENET),
    "efficientnet": Tiny(models.EfficientNet, EFFICIENTNET),
    "vit": Tiny(models.Vit, VIT),
    "local_mixer": Tiny(
        models.LocalMixer, {"num_patches": 2, "channels": 8, "num_groups": 2, "num_blocks": 2}
    ),
    "unet": Tiny(models.UNet, {"width": 2, "depth": 1}),
    "capsnet": Tiny(models.CapsNet, CAPSNET),
    "mdeq": Tiny(models.Mdeq, MDEQ | STEPS),
    "transformer": Tiny(
        models.Transformer, {"input_shape": (6,), "feedforward_size": 32}, num_tokens=11
    ),
    "transformer_lm": Tiny(
        models.TransformerLM,
        {"input_shape": (6,), "embedding_size": 8, "num_layers": 1, "num_heads": 2}
        | {"dropout_rate": 0.0},
        num_tokens=4,
    ),
    "equilibrium_lm": Tiny(
        models.EquilibriumLM,
        {"input_shape": (6,), "embedding_size": 8, "num_layers": 1, "num_heads": 2} | STEPS,
        num_tokens=4,
    ),
    "lstm_lm": Tiny(
        models.LstmLM,
        {"input_shape": (6,), "hidden_size": 8, "dropout_rate": 0.0, "init_bound": 0.5},
        num_tokens=4,
    ),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    return TINY[request.param]


def forward(model, x):
    return _forward(*nnx.split(model), x)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, x):  # compiled once for all models of one structure
    return nnx.merge(graphdef, state)(x)


class SameKeys:
    """Keys for models of which only shapes are wanted: flax's take seconds for hundreds of layers.

    A model with dropout needs more.
    """

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self):
        return self.key

    def __getitem__(self, name):  # of what is drawn at each call
        return nnx.Rngs(0)[name]


def abstract(name, **options):
    """A model without numbers, by `jax.eval_shape`."""
    return nnx.eval_shape(lambda: models.create(name, rngs=SameKeys(), **options))


def abstract_outputs(part, shape):
    """The shape of the outputs for inputs of that shape, in eval mode."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    part = nnx.view(part, use_running_average=True, deterministic=True, raise_if_not_found=False)
    return nnx.eval_shape(lambda part, x: part(x), part, x).shape


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    "name", {e.model: n for n, e in reversed(_registry.MODELS.items())}.values()
)
def test_one_name_of_each_architecture(name):
    """Without computing anything; all names are in the tests of their architectures."""
    entry = _registry.MODELS[name]
    arguments = inspect.signature(entry.model.__init__).parameters
    sizes = {"num_classes": 7, "vocabulary_size": 50}
    sizes = {size: value for size, value in sizes.items() if size in arguments}
    shape = INPUT_SHAPES.get(name, (64,) if "vocabulary_size" in sizes else (32, 32, 3))
    model = nnx.eval_shape(lambda: models.create(name, input_shape=shape, **sizes))
    assert model.input_shape == shape
    kinds = {type(module) for _, module in nnx.iter_modules(model)}
    convolutional = not kinds.isdisjoint((nnx.Conv, nnx.ConvTranspose))
    siblings = [n for n, e in _registry.MODELS.items() if e.model is entry.model]
    assert {models.is_convolutional(n) for n in siblings} == {convolutional}


def test_logits(tiny):
    x = tiny.examples(4)
    logits = nnx.eval_shape(lambda x: tiny.create()(x), x)
    assert (logits.shape[0], logits.shape[-1]) == (4, 7)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_half_precision_computes_low_and_returns_float32(name):
    tiny = TINY[name]
    x = tiny.examples(4)
    logits = forward(tiny.create(dtype=jnp.bfloat16), x)
    full = forward(tiny.create(), x)
    assert logits.dtype == jnp.float32
    # A few roundings to 8 bits of mantissa lie between the two, so they are close, not equal.
    np.testing.assert_allclose(logits, full, atol=0.02)
    assert (logits != full).any()

    model = tiny.create(param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}


def test_the_seed_decides_the_weights_and_not_the_structure(tiny):
    one, same, other = (nnx.split(tiny.create(rngs=seed)) for seed in (0, 0, 1))
    # Equal graph definitions let a compiled step serve all seeds.
    assert one[0] == same[0] == other[0]
    weights = [
        np.concatenate([np.ravel(p) for p in jax.tree.leaves(m[1])]) for m in (one, same, other)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_seed_and_rngs_agree(tiny):
    by_seed = tiny.create(rngs=3)
    by_rngs = tiny.create(rngs=nnx.Rngs(3))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(by_seed), nnx.state(by_rngs))


def test_weight_normalization_starts_as_the_same_function():
    options = {"input_shape": (8, 4, 2), "num_classes": 3, "channels": (5, 4)}
    plain, model = (models.create("cnn", **options, weight_norm=on) for on in (False, True))
    x = jax.random.normal(jax.random.key(1), (6, 8, 4, 2))
    np.testing.assert_allclose(forward(model, x), forward(plain, x), rtol=1e-5, atol=1e-5)
    assert count(model) == count(plain) + 5 + 4 + 3

    model.linear.layer.bias[...] = jnp.zeros(3)
    graphdef, params = nnx.split(model)
    loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x) ** 2)))
    value, grads = loss(params)
    for name in ("conv1", "conv2", "linear"):
        # The norm of a direction changes nothing.
        direction, slope = (np.asarray(s[name]["layer"]["kernel"][...]) for s in (params, grads))
        assert (slope != 0).any()
        axes = tuple(range(direction.ndim - 1))
        np.testing.assert_allclose((direction * slope).sum(axes), 0, atol=1e-4)
    # The outputs are linear in the lengths of the last layer.
    params["linear"]["length"][...] *= 3
    np.testing.assert_allclose(loss(params)[0], 9 * value, rtol=1e-5)


def test_weight_normalization_reaches_every_layer_and_units_without_weights(tiny):
    def make():
        model = tiny.create()
        return _common.normalize_weights(model) or model

    model = nnx.eval_shape(make)
    kinds = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
    paths = [path for path, m in nnx.iter_modules(model) if isinstance(m, kinds)]
    assert paths
    assert all(path[-1] == "layer" for path in paths)
    x = jax.eval_shape(lambda: tiny.examples(2))
    assert nnx.eval_shape(lambda model, x: model(x), model, x).shape[0] == 2

    layer = nnx.Linear(3, 2, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(_common.WeightNormalized(layer))
    slope = jax.grad(lambda p: nnx.merge(graphdef, p)(jnp.ones((1, 3))).sum())(params)
    np.testing.assert_allclose(slope["length"][...], 3**0.5, rtol=1e-6)


def test_many_models_at_once_by_vmap():
    seeds = [models.create("mlp", input_shape=(4,), num_classes=2, rngs=s) for s in range(3)]
    graphdef, _ = nnx.split(seeds[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(m) for m in seeds))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    logits = jax.vmap(lambda state: nnx.merge(graphdef, state)(x))(stacked)
    for model, one in zip(seeds, logits, strict=True):
        np.testing.assert_allclose(model(x), one, rtol=1e-5, atol=1e-6)


def test_wrong_input_names_the_expected_shape(tiny):
    model = tiny.create()
    shape = model.input_shape
    expected = re.escape("(" + ", ".join(["N", *map(str, shape)]) + ")")
    for wrong in ((4, *shape, 1), (4, *shape[:-1], shape[-1] + 1), shape, (*shape[:-1], 4)):
        with pytest.raises(ValueError, match=f"expects a batch of shape {expected}"):
            model(jnp.ones(wrong))


@pytest.mark.parametrize("shape", [(64,), (8, 8), (6, 8, 3), (8, 10, 3)])
def test_images_of_an_impossible_shape_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        models.create("resnet20", input_shape=shape, num_classes=10)


def test_small_network_for_pictures_of_any_size():
    for shape in ((64,), (8, 8), (3, 8, 3)):
        with pytest.raises(ValueError, match=r"Cnn needs .* got \("):
            models.create("cnn", input_shape=shape, num_classes=10)
    model = models.create("cnn", input_shape=(5, 10, 2), num_classes=3, channels=(2, 2))
    x = jnp.ones((1, 5, 10, 2))
    assert model(x).shape == (1, 3)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="unknown model 'resnet21'; valid: mlp, cnn, resnet20"):
        models.create("resnet21", input_shape=INPUT_SHAPE, num_classes=7)
    with pytest.raises(ValueError, match="valid: mlp, cnn, resnet20"):
        models.is_convolutional("resnet21")
    with pytest.raises(ValueError, match="no option 'depth'; valid: hidden_sizes, activation"):
        models.create("mlp", input_shape=INPUT_SHAPE, num_classes=7, depth=3)
    with pytest.raises(ValueError, match="unknown activation 'sine'; valid: gelu, relu, tanh"):
        models.create("cnn", input_shape=INPUT_SHAPE, num_classes=7, activation="sine")
    with pytest.raises(ValueError, match="valid: identity, projection"):
        models.create("resnet20", input_shape=INPUT_SHAPE, num_classes=7, shortcut="gated")


def test_token_ids_and_images_are_told_apart():
    with pytest.raises(ValueError, match=r"needs vocabulary_size, the number of different token"):
        models.create("transformer", input_shape=(6,), num_classes=2)
    with pytest.raises(
        ValueError, match=r"'mlp' has no vocabulary_size, got 11; models that have it: transformer"
    ):
        models.create("mlp", input_shape=(6,), num_classes=2, vocabulary_size=11)
    with pytest.raises(ValueError, match="'mlp' needs num_classes, the number of outputs"):
        models.create("mlp", input_shape=(6,))


def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss(tiny):
    graphdef, params, rest = nnx.split(tiny.create(num_classes=4), nnx.Param, ...)
    x = tiny.examples(16)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        y = jnp.arange(logits[..., 0].size).reshape(logits.shape[:-1]) % 4
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(loss)(params)
        moves = jax.tree.map(lambda g: (g != 0).any(), grads)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), moves

    losses, moved = [], False
    for _ in range(6):
        value, params, moves = step(params)
        losses.append(float(value))
        # Not all in the first step: a classifier of zeros lets nothing through. Heads of local
        # losses are no part of the logits.
        moved = moved | np.asarray(
            [
                move
                for path, move in jax.tree_util.tree_leaves_with_path(moves)
                if "head" not in jax.tree_util.keystr(path)
            ]
        )
    assert moved.all()
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


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


@pytest.mark.slow
def test_second_derivatives_in_double_precision(tiny, x64):
    """Central differences of gradients: one rounding to float32 on the way would show."""
    graphdef, params, rest = nnx.split(tiny.create(param_dtype="float64"), nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    x = tiny.examples(3)
    x = x.astype(jnp.float64) if tiny.num_tokens is None else x
    # Away from the start, where a classifier may be zero.
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    vector = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(x)
        return jnp.sum(jnp.sin(logits + jnp.arange(logits.size).reshape(logits.shape)))

    gradient = jax.jit(jax.grad(loss))
    product = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1])(params, vector)
    step = 1e-8  # so small that hardly a relu changes sides
    ahead, behind = (
        gradient(jax.tree.map(lambda p, v, s=sign: p + s * step * v, params, vector))
        for sign in (1, -1)
    )
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    exact, close = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (product, difference)
    )
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, close, rtol=1e-3, atol=1e-4 * abs(exact).max())
