"""The vectors at a network's outputs against the Hessian of the loss there."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel._random import hash_bits
from optax_accel.natural_gradient.estimators import output_gradients
from tests.helpers import classification, cross_entropy, tree_allclose
from tests.natural_gradient.test_kfac import first_update, masked_cross_entropy, squares

X = classification()[0][:24]


LOSSES = {
    "categorical": lambda out: cross_entropy(out, np.arange(4) % 3),
    "bernoulli": lambda out: optax.sigmoid_binary_cross_entropy(out, np.eye(4, 3)).sum(-1).mean(),
    "gaussian": lambda out: squares(out, np.eye(4, 3)),
    # Weights of examples, of outputs, a mask, targets that are spread; other factors.
    "weighted categorical": lambda out: jnp.sum(
        WEIGHTS[:, 0] * optax.softmax_cross_entropy(out, optax.smooth_labels(np.eye(4, 3), 0.1))
    ),
    "weighted bernoulli": lambda out: jnp.mean(
        WEIGHTS * optax.sigmoid_binary_cross_entropy(out, np.eye(4, 3))
    ),
    "weighted gaussian": lambda out: jnp.mean(WEIGHTS * (out - 50 * np.eye(4, 3)) ** 2),
}
WEIGHTS = np.array([[2.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.3, 0.0, 1.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize("name", LOSSES)
def test_estimators_agree_in_expectation(x64, name):
    """All estimate the Hessian of the loss at the outputs: exactly, or on average."""
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    loss, likelihood = LOSSES[name], name.split()[-1]
    objective = oa.Objective(lambda p: p, loss)
    hessian = jax.hessian(loss)(outputs)
    want = 4 * np.stack([hessian[i, :, i] for i in range(4)])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def estimate(estimator, name, step):
        key = jax.random.key(1)
        samples, _ = output_gradients(objective, outputs, estimator, name, key, step, 4)
        return jnp.einsum("snc,snd->ncd", samples, samples)

    for name in (None, likelihood):
        exact = estimate("ggn", name, jnp.asarray(0))
        np.testing.assert_allclose(exact, want, atol=1e-12)
        steps = jnp.arange(5_000)
        sampled = jax.vmap(lambda step, name=name: estimate("fisher", name, step))(steps)
        error = np.std(sampled, axis=0) / np.sqrt(len(steps))
        assert np.all(np.abs(sampled.mean(0) - want) < 5 * error + 1e-12)


def test_roots_of_the_loss_hessian():
    """Without a likelihood: singular, negative and not finite ones, and none of LAPACK's calls."""

    def second_moments(loss, outputs):
        objective = oa.Objective(lambda p: p, loss)

        def estimate(outputs):
            args = "ggn", None, jax.random.key(0), jnp.asarray(0), len(outputs)
            samples, _ = output_gradients(objective, outputs, *args)
            return jnp.einsum("snc,snd->ncd", samples, samples)

        return jax.jit(estimate).lower(outputs)

    def scaled(out):  # which hides the likelihood
        return cross_entropy(2 * (out / 2), np.arange(100) % 8)

    def cubic(outputs):  # not convex
        return jnp.mean(
            outputs[:, 0] ** 2 + 10 * outputs[:, 0] * outputs[:, 1] - outputs[:, 2] ** 2
        )

    outputs = 5 * jax.random.normal(jax.random.key(0), (100, 8))
    softmax = second_moments(scaled, outputs)
    assert "lapack" not in softmax.as_text()  # batched, they can hang several devices
    p = np.asarray(jax.nn.softmax(outputs))
    want = p[:, :, None] * np.eye(8) - p[:, :, None] * p[:, None]
    np.testing.assert_allclose(softmax.compile()(outputs), want, atol=1e-6)

    got = second_moments(cubic, outputs).compile()(outputs)
    np.testing.assert_allclose(got, np.broadcast_to(np.diag([2.0] + 7 * [0]), got.shape), atol=1e-5)

    broken = softmax.compile()(outputs.at[3].set(jnp.nan))
    assert np.isnan(broken[3]).all()
    np.testing.assert_allclose(broken[:3], want[:3], atol=1e-6)


def test_random_vectors_of_steps_and_keys_are_independent():
    """Also of steps that follow each other, of seeds that do, and of both kinds of keys."""

    def draw(key, step):
        return hash_bits(key, (64, 100), step)

    keys = [jax.random.key(0), jax.random.key(1), jax.random.key(0, impl="rbg")]
    bits = np.stack([draw(key, jnp.asarray(step)) for key in keys for step in range(8)])
    assert len(np.unique(bits)) > bits.size - 30  # about 3 pairs agree by chance
    for shift in (31, 16, 0):
        signs = 1.0 - 2 * ((bits.reshape(len(bits), -1) >> shift) & 1)
        correlation = signs @ signs.T / signs.shape[1]
        assert np.abs(correlation - np.eye(len(bits))).max() < 5 / np.sqrt(signs.shape[1])


def test_positions_of_an_example(x64):
    """With logits at several positions the loss is a mean over all of them that a mask leaves."""
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)))
    labels = np.arange(8).reshape(4, 2) % 3
    mask = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    objective = oa.Objective(lambda p: p, lambda out: masked_cross_entropy(out, labels, mask))
    want = 4 * jax.hessian(objective)(outputs).reshape(4, 6, 4, 6)
    want = np.stack([want[i, :, i] for i in range(4)])
    key, steps = jax.random.key(1), jnp.arange(5_000)
    for estimator in ("ggn", "fisher"):

        @jax.jit
        def estimate(step: Any, estimator: Any = estimator) -> jax.Array:
            args = estimator, "categorical", key, step, 4
            samples, _ = output_gradients(objective, outputs, *args)
            flat = samples.reshape(-1, 4, 6)
            return jnp.einsum("snc,snd->ncd", flat, flat)

        sampled = jax.vmap(estimate)(steps)
        error = np.std(sampled, axis=0) / np.sqrt(len(steps))
        assert np.all(np.abs(sampled.mean(0) - want) < 5 * error + 1e-12)


def test_too_many_outputs_without_a_likelihood():
    objective = oa.Objective(lambda p: X @ p, lambda out: jnp.mean(jnp.sum(jnp.cosh(out), 1)))
    params = jnp.ones((2, 300))
    tx = oa.scale_by_kfac(objective)
    message = "through `cosh`.* at most 256 .* has 300.* likelihood='categorical'"
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, value_fn=objective)
    pair = oa.Objective(lambda p: (X @ p, X @ p), lambda out: jnp.mean(out[0] + out[1]))
    tx = oa.scale_by_kfac(pair, likelihood="gaussian")
    with pytest.raises(ValueError, match="'gaussian' needs outputs that are one array"):
        tx.update(params, tx.init(params), params, value_fn=pair)


def test_several_outputs(x64):
    """A tuple of outputs is one vector an example."""
    x, w = np.random.default_rng(0).normal(size=(5, 3)), np.ones((3, 4))
    single = oa.Objective(lambda p: x @ p, lambda out: squares(out, 1.0))
    pair = oa.Objective(
        lambda p: jnp.split(x @ p, 2, axis=1),
        lambda out: squares(out[0], 1.0) + squares(out[1], 1.0),
    )
    updates = [
        first_update(oa.scale_by_kfac(o, estimator="ggn"), o, jnp.asarray(w))[0]
        for o in (single, pair)
    ]
    tree_allclose(*updates, rtol=1e-10)
