"""The study of the edge of stability: curvature where full-batch training is just unstable.

Gradient descent, heavy ball, Adam, RMSprop, Muon and Bulk-SGD train small networks on the whole of
a small training set. Along each run the largest eigenvalue of the Hessian is read, and that of the
Hessian preconditioned as the optimizer does, relative to the value above which a quadratic makes
the optimizer diverge. From a run's first reading above this threshold on, or its last quarter where
it never gets there, it counts as at the edge. Time averages of gradient descent, RMSprop and Adam
are held against their central flows. The claims are those of the papers, at this project's size;
the criteria were fixed before the first run. The learning rates were chosen in trials on another
seed, so that runs get to the edge; that of the heavy ball follows from the sharpness of the first
weights.

References:
  Cohen, Kaur, Li, Kolter, Talwalkar, `Gradient descent on neural networks typically occurs at the
  edge of stability <https://arxiv.org/abs/2103.00065>`_, ICLR 2021; Cohen et al., `Adaptive
  gradient methods at the edge of stability <https://arxiv.org/abs/2207.14484>`_, 2022; Cohen,
  Damian, Talwalkar, Kolter, Lee, `Understanding optimization in deep learning with central flows
  <https://arxiv.org/abs/2410.24206>`_, ICLR 2025; Song, Ahn, Yun, `Does SGD really happen in tiny
  subspaces? <https://arxiv.org/abs/2405.16002>`_, ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.reporting.referee.judging import InEverySeed, LowerError, Margin, Within
from experiments.reporting.referee.protocols import (
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

GD, BALL, ADAM = "Gradient descent", "Heavy ball", "Adam"
RMSPROP, MUON, BULK = "RMSprop", "Muon", "Bulk-SGD"
# Moments of so short runs forget in a hundred steps; the papers' decays of 0.999 and 0.99 need
# longer ones. The first moment's decay is the papers', as is the momentum.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    GD: {"optimizer": "sgd", "flow": True},
    BALL: {"optimizer": "momentum", "momentum": 0.9},
    ADAM: {"optimizer": "adam", "b1": 0.9, "b2": 0.99, "flow": True},
    RMSPROP: {"optimizer": "rmsprop", "decay": 0.99, "flow": True},
    MUON: {"optimizer": "muon"},
    BULK: {"optimizer": "bulk_sgd"},
}


def setting(
    name: str, task: str, model: str, rates: Mapping[str, float], *, flow: bool, **changes: Any
) -> Setting:
    """One network on a part of one training set.

    Args:
      name: of the setting.
      task: name of the task.
      model: name of the model.
      rates: the learning rate of each contestant.
      flow: whether the optimizers that have flows are held against them; they are slow for
        convolutions.
      **changes: ``examples``, ``steps`` and other options of the setting, see the runner.

    Returns:
      The setting.
    """
    options = {
        "task": task,
        "model": model,
        "model_options": {},
        "loss": "mse",
        "examples": 200,
        "steps": 600,
        "every": 5,  # odd: oscillations of period two are read on both sides
        "directions": 10,
        "unstable": 4,
        **changes,
    }
    contestants = tuple(
        Contestant(
            name=who,
            options={key: value for key, value in OPTIONS[who].items() if flow or key != "flow"},
            learning_rates=(rate,),
        )
        for who, rate in rates.items()
    )
    return Setting(
        name=name,
        options=options,
        budget=f"{options['steps']} steps on all of {options['examples']} examples, loss "
        f"{options['loss']}",
        contestants=contestants,
        files=task != "digits",
    )


_2021, _2022, _2025 = "Cohen et al., 2021", "Cohen et al., 2022", "Cohen et al., 2025"


def claims(name: str, *, flow: bool) -> tuple[Claim, ...]:
    """The claims about one setting.

    Args:
      name: of the setting.
      flow: whether they are also about the central flows.

    Returns:
      The claims, each with a name that starts with a letter.
    """

    def claim(
        letter: str, text: str, source: str, criterion: str, measure: str, margin: Margin
    ) -> Claim:
        return Claim(
            name=f"{letter}, {name}",
            text=text,
            source=source,
            criterion=f"{criterion}: in every seed",
            judge=InEverySeed(margin),
            measure=measure,
        )

    def within(who: str, **bounds: float) -> Within:
        return Within(method=who, among=(name,), **bounds)

    def hovers(letter: str, who: str, threshold: str, source: str) -> Claim:
        return claim(
            letter,
            f"{who}: the (preconditioned) sharpness hovers at {threshold}",
            source,
            f"median over the second half of the time at the edge, over {threshold}, in "
            "[0.9, 1.15]",
            "hover",
            within(who, low=0.9, high=1.15),
        )

    found = [
        claim(
            "a",
            "gradient descent sharpens progressively, up to 2 / learning rate",
            f"{_2021}, section 3.1",
            "sharpness at the first step over 2 / learning rate, in a run that later reaches 1, "
            "below 0.75",
            "start",
            within(GD, high=0.75),
        ),
        hovers("b", GD, "2 / learning rate", f"{_2021}, section 3.2"),
        claim(
            "c",
            "at the edge its loss is not monotone over short spans",
            f"{_2021}, section 3.3",
            "share of the steps at the edge that raise the loss at least 0.1",
            "short",
            within(GD, low=0.1),
        ),
        claim(
            "d",
            "but falls over long ones",
            f"{_2021}, section 3.3",
            "mean loss in the last tenth of the time at the edge over that in the first below 1",
            "long",
            within(GD, high=1.0),
        ),
        hovers("e", BALL, "2 (1 + momentum) / learning rate", f"{_2021}, section 4, appendix B"),
        hovers("f", ADAM, "(2 + 2 b1) / ((1 - b1) learning rate)", f"{_2022}, section 3"),
        hovers("g", RMSPROP, "2 / learning rate", f"{_2022}, appendix"),
        claim(
            "h",
            "at Adam's edge the sharpness itself may go on rising",
            f"{_2022}, section 4",
            "mean sharpness in the last tenth of the time at the edge over that in the first "
            "above 1.1",
            "growth",
            within(ADAM, low=1.1),
        ),
        claim(
            "i",
            "without the dominant directions training goes on as well",
            "Song et al., 2025, section 3",
            f"log10 of the last tenth's mean loss over the first loss: {BULK}'s at most 0.1 above "
            f"{GD}'s",
            "progress",
            LowerError(method=BULK, rival=GD, slack=0.1, among=(name,)),
        ),
        claim(
            "j",
            "without them nothing holds the sharpness at 2 / learning rate",
            "ours",
            f"median sharpness of {BULK} over the second half of the time at the edge, over "
            "2 / learning rate, above 1.2",
            "hover",
            within(BULK, low=1.2),
        ),
        claim(
            "k",
            "Muon, which has no preconditioner that stands still, is at an edge along its updates",
            "ours",
            "half of the summed curvature along the updates d, d^T H d / 2, over the summed "
            "decrease that the gradient promises, -g^T d, over the second half of the run, in "
            "[0.8, 1.1]",
            "balance",
            within(MUON, low=0.8, high=1.1),
        ),
    ]
    if flow:
        for letters, who, source in (
            ("lmn", GD, f"{_2025}, section 3"),
            ("opq", RMSPROP, f"{_2025}, section 5"),
            ("rst", ADAM, "ours; the papers have no flow with momentum"),
        ):
            found += [
                claim(
                    letters[0],
                    f"the central flow predicts where {who} is in the mean",
                    source,
                    "distance of the second-order midpoints of the iterates from the central flow "
                    "over that from the stable flow, both averaged over the time at the edge, "
                    "below 0.25",
                    "flow_distance",
                    within(who, high=0.25),
                ),
                claim(
                    letters[1],
                    f"it predicts the time-averaged loss of {who}",
                    source,
                    "median relative error of the predicted time-averaged loss at the edge below "
                    "0.1",
                    "flow_loss",
                    within(who, high=0.1),
                ),
                claim(
                    letters[2],
                    f"it predicts the size of the oscillations of {who}",
                    source,
                    "trace of the predicted covariance over the mean squared distance of the "
                    "iterates from their second-order midpoints, both averaged over the time at "
                    "the edge, in [0.75, 1.33]",
                    "flow_variance",
                    within(who, low=0.75, high=1.33),
                ),
            ]
    return tuple(found)


def _mlp(name: str, task: str, rates: Mapping[str, float], width: int, **changes: Any) -> Setting:
    options = {"hidden_sizes": [width] * 3}
    return setting(name, task, "mlp", rates, flow=True, model_options=options, **changes)


def _cnn(name: str, task: str, rates: Mapping[str, float], width: int, **changes: Any) -> Setting:
    options = {"channels": [width, width], "activation": "tanh"}
    return setting(name, task, "cnn", rates, flow=False, model_options=options, **changes)


def _gpt(name: str, rates: Mapping[str, float], width: int, **changes: Any) -> Setting:
    options = {"embedding_size": width, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return setting(
        name,
        "tiny_shakespeare",
        "transformer_lm",
        rates,
        flow=False,
        model_options=options,
        loss="cross_entropy",
        **changes,
    )


def _rates(
    sharpness: float, gd: float, adam: float, rmsprop: float, muon: float
) -> dict[str, float]:
    """The rates of all contestants of a network.

    The heavy ball starts at a third of its threshold, which leaves room for the sharpening that it
    is about: its first steps, ten times as long as gradient descent's in the end, lead to flatter
    weights where they are near it.

    Args:
      sharpness: of the network before its first step, as read in trials (of the language model in
        an earlier run).
      gd: rate of gradient descent and of Bulk-SGD, from trials as the following ones.
      adam: rate of Adam.
      rmsprop: rate of RMSprop.
      muon: rate of Muon.

    Returns:
      The rate of each contestant.
    """
    momentum = OPTIONS[BALL]["momentum"]
    ball = float(f"{2 * (1 + momentum) / sharpness / 3:.2g}")
    rates = {GD: gd, BALL: ball, ADAM: adam, RMSPROP: rmsprop, MUON: muon}
    return rates | {BULK: gd}


# Gradient descent gets to the edge in half of 600 steps, and its oscillation needs some 80 more to
# grow from nothing: a longer run of it alone says more about its flow.
_OF_MLP = _rates(6.22, 0.14, 0.003, 0.0003, 0.01)
_OF_CNN = _rates(10.4, 0.13, 0.003, 0.001, 0.01)
_OF_GPT = _rates(34.0, 0.1, 0.003, 0.001, 0.01)
# Every contestant of the language model compiles for a minute: the small scale has the four whose
# steps and readings are the cheapest.
_OF_SMALL_GPT = {who: _OF_GPT[who] for who in (GD, BALL, ADAM, MUON)}
_INFINITE = float("inf")

STUDY = Protocols(
    name="edge_of_stability",
    summary="sharpness against its threshold, and central flows, of full-batch training",
    free_rival=GD,
    measures={
        "loss": Measure(text="mean training loss of the last tenth", worst=_INFINITE, form=".4f"),
        "progress": Measure(text="log10 of that over the first loss", worst=_INFINITE, form=".2f"),
        "start": Measure(
            text="sharpness over its threshold at the first step, of a run that reaches it later",
            worst=_INFINITE,
            form=".2f",
            optional=True,  # a run may never get there
        ),
        "hover": Measure(
            text="preconditioned sharpness over its threshold, median of the second half of the "
            "time at the edge",
            worst=_INFINITE,
            form=".3f",
        ),
        "raw": Measure(
            text="sharpness over 2 / learning rate, the same median", worst=_INFINITE, form=".3g"
        ),
        "growth": Measure(
            text="sharpness in the last tenth of the time at the edge over that in the first",
            worst=_INFINITE,
            form=".2f",
        ),
        "balance": Measure(
            text="half of the curvature along the updates over the decrease that the gradient "
            "promises, second half of the run",
            worst=_INFINITE,
            form=".3f",
        ),
        "short": Measure(text="share of the steps at the edge that raise the loss", worst=0.0),
        "long": Measure(
            text="loss in the last tenth of the time at the edge over that in the first",
            worst=_INFINITE,
            form=".3f",
        ),
        "flow_distance": Measure(
            text="distance of the midpoints from the central flow over that from the stable flow",
            worst=_INFINITE,
            form=".3f",
        ),
        "flow_loss": Measure(
            text="relative error of the predicted time-averaged loss", worst=_INFINITE
        ),
        "flow_variance": Measure(
            text="predicted over measured variance of the oscillations",
            worst=_INFINITE,
            form=".3f",
        ),
    },
    scales={
        "smoke": Scale(
            settings=(
                _mlp("digits_mlp", "digits", _OF_MLP, 4, examples=20, steps=20, directions=2),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(
                _mlp("digits_mlp", "digits", _OF_MLP, 32),
                _mlp("digits_mlp_long", "digits", {GD: _OF_MLP[GD]}, 32, steps=1_500),
                _cnn("digits_cnn", "digits", _OF_CNN, 8, steps=400),
                _gpt("shakespeare_gpt", _OF_SMALL_GPT, 16, examples=16, length=16, steps=300),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "medium": Scale(
            settings=(
                _mlp("mnist5k_mlp", "mnist5k", _OF_MLP, 64, examples=1_000, steps=2_000),
                _cnn("cifar10_5k_cnn", "cifar10_5k", _OF_CNN, 16, examples=1_000, steps=2_000),
                _gpt("shakespeare_gpt", _OF_GPT, 64, examples=32, length=64, steps=2_000),
            ),
            tuning_seeds=1,
            seeds=3,
        ),
        "full": Scale(
            settings=(
                _mlp("mnist5k_mlp", "mnist5k", _OF_MLP, 200, examples=5_000, steps=6_000),
                _cnn("cifar10_5k_cnn", "cifar10_5k", _OF_CNN, 32, examples=5_000, steps=6_000),
                _gpt("shakespeare_gpt", _OF_GPT, 128, examples=128, length=64, steps=6_000),
            ),
            tuning_seeds=1,
            seeds=5,
        ),
    },
    claims=tuple(
        claim
        for name, flow, only in (
            ("digits_mlp", True, None),
            ("digits_mlp_long", True, "abcdlmn"),  # those about gradient descent
            ("digits_cnn", False, None),
            ("shakespeare_gpt", False, None),
            ("mnist5k_mlp", True, None),
            ("cifar10_5k_cnn", False, None),
        )
        for claim in claims(name, flow=flow)
        if only is None or claim.name[0] in only
    ),
    left_out="batches smaller than the training set; the stationary flow of RMSprop, whose second "
    "moment has reached its limit; flows of convolutions and of the language model",
)
