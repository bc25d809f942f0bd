from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import _common
from models.efficientnet import _Gate
from models.mobilenet import InvertedResidual
from tests.models.test_models import EFFICIENTNET, abstract, abstract_outputs, count, forward

NO_DROPOUT = {"dropout_rate": 0.0, "drop_path_rate": 0.0}
IMAGENET = {"input_shape": (224, 224, 3), "num_classes": 1000} | NO_DROPOUT
# num_params in torchvision's documentation.
PARAMETERS = (
    *(5_288_548, 7_794_184, 9_109_994, 12_233_232),
    *(19_341_616, 30_389_784, 43_040_704, 66_347_960),
)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[0] > 1 else [])
        for case in enumerate(PARAMETERS)
    ],
)
def test_parameters(size, parameters):
    assert count(abstract(f"efficientnet_b{size}", **IMAGENET)) == parameters


def test_pyramid_of_b0():
    """Table 1 of the paper: 112, 56, 28, 14, 14, 7 and 7 pixels, for 224."""
    model = abstract("efficientnet_b0", **IMAGENET)
    shape, shapes = abstract_outputs(model.conv, (1, 224, 224, 3)), []
    for block in model.blocks:
        shape = abstract_outputs(block, shape)
        if (shape[1], shape[3]) not in shapes:
            shapes.append((shape[1], shape[3]))
    assert shapes == [(112, 16), (56, 24), (28, 40), (14, 80), (14, 112), (7, 192), (7, 320)]


@pytest.mark.parametrize(
    ("width", "rounded"), [(1, 8), (12, 16), (11, 16), (20, 24), (19, 24), (35.2, 32), (144, 144)]
)
def test_channels_are_multiples_of_eight(width, rounded):
    """18 would become 16 by rounding, which is more than 10 % less."""
    assert _common.round_channels(width) == rounded


def test_gate_is_its_formula():
    gate = _Gate(_common.Layers(), 4, squeezed=2)
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 2, 5, 4)))
    h = x.mean((1, 2)) @ np.asarray(gate.squeeze.kernel)
    h = h / (1 + np.exp(-h)) @ np.asarray(gate.excite.kernel)
    expected = x / (1 + np.exp(-h))[:, None, None]
    np.testing.assert_allclose(forward(gate, x), expected, rtol=1e-5, atol=1e-6)


def test_stochastic_depth_leaves_out_whole_branches():
    block = InvertedResidual(_common.Layers(norm="layer"), 8, 16, 8, 1, drop_path_rate=0.5)
    x = jax.random.normal(jax.random.key(0), (64, 3, 3, 8))
    branch = forward(block, x) - x
    block.eval()
    full = forward(block, x) - x
    left_out = (branch == 0).all((1, 2, 3))
    assert 16 < left_out.sum() < 48
    # The others count double, so that the mean stays.
    expected = np.where(left_out[:, None, None, None], 0, 2 * full)
    np.testing.assert_allclose(branch, expected, rtol=1e-3, atol=1e-4)


def test_rates_rise_with_depth_and_dropout_brings_random_state():
    options = EFFICIENTNET | {"drop_path_rate": 0.3, "input_shape": (8, 8, 3)}
    model = nnx.eval_shape(lambda: models.EfficientNet(**options, num_classes=2))
    rates = [block.drop_path.rate for block in model.blocks]
    # The first changes the number of channels from 32 to 8: it has no shortcut.
    np.testing.assert_allclose(rates, [0, 0.1, 0.2])
    assert len(jax.tree.leaves(nnx.state(model, nnx.RngState))) > 0
    options = options | {"drop_path_rate": 0.0}
    model = nnx.eval_shape(lambda: models.EfficientNet(**options, num_classes=2))
    assert len(jax.tree.leaves(nnx.state(model, nnx.RngState))) == 0
    with pytest.raises(ValueError, match=r"drop_path_rate must be .* below 1, got 1\.5"):
        models.EfficientNet(**options | {"drop_path_rate": 1.5}, num_classes=2)


def test_padding_is_the_same_on_both_sides():
    """A mirrored image gives mirrored features if the size is odd."""
    options = EFFICIENTNET | {"small_images": False, "input_shape": (9, 9, 3)}
    strides = nnx.eval_shape(lambda: models.EfficientNet(**options, num_classes=2)).conv.strides
    conv = _common.Layers(norm="layer").conv(3, 4, strides=strides)
    conv.kernel[...] = (conv.kernel[...] + conv.kernel[:, ::-1]) / 2
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 3))
    out = forward(conv, x)
    assert out.shape == (1, 5, 5, 4)
    np.testing.assert_allclose(forward(conv, x[:, :, ::-1])[:, :, ::-1], out, rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(out).all()
