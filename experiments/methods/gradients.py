"""Methods that step along another gradient than the batch's: sampled, extrapolated, penalized."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import optax

import optax_accel as oa
from experiments.methods.method import Context, Method, Paper
from experiments.methods.optax_methods import ADAM_RATES, SGD_RATES, momentum_sgd

LIN = Paper("Lin et al., 2020", "https://arxiv.org/abs/2006.05720")


def _gnp_sgd(learning_rate: Any, *, rho: float, alpha: float) -> optax.GradientTransformation:
    return oa.gnp(momentum_sgd(learning_rate), rho=rho, alpha=alpha)


def _forward_sgd(
    learning_rate: Any, *, num_samples: int = 1, directions: Any = "normal", key: Any = 0
) -> optax.GradientTransformation:
    return oa.forward_gradient(
        momentum_sgd(learning_rate), num_samples=num_samples, directions=directions, key=key
    )


def _sampled_sgd(
    learning_rate: Any,
    *,
    ratio: float = 0.5,
    method: Any = "top_k",
    where: Any = "forward",
    key: Any = 0,
) -> optax.GradientTransformation:
    return optax.chain(
        oa.sampled_product_gradients(ratio, key=key, method=method, where=where),
        momentum_sgd(learning_rate),
    )


def _seeded(context: Context) -> dict[str, Any]:
    """The seed of a method's own randomness, as its key."""
    return {"key": context.seed}


GRADIENT_SAMPLING = (
    Method(
        name="stoch_grad_adam",
        family="gradient sampling",
        summary="Adam on a random 80 % of the gradient entries",
        paper=Paper("Yun, 2023", "https://arxiv.org/abs/2310.17042"),
        fidelity="as public code",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=functools.partial(oa.stoch_grad_adam, rate=0.8),
        from_context=_seeded,
        time_targets={"update": 1.5},
    ),
)

EXTRAGRADIENT = (
    Method(
        name="extrap_sgd",
        family="extragradient",
        summary="Nesterov SGD on extrapolated gradients",
        paper=LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        factory=oa.extrap_sgd,
        gradients_per_step=2,
        time_targets={"step": 2.1},
    ),
    Method(
        name="extrap_sgd_past",
        family="extragradient",
        summary="the same, extrapolating with the past gradient",
        paper=LIN,
        fidelity="our reading",
        base="nesterov_sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(oa.extrap_sgd, direction="past"),
        time_targets={"step": 1.1},
    ),
    Method(
        name="extra_adam",
        family="extragradient",
        summary="two Adam half-steps that share their moments",
        paper=Paper("Gidel et al., 2019", "https://arxiv.org/abs/1802.10551"),
        fidelity="faithful",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=oa.extra_adam,
        gradients_per_step=2,
    ),
    Method(
        name="optimistic_sgd",
        family="extragradient",
        summary="optimistic gradient descent",
        paper=Paper("Mokhtari et al., 2020", "optax.optimistic_gradient_descent"),
        fidelity="Optax",
        base="plain_sgd",
        learning_rates=SGD_RATES,
        factory=optax.optimistic_gradient_descent,
    ),
)

# Not in the catalogue, whose methods are this project's, each once.
EXTRAP_NOISE = Method(
    name="extrap_sgd_noise",
    family="extragradient",
    summary="the same, extrapolating with noise of a tenth of the size of each filter",
    paper=LIN,
    fidelity="our reading",
    base="nesterov_sgd",
    learning_rates=SGD_RATES,
    factory=functools.partial(oa.extrap_sgd, direction="filter_gaussian", extrapolation_rate=0.1),
    from_context=_seeded,
)
EXTRAP_UNIFORM = dataclasses.replace(
    EXTRAP_NOISE,
    name="extrap_sgd_uniform",
    summary="the same with uniform noise in place of normal noise",
    factory=functools.partial(oa.extrap_sgd, direction="filter_uniform", extrapolation_rate=0.1),
)

SAMPLED_PRODUCTS = (
    Method(
        name="sampled_products_sgd",
        family="sampled products",
        summary="SGD on gradients of products of which the largest half of the terms is computed",
        paper=Paper("Adelman et al., 2021", "https://arxiv.org/abs/1805.08079"),
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=_sampled_sgd,
        from_context=_seeded,
    ),
)

FORWARD_GRADIENT = (
    Method(
        name="forward_gradient_sgd",
        family="forward gradient",
        summary="SGD on estimates of the gradient from forward-mode derivatives alone",
        paper=Paper("Ren et al., 2023", "https://arxiv.org/abs/2210.03310"),
        fidelity="faithful",
        base="sgd",
        # The noise of an estimate grows with the number of weights.
        learning_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01),
        factory=_forward_sgd,
        from_context=_seeded,
    ),
)

GRADIENT_NORM = (
    Method(
        name="gnp_sgd",
        family="gradient norm",
        summary="SGD on the loss and 0.08 times its gradient's norm",
        paper=Paper("Zhao et al., 2022", "https://arxiv.org/abs/2202.03599"),
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_gnp_sgd, rho=0.1, alpha=0.8),
        gradients_per_step=2,
    ),
    Method(
        name="sam_sgd",
        family="gradient norm",
        summary="SGD on the gradient at the worst point 0.05 away (gnp with alpha = 1)",
        paper=Paper("Foret et al., 2021", "https://arxiv.org/abs/2010.01412"),
        fidelity="faithful",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(_gnp_sgd, rho=0.05, alpha=1.0),
        gradients_per_step=2,
    ),
)
