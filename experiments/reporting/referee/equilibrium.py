"""The study of equilibrium models: which gradient trains them, what it costs, and against a stack.

MDEQ classifies images with its gradient by the implicit function theorem, by phantom gradients of
one and of five steps, and by back-propagation through ten plain iterations; all begin with some
steps of the latter, as its authors do. A Transformer of two layers predicts characters as a fixed
point with the same gradients, and as a stack that applies them four times: eight layers with tied
weights, and equally many parameters. All train by Adam at rates that fall as a cosine, for equally
many steps. The claims are those of the papers, and this project's targets for memory and time; the
criteria were fixed before the first run.

References:
  Bai, Kolter, Koltun, `Deep equilibrium models <https://arxiv.org/abs/1909.01377>`_, NeurIPS 2019;
  Bai, Koltun, Kolter, `Multiscale deep equilibrium models <https://arxiv.org/abs/2006.08656>`_,
  NeurIPS 2020; Geng et al., `On training implicit models <https://arxiv.org/abs/2111.05177>`_,
  NeurIPS 2021.
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

IMPLICIT, ONE, FIVE = "Implicit", "Phantom, 1 step", "Phantom, 5 steps"
UNROLLED, STACK = "Unrolled, 10 steps", "Stack of 8 tied layers"
PICTURES, TEXT = "pictures", "text"
GRADIENTS: dict[str, dict[str, Any]] = {
    IMPLICIT: {"gradient": "implicit"},
    ONE: {"gradient": "phantom", "phantom_steps": 1},
    # The authors' damping on CIFAR-10 is 0.5 (Geng et al., 2021, section 5).
    FIVE: {"gradient": "phantom", "phantom_steps": 5, "damping": 0.5},
}
PLAIN = {"solver": "fixed_point", "gradient": "unrolled", "tolerance": 0.0}
_POINTS = 0.02  # of the error, which a gradient that trains as well may lose
_NATS = 0.05  # of the loss of a character: 5 % of its perplexity


def contestants(extra: str, max_steps: int, rates: tuple[float, ...]) -> tuple[Contestant, ...]:
    """Those of a setting.

    Args:
      extra: name of the one that is differentiated through plain iterations.
      max_steps: their number.
      rates: the grid of all.

    Returns:
      Three fixed points, and the stack.
    """
    options = GRADIENTS | {extra: PLAIN | {"max_steps": max_steps}}
    return tuple(
        Contestant(name=name, options=chosen, learning_rates=rates)
        for name, chosen in options.items()
    )


def pictures(task: str, rates: tuple[float, ...], **options: Any) -> Setting:
    """MDEQ on images.

    Args:
      task: name of the task.
      rates: the grid.
      **options: ``model`` (options of `models.Mdeq`), ``steps``, ``pretrained`` (those of them that
        train the plain iterations), ``batch_size`` and ``examples`` (of the training split, None
        for all).

    Returns:
      The setting.
    """
    return Setting(
        name=PICTURES,
        options={"task": task, "weight_decay": 2.5e-6, **options},
        budget=f"{options['steps']} steps of {options['batch_size']} images, of which "
        f"{options['pretrained']} through plain iterations, all rates falling as a cosine",
        contestants=contestants(UNROLLED, 10, rates),
        files=task != "digits",
    )


def text(rates: tuple[float, ...], **options: Any) -> Setting:
    """The Transformer on Tiny Shakespeare.

    Args:
      rates: the grid.
      **options: ``model`` (options of `models.EquilibriumLM`), ``length`` of the windows,
        ``steps``, ``batch_size`` and ``held_out``, the number of windows of each other split.

    Returns:
      The setting.
    """
    return Setting(
        name=TEXT,
        options={"task": "tiny_shakespeare", "weight_decay": 0.0, "pretrained": 0, **options},
        budget=f"{options['steps']} steps of {options['batch_size']} windows, all rates falling as "
        "a cosine",
        contestants=contestants(STACK, 4, rates),
        files=True,
    )


def trains_as_well(name: str, words: str, setting: str, method: str, rival: str) -> Claim:
    """The claim that one contestant is not worse than another one by more than a slack.

    Args:
      name: a letter.
      words: the claim.
      setting: where it is judged.
      method: who the claim is about.
      rival: with whom it is compared.

    Returns:
      The claim.
    """
    measure, slack = ("loss", _NATS) if setting == TEXT else ("error", _POINTS)
    return Claim(
        name=name,
        text=words,
        source="Geng et al., 2021, section 5" if method == ONE else "Bai et al., 2019, section 4",
        criterion=f"{setting}: test {measure} of {rival}, less that of {method}, + {slack:g} > 0: "
        "all of the 95 % bootstrap interval over seeds",
        judge=ByBootstrap(
            LowerError(method=method, rival=rival, slack=slack, among=(setting,)), settings=False
        ),
        measure=measure,
    )


def bounded(name: str, words: str, setting: str, measure: str, method: str, high: float) -> Claim:
    """The claim that a measure of a contestant is below a bound.

    Args:
      name: a letter.
      words: the claim.
      setting: where it is judged.
      measure: name of the measure.
      method: who the claim is about.
      high: the bound.

    Returns:
      The claim.
    """
    return Claim(
        name=name,
        text=words,
        source="ours",
        criterion=f"{setting}: {measure} of {method} below {high:g}: in every seed",
        judge=InEverySeed(Within(method=method, high=high, among=(setting,))),
        measure=measure,
    )


def costs(time: str, angle: str, memory: str, setting: str) -> tuple[Claim, ...]:
    """What is said about the gradients themselves.

    Args:
      time: the name of the claim about time, a letter.
      angle: that of the claim about directions.
      memory: that of the claim about memory.
      setting: where they are judged.

    Returns:
      The claims.
    """
    return (
        bounded(
            time,
            "the one-step phantom gradient takes at most 0.6 of the implicit one's time",
            setting,
            "time",
            ONE,
            0.6,
        ),
        Claim(
            name=angle,
            text="more phantom steps come closer to the implicit gradient",
            source="Geng et al., 2021, section 3",
            criterion=f"{setting}: angle of {FIVE} below that of {ONE}: in every seed",
            judge=InEverySeed(LowerError(method=FIVE, rival=ONE, among=(setting,))),
            measure="angle",
        ),
        bounded(
            memory,
            "memory of the implicit gradient does not depend on the solver's steps",
            setting,
            "growth",
            IMPLICIT,
            1.05,
        ),
    )


_SMALL_MDEQ: dict[str, Any] = {"width": 8, "num_groups": 4, "expansion": 2, "head_channels": [4, 8]}
_SMALL_MDEQ |= {"final_channels": 32, "solver": "anderson", "max_steps": 6, "backward_steps": 6}
_SMALL_LM: dict[str, Any] = {
    "embedding_size": 32,
    "num_heads": 2,
    "feedforward_size": 64,
    "max_steps": 8,
}
_SMALL_LM |= {"backward_steps": 8, "loop": "while"}  # nothing but matrix products
_RATES = (0.001, 0.003, 0.01)
# Memory that is kept by the solver does not depend on its steps: Broyden keeps as many pairs as
# Anderson's default.
_TINY_MDEQ: dict[str, Any] = {"solver": "broyden", "memory": 6}


STUDY = Protocols(
    name="equilibrium",
    summary="gradients of equilibrium models: implicit, phantom, unrolled, and a stack",
    free_rival=IMPLICIT,
    measures={
        "error": ERROR,
        "loss": Measure(
            text="loss of a character on the test split, in nats", worst=float("inf"), form=".3f"
        ),
        "angle": Measure(
            text="1 - cosine of the gradient and the implicit one, solved four times as far, on "
            "the block's parameters at the end of a run",
            worst=2.0,
            form=".3f",
        ),
        "time": Measure(
            text="CPU time of a gradient over that of the implicit one, interleaved",
            worst=float("inf"),
            form=".2f",
        ),
        "peak": Measure(
            text="memory planned for intermediate results of a gradient, in MB",
            worst=float("inf"),
            form=".2f",
        ),
        "growth": Measure(
            text="the same with four times the solver's steps over it, both in loops",
            worst=float("inf"),
            form=".2f",
        ),
        "residual": Measure(
            text="mean relative residual of the forward solver on a batch at the end of a run",
            worst=float("inf"),
            form=".3f",
        ),
    },
    scales={
        "smoke": Scale(
            settings=(
                pictures(
                    "digits",
                    (0.003,),
                    model=_SMALL_MDEQ
                    | {"width": 4, "num_groups": 2, "expansion": 1, "head_channels": [2, 2]}
                    | {"final_channels": 4, "max_steps": 2, "backward_steps": 2},
                    steps=3,
                    pretrained=1,
                    batch_size=8,
                    examples=32,
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(
                pictures(
                    "digits",
                    (0.003,),
                    model=_SMALL_MDEQ,
                    steps=100,
                    pretrained=10,
                    batch_size=32,
                    examples=None,
                ),
                text(
                    (0.003,),
                    model=_SMALL_LM,
                    length=32,
                    steps=100,
                    batch_size=16,
                    held_out=100,
                ),
            ),
            tuning_seeds=1,
            seeds=3,
        ),
        "medium": Scale(
            settings=(
                pictures(
                    "cifar10_5k",
                    _RATES,
                    model=_TINY_MDEQ | {"width": 16, "expansion": 3},
                    steps=1_000,
                    pretrained=80,
                    batch_size=64,
                    examples=None,
                ),
                text(
                    _RATES,
                    model={"embedding_size": 64, "max_steps": 16},
                    length=64,
                    steps=1_500,
                    batch_size=16,
                    held_out=400,
                ),
            ),
            tuning_seeds=1,
            seeds=3,
        ),
        "full": Scale(
            settings=(
                pictures(
                    "cifar10_5k",
                    _RATES,
                    model=_TINY_MDEQ,
                    steps=4_000,
                    pretrained=320,
                    batch_size=64,
                    examples=None,
                ),
                text(
                    _RATES,
                    model={"embedding_size": 128, "max_steps": 30, "backward_steps": 30},
                    length=128,
                    steps=6_000,
                    batch_size=16,
                    held_out=400,
                ),
            ),
            tuning_seeds=1,
            seeds=5,
        ),
    },
    claims=(
        trains_as_well(
            "a",
            "the one-step phantom gradient trains as well as the implicit one",
            PICTURES,
            ONE,
            IMPLICIT,
        ),
        *costs("b", "c", "d", PICTURES),
        trains_as_well(
            "e",
            "the fixed point of two layers is as good as a stack of eight tied layers",
            TEXT,
            IMPLICIT,
            STACK,
        ),
        trains_as_well(
            "f",
            "the one-step phantom gradient trains the Transformer as well, too",
            TEXT,
            ONE,
            IMPLICIT,
        ),
        *costs("g", "h", "i", TEXT),
    ),
    left_out="optical flow, which has a study of its own; small trains a reduced MDEQ on the "
    "digits and a Transformer of width 32, all at one rate",
)
