"""What `train --monitor` watches, when, and which metrics come of it."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accel as oa
from experiments.methods import METHODS
from experiments.runs.metric_files import tagged
from experiments.training import monitoring
from experiments.training.options import Options, check
from experiments.training.plan import MONITOR_EVERY
from experiments.training.program import statistics
from experiments.training.step import init_state

PARAMS = {"w": jnp.array([1.0, 2.0, -1.0])}


def loss(params):
    return 0.5 * jnp.sum(jnp.array([4.0, 1.0, 0.5]) * params["w"] ** 2)


def test_metrics_are_there_in_the_steps_that_record():
    tx = monitoring.watch(optax.adam(0.1), "adam", 0.1, every=2)
    step = jax.jit(functools.partial(tx.update, value_fn=loss), static_argnames="refresh")
    state, rows = tx.init(PARAMS), []
    for refresh in ("warm", False):
        _, state = step(jax.grad(loss)(PARAMS), state, PARAMS, refresh=refresh)
        rows.append({name: float(value) for name, value in statistics(state).items()})
    recorded, other = rows
    assert recorded.keys() == other.keys()
    assert {"monitor/sharpness", "monitor/stability_ratio", "monitor/eigenvalue_1"} <= set(recorded)
    assert "monitor/noise_scale" not in recorded  # of a batch in one part
    assert recorded["monitor/stability_threshold"] == pytest.approx(380)
    assert all(math.isfinite(value) for value in recorded.values())
    assert math.isnan(other["monitor/sharpness"])
    assert other["monitor/skipped"] == 0
    # The rest is what it is without a monitor.
    plain = statistics(state.inner_state)
    assert {name for name in other if not name.startswith("monitor/")} == set(plain)
    assert tagged({"step": 1, "monitor/sharpness": 2.0}) == {"monitor/sharpness": 2.0}


def test_what_the_monitor_keeps_waits_outside_of_steps_without_a_record():
    tx = monitoring.watch(optax.sgd(0.1), "plain_sgd", 0.1, every=2)
    state = init_state(tx, PARAMS)
    assert monitoring.without_records(state, "warm") is state
    assert monitoring.without_records(state, None) is state
    light = monitoring.without_records(state, oa.Refresh(eigenspace="warm"))
    assert statistics(light.opt_state).keys() == {"monitor/skipped"}
    whole = monitoring.with_records(light, state)
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    assert whole.opt_state.record is state.opt_state.record
    plain = init_state(optax.sgd(0.1), PARAMS)
    assert monitoring.without_records(plain, False) is plain
    assert monitoring.with_records(plain, plain) is plain


@pytest.mark.parametrize("name", monitoring.PRECONDITIONERS)
def test_preconditioners_fit_the_methods_of_the_catalogue(name):
    tx = METHODS[name].build(0.1, total_steps=10, num_classes=2)
    monitoring.watch(tx, name, 0.1, every=5).init(PARAMS)  # looks for the state


def test_the_monitor_has_a_period_of_its_own():
    join = functools.partial(monitoring.joined_refresh, every=4)
    assert [join(None, step) for step in range(5)] == [True, False, False, False, True]
    assert join("warm", 4).eigenspace == "warm"
    assert join("warm", 4).monitor is True
    assert join(False, 1) == oa.Refresh()
    assert join("factors", 1) == oa.Refresh(factors=True)
    assert join("inverses", 4) == oa.Refresh(True, True, True, True, True)
    assert join("sample", 4) == "sample"


def test_its_period_is_that_of_the_library_and_its_options_are_checked():
    default = oa.monitor_curvature.__kwdefaults__["every"]
    assert default == MONITOR_EVERY
    with pytest.raises(ValueError, match="--monitor-every is the period of --monitor"):
        check(Options(monitor_every=5))
    with pytest.raises(ValueError, match="--monitor-every must be"):
        check(Options(monitor=True, monitor_every=0))
    with pytest.raises(ValueError, match="--monitor watches parameters that all devices share"):
        check(Options(monitor=True, method="post_local_sgd"))
