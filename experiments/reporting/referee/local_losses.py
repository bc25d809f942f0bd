"""The study of forward gradients: which losses, which perturbations and how many passes they need.

LocalMixer learns to classify images: by back-propagation, by local losses and back-propagation
inside of each block, and by forward gradients of both, whose directions are those of activations or
of weights, one or several at a step. All contestants take the same number of steps, with SGD of
momentum 0.9 and a rate that falls linearly to zero, and a tenth of the gradient for the classifier
of the network, as in the authors' code. The claims are those of the paper, at this project's size;
the criteria were fixed before the first run.

References:
  Ren, Kornblith, Liao, Hinton, `Scaling forward gradient with local losses
  <https://arxiv.org/abs/2210.03310>`_, ICLR 2023.
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

BACK, LOCAL = "Back-propagation", "Local losses, back-propagation"
RATES = (0.01, 0.03, 0.1, 0.3)
GROUPS = (1, 2, 4, 8, 16)  # of the networks whose variances are compared


def forward(locality: str, perturb: str, passes: int) -> str:
    """The name of a contestant with forward gradients.

    Args:
      locality: ``"local"`` or ``"global"``.
      perturb: ``"activations"`` or ``"weights"``.
      passes: number of directions in a step.

    Returns:
      The name.
    """
    return f"Forward, {locality}, {perturb}, {passes} pass{'es' if passes > 1 else ''}"


OURS = forward("local", "activations", 1)


def contestants(
    passes: tuple[int, ...], global_passes: tuple[int, ...], rates: tuple[float, ...] = RATES
) -> tuple[Contestant, ...]:
    """Those of a setting.

    Args:
      passes: numbers of passes with local losses and perturbed activations.
      global_passes: the same with the loss of the whole network.
      rates: the grid of all of them.

    Returns:
      Two by back-propagation, then those by forward gradients.
    """
    options: dict[str, dict[str, Any]] = {
        BACK: {"gradient": "reverse", "locality": "global"},
        LOCAL: {"gradient": "reverse", "locality": "block"},
    }
    of_activations = [("local", n) for n in passes] + [("global", n) for n in global_passes]
    for locality, number, perturb in (
        *((locality, n, "activations") for locality, n in of_activations),
        ("local", 1, "weights"),
        ("global", 1, "weights"),
    ):
        options[forward(locality, perturb, number)] = {
            "gradient": "forward",
            "locality": "group" if locality == "local" else "global",
            "perturb": perturb,
            "passes": number,
        }
    options[OURS] |= {"groups": list(GROUPS)}
    return tuple(
        Contestant(name=name, options=chosen, learning_rates=rates)
        for name, chosen in options.items()
    )


def setting(task: str, who: tuple[Contestant, ...], **changes: Any) -> Setting:
    """One task for LocalMixer S/4x4/8: 16 patches, 128 channels in 8 groups, 3 blocks.

    Args:
      task: name of the task.
      who: the contestants.
      **changes: other options of the setting.

    Returns:
      The setting.
    """
    options = {
        "task": task,
        "num_patches": 4,
        "channels": 128,
        "num_groups": 8,
        "num_blocks": 3,
        "steps": 240,
        "batch_size": 32,
        "draws": 32,
        **changes,
    }
    return Setting(
        name=task,
        options=options,
        budget=f"{options['steps']} steps of {options['batch_size']} examples, all rates falling "
        "to zero",
        contestants=who,
        files=task != "digits",
    )


PAPER = "Ren et al., 2023"


def beats_weights(name: str, locality: str) -> Claim:
    """The claim that perturbed activations learn better than perturbed weights.

    Args:
      name: a letter.
      locality: ``"local"`` or ``"global"``.

    Returns:
      The claim.
    """
    method, rival = (forward(locality, perturb, 1) for perturb in ("activations", "weights"))
    return Claim(
        name=name,
        text=f"perturbed activations learn better than perturbed weights ({locality} losses)",
        source=f"{PAPER}, section 3",
        criterion=f"test error of {method} below that of {rival}: in every seed",
        judge=InEverySeed(LowerError(method=method, rival=rival)),
    )


STUDY = Protocols(
    name="local_losses",
    summary="forward gradients with local and global losses against back-propagation",
    free_rival=BACK,
    measures={
        "error": ERROR,
        "angle": Measure(
            text="1 - cosine of estimate and gradient, all layers of the blocks together, at the "
            "end of a run",
            worst=2.0,
            form=".3f",
        ),
        "noise": Measure(
            text="variance of the estimate over the squared norm of the gradient, the same layers",
            worst=float("inf"),
            form=".3g",
        ),
        "closed": Measure(
            text="variance of the first block's estimates over that of the closed form, before the "
            "first step",
            worst=float("inf"),
            form=".3f",
        ),
        "slope": Measure(
            text="slope of log noise against log of the number of groups, before the first step",
            worst=float("inf"),
            form=".3f",
        ),
    },
    scales={
        "smoke": Scale(
            settings=(
                setting(
                    "digits",
                    tuple(
                        Contestant(
                            name=each.name,
                            options=dict(each.options)
                            | ({"groups": [1, 2]} if each.name == OURS else {}),
                            learning_rates=(0.1,),
                        )
                        for each in contestants((1,), ())
                        if each.name in (BACK, OURS)
                    ),
                    num_patches=2,
                    channels=8,
                    num_groups=2,
                    num_blocks=1,
                    steps=4,
                    batch_size=8,
                    draws=4,
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(setting("digits", contestants((1, 4, 16), (1,))),), tuning_seeds=1, seeds=3
        ),
        "medium": Scale(
            settings=(
                setting("mnist5k", contestants((1, 4, 16), (1, 4, 16)), steps=1_500, batch_size=64),
            ),
            tuning_seeds=1,
            seeds=5,
        ),
        "full": Scale(
            settings=tuple(
                setting(task, contestants((1, 4, 16), (1, 4, 16)), steps=4_000, batch_size=100)
                for task in ("mnist5k", "cifar10_5k")
            ),
            tuning_seeds=2,
            seeds=5,
        ),
    },
    claims=(
        beats_weights("a", "local"),
        beats_weights("b", "global"),
        Claim(
            name="c",
            text="forward gradients of local losses come within 3 points of their gradients",
            source=f"{PAPER}, table 2",
            criterion=f"test error of {LOCAL}, less that of {OURS}, + 0.03 > 0: all of the 95 % "
            "bootstrap interval over seeds",
            judge=ByBootstrap(LowerError(method=OURS, rival=LOCAL, slack=0.03), settings=False),
        ),
        Claim(
            name="d",
            text="without local losses forward gradients are at least 10 points worse",
            source=f"{PAPER}, table 2",
            criterion=f"test error of {forward('global', 'activations', 1)}, less that of {OURS}, "
            "- 0.1 > 0: all of the 95 % bootstrap interval over seeds",
            judge=ByBootstrap(
                LowerError(method=OURS, rival=forward("global", "activations", 1), slack=-0.1),
                settings=False,
            ),
        ),
        Claim(
            name="e",
            text="more groups lower the variance in proportion",
            source=f"{PAPER}, section 4.2",
            criterion="slope of log noise of the channel layers against log of the number of "
            f"groups ({', '.join(map(str, GROUPS))}), before the first step, in [-1.2, -0.8]: in "
            "every seed",
            judge=InEverySeed(Within(method=OURS, low=-1.2, high=-0.8)),
            measure="slope",
        ),
        Claim(
            name="f",
            text="the variance is that of the closed form",
            source=f"{PAPER}, section 3.3",
            criterion="variance of the estimates at the first block's activations, over that of "
            "the closed form, in [0.9, 1.1]: in every seed",
            judge=InEverySeed(Within(method=OURS, low=0.9, high=1.1)),
            measure="closed",
        ),
    ),
    left_out="contrastive learning, and networks of the sizes M and L",
)
