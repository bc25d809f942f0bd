"""Momentum that changes over the run: Demon and the schedules that its paper compares it with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES

# Demon Adam in the paper's form takes steps about ten times Adam's at the same rate.
DEMON_ADAM_RATES = (0.00003, 0.0001, 0.0003, 0.001, 0.003)
_DEMON = Paper("Chen et al., 2022", "https://arxiv.org/abs/1910.04952")


def _decay_steps(context: Context) -> dict[str, Any]:
    return {"decay_steps": context.total_steps}


def _rival(name: str, summary: str, schedule: Callable[[int], optax.Schedule]) -> Method:
    """SGD with a momentum schedule, which is made from the number of steps."""
    return Method(
        name=name,
        family="momentum decay",
        summary=f"rival of Demon: {summary}",
        paper=_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_sgd_with_momentum,
        from_context=lambda context: {"momentum": schedule(context.total_steps)},
    )


def _sgd_with_momentum(
    learning_rate: Any, *, momentum: optax.Schedule
) -> optax.GradientTransformation:
    return oa.with_schedules(optax.sgd, momentum=momentum)(learning_rate)


MOMENTUM_DECAY = (
    Method(
        name="demon_sgd",
        family="momentum decay",
        summary="SGD with momentum decaying from 0.9 to 0",
        paper=_DEMON,
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=oa.demon_sgd,
        from_context=_decay_steps,
        time_targets={"update": 1.05},
    ),
    Method(
        name="demon_adam",
        family="momentum decay",
        summary="Adam with a decaying, summed first moment",
        paper=_DEMON,
        fidelity="faithful",
        base="adam",
        learning_rates=DEMON_ADAM_RATES,
        factory=functools.partial(oa.demon_adam, nu_bias_correction=True),
        from_context=_decay_steps,
        time_targets={"update": 1.05},
    ),
    Method(
        name="demon_adam_ema",
        family="momentum decay",
        summary="Adam with a decaying, averaged first moment",
        paper=_DEMON,
        fidelity="our reading",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=functools.partial(oa.demon_adam, form="ema"),
        from_context=_decay_steps,
    ),
    _rival(
        "cosine_momentum_sgd",
        "momentum 0.9 to 0 by a cosine",
        lambda steps: optax.cosine_decay_schedule(0.9, steps),
    ),
    _rival(
        "linear_momentum_sgd",
        "momentum 0.9 to 0 linearly",
        lambda steps: optax.linear_schedule(0.9, 0.0, steps),
    ),
    _rival(
        "exponential_momentum_sgd",
        "momentum 0.9 exp(-5 t / T)",
        lambda steps: optax.exponential_decay(0.9, steps, decay_rate=0.006737947),
    ),
    _rival(
        "onecycle_momentum_sgd",
        "momentum 0.95, 0.85, 0.95",
        lambda steps: oa.momentum_onecycle_schedule(steps, rise_fraction=0.5, cycle_fraction=1.0),
    ),
)
