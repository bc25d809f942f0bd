"""Gradient sampling: golden values with given masks, statistics of drawn ones, limit cases."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa

GRADS = (np.array([1.0, -2, 3]), np.array([0.5, -1, 2]))
MASKS = (np.array([True, False, True]), np.array([False, True, True]))


def given_masks():
    """A sampler that hands out MASKS in turn (outside jit)."""
    masks = itertools.cycle(MASKS)
    return lambda key, tree, rate: jnp.asarray(next(masks))


@pytest.mark.parametrize(
    ("bias_offset", "want", "parameters"),
    [
        (
            0,
            [[-0.001, 0, -0.001], [-0.0006700582, 0.0007441368, -0.0009703521]],
            [0.9983299418, 1.0007441368, 0.9980296479],
        ),
        (
            1,
            [[-0.0007441368, 0, -0.0007441368], [-0.0005752199, 0.0006388136, -0.0008330110]],
            [0.9986806433, 1.0006388136, 0.9984228522],
        ),
    ],
)
def test_golden(x64, bias_offset, want, parameters):
    tx = oa.stoch_grad_adam(1e-3, sampler=given_masks(), bias_offset=bias_offset)
    params = jnp.ones(3)
    state = tx.init(params)
    moments = (
        ([0.1, 0, 0.3], [0.001, 0, 0.009]),
        ([0.09, -0.1, 0.47], [0.000999, 0.001, 0.012991]),
    )
    for grads, wanted, (mu, nu) in zip(GRADS, want, moments, strict=True):
        updates, state = tx.update(jnp.asarray(grads), state, params)
        np.testing.assert_allclose(updates, wanted, atol=1e-9)
        np.testing.assert_allclose(optax.tree.get(state, "mu"), mu, rtol=1e-12)
        np.testing.assert_allclose(optax.tree.get(state, "nu"), nu, rtol=1e-12)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, parameters, atol=1e-9)


def test_port_options_reduce_to_adam(x64):
    """The port's own code path, at d = 1 - tiny and offset 0, is Adam."""
    ours = oa.stoch_grad_adam(0.1, rate=1.0, b1_decay=1 - 1e-15)
    theirs = optax.adam(0.1)
    params = jnp.array([1.0, -2.0])
    states = [ours.init(params), theirs.init(params)]
    for _ in range(5):
        (a, states[0]), (b, states[1]) = (
            tx.update(params, state, params)
            for tx, state in zip((ours, theirs), states, strict=True)
        )
        np.testing.assert_allclose(a, b, rtol=1e-12)
    decayed = oa.stoch_grad_adam(0.1, rate=1.0, b1_decay=0.5)
    state = decayed.init(params)
    for _ in range(2):
        _, state = decayed.update(jnp.ones(2), state, params)
    # m_1 = 0.1; b1_2 = 0.45: m_2 = 0.45 * 0.1 + 0.55.
    np.testing.assert_allclose(optax.tree.get(state, "mu"), 0.595, rtol=1e-12)


def test_rate_one_is_adam_bit_for_bit():
    params = {"w": jnp.linspace(-1, 1, 77).reshape(7, 11), "b": jnp.ones(())}
    ours, theirs = oa.stoch_grad_adam(0.1, rate=1.0), optax.adam(0.1)
    states = [ours.init(params), theirs.init(params)]
    for i in range(5):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(p * i), params)
        (a, states[0]), (b, states[1]) = (
            tx.update(grads, state, params)
            for tx, state in zip((ours, theirs), states, strict=True)
        )
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("rate", [0.003, 0.5, 0.8, 0.999, 1.0])
def test_kept_fraction_is_the_rate(rate):
    leaves = [jnp.zeros((999, 1001)), jnp.zeros(()), jnp.zeros((7,)), jnp.zeros((0, 3))]
    masks = oa.bernoulli_per_element(jax.random.key(1), leaves, rate)
    assert [m.shape for m in masks] == [leaf.shape for leaf in leaves]
    deviation = np.sqrt(rate * (1 - rate) / masks[0].size)
    assert abs(float(masks[0].mean()) - rate) <= 5 * deviation + 2**-24
    if rate == 1.0:
        assert all(bool(m.all()) for m in masks)


def test_entries_leaves_and_steps_are_independent():
    """No correlation between steps, leaves, replicas of a pattern, or entries at any small lag."""
    tree = [jnp.zeros((256, 256)), jnp.zeros((256, 256))]
    root = jax.random.key(0)
    keys = [jax.random.fold_in(root, t) for t in range(3)]
    drawn = [m for key in keys for m in oa.bernoulli_per_element(key, tree, 0.5)]
    first = drawn[0].ravel()
    drawn += [jnp.roll(first, lag) for lag in (1, 2, 3, 4, 8, 16, 255, 256, 257, 4096)]
    signs = np.stack([2.0 * np.asarray(m).ravel() - 1 for m in drawn])
    correlation = signs @ signs.T / signs.shape[1]
    assert np.abs(correlation - np.eye(len(drawn))).max() < 5 / np.sqrt(signs.shape[1])


def test_patterns_of_neighbors_and_counts_are_uniform():
    """Chi-square of eight-entry patterns, and the variance of the kept counts over keys."""
    mask = np.asarray(oa.bernoulli_per_element(jax.random.key(3), jnp.zeros((1 << 18,)), 0.5))
    patterns = np.bincount(np.packbits(mask), minlength=256)
    expected = len(mask) / 8 / 256
    assert 150 < ((patterns - expected) ** 2 / expected).sum() < 370  # 255 +- 5 sigma
    keys = jax.random.split(jax.random.key(4), 2000)
    counts = jax.vmap(lambda k: oa.bernoulli_per_element(k, jnp.zeros(1000), 0.8).sum())(keys)
    assert abs(float(counts.mean()) - 800) < 5 * np.sqrt(160 / 2000)
    assert 0.85 < float(counts.var()) / 160 < 1.15


def test_masks_change_every_step_and_repeat_with_the_key():
    grads = jnp.ones(1000)

    def run(key):
        tx = oa.sample_gradients(0.5, key=key)
        first, state = tx.update(grads, tx.init(grads))
        second, _ = tx.update(grads, state)
        return first, second

    first, second = run(0)
    assert not jnp.array_equal(first, second)
    np.testing.assert_array_equal(first, run(jax.random.key(0))[0])
    np.testing.assert_array_equal(first, run(jax.random.PRNGKey(0))[0])
    assert not jnp.array_equal(first, run(1)[0])


def test_replicas_draw_the_same_mask():
    tx = oa.sample_gradients(0.5)
    grads = jnp.ones((8, 100))
    updates, _ = jax.pmap(lambda g: tx.update(g, tx.init(g)))(grads)
    assert jnp.all(updates == updates[:1])


def test_rescaling_keeps_the_expectation():
    grads = jnp.full((1000, 100), 2.0)
    tx = oa.sample_gradients(0.25, rescale=True)
    updates, _ = tx.update(grads, tx.init(grads))
    assert set(np.unique(updates)) == {0.0, 8.0}
    assert abs(float(updates.mean()) - 2) < 0.1


def test_per_tensor_keeps_or_drops_whole_leaves():
    grads = [jnp.ones(5)] * 200
    tx = oa.sample_gradients(0.5, sampler=oa.bernoulli_per_tensor)
    updates, _ = tx.update(grads, tx.init(grads))
    sums = {float(u.sum()) for u in updates}
    assert sums == {0.0, 5.0}


def test_unsampled_entries_move_on_old_momentum(x64):
    tx = oa.stoch_grad_adam(1.0, sampler=given_masks())
    params = jnp.ones(3)
    state = tx.init(params)
    _, state = tx.update(jnp.asarray(GRADS[0]), state, params)
    updates, _ = tx.update(jnp.asarray(GRADS[1]), state, params)
    assert updates[0] < 0


def test_weight_decay_comes_before_the_mask(x64):
    tx = oa.stoch_grad_adam(1.0, sampler=given_masks(), weight_decay=0.5)
    params = jnp.full(3, 2.0)
    _, state = tx.update(jnp.asarray(GRADS[0]), tx.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu"), [0.2, 0, 0.4], rtol=1e-12)


def test_rate_can_be_scheduled():
    tx = oa.sample_gradients(optax.linear_schedule(0.1, 1.0, 2))
    grads = jnp.ones(10_000)
    state = tx.init(grads)
    for want in (0.1, 0.55, 1.0):
        updates, state = tx.update(grads, state)
        assert abs(float(updates.mean()) - want) < 0.03


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_rates_outside_the_range_raise(rate):
    with pytest.raises(ValueError, match=r"`rate` must lie in \(0, 1\]"):
        oa.sample_gradients(rate)


def test_wrong_keys_and_samplers_raise():
    with pytest.raises(TypeError, match="`sampler` must be a function"):
        oa.sample_gradients(0.5, sampler=0.5)
    with pytest.raises(TypeError, match="`key` must be a PRNG key"):
        oa.sample_gradients(0.5, key=jnp.ones(3))
    with pytest.raises(TypeError, match="`key` must be a PRNG key"):
        oa.sample_gradients(0.5, key="seed")
    with pytest.raises(ValueError, match=r"`key` must be one PRNG key, got .* shape \(2,\)"):
        oa.sample_gradients(0.5, key=jax.random.split(jax.random.key(0)))
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"`key` must be an integer of 64 bits.* {seed}"):
            oa.sample_gradients(0.5, key=seed)
    oa.sample_gradients(0.5, key=np.int64(3))  # of NumPy, too
