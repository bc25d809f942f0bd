"""The study of sampled products: how much of a network's multiplications can be left out.

A perceptron with two hidden layers of 500 ReLU units learns to classify images by Adam, with exact
products and with a share of their terms: the largest ones (top-k), or ones drawn with replacement
(CRS) or each by itself (Bernoulli); in the forward pass and its gradient, in the gradient alone, or
in the forward pass alone.  All take the same steps. Network, batch and optimizer are those of the
authors' code, without its dropout; steps and ratios are ours. The criteria were fixed before the
first run.

References:
  Adelman, Levy, Hakimi, Silberstein, `Faster neural network training with approximate tensor
  operations <https://arxiv.org/abs/1805.08079>`_, NeurIPS 2021.
"""

from __future__ import annotations

from typing import Any

from experiments.reporting.referee.judging import (
    AllOf,
    ByBootstrap,
    InEverySeed,
    LowerError,
    Within,
)
from experiments.reporting.referee.protocols import (
    ERROR,
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

EXACT = "Exact"
METHODS = {"top_k": "Top-k", "crs": "CRS", "bernoulli": "Bernoulli"}
RATIOS = (0.8, 0.6, 0.4, 0.2)
MODES = {"backward": "gradient alone", "forward_only": "forward alone"}
RATES = (0.0003, 0.001, 0.003)
HALF = 0.4  # the largest ratio whose compiled step has at most half of the multiplications


def named(method: str, ratio: float, where: str = "forward") -> str:
    """The name of a contestant.

    Args:
      method: a key of `METHODS`.
      ratio: share of the terms.
      where: which products are sampled.

    Returns:
      The name.
    """
    mode = f", {MODES[where]}" if where in MODES else ""
    return f"{METHODS[method]}, {100 * ratio:g} %{mode}"


def contestants(ratios: tuple[float, ...], rates: tuple[float, ...]) -> tuple[Contestant, ...]:
    """Exact products, all methods at all ratios, and the other modes of top-k and CRS at `HALF`.

    Args:
      ratios: shares of the terms.
      rates: the grid of all.

    Returns:
      The contestants.
    """
    chosen: dict[str, dict[str, Any]] = {EXACT: {}}
    for method in METHODS:
        for ratio in ratios:
            chosen[named(method, ratio)] = {"method": method, "ratio": ratio}
    for method in ("top_k", "crs"):
        for where in MODES:
            chosen[named(method, HALF, where)] = {"method": method, "ratio": HALF, "where": where}
    return tuple(
        Contestant(name=name, options=options, learning_rates=rates)
        for name, options in chosen.items()
    )


def setting(task: str, who: tuple[Contestant, ...], **options: Any) -> Setting:
    """One task.

    Args:
      task: its name.
      who: the contestants.
      **options: hidden sizes, steps, batch size and number of draws.

    Returns:
      The setting.
    """
    return Setting(
        name=task,
        options={"task": task, **options},
        budget=f"{options['steps']} steps of {options['batch_size']} examples",
        contestants=who,
        files=task != "digits",
    )


PAPER = "Adelman et al., 2021, abstract and section 5"
BOOTSTRAP = "all of the 95 % bootstrap interval over seeds"
TOP = named("top_k", HALF)
OTHERS = (
    named("crs", HALF),
    named("bernoulli", HALF),
    *(named(method, HALF, where) for method in ("top_k", "crs") for where in MODES),
)
_WHOLE = {"hidden_sizes": [500, 500], "batch_size": 50, "draws": 1_000}

STUDY = Protocols(
    name="sampled_operations",
    summary="sampled products: accuracy against multiplications, bias and variance of gradients",
    free_rival=EXACT,
    measures={
        "error": ERROR,
        "flops": Measure(
            text="floating-point operations of the compiled gradient, relative to the exact one's",
            worst=float("inf"),
        ),
        "bias": Measure(
            text="distance of the mean gradient of all draws at the start to the exact one, "
            "relative to its norm",
            worst=float("inf"),
        ),
        "variance": Measure(
            text="mean squared distance of a draw's gradient to the mean of all draws at the "
            "start, relative to the squared norm of the exact one",
            worst=float("inf"),
            form=".3f",
        ),
    },
    scales={
        "smoke": Scale(
            settings=(
                setting(
                    "digits",
                    contestants((HALF,), (0.001,)),
                    hidden_sizes=[32],
                    steps=3,
                    batch_size=50,
                    draws=4,
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(setting("digits", contestants(RATIOS, RATES), steps=400, **_WHOLE),),
            tuning_seeds=1,
            seeds=5,
        ),
        "medium": Scale(
            settings=(setting("mnist5k", contestants(RATIOS, RATES), steps=1_600, **_WHOLE),),
            tuning_seeds=1,
            seeds=5,
        ),
        "full": Scale(
            settings=(setting("mnist5k", contestants(RATIOS, RATES), steps=8_000, **_WHOLE),),
            tuning_seeds=2,
            seeds=10,
        ),
    },
    claims=(
        Claim(
            name="a",
            text="half of the multiplications can be left out at no loss of accuracy",
            source=PAPER,
            criterion=f"test error of exact products less that of {TOP}, + 0.005 > 0: {BOOTSTRAP}",
            judge=ByBootstrap(LowerError(method=TOP, rival=EXACT, slack=0.005), settings=False),
        ),
        Claim(
            name="b",
            text=f"the gradient of {TOP} takes at most half of the multiplications",
            source=PAPER,
            criterion="floating-point operations of its compiled gradient at most 0.5 of the exact "
            "one's: in every seed",
            judge=InEverySeed(Within(method=TOP, high=0.5)),
            measure="flops",
        ),
        Claim(
            name="c",
            text="top-k in the forward pass, without scaling, is the best of the ways to sample",
            source=PAPER,
            criterion=f"test error of {TOP} below those of {'; '.join(OTHERS)}: in every seed",
            judge=InEverySeed(
                AllOf(tuple(LowerError(method=TOP, rival=other) for other in OTHERS))
            ),
        ),
        Claim(
            name="d",
            text="Bernoulli's gradients vary less than those of CRS",
            source="Adelman et al., 2021, section 3",
            criterion=f"variance of {named('bernoulli', HALF)} below that of {named('crs', HALF)}: "
            "in every seed",
            judge=InEverySeed(
                LowerError(method=named("bernoulli", HALF), rival=named("crs", HALF))
            ),
            measure="variance",
        ),
    ),
    left_out="convolutional networks, ImageNet, and the time of steps on accelerators",
)
