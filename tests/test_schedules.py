"""Schedules against closed forms, at their corners, and for counts beyond what floats hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accel as oa

LAST = 2**31 - 1
# Between compiled forms: Optax interpolates by differences, which cancel.
RTOL = 1e-5

SCHEDULES: dict[str, Callable[[], optax.Schedule]] = {
    "triangular": lambda: oa.cyclical_schedule(0.1, 0.7, 7),
    "triangular2": lambda: oa.cyclical_schedule(0.1, 0.7, 7, mode="triangular2"),
    "exp_range": lambda: oa.cyclical_schedule(0.1, 0.7, 7, mode="exp_range", gamma=0.97),
    "momentum_linear": lambda: oa.momentum_onecycle_schedule(40),
    "momentum_cosine": lambda: oa.momentum_onecycle_schedule(40, interpolation="cosine"),
    "onecycle_linear": lambda: oa.onecycle(40, 0.7).learning_rate,
    "onecycle_cosine": lambda: oa.onecycle(40, 0.7, interpolation="cosine").learning_rate,
    "vtpc": lambda: oa.vtpc_schedule(0.1, 0.7, 8, 4, floor_value=0.01, cycle_factor=1.5),
    "snapshot": lambda: oa.snapshot_schedule(0.7, 50, 4),
}


def values(schedule: optax.Schedule, counts: Any) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(counts)))


# What all have in common -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_traceable(name: str) -> None:
    """One value, eagerly with Python and array counts, under jit, vmap and scan."""
    schedule, steps = SCHEDULES[name](), 60
    counts = jnp.arange(steps)
    together = values(schedule, counts)
    assert together.dtype == np.float32
    some = range(0, steps, 7)
    np.testing.assert_allclose([float(schedule(t)) for t in some], together[some], rtol=RTOL)
    jitted = jax.jit(schedule)
    np.testing.assert_allclose([jitted(t) for t in counts], together, rtol=RTOL)
    scanned = jax.lax.scan(lambda t, _: (t + 1, schedule(t)), jnp.int32(0), length=steps)[1]
    np.testing.assert_allclose(scanned, together, rtol=RTOL)
    assert len(set(together.tolist())) > 5


@pytest.mark.parametrize("name", SCHEDULES)
def test_inside_an_optimizer(name: str) -> None:
    schedule = SCHEDULES[name]()
    expected = -values(schedule, jnp.arange(9))
    optimizers = (
        optax.sgd(schedule),
        optax.inject_hyperparams(optax.sgd)(schedule),
        oa.with_schedules(optax.sgd, learning_rate=schedule)(),
    )

    def updates(tx: optax.GradientTransformation) -> jax.Array:
        def step(state: Any, _: None) -> Any:
            return tx.update(jnp.ones(()), state)[::-1]

        return jax.lax.scan(step, tx.init(jnp.zeros(())), length=9)[1]

    for seen in jax.jit(lambda: [updates(tx) for tx in optimizers])():
        np.testing.assert_allclose(seen, expected, rtol=RTOL)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SCHEDULES)
def test_double_precision_with_any_integer(name: str) -> None:
    schedule = SCHEDULES[name]()
    for dtype in (jnp.int32, jnp.int64, jnp.uint8):
        got = values(schedule, jnp.arange(50, dtype=dtype))
        assert got.dtype == np.float64
        some = range(0, 50, 6)
        np.testing.assert_allclose(got[some], [schedule(t) for t in some], rtol=1e-13)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize(
    "name",
    # Optax's own 1cycle multiplies booleans by floats.
    [name for name in SCHEDULES if not name.startswith("onecycle")],
)
def test_strict_dtypes(name: str) -> None:
    assert jax.jit(SCHEDULES[name]())(jnp.int32(3)).dtype == jnp.float32


def test_values_may_be_traced() -> None:
    """All replicas of a comparison train in one program, each with its own rate."""
    peaks = jnp.array([0.25, 0.5, 1.0])
    for make in (
        lambda peak: oa.cyclical_schedule(peak / 4, peak, 5),
        lambda peak: oa.cyclical_schedule(0.0, peak, 5, mode="exp_range", gamma=peak / (peak + 1)),
        lambda peak: oa.onecycle(40, peak).learning_rate,
        lambda peak: oa.vtpc_schedule(peak / 4, peak, 10, 3, floor_value=peak / 100),
        lambda peak: oa.snapshot_schedule(peak, 40, 3),
    ):
        together = jax.jit(jax.vmap(lambda peak, make=make: make(peak)(13)))(peaks)
        alone = [make(float(peak))(13) for peak in peaks]
        np.testing.assert_allclose(together, alone, rtol=RTOL)


# Cyclical --------------------------------------------------------------------------------------


def heights(t: np.ndarray, s: int, mode: str, gamma: float) -> np.ndarray:
    """Height above the base, as Smith (section 3) and the specification write it."""
    t = t.astype(np.longdouble)
    cycle = np.floor(1 + t / (2 * s))
    triangle = np.maximum(0, 1 - np.abs(t / s - 2 * cycle + 1))
    scale = {"triangular": 1, "triangular2": 1 / 2 ** (cycle - 1), "exp_range": gamma**t}[mode]
    return triangle * scale


def torch_heights(t: np.ndarray, s: int, mode: str, gamma: float) -> np.ndarray:
    """The same in the form of `torch.optim.lr_scheduler.CyclicLR`, both halves `s` long."""
    cycle = np.floor(1 + t / (2 * s))
    x = 1 + t / (2 * s) - cycle
    triangle = np.where(x <= 0.5, x / 0.5, (x - 1) / (0.5 - 1))
    scale = {"triangular": 1, "triangular2": 0.5 ** (cycle - 1), "exp_range": gamma**t}[mode]
    return triangle * scale


MODES = ("triangular", "triangular2", "exp_range")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("s", [1, 2, 7, 100])
def test_cyclical_closed_form(mode: Any, s: int) -> None:
    gamma = 0.9993 if mode == "exp_range" else None
    t = np.arange(12 * s)
    got = values(oa.cyclical_schedule(0.05, 0.7, s, mode=mode, gamma=gamma), t)
    for form in (heights, torch_heights):
        expected = 0.05 + (0.7 - 0.05) * form(t, s, mode, 0.9993)
        np.testing.assert_allclose(got, expected.astype(np.float64), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_cyclical_corners_are_exact(mode: Any) -> None:
    base, peak, s = np.float32(0.001), np.float32(0.37), 999
    gamma = 1.0 if mode == "exp_range" else None
    schedule = jax.jit(oa.cyclical_schedule(float(base), float(peak), s, mode=mode, gamma=gamma))
    assert [schedule(2 * s * i) for i in range(5)] == [base] * 5
    assert schedule(s) == peak
    if mode == "triangular2":
        assert schedule(3 * s) == (base + peak) / 2
    else:
        assert schedule(9 * s) == peak


def test_cyclical_of_momentum_is_upside_down() -> None:
    t = np.arange(40)
    rate = values(oa.cyclical_schedule(0.0, 1.0, 10), t)
    momentum = values(oa.cyclical_schedule(0.95, 0.85, 10), t)
    np.testing.assert_allclose(momentum, 0.95 - 0.1 * rate, rtol=1e-6)


@pytest.mark.parametrize("s", [3, 1000, 2**29 + 1])
def test_cyclical_for_huge_counts(s: int) -> None:
    """In single precision, where neighbouring counts beyond 2**24 are one float."""
    counts = [2**24 + i for i in range(7)] + [LAST - i for i in range(7)]
    schedule = jax.jit(oa.cyclical_schedule(0.0, 1.0, s))
    for count in counts:
        place = count % (2 * s)
        expected = min(place, 2 * s - place) / s
        np.testing.assert_allclose(schedule(jnp.int32(count)), expected, rtol=2e-7)


def test_triangular2_dies_out_quietly() -> None:
    schedule = jax.jit(oa.cyclical_schedule(0.25, 1.0, 1, mode="triangular2"))
    assert schedule(jnp.int32(LAST)) == 0.25
    assert schedule(jnp.int32(LAST - 1)) == 0.25


def test_exp_range_keeps_the_digits_of_gamma() -> None:
    """1 - 0.99994 has four digits in single precision: the power would be off by half a percent."""
    t = 100_001  # in the middle of a cycle
    schedule = oa.cyclical_schedule(0.0, 1.0, 1, mode="exp_range", gamma=0.99994)
    np.testing.assert_allclose(schedule(t), 0.99994**t, rtol=2e-6)
    assert abs(np.float32(0.99994) ** np.float32(t) / 0.99994**t - 1) > 1e-4


def test_counts_between_the_steps() -> None:
    schedule = oa.cyclical_schedule(0.0, 1.0, 4, mode="triangular2")
    np.testing.assert_allclose(
        [schedule(0.5), schedule(7.5), schedule(12.5)], [0.125, 0.125, 0.4375]
    )


# 1cycle ----------------------------------------------------------------------------------------


def anneal_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def anneal_linear(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction


def torch_onecycle(
    t: int, steps: int, peak: float, pct: float, three_phase: bool, anneal: Any
) -> tuple[float, float]:
    """Rate and momentum of `torch.optim.lr_scheduler.OneCycleLR` at step t of its defaults."""
    first, high, low = peak / 25, 0.95, 0.85
    last = first / 1e4
    ends = [pct * steps - 1, 2 * pct * steps - 2, steps - 1]
    phases = [(first, peak, high, low), (peak, first, low, high), (first, last, high, high)]
    if not three_phase:
        ends = [pct * steps - 1, steps - 1]
        phases = [(first, peak, high, low), (peak, last, low, high)]
    begin = 0.0
    for i, end in enumerate(ends):
        if t <= end or i == len(ends) - 1:
            fraction = (t - begin) / (end - begin)
            a, b, c, d = phases[i]
            return anneal(a, b, fraction), anneal(c, d, fraction)
        begin = end
    raise AssertionError


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("interpolation", ["linear", "cosine"])
def test_onecycle_as_torch(interpolation: Any) -> None:
    """Torch's corners lie at `pct * steps - 1`, the last one at `steps - 1`."""
    steps, peak = 101, 0.3
    linear = interpolation == "linear"
    cycle = oa.onecycle(
        steps - 1, peak, rise_fraction=0.4, cycle_fraction=0.8, interpolation=interpolation
    )
    expected = [
        torch_onecycle(
            t, steps, peak, 41 / steps, linear, anneal_linear if linear else anneal_cosine
        )
        for t in range(steps)
    ]
    t = np.arange(steps)
    np.testing.assert_allclose(values(cycle.learning_rate, t), [e[0] for e in expected], rtol=1e-9)
    np.testing.assert_allclose(values(cycle.momentum, t), [e[1] for e in expected], rtol=1e-14)


@pytest.mark.parametrize("interpolation", ["linear", "cosine"])
def test_onecycle_rates_of_the_default_shape(interpolation: Any) -> None:
    """Up to step 30; down, linearly in two parts that meet at the start value in step 85."""
    linear = interpolation == "linear"
    steps, rates = ([0, 30, 85, 100], [0.012, 0.3, 0.012, 1.2e-6])
    if not linear:
        steps, rates = [0, 30, 100], [0.012, 0.3, 1.2e-6]
    anneal = anneal_linear if linear else anneal_cosine
    expected = [
        anneal(a, b, (t - begin) / (end - begin))
        for begin, end, a, b in zip(steps, steps[1:], rates, rates[1:], strict=False)
        for t in range(begin, end)
    ]
    got = values(oa.onecycle(100, 0.3, interpolation=interpolation).learning_rate, np.arange(120))
    np.testing.assert_allclose(got[:100], expected, rtol=RTOL, atol=1e-7 * 0.3)
    np.testing.assert_allclose(got[100:], 1.2e-6, rtol=RTOL)


def test_momentum_moves_with_the_rate() -> None:
    """One falls where the other rises, between the same steps."""
    for interpolation, final in (("linear", 85), ("cosine", 100)):
        cycle = oa.onecycle(100, 0.3, interpolation=interpolation)
        t = np.arange(final + 1)
        rate, momentum = values(cycle.learning_rate, t), values(cycle.momentum, t)
        assert np.argmax(rate) == np.argmin(momentum) == 30
        assert np.all(np.diff(rate)[:30] > 0)
        assert np.all(np.diff(momentum)[:30] < 0)
        assert np.all(np.diff(rate)[30:] < 0)
        assert np.all(np.diff(momentum)[30:] > 0)


@pytest.mark.parametrize("interpolation", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000, LAST])
def test_onecycle_corners(interpolation: Any, steps: int) -> None:
    cycle = oa.onecycle(steps, 0.3, interpolation=interpolation)
    high, low = np.float32(0.95), np.float32(0.85)
    final = int(0.85 * steps) if interpolation == "linear" else steps
    corners = {0: high, int(0.3 * steps): low, final: high, steps: high, LAST: high}
    for count, expected in corners.items():
        assert jax.jit(cycle.momentum)(jnp.int32(count)) == expected
    # Optax multiplies factors: equal up to their rounding.
    rates = [cycle.learning_rate(jnp.int32(t)) for t in (0, int(0.3 * steps), steps)]
    np.testing.assert_allclose(rates, [0.3 / 25, 0.3, 0.3 / 25e4], rtol=1e-6)


def test_momentum_for_huge_counts() -> None:
    """The corner is at its step, not at another one that is the same float."""
    steps = 2**30 + 1
    schedule = oa.momentum_onecycle_schedule(steps, 0.5, 0.0, rise_fraction=1.0, cycle_fraction=1.0)
    assert schedule(jnp.int32(steps)) == 0.5
    assert schedule(jnp.int32(steps - 1)) < 1e-6


def test_momentum_that_rises_to_the_end() -> None:
    """Half down, half up: the rival of Demon in Chen et al. (2022), section 4."""
    schedule = oa.momentum_onecycle_schedule(10, rise_fraction=0.5, cycle_fraction=1.0)
    expected = [0.95, 0.93, 0.91, 0.89, 0.87, 0.85, 0.87, 0.89, 0.91, 0.93, 0.95, 0.95]
    np.testing.assert_allclose(values(schedule, np.arange(12)), expected, rtol=1e-6)


# VTPC ------------------------------------------------------------------------------------------


def trapezoids(t: float, base: float, peak: float, floor: float, steps: int, **shape: Any) -> float:
    """Our reading, cycle by cycle."""
    start, before, length = 0, base, steps
    for cycle in range(shape["cycles"]):
        end = floor if cycle % 2 else base
        rise = start + round(shape["rise"] * length)
        fall = start + round((shape["rise"] + shape["hold"]) * length)
        if t < start + length:
            top = peak * shape["decay"] ** cycle
            if t < rise:
                return before + (top - before) * (t - start) / (rise - start)
            if t <= fall:
                return top
            return top + (end - top) * (t - fall) / (start + length - fall)
        start, before = start + length, end
        length = round(steps * shape["mult"] ** (cycle + 1))
    return before


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mult", [1.0, 2, 1.3, 0.7])
@pytest.mark.parametrize(("rise", "hold"), [(0.25, 0.5), (0.0, 0.5), (0.5, 0.0), (0.3, 0.7)])
def test_vtpc_closed_form(mult: float, rise: float, hold: float) -> None:
    schedule = oa.vtpc_schedule(
        *(0.1, 0.7, 20, 5),
        floor_value=0.01,
        cycle_factor=mult,
        peak_decay=0.9,
        rise_fraction=rise,
        hold_fraction=hold,
    )
    total = sum(round(20 * mult**cycle) for cycle in range(5))
    t = np.arange(total + 10)
    shape = {"cycles": 5, "mult": mult, "decay": 0.9, "rise": rise, "hold": hold}
    expected = [trapezoids(i, 0.1, 0.7, 0.01, 20, **shape) for i in t]
    np.testing.assert_allclose(values(schedule, t), expected, rtol=1e-13)


def test_vtpc_corners_are_exact() -> None:
    """Odd cycles end at the base, even ones at the floor; peaks decay; then it stays."""
    schedule = jax.jit(
        oa.vtpc_schedule(0.1, 0.7, 2**20, 4, floor_value=0.003, cycle_factor=8, peak_decay=0.5)
    )
    ends = [2**20 * (8**c - 1) // 7 for c in range(5)]
    bounds = [np.float32(v) for v in (0.1, 0.1, 0.003, 0.1, 0.003)]
    assert [schedule(t) for t in ends] == bounds
    for cycle in range(4):
        peak = np.float32(0.7 * 0.5**cycle)
        for part in (0.25, 0.5, 0.75):
            assert schedule(ends[cycle] + int(part * 2**20 * 8**cycle)) == peak
    assert schedule(LAST) == bounds[-1]


# Snapshots -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("total", "snapshots"), [(12, 3), (100, 7), (5, 5), (9, 1)])
def test_snapshot_closed_form(total: int, snapshots: int) -> None:
    """Equation 2 of the paper counts steps from one."""
    cycle = math.ceil(total / snapshots)
    expected = [
        0.2 / 2 * (math.cos(math.pi * ((t - 1) % cycle) / cycle) + 1) for t in range(1, total + 1)
    ]
    schedule = oa.snapshot_schedule(0.2, total, snapshots)
    np.testing.assert_allclose(values(schedule, np.arange(total)), expected, rtol=1e-13)


def test_snapshot_starts_each_cycle_exactly() -> None:
    schedule = jax.jit(oa.snapshot_schedule(0.2, LAST, 2**31 // 1000))
    cycle = math.ceil(LAST / (2**31 // 1000))
    last = LAST // cycle * cycle
    assert [schedule(t) for t in (0, cycle, last)] == [np.float32(0.2)] * 3
    assert schedule(last - 1) < 1e-6


# Wrong arguments -------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: oa.cyclical_schedule(-0.1, 1, 5), r"`base_value` must lie in \[0, inf\)"),
    (lambda: oa.cyclical_schedule(0.1, "1", 5), "`peak_value` must be a number"),
    (lambda: oa.cyclical_schedule(0.1, 1, 0), "`step_size` must be at least 1"),
    (lambda: oa.cyclical_schedule(0.1, 1, 2.0), "`step_size` must be an integer"),
    (lambda: oa.cyclical_schedule(0.1, 1, 2**30), "must fit into a 32-bit step count"),
    (lambda: oa.cyclical_schedule(0.1, 1, 5, mode="cosine"), "`mode` must be one of 'triangular'"),
    (lambda: oa.cyclical_schedule(0.1, 1, 5, gamma=0.9), "`gamma` belongs to mode 'exp_range'"),
    (lambda: oa.cyclical_schedule(0.1, 1, 5, mode="exp_range"), "`gamma` belongs .* None"),
    (
        lambda: oa.cyclical_schedule(0.1, 1, 5, mode="exp_range", gamma=1.1),
        r"`gamma` must lie in \(0, 1\]",
    ),
    (lambda: oa.momentum_onecycle_schedule(0), "`transition_steps` must be at least 1"),
    (lambda: oa.momentum_onecycle_schedule(2**31), "must fit into a 32-bit step count"),
    (lambda: oa.momentum_onecycle_schedule(9, 1.0), r"`max_momentum` must lie in \[0, 1\)"),
    (
        lambda: oa.momentum_onecycle_schedule(9, 0.8, 0.9),
        "`min_momentum` must be at most `max_momentum`, got 0.9 and 0.8",
    ),
    (lambda: oa.momentum_onecycle_schedule(9, 0.9, -0.1), r"`min_momentum` must lie in \[0, 1\)"),
    (
        lambda: oa.momentum_onecycle_schedule(9, rise_fraction=2),
        r"`rise_fraction` must lie in \[0, 1\]",
    ),
    (
        lambda: oa.momentum_onecycle_schedule(9, rise_fraction=jnp.array(0.3)),
        "`rise_fraction` decides where corners lie",
    ),
    (
        lambda: oa.momentum_onecycle_schedule(9, rise_fraction=0.9),
        "`rise_fraction` must be at most `cycle_f",
    ),
    (lambda: oa.onecycle(9, 0.1, interpolation="cos"), "`interpolation` must be one of 'linear'"),
    (lambda: oa.onecycle(1, 0.1), r"must be different steps, got \[0, 0, 1\]"),
    (lambda: oa.onecycle(9, 0.1, cycle_fraction=1.0), r"must be different steps, got \[2, 9, 9\]"),
    (lambda: oa.onecycle(9, -0.1), r"`peak_value` must lie in \[0, inf\)"),
    (lambda: oa.onecycle(9, 0.1, initial_divisor=0), r"`initial_divisor` must lie in \(0, inf\)"),
    (lambda: oa.vtpc_schedule(0.1, 1, 0, 2), "`cycle_steps` must be at least 1"),
    (lambda: oa.vtpc_schedule(0.1, 1, 9, 0), "`num_cycles` must be at least 1"),
    (
        lambda: oa.vtpc_schedule(0.1, 1, 9, 2, cycle_factor=0),
        r"`cycle_factor` must lie in \(0, inf\)",
    ),
    (lambda: oa.vtpc_schedule(0.1, 1, 9, 99, cycle_factor=2), "the first 28 cycles must fit into"),
    (lambda: oa.vtpc_schedule(0.1, 1, 9, 2, peak_decay=1.5), r"`peak_decay` must lie in \(0, 1\]"),
    (lambda: oa.vtpc_schedule(0.1, 1, 9, 2, hold_fraction=0.8), "must be at most 1 together"),
    (lambda: oa.snapshot_schedule(0.1, 0, 1), "`total_steps` must be at least 1"),
    (lambda: oa.snapshot_schedule(0.1, 5, 6), "`num_snapshots` must be at most `total_steps`"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_corners_are_static_and_values_are_not() -> None:
    static = {
        name: oa.static_arguments(getattr(oa, name))
        for name in ("cyclical_schedule", "vtpc_schedule", "snapshot_schedule")
    }
    assert static == {
        "cyclical_schedule": ("step_size", "mode"),
        "vtpc_schedule": ("cycle_steps", "num_cycles"),
        "snapshot_schedule": ("total_steps", "num_snapshots"),
    }
