from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models import ncsn
from models.ncsn import denoising_score_matching
from tests.models.test_models import abstract, count

TINY = {"input_shape": (6, 4, 1), "width": 2, "num_levels": 3}


@pytest.fixture(scope="module")
def model():
    """With parameters drawn by NumPy: to compile the drawing of all their shapes takes longer."""
    rng = np.random.default_rng(0)
    model = abstract("ncsn", **TINY)
    model.noise = nnx.Rngs(0).noise.fork()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        about = 1 if path[-1] in ("scale", "shift") else 0
        draws = rng.normal(about, 0.2, leaf.shape)
        leaf.set_value(jnp.asarray(draws, jnp.float32))
    return model


def images(n):
    return jax.random.uniform(jax.random.key(0), (n, 6, 4, 1))


def by_the_layer_list(w, levels, colors):
    """Parameters of the authors' CondRefineNetDilated."""

    def conv(fan_in, fan_out, size=3, bias=True):
        return size * size * fan_in * fan_out + bias * fan_out

    def norm(width):
        return 3 * levels * width

    def block(fan_in, middle, fan_out, shortcut=0):
        convs = conv(fan_in, middle) + conv(middle, fan_out)
        return norm(fan_in) + norm(middle) + convs + shortcut

    def units(width, n):
        return 2 * n * (norm(width) + conv(width, width, bias=False))

    def refine(fans_in, fan_out, n):
        adapt = sum(units(fan_in, 2) for fan_in in fans_in)
        fuse = sum(norm(fan_in) + conv(fan_in, fan_out) for fan_in in fans_in)
        pool = 2 * (norm(fan_out) + conv(fan_out, fan_out, bias=False))
        return adapt + fuse * (len(fans_in) > 1) + pool + units(fan_out, n)

    v = 2 * w
    down = (
        block(w, w, w)
        + block(w, w, w)
        + block(w, w, v, conv(w, v, size=1))
        + block(v, v, v)
        + 2 * (block(v, v, v, conv(v, v)) + block(v, v, v))
    )
    up = refine([v], v, 1) + refine([v, v], v, 1) + refine([v, v], w, 1) + refine([w, w], w, 3)
    return conv(colors, w) + down + up + norm(w) + conv(w, colors)


def test_parameters():
    full = abstract("ncsn", input_shape=(32, 32, 3))
    assert count(full) == by_the_layer_list(128, 10, 3) == 30_117_635


def test_conditional_instance_normalization_is_the_formula(x64):
    layers = ncsn._Layers(4, None, "float64", 0)
    norm = layers.conditional_norm(3)
    for i, table in enumerate((norm.scale, norm.shift, norm.bias)):
        if i < 2:
            np.testing.assert_allclose(table[...], 1, atol=0.1)
            assert np.std(table[...]) > 0
        else:
            assert (table[...] == 0).all()
        table[...] = np.random.default_rng(i).normal(size=(4, 3))
    x = np.random.default_rng(9).normal(size=(2, 5, 4, 3))
    level = np.array([3, 1])
    result = norm(jnp.asarray(x), jnp.asarray(level))
    means = x.mean((1, 2))
    relative = means - means.mean(1, keepdims=True)
    relative /= np.sqrt((relative**2).sum(1, keepdims=True) / (3 - 1) + 1e-5)
    for n, c in np.ndindex(2, 3):
        channel = x[n, ..., c]
        channel = (channel - channel.mean()) / np.sqrt(channel.var() + 1e-5)
        scale, shift, bias = (
            np.asarray(table[...])[level[n], c] for table in (norm.scale, norm.shift, norm.bias)
        )
        expected = scale * (channel + shift * relative[n, c]) + bias
        np.testing.assert_allclose(result[n, ..., c], expected, rtol=1e-10, atol=1e-12)


def test_interpolation_keeps_corners_and_straight_lines(x64):
    rows, columns = np.meshgrid(np.arange(3.0), np.arange(4.0), indexing="ij")
    small = jnp.asarray(2 * rows - columns + 1)[None, ..., None]
    large = ncsn._resize(small, (1, 5, 7, 1))[0, ..., 0]
    rows, columns = np.meshgrid(np.linspace(0, 2, 5), np.linspace(0, 3, 7), indexing="ij")
    np.testing.assert_allclose(large, 2 * rows - columns + 1, rtol=1e-12, atol=1e-12)
    assert ncsn._resize(small, small.shape) is small


def test_means_of_neighbours_count_what_lies_outside():
    means = ncsn._mean_of_neighbours(jnp.ones((1, 6, 5, 1)))[0, ..., 0]
    inside = np.array([3, 4, 5, 5, 4, 3])[:, None] * np.array([3, 4, 5, 4, 3])[None]
    np.testing.assert_allclose(means, inside / 25, rtol=1e-6)


@pytest.mark.slow
def test_noise_and_levels(model):
    model = nnx.clone(model)
    call = nnx.jit(lambda model, x: model(x))
    x = images(60)
    first, second = call(model, x), call(model, x)
    sigmas = np.array([1.0, 0.1, 0.01])
    np.testing.assert_allclose(model.sigmas(), sigmas, rtol=1e-6)
    assert set(np.unique(first["sigma"])) == set(np.asarray(model.sigmas()))
    assert (first["sigma"] != second["sigma"]).any()
    assert (first["noise"] != second["noise"]).all()
    assert abs(float(first["noise"].std()) - 1) < 5 * (2 * first["noise"].size) ** -0.5
    # The score is that of the image with this noise at this level.
    level = np.argmin(abs(np.asarray(first["sigma"])[:, None] - sigmas), axis=1)
    noisy = x + first["sigma"][:, None, None, None] * first["noise"]
    score = nnx.jit(lambda model, x, level: model.score(x, level))(model, noisy, level)
    np.testing.assert_allclose(first["score"], score, rtol=1e-4, atol=1e-5)
    assert {value.dtype for value in first.values()} == {jnp.dtype("float32")}

    model.eval()
    first, second = call(model, x), call(model, x)
    np.testing.assert_allclose(first["sigma"][:4], sigmas[[0, 1, 2, 0]], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_each_level_has_parameters_of_its_own(model):
    """And examples do not see each other."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x = images(2)

    def scores(params, level):
        return nnx.merge(graphdef, params, rest).score(x, level)

    def total(params):
        return jnp.sum(scores(params, jnp.array([0, 2])) ** 2)

    before = jax.jit(scores)(params, jnp.array([0, 2]))
    grads = jax.jit(jax.grad(total))(params)
    slopes = grads["norm"]["scale"][...]
    assert (slopes[jnp.array([0, 2])] != 0).all()
    assert (slopes[1] == 0).all()
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))
    other = jax.jit(scores)(params, jnp.array([0, 1]))
    np.testing.assert_array_equal(other[0], before[0])
    assert abs(other[1] - before[1]).max() > 1e-6


def test_the_loss_is_zero_at_the_score_of_one_image_and_least_at_the_score_of_a_gaussian(x64):
    rng = np.random.default_rng(0)
    sigma = np.repeat([2.0, 0.5], 40_000)
    noise = rng.normal(size=(80_000, 3))
    outputs = {"sigma": jnp.asarray(sigma), "noise": jnp.asarray(noise)}
    # One image: normal around it, with score -(difference) / sigma².
    score = -(sigma[:, None] * noise) / sigma[:, None] ** 2
    loss = denoising_score_matching(outputs | {"score": jnp.asarray(score)})
    assert loss.shape == (80_000,)
    np.testing.assert_allclose(loss, 0, atol=1e-25)

    # Images normal with deviation s: with noise, of variance s² + sigma².
    s = 0.7
    noisy = s * rng.normal(size=noise.shape) + sigma[:, None] * noise
    variance = s**2 + sigma**2
    least = {}
    for factor in (0.9, 1.0, 1.1):
        score = -factor * noisy / variance[:, None]
        loss = np.asarray(denoising_score_matching(outputs | {"score": jnp.asarray(score)}))
        for value in (2.0, 0.5):
            part = loss[sigma == value]
            least[factor, value] = part.mean()
            if factor == 1.0:
                expected = 1.5 * s**2 / (s**2 + value**2)  # half of 3 dimensions
                assert abs(part.mean() - expected) < 5 * part.std() / len(part) ** 0.5
    for value in (2.0, 0.5):
        assert least[1.0, value] < min(least[0.9, value], least[1.1, value])


@pytest.mark.slow
def test_training_lowers_the_loss(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x = images(16)

    def loss(params):
        outputs = nnx.merge(graphdef, params, rest, copy=True)(x)
        return denoising_score_matching(outputs).mean()

    step = jax.jit(jax.value_and_grad(loss))
    before = step(params)[0]
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.001 * g, params, step(params)[1])
    assert step(params)[0] < before


@pytest.mark.parametrize(
    "options",
    [pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow), {"param_dtype": "float64"}],
)
def test_types(x64, options):
    model = abstract("ncsn", **TINY | options)
    dtype = options.get("param_dtype", "float32")
    x = jax.ShapeDtypeStruct((2, 6, 4, 1), dtype)
    outputs = nnx.eval_shape(lambda model, x: model(x), model, x)
    assert {(k, v.shape, v.dtype.name) for k, v in outputs.items()} == {
        ("score", (2, 6, 4, 1), dtype),
        ("noise", (2, 6, 4, 1), dtype),
        ("sigma", (2,), dtype),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (5, 4, 1)}, "multiples of 2, got"),
        ({"num_levels": 0}, "num_levels must be at least 1, got 0"),
        ({"min_sigma": 0.0}, "noise needs 0 < min_sigma <= max_sigma, got 0.0 and 1.0"),
        ({"max_sigma": 0.001}, "got 0.01 and 0.001"),
        ({"num_classes": 10}, "'ncsn' has no num_classes"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.create("ncsn", **TINY | options)


def test_langevin_dynamics_follow_the_algorithm():
    """The levels one after the other, and each step by hand."""
    seen = []

    def score(x, level):
        seen.append(int(level[0]))
        return -x / (1 + level[:, None])

    start, key = jnp.array([[1.0, -2.0]]), jax.random.key(3)
    sigmas = jnp.array([0.5, 0.1])
    end = ncsn.annealed_langevin(score, start, sigmas, key, steps_per_level=2, step_size=0.01)
    assert seen == [0, 0, 1, 1]
    x = np.asarray(start, np.float64)
    for number, (level, step) in enumerate([(0, 0.25), (0, 0.25), (1, 0.01), (1, 0.01)]):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, number), x.shape))
        x = x - step / 2 * x / (1 + level) + np.sqrt(step) * noise
    np.testing.assert_allclose(end, x, rtol=1e-5)


def test_wrong_inputs():
    model = abstract("ncsn", **TINY)
    with pytest.raises(ValueError, match=r"Ncsn expects a batch of shape \(N, 6, 4, 1\)"):
        model(jnp.ones((2, 4, 4, 1)))
    with pytest.raises(ValueError, match=r"Ncsn expects a batch of shape \(N, 6, 4, 1\)"):
        model.score(jnp.ones((2, 4, 4, 1)), jnp.array([0, 1]))
