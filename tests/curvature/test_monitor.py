"""The monitor of the curvature: its numbers, and that it changes nothing."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_accel as oa
from optax_accel.curvature import (
    Preconditioner,
    SpectralDensity,
    adam_preconditioner,
    rmsprop_preconditioner,
    sgd_preconditioner,
)

RATE = 0.05
BATCH = {
    "x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32),
}
PARAMS = {
    "w": np.random.default_rng(2).normal(size=(3, 2)).astype(np.float32),
    "c": np.array([0.3, -0.2], np.float32),
}
OBJECTIVE = oa.Objective(
    lambda p, x: jnp.tanh(x @ p["w"] + p["c"][None]),
    lambda outputs, y: jnp.mean(jnp.sum((outputs - y) ** 2, axis=-1)),
)
SIZE = 8


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def step(tx, state, params, refresh=None, objective=OBJECTIVE, **batch):
    batch = batch or BATCH
    grads = objective.grad(params, **batch)
    updates, state = tx.update(grads, state, params, value_fn=objective, refresh=refresh, **batch)
    return optax.apply_updates(params, updates), state, grads, updates


def dense_hessian(params, **batch):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda p: OBJECTIVE(unravel(p), **(batch or BATCH)))(flat))


def test_records_are_those_of_the_dense_matrix(x64):
    params, batch = wide(PARAMS), wide(BATCH)
    tx = oa.monitor_curvature(
        optax.adam(RATE),
        3,
        every=2,
        preconditioner=adam_preconditioner(),
        inner_learning_rate=RATE,
        num_smallest=2,
        num_products=8,
        trace_probes=4,
        density_products=8,
        density_records=2,
    )
    run = jax.jit(functools.partial(step, tx))
    state = tx.init(params)
    for _ in range(2):
        params, state, *_ = run(state, params, **batch)
    before, (params, state, grads, updates) = params, run(state, params, **batch)
    record = state.record
    hessian = dense_hessian(before, **batch)
    eigenvalues, vectors = np.linalg.eigh(hessian)
    g, d = (np.asarray(ravel_pytree(tree)[0]) for tree in (grads, updates))
    assert int(record.recorded_step) == 2
    assert int(state.num_records) == 2
    np.testing.assert_allclose(record.leading_eigenvalues, eigenvalues[::-1][:3], rtol=1e-8)
    np.testing.assert_allclose(record.smallest_eigenvalues, eigenvalues[:2], rtol=1e-8)
    for residuals in (record.leading_residuals, record.smallest_residuals):
        np.testing.assert_allclose(residuals, 0, atol=1e-10)  # of the whole space
    assert record.sharpness == record.leading_eigenvalues[0]
    # The preconditioner of this step, by Cohen et al. 2022, equation 2.
    nu = np.asarray(ravel_pytree(state.inner_state[0].nu)[0])
    p = (1 - 0.9**3) * (np.sqrt(nu / (1 - 0.999**3)) + 1e-8)
    effective = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(p, p)))[::-1]
    np.testing.assert_allclose(record.effective_eigenvalues, effective[:3], rtol=1e-6)
    np.testing.assert_allclose(record.stability_threshold, 38 / RATE, rtol=1e-6)
    np.testing.assert_allclose(record.stability_ratio, effective[0] / (38 / RATE), rtol=1e-6)
    for name, v in (("update", d), ("gradient", g)):
        quotient = getattr(record, f"{name}_curvature")
        np.testing.assert_allclose(quotient, v @ hessian @ v / (v @ v), rtol=1e-10)
        share = np.linalg.norm(vectors[:, -3:].T @ v) / np.linalg.norm(v)
        np.testing.assert_allclose(getattr(record, f"{name}_alignment"), share, rtol=1e-6)
    np.testing.assert_allclose(record.predicted_decrease, -g @ d - d @ hessian @ d / 2, rtol=1e-10)
    actual = OBJECTIVE(before, **batch) - OBJECTIVE(params, **batch)
    np.testing.assert_allclose(record.actual_decrease, actual, rtol=1e-10)
    np.testing.assert_allclose(record.recorded_loss, OBJECTIVE(before, **batch), rtol=1e-12)
    # Both densities have all eight nodes, so that their mean value is a quadratic form.
    density = SpectralDensity(record.density_nodes, record.density_weights, 16, SIZE)
    np.testing.assert_allclose(record.density_nodes[1], eigenvalues, rtol=1e-6, atol=1e-8)
    assert abs(float(density.moment(0).value) - 1) < 1e-10
    # Four random signs: a bound of three standard deviations of Hutchinson's estimator.
    spread = np.sqrt(2 * (np.sum(hessian**2) - np.sum(np.diag(hessian) ** 2)) / 4)
    assert abs(float(record.hessian_trace) - np.trace(hessian)) < 3 * spread


def test_records_far_apart_follow_both_ends(x64):
    """The whole eigenbasis has turned from one record to the next, and the spectrum shrunk."""
    rng, size = np.random.default_rng(0), 60
    spectra = [np.linspace(-0.002, 0.5, size), np.linspace(-0.002, 0.03, size)]
    spectra[0][0], spectra[1][-2:] = -0.6, (0.12, 0.3)

    def loss(p, matrix):
        return p @ matrix @ p / 2

    tx = oa.monitor_curvature(optax.sgd(1e-3), 2, num_smallest=1)
    params, state = jnp.ones(size), tx.init(jnp.ones(size))
    run = jax.jit(functools.partial(tx.update, value_fn=loss, refresh=True))
    for spectrum in spectra:
        turned = np.linalg.qr(rng.normal(size=(size, size)))[0]
        matrix = turned * spectrum @ turned.T
        _, state = run(matrix @ params, state, params, matrix=matrix)
        record, want = state.record, np.sort(spectrum)
        np.testing.assert_allclose(record.leading_eigenvalues[0], want[-1], rtol=0.02)
        assert record.smallest_eigenvalues[0] < want[1]
        # There is an eigenvalue within the residual norm of each.
        for values, residuals in (
            (record.leading_eigenvalues, record.leading_residuals),
            (record.smallest_eigenvalues, record.smallest_residuals),
        ):
            distances = np.min(np.abs(np.asarray(values)[:, None] - want), axis=1)
            assert np.all(distances <= residuals + 1e-12)


def muon():
    return optax.contrib.muon(RATE)


def sam():
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    return optax.contrib.sam(optax.sgd(RATE), ascent, opaque_mode=True)


INNER = {
    "adam": lambda: optax.adam(RATE),
    "muon": muon,
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(RATE),
    "sam": sam,
    "gnp": lambda: oa.gnp(optax.sgd(RATE, momentum=0.9)),
    "kfac": lambda: oa.kfac(RATE, OBJECTIVE.bind(**BATCH), damping=0.1),
    "bulk_sgd": lambda: oa.bulk_sgd(RATE, 2),
    "partition": lambda: optax.partition(
        {"a": optax.adam(RATE), "b": optax.sgd(RATE)}, {"w": "a", "c": "b"}
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("adam", "partition") else [pytest.mark.slow])
        for name in INNER
    ],
)
def test_updates_and_states_are_those_without_the_monitor(name):
    inner = optax.with_extra_args_support(INNER[name]())
    monitored = oa.monitor_curvature(inner, every=2)

    def run(tx, refresh, params, state):
        grads, extra = OBJECTIVE.grad(params, **BATCH), {}
        if name == "sam":
            extra = {"grad_fn": lambda p, _: OBJECTIVE.grad(p, **BATCH)}
        if name != "sam" or tx is monitored:  # Optax's SAM refuses what it does not know
            extra |= {"value_fn": OBJECTIVE.bind(**BATCH), "refresh": refresh}
        updates, state = tx.update(grads, state, params, **extra)
        return updates, optax.apply_updates(params, updates), state

    compiled = jax.jit(run, static_argnums=(0, 1))
    plain, watched = (PARAMS, inner.init(PARAMS)), (PARAMS, monitored.init(PARAMS))
    for i in range(3):
        words = oa.Refresh(eigenspace="cold", factors=True, inverses=True) if i == 0 else False
        with_record = words._replace(monitor=True) if i == 0 else oa.Refresh(monitor=i == 2)
        expected, *plain = compiled(inner, words, *plain)
        updates, *watched = compiled(monitored, with_record, *watched)
        for a, b in zip(
            jax.tree.leaves((expected, plain[1])),
            jax.tree.leaves((updates, watched[1].inner_state)),
            strict=True,
        ):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)
    assert int(watched[1].num_records) == 2
    assert float(watched[1].record.sharpness) > 0


def test_in_the_graph_it_records_at_its_period():
    tx = oa.monitor_curvature(optax.sgd(RATE), every=2, start_step=1)
    run = jax.jit(functools.partial(step, tx))
    params, state, steps = PARAMS, tx.init(PARAMS), []
    for _ in range(5):
        params, state, *_ = run(state, params)
        steps.append(int(state.record.recorded_step))
    assert steps == [-1, 1, 1, 3, 3]


def test_steps_without_a_record_need_none_of_it():
    tx = oa.monitor_curvature(
        optax.adam(RATE),
        preconditioner=adam_preconditioner(),
        inner_learning_rate=RATE,
        num_smallest=1,
    )
    run = jax.jit(functools.partial(step, tx), static_argnames="refresh")
    params, state, *_ = run(tx.init(PARAMS), PARAMS, "cold")
    whole_params, whole, *_ = run(state, params, False)
    light = state.without_records()
    # Beyond the optimizer's own only three counters.
    assert len(jax.tree.leaves(light)) == len(jax.tree.leaves(state.inner_state)) + 3
    light_params, light, *_ = run(light, params, False)
    jax.tree.map(
        np.testing.assert_array_equal,
        (light_params, light.with_records_of(state)),
        (whole_params, whole),
    )
    with pytest.raises(
        ValueError, match=r"without_records\(\)`: use it in steps with `refresh=False"
    ):
        step(tx, light, params)


def test_as_last_element_it_sees_the_update():
    tx = optax.chain(optax.sgd(RATE), oa.monitor_curvature(every=1))
    around = oa.monitor_curvature(optax.sgd(RATE), every=1)
    states = [
        jax.jit(functools.partial(step, each, refresh="warm"))(each.init(PARAMS), PARAMS)[1]
        for each in (tx, around)
    ]
    last, whole = states[0][-1].record, states[1].record
    for name, expected in whole._asdict().items():
        if expected is not None:
            np.testing.assert_allclose(getattr(last, name), expected, rtol=1e-4, atol=1e-6)


def test_a_batch_that_is_not_finite_is_counted_and_not_recorded():
    tx = oa.monitor_curvature(optax.sgd(RATE), every=1, num_smallest=1)
    run = jax.jit(functools.partial(step, tx, refresh="warm"))
    params, state, *_ = run(tx.init(PARAMS), PARAMS)
    bad = BATCH | {"x": BATCH["x"] * np.nan}
    _, after, *_ = run(state, params, **bad)
    assert (int(after.num_records), int(after.num_skipped)) == (1, 1)
    for old, new in zip(*map(jax.tree.leaves, (state.record, after.record)), strict=True):
        np.testing.assert_array_equal(old, new)
    params, after, *_ = run(after, params)
    assert (int(after.num_records), int(after.num_skipped)) == (2, 1)


def noise_of(gradients):
    """The unbiased estimates from the gradients of parts, (parts, size), by their definition."""
    mean = gradients.mean(axis=0)
    noise = np.sum(gradients.var(axis=0, ddof=1)) / len(gradients)
    return mean @ mean - noise, noise


def test_the_noise_scale_is_that_of_the_parts():
    tx = oa.monitor_curvature(optax.sgd(RATE), noise_scale=True, batch_size=8)
    parts = OBJECTIVE.accumulated(4, unroll=True, **BATCH)
    state = tx.init(PARAMS)
    grads = parts.grad(PARAMS)
    update = jax.jit(functools.partial(tx.update, value_fn=parts, refresh="warm"))
    _, state = update(grads, state, PARAMS)
    # Every fourth example belongs to the same part.
    gradients = np.stack(
        [
            ravel_pytree(OBJECTIVE.grad(PARAMS, **{k: v[i::4] for k, v in BATCH.items()}))[0]
            for i in range(4)
        ]
    )
    expected = noise_of(gradients)
    np.testing.assert_allclose(state.record.noise_moments, expected, rtol=1e-4)
    ratio = expected[1] / expected[0] if expected[0] > 0 else np.inf
    np.testing.assert_allclose(state.record.noise_scale, 8 * ratio, rtol=1e-4)
    whole = OBJECTIVE.bind(**BATCH)
    with pytest.raises(ValueError, match="from the parts of a batch"):
        tx.update(grads, state, PARAMS, value_fn=whole, refresh="warm")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_replicas_record_what_one_device_does(mode):
    kwargs = {"every": 1, "noise_scale": True, "trace_probes": 1}
    tx = oa.monitor_curvature(optax.sgd(RATE), **kwargs)
    state = tx.init(PARAMS)
    mean = OBJECTIVE.averaged_over("data")

    def replica(state, x, y):
        return step(tx, state, PARAMS, "warm", mean, x=x, y=y)[1].record

    if mode == "pmap":
        halves = [BATCH[name].reshape(2, 4, -1) for name in ("x", "y")]
        both = jax.pmap(replica, "data", in_axes=(None, 0, 0))(state, *halves)
        spread = jax.tree.map(lambda leaf: leaf[1], both)
    else:
        mapped = jax.shard_map(
            replica,
            mesh=jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=(jax.P(), jax.P("data"), jax.P("data")),
            out_specs=jax.P(),
            check_vma=False,
        )
        spread = jax.jit(mapped)(state, BATCH["x"], BATCH["y"])

    # Two micro-batches of the same halves, which `accumulated` takes as every other example.
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    parts = OBJECTIVE.accumulated(2, unroll=True, **{k: v[order] for k, v in BATCH.items()})
    grads = parts.grad(PARAMS)
    _, alone = jax.jit(functools.partial(tx.update, value_fn=parts, refresh="warm"))(
        grads, state, PARAMS
    )
    for name, expected in alone.record._asdict().items():
        if expected is not None:
            np.testing.assert_allclose(
                getattr(spread, name), expected, rtol=2e-4, atol=1e-5, err_msg=name
            )


@pytest.mark.slow
def test_a_divided_batch_and_divided_parameters_change_no_record():
    """One program over a mesh, as for data-parallel and fully sharded training."""
    tx = oa.monitor_curvature(
        optax.adam(RATE), preconditioner=adam_preconditioner(), inner_learning_rate=RATE, every=1
    )
    record = jax.jit(
        lambda state, params, batch: step(tx, state, params, "cold", **batch)[1].record
    )
    rng = np.random.default_rng(3)
    shapes = {"params": {"w": (6, 4), "c": (4,)}, "batch": {"x": (8, 6), "y": (8, 4)}}
    params, batch = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes[part].items()}
        for part in ("params", "batch")
    )
    alone = record(tx.init(params), params, batch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    spread_params, spread_batch = (jax.device_put(tree, rows) for tree in (params, batch))
    state = jax.jit(tx.init)(spread_params)
    spread = record(state, spread_params, spread_batch)
    for name, expected in alone._asdict().items():
        if expected is not None:
            np.testing.assert_allclose(
                getattr(spread, name), expected, rtol=2e-3, atol=1e-5, err_msg=name
            )


def test_masks_and_narrow_parameters():
    tx = oa.monitor_curvature(optax.sgd(RATE), 2, mask={"w": False, "c": True}, every=1)
    run = jax.jit(functools.partial(step, tx, refresh="cold"))
    _, state, *_ = run(tx.init(PARAMS), PARAMS)
    part = dense_hessian(PARAMS)[:2, :2]  # `c` comes first
    np.testing.assert_allclose(
        state.record.leading_eigenvalues, np.linalg.eigvalsh(part)[::-1], rtol=1e-4
    )
    narrow = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    full = oa.monitor_curvature(optax.sgd(RATE), every=1)
    run = jax.jit(functools.partial(step, full, refresh="cold"))
    _, state, _, updates = run(full.init(narrow), narrow)
    assert state.record.sharpness.dtype == jnp.float32
    assert updates["w"].dtype == jnp.bfloat16
    expected = np.linalg.eigvalsh(dense_hessian(PARAMS))[-1]
    np.testing.assert_allclose(state.record.sharpness, expected, rtol=0.05)  # of three digits


def test_with_a_loss_scale_it_records_what_it_does_without_one():
    def in_float16(p):
        p, x = optax.tree.cast((p, BATCH["x"]), jnp.float16)
        error = jnp.tanh(x @ p["w"] + p["c"][None]) - jnp.asarray(BATCH["y"], jnp.float16)
        return jnp.mean(jnp.sum(error**2, axis=-1))

    def watched(inner):
        return oa.monitor_curvature(
            inner, every=1, preconditioner=adam_preconditioner(), inner_learning_rate=RATE
        )

    @jax.jit
    def scaled_step(state):
        scale = optax.tree.get(state, "loss_scale")
        grads = jax.grad(lambda p: scale.astype(jnp.float16) * in_float16(p))(PARAMS)
        return scaled.update(grads, state, PARAMS, value_fn=OBJECTIVE.bind(**BATCH))[1]

    # 2^16 is infinite in float16: the first step is left out, its record counted.
    scaled = watched(oa.dynamic_loss_scale(optax.adam(RATE), initial_scale=2.0**16))
    state = scaled_step(scaled.init(PARAMS))
    assert (int(state.num_records), int(state.num_skipped)) == (0, 1)
    assert int(state.record.recorded_step) == -1
    while not state.num_records:  # until the scale is low enough
        state = scaled_step(state)
    assert int(state.record.recorded_step) == int(state.num_skipped) < 8
    plain = watched(optax.adam(RATE))
    expected = jax.jit(functools.partial(step, plain))(plain.init(PARAMS), PARAMS)[1].record
    # Its gradients have three digits; the curvature is that of `value_fn`. Spaces of other random
    # starts leave other residuals.
    for name, number in expected._asdict().items():
        if number is not None and name != "recorded_step" and not name.endswith("residuals"):
            tight = name in ("recorded_loss", "sharpness", "leading_eigenvalues")
            np.testing.assert_allclose(
                getattr(state.record, name), number, rtol=1e-4 if tight else 2e-2, err_msg=name
            )


def test_the_learning_rate_comes_from_the_state_or_a_schedule():
    pre = sgd_preconditioner()
    injected = oa.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    tx = oa.monitor_curvature(injected, preconditioner=pre)
    _, state, *_ = step(tx, tx.init(PARAMS), PARAMS, refresh="warm")
    assert float(state.record.stability_threshold) == 8
    assert state.effective_start is None  # the same as the leading one
    schedule = optax.linear_schedule(1.0, 0.5, 1)
    tx = oa.monitor_curvature(optax.sgd(schedule), preconditioner=pre, inner_learning_rate=schedule)
    state = tx.init(PARAMS)
    for expected in (2.0, 4.0):
        _, state, *_ = step(tx, state, PARAMS, refresh="warm")
        assert float(state.record.stability_threshold) == expected


def test_wrong_settings_are_refused_at_once():
    for name, value in {"every": 0, "num_directions": 0, "trace_probes": -1}.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            oa.monitor_curvature(optax.sgd(RATE), **{name: value})
    with pytest.raises(ValueError, match=r"`num_directions` .* is 9, more than the 8 parameters"):
        oa.monitor_curvature(optax.sgd(RATE), 9).init(PARAMS)
    with pytest.raises(ValueError, match=r"`num_smallest` .* more than half of the 8 parameters"):
        oa.monitor_curvature(optax.sgd(RATE), num_smallest=5).init(PARAMS)
    with pytest.raises(ValueError, match="no ScaleByAdamState"):
        oa.monitor_curvature(
            optax.sgd(RATE), preconditioner=adam_preconditioner(), inner_learning_rate=RATE
        ).init(PARAMS)
    with pytest.raises(ValueError, match="needs the learning rate"):
        oa.monitor_curvature(optax.sgd(RATE), preconditioner=sgd_preconditioner()).init(PARAMS)
    with pytest.raises(TypeError, match="`preconditioner` must be"):
        oa.monitor_curvature(optax.sgd(RATE), preconditioner=optax.identity())
    with pytest.raises(ValueError, match=r"`num_products` .* fewer than the 3 eigenvalues"):
        oa.monitor_curvature(optax.sgd(RATE), 2, num_smallest=1, num_products=2).init(PARAMS)
    tx = oa.monitor_curvature(optax.sgd(RATE))
    with pytest.raises(ValueError, match="`value_fn` to take products"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    # In steps that are known to record nothing the loss is not needed.
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, refresh=False)


def test_wrong_preconditioners_and_rates_are_refused_at_once():
    def watched(inner, preconditioner, rate=RATE):
        return oa.monitor_curvature(inner, preconditioner=preconditioner, inner_learning_rate=rate)

    with pytest.raises(ValueError, match=r"learning rate .* must be one number"):
        watched(optax.sgd(RATE), sgd_preconditioner(), jnp.ones(2))
    for inner, words in {
        optax.adam(RATE): r"ScaleByAdamState. Use adam_preconditioner\(\)",
        optax.rmsprop(RATE): r"ScaleByRmsState. Use rmsprop_preconditioner\(\)",
        optax.lion(RATE): "ScaleByLionState. .* of your own",
        optax.contrib.muon(RATE): "MuonState",
        optax.sgd(RATE, 0.9): "made without momentum",
    }.items():
        with pytest.raises(ValueError, match=words):
            watched(inner, sgd_preconditioner()).init({"w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="rmsprop_preconditioner was made without momentum"):
        watched(optax.rmsprop(RATE, momentum=0.9), rmsprop_preconditioner()).init(PARAMS)
    part = optax.partition({"a": optax.sgd(RATE), "b": optax.sgd(RATE, 0.9)}, {"w": "a", "c": "b"})
    with pytest.raises(ValueError, match="state of a part of the parameters"):
        watched(part, sgd_preconditioner(0.9)).init(PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for diagonal, threshold, words in (
        (jnp.ones(7), 1.0, "`diagonal` of the .*like the parameters, a dict, got an array"),
        ({"w": ones["w"], "c": jnp.ones(3)}, 1.0, r"`diagonal`.*\(2,\), got \(3,\)"),
        (ones, None, "must return one number, got None"),
        (ones, jnp.ones(2), "must return one number"),
    ):
        own = Preconditioner(lambda s, p, d=diagonal: d, lambda rate, t=threshold: t)
        with pytest.raises(ValueError, match=words):
            watched(optax.sgd(RATE), own).init(PARAMS)
    two = {name: optax.inject_hyperparams(optax.sgd)(learning_rate=RATE) for name in "ab"}
    with pytest.raises(ValueError, match=r"2 learning rates .*'a'.* and .*'b'"):
        oa.monitor_curvature(
            optax.partition(two, {"w": "a", "c": "b"}), preconditioner=sgd_preconditioner()
        ).init(PARAMS)
    with pytest.raises(ValueError, match="no parameters to watch"):
        oa.monitor_curvature(optax.sgd(RATE)).init({})


def test_wrong_gradients_and_losses_without_one_are_refused():
    tx = oa.monitor_curvature(optax.sgd(RATE))
    params = jnp.ones(3)
    for grads in (jnp.ones(4), {"a": params}):
        with pytest.raises(ValueError, match="monitor_curvature, updates: "):
            tx.update(grads, tx.init(params), params, value_fn=jnp.sum, refresh=True)

    def loop(p):
        return jax.lax.while_loop(lambda s: s < 3, lambda s: s + jnp.sum(p**2), 0.0)

    def callback(p):
        shape = jax.ShapeDtypeStruct((), p.dtype)
        return jax.pure_callback(lambda v: np.float32(np.sum(v**2)), shape, p)

    for loss in (loop, callback):
        with pytest.raises(TypeError, match="monitor_curvature needs a loss with a gradient"):
            tx.update(params, tx.init(params), params, value_fn=loss, refresh=True)


def test_at_rate_zero_the_threshold_is_infinite():
    schedule = optax.linear_schedule(0.0, RATE, 10)
    for inner, given in (
        (optax.sgd(schedule), schedule),
        (optax.sgd(0.0), 0.0),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=schedule), None),
    ):
        tx = oa.monitor_curvature(
            inner, preconditioner=sgd_preconditioner(), inner_learning_rate=given
        )
        _, state, *_ = step(tx, tx.init(PARAMS), PARAMS, refresh=True)
        assert (int(state.num_records), int(state.num_skipped)) == (1, 0)
        assert state.record.stability_threshold == jnp.inf
        assert state.record.stability_ratio == 0


def test_around_micro_steps_it_records_where_an_update_is_applied():
    schedule = optax.piecewise_constant_schedule(0.2, {1: 0.5, 2: 0.5})
    tx = oa.monitor_curvature(
        optax.MultiSteps(optax.sgd(schedule), 3).gradient_transformation(),
        every=4,
        preconditioner=sgd_preconditioner(),
        inner_learning_rate=schedule,
    )
    run = jax.jit(functools.partial(step, tx))
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for _ in range(9):
        params, state, *_ = run(state, params)
        seen.append(int(state.record.recorded_step))
        if seen[-1] >= 0:
            assert state.record.update_curvature != 0
    # Due are 0, 4 and 8.
    assert seen == [-1, -1, 2, 2, 2, 5, 5, 5, 8]
    # The third update, of rate 0.05.
    np.testing.assert_allclose(state.record.stability_threshold, 40, rtol=1e-6)


def test_an_objective_without_second_derivatives_is_refused():
    @jax.custom_vjp
    def once(x):
        return jnp.sum(x**2)

    def backward(x, c):  # a kernel that has no derivative
        doubled = jax.pure_callback(lambda v: 2 * np.asarray(v), jax.typeof(x), x)
        return (c * doubled,)

    once.defvjp(lambda x: (once(x), x), backward)
    tx, params = oa.monitor_curvature(optax.sgd(RATE)), jnp.ones(3)
    with pytest.raises(TypeError, match=r"cannot be differentiated twice.*hvp_mode"):
        tx.update(params, tx.init(params), params, value_fn=once, refresh="warm")


def test_a_preconditioner_of_ones_own_is_used():
    twice = Preconditioner(
        lambda state, params: jax.tree.map(lambda p: jnp.full(p.shape, 2.0), params),
        lambda rate: 1 / rate,
    )
    tx = oa.monitor_curvature(optax.sgd(RATE), preconditioner=twice, inner_learning_rate=0.5)
    run = jax.jit(functools.partial(step, tx, refresh="cold"))
    record = run(tx.init(PARAMS), PARAMS)[1].record
    np.testing.assert_allclose(record.effective_sharpness, record.sharpness / 2, rtol=1e-4)
    np.testing.assert_allclose(record.stability_ratio, record.effective_sharpness / 2, rtol=1e-6)


def test_the_host_drives_it_beside_a_method_with_another_period():
    tx = oa.monitor_curvature(oa.bulk_sgd(RATE, 2), every=3)
    words = [oa.refresh_at(i, tx) for i in range(4)]
    assert words[0] == oa.Refresh(eigenspace="cold", monitor=True)
    assert words[1] == oa.Refresh()
    assert words[3] == oa.Refresh(monitor=True)
    alone = oa.monitor_curvature(optax.sgd(RATE), every=2)
    assert [oa.refresh_at(i, alone) for i in range(3)] == [True, False, True]
    assert [oa.RefreshSchedule(alone)(i, ()) for i in range(3)] == [True, False, True]
    described = oa.describe(alone, PARAMS)
    assert any("every 2" in line for line in described.refreshes)


def test_defaults_are_stated():
    defaults = inspect.signature(oa.monitor_curvature).parameters
    assert defaults["every"].default == 1000
    assert defaults["noise_scale"].default is False
