"""The study of data assimilation: ESMDA and the EnKF against Adam at equal evaluations.

A network of one hidden layer of 10 tanh units (31 weights) learns a sine and a Mexican hat from 100
noisy points. An ensemble of N members and 4 iterations evaluates the network 4 N times on all
points; Adam gets as many evaluations, a gradient counting as two, once in one run and once divided
among ten random restarts, of which the one with the lowest training loss counts. The EnKF sees one
point after the other, once, and takes a quarter of the evaluations. Every contestant tries four
settings: Adam its learning rate, the ensembles the scale of their prior. Sizes, ranges and noise
are our reading: those of the paper could not be read. The criteria were fixed before the first run;
the grids were widened after an unfinished one that had chosen their ends.

References:
  Chen et al., `A novel neural network training framework with data assimilation
  <https://doi.org/10.1007/s11227-022-04629-7>`_, 2022.
"""

from __future__ import annotations

from typing import Any

from experiments.reporting.referee.judging import AllOf, InEverySeed, LowerError, Within
from experiments.reporting.referee.protocols import (
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

ADAM, RESTARTS = "Adam", "Adam, 10 restarts"
EQUAL, FALLING = "ESMDA, 4 4 4 4", "ESMDA, 9.333 7 4 2"
ENKF = "EnKF, one point at a time"
PRIORS, RATES = (0.125, 0.25, 0.5, 1.0), (0.003, 0.01, 0.03, 0.1)
CURVES = ("sine", "mexican hat")
MEMBERS = (50, 200, 1_000)


def contestants(priors: tuple[float, ...], rates: tuple[float, ...]) -> tuple[Contestant, ...]:
    """Those of a setting.

    Args:
      priors: scales of the prior, for the ensembles.
      rates: learning rates of Adam, as many.

    Returns:
      Two that take gradients, then three ensembles.
    """
    options: dict[str, dict[str, Any]] = {
        ADAM: {"kind": "adam", "restarts": 1},
        RESTARTS: {"kind": "adam", "restarts": 10},
        EQUAL: {"kind": "esmda", "alphas": [4.0] * 4},
        FALLING: {"kind": "esmda", "alphas": [9.333, 7.0, 4.0, 2.0]},
        ENKF: {"kind": "enkf"},
    }
    return tuple(
        Contestant(
            name=name,
            options=chosen,
            learning_rates=rates if chosen["kind"] == "adam" else priors,
        )
        for name, chosen in options.items()
    )


def setting(curve: str, members: int, who: tuple[Contestant, ...], **changes: Any) -> Setting:
    """One curve and one size of the ensemble, which is also the budget.

    Args:
      curve: one of `CURVES`.
      members: size of the ensemble.
      who: the contestants.
      **changes: other options of the setting.

    Returns:
      The setting.
    """
    options = {
        "curve": curve,
        "members": members,
        "examples": 100,
        "test_examples": 200,
        "noise": 0.05,
        "hidden": 10,
        **changes,
    }
    return Setting(
        name=f"{curve} with {members} members",
        options=options,
        budget=f"{4 * members} evaluations on all {options['examples']} points, a gradient "
        f"counting as two; the EnKF takes {members}",
        contestants=who,
    )


PAPER = "Chen et al., 2022, abstract"
SETTINGS = tuple(
    setting(curve, members, contestants(PRIORS, RATES)) for curve in CURVES for members in MEMBERS
)


def beats(name: str, curve: str, members: int, rival: str) -> Claim:
    """The claim that ESMDA is better than gradient descent.

    Args:
      name: a letter.
      curve: one of `CURVES`.
      members: size of the ensemble.
      rival: name of the contestant that takes gradients.

    Returns:
      The claim.
    """
    among = (f"{curve} with {members} members",)
    return Claim(
        name=name,
        text=f"ESMDA has a lower error than {rival} at equal evaluations ({among[0]})",
        source=PAPER,
        criterion=f"test RMSE of {EQUAL} below that of {rival} in {among[0]}: in every seed",
        judge=InEverySeed(LowerError(method=EQUAL, rival=rival, among=among)),
        measure="rmse",
    )


def shrinks(name: str, method: str) -> Claim:
    """The claim that the spread of the ensemble falls in every iteration.

    Args:
      name: a letter.
      method: name of the contestant.

    Returns:
      The claim.
    """
    parts = tuple(Within(method=method, high=0.0, among=(each.name,)) for each in SETTINGS)
    return Claim(
        name=name,
        text=f"the spread of the ensemble shrinks in every iteration ({method})",
        source=PAPER,
        criterion="largest change of the spread from one iteration to the next below 0 in every "
        "setting: in every seed",
        judge=InEverySeed(AllOf(parts)),
        measure="rise",
    )


STUDY = Protocols(
    name="data_assimilation",
    summary="ESMDA and the EnKF against Adam on two curves, at equal evaluations of the network",
    free_rival=ADAM,
    measures={
        "rmse": Measure(
            text="root mean squared error on the test points, without noise, of the network with "
            "the mean of the members' weights",
            worst=float("inf"),
            form=".4f",
        ),
        "mean_rmse": Measure(
            text="the same of the mean of the members' outputs", worst=float("inf"), form=".4f"
        ),
        "unexplained": Measure(text="1 - R^2 on the test points", worst=float("inf"), form=".4f"),
        "rise": Measure(
            text="largest change of the spread of the ensemble from one iteration to the next",
            worst=float("inf"),
            form=".4f",
        ),
        "rank": Measure(
            text="rank of the members' deviations from their mean, of 31, to 1e-4 of the largest "
            "singular value of the first ensemble",
            worst=float("inf"),
            form=".1f",
        ),
    },
    scales={
        "smoke": Scale(
            settings=(
                setting(
                    "sine", 8, contestants((1.0,), (0.01,)), examples=10, test_examples=5, hidden=2
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(settings=SETTINGS, tuning_seeds=1, seeds=3),
        "medium": Scale(settings=SETTINGS, tuning_seeds=3, seeds=10),
        "full": Scale(settings=SETTINGS, tuning_seeds=5, seeds=30),
    },
    claims=(
        beats("a", "sine", 1_000, ADAM),
        beats("b", "mexican hat", 1_000, ADAM),
        beats("c", "sine", 50, ADAM),
        beats("d", "mexican hat", 50, ADAM),
        beats("e", "sine", 1_000, RESTARTS),
        beats("f", "mexican hat", 1_000, RESTARTS),
        shrinks("g", EQUAL),
        shrinks("h", FALLING),
    ),
    left_out="the sizes and the data of the paper, which could not be read",
)
