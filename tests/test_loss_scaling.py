from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_accel as oa
from tests.helpers import (
    WORKER_MODES,
    least_squares,
    over_workers,
    signature,
    tree_allclose,
    tree_equal,
)

PROBLEM = least_squares()
LOSS = PROBLEM.objective()


def scaled_grads(params, state, loss=LOSS):
    scale = optax.tree.get(state, "loss_scale")
    return jax.value_and_grad(lambda p: scale * loss(p))(params)


def step(tx, params, state, poison=0.0):
    """One step; an infinite ``poison`` lands in one entry of the gradient."""
    value, grads = scaled_grads(params, state)
    grads["b"] = grads["b"].at[1].add(poison)
    updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=LOSS)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("wrong", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_scale(wrong):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda count: 0.1 / (1 + count)))
    tx = oa.dynamic_loss_scale(inner, initial_scale=1024)
    run = jax.jit(lambda params, state, poison: step(tx, params, state, poison))
    params, state = run(PROBLEM.params, tx.init(PROBLEM.params), 0.0)
    same_params, skipped = run(params, state, wrong)
    tree_equal((same_params, skipped.inner_state), (params, state.inner_state))
    assert float(skipped.loss_scale) == 512.0
    assert not skipped.gradient_finite
    assert (int(skipped.finite_steps), int(skipped.skipped)) == (0, 1)
    # It goes on from there, with the step it would have made.
    ahead, state_ahead = run(same_params, skipped, 0.0)
    expected, state_expected = run(params, state, 0.0)
    tree_allclose(ahead, expected, rtol=1e-6)
    assert state_ahead.gradient_finite
    assert int(optax.tree.get(state_ahead.inner_state[1][0], "count")) == 2
    assert signature(state_ahead) == signature(state_expected)


def test_grows_after_exactly_so_many_finite_gradients():
    tx = oa.dynamic_loss_scale(optax.sgd(0.0), initial_scale=4, growth_interval=3)
    state, scales = tx.init(jnp.ones(2)), []
    for _ in range(8):
        scales.append(float(state.loss_scale))
        _, state = tx.update(jnp.ones(2), state)
    assert scales == [4, 4, 4, 8, 8, 8, 16, 16]


def test_counts_anew_after_an_overflow_and_keeps_to_the_bounds():
    tx = oa.dynamic_loss_scale(
        optax.sgd(0.0),
        initial_scale=4,
        growth_interval=2,
        min_scale=2.0,
        max_scale=8.0,
        growth_factor=4.0,
    )
    good, bad = jnp.ones(2), jnp.array([1.0, jnp.inf])
    # Through flatten and unflatten, as in any jit: jmp forgets its smallest scale there.
    update = jax.jit(lambda g, state: tx.update(g, state)[1])
    state, scales = tx.init(good), []
    for gradient in (good, bad, good, good, good, good, bad, bad, bad, bad):
        state = jax.tree.unflatten(*reversed(jax.tree.flatten(update(gradient, state))))
        scales.append(float(state.loss_scale))
    assert scales == [4, 2, 2, 8, 8, 8, 4, 2, 2, 2]
    assert int(state.skipped) == 5


def test_scale_of_powers_of_two_is_exact():
    """The same steps as without a scale, to the last bit."""
    for inner in (optax.adam(0.1), oa.extrap_sgd(0.1, extrapolation_rate=0.05)):
        tx = oa.dynamic_loss_scale(inner, initial_scale=1024)
        params, state = PROBLEM.params, tx.init(PROBLEM.params)
        plain, plain_state = PROBLEM.params, inner.init(PROBLEM.params)
        for _ in range(3):
            params, state = step(tx, params, state)
            value, grads = LOSS.value_and_grad(plain)
            updates, plain_state = inner.update(
                grads, plain_state, plain, value=value, grad=grads, value_fn=LOSS
            )
            plain = optax.apply_updates(plain, updates)
        tree_equal(params, plain)


def test_inner_methods_see_everything_without_the_scale():
    def init(params):
        return {"updates": params, "value": jnp.zeros(()), "grad": params, "loss": jnp.zeros(())}

    def update(updates, state, params, *, value, grad, value_fn, another):
        del state
        assert another == "kept"
        seen = {"updates": updates, "value": value, "grad": grad, "loss": value_fn(params)}
        return updates, seen

    spy = optax.GradientTransformationExtraArgs(init, update)
    tx = oa.dynamic_loss_scale(spy, initial_scale=8)
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    value, grads = scaled_grads(params, state)
    other = optax.tree.scale(2.0, grads)
    _, state = tx.update(
        grads, state, params, value=value, grad=other, value_fn=LOSS, another="kept"
    )
    seen, expected = state.inner_state, LOSS.grad(params)
    tree_allclose(seen["updates"], expected, rtol=1e-6)
    tree_allclose(seen["grad"], optax.tree.scale(2.0, expected), rtol=1e-6)
    np.testing.assert_allclose([seen["value"], seen["loss"]], LOSS(params), rtol=1e-6)


def test_a_line_search_finds_the_same_steps():
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))
    tx = oa.dynamic_loss_scale(search, initial_scale=256)
    params, _ = step(tx, PROBLEM.params, tx.init(PROBLEM.params))
    value, grads = LOSS.value_and_grad(PROBLEM.params)
    updates, _ = search.update(
        grads, search.init(PROBLEM.params), PROBLEM.params, value=value, grad=grads, value_fn=LOSS
    )
    tree_equal(params, optax.apply_updates(PROBLEM.params, updates))


def small_gradients(dtype):
    """Of a network whose inner gradients are about 1e-8: zero in float16."""
    x, y = jnp.ones((4, 2), dtype), jnp.zeros(4)

    def loss(params):
        outputs = (x @ params["w"].astype(dtype)) * dtype(3e-4)
        return jnp.mean((outputs.astype(jnp.float32) - y) ** 2) * 1e-2

    return loss


def test_saves_gradients_that_float16_loses():
    params = {"w": jnp.array([0.5, -0.25])}
    exact = jax.grad(small_gradients(jnp.float32))(params)
    lost = jax.grad(small_gradients(jnp.float16))(params)
    assert not lost["w"].any()
    tx = oa.dynamic_loss_scale(optax.identity())
    state = tx.init(params)
    _, grads = scaled_grads(params, state, small_gradients(jnp.float16))
    updates, _ = tx.update(grads, state, params)
    assert updates["w"].dtype == jnp.float32
    tree_allclose(updates, exact, rtol=5e-3)
    # bfloat16 has the exponents of float32.
    tree_allclose(jax.grad(small_gradients(jnp.bfloat16))(params), exact, rtol=3e-2)


def test_half_gradients_of_float32_parameters_are_unscaled_in_float32():
    tx = oa.dynamic_loss_scale(optax.adam(0.1))
    params = jnp.ones(2)
    grads = jnp.array([2.0**-8, 1.0], jnp.float16)  # divided by 2**16 the first is no float16
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates.dtype == jnp.float32
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(mu, 0.1 * np.array([2.0**-24, 2.0**-16]), rtol=1e-6)
    # Without parameters, and of half-precision parameters, it keeps the gradient's.
    assert tx.update(grads, tx.init(grads), grads)[0].dtype == jnp.float16


@pytest.mark.parametrize("mode", WORKER_MODES)
def test_replicas_agree(mode):
    """With gradients of their own: what one cannot use, none uses."""
    tx = oa.dynamic_loss_scale(optax.adam(0.1), initial_scale=8, axis_name="workers")
    params = jnp.ones((4, 3))
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (4, *a.shape)), tx.init(params[0]))
    one = over_workers(mode, lambda g, s, p: tx.update(g, s, p), 4)
    updates, new = one(params.at[2, 1].set(jnp.nan), state, params)
    assert not updates.any()
    tree_equal(new.inner_state, state.inner_state)
    np.testing.assert_array_equal(new.loss_scale, np.full(4, 4.0))
    assert one(params, state, params)[0].all()


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_replicas_with_the_mean_gradient_agree_without_an_axis(mode):
    """One overflow anywhere is an overflow in the mean."""
    tx = oa.dynamic_loss_scale(optax.sgd(0.1), initial_scale=8)

    def one(gradient, state):
        return tx.update(jax.lax.pmean(gradient, "workers"), state)

    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (4, *a.shape)), tx.init(jnp.ones(2)))
    _, new = over_workers(mode, one, 4)(jnp.ones((4, 2)).at[3, 0].set(jnp.inf), state)
    np.testing.assert_array_equal(new.loss_scale, np.full(4, 4.0))


def test_vmap_keeps_a_scale_for_each():
    tx = oa.dynamic_loss_scale(optax.sgd(0.1), initial_scale=8)
    params = jnp.ones((2, 3))
    state = jax.vmap(tx.init)(params)
    updates, new = jax.vmap(tx.update)(params.at[1, 0].set(jnp.inf), state, params)
    np.testing.assert_array_equal(new.loss_scale, [8.0, 4.0])
    assert updates[0].all()
    assert not updates[1].any()


def test_around_multi_steps_a_micro_batch_that_is_not_finite_is_left_out():
    """And the others have the same steps as without it, whatever their scales were."""

    def run(poisons):
        inner = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
        tx = oa.dynamic_loss_scale(inner, initial_scale=8, growth_interval=2)
        run_one = jax.jit(lambda params, state, poison: step(tx, params, state, poison))
        params, state = PROBLEM.params, tx.init(PROBLEM.params)
        for poison in poisons:
            params, state = run_one(params, state, poison)
        return params, state

    params, state = run((0.0, jnp.inf, 0.0, jnp.nan, 0.0, 0.0))
    expected, _ = run((0.0,) * 4)
    tree_allclose(params, expected, rtol=1e-6)
    assert int(state.skipped) == 2


def test_within_multi_steps_one_scale_for_all_micro_batches():
    tx = optax.MultiSteps(
        oa.dynamic_loss_scale(optax.sgd(0.1), initial_scale=8, growth_interval=1), 2
    )
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    scales = []
    for _ in range(4):
        params, state = step(tx, params, state)
        scales.append(float(optax.tree.get(state, "loss_scale")))
    assert scales == [8, 16, 16, 32]
    expected = PROBLEM.params
    for _ in range(2):
        expected = optax.apply_updates(expected, optax.tree.scale(-0.1, LOSS.grad(expected)))
    tree_allclose(params, expected, rtol=1e-6)


def test_in_a_mask_and_in_a_chain():
    mask = {"dense": True, "b": False}
    tx = optax.chain(
        optax.masked(oa.dynamic_loss_scale(optax.sgd(0.1), initial_scale=8), mask), optax.scale(2.0)
    )
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    _, grads = scaled_grads(params, state)
    updates, state = tx.update(grads, state, params)
    expected = LOSS.grad(params)
    tree_allclose(updates["dense"], optax.tree.scale(-0.2, expected["dense"]), rtol=1e-6)
    assert float(optax.tree.get(state, "loss_scale")) == 8.0


def test_orbax_round_trip(tmp_path):
    tx = oa.dynamic_loss_scale(optax.adam(0.1), initial_scale=1024, growth_interval=2)
    carry = PROBLEM.params, tx.init(PROBLEM.params)
    for poison in (0.0, jnp.inf, 0.0):
        carry = step(tx, *carry, poison)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c", jax.eval_shape(lambda: carry))
    tree_equal(restored, carry)
    assert float(restored[1].loss_scale) == 512.0
    tree_equal(step(tx, *restored), step(tx, *carry))


def test_any_tree():
    tx = oa.dynamic_loss_scale(optax.sgd(1.0), initial_scale=2)
    for params in ((), {"a": None, "b": [jnp.ones(()), jnp.zeros((0, 3), jnp.bfloat16)]}):
        updates, state = tx.update(params, tx.init(params), params)
        assert signature(updates) == signature(params)
        assert state.gradient_finite


WRONG = {
    "initial_scale": 0,
    "growth_interval": 0,
    "growth_factor": 0.5,
    "backoff_factor": 1.0,
    "min_scale": 0.0,
    "max_scale": -1.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        oa.dynamic_loss_scale(optax.sgd(0.1), **{name: WRONG[name]})


def test_wrong_order_inner_and_parameters():
    for arguments in itertools.permutations((1.0, 4.0, 16.0)):
        names = dict(zip(("min_scale", "initial_scale", "max_scale"), arguments, strict=True))
        if arguments == (1.0, 4.0, 16.0):
            oa.dynamic_loss_scale(optax.sgd(0.1), **names)
            continue
        with pytest.raises(ValueError, match="in this order"):
            oa.dynamic_loss_scale(optax.sgd(0.1), **names)
    with pytest.raises(TypeError, match="`inner`"):
        oa.dynamic_loss_scale(0.1)
    with pytest.raises(TypeError, match="int32"):
        oa.dynamic_loss_scale(optax.sgd(0.1)).init({"a": jnp.ones(2, jnp.int32)})
