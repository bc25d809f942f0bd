"""Optax's own methods: the bases that others modify, adaptive rates, and recent optimizers."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.methods.method import Context, Method, Paper

# Every method is tuned on a grid of this many rates, in steps of about 3 (the multiples of Chen et
# al., 2022, section 4): an equal budget.
SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
# AdaGrad's steps shrink. AdaDelta scales its steps by itself: its paper has no learning rate, which
# is a rate of 1.
ADAGRAD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ADADELTA_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
# 10 to 50 times the rates of SGD with momentum, 1 to 10 times those of AdamW (README of the
# authors' code, facebookresearch/schedule_free, "Caveats").
SCHEDULE_FREE_SGD_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)
SCHEDULE_FREE_ADAMW_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# A third to a tenth of Adam's (Chen et al., 2023, section 5).
LION_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01)
# Factors of the rate that Prodigy finds by itself; 1 in all runs of its paper (section 5).
PRODIGY_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)

momentum_sgd = functools.partial(optax.sgd, momentum=0.9)


def _muon_matrices(params: Any) -> Any:
    """Muon's matrices: all but the embeddings and the last layer of a language model."""

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        first = int("stacked" in name)  # the axis of the layers
        if any(word in name for word in ("embedding", "positions", "head")):
            return None
        if leaf.ndim - first < 2:
            return None
        inputs = tuple(range(first, leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(of, params)


MUON = Method(
    name="muon",
    family="recent optimizers",
    summary="momentum orthogonalized layer by layer; Adam for what is not a matrix",
    paper=Paper("Jordan et al., 2024", "https://kellerjordan.github.io/posts/muon/"),
    fidelity="Optax",
    base="adam",
    learning_rates=ADAM_RATES,
    # Steps as long as Adam's (Liu et al., 2025, section 2.2), so that they share a rate.
    factory=functools.partial(
        optax.contrib.muon, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_matrices
    ),
)

BASES = (
    Method(
        name="sgd",
        family="base",
        summary="SGD with momentum 0.9",
        paper=Paper("Sutskever et al., 2013", "optax.sgd"),
        fidelity="Optax",
        learning_rates=SGD_RATES,
        factory=momentum_sgd,
    ),
    Method(
        name="plain_sgd",
        family="base",
        summary="SGD without momentum",
        paper=Paper("Robbins and Monro, 1951", "optax.sgd"),
        fidelity="Optax",
        learning_rates=SGD_RATES,
        factory=optax.sgd,
    ),
    Method(
        name="nesterov_sgd",
        family="base",
        summary="SGD with Nesterov momentum 0.9",
        paper=Paper("Nesterov, 1983", "optax.sgd"),
        fidelity="Optax",
        base="sgd",
        learning_rates=SGD_RATES,
        factory=functools.partial(momentum_sgd, nesterov=True),
    ),
    Method(
        name="adam",
        family="base",
        summary="Adam",
        paper=Paper("Kingma and Ba, 2015", "optax.adam"),
        fidelity="Optax",
        learning_rates=ADAM_RATES,
        factory=optax.adam,
    ),
)

ADAPTIVE_RATES = (
    Method(
        name="adagrad",
        family="adaptive rates",
        summary="AdaGrad",
        paper=Paper("Duchi et al., 2011", "optax.adagrad"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAGRAD_RATES,
        factory=optax.adagrad,
    ),
    Method(
        name="adadelta",
        family="adaptive rates",
        summary="AdaDelta",
        paper=Paper("Zeiler, 2012", "optax.adadelta"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADADELTA_RATES,
        factory=optax.adadelta,
    ),
    Method(
        name="rmsprop",
        family="adaptive rates",
        summary="RMSProp",
        paper=Paper("Tieleman and Hinton, 2012", "optax.rmsprop"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.rmsprop,
    ),
    Method(
        name="adamax",
        family="adaptive rates",
        summary="Adam with the largest gradient in place of the second moment",
        paper=Paper("Kingma and Ba, 2015", "optax.adamax"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.adamax,
    ),
    Method(
        name="nadam",
        family="adaptive rates",
        summary="Adam with Nesterov momentum",
        paper=Paper("Dozat, 2016", "optax.nadam"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.nadam,
    ),
    Method(
        name="amsgrad",
        family="adaptive rates",
        summary="Adam with the largest second moment so far",
        paper=Paper("Reddi et al., 2018", "optax.amsgrad"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.amsgrad,
    ),
    Method(
        name="adamw",
        family="adaptive rates",
        summary="Adam with decoupled weight decay 0.0001",
        paper=Paper("Loshchilov and Hutter, 2019", "optax.adamw"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.adamw,
    ),
    Method(
        name="lamb",
        family="adaptive rates",
        summary="Adam with a step length for each layer",
        paper=Paper("You et al., 2020", "optax.lamb"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.lamb,
    ),
)


def prodigy(
    learning_rate: Any = 1.0, betas: tuple[float, float] = (0.9, 0.999), **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """Prodigy, whose starting point in the state is a copy, so that both can be donated."""
    tx = optax.contrib.prodigy(learning_rate, betas, **settings)

    def init(params: Any) -> Any:
        return tx.init(jax.tree.map(jnp.copy, params))

    return optax.GradientTransformationExtraArgs(init, tx.update)


def ademamix(
    learning_rate: Any,
    total_steps: int,
    b1: float = 0.9,
    b3: float = 0.9999,
    alpha: float = 5.0,
    **settings: Any,
) -> optax.GradientTransformation:
    """AdEMAMix, whose second momentum comes in over the run (Pagliardini et al., 2024, section 3).

    Its weight rises linearly from 0, its decay from that of the first momentum, so that the
    half-life rises linearly.
    """
    shortest, longest = math.log(b1), math.log(b3)

    def decay(count: Any) -> Any:
        share = jnp.minimum(count / total_steps, 1.0)
        return jnp.exp(shortest * longest / ((1 - share) * longest + share * shortest))

    weight = optax.linear_schedule(0.0, alpha, total_steps)
    return optax.contrib.ademamix(learning_rate, b1, b3=decay, alpha=weight, **settings)


def _total_steps(context: Context) -> dict[str, Any]:
    return {"total_steps": context.total_steps}


def _warmup(context: Context) -> dict[str, Any]:
    """The warm-up that the README of schedule-free's code recommends; its length is ours."""
    return {"warmup_steps": max(1, context.total_steps // 20)}


RECENT = (
    MUON,
    Method(
        name="schedule_free_sgd",
        family="recent optimizers",
        summary="SGD at an average of its iterates, without a schedule; evaluated at the average",
        paper=Paper("Defazio et al., 2024", "https://arxiv.org/abs/2405.15682"),
        fidelity="Optax",
        base="plain_sgd",
        learning_rates=SCHEDULE_FREE_SGD_RATES,
        factory=optax.contrib.schedule_free_sgd,
        from_context=_warmup,
    ),
    Method(
        name="schedule_free_adamw",
        family="recent optimizers",
        summary="Adam at an average of its iterates, without a schedule; evaluated at the average",
        paper=Paper("Defazio et al., 2024", "https://arxiv.org/abs/2405.15682"),
        fidelity="Optax",
        base="adam",
        learning_rates=SCHEDULE_FREE_ADAMW_RATES,
        factory=optax.contrib.schedule_free_adamw,
        from_context=_warmup,
    ),
    Method(
        name="prodigy",
        family="recent optimizers",
        summary="Adam whose rate follows from the distance that it has come",
        paper=Paper("Mishchenko and Defazio, 2024", "https://arxiv.org/abs/2306.06101"),
        fidelity="Optax",
        base="adam",
        learning_rates=PRODIGY_RATES,
        factory=prodigy,
    ),
    Method(
        name="ademamix",
        family="recent optimizers",
        summary="Adam with a second, much slower momentum",
        paper=Paper("Pagliardini et al., 2024", "https://arxiv.org/abs/2409.03137"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=ademamix,
        from_context=_total_steps,
    ),
    Method(
        name="adopt",
        family="recent optimizers",
        summary="Adam that divides by the second moment of the gradients before this one",
        paper=Paper("Taniguchi et al., 2024", "https://arxiv.org/abs/2411.02853"),
        fidelity="Optax",
        base="adam",
        learning_rates=ADAM_RATES,
        factory=optax.contrib.adopt,
    ),
    Method(
        name="lion",
        family="recent optimizers",
        summary="the sign of a momentum",
        paper=Paper("Chen et al., 2023", "https://arxiv.org/abs/2302.06675"),
        fidelity="Optax",
        base="adam",
        learning_rates=LION_RATES,
        factory=optax.lion,
    ),
)
