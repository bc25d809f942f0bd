"""The study of equilibrium flow: what fixed-point correction and reuse are worth.

Small deep equilibrium networks (`models.DeqFlow`) learn the flow between two pictures of moving
digits, `experiments.data.moving_digits`. All take equally many updates of the solver in a step of
training, cut in one segment or in three, each of whose ends is supervised. Then the solver follows
sequences of eight pictures, from zeros at every pair, or from the fixed point of the pair before,
moved on. It stops where the relative residual is below 0.01, and the steps until there are counted
from the second pair on. The claims are those of the paper; the criteria were fixed before the first
run.

References:
  Bai et al., `Deep equilibrium optical flow estimation <https://arxiv.org/abs/2204.08442>`_, CVPR
  2022.
"""

from __future__ import annotations

from typing import Any

from experiments.reporting.referee.judging import ByBootstrap, InEverySeed, LowerError, Within
from experiments.reporting.referee.protocols import (
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

ONE, THREE = "One output", "Three corrections"
LONG = "One output, three updates differentiated"
# The share of the steps that reuse may take, and by how much its error may be above the other's.
_SHARE, _SLACK = 0.6, 0.02


def contestants(*, rates: tuple[float, ...], only: tuple[str, ...] = ()) -> tuple[Contestant, ...]:
    """Those of a setting.

    Args:
      rates: the learning rates of each.
      only: names of those that take part; all if empty.

    Returns:
      The contestants.
    """
    options = {
        ONE: {"corrections": 1, "phantom_steps": 1},
        THREE: {"corrections": 3, "phantom_steps": 1},
        LONG: {"corrections": 1, "phantom_steps": 3},
    }
    return tuple(
        Contestant(name=name, options=chosen, learning_rates=rates)
        for name, chosen in options.items()
        if not only or name in only
    )


def setting(digits: str, who: tuple[Contestant, ...], **sizes: Any) -> Setting:
    """Digits of one source.

    Args:
      digits: ``"digits"``, those of scikit-learn, or ``"mnist"``.
      who: the contestants.
      **sizes: ``width``, ``solver_steps``, ``steps``, ``batch_size``, ``pairs``, ``held_out`` and
        ``sequences``.

    Returns:
      The setting.
    """
    return Setting(
        name=f"moving_{digits}",
        options={"digits": digits, "tolerance": 0.01, "most_steps": 40, **sizes},
        budget=f"{sizes['steps']} steps of {sizes['batch_size']} pairs, with "
        f"{sizes['solver_steps']} updates of the solver in each",
        contestants=who,
        files=digits == "mnist",
    )


def _large(width: int, steps: int) -> tuple[Setting, ...]:
    sizes = {"width": width, "solver_steps": 36, "steps": steps, "batch_size": 16}
    sizes |= {"pairs": 20_000, "held_out": 500, "sequences": 100}
    who = contestants(rates=(0.0004, 0.001, 0.0025))
    return (setting("digits", who, **sizes), setting("mnist", who, **sizes))


STUDY = Protocols(
    name="equilibrium_flow",
    summary="fixed-point correction and reuse of deep equilibrium networks of optical flow",
    free_rival=ONE,
    measures={
        "epe": Measure(
            text="end-point error on test pairs, in pixels", worst=float("inf"), form=".3f"
        ),
        "digit": Measure(
            text="the same inside of the digits; they and the ground move by 2.7 pixels on average",
            worst=float("inf"),
            form=".3f",
        ),
        "steps": Measure(
            text="steps of the solver to the tolerance from zeros, on sequences",
            worst=float("inf"),
            form=".1f",
        ),
        "reuse": Measure(
            text="steps from the last fixed point, over those from zeros",
            worst=float("inf"),
            form=".3f",
        ),
        "reuse_error": Measure(
            text="end-point error from the last fixed point, over that from zeros",
            worst=float("inf"),
            form=".3f",
        ),
        "unsettled": Measure(text="pairs from zeros that do not reach the tolerance", worst=1.0),
    },
    scales={
        "smoke": Scale(
            settings=(
                setting(
                    "digits",
                    contestants(rates=(0.003,), only=(ONE, THREE)),
                    width=2,
                    solver_steps=6,
                    steps=2,
                    batch_size=2,
                    pairs=6,
                    held_out=3,
                    sequences=2,
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(
                setting(
                    "digits",
                    contestants(rates=(0.002,), only=(ONE, THREE)),
                    width=16,
                    solver_steps=12,
                    steps=500,
                    batch_size=8,
                    pairs=4_000,
                    held_out=200,
                    sequences=32,
                ),
            ),
            tuning_seeds=1,
            seeds=3,
        ),
        "medium": Scale(settings=_large(32, 6_000), tuning_seeds=1, seeds=3),
        "full": Scale(settings=_large(64, 40_000), tuning_seeds=1, seeds=5),
    },
    claims=(
        Claim(
            name="a",
            text="fixed-point correction lowers the error at equal steps of training and solver",
            source="Bai et al., 2022, section 3.3",
            criterion=f"end-point error of {ONE}, less that of {THREE}, > 0: all of the 95 % "
            "bootstrap interval over seeds",
            judge=ByBootstrap(LowerError(method=THREE, rival=ONE), settings=False),
            measure="epe",
        ),
        Claim(
            name="b",
            text="reuse of the last fixed point saves steps of the solver on sequences",
            source="Bai et al., 2022, section 3.4; the share is ours",
            criterion=f"steps of {THREE} to a relative residual of 0.01 from the last fixed point, "
            f"over those from zeros, < {_SHARE:g}: in every seed",
            judge=InEverySeed(Within(method=THREE, high=_SHARE)),
            measure="reuse",
        ),
        Claim(
            name="c",
            text="it does so at the same error",
            source="Bai et al., 2022, section 3.4; the slack is ours",
            criterion=f"end-point error of {THREE} on sequences from the last fixed point, over "
            f"that from zeros, < {1 + _SLACK:g}: in every seed",
            judge=InEverySeed(Within(method=THREE, high=1 + _SLACK)),
            measure="reuse_error",
        ),
        Claim(
            name="d",
            text="fixed-point correction lowers the error at equally many differentiated updates",
            source="ours",
            criterion=f"end-point error of {LONG}, less that of {THREE}, > 0: all of the 95 % "
            "bootstrap interval over seeds",
            judge=ByBootstrap(LowerError(method=THREE, rival=LONG), settings=False),
            measure="epe",
        ),
    ),
    left_out="pictures of the world, several levels of correlation, 36 and more updates in a step; "
    "small trains networks of width 16 with 12 updates on the digits of scikit-learn alone",
)
