"""The study of SIFT: is a small share of the entries enough in fine-tuning?

`reviews` turns a Transformer language model of WikiText-2 into a classifier of 1,000 reviews of
SST-2, `digits`, which needs no files, a perceptron for digits into one for the same digits moved by
two pixels. One network is pretrained for all runs, so that verdicts are about that one. Shares are
of the pretrained entries; the new last layer is trained by all contestants. The claims are those of
the paper's abstract, at this project's size; the criteria were fixed before the first run.

References:
  Song et al., `Sparse is enough in fine-tuning pre-trained large language models
  <https://arxiv.org/abs/2312.11875>`_, ICML 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
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

FULL, SIFT, RANDOM, MAGNITUDE = "Full", "SIFT, {} %", "Random, {} %", "Magnitude, {} %"
DIGITS, REVIEWS = "digits", "reviews"
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
# The first run had those of the reviews, of which most contestants took the last one.
DIGITS_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


def contestants(rates: tuple[float, ...] = RATES) -> tuple[Contestant, ...]:
    """Those of all settings.

    Args:
      rates: the grid of all of them.

    Returns:
      Full fine-tuning, SIFT with three shares and its two rivals, the last layer and adapters.
    """
    shares = ((SIFT, 5), (SIFT, 0.8), (SIFT, 0.1), (RANDOM, 0.8), (MAGNITUDE, 0.8))
    selections = {SIFT: "gradient", RANDOM: "random", MAGNITUDE: "magnitude"}
    options: dict[str, dict[str, Any]] = {
        FULL: {"trains": "all"},
        **{
            name.format(percent): {"trains": selections[name], "share": percent / 100}
            for name, percent in shares
        },
        "Last layer": {"trains": "head"},
        "LoRA, rank 2": {"trains": "lora", "rank": 2},
    }
    return tuple(
        Contestant(name=name, options=chosen, learning_rates=rates)
        for name, chosen in options.items()
    )


def digits(**changes: Any) -> Setting:
    """A perceptron with two hidden layers of 256 units, and 300 moved digits.

    Args:
      **changes: other options of the setting.

    Returns:
      The setting.
    """
    options = {
        "domain": DIGITS,
        "pixels": 2,
        "examples": 300,
        "hidden_sizes": [256, 256],
        "steps": 200,
        "batch_size": 32,
        "pretraining_steps": 400,
        "pretraining_rate": 0.001,
        "pretraining_batch_size": 64,
        **changes,
    }
    steps = options["steps"]
    budget = f"{steps} steps of 32 of 300 digits moved by 2 pixels, all rates falling to zero"
    return Setting(
        name=DIGITS, options=options, budget=budget, contestants=contestants(DIGITS_RATES)
    )


def reviews(
    model_options: Mapping[str, Any], *, words: int, length: int, pretraining_steps: int, steps: int
) -> Setting:
    """A language model and 1,000 reviews.

    Args:
      model_options: those of the Transformer.
      words: size of the vocabulary.
      length: number of tokens of a window and of a review.
      pretraining_steps: with 16 windows each.
      steps: of the fine-tuning, with 32 reviews each.

    Returns:
      The setting.
    """
    options = {
        "domain": REVIEWS,
        "vocabulary_size": words,
        "length": length,
        "model_options": dict(model_options),
        "steps": steps,
        "batch_size": 32,
        "pretraining_steps": pretraining_steps,
        "pretraining_rate": 0.002,
        "pretraining_batch_size": 16,
    }
    budget = f"{steps} steps of 32 of 1,000 reviews, all rates falling to zero"
    return Setting(
        name=REVIEWS, options=options, budget=budget, contestants=contestants(), files=True
    )


def claims(setting: str, names: str) -> tuple[Claim, ...]:
    """The paper's claims about one of the settings.

    Args:
      setting: its name.
      names: a letter for each claim.

    Returns:
      Four claims.
    """
    paper, ours = "Song et al., 2024, abstract", SIFT.format(0.8)
    interval = "> 0: all of the 95 % bootstrap interval over seeds"

    def lower(name: str, text: str, rival: str, slack: float, source: str) -> Claim:
        margin = LowerError(method=ours, rival=rival, slack=slack, among=(setting,))
        plus = f" + {slack:g}" if slack else ""
        return Claim(
            name=name,
            text=f"{text} ({setting})",
            source=source,
            criterion=f"test error of {rival}, less that of {ours},{plus} {interval}",
            judge=ByBootstrap(margin, settings=False),
        )

    largest = SIFT.format(5)
    return (
        lower(names[0], "0.8 % of the entries come within a point of all", FULL, 0.01, paper),
        lower(names[1], "gradients choose better than chance", RANDOM.format(0.8), 0.0, paper),
        lower(names[2], "gradients choose better than weights", MAGNITUDE.format(0.8), 0.0, "ours"),
        Claim(
            name=names[3],
            text=f"a few entries have most of the gradient ({setting})",
            source="Song et al., 2024, section 4",
            criterion="share of the squared gradient of the first batch outside 5 % of the entries "
            "of each tensor at most 0.5: in every seed",
            judge=InEverySeed(Within(method=largest, high=0.5, among=(setting,))),
            measure="outside",
        ),
    )


STUDY = Protocols(
    name="fine_tuning",
    summary="SIFT against full fine-tuning, other choices of entries, the last layer and LoRA",
    free_rival=FULL,
    measures={
        "error": ERROR,
        "state": Measure(text="bytes of the optimizer's state, relative to full Adam", worst=1.0),
        "trained": Measure(text="share of the values that are trained", worst=1.0),
        "outside": Measure(
            text="share of the squared gradient of the first batch outside the trained entries",
            worst=1.0,
        ),
    },
    scales={
        "smoke": Scale(
            settings=(
                Setting(
                    name=DIGITS,
                    options=digits(
                        hidden_sizes=[16], steps=20, batch_size=8, pretraining_steps=20
                    ).options,
                    budget="20 steps of 8",
                    contestants=tuple(
                        each
                        for each in contestants((0.01,))
                        if each.name in (FULL, SIFT.format(5), "LoRA, rank 2")
                    ),
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(
                digits(),
                reviews(
                    {"embedding_size": 64, "num_layers": 2, "num_heads": 4},
                    words=6_000,
                    length=32,
                    pretraining_steps=1_500,
                    steps=125,
                ),
            ),
            tuning_seeds=1,
            seeds=6,
        ),
        **{
            name: Scale(
                settings=(
                    digits(),
                    reviews(
                        {"embedding_size": width, "num_layers": 4, "num_heads": 4},
                        words=words,
                        length=48,
                        pretraining_steps=steps,
                        steps=310,
                    ),
                ),
                tuning_seeds=2,
                seeds=10,
            )
            for name, width, words, steps in (
                ("medium", 128, 10_000, 6_000),
                ("full", 256, 20_000, 40_000),
            )
        },
    },
    claims=(*claims(REVIEWS, "abcd"), *claims(DIGITS, "efgh")),
    left_out="pretrained language models of other people's, which would have to be downloaded",
)
