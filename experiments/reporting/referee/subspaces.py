"""The study of the dominant Hessian subspace: when does leaving it out of the steps pay?

Costs are gradients of one batch: a Hessian product counts as two gradients of its own batch, here
of twice the size, and the products of the first estimate are included. All contestants make equally
many steps; so a claim about errors favors the methods with curvature, and a claim about costs, or
about errors at equal gradients, does not. The criteria were fixed before the first run.

References:
  Song, Ahn, Yun, `Does SGD really happen in tiny subspaces?
  <https://arxiv.org/abs/2405.16002>`_, ICLR 2025, abstract.

  Zakarin, Singh, `Sharp and flat directions <https://arxiv.org/abs/2505.11972>`_, 2025, abstract:
  SGD, Dom-SGD and Bulk-SGD as ends of one family.
"""

from __future__ import annotations

import dataclasses
import functools

import optax

from experiments.methods import METHODS, Method
from experiments.methods.optax_methods import ADAM_RATES
from experiments.reporting.referee.judging import AtMost, ByBootstrap, LowerError
from experiments.reporting.referee.sequential import SequentialTest
from experiments.reporting.referee.study import Claim, Contestant, Scale, Setting, Study

SGD, MOMENTUM, ADAM, MUON = "SGD", "SGD momentum", "Adam", "Muon"
BULK, DOM, HALF = "Bulk-SGD", "Dom-SGD", "interpolated SGD"
BULK_MOMENTUM, HALF_MOMENTUM = "Bulk-SGD momentum", "interpolated SGD momentum"
BULK_ADAM, HALF_ADAM = "Bulk-Adam", "interpolated Adam"


def _on(base: str, method: str) -> Method:
    """A method of the dominant subspace on another base optimizer, with its learning rates."""
    entry, factory = METHODS[method], {"plain_sgd": optax.sgd, "adam": optax.adam}[base]
    rates = ADAM_RATES if base == "adam" else entry.learning_rates
    return dataclasses.replace(
        entry,
        name=f"{method}_on_{base}",
        base=base,
        learning_rates=rates,
        factory=functools.partial(entry.factory, base=factory),
    )


_TRIALS = {
    SGD: METHODS["plain_sgd"],
    MOMENTUM: METHODS["sgd"],
    ADAM: METHODS["adam"],
    MUON: METHODS["muon"],
    BULK: _on("plain_sgd", "bulk_sgd"),
    DOM: _on("plain_sgd", "dom_sgd"),
    HALF: _on("plain_sgd", "interpolated_sgd"),
    BULK_MOMENTUM: METHODS["bulk_sgd"],
    HALF_MOMENTUM: METHODS["interpolated_sgd"],
    BULK_ADAM: _on("adam", "bulk_sgd"),
    HALF_ADAM: _on("adam", "interpolated_sgd"),
}
CONTESTANTS = tuple(Contestant(name=name, trials=(trial,)) for name, trial in _TRIALS.items())

_INTERVAL = "all of the 95 % bootstrap interval over seeds, in these settings"


def _lower(name: str, text: str, source: str, method: str, rival: str, slack: float) -> Claim:
    return Claim(
        name=name,
        text=text,
        source=source,
        criterion=f"test error of {rival}, less that of {method}, > {0 - slack:g} after equally "
        f"many steps: {_INTERVAL}",
        judge=ByBootstrap(LowerError(method=method, rival=rival, slack=slack), settings=False),
    )


def _lower_for_its_price(name: str, method: str, rival: str) -> Claim:
    return Claim(
        name=name,
        text=f"{method} has a lower error than {rival} at equal gradients",
        source="ours",
        criterion=f"test error of {rival}, less that of {method}, > 0 where both have taken as "
        f"many gradients as there are steps, products counted: {_INTERVAL}",
        judge=ByBootstrap(
            LowerError(method=method, rival=rival, equal_gradients=True), settings=False
        ),
    )


def _cheaper(name: str, method: str, rival: str) -> Claim:
    return Claim(
        name=name,
        text=f"{method} reaches the target with no more gradients than {rival}",
        source="ours",
        criterion="mean logarithm of the ratio of the gradients, products counted, over the "
        "settings, < 0: one-sided sequential test of level 0.05, sigma 0.3 for a seed",
        judge=AtMost(
            method=method, rival=rival, share=1.0, test=SequentialTest(sigma=0.3, planned=8)
        ),
    )


_SONG = "Song et al., 2025, abstract"
CLAIMS = (
    _lower("a", "Bulk-SGD is as effective as SGD", _SONG, BULK, SGD, 0.01),
    Claim(
        name="b",
        text="Dom-SGD does not train",
        source=f"{_SONG}, where it takes over from SGD; here from the first step",
        criterion=f"test error of Dom-SGD, less that of SGD, > 0.1: {_INTERVAL}",
        judge=ByBootstrap(LowerError(method=SGD, rival=DOM, slack=-0.1), settings=False),
    ),
    _lower("c", "leaving it out lowers the error of SGD", "ours", BULK, SGD, 0.0),
    _lower(
        "d", "leaving it out lowers the error with momentum", "ours", BULK_MOMENTUM, MOMENTUM, 0.0
    ),
    _lower("e", "halving it lowers the error of SGD", "ours", HALF, SGD, 0.0),
    _lower("f", "leaving it out lowers the error of Adam", "ours", BULK_ADAM, ADAM, 0.0),
    _cheaper("g", BULK, SGD),
    _cheaper("h", BULK_MOMENTUM, MOMENTUM),
    _cheaper("i", BULK_ADAM, ADAM),
    _lower(
        *("j", "Bulk-SGD with momentum has a lower error than Muon", "ours"),
        *(BULK_MOMENTUM, MUON, 0.0),
    ),
    _cheaper("k", BULK_MOMENTUM, MUON),
    _lower_for_its_price("l", BULK, SGD),
    _lower_for_its_price("m", BULK_MOMENTUM, MOMENTUM),
    _lower_for_its_price("n", BULK_ADAM, ADAM),
)


def _setting(name: str, task: str, model: str, epochs: int, target: float | None = None) -> Setting:
    return Setting(
        name=name, task=task, model=model, epochs=epochs, contestants=CONTESTANTS, target=target
    )


STUDY = Study(
    name="subspaces",
    summary="SGD and Adam without, with half of, and in the dominant Hessian subspace",
    free_rival=SGD,
    unit="gradients",
    scales={
        "small": Scale(
            settings=(
                _setting("mlp", "digits", "mlp", 12, 0.9),
                _setting("cnn", "digits", "cnn", 8, 0.8),
            ),
            tuning_seeds=1,
            seeds=6,
            most_seeds=10,
        ),
        "medium": Scale(
            settings=(
                _setting("digits", "digits", "mlp", 30),
                _setting("mnist", "mnist5k", "mlp", 10),
            ),
            tuning_seeds=2,
            seeds=5,
            most_seeds=10,
        ),
        "full": Scale(
            settings=(
                _setting("mnist", "mnist5k", "mlp", 40),
                _setting("cnn", "cifar10_5k", "cnn", 20),
                _setting("resnet20", "cifar10_5k", "resnet20", 20),
            ),
            tuning_seeds=2,
            seeds=5,
            most_seeds=10,
        ),
    },
    claims=CLAIMS,
    left_out="the switch of Song et al. from SGD to Dom-SGD or Bulk-SGD within a run "
    "(experiments.subspace_study shows it); a tuning at equal gradients, where errors are those of "
    "the trials that were tuned for whole runs",
)
