from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import _common, _equilibrium, mdeq
from tests.models.test_models import count

TINY = {"input_shape": (8, 8, 3), "num_classes": 3, "width": 4, "num_groups": 2, "expansion": 2}
TINY |= {"head_channels": (2, 2), "final_channels": 4, "dropout_rate": 0.0, "solver": "anderson"}
TINY |= {"max_steps": 4, "backward_steps": 4, "loop": "while"}


def images(n=2):
    return jax.random.normal(jax.random.key(0), (n, 8, 8, 3))


def test_parameters_of_the_authors_tiny_model():
    """By the layers of `mdeq_core.py` and `mdeq.py` with the configuration `cls_mdeq_TINY`."""
    stem = 3 * 24 * 9 + 24 * 24 * 9 + 4 * 24
    block = 2 * 24 * 120 * 9 + (120 + 24) + 2 * (120 + 24 + 24)  # lengths; three affine norms
    fuse = 24 * 24 * 9 + 24 * 24 + 2 * 2 * 24
    last = 24 * 24 + 24
    bottlenecks = sum(24 * c + c * c * 9 + c * 4 * c + 24 * 4 * c + 2 * 4 * c for c in (8, 16))
    head = bottlenecks + (32 * 64 * 9 + 64 + 2 * 64) + (64 * 200 + 200 + 2 * 200)
    model = nnx.eval_shape(
        lambda: models.create("mdeq_tiny", input_shape=(32, 32, 3), num_classes=10)
    )
    assert count(model) == stem + 2 * block + fuse + 2 * last + head + 2010 == 158_890
    assert (model.options.solver, model.options.max_steps, model.options.backward_steps) == (
        "broyden",
        18,
        20,
    )
    states, _ = nnx.eval_shape(lambda m: m.equilibrium(jnp.ones((2, 32, 32, 3))), model)
    assert [z.shape for z in states] == [(2, 32, 32, 24), (2, 16, 16, 24)]


def test_the_start_is_the_authors():
    model = models.create("mdeq_tiny", **TINY | {"width": 24, "num_groups": 8, "expansion": 5})
    block = model.cell.blocks[0]
    for kernel, spread in (
        (model.conv2.kernel, 0.01),
        (model.cell.down.kernel, 0.01),
        (block.conv1.layer.kernel, (24 * 9) ** -0.5 / 3**0.5),  # uniform within 1/sqrt(fan in)
        (block.conv2.layer.kernel, (120 * 9) ** -0.5 / 3**0.5),
    ):
        np.testing.assert_allclose(np.std(kernel[...]), spread, rtol=0.05)
    assert model.cell.last_norms[0].scale is None


def test_a_step_of_the_block_by_hand():
    """Its norms and convolutions are Flax's; what is checked is how they stand together."""
    model = models.create("mdeq_tiny", **TINY)
    graphdef, params = nnx.split(model.cell)
    keys = jax.random.split(jax.random.key(1), 5)
    z = (jax.random.normal(keys[0], (2, 8, 8, 4)), jax.random.normal(keys[1], (2, 4, 4, 4)))
    injected = jax.random.normal(keys[2], (2, 8, 8, 4))
    masks = tuple(2.0 * jax.random.bernoulli(k, 0.5, (2, 1, 1, 4)) for k in keys[3:])

    def by_hand(params, z):
        cell, blocks = nnx.merge(graphdef, params), []
        for block, state, mask, extra in zip(cell.blocks, z, masks, (injected, 0.0), strict=True):
            inner = jax.nn.relu(block.norm1(block.conv1(state)))
            inner = block.norm2(block.conv2(inner) * mask + extra) + state
            blocks.append(block.norm3(jax.nn.relu(inner)))
        up = cell.up_norm(cell.up(blocks[1]))
        full = blocks[0] + jnp.repeat(jnp.repeat(up, 2, axis=1), 2, axis=2)
        half = blocks[1] + cell.down_norm(cell.down(blocks[0]))
        pairs = zip(cell.last_norms, cell.last, (full, half), strict=True)
        return tuple(norm(conv(jax.nn.relu(h))) for norm, conv, h in pairs)

    def both(params, z):
        cell = nnx.merge(graphdef, params)
        plain = _equilibrium.folded(cell)
        assert not any(isinstance(m, _common.WeightNormalized) for _, m in nnx.iter_modules(plain))
        assert isinstance(cell.blocks[0].conv1, _common.WeightNormalized)  # the cell is as it was
        return cell(z, (injected, masks)), plain(z, (injected, masks))

    expected = jax.jit(by_hand)(params, z)
    for found in jax.jit(both)(params, z):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_output_is_a_fixed_point_and_its_gradients_are_close():
    """The implicit gradient and a long phantom one agree; each passes the dropout's fixed masks."""
    options = TINY | {"solver": "anderson", "max_steps": 16, "backward_steps": 16}
    options |= {"tolerance": 1e-5, "dropout_rate": 0.5}
    gradients = {}
    x = images()
    for name, more in (
        ("implicit", {}),
        ("phantom", {"gradient": "phantom", "phantom_steps": 6}),
    ):
        model = models.create("mdeq_tiny", **options | more)
        # What is injected outweighs the state, so that the block contracts.
        for norm, factor in (
            (model.cell.blocks[0].norm2, 10.0),
            (model.cell.blocks[1].norm2, 0.1),
            (model.cell.down_norm, 10.0),
            (model.cell.up_norm, 0.1),
        ):
            norm.scale[...] *= factor
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, graphdef=graphdef, rest=rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            model.train()
            z, report = model.equilibrium(x)
            return sum(jnp.sum(jnp.sin(part)) for part in z), report

        (_, report), gradients[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert (report.relative_residual < 1e-2).all()
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient["cell"])])
        for gradient in gradients.values()
    )
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9
    assert abs(a).max() > 0


def test_dropout_drops_in_train_mode_only():
    model = models.create("mdeq_tiny", **TINY | {"dropout_rate": 0.5})
    run = nnx.jit(lambda model: model.equilibrium(images())[1].residuals)
    assert (run(model) != run(model)).any()
    model.eval()
    np.testing.assert_array_equal(run(model), run(model))


def test_nearest_neighbors():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    expected = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    np.testing.assert_array_equal(mdeq._twice_as_large(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (6, 8, 3)}, "multiples of 4"),
        ({"head_channels": (2,)}, "head_channels must be two numbers, one of each resolution"),
        ({"num_groups": 3, "width": 6}, "num_groups must be even and divide width, got 3 and 6"),
        ({"num_groups": 4, "width": 6}, "num_groups must be even and divide width, got 4 and 6"),
        ({"solver": "newton"}, "unknown solver 'newton'; valid: anderson, broyden, fixed_point"),
        ({"gradient": "jfb"}, "unknown gradient 'jfb'; valid: implicit, phantom, unrolled"),
        ({"loop": "scan"}, "unknown loop 'scan'; valid: while, unrolled, None"),
        ({"damping": 0.0}, "damping"),
        ({"solver": "broyden", "backward_steps": 0}, "backward_steps must be at least 1, got 0"),
        ({"solver": "anderson", "backward_steps": 1}, "backward_steps must be at least 2, got 1"),
        ({"phantom_steps": 0}, "phantom_steps must be at least 1, got 0"),
        ({"solver": "fixed_point", "memory": 4}, "memory must be None with solver 'fixed_point'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("mdeq_tiny", **TINY | options)
