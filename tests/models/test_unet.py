from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import models
from tests.models.test_models import abstract, abstract_outputs, count, forward


def conv(fan_in, fan_out, size=3):
    return (size**2 * fan_in + 1) * fan_out


def by_formula(channels, classes, widths):
    down = zip((channels, *widths), widths, strict=False)
    total = sum(conv(a, b) + conv(b, b) for a, b in down) + conv(widths[0], classes, 1)
    return total + sum(conv(2 * w, w, 2) + conv(2 * w, w) + conv(w, w) for w in widths[:-1])


@pytest.mark.parametrize(
    ("shape", "options", "widths"),
    [
        ((64, 64, 1), {}, (64, 128, 256, 512, 1024)),  # figure 1 of the paper
        ((64, 64, 3), {"width": 16, "depth": 2}, (16, 32, 64)),
        ((572, 572, 1), {"padding": "valid"}, (64, 128, 256, 512, 1024)),
    ],
)
def test_parameters(shape, options, widths):
    model = abstract("unet", input_shape=shape, num_classes=2, **options)
    assert count(model) == by_formula(shape[2], 2, widths)
    if not options:
        assert count(model) == 31_030_658


def test_sizes_of_the_paper():
    """Figure 1: 568, 280, 136, 64, 28 pixels at the ends of the levels, 388 at the end."""
    model = abstract("unet", input_shape=(572, 572, 1), num_classes=2, padding="valid")
    shape, sizes = (1, 572, 572, 1), []
    for level, block in enumerate(model.down):
        if level:
            shape = (1, shape[1] // 2, shape[2] // 2, shape[3])
        shape = abstract_outputs(block, shape)
        sizes.append(shape[1:])
    assert sizes == [
        (568, 568, 64),
        (280, 280, 128),
        (136, 136, 256),
        (64, 64, 512),
        (28, 28, 1024),
    ]
    assert abstract_outputs(model, (3, 572, 572, 1)) == (3, 388, 388, 2)
    assert model.output_shape == (388, 388, 2)


def test_every_pixel_has_logits():
    model = abstract("unet", input_shape=(32, 48, 1), num_classes=3)
    assert abstract_outputs(model, (2, 32, 48, 1)) == (2, 32, 48, 3)
    assert model.output_shape == (32, 48, 3)


def test_receptive_field():
    """At depth 1 a pixel sees those up to 9 away: 2 + 1 + 2 * 2 + 2, by two convolutions at both
    ends, pooling and enlarging, and two convolutions of half the size."""
    model = models.UNet(input_shape=(24, 24, 1), num_classes=1, width=2, depth=1)
    graphdef, state = nnx.split(model)
    # Positive weights, so that nothing cancels or is cut off.
    state = jax.tree.map(lambda p: abs(p) + 0.1, state)
    x = 1 + jax.random.uniform(jax.random.key(0), (1, 24, 24, 1))
    slope = jax.jit(jax.grad(lambda x: nnx.merge(graphdef, state)(x)[0, 12, 12, 0]))(x)
    seen = np.argwhere(np.asarray(slope)[0, :, :, 0])
    # From each block of four, pooling lets the largest through.
    assert 7 <= abs(seen - 12).max() <= 9
    assert len(seen) > 100


def test_valid_is_the_middle_of_same_away_from_the_border():
    options = {"num_classes": 2, "width": 2, "depth": 1, "input_shape": (24, 24, 1)}
    same, valid = (models.UNet(**options, padding=p) for p in ("same", "valid"))
    x = jax.random.normal(jax.random.key(0), (1, 24, 24, 1))
    inner = forward(valid, x)
    assert inner.shape == (1, *valid.output_shape)
    assert valid.output_shape == (8, 8, 2)
    np.testing.assert_allclose(inner, forward(same, x)[:, 8:16, 8:16], rtol=1e-4, atol=1e-5)


def test_wrong_options():
    with pytest.raises(ValueError, match="height and width multiples of 16, got"):
        models.create("unet", input_shape=(24, 24, 1), num_classes=2)
    with pytest.raises(ValueError, match=r"cannot halve 512 pixels evenly 4 times; .* as 572"):
        models.create("unet", input_shape=(512, 572, 1), num_classes=2, padding="valid")
    with pytest.raises(ValueError, match="unknown padding 'full'; valid: same, valid"):
        models.create("unet", input_shape=(32, 32, 1), num_classes=2, padding="full")
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        models.create("unet", input_shape=(32, 32, 1), num_classes=2, depth=0)
