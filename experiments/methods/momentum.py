"""Momentum: Demon and its rivals, QHM, AggMo, YellowFin, Anderson acceleration."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES
from experiments.methods.schedules import DEMON_ADAM_RATES, entry

# QHM's mean is dampened, SGD's momentum is not. YellowFin multiplies a rate that it tunes itself.
QHM_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
YELLOWFIN_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_QUASI_HYPERBOLIC = Paper("Ma and Yarats, 2019", "https://arxiv.org/abs/1810.06801")
_DEMON = Paper("Chen et al., 2022", "https://arxiv.org/abs/1910.04952")


def _decay_steps(context: Context) -> dict[str, Any]:
    return {"decay_steps": context.total_steps}


def _rival(name: str, summary: str, **settings: Any) -> Method:
    """SGD with another momentum that changes over the run."""
    method = entry(name, f"rival of Demon: {summary}", "sgd", **settings)
    return dataclasses.replace(method, family="momentum decay", fidelity="faithful")


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
    _rival("cosine_momentum_sgd", "momentum 0.9 to 0 by a cosine", momentum="cosine"),
    _rival("linear_momentum_sgd", "momentum 0.9 to 0 linearly", momentum="linear"),
    _rival("exponential_momentum_sgd", "momentum 0.9 exp(-5 t / T)", momentum="exponential"),
    _rival("onecycle_momentum_sgd", "momentum 0.95, 0.85, 0.95", momentum="onecycle", peak=0.95),
)


def _anderson_sgd(
    learning_rate: Any, memory: int = 5, momentum: float = 0.9, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    sgd = optax.sgd(learning_rate, momentum)
    return oa.anderson_acceleration(sgd, memory, **settings)


OTHER_MOMENTUM = (
    Method(
        name="qhm",
        family="momentum",
        summary="SGD with a mean of the gradient and its running mean of decay 0.999",
        paper=_QUASI_HYPERBOLIC,
        fidelity="faithful",
        base="nesterov_sgd",  # which reads the gradient twice, too
        learning_rates=QHM_RATES,
        factory=oa.qhm,
        time_targets={"update": 1.05},
    ),
    Method(
        name="qh_adam",
        family="momentum",
        summary="Adam with a mean of the gradient and its first moment",
        paper=_QUASI_HYPERBOLIC,
        fidelity="faithful",
        base="nadam",
        learning_rates=ADAM_RATES,
        factory=oa.qh_adam,
        time_targets={"update": 1.05},
    ),
    Method(
        name="aggmo",
        family="momentum",
        summary="SGD with the mean of three momenta, 0, 0.9 and 0.99",
        paper=Paper("Lucas et al., 2019", "https://arxiv.org/abs/1804.00325"),
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=oa.aggmo,
    ),
    Method(
        name="yellowfin",
        family="momentum",
        summary="SGD that tunes its learning rate and its momentum; the rate is a factor",
        paper=Paper("Zhang and Mitliagkas, 2019", "https://arxiv.org/abs/1706.03471"),
        fidelity="faithful",
        base="sgd",
        learning_rates=YELLOWFIN_FACTORS,
        factory=oa.yellowfin,
        time_targets={"step": 1.3},
    ),
    Method(
        name="anderson_sgd",
        family="momentum",
        summary="SGD whose last five iterates are mixed every fifth step, if the loss falls",
        paper=Paper("Scieur et al., 2016", "https://arxiv.org/abs/1606.04133"),
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_anderson_sgd,
        period=5,
    ),
)
