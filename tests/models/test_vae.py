from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.vae import negative_elbo
from tests.models.test_models import count, forward

TINY = {"input_shape": (3, 2, 1), "hidden_sizes": (5,), "latent_size": 2}


def create(**options):
    return models.create("vae", **TINY | options)


def images(n, seed=0):
    return jax.random.uniform(jax.random.key(seed), (n, 3, 2, 1))


def test_parameters():
    # By the layer list of 784-512-256-(2 and 2) and 2-256-512-784.
    model = nnx.eval_shape(lambda: models.create("vae", input_shape=(28, 28, 1)))
    encoder = 785 * 512 + 513 * 256 + 2 * 257 * 2
    assert count(model) == encoder + 3 * 256 + 257 * 512 + 513 * 784 == 1_068_820
    options = {"input_shape": (4, 4, 3), "hidden_sizes": (), "latent_size": 5}
    assert count(nnx.eval_shape(lambda: models.create("vae", **options))) == 2 * 49 * 5 + 6 * 48


def test_forward_is_the_formula(x64):
    model = create(param_dtype="float64")
    model.eval()
    x = images(4)
    outputs = forward(model, x)
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def linear(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    h = np.maximum(linear(p["encoder"][0], np.asarray(x).reshape(4, 6)), 0)
    mean, log_variance = linear(p["mean"], h), linear(p["log_variance"], h)
    # In eval mode the noise is that of one key.
    noise = np.asarray(jax.random.normal(jax.random.key(0), mean.shape, mean.dtype))
    code = mean + np.exp(log_variance / 2) * noise
    h = np.maximum(linear(p["decoder"][0], code), 0)
    logits = linear(p["decoder"][1], h).reshape(4, 3, 2, 1)
    expected = {"logits": logits, "mean": mean, "log_variance": log_variance}
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert outputs[name].dtype == jnp.float64
        np.testing.assert_allclose(outputs[name], value, rtol=1e-12)


def test_codes_are_drawn_from_their_distribution(x64):
    """In train mode; the decoder shows the code itself where it is the identity."""
    options = {"input_shape": (2,), "hidden_sizes": (), "param_dtype": "float64"}
    model = create(**options)
    model.decoder[0].kernel[...] = jnp.eye(2)
    model.decoder[0].bias[...] = jnp.zeros(2)
    n = 20_000
    outputs = forward(model, jnp.broadcast_to(jnp.array([[0.2, 0.9]]), (n, 2)))
    codes = outputs["logits"]
    mean, variance = outputs["mean"][0], jnp.exp(outputs["log_variance"][0])
    # Five standard errors of the mean, of the variance and of the correlation.
    assert (abs(codes.mean(0) - mean) < 5 * jnp.sqrt(variance / n)).all()
    assert (abs(codes.var(0) / variance - 1) < 5 * (2 / n) ** 0.5).all()
    assert abs(jnp.corrcoef(codes.T)[0, 1]) < 5 * n**-0.5


def test_noise_moves_on_in_train_mode_and_is_the_same_in_eval_mode():
    model = create()
    x = images(3)
    call = nnx.jit(lambda model: model(x))
    first, second = call(model), call(model)
    np.testing.assert_array_equal(first["mean"], second["mean"])
    assert (first["logits"] != second["logits"]).all()
    view = nnx.view(model, deterministic=True)
    model.eval()
    for quiet in (model, view):
        first, second = call(quiet), call(quiet)
        np.testing.assert_array_equal(first["logits"], second["logits"])
    model.train()
    assert (call(model)["logits"] != first["logits"]).all()


def test_samples_are_decoded_from_the_prior():
    model = create()
    key = jax.random.key(1)
    codes = jax.random.normal(key, (3, 2))
    expected = nnx.sigmoid(model.decode(codes))
    np.testing.assert_array_equal(model.sample(3, key=key), expected)


def test_divergence_is_the_closed_form(x64):
    """Of numpy, and of the definition by drawing codes."""
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(size=(2, 3, 2))
    outputs = {"logits": jnp.zeros((3, 0)), "mean": mean, "log_variance": log_variance}
    result = negative_elbo(outputs, jnp.zeros((3, 0)))
    variance = np.exp(log_variance)
    expected = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(1)
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    noise = rng.normal(size=(100_000, 3, 2))
    code = mean + np.sqrt(variance) * noise
    ratio = 0.5 * (code**2 - noise**2 - log_variance).sum(2)  # log q(code) - log p(code)
    error = ratio.std(0) / len(noise) ** 0.5
    assert (abs(ratio.mean(0) - expected) < 5 * error).all()


def test_the_bound_lies_above_the_likelihood_by_the_divergence_from_the_posterior(x64):
    """-log p(x) and the posterior from integrals over a grid of codes."""
    model = create(param_dtype="float64")
    # Strong weights, so that the posterior is not the prior.
    for layer in model.decoder:
        layer.kernel[...] = 3 * layer.kernel[...]
    x = images(1, seed=1)
    axis = np.linspace(-9, 9, 361)
    codes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    cell = (axis[1] - axis[0]) ** 2
    logits = np.asarray(model.decode(jnp.asarray(codes))).reshape(len(codes), -1)
    pixels = np.asarray(x).reshape(1, -1)
    log_x = (pixels * logits - np.logaddexp(0, logits)).sum(1)

    def log_normal(mean, variance):
        return -0.5 * ((codes - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(1)

    log_joint = log_x + log_normal(np.zeros(2), np.ones(2))
    evidence = np.log(np.sum(np.exp(log_joint)) * cell)
    n = 40_000
    outputs = forward(model, jnp.broadcast_to(x, (n, *x.shape[1:])))
    mean, log_variance = (np.asarray(outputs[name][0]) for name in ("mean", "log_variance"))
    log_q = log_normal(mean, np.exp(log_variance))
    gap = np.sum(np.exp(log_q) * (log_q - (log_joint - evidence))) * cell
    bounds = np.asarray(negative_elbo(outputs, jnp.broadcast_to(x, (n, *x.shape[1:]))))
    assert gap > 0.01
    assert abs(bounds.mean() - (gap - evidence)) < 5 * bounds.std() / n**0.5


def test_the_loss_and_its_gradient_stay_finite_far_out():
    outputs = {"logits": jnp.array([[-200.0, 200.0]]), "mean": jnp.zeros((1, 2))}
    outputs["log_variance"] = jnp.full((1, 2), -50.0)
    x = jnp.array([[1.0, 0.0]])
    np.testing.assert_allclose(negative_elbo(outputs, x), 400 + 49, rtol=1e-6)
    grads = jax.grad(lambda o: negative_elbo(o, x).sum())(outputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_every_parameter_gets_a_gradient_and_training_lowers_the_loss():
    graphdef, params, rest = nnx.split(create(), nnx.Param, ...)
    x = (images(64) > 0.5).astype(jnp.float32)

    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return negative_elbo(model(x), x).mean()

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(params)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, step(params)[1])
    assert step(params)[0] < before


def test_half_precision():
    model, full = (create(dtype=dtype) for dtype in ("bfloat16", None))
    model.eval()
    full.eval()
    low, high = forward(model, images(3)), forward(full, images(3))
    assert {value.dtype for value in low.values()} == {jnp.dtype("float32")}
    for name in low:
        np.testing.assert_allclose(low[name], high[name], atol=0.02)
    assert (low["mean"] != high["mean"]).any()


def test_wrong_inputs_and_options():
    with pytest.raises(ValueError, match=r"Vae expects a batch of shape \(N, 3, 2, 1\)"):
        create()(jnp.ones((2, 6)))
    with pytest.raises(ValueError, match="unknown activation 'sine'; valid: gelu, relu, tanh"):
        create(activation="sine")
    with pytest.raises(ValueError, match="'vae' has no num_classes"):
        create(num_classes=10)
