"""Optax's own methods: the bases that others modify, and methods with adaptive rates."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from experiments.methods.method import Method, Paper

# Every method is tuned on a grid of this many rates, in steps of about 3 (the multiples of Chen et
# al., 2022, section 4): an equal budget.
SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
# AdaGrad's steps shrink. AdaDelta scales its steps by itself: its paper has no learning rate, which
# is a rate of 1.
ADAGRAD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ADADELTA_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)

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


# Not in the catalogue, whose methods are this project's and those that they modify.
MUON = Method(
    name="muon",
    family="Optax",
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
