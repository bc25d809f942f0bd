"""Optimizers that work in other coordinates than the model's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES, momentum_sgd

_SALIMANS = Paper("Salimans and Kingma, 2016", "https://arxiv.org/abs/1602.07868")


def _reparametrized(
    learning_rate: Any,
    *,
    optimizer: Callable[..., optax.GradientTransformation],
    reparametrization: oa.Reparametrization,
) -> optax.GradientTransformation:
    return oa.reparametrize(optimizer(learning_rate), reparametrization)


REPARAMETRIZATION = (
    Method(
        name="weight_norm_sgd",
        family="reparametrization",
        summary="SGD in lengths and directions of each unit's weights",
        paper=_SALIMANS,
        fidelity="our reading",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(
            _reparametrized, optimizer=momentum_sgd, reparametrization=oa.weight_norm()
        ),
    ),
    Method(
        name="weight_norm_adam",
        family="reparametrization",
        summary="Adam in lengths and directions of each unit's weights",
        paper=_SALIMANS,
        fidelity="our reading",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=functools.partial(
            _reparametrized, optimizer=optax.adam, reparametrization=oa.weight_norm()
        ),
        time_targets={"update": 2.0},
    ),
    Method(
        name="powerprop_sgd",
        family="reparametrization",
        summary="SGD on signed square roots of the weights",
        paper=Paper("Schwarz et al., 2021", "https://arxiv.org/abs/2110.00296"),
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(
            _reparametrized, optimizer=momentum_sgd, reparametrization=oa.powerprop(2.0)
        ),
    ),
)
