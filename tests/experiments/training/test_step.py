"""The shared training step: what it computes, and that it is a pure function of pytrees."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_accel as oa
from experiments.methods import METHODS
from experiments.training import networks
from experiments.training.optimizers import find_schedule_free, wrap
from experiments.training.parallel import Parallel
from experiments.training.step import StepOptions, averaged, init_state, train_step
from tests.experiments.training.small_networks import Mlp, make_batch, spy
from tests.helpers import tree_allclose, tree_equal


def test_step_is_the_textbook_step(mlp, batch):
    graphdef, params, rest = mlp
    x, y = batch["x"], batch["y"]
    tx = optax.with_extra_args_support(optax.adam(1e-2))

    def loss_fn(p):
        h = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"][None])
        logits = h @ p["head"]["kernel"] + p["head"]["bias"][None]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    expected = nnx.to_pure_dict(params)
    opt_state = tx.init(expected)
    state = init_state(tx, params, rest)
    step = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch))

    @jax.jit
    def textbook(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        loss, expected, opt_state = textbook(expected, opt_state)
        state, metrics = step(state)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert int(state.step) == 3
    # A handful of float32 roundings apart: both sides fuse differently.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        nnx.to_pure_dict(state.params),
        expected,
    )


def squares(outputs, y):
    """The loss of the examples of class 0, and of all."""
    losses = jnp.sum(outputs**2, axis=-1)
    return jnp.mean(jnp.where(y == 0, losses, 0)), jnp.mean(losses)


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap", "per worker", "accumulated"])
def test_share_of_a_group_is_that_of_all_examples(mlp, batch, mode):
    """Both losses are summed over the replicas before they are divided: a mean of the replicas'
    own shares would be another number."""
    graphdef, params, rest = mlp
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    workers = 4 if mode == "per worker" else None
    options = StepOptions(
        shares=True, per_worker=workers is not None, accumulate=4 if mode == "accumulated" else 1
    )
    objective = networks.objective(graphdef, group=squares)

    def step(state, batch, curvature, *, refresh, axis_name):
        return train_step(tx, objective, state, batch, axis_name=axis_name, options=options)

    name = mode if mode in ("jit", "shard_map", "pmap") else "jit"
    parallel = Parallel(name, jax.devices()[:4], step, workers=workers)
    state = parallel.init(lambda: init_state(tx, params, rest))
    batch = {"x": np.asarray(batch["x"]), "y": np.sort(np.asarray(batch["y"]))}
    _, metrics = parallel.step(state, parallel.put_batch(batch))
    outputs = networks.objective(graphdef).outputs(params, rest=rest, **batch)
    losses = np.sum(np.square(outputs), axis=-1)
    parts = [losses[batch["y"] == 0].sum(), losses.sum()]
    np.testing.assert_allclose(metrics["share"], parts[0] / parts[1], rtol=1e-5)
    shares = [
        (part * (y == 0)).sum() / part.sum()
        for part, y in zip(np.split(losses, 4), np.split(batch["y"], 4), strict=True)
    ]
    assert abs(np.mean(shares) - parts[0] / parts[1]) > 1e-3


def test_a_sampled_epoch_evaluates_nothing(norm_dropout, batch):
    graphdef, params, rest = norm_dropout
    tx = oa.gradsamp(optax.sgd(0.1), 1, period=2, start=1)
    state = init_state(tx, params, rest)
    options = StepOptions(norms_every=1)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(state, refresh):
        objective = networks.objective(graphdef)
        return train_step(tx, objective, state, batch, refresh=refresh, options=options)

    before, _ = step(step(state, False)[0], False)
    after, metrics = step(before, "sample")
    tree_equal(after.rest, before.rest)
    tree_equal(after.opt_state.inner_state, before.opt_state.inner_state)
    assert np.isnan(metrics["loss"])
    assert np.isnan(metrics["gradient_norm"])
    assert metrics["finite"]
    assert metrics["update_norm"] > 0
    computed = {refresh: step.lower(before, refresh).as_text() for refresh in (False, "sample")}
    assert ["exponential" in text for text in computed.values()] == [True, False]  # of the loss


def test_step_is_pure_and_keeps_the_structure(norm_dropout, batch):
    graphdef, params, rest = norm_dropout
    tx = optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    state = init_state(tx, params, rest)
    before = jax.tree.map(jnp.copy, state)
    step = jax.jit(lambda s, batch: train_step(tx, networks.objective(graphdef), s, batch))
    first, _ = step(state, batch)
    again, _ = step(state, batch)
    assert jax.tree.structure(first) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, state)
    for left, right in ((state, before), (first, again)):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left, right))


def test_batch_statistics_and_random_streams_advance(norm_dropout, batch):
    graphdef, params, rest = norm_dropout
    x = batch["x"]
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    step = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch))
    state, _ = step(init_state(tx, params, rest))
    # Running statistics start at mean 0, variance 1 and forget a tenth per step.
    np.testing.assert_allclose(state.rest["norm"]["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.rest["norm"]["var"], 0.9 + 0.1 * x.var(0), rtol=1e-5)
    count = state.rest["dropout"]["rngs"]["count"]
    assert int(count) == int(rest["dropout"]["rngs"]["count"]) + 1


def test_optimizer_gets_all_extra_arguments(mlp, batch):
    graphdef, params, rest = mlp
    tx = spy()
    curvature = make_batch(7, seed=1)
    state = init_state(tx, params, rest)
    step = jax.jit(
        lambda s, c: train_step(
            tx, networks.objective(graphdef), s, batch, curvature=c, refresh="warm"
        )
    )
    new, metrics = step(state, curvature)
    seen = new.opt_state.seen
    objective = networks.objective(graphdef)
    (loss, _), grads = jax.jit(lambda p: objective.value_and_grad(p, rest=rest, **batch))(params)
    on_curvature = jax.jit(lambda p: objective(p, rest=rest, **curvature))(params)
    np.testing.assert_allclose(seen["value"], loss, rtol=1e-6)
    np.testing.assert_allclose(seen["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(seen["curvature"], on_curvature, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    # Both sides fuse differently: entries that nearly cancel differ by a rounding of the terms.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), seen["grad"], grads
    )
    # Without curvature and refresh neither is passed, so that plain Optax optimizers work.
    jax.eval_shape(lambda s: train_step(tx, networks.objective(graphdef), s, batch), state)


def test_logged_loss_is_the_one_the_method_evaluated(mlp, batch):
    graphdef, params, rest = mlp
    tx = spy(value=42.0)
    state = init_state(tx, params, rest)
    step = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch))
    assert float(step(state)[1]["loss"]) == 42.0


def test_plain_dicts_train_too(batch):
    """Without other variables; curvature is of another batch, in micro-batches of the same size."""
    params = {"w": jnp.full((4, 3), 0.1)}
    objective = oa.Objective(
        lambda params, x: x @ params["w"],
        lambda outputs, y: jnp.mean((outputs - jax.nn.one_hot(y, 3)) ** 2),
    )
    tx, curvature = spy(), make_batch(7, seed=1)
    options = StepOptions(accumulate=2)
    step = functools.partial(train_step, tx, objective, refresh="warm", options=options)
    new, metrics = jax.jit(step)(init_state(tx, params), batch, curvature)
    value, grads = jax.jit(lambda p: objective.value_and_grad(p, **batch))(params)
    seen = new.opt_state.seen
    tree_allclose((seen["grad"], seen["value"], metrics["loss"]), (grads, value, value), rtol=1e-6)
    expected = jax.jit(lambda p: objective(p, **curvature))(params)
    np.testing.assert_allclose(seen["curvature"], expected, rtol=1e-6)
    assert new.rest == ()
    assert metrics["finite"]


def test_vmap_over_runs_equals_single_runs(norm_dropout, batch):
    graphdef, params, rest = norm_dropout

    def run(learning_rate):
        tx = optax.with_extra_args_support(optax.sgd(learning_rate, momentum=0.9))
        state = init_state(tx, params, rest)
        for _ in range(2):
            state, _ = train_step(tx, networks.objective(graphdef), state, batch)
        return state.params, networks.evaluate(graphdef, state.params, state.rest, batch)

    rates = jnp.array([0.1, 0.5])
    together = jax.jit(jax.vmap(run))(rates)
    single = jax.jit(run)
    for i, rate in enumerate(rates):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            together,
            single(rate),
        )


def test_replicas_average_to_the_global_batch(mlp, norm_dropout, batch):
    parts = {"x": batch["x"].reshape(4, 3, 4), "y": batch["y"].reshape(4, 3)}
    tx = optax.with_extra_args_support(optax.sgd(0.1))

    def replicated(graphdef, state):
        step = jax.vmap(
            lambda part: train_step(
                tx, networks.objective(graphdef), state, part, axis_name="batch"
            ),
            axis_name="batch",
        )
        return jax.jit(step)(parts)

    graphdef, *variables = mlp
    state = init_state(tx, *variables)
    step = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch))
    expected, metrics = step(state)
    replicas, replica_metrics = replicated(graphdef, state)
    for i in range(4):
        np.testing.assert_allclose(replica_metrics["loss"][i], metrics["loss"], rtol=1e-6)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-7),
            replicas.params,
            expected.params,
        )

    # Running statistics: the mean over replicas of each replica's own batch statistics.
    graphdef, *variables = norm_dropout
    replicas, _ = replicated(graphdef, init_state(tx, *variables))
    var = 0.9 + 0.1 * parts["x"].var(1).mean(0)
    for i in range(4):
        np.testing.assert_allclose(
            replicas.rest["norm"]["mean"][i], 0.1 * batch["x"].mean(0), rtol=1e-5
        )
        np.testing.assert_allclose(replicas.rest["norm"]["var"][i], var, rtol=1e-5)


def test_workers_keep_states_of_their_own(mlp, batch):
    parts = {"x": batch["x"].reshape(4, 3, 4), "y": batch["y"].reshape(4, 3)}
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    graphdef, *variables = mlp
    state = init_state(tx, *variables)

    def one_worker(part):
        options = StepOptions(per_worker=True)
        return train_step(
            tx, networks.objective(graphdef), state, part, axis_name="w", options=options
        )

    together = jax.jit(jax.vmap(one_worker, axis_name="w"))
    workers, metrics = together(parts)
    step = jax.jit(lambda part: train_step(tx, networks.objective(graphdef), state, part))
    alone = [step(jax.tree.map(lambda a, i=i: a[i], parts)) for i in range(4)]
    for i, (expected, _) in enumerate(alone):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            workers.params,
            expected.params,
        )
    losses = [float(m["loss"]) for _, m in alone]
    np.testing.assert_allclose(metrics["loss"], np.full(4, np.mean(losses)), rtol=1e-6)
    assert metrics["finite"].all()
    # What is wrong at one worker, all workers learn of.
    wrong = parts | {"x": parts["x"].at[2, 1, 0].set(jnp.nan)}
    _, metrics = together(wrong)
    assert not metrics["finite"].any()


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_step_that_is_not_finite_is_told_and_can_be_skipped(norm_dropout, batch, wrong):
    graphdef, params, rest = norm_dropout
    x = batch["x"]
    tx = optax.with_extra_args_support(optax.adam(0.1))

    def make_step(skip):
        options = StepOptions(skip_non_finite=skip)
        return jax.jit(
            lambda s, x: train_step(
                tx, networks.objective(graphdef), s, batch | {"x": x}, options=options
            )
        )

    step, skipping = make_step(False), make_step(True)
    good, metrics = skipping(init_state(tx, params, rest), x)
    assert metrics["finite"]
    broken, metrics = step(good, x.at[0, 0].set(wrong))
    assert not metrics["finite"]
    assert not np.isfinite(broken.params["head"]["kernel"]).all()
    skipped, metrics = skipping(good, x.at[0, 0].set(wrong))
    assert not metrics["finite"]
    assert int(skipped.step) == 2
    tree_equal(skipped[1:], good[1:])
    # It goes on from there.
    assert skipping(skipped, x)[1]["finite"]


def test_moment_that_overflows_is_told(mlp, batch):
    graphdef, params, rest = mlp
    # Finite gradients of 1e30, whose squares are not: Adam would never move again.
    tx = optax.with_extra_args_support(optax.chain(optax.scale(1e30), optax.adam(0.1)))
    step = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch))
    state, metrics = step(init_state(tx, params, rest))
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert not metrics["finite"]


# -- micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "number", "unroll"),
    [(spy, 5, False), (lambda: oa.extrap_sgd(0.1, extrapolation_rate=0.05), 4, True)],
    ids=["spy", "extragradient"],
)
def test_micro_batches_make_the_step_of_the_batch(mlp, batch, build, number, unroll):
    """Of 12 examples, 5 parts have 3 each but the last; the method sees their mean, once."""
    graphdef, params, rest = mlp
    tx = build()
    curvature = make_batch(8, seed=1)

    def run(**options):
        state = init_state(tx, params, rest)
        step = jax.jit(
            lambda s: train_step(
                tx,
                networks.objective(graphdef),
                s,
                batch,
                curvature,
                refresh="warm",
                options=StepOptions(**options),
            )
        )
        return step(state)

    (state, metrics), expected = run(accumulate=number, unroll=unroll), run()
    assert int(state.step) == 1
    tree_allclose((state, metrics), expected, rtol=1e-6, atol=1e-8)


def test_micro_batches_in_double_precision(x64):
    graphdef, params, rest = networks.split(Mlp(nnx.Rngs(0)))
    params = optax.tree.cast(params, jnp.float64)
    batch = make_batch()
    batch["x"] = jnp.float64(batch["x"])
    tx = wrap(optax.adam(optax.cosine_decay_schedule(0.1, 5)), 0.1, clip=0.5)

    def run(number):
        state = init_state(tx, params, rest)
        step = jax.jit(
            lambda s: train_step(
                tx, networks.objective(graphdef), s, batch, options=StepOptions(accumulate=number)
            )[0]
        )
        return step(step(state))

    state = run(5)
    # One clip, one step of the schedule and of Adam's counter.
    tree_allclose(state, run(1), rtol=1e-12)
    assert int(optax.tree.get(state.opt_state[1][0], "count")) == 2


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_micro_batches_have_their_own_statistics_and_masks(norm_dropout, batch, unroll):
    graphdef, params, rest = norm_dropout
    x, tx = batch["x"], spy()
    options = StepOptions(accumulate=3, unroll=unroll)
    step = jax.jit(
        lambda s: train_step(tx, networks.objective(graphdef), s, batch, options=options)
    )
    state, metrics = step(init_state(tx, params, rest))
    mean, var = np.zeros(4), np.ones(4)
    for part in (x[0::3], x[1::3], x[2::3]):  # one after the other
        mean = 0.9 * mean + 0.1 * np.mean(part, 0)
        var = 0.9 * var + 0.1 * np.var(part, 0)
    np.testing.assert_allclose(state.rest["norm"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(state.rest["norm"]["var"], var, rtol=1e-5)
    # The streams of random numbers move on by one step, whatever the number of parts.
    before, after = rest["dropout"]["rngs"], state.rest["dropout"]["rngs"]
    assert int(after["count"]) == int(before["count"]) + 1
    assert after["key"] == before["key"]
    # What the method evaluates is the mean of the same parts with the same masks.
    seen = state.opt_state.seen
    np.testing.assert_allclose(seen["loss"], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("jit", 3),
        ("shard_map", 3),
        *(
            pytest.param(mode, number, marks=pytest.mark.slow)
            for mode, number in (("pmap", 3), ("fsdp", 3), ("fsdp", 2), ("shard_map", 2))
        ),
    ],
)
def test_micro_batches_in_parallel(mlp, mode, number):
    """On 4 devices, 6 examples each; divided by 3 evenly, and by 2."""
    graphdef, params, rest = mlp
    batch = make_batch(24)
    tx = oa.extrap_sgd(0.1, extrapolation_rate=0.05)
    options = StepOptions(accumulate=number, unroll=number == 2)

    def make_state():
        return init_state(tx, params, rest)

    step = functools.partial(train_step, tx, networks.objective(graphdef), options=options)
    runner = Parallel(mode, jax.devices()[:4], step, min_sharded_size=1)
    state, metrics = runner.step(runner.init(make_state), runner.put_batch(batch))
    expected = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch))(
        make_state()
    )
    tree_allclose((runner.get_state(state), metrics), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("jit", marks=pytest.mark.slow)])
def test_micro_batches_of_workers(norm_dropout, mode):
    graphdef, params, rest = norm_dropout
    batch = make_batch(24)
    tx = oa.extrap_sgd(0.1, extrapolation_rate=0.05)  # evaluates each worker's own loss
    objective = networks.objective(graphdef)

    options = StepOptions(accumulate=3, per_worker=True)
    step = functools.partial(train_step, tx, objective, options=options)
    runner = Parallel(mode, jax.devices()[:2], step, workers=2)
    state = runner.init(lambda: init_state(tx, params, rest))
    workers = runner.get_state(runner.step(state, runner.put_batch(batch))[0])
    half = jax.tree.map(lambda a: a[12:], batch)
    alone, _ = jax.jit(
        lambda s: train_step(tx, objective, s, half, options=StepOptions(accumulate=3))
    )(init_state(tx, params, rest))
    tree_allclose(jax.tree.map(lambda a: a[1], workers.params), alone.params, rtol=1e-5, atol=1e-7)


# -- moving averages -------------------------------------------------------------------------------


def test_moving_average_of_weights_and_statistics(norm_dropout, batch):
    graphdef, params, rest = norm_dropout
    tx = optax.with_extra_args_support(optax.sgd(0.5))
    options = StepOptions(ema=0.75)
    step = jax.jit(
        lambda s: train_step(tx, networks.objective(graphdef), s, batch, options=options)[0]
    )
    state, history = init_state(tx, params, rest, average=True), []
    for _ in range(3):
        state = step(state)
        history.append((state.params, state.rest["norm"]))
    weights = np.array([0.75**2, 0.75, 1.0]) / (0.75**2 + 0.75 + 1)
    expected = jax.tree.map(lambda *leaves: sum(map(operator.mul, weights, leaves)), *history)
    average, statistics = state.average
    tree_allclose((average, statistics["norm"]), expected, rtol=1e-5)
    shown = averaged(state)
    tree_equal((shown.params, shown.rest), state.average)
    assert averaged(state._replace(average=None)).params is state.params
    # Counters are the current ones.
    assert int(statistics["dropout"]["rngs"]["count"]) == 3


def test_schedule_free_is_evaluated_at_its_average(mlp, batch):
    """The mean of the points z; the parameters are elsewhere."""
    graphdef, params, rest = mlp
    tx = wrap(METHODS["schedule_free_sgd"].build(0.5, total_steps=3, num_classes=3), 0.5, clip=1e3)
    step = jax.jit(lambda s: train_step(tx, networks.objective(graphdef), s, batch)[0])
    state, points = init_state(tx, params, rest), []
    for _ in range(3):
        state = step(state)
        points.append(find_schedule_free(state.opt_state).z)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *points)
    tree_allclose(averaged(state).params, mean, rtol=1e-4, atol=1e-5)
    apart = optax.tree.norm(optax.tree.sub(state.params, mean))
    assert float(apart) > 1e-3 * float(optax.tree.norm(mean))
    both = state._replace(average=(params, rest))
    assert averaged(both).params is params  # an average that was asked for goes first


@pytest.mark.parametrize("loss_scale", [False, True])
def test_norms_are_those_of_gradient_and_update(mlp, batch, loss_scale):
    graphdef, params, rest = mlp
    objective = networks.objective(graphdef)
    grads = jax.jit(lambda p: objective.value_and_grad(p, rest=rest, **batch)[1])(params)
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    tx = oa.dynamic_loss_scale(tx) if loss_scale else tx
    step = jax.jit(functools.partial(train_step, tx, objective), static_argnames="options")
    state = init_state(tx, params, rest)
    between, metrics = step(state, batch, options=StepOptions(norms_every=2))
    assert np.isnan([metrics["gradient_norm"], metrics["update_norm"]]).all()
    _, due = step(between, batch, options=StepOptions(norms_every=2))
    assert float(due["update_norm"]) > 0
    _, metrics = step(state, batch, options=StepOptions(norms_every=1))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], 0.1 * norm, rtol=1e-5)
