"""pmap, shard_map and sharded jit give what one device gives on the same global batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from experiments import engine
from experiments.methods import METHODS
from experiments.parallel import FETCH_EVERY, MODES, Parallel, check_divisible

STEPS = 20
BATCH = 32


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(6, 10, rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


class WithNorm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


def batches():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, BATCH, 6)).astype(np.float32)
    # Learnable labels: with random ones the dominant subspace is barely defined.
    y = np.argmax(x[..., :3] + 0.3 * rng.normal(size=(STEPS, BATCH, 3)), -1).astype(np.int32)
    return list(zip(x, y, strict=True))


def run(model, tx, mode, num_devices, method=None):
    graphdef, params, rest = engine.split(model(nnx.Rngs(0)))

    def step(state, batch, curvature, *, refresh, axis_name):
        return engine.train_step(
            tx, graphdef, state, *batch, curvature=curvature, refresh=refresh, axis_name=axis_name
        )

    parallel = Parallel(mode, jax.devices()[:num_devices], step)
    state = parallel.put_state(engine.init_state(tx, params, rest))
    losses = []
    for i, batch in enumerate(batches()):
        # The method's refresh of every fifth step, on a batch of its own.
        refresh = method.refresh(i) if method else None
        curvature = parallel.put_batch(batches()[0]) if refresh else None
        state, metrics = parallel.step(state, parallel.put_batch(batch), curvature, refresh)
        losses.append(metrics["loss"])
        if i % FETCH_EVERY == 0:
            jax.block_until_ready(losses)
    return jax.device_get((parallel.get_state(state), losses))


@functools.cache
def build(name):
    method = METHODS[name]
    # The middle of the method's own grid; two subspace directions, to compile fast.
    return method, method.build(method.learning_rates[2], total_steps=STEPS, num_classes=2)


@functools.cache
def one_device(name):
    method, tx = build(name)
    return run(Mlp, tx, "jit", 1, method)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["sgd", "adam", "demon_adam", "stoch_grad_adam", "bulk_sgd", "extrap_sgd"]
)
def test_eight_devices_equal_one(name, mode):
    method, tx = build(name)
    expected, expected_losses = one_device(name)
    state, losses = run(Mlp, tx, mode, 8, method)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    difference, norm = 0.0, 0.0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        difference += float(np.sum((a - b) ** 2))
        norm += float(np.sum(b**2))
    assert difference**0.5 <= 1e-5 * norm**0.5
    assert int(state.step) == STEPS


@functools.cache
def train_on_token_ids(mode, num_devices):
    options = {"embedding_size": 4, "num_heads": 2, "feedforward_size": 8, "num_layers": 1}
    graphdef, params, rest = engine.split(
        models.create("transformer", input_shape=(5,), num_classes=3, vocabulary_size=7, **options)
    )
    x = np.random.default_rng(0).integers(0, 7, (8, 5), dtype=np.int32)
    _, tx = build("sgd")

    def step(state, batch, curvature, *, refresh, axis_name):
        del curvature, refresh
        return engine.train_step(tx, graphdef, state, *batch, loss="mse", axis_name=axis_name)

    parallel = Parallel(mode, jax.devices()[:num_devices], step)
    state = parallel.put_state(engine.init_state(tx, params, rest))
    for _ in range(3):
        state, metrics = parallel.step(state, parallel.put_batch((x, x[:, 0] % 3)))
    return jax.device_get((parallel.get_state(state).params, metrics["loss"]))


@pytest.mark.parametrize("mode", MODES)
def test_token_ids_and_another_loss_on_four_devices(mode):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        train_on_token_ids(mode, 4),
        train_on_token_ids("jit", 1),
    )


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_batch_statistics_are_averaged(mode):
    _, tx = build("sgd")
    state, losses = run(WithNorm, tx, mode, 4)
    expected, _ = run(WithNorm, tx, "jit", 1)
    assert np.all(np.isfinite(losses))
    # The mean of a batch is the mean of its parts' means; of variances only the scale agrees.
    np.testing.assert_allclose(
        state.rest["norm"]["mean"], expected.rest["norm"]["mean"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(state.rest["norm"]["var"], expected.rest["norm"]["var"], rtol=0.2)


@pytest.mark.parametrize("mode", MODES)
def test_state_survives_put_and_get(mode):
    parallel = Parallel(mode, jax.devices()[:4], lambda *args, **kwargs: None)
    shared = jnp.arange(3.0)
    state = {"a": shared, "b": shared, "key": jax.random.key(0), "empty": jnp.zeros((2, 0))}
    placed = parallel.put_state(state)
    restored = parallel.get_state(placed)
    assert restored["a"].sharding == parallel.replicated
    np.testing.assert_array_equal(restored["b"], shared)
    np.testing.assert_array_equal(
        jax.random.key_data(restored["key"]), jax.random.key_data(state["key"])
    )
    # What was put is a copy: a step may overwrite it, and leaves may share a buffer.
    jax.tree.map(lambda a: a.delete(), placed)
    np.testing.assert_array_equal(shared, [0, 1, 2])


def test_batch_that_does_not_split_is_refused():
    check_divisible(32, 4, "--batch-size")
    with pytest.raises(ValueError, match=r"--batch-size 33 .* 4 devices; use e\.g\. 32 or 36"):
        check_divisible(33, 4, "--batch-size")
    with pytest.raises(ValueError, match=r"--batch-size 3 .* use e\.g\. 4"):
        check_divisible(3, 4, "--batch-size")


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'tpu'; valid modes are jit, fsdp, pmap, shard_map"):
        Parallel("tpu", jax.devices(), lambda *args, **kwargs: None)
