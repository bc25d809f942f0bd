"""The block tracker that chooses its periods: how it does, and what the host learns of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa
from optax_accel.curvature import blocks
from optax_accel.curvature.block_tracker import AdaptivePeriod
from optax_accel.curvature.tracking import block_product
from tests.helpers import tree_equal

TRACKER = oa.BlockTracker(refresh_every="adaptive")


def after(drift: float, *, period: int, floor: float) -> AdaptivePeriod:
    old = AdaptivePeriod(jnp.int32(period), jnp.float32(1), jnp.float32(floor), jnp.int32(3))
    return TRACKER._adapted(old, jnp.float32(drift))


@pytest.mark.parametrize(
    ("drift", "period", "floor", "want", "want_floor"),
    [
        (0.0125, 20, 0.005, 13, 0.005),  # 20 * 0.005 / 0.0075
        (0.1, 20, 0.005, 10, 0.005),  # not less than half
        (0.006, 20, 0.005, 40, 0.005),  # not more than twice
        (0.006, 40, 0.005, 50, 0.005),  # nor more than the longest
        (0.1, 8, 0.005, 5, 0.005),  # nor less than the shortest
        (0.002, 20, 0.004, 40, 0.003),  # a lower drift shows that the floor was too high
        (0.03, 5, 0.01, 5, 0.02),  # at the shortest period it may rise
    ],
)
def test_next_period_by_hand(
    drift: float, period: int, floor: float, want: int, want_floor: float
) -> None:
    new = after(drift, period=period, floor=floor)
    assert new.period == want
    np.testing.assert_allclose(new.drift_floor, want_floor, rtol=1e-6)
    assert new.drift == np.float32(drift)
    assert new.refreshes == 4


# The leading plane of a quadratic in five dimensions, which turns into the others.
SPECTRUM = np.array([4.0, 3.0, 0.1, 0.05, 0.0], np.float32)


@functools.partial(jax.jit, static_argnames=("tracker", "cold"))
def refresh(space: Any, angle: Any, tracker: oa.BlockTracker = TRACKER, cold: bool = False) -> Any:
    c, s = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.eye(5).at[1, 1].set(c).at[2, 2].set(c).at[1, 2].set(-s).at[2, 1].set(s)
    matrix = turn @ jnp.diag(SPECTRUM) @ turn.T
    objective = oa.Objective.from_value_fn(lambda p: 0.5 * p @ matrix @ p)
    return tracker.refresh(space, objective, jnp.ones(5), None, cold=cold)


def test_negative_curvature_of_a_larger_spectrum_is_forgotten() -> None:
    """A shift by its size would make every power step of the smaller spectrum nearly nothing."""
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(random.standard_normal((12, 12)))[0]
    spectrum = np.array([5.0, 4.0, *np.linspace(0.5, -0.5, 9), -1.0])
    later = jnp.asarray((rotation * spectrum) @ rotation.T, jnp.float32)

    @functools.partial(jax.jit, static_argnames=("tracker", "cold"))
    def refresh(space: Any, matrix: Any, tracker: oa.Tracker, cold: bool) -> Any:
        objective = oa.Objective.from_value_fn(lambda p: 0.5 * p @ matrix @ p)
        return tracker.refresh(space, objective, jnp.ones(12), None, cold=cold)

    earlier = jnp.diag(jnp.asarray([500.0, 400.0, *[1.0] * 9, -450.0], jnp.float32))
    trackers: tuple[tuple[oa.Tracker, int], ...] = (
        (oa.BlockTracker(), 1),
        (oa.RoundRobinTracker(), 2),
    )
    for tracker, refreshes_of_a_sweep in trackers:
        space = refresh(tracker.init(jnp.ones(12), 2), earlier, tracker, True)
        if isinstance(tracker, oa.RoundRobinTracker):  # a half of a sweep has been made
            space = refresh(space, earlier, tracker, False)
        for _ in range(12 * refreshes_of_a_sweep):
            space = refresh(space, later, tracker, False)
        # With a shift of 450 the factor of a sweep is 450.5 / 454 instead of 1.5 / 4 at most.
        cosines = np.asarray(space.basis) @ rotation[:, :2]
        assert np.sum(cosines**2) / 2 > 0.999, tracker
        np.testing.assert_allclose(space.eigenvalues, spectrum[:2], rtol=1e-2)


def followed(angles: Any) -> tuple[list[int], list[Any]]:
    """The steps of the refreshes, and the spaces after them."""
    space = refresh(TRACKER.init(jnp.ones(5), 2), angles[0], cold=True)
    steps, spaces = [0], [space]
    while (step := steps[-1] + int(TRACKER.next_period(space))) < len(angles):
        space = refresh(space, angles[step])
        steps.append(step)
        spaces.append(space)
    return steps, spaces


def test_drift_is_the_mean_squared_sine() -> None:
    _, (before, space, *_) = followed(0.02 * np.arange(6))
    cosines = np.asarray(blocks.inner(before.basis, space.basis))
    drift = space.memory.adaptive.drift
    np.testing.assert_allclose(drift, 1 - np.sum(cosines**2) / 2, atol=1e-6)
    # One direction of two turned by 0.1; a sweep leaves a thirtieth of that.
    np.testing.assert_allclose(drift, np.sin(0.1) ** 2 / 2, rtol=0.1)
    assert space.memory.adaptive.refreshes == 2


def test_a_faster_turn_is_met_by_shorter_periods() -> None:
    periods = {}
    for speed in (0.0, 0.004, 0.012):
        steps, _ = followed(speed * np.arange(400))
        periods[speed] = np.diff(steps)[3:].mean()
    assert periods[0.0] > 45
    assert 40 > periods[0.004] > 1.5 * periods[0.012] > 9, periods


def test_noise_that_no_period_follows_is_not_paid_for() -> None:
    """The plane jumps to and fro at every step, so that shorter periods would see as much."""
    jumps = 0.2 * np.random.default_rng(0).choice([-1.0, 1.0], 400)
    steps, spaces = followed(jumps)
    assert max(float(s.memory.adaptive.drift) for s in spaces) > 3 * 0.005
    assert len(steps) < 15


def test_a_refused_refresh_is_made_up_for_soon() -> None:
    _, spaces = followed(np.zeros(200))
    poisoned = refresh(spaces[-1], jnp.nan)
    assert not poisoned.accepted
    assert TRACKER.next_period(spaces[-1]) > TRACKER.next_period(poisoned) == 5
    tree_equal(poisoned.memory, spaces[-1].memory)


# -- in a loop -------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32) + 1
Y = np.tanh(X[:, :2] * X[:, 1:])
PARAMS = {"v": jnp.full((4, 2), 0.5), "w": jnp.asarray(np.linspace(-1, 1, 12).reshape(3, 4))}
OBJECTIVE = oa.Objective.from_value_fn(lambda p: jnp.mean((jnp.tanh(X @ p["w"]) @ p["v"] - Y) ** 2))
TX = oa.bulk_sgd(
    0.3,
    2,
    tracker=oa.BlockTracker(refresh_every="adaptive", max_refresh_every=12, oversampling=1),
    start_step=2,
)


@functools.partial(jax.jit, static_argnames="refresh", donate_argnums=(0, 1))
def train_step(params: Any, state: Any, refresh: Any) -> Any:
    updates, state = TX.update(
        OBJECTIVE.grad(params), state, params, value_fn=OBJECTIVE, refresh=refresh
    )
    return optax.apply_updates(params, updates), state


def test_the_host_knows_when() -> None:
    """Driven from the host it refreshes as in the graph, reading the state at refreshes only."""
    tree = jax.tree.map(jnp.copy, (PARAMS, TX.init(PARAMS)))
    decided = jax.tree.map(jnp.copy, tree)
    driven = tree
    schedule, forms, read = oa.RefreshSchedule(TX), [], []
    for step in range(45):
        before = schedule._next_refresh
        with jax.transfer_guard("disallow"):
            forms.append(schedule(step, driven[1]))
        if schedule._next_refresh != before:
            read.append(step)
        # One made in the middle, as after a checkpoint was restored, says the same.
        if step in (10, 27):
            assert oa.RefreshSchedule(TX)(step, driven[1]) == forms[-1]
        driven, decided = train_step(*driven, forms[-1]), train_step(*decided, None)
    refreshed = [step for step, form in enumerate(forms) if form]
    assert refreshed[:4] == [2, 7, 12, 22]
    assert forms[2] == "cold"
    assert {form for form in forms if form} == {"cold", "warm"}
    assert read == [step + 1 for step in refreshed if step < 44]
    space = optax.tree.get(driven[1], "space")
    assert optax.tree.get(driven[1], "refreshes") == len(refreshed)
    np.testing.assert_allclose(space.eigenvalues, optax.tree.get(decided[1], "eigenvalues"), 1e-3)
    for name in ("refreshes", "next_refresh", "period"):
        assert optax.tree.get(driven[1], name) == optax.tree.get(decided[1], name)


def test_what_the_schedule_needs() -> None:
    state = TX.init(PARAMS)
    with pytest.raises(ValueError, match=r"the step alone does not tell.*RefreshSchedule\(tx\)"):
        oa.refresh_at(3, TX)
    with pytest.raises(ValueError, match="found no `next_refresh` in `state`"):
        oa.RefreshSchedule(TX)(3, optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="`step` must be at least 0"):
        oa.RefreshSchedule(TX)(-1, state)
    with pytest.raises(TypeError, match=r"optimizer, got 3\. .*refresh_at\(step, refresh_every"):
        oa.RefreshSchedule(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 or 'adaptive', got 'adaptiv'"):
        oa.BlockTracker(refresh_every="adaptiv")  # type: ignore[arg-type]
    grown = oa.RefreshSchedule(TX, cold_start=False)
    assert [grown(step, state) for step in (1, 2, 11)] == [False, "warm", "warm"]


def test_without_a_tracker_that_adapts_it_is_refresh_at() -> None:
    tx = oa.bulk_sgd(0.1, 1, tracker=oa.BlockTracker(refresh_every=3))
    schedule = oa.RefreshSchedule(tx)
    assert [schedule(i, None) for i in range(7)] == [oa.refresh_at(i, tx) for i in range(7)]
    assert oa.RefreshSchedule(optax.adam(0.1))(0, None) is None


# -- products of a sweep ---------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("convolution", [False, True])
def test_products_are_looped_over_where_that_is_fast(
    convolution: bool, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loop on one CPU device, but never with a convolution in it; the same products."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x = jnp.sin(jnp.arange(24.0)).reshape(4, 6)

    def loss(w: jax.Array) -> jax.Array:
        out = jax.vmap(lambda row: jnp.convolve(row, w))(x) if convolution else x[:, :3] @ w
        return jnp.sum(jnp.tanh(out) ** 2)

    params = jnp.array([0.3, -0.2, 0.5])
    product = oa.Objective.from_value_fn(loss).hessian(params)
    products, block = block_product(product, params), jnp.eye(3) + 0.1
    looped = any(e.primitive.name == "scan" for e in jax.make_jaxpr(products)(block).eqns)
    assert looped == (devices == 1 and not convolution)
    want = jax.hessian(loss)(params) @ block.T
    np.testing.assert_allclose(jax.jit(products)(block), want.T, rtol=1e-4, atol=1e-5)
