"""The study of Demon: eleven schedules on SGD with momentum and on Adam, six claims of its paper.

Recent optimizers run beside them (`RIVALS`) and are part of no claim; the entries in `evidence/`
come from runs without them.

The settings are the paper's tables 3 and 4, mapped to what two cores can train with the budgets in
the same ratios; `full` has the paper's networks and budgets.

Criteria and sizes were fixed before the first run of each scale. Those of `small` come from a pilot
on six settings with the seeds 0 to 10, none of which is used again: it decided nothing with three
final seeds. The claims about ranks are judged once, when all settings have all final seeds. Only
claim (g) is looked at during the run; its test keeps its level whenever it stops.

Of the entries of `small` in `evidence/`, the first were written after 11 of up to 20 final seeds
for claim (g), with `most_seeds` set to 11 because the time was over; the second continue the same
runs to 20. The claims about ranks have all of their seeds in both.

References:
  Chen, Wolfe, Li, Kyrillidis, `Demon: improved neural network training with momentum decay
  <https://arxiv.org/abs/1910.04952>`_, ICASSP 2022 (version 4), sections 4 and 5, tables 1, 3, 4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.methods import METHODS
from experiments.methods.schedules import entry
from experiments.reporting.referee.judging import AtMost, ByBootstrap, View
from experiments.reporting.referee.sequential import SequentialTest
from experiments.reporting.referee.study import Claim, Contestant, Scale, Setting, Study

CONSTANT, DEMON, STEP, COSINE = "constant", "Demon", "LR step", "LR cosine"
YELLOWFIN = "YellowFin"
# Entries of the catalogue, by the optimizer in whose settings they run, with values of another
# setting that is tuned beside the rate: two, or all four where the others choose a weight decay.
RIVALS: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {
    "sgd": {"schedule_free_sgd": tuple({"b1": b1} for b1 in (0.9, 0.95, 0.98, 0.8))},
    "adam": {
        "schedule_free_adamw": tuple({"b1": b1} for b1 in (0.9, 0.95, 0.98, 0.8)),
        "muon": tuple({"beta": beta} for beta in (0.95, 0.9, 0.98, 0.8)),
        "prodigy": tuple({"betas": (b1, b2)} for b2 in (0.999, 0.99) for b1 in (0.9, 0.95)),
        "ademamix": tuple({"alpha": alpha} for alpha in (5.0, 8.0, 2.0, 1.0)),
        "adopt": tuple({"b2": b2} for b2 in (0.9999, 0.999, 0.99, 0.9)),
        "lion": tuple({"b1": b1, "b2": b2} for b2 in (0.99, 0.98) for b1 in (0.9, 0.95)),
        "yellowfin": tuple({"window": window} for window in (20, 10, 40, 5)),
    },
}
MOMENTA = ("OneCycle momentum", "cosine momentum", "linear momentum", "exp momentum")
_PEAKS = ({"peak": 0.9}, {"peak": 0.95})  # section 4 tunes the momentum
_PAIRS = ({"peak": 0.95, "trough": 0.85}, {"peak": 0.9, "trough": 0.85})
# What is tuned beside the rate, two values for each.
_KNOBS: dict[str, tuple[dict[str, Any], Sequence[dict[str, Any]]]] = {
    CONSTANT: ({}, _PEAKS),
    STEP: ({"rate": "step"}, ({"drops": (0.5, 0.75)}, {"drops": (0.33, 0.66)})),
    COSINE: ({"rate": "cosine"}, _PEAKS),
    "OneCycle": ({"rate": "onecycle", "momentum": "onecycle"}, _PAIRS),
    "LR linear": ({"rate": "linear"}, _PEAKS),
    "plateau": ({"rate": "plateau"}, ({"patience": 0.05}, {"patience": 0.1})),
    "LR exp": ({"rate": "exponential"}, _PEAKS),
    "OneCycle momentum": ({"momentum": "onecycle"}, _PAIRS),
    "cosine momentum": ({"momentum": "cosine"}, _PEAKS),
    "linear momentum": ({"momentum": "linear"}, _PEAKS),
    "exp momentum": ({"momentum": "exponential"}, _PEAKS),
    DEMON: ({"momentum": "demon"}, _PEAKS),
}


def contestants(optimizer: str, decays: Sequence[float] = (0.0,)) -> tuple[Contestant, ...]:
    """The eleven schedules, and the constant one and `RIVALS`, which are not ranked.

    Args:
      optimizer: ``"sgd"`` or ``"adam"``.
      decays: the weight decays to choose from.

    Returns:
      The contestants, each with 10 trials for each weight decay.
    """
    made = []
    for name, (fixed, knobs) in _KNOBS.items():
        choices = [(knob, decay) for knob in knobs for decay in decays]
        trials = tuple(
            entry(
                f"{name.lower().replace(' ', '_')}_{optimizer}_{number}",
                name,
                optimizer,
                **fixed,
                **knob,
                weight_decay=decay,
            )
            for number, (knob, decay) in enumerate(choices)
        )
        made.append(Contestant(name=name, trials=trials, ranked=name != CONSTANT))
    for name, values in RIVALS[optimizer].items():
        trials = tuple(
            dataclasses.replace(
                METHODS[name],
                name=f"{name}_{number}",
                factory=functools.partial(METHODS[name].factory, **value),
            )
            for number, value in enumerate(values[: 2 * len(decays)])
        )
        title = YELLOWFIN if name == "yellowfin" else name
        made.append(Contestant(name=title, trials=trials, ranked=False))
    return tuple(made)


class Row(NamedTuple):
    """A network, its data and its budgets.

    Attributes:
      name: what its settings are named after.
      task: the data set.
      model: name of the model.
      batch_size: examples per step.
      epochs: budgets, in passes over the training split.
      model_options: options of the model besides its defaults.
    """

    name: str
    task: str
    model: str
    batch_size: int
    epochs: tuple[int, ...]
    model_options: Mapping[str, Any] = MappingProxyType({})


def settings(
    rows: Sequence[Row],
    decays: Sequence[float] = (0.0,),
    adam_only: Sequence[str] = (),
) -> tuple[Setting, ...]:
    """One setting for each network, number of epochs and optimizer.

    Args:
      rows: the networks, with their data and budgets.
      decays: the weight decays to choose from.
      adam_only: names of rows that SGD does not train.

    Returns:
      The settings.
    """
    return tuple(
        Setting(
            name=f"{row.name}-{epochs}-{optimizer}",
            task=row.task,
            model=row.model,
            batch_size=row.batch_size,
            epochs=epochs,
            contestants=contestants(optimizer, decays),
            model_options=dict(row.model_options),
        )
        for row in rows
        for epochs in row.epochs
        for optimizer in ("sgd", "adam")
        if optimizer == "adam" or row.name not in adam_only
    )


# Claims -----------------------------------------------------------------------------------------


def most_first_places(view: View) -> np.ndarray:
    """(a) First places of Demon, in settings, above those of any other."""
    first = view.top(1)
    at = view.number(DEMON)
    return first[..., at] - np.delete(first, at, axis=-1).max(axis=-1)


def top_three_share(view: View) -> np.ndarray:
    """(b) Demon's share of top-three places above 1.3 times the best of the others'."""
    top, at = view.top(3) / len(view.results.settings), view.number(DEMON)
    return top[..., at] - 1.3 * np.delete(top, at, axis=-1).max(axis=-1)


def cosine_is_second(view: View) -> np.ndarray:
    """(c) One half less the distance of LR cosine from the second place in top-three places."""
    top = view.top(3)
    above = (top > top[..., [view.number(COSINE)]]).sum(axis=-1)
    return 0.5 - np.abs(above - 1)


def no_momentum_is_first(view: View) -> np.ndarray:
    """(d) Minus the first places, in settings, of the momentum schedules other than Demon."""
    first = view.top(1)
    return -first[..., [view.number(name) for name in MOMENTA]].sum(axis=-1)


def valley(errors: np.ndarray, rates: np.ndarray, points: int = 50) -> np.ndarray:
    """How wide the range of good rates is, in natural logarithms of the rate.

    The area between the errors, which are interpolated over the logarithm of the rate, and the line
    10 % above the lowest one, over the height of that line above the lowest one.

    >>> width = valley(np.array([0.2, 0.1, 0.1, 0.2]), np.exp([0.0, 1.0, 2.0, 3.0]))
    >>> round(float(width), 1)
    1.1

    Args:
      errors: (..., rates).
      rates: rates in rising order.
      points: number of points between two rates.

    Returns:
      The widths, (...).
    """
    logs = np.log(rates)
    dense = np.linspace(logs[0], logs[-1], points * (len(logs) - 1) + 1)
    weights = np.stack([np.interp(dense, logs, unit) for unit in np.eye(len(logs))], axis=-1)
    lowest = errors.min(axis=-1, keepdims=True)
    height = np.maximum(0.1 * lowest, 1e-12)
    below = np.clip(lowest + height - errors @ weights.T, 0, None)
    return (below / height).mean(axis=-1) * (logs[-1] - logs[0])


def less_sensitive(view: View) -> np.ndarray:
    """(e) Share of the settings in which Demon's range of good rates is the wider one, less 2/3."""
    wider = np.empty(view.settings.shape, bool)
    for setting in range(len(view.results.settings)):
        here = view.settings == setting
        widths = []
        for name in (DEMON, STEP):
            at = view.number(name)
            rates = view.results.rates[setting, at]
            grid = np.unique(rates)
            errors = view.tuned[here][:, at]
            best = [errors[..., rates == rate].min(axis=-1) for rate in grid]
            widths.append(valley(np.stack(best, axis=-1), grid))
        wider[here] = widths[0] > widths[1]
    return np.mean(wider, axis=-1) - 2 / 3


def yellowfin_is_late(view: View) -> np.ndarray:
    """(f) One, less the number of the paper's contestants behind YellowFin in the mean place."""
    recent = [name for rivals in RIVALS.values() for name in rivals]
    others = [name not in recent for name in view.results.contestants]
    at = sum(others[: view.number(YELLOWFIN)])
    places = view._replace(errors=view.errors[..., others]).positions(ranked=False)
    # In the settings where it takes part; a draw without any of them says nothing.
    there = ~np.isnan(places[..., [at]])
    number = there.sum(axis=-2)
    means = np.where(there, places, 0).sum(axis=-2) / np.maximum(number, 1)
    behind = (means > means[..., [at]]).sum(axis=-1)
    return np.where(number[..., 0] > 0, 1.0 - behind, np.nan)


_SOURCE = "Chen et al., 2022"
_INTERVAL = "all of the 95 % bootstrap interval over settings and seeds"
CLAIMS = (
    Claim(
        name="a",
        text="Demon has the most first places",
        source=f"{_SOURCE}, table 1",
        criterion=f"first places of Demon, less those of any other schedule, > 0: {_INTERVAL}",
        judge=ByBootstrap(most_first_places),
    ),
    Claim(
        name="b",
        text="Demon is in the top three far more often than any other schedule",
        source=f"{_SOURCE}, table 1: 85.7 % against 60.7 %",
        criterion=f"its share of top-three places, less 1.3 x the next one's, >= 0: {_INTERVAL}",
        judge=ByBootstrap(top_three_share, strict=False),
    ),
    Claim(
        name="c",
        text="LR cosine is second in top-three places",
        source=f"{_SOURCE}, table 1",
        criterion="1/2 less the distance of its place from the second, with exactly one schedule "
        f"above it, > 0: {_INTERVAL}",
        judge=ByBootstrap(cosine_is_second),
    ),
    Claim(
        name="d",
        text="momentum schedules other than Demon have no first place",
        source=f"{_SOURCE}, table 1",
        criterion=f"minus the number of their first places >= 0: {_INTERVAL}",
        judge=ByBootstrap(no_momentum_is_first, strict=False),
    ),
    Claim(
        name="e",
        text="Demon is less sensitive to the learning rate than LR step",
        source=f"{_SOURCE}, section 5",
        criterion="share of settings in which its range of rates within 10 % of the lowest "
        f"validation error, weighted by the depth, is the wider one, less 2/3, >= 0: {_INTERVAL}",
        judge=ByBootstrap(less_sensitive, strict=False, tuned=True),
    ),
    Claim(
        name="f",
        text="YellowFin is last or second last",
        source=f"{_SOURCE}, table 4",
        criterion="1 less the number of contestants with a mean place behind its own >= 0: "
        f"{_INTERVAL}",
        judge=ByBootstrap(yellowfin_is_late, strict=False),
    ),
    Claim(
        name="g",
        text="Demon reaches the target in no more steps than a constant momentum",
        source="ours",
        criterion="mean logarithm of the ratio of the steps, over the settings, < 0: one-sided "
        "sequential test of level 0.05, sigma 0.2 for a seed",
        judge=AtMost(
            method=DEMON, rival=CONSTANT, share=1.0, test=SequentialTest(sigma=0.2, planned=10)
        ),
    ),
)

# Epochs in the ratios of the paper's 75, 150, 300 (ResNet-20), 50, 100, 300 (WRN), 150, 300 (VGG).
_SMALL = (
    Row("mlp", "digits", "mlp", 64, (8, 16, 32)),
    Row("small_batch", "digits", "mlp", 16, (3, 6, 18)),
    Row("deep", "digits", "mlp", 64, (8, 16), {"hidden_sizes": [64, 64, 64]}),
)
_MEDIUM = (
    Row("mlp", "mnist5k", "mlp", 128, (8, 16, 32)),
    Row("cnn", "cifar10_5k", "cnn", 128, (5, 10, 30)),
)
# The paper's networks, budgets and data, but for STL-10, for which 5,000 images of CIFAR-10 stand
# in: as many as STL-10 has for training.
_FULL = (
    Row("resnet20", "cifar10", "resnet20", 128, (75, 150, 300)),
    Row("wrn", "cifar10_5k", "wrn_16_8", 64, (50, 100, 300)),
    Row("vgg16", "cifar100", "vgg16_cifar", 128, (150, 300)),
    Row("capsnet", "fashion_mnist", "capsnet", 128, (50, 100)),
)
STUDY = Study(
    name="demon",
    summary="eleven schedules on SGD with momentum and on Adam, as in the tables of Demon",
    free_rival=CONSTANT,
    unit="steps",
    scales={
        "small": Scale(
            settings=settings(_SMALL), tuning_seeds=3, seeds=10, most_seeds=20, first_seed=11
        ),
        "medium": Scale(settings=settings(_MEDIUM), tuning_seeds=3, seeds=5, most_seeds=12),
        "full": Scale(
            settings=settings(_FULL, (0.0, 5e-4), adam_only=("capsnet",)),
            tuning_seeds=3,
            seeds=3,
            most_seeds=12,
        ),
    },
    claims=CLAIMS,
    left_out="the LSTM on Penn Treebank, the VAE on MNIST (8 of the paper's 26 settings) and NCSN, "
    "which do not classify and have no error to rank by here; STL-10 (5,000 images of CIFAR-10 "
    "instead); augmentation; AggMo, QHM, QHAdam, AMSGrad and AdamW, which the paper does not rank; "
    "small and medium have smaller networks and data than the paper's",
)
