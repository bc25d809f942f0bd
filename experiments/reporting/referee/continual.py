"""The study of sharpness-directed pruning: do pruned networks learn on without retraining?

Five tasks of two classes, one after the other, and a pruning to the sparsity of the setting after
each. The method is inspired by EsaCL, of which only the abstract is public: it prunes without any
retraining, after steps whose gradient is taken where the entries to be pruned are perturbed, and
chooses the examples. Rivals are pruning by magnitude after plain steps, with a quarter of the steps
for retraining and without, and after those of sharpness-aware minimization, which perturbs all
entries. The criteria were fixed before the first run.

References:
  Ren and Honavar, `EsaCL: an efficient continual learning algorithm
  <https://arxiv.org/abs/2401.05667>`_, 2024, abstract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.reporting.referee.judging import ByBootstrap, LowerError
from experiments.reporting.referee.protocols import (
    ERROR,
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

RETRAINED, MAGNITUDE, DIRECTED, SAM = "Retrained", "Magnitude", "Directed", "SAM"
CHOSEN, RANDOM = "Directed, EL2N quarter", "Directed, random quarter"
RHO = 0.05
OPTIONS: dict[str, dict[str, Any]] = {
    RETRAINED: {"rule": "plain", "retrained": True},
    MAGNITUDE: {"rule": "plain"},
    DIRECTED: {"rule": "directed", "rho": RHO},
    SAM: {"rule": "sam", "rho": RHO},
    CHOSEN: {"rule": "directed", "rho": RHO, "examples": "el2n"},
    RANDOM: {"rule": "directed", "rho": RHO, "examples": "random"},
}
SPARSITIES = (50, 75, 90)  # per cent
QUARTERS = 75  # the sparsity at which examples are chosen
RATES = (0.003, 0.01, 0.03, 0.1)


def setting(
    task: str,
    percent: int,
    *,
    hidden_sizes: Sequence[int] = (100, 100),
    steps: int = 150,
    batch_size: int = 32,
    rates: tuple[float, ...] = RATES,
    names: Sequence[str] | None = None,
) -> Setting:
    """One data set and one sparsity.

    Args:
      task: the data set, of images of ten classes.
      percent: the sparsity.
      hidden_sizes: of the perceptron.
      steps: of each of the five tasks.
      batch_size: examples per step.
      rates: the grid of all contestants.
      names: of the contestants; None for all that belong to this sparsity.

    Returns:
      The setting.
    """
    if names is None:
        names = tuple(OPTIONS) if percent == QUARTERS else (RETRAINED, MAGNITUDE, DIRECTED, SAM)
    return Setting(
        name=f"{task}_{percent}",
        options={
            "task": task,
            "hidden_sizes": list(hidden_sizes),
            "steps": steps,
            "batch_size": batch_size,
            "sparsity": percent / 100,
        },
        budget=f"5 tasks of {steps} steps of {batch_size}, {percent} % of the trunk pruned after "
        "each",
        contestants=tuple(
            Contestant(name=name, options=OPTIONS[name], learning_rates=rates) for name in names
        ),
        files=task != "digits",
    )


def claims(task: str, start: str) -> tuple[Claim, ...]:
    """The claims about one data set.

    Args:
      task: its name.
      start: what their names begin with.

    Returns:
      Two claims for each sparsity, and two about the examples.
    """
    paper, interval = "Ren and Honavar, 2024, abstract", "all of the 95 % bootstrap interval > 0"

    def lower(
        name: str, text: str, source: str, method: str, rival: str, percent: int, slack: float = 0.0
    ) -> Claim:
        where = f"{task}_{percent}"
        plus = f" + {slack:g}" if slack else ""
        return Claim(
            name=f"{start}{name}",
            text=f"{text} ({where})",
            source=source,
            criterion=f"mean test error of the tasks of {rival}, less that of {method},{plus}: "
            f"{interval}, over seeds",
            judge=ByBootstrap(
                LowerError(method=method, rival=rival, slack=slack, among=(where,)), settings=False
            ),
        )

    within, beyond = "directed pruning comes within a point of retraining", "direction matters"
    return (
        *(
            lower(f"{i}a", within, paper, DIRECTED, RETRAINED, percent, 0.01)
            for i, percent in enumerate(SPARSITIES, start=1)
        ),
        *(
            lower(f"{i}b", f"{beyond}: directed beats SAM", "ours", DIRECTED, SAM, percent)
            for i, percent in enumerate(SPARSITIES, start=1)
        ),
        *(
            lower(f"{i}c", "directed beats magnitude alone", "ours", DIRECTED, MAGNITUDE, percent)
            for i, percent in enumerate(SPARSITIES, start=1)
        ),
        lower("d", "EL2N chooses better than chance", paper, CHOSEN, RANDOM, QUARTERS),
        lower(
            "e",
            "a quarter of the examples costs a point at most",
            paper,
            CHOSEN,
            DIRECTED,
            QUARTERS,
            0.01,
        ),
    )


STUDY = Protocols(
    name="continual",
    summary="sharpness-directed pruning in continual learning, with retraining and without",
    free_rival=MAGNITUDE,
    measures={
        "error": ERROR,
        "forgetting": Measure(
            text="accuracy of a task just after it, less that after the last, the mean of four",
            worst=1.0,
        ),
        "sparsity": Measure(text="share of zeros of the trunk's matrices at the end", worst=1.0),
    },
    scales={
        "smoke": Scale(
            settings=(
                setting(
                    "digits",
                    50,
                    hidden_sizes=(8,),
                    steps=8,
                    batch_size=8,
                    rates=(0.1,),
                    names=(MAGNITUDE, DIRECTED),
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(
                *(setting("digits", percent) for percent in SPARSITIES),
                setting("mnist5k", SPARSITIES[-1]),
            ),
            tuning_seeds=2,
            seeds=8,
        ),
        **{
            name: Scale(
                settings=tuple(
                    setting(task, percent, hidden_sizes=(width, width), steps=steps, batch_size=64)
                    for task in ("digits", "mnist5k")
                    for percent in SPARSITIES
                ),
                tuning_seeds=3,
                seeds=10,
            )
            for name, width, steps in (("medium", 200, 400), ("full", 400, 1_000))
        },
    },
    claims=(*claims("digits", "d"), *claims("mnist5k", "m")),
    left_out="the benchmarks of pictures of the paper, and its rivals (SparCL with rehearsal)",
)
