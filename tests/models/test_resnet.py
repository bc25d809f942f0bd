from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import models
from models import _common
from models.resnet import _Block
from tests.models.test_models import abstract, abstract_outputs, count, forward

CIFAR = {"input_shape": (32, 32, 3), "num_classes": 10}
SMALL = {"input_shape": (8, 8, 3), "num_classes": 10, "width": 2}
IMAGENET = {"input_shape": (224, 224, 3), "num_classes": 1000}


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        # The paper's 0.27 to 1.7 million (table 6); for 20 layers Xu et al., section 4.1.
        ("resnet20", CIFAR, 269_722),
        ("resnet20", CIFAR | {"shortcut": "projection"}, 272_474),
        ("resnet32", CIFAR, 464_154),
        ("resnet44", CIFAR, 658_586),
        ("resnet56", CIFAR, 853_018),
        pytest.param("resnet110", CIFAR, 1_727_962, marks=[pytest.mark.slow]),
        # num_params in torchvision's documentation.
        ("resnet18", IMAGENET, 11_689_512),
        ("resnet34", IMAGENET, 21_797_672),
        ("resnet50", IMAGENET, 25_557_032),
        pytest.param("resnet101", IMAGENET, 44_549_160, marks=[pytest.mark.slow]),
        pytest.param("resnet152", IMAGENET, 60_192_808, marks=[pytest.mark.slow]),
        # The 7x7 kernels of 64 channels become 3x3.
        ("resnet18", IMAGENET | {"small_images": True}, 11_689_512 - 40 * 3 * 64),
    ],
)
def test_parameters(name, options, parameters):
    assert count(abstract(name, **options)) == parameters


def cifar(depth=8, **options):
    return models.CifarResNet(
        **{"input_shape": (4, 4, 3), "num_classes": 10, "depth": depth} | options
    )


def layer_count(model):
    kinds = [type(module) for path, module in nnx.iter_modules(model) if "projection" not in path]
    return kinds.count(nnx.Conv) + kinds.count(nnx.Linear)


@pytest.mark.parametrize("depth", [20, 44, 18, 50])
def test_as_many_layers_as_the_name_says_have_weights(depth):
    model = abstract(f"resnet{depth}", **CIFAR)
    assert layer_count(model) == depth


def pyramid(parts, shape):
    """The shapes behind each part, without computing anything."""
    shapes = []
    for part in parts:
        shape = abstract_outputs(part, (1, *shape))[1:]
        shapes.append(shape)
    return shapes


def test_images_are_halved_twice():
    model = abstract("resnet20", **CIFAR)
    expected = [(32, 32, 16)] * 3 + [(16, 16, 32)] * 3 + [(8, 8, 64)] * 3
    assert pyramid(model.blocks, (32, 32, 16)) == expected


@pytest.mark.parametrize(
    ("name", "options", "size", "factor"),
    [
        ("resnet34", {}, 56, 1),
        ("resnet50", {}, 56, 4),
        ("resnet50", {"small_images": True}, 224, 4),
    ],
)
def test_stages_of_imagenet(name, options, size, factor):
    """56, 28, 14 and 7 pixels for 224; channels four times as many with bottlenecks."""
    model = abstract(name, **IMAGENET | options)
    assert pyramid([model.conv], (224, 224, 3))[0][0] == (224 if size == 224 else 112)
    stages = [(size >> i, size >> i, (64 << i) * factor) for i in range(4)]
    counts = (3, 4, 6, 3)
    expected = [stage for stage, n in zip(stages, counts, strict=True) for _ in range(n)]
    assert pyramid(model.blocks, (size, size, 64)) == expected


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_a_block_whose_branch_is_off_is_its_shortcut(shortcut):
    block = _Block(_common.Layers(norm="batch"), 2, 4, 2, shortcut=shortcut, last_scale=0.0)
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
    model = cifar()
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
    whole = cifar()
    shared = cifar(axis_name="replica")
    graphdef, state = nnx.split(shared)
    logits = jax.vmap(lambda x: nnx.merge(graphdef, state, copy=True)(x), axis_name="replica")(
        x.reshape(2, 4, 4, 4, 3)
    )
    np.testing.assert_allclose(logits.reshape(8, 10), forward(whole, x), rtol=1e-3, atol=1e-3)


def test_convolutions_start_from_he_normal():
    model = cifar()
    kernel = model.blocks[-1].conv2.kernel[...]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)
    assert (model.norm.scale[...] == 1).all()
    assert (model.norm.bias[...] == 0).all()


def test_imagenet_starts_like_torchvision():
    @jax.jit  # of what is not returned nothing is computed
    def start():
        model = models.ResNet(**SMALL | {"width": 8}, depth=10)
        conv, linear = model.blocks[2].conv1, model.linear  # 16 inputs, 32 outputs
        return conv.kernel[...], linear.kernel[...], linear.bias[...]

    kernel, weights, bias = start()
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 32)) ** 0.5, rtol=0.05)
    bound = 64**-0.5
    assert 0.9 * bound < abs(weights).max() <= bound
    assert 0 < abs(bias).max() <= bound


@pytest.mark.parametrize(("depth", "last"), [(10, "norm2"), (14, "norm3")])
def test_blocks_start_as_their_shortcuts(depth, last):
    @jax.jit
    def scales():
        model = models.ResNet(**SMALL, depth=depth, zero_init_residual=True)
        return [
            {name: norm.scale[0] for name, norm in vars(block).items() if name.startswith("norm")}
            for block in model.blocks
        ]

    for block in scales():
        assert block == {name: float(name != last) for name in block}
        assert last in block


def test_first_block_without_its_branch_is_the_identity():
    layers = _common.Layers(norm="batch")
    for options in ({}, {"bottleneck": 2}):
        block = _Block(layers, 4, 4, 1, last_scale=0.0, **options)
        assert block.projection is None
        x = abs(jax.random.normal(jax.random.key(0), (2, 3, 3, 4)))
        np.testing.assert_array_equal(forward(block, x), x)


def test_options_without_batch_statistics():
    for norm in ("group", None):
        model = nnx.eval_shape(lambda norm=norm: cifar(norm=norm))
        assert len(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == 0
        assert (model.conv.bias is None) == (norm is not None)
    with pytest.raises(ValueError, match=r"needs a norm, .* got norm=None"):
        models.create("resnet18", **CIFAR, norm=None, zero_init_residual=True)
    with pytest.raises(ValueError, match=r"depth must be one of 10, 14, 18, .*, got 20"):
        models.ResNet(**CIFAR, depth=20)
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2 .*, got 18"):
        cifar(depth=18)
