"""Learning rates that change over the run: bounds that close in, and cycles."""

from __future__ import annotations

import functools
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES, momentum_sgd

# Cycles of the schedule of snapshot ensembles (Huang et al., 2017, section 4).
NUM_SNAPSHOTS = 5

_LUO = Paper("Luo et al., 2019", "https://arxiv.org/abs/1902.09843")
_SMITH = Paper("Smith, 2017", "https://arxiv.org/abs/1506.01186")
_TOPIN = Paper("Smith and Topin, 2017", "https://arxiv.org/abs/1708.07120")

CLOSING_BOUNDS = (
    Method(
        name="adabound",
        family="adaptive rates",
        summary="Adam whose rates are clipped into bounds that close in on SGD's 0.1",
        paper=_LUO,
        fidelity="faithful",
        base="amsgrad",
        learning_rates=ADAM_RATES,
        factory=oa.adabound,
        time_targets={"update": 1.1},
    ),
    Method(
        name="amsbound",
        family="adaptive rates",
        summary="AMSGrad whose rates are clipped into bounds that close in on SGD's 0.1",
        paper=_LUO,
        fidelity="faithful",
        base="amsgrad",
        learning_rates=ADAM_RATES,
        factory=functools.partial(oa.adabound, amsbound=True),
    ),
)


def _total_steps(context: Context) -> dict[str, Any]:
    return {"total_steps": context.total_steps}


def _scheduled(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum whose state tells the rate of the last step."""
    return oa.with_schedules(momentum_sgd, learning_rate=learning_rate)()


def _cyclical_sgd(
    learning_rate: Any, *, total_steps: int, mode: Any
) -> optax.GradientTransformation:
    """Four cycles between a quarter of the learning rate and the learning rate."""
    # Smith, 2017, sections 3.2 and 3.3; the decay to a tenth over the run is ours.
    gamma = 0.1 ** (1 / total_steps) if mode == "exp_range" else None
    half = max(1, total_steps // 8)
    return _scheduled(
        oa.cyclical_schedule(learning_rate / 4, learning_rate, half, mode=mode, gamma=gamma)
    )


def _onecycle_sgd(
    learning_rate: Any, *, total_steps: int, interpolation: Any
) -> optax.GradientTransformation:
    steps = max(4, total_steps)  # with fewer steps the corners coincide
    cycle = oa.onecycle(steps, learning_rate, interpolation=interpolation)
    return oa.with_schedules(optax.sgd, **cycle._asdict())()


def _vtpc_sgd(learning_rate: Any, *, total_steps: int) -> optax.GradientTransformation:
    cycle = max(1, total_steps // 4)
    return _scheduled(
        oa.vtpc_schedule(
            learning_rate / 4, learning_rate, cycle, 4, floor_value=learning_rate / 100
        )
    )


def _snapshot_sgd(learning_rate: Any, *, total_steps: int) -> optax.GradientTransformation:
    cycles = min(total_steps, NUM_SNAPSHOTS)
    return _scheduled(oa.snapshot_schedule(learning_rate, total_steps, cycles))


CYCLICAL_SCHEDULES = (
    Method(
        name="cyclical_sgd",
        family="cyclical schedules",
        summary="SGD, the rate up and down in four cycles",
        paper=_SMITH,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_cyclical_sgd, mode="triangular"),
        from_context=_total_steps,
    ),
    Method(
        name="cyclical2_sgd",
        family="cyclical schedules",
        summary="the same, each cycle half as high as the one before",
        paper=_SMITH,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_cyclical_sgd, mode="triangular2"),
        from_context=_total_steps,
    ),
    Method(
        name="exp_range_sgd",
        family="cyclical schedules",
        summary="the same, the height decaying exponentially",
        paper=_SMITH,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_cyclical_sgd, mode="exp_range"),
        from_context=_total_steps,
    ),
    Method(
        name="onecycle_sgd",
        family="cyclical schedules",
        summary="SGD, one cycle of the rate and the opposite one of the momentum",
        paper=_TOPIN,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_onecycle_sgd, interpolation="linear"),
        from_context=_total_steps,
    ),
    Method(
        name="onecycle_cosine_sgd",
        family="cyclical schedules",
        summary="the same, with cosines",
        paper=_TOPIN,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_onecycle_sgd, interpolation="cosine"),
        from_context=_total_steps,
    ),
    Method(
        name="vtpc_sgd",
        family="cyclical schedules",
        summary="SGD, variable trapezoidal parity cycles of the rate",
        paper=Paper("Lin et al., 2022", "https://doi.org/10.1145/3518781.3519183"),
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_vtpc_sgd,
        from_context=_total_steps,
    ),
    Method(
        name="snapshot_sgd",
        family="cyclical schedules",
        summary="SGD, five cosine cycles of the rate: a snapshot ensemble's members",
        paper=Paper("Huang et al., 2017", "https://arxiv.org/abs/1704.00109"),
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_snapshot_sgd,
        from_context=_total_steps,
    ),
)
