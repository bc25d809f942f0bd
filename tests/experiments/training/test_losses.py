"""The losses, at labels that count and at labels that do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.training import losses


def test_labels_of_tokens_count_where_they_are_not_minus_one():
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(4, 5, 7)), jnp.float32)
    y = rng.integers(0, 7, (4, 5))
    y[0, 2:], y[3, 1:] = -1, -1
    logp = np.asarray(jax.nn.log_softmax(outputs))
    rows = [logp[i, j, y[i, j]] for i in range(4) for j in range(5) if y[i, j] >= 0]
    loss = losses.find_loss("cross_entropy")
    # The mean over all 20 positions: linear in the examples, whatever part of a batch is padding.
    np.testing.assert_allclose(loss(outputs, jnp.asarray(y)), -np.sum(rows) / 20, rtol=1e-6)
    halves = [loss(outputs[rows], jnp.asarray(y[rows])) for rows in (slice(2), slice(2, 4))]
    np.testing.assert_allclose(loss(outputs, jnp.asarray(y)), np.mean(halves), rtol=1e-6)
    gradient = jax.grad(loss)(outputs, jnp.asarray(y))
    assert (gradient[y == -1] == 0).all()
    assert (abs(gradient[y >= 0]).sum(axis=-1) > 0).all()


def test_label_smoothing_and_shares_of_classes():
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    y = jnp.array([0, 1, 2, 2, -1, 0])
    logp = np.asarray(jax.nn.log_softmax(outputs))
    smooth = losses.find_loss("cross_entropy", label_smoothing=0.3)
    targets = 0.7 * np.asarray(jax.nn.one_hot(y, 3)) + 0.1
    targets[4] = 0
    np.testing.assert_allclose(smooth(outputs, y), -(targets * logp).sum() / 6, rtol=1e-5)
    # Shares of the classes, as of mixed examples: one label at 1 is that label.
    plain = losses.find_loss("cross_entropy")
    y = y.at[4].set(1)
    np.testing.assert_allclose(plain(outputs, jax.nn.one_hot(y, 3)), plain(outputs, y), rtol=1e-6)
    np.testing.assert_allclose(smooth(outputs, jax.nn.one_hot(y, 3)), smooth(outputs, y), rtol=1e-6)
    mse = losses.find_loss("mse")
    np.testing.assert_allclose(mse(outputs, jax.nn.one_hot(y, 3)), mse(outputs, y), rtol=1e-6)
    with pytest.raises(ValueError, match="for the loss cross_entropy, not for mse"):
        losses.find_loss("mse", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"at least 0 and below 1, got 1\.5"):
        losses.find_loss("cross_entropy", label_smoothing=1.5)


def test_a_capsule_network_is_trained_by_the_papers_total_loss():
    lengths, y = jnp.array([[0.5, 0.0], [0.2, 0.95]]), jnp.array([0, 1])
    margin = losses.find_loss("margin")
    alone = margin(lengths, y)  # of a network without a decoder
    np.testing.assert_allclose(alone, (0.4**2 + 0.5 * 0.1**2) / 2, rtol=1e-5)
    images, inputs = jnp.zeros((2, 2, 2, 1)), jnp.ones((2, 2, 2, 1))
    outputs = {"lengths": lengths, "images": images, "inputs": inputs}
    np.testing.assert_allclose(margin(outputs, y), alone + 0.0005 * 4, rtol=1e-6)
    np.testing.assert_array_equal(losses.scores_of_classes(outputs), lengths)


@pytest.mark.parametrize(
    ("loss", "model", "task", "chosen"),
    [
        (None, "capsnet", "digits", "margin"),
        ("mse", "capsnet", "digits", "mse"),
        (None, None, "digits", "cross_entropy"),
        (None, "capsnet", "vae_digits", "elbo"),
    ],
)
def test_a_model_may_have_a_loss_of_its_own(loss, model, task, chosen):
    assert losses.choose(loss, model, data.DEFAULTS[task]) == chosen
