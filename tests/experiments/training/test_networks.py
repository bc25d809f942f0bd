"""A model as functions of pytrees: its parts, its objective, its scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
import optax_accel as oa
from experiments.training import networks
from experiments.training.step import init_state, train_step
from models import capsnet
from tests.experiments.training.small_networks import make_batch, spy


def test_split_gives_plain_arrays_and_sorts_them(norm_dropout):
    _, params, rest = norm_dropout
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((params, rest)))
    assert sorted(params) == ["head", "norm"]
    assert sorted(rest) == ["dropout", "norm"]


def test_evaluation_uses_running_statistics_and_no_dropout(norm_dropout, batch):
    graphdef, params, rest = norm_dropout
    x, y = batch["x"], batch["y"]
    metrics = networks.evaluate(graphdef, params, rest, batch)
    # Running mean 0 and variance 1: normalization is the identity up to its epsilon of 1e-5.
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == y).mean(), rtol=1e-6)


def test_objective_has_the_methods_of_the_library(mlp, batch):
    graphdef, params, rest = mlp
    objective = networks.objective(graphdef).bind(rest=rest, **batch)
    assert isinstance(objective, oa.Objective)
    assert objective.outputs(params).shape == (12, 3)
    product = objective.hvp(params, params)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    x, y = batch["x"], batch["y"]
    unbound = networks.objective(graphdef).given(rest=rest)
    assert unbound(params, x=x, y=y) == objective(params)
    with pytest.raises(TypeError, match="'y'"):
        unbound(params, x=x)


def test_mse_is_half_the_squared_distance_to_the_one_hot_label(mlp, batch):
    graphdef, params, rest = mlp
    x, y = batch["x"], batch["y"]
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    outputs = np.asarray(h @ params["head"]["kernel"] + params["head"]["bias"][None])
    expected = 0.5 * ((outputs - np.eye(3)[np.asarray(y)]) ** 2).sum() / len(y)
    objective = networks.objective(graphdef, "mse").bind(rest=rest, **batch)
    np.testing.assert_allclose(objective(params), expected, rtol=1e-6)
    scores = networks.evaluate(graphdef, params, rest, batch, loss="mse")
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(scores["accuracy"], (outputs.argmax(-1) == y).mean(), rtol=1e-6)

    tx = spy()
    state = init_state(tx, params, rest)
    curvature = make_batch(7, seed=1)
    new, metrics = train_step(
        tx, networks.objective(graphdef, "mse"), state, batch, curvature, refresh="warm"
    )
    seen = new.opt_state.seen
    for value in (metrics["loss"], seen["value"], seen["loss"]):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    on_curvature = networks.objective(graphdef, "mse").bind(rest=rest, **curvature)
    np.testing.assert_allclose(seen["curvature"], on_curvature(params), rtol=1e-6)
    # The gradient of the last bias is the mean residual.
    residual = (outputs - np.eye(3)[np.asarray(y)]).mean(0)
    np.testing.assert_allclose(seen["grad"]["head"]["bias"], residual, rtol=1e-5, atol=1e-7)


def test_gauss_newton_of_mse_of_a_linear_model_is_its_hessian():
    graphdef, params, rest = networks.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    objective = networks.objective(graphdef, "mse").bind(rest=rest, **make_batch())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        objective.hvp(params, params),
        objective.ggn_vp(params, params),
    )


def test_unknown_loss(mlp, batch):
    graphdef, params, rest = mlp
    for call in (
        lambda: networks.objective(graphdef, "hinge"),
        lambda: networks.evaluate(graphdef, params, rest, batch, loss="hinge"),
    ):
        with pytest.raises(ValueError, match="unknown loss 'hinge'; valid: cross_entropy, mse"):
            call()


class PerToken(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(5, 5, rngs=rngs)

    def __call__(self, x):
        return self.table(x)


def test_scores_of_tokens_are_averages_that_can_be_averaged():
    graphdef, params, rest = networks.split(PerToken(nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.integers(0, 5, (6, 4)), jnp.int32) for _ in range(2))
    y = y.at[2:, 1:].set(-1)
    scores = networks.evaluate(graphdef, params, rest, {"x": x, "y": y})
    best = np.asarray(params["table"]["embedding"]).argmax(-1)[x]
    np.testing.assert_allclose(scores["counted"], 12 / 24)
    np.testing.assert_allclose(scores["accuracy"], (best == np.asarray(y)).sum() / 24)
    parts = [
        networks.evaluate(graphdef, params, rest, {"x": x[i : i + 3], "y": y[i : i + 3]})
        for i in (0, 3)
    ]
    for name, value in scores.items():
        np.testing.assert_allclose(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6)
    # A function serves as loss; what has no labels has no accuracy.
    shares = jnp.full((6, 4, 5), 0.2)
    scores = networks.evaluate(
        graphdef, params, rest, {"x": x, "y": shares}, loss=lambda o, y: (o - y).sum()
    )
    assert set(scores) == {"loss"}


def test_micro_batches_draw_masks_of_their_own():
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1)))
    graphdef, params, rest = networks.split(model)
    x, y = jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    objective, variables = networks.objective(graphdef), {"rest": rest}
    masks = [
        objective(params, x=x[:4], y=y[:4], **variables, micro_batch=jnp.int32(i)) for i in range(2)
    ]
    assert masks[0] != masks[1]
    parts = objective.accumulated(2, x=x, y=y, carry=variables)
    np.testing.assert_allclose(parts(params), sum(masks) / 2, rtol=1e-6)


def test_the_decoder_of_a_capsule_network_reads_the_labels():
    model = models.create(
        "capsnet",
        input_shape=(8, 8, 1),
        num_classes=3,
        channels=4,
        capsule_types=2,
        kernel_size=3,
        hidden_sizes=(5,),
    )
    graphdef, params, rest = networks.split(model)
    x, y = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1)), jnp.array([0, 1, 2, 1])

    @jax.jit
    def run(params, x, y):
        objective = networks.objective(graphdef, "margin")
        (value, _), grads = objective.value_and_grad(params, rest=rest, x=x, y=y)
        batch = {"x": x, "y": y}
        scores = networks.evaluate(graphdef, params, rest, batch, loss="margin")
        return value, grads, scores, model(x), model.reconstruct(model.class_capsules(x), y)

    value, grads, scores, lengths, images = run(params, x, y)
    by_hand = capsnet.margin_loss(lengths, y) + capsnet.reconstruction_loss(images, x)
    np.testing.assert_allclose(value, by_hand.mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(scores["accuracy"], (lengths.argmax(-1) == y).mean())
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads["decoder"]))
