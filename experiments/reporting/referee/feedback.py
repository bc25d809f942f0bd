"""The study of feedback alignment: what is lost, or won with few data, without back-propagation.

Perceptrons of three hidden layers of 200 units and a small convolutional network learn to classify
images by back-propagation, by feedback from layer to layer (FA), directly from the outputs (DFA,
and BDFA with binary matrices), and, where there are convolutions, by direct feedback to their end
and back-propagation from there (CDFA).  All contestants take the same number of steps, with SGD of
momentum 0.9 and a rate that falls linearly to zero, on all of the training data and on parts of
them.  The claims are those of the abstract; sizes and settings are ours, and the criteria were
fixed before the first run.

References:
  Han, Yoo, `Efficient convolutional neural network training with direct feedback alignment
  <https://arxiv.org/abs/1901.01986>`_, 2019; Nøkland, `Direct feedback alignment provides learning
  in deep neural networks <https://arxiv.org/abs/1609.01596>`_, 2016.
"""

from __future__ import annotations

from typing import Any

from experiments.reporting.referee.judging import ByBootstrap, InEverySeed, LowerError, Within
from experiments.reporting.referee.protocols import (
    ERROR,
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

BACK, FA, DFA, CDFA, BDFA = "Back-propagation", "FA", "DFA", "CDFA", "BDFA"
OPTIONS: dict[str, dict[str, Any]] = {
    BACK: {},
    FA: {"kind": "fa"},
    DFA: {"kind": "dfa"},
    CDFA: {"kind": "cdfa"},
    BDFA: {"kind": "dfa", "binary": True},
}
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SHARES = (1.0, 0.5, 0.2, 0.1)  # of the training data
MLPS = ("tanh MLP", "relu MLP")
CNN = "CNN"


def named(network: str, share: float) -> str:
    """The name of a setting.

    Args:
      network: one of those above.
      share: of the training data.

    Returns:
      The name.
    """
    return f"{network}, {100 * share:g} %"


def settings(
    networks: tuple[str, ...], shares: tuple[float, ...], rates: tuple[float, ...], **options: Any
) -> tuple[Setting, ...]:
    """Those of a scale for one task.

    Args:
      networks: which.
      shares: of the training data.
      rates: the grid of all contestants.
      **options: task, sizes of the networks, steps and batch size.

    Returns:
      A setting for each network and share.
    """
    return tuple(
        Setting(
            name=named(network, share),
            options={"network": network, "share": share, **options},
            budget=f"{options['steps']} steps of {options['batch_size']} examples",
            contestants=tuple(
                Contestant(name=name, options=chosen, learning_rates=rates)
                for name, chosen in OPTIONS.items()
                if name != CDFA or network == CNN
            ),
            files=options["task"] != "digits",
        )
        for network in networks
        for share in shares
    )


ABSTRACT = "Han and Yoo, 2019, abstract"
BOOTSTRAP = "all of the 95 % bootstrap interval over seeds"


def aligns(name: str, network: str) -> Claim:
    """The claim that the feedback's gradient turns toward the true one.

    Args:
      name: a letter.
      network: one of the perceptrons.

    Returns:
      The claim.
    """
    return Claim(
        name=name,
        text=f"after one epoch DFA's gradients point the way of the true ones ({network})",
        source="Nøkland, 2016, section 3",
        criterion="after one epoch on all data the angle between DFA's gradient and the true one "
        "is below 90 degrees in each layer: in every seed",
        judge=InEverySeed(Within(method=DFA, high=90.0, among=(named(network, 1.0),))),
        measure="angle",
    )


STUDY = Protocols(
    name="feedback",
    summary="direct feedback alignment against back-propagation, also with few data",
    free_rival=BACK,
    measures={
        "error": ERROR,
        "angle": Measure(
            text="largest angle of a layer between its gradient and the true one after one epoch, "
            "in degrees",
            worst=180.0,
            form=".1f",
        ),
    },
    scales={
        "smoke": Scale(
            settings=settings(
                (CNN,),
                (0.5,),
                (0.03,),
                task="digits",
                channels=[2, 2],
                steps=4,
                batch_size=256,
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=settings(
                (*MLPS, CNN),
                SHARES,
                RATES,
                task="digits",
                hidden_sizes=[200, 200, 200],
                channels=[16, 16],
                steps=300,
                batch_size=32,
            ),
            tuning_seeds=1,
            seeds=3,
        ),
        "medium": Scale(
            settings=settings(
                MLPS,
                SHARES,
                RATES,
                task="mnist5k",
                hidden_sizes=[200, 200, 200],
                steps=1_500,
                batch_size=64,
            )
            + settings(
                (CNN,),
                SHARES,
                RATES,
                task="cifar10_5k",
                channels=[32, 32],
                steps=1_500,
                batch_size=64,
            ),
            tuning_seeds=1,
            seeds=5,
        ),
        "full": Scale(
            settings=settings(
                MLPS,
                SHARES,
                RATES,
                task="mnist5k",
                hidden_sizes=[200, 200, 200],
                steps=6_000,
                batch_size=64,
            )
            + settings(
                (CNN,),
                SHARES,
                RATES,
                task="cifar10_5k",
                channels=[32, 32],
                steps=10_000,
                batch_size=64,
            ),
            tuning_seeds=2,
            seeds=5,
        ),
    },
    claims=(
        Claim(
            name="a",
            text="binary feedback costs at most half a point",
            source=ABSTRACT,
            criterion="mean over the settings of DFA's test error less BDFA's, + 0.005 > 0: "
            + BOOTSTRAP,
            judge=ByBootstrap(LowerError(method=BDFA, rival=DFA, slack=0.005), settings=False),
        ),
        Claim(
            name="b",
            text="convolutions learn at least 5 points better by CDFA than by DFA",
            source=ABSTRACT,
            criterion=f"DFA's test error less CDFA's on all data, - 0.05 > 0: {BOOTSTRAP}",
            judge=ByBootstrap(
                LowerError(method=CDFA, rival=DFA, slack=-0.05, among=(named(CNN, 1.0),)),
                settings=False,
            ),
        ),
        Claim(
            name="c",
            text="with few data CDFA is at least as good as back-propagation",
            source=ABSTRACT,
            criterion="back-propagation's test error less CDFA's on a tenth of the data >= 0: "
            + BOOTSTRAP,
            judge=ByBootstrap(
                LowerError(method=CDFA, rival=BACK, among=(named(CNN, 0.1),)),
                strict=False,
                settings=False,
            ),
        ),
        aligns("d", MLPS[0]),
        aligns("e", MLPS[1]),
    ),
    left_out="tracking of objects, and the power that a chip takes",
)
