"""The equilibrium network of optical flow, its parts and its fixed point."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import deq_flow
from models.deq_flow import FlowState
from optax_accel import equilibrium
from tests.models.test_models import abstract, count

SHAPE = (8, 12, 2)
TINY = {"input_shape": SHAPE, "width": 3, "radius": 1, "steps": 4, "corrections": 2}


@pytest.fixture(scope="module")
def model():
    """With parameters drawn by NumPy: to compile the drawing of all their shapes takes longer."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: models.create("deq_flow", **TINY))
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        width = max(1, leaf.size // leaf.shape[-1]) if leaf.ndim > 1 else 100
        leaf.set_value(jnp.asarray(rng.normal(0, width**-0.5, leaf.shape), jnp.float32))
    return model


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(0), (4, *SHAPE))


def test_parameters():
    def dense(fan_in, fan_out):
        return (fan_in + 1) * fan_out

    def by_formula(width, radius, channels=1):
        encoders = 2 * dense(9 * channels, width) + dense(9 * width, width)
        encoders += dense(9 * width, 3 * width)
        motion = dense((2 * radius + 1) ** 2, width) + dense(18, width) + dense(18 * width, width)
        unit = dense(9 * (2 * width + 2), 3 * width)
        heads = dense(9 * width, width) + dense(9 * width, 2)
        return (
            encoders + motion + unit + heads + dense(9 * width, 2 * width) + dense(2 * width, 144)
        )

    assert count(abstract("deq_flow", input_shape=(32, 32, 2))) == by_formula(32, 4)
    assert count(abstract("deq_flow", **TINY)) == by_formula(3, 1)


def test_correlations_are_looked_up_where_the_flow_points():
    """Against the definition, cell by cell, with flows that point between cells and outside."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 1, 3, 4, 5)).astype(np.float32)
    flow = rng.uniform(-2.5, 2.5, (1, 3, 4, 2)).astype(np.float32)
    volume = deq_flow.correlations(one, other)
    found = deq_flow.look_up(volume, jnp.asarray(flow), 1)
    for row in range(3):
        for column in range(4):
            expected = []
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    y = row + flow[0, row, column, 1] + down
                    x = column + flow[0, row, column, 0] + right
                    total = 0.0
                    for i in range(3):
                        for j in range(4):
                            share = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
                            total += share * one[0, row, column] @ other[0, i, j] / 5**0.5
                    expected.append(total)
            np.testing.assert_allclose(found[0, row, column], expected, atol=1e-5)


def test_products_with_patches_are_convolutions(model):
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 4, 3))
    layer = model.update.head[0]
    kernel = layer.kernel[...].reshape(3, 3, 3, 3)
    expected = jax.lax.conv_general_dilated(
        hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        layer(deq_flow._patches(hidden)) - layer(jnp.zeros((2, 5, 4, 27))), expected, atol=1e-5
    )


def test_a_flow_moves_along_itself():
    flow = np.zeros((1, 4, 4, 2), np.float32)
    flow[0, 1, 0] = (2, 1)  # right, down
    hidden = jnp.ones((1, 4, 4, 3))
    moved = deq_flow.moved_on(FlowState(hidden, jnp.asarray(flow)))
    # It shares the cell with the one that was there, and the cell that it left keeps its flow.
    np.testing.assert_allclose(moved.flow[0, 2, 2], (1, 0.5), atol=1e-6)
    np.testing.assert_allclose(moved.flow[0, 1, 0], (2, 1), atol=1e-6)
    assert float(jnp.abs(moved.flow).sum()) == pytest.approx(4.5)
    np.testing.assert_array_equal(moved.hidden, hidden)


def test_the_estimate_is_a_fixed_point_and_a_warm_start_stays_there(model, x):
    small = nnx.clone(model)
    # A flow that stays where it starts, so that the unit alone has to settle.
    small.update.head[1].kernel[...] *= 0
    small.update.head[1].bias[...] *= 0
    solver = small.solver(60, 1e-5)

    @nnx.jit
    def estimate(model, x, z0):
        return model.estimate(x, z0, solver)

    flow, z, report = estimate(small, x, small.start(x))
    assert flow.shape == (4, 8, 12, 2)
    assert bool(report.converged.all())
    again, _, warm = estimate(small, x, z)
    assert int(warm.steps.max()) <= 2 < int(report.steps.min())
    np.testing.assert_allclose(again, flow, atol=1e-3)


def test_train_mode_has_an_output_after_each_correction(model, x):
    outputs = nnx.jit(lambda model, x: model(x))(model, x)
    assert outputs.shape == (4, 2, 8, 12, 2)
    # The first output is the third update: two of the solver, and one that is differentiated.
    inputs = model._inputs(x)
    z = model.start(x)
    for _ in range(3):
        z = model.update(z, inputs, model.radius)
    np.testing.assert_allclose(outputs[:, 0], model._full_size(z), rtol=1e-3, atol=1e-4)
    evaluated = nnx.view(model, deterministic=True)
    assert nnx.eval_shape(lambda m, x: m(x), evaluated, x).shape == (4, 1, 8, 12, 2)


def test_every_parameter_learns_and_the_loop_has_no_convolution(model, x):
    graphdef, params = nnx.split(model)
    y = jax.random.normal(jax.random.key(2), (4, 8, 12, 2))

    @jax.jit
    def step(params):
        def loss(params):
            return deq_flow.correction_loss(nnx.merge(graphdef, params)(x), y)

        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient, jax.tree.map(lambda p, g: p - 0.003 * g, params, gradient)

    program = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p)(x))(params)
    loops = [eqn for eqn in program.eqns if eqn.primitive.name == "while"]
    assert len(loops) == 2
    assert not any("conv_general_dilated" in str(loop) for loop in loops)
    losses = []
    for _ in range(4):
        value, gradient, params = step(params)
        losses.append(float(value))
    moved = [bool((leaf != 0).any()) for leaf in jax.tree.leaves(gradient)]
    assert all(moved)
    assert losses[-1] < losses[0]


def test_losses():
    outputs = np.zeros((1, 2, 4, 4, 2), np.float32)
    outputs[0, 0] += 1.0
    outputs[0, 1, ..., 0], outputs[0, 1, ..., 1] = 3.0, -4.0
    flow = np.zeros((1, 4, 4, 2), np.float32)
    np.testing.assert_allclose(deq_flow.correction_loss(outputs, flow), 0.8 * 1 + 3.5, rtol=1e-6)
    np.testing.assert_allclose(
        deq_flow.correction_loss(outputs, flow, gamma=0.5), 0.5 * 1 + 3.5, rtol=1e-6
    )
    np.testing.assert_allclose(deq_flow.end_point_error(outputs, flow), 5.0, rtol=1e-6)


def test_half_precision_keeps_the_flow_in_float32(x):
    half = models.create("deq_flow", **TINY, dtype="bfloat16")
    shapes = nnx.eval_shape(lambda m, x: m.estimate(x), half, x)
    assert shapes[0].dtype == shapes[1].flow.dtype == jnp.float32
    assert shapes[1].hidden.dtype == jnp.bfloat16
    normalized = nnx.eval_shape(lambda: models.create("deq_flow", **TINY, weight_norm=True))
    assert nnx.eval_shape(lambda m, x: m(x), normalized, x).shape == (4, 2, 8, 12, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (8, 8, 3)}, r"input_shape=\(height, width, 2 \* channels\) for two"),
        ({"input_shape": (8, 10, 2)}, "multiples of 4"),
        ({"radius": 0}, "radius must be at least 1, got 0"),
        ({"corrections": 0}, "corrections must be at least 1, got 0"),
        ({"steps": 3}, "steps must be at least 2 for each of the 2 corrections, got 3"),
        ({"phantom_steps": 0}, "phantom_steps must be at least 1, got 0"),
        ({"loop": "scan"}, "`loop` must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: models.create("deq_flow", **TINY | options))


def test_wrong_input(model):
    with pytest.raises(TypeError, match=r"width must be an integer, got 2\.5"):
        models.create("deq_flow", **TINY | {"width": 2.5})
    with pytest.raises(TypeError, match="corrections must be an integer, got 'a'"):
        models.create("deq_flow", **TINY | {"corrections": "a"})
    with pytest.raises(ValueError, match=r"DeqFlow expects a batch of shape \(N, 8, 12, 2\)"):
        model(jnp.ones((4, 8, 12, 3)))
    assert isinstance(model.solver(6), equilibrium.FixedPointSolver)
