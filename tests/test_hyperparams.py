"""Scheduled arguments for any factory, and inject_hyperparams with static arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa


def test_with_schedules_agrees_with_inject_hyperparams():
    schedule = optax.linear_schedule(0.9, 0.1, 5)
    ours = oa.with_schedules(optax.adam, b1=schedule)(learning_rate=0.1)
    theirs = optax.inject_hyperparams(optax.adam)(learning_rate=0.1, b1=schedule)
    params = jnp.array([1.0, -2.0])
    states = [tx.init(params) for tx in (ours, theirs)]
    for _ in range(4):
        results = [
            tx.update(params, state, params)
            for tx, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state for _, state in results]
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)


def test_mixed_precision_trees_keep_their_dtypes():
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2)}
    tx = oa.with_schedules(optax.sgd, momentum=oa.demon_schedule(0.9, 10))(0.1)
    state = tx.init(params)
    for _ in range(2):
        updates, new_state = tx.update(params, state, params)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        assert jax.tree.map(jnp.result_type, new_state) == jax.tree.map(jnp.result_type, state)
        state = new_state
    # 0.9 in bfloat16 would be 0.8984: the momentum itself stays in float32.
    assert state.scheduled["momentum"].dtype == jnp.float32


def test_several_arguments_and_integers_stay_static():
    def factory(rate, power, scale):
        assert isinstance(power, int)
        return optax.scale(rate * scale**power)

    tx = oa.with_schedules(factory, rate=lambda t: t + 1.0, scale=lambda t: 2.0)(power=3)
    state = tx.init(jnp.ones(()))
    first, state = tx.update(jnp.ones(()), state)
    second, _ = tx.update(jnp.ones(()), state)
    assert (first, second) == (8, 16)


def test_wrong_schedules_raise_where_they_are_given():
    with pytest.raises(ValueError, match="sgd has no argument 'beta'; it takes learning_rate"):
        oa.with_schedules(optax.sgd, beta=optax.constant_schedule(0.9))
    with pytest.raises(TypeError, match="`momentum` must be a schedule"):
        oa.with_schedules(optax.sgd, momentum=0.9)
    with pytest.raises(ValueError, match="at least one schedule"):
        oa.with_schedules(optax.sgd)
    build = oa.with_schedules(optax.sgd, momentum=optax.constant_schedule(0.9))
    with pytest.raises(TypeError, match="'momentum' is scheduled and was given again"):
        build(0.1, momentum=0.5)
    with pytest.raises(TypeError, match="learning_rate"):
        build()  # before any init


def test_static_arguments_follow_the_annotations():
    assert oa.static_arguments(oa.bulk_sgd) == (
        "num_directions",
        "base",
        "tracker",
        "start_step",
        "metric",
        "preconditioner",
        "mask",
    )
    assert "rate" not in oa.static_arguments(oa.stoch_grad_adam)
    assert {"key", "bias_offset", "sampler"} <= set(oa.static_arguments(oa.stoch_grad_adam))


def test_injected_rates_can_be_changed_between_steps():
    tx = oa.inject_hyperparams(oa.interpolated_sgd)(0.1, 1, 0.5, 1.0)
    params = jnp.ones(2)
    state = tx.init(params)

    def loss(p):
        return jnp.sum(jnp.array([3.0, 1.0]) * p**2)

    update = jax.jit(lambda s: tx.update(params, s, params, value_fn=loss))
    np.testing.assert_allclose(update(state)[0], [-0.05, -0.1], rtol=1e-5)
    state.hyperparams["learning_rate"] = jnp.asarray(1.0)
    np.testing.assert_allclose(update(state)[0], [-0.5, -1.0], rtol=1e-5)


def test_arguments_that_the_factory_does_not_take_are_named():
    inject = oa.inject_hyperparams(oa.qhm)
    with pytest.raises(TypeError, match=r"\(qhm\): .* argument 'gamma'; it takes learning_rate, b"):
        inject(0.1, gamma=3.0)
    with pytest.raises(TypeError, match=r"\(qhm\): missing a required argument: 'learning_rate'"):
        inject()


def test_callables_that_optax_takes_for_schedules_are_refused_with_the_way_out():
    """Counts may become arrays; a dtype must stay one."""
    inject = optax.inject_hyperparams(oa.demon_sgd)
    with pytest.raises(TypeError, match=r"`accumulator_dtype` .* Use optax_accel\.inject_hyperp"):
        inject(0.1, accumulator_dtype=jnp.float32, decay_steps=10).init(jnp.ones(2))
    assert inject(0.1, decay_steps=10).init(jnp.ones(2)).hyperparams["decay_steps"] == 10


PREDICTIONS = {
    "argument": (lambda params, x: x @ params["w"], {"x": jnp.ones((2, 3))}),
    "closure": (lambda params: jnp.ones((2, 3)) @ params["w"], None),
    "any": (lambda params: jax.tree.leaves(params)[0] * 1.0, None),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_an_objective_that_optax_takes_for_a_schedule_is_told(name: str) -> None:
    predict, example = PREDICTIONS[name]
    objective = oa.Objective(predict, lambda outputs: jnp.mean(outputs**2))
    tx = optax.inject_hyperparams(oa.kfac)(0.1, objective=objective, example=example)
    with pytest.raises((TypeError, IndexError), match=r"optax_accel\.inject_hyperparams") as caught:
        tx.init({"w": jnp.ones(3)})
    assert name != "argument" or 'static_args="objective"' in str(caught.value)


def test_kfac_refreshes_with_counts_that_optax_made_arrays() -> None:
    """From an `init` outside of `jit`, in which the size of its factors is not known."""
    params, x = {"w": jnp.ones((3, 2))}, jnp.arange(12.0).reshape(4, 3) / 12
    objective = oa.Objective(lambda params: x @ params["w"], lambda out: jnp.mean(out**2))

    def updates(tx: optax.GradientTransformationExtraArgs) -> jax.Array:
        state = tx.init(params)
        update = jax.jit(lambda state: tx.update(params, state, params, value_fn=objective))
        return update(update(state)[1])[0]["w"]

    inject = optax.inject_hyperparams(oa.kfac, static_args="objective")
    np.testing.assert_allclose(updates(inject(0.1, objective)), updates(oa.kfac(0.1, objective)))
    with pytest.raises(TypeError, match=r"`max_size` must .* use optax_accel"):
        jax.eval_shape(inject(0.1, objective).init, params)


def test_an_objective_without_its_arguments_names_them() -> None:
    objective = oa.Objective(lambda params, x: x @ params, lambda outputs, y: jnp.sum(outputs - y))
    with pytest.raises(TypeError, match=r"\['x', 'y'\], .*objective\(params, x=\.\.\.\)\.$"):
        objective(jnp.ones(3))
    with pytest.raises(TypeError, match=r"\['y'\], which were not given"):
        objective(jnp.ones(3), x=jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="dot_general"):
        objective(jnp.ones(3), x=jnp.ones((2, 2)), y=0)


def test_hyperparameters_that_lose_their_meaning_in_half_precision():
    """Optax takes the dtype of the parameters: 0.999 is 1 in bfloat16, and the epsilon 0."""
    half = jnp.zeros(2, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"`b2` must be less than 1, .* `hyperparam_dtype="):
        optax.inject_hyperparams(oa.stoch_grad_adam)(0.1).init(half)
    inject = optax.inject_hyperparams(oa.stoch_grad_adam, hyperparam_dtype=jnp.float32)
    state = inject(0.1).init(half)
    assert float(state.hyperparams["b2"]) == pytest.approx(0.999)
    tx = optax.inject_hyperparams(oa.extra_adam)(0.1)
    half = half.astype(jnp.float16)
    state = tx.init(half)
    assert state.hyperparams["eps"] == 0
    updates, _ = tx.update(half, state, half, value_fn=lambda p: jnp.sum(p * 0))
    assert not updates.any()


def test_schedules_for_factories_whose_states_hold_keys():
    tx = oa.with_schedules(oa.stoch_grad_adam, b1=oa.demon_schedule(0.9, 10))(0.1, key=3)
    grads = jnp.ones(4)
    updates, _ = tx.update(grads, tx.init(grads))
    alone = oa.stoch_grad_adam(0.1, key=3)
    np.testing.assert_allclose(updates, alone.update(grads, alone.init(grads))[0], rtol=1e-6)
