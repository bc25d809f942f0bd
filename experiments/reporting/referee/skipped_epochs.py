"""The study of GradSamp: do sampled epochs save gradients without loss?

Of 30 epochs those numbered 7, 10, ..., 28 are skipped, and the parameters sampled instead. The
rivals take as many gradients: doing nothing in the skipped epochs, which is to train 22 epochs with
the schedule compressed; repeating the increment of the epoch before; and noise of its norm in a
random direction. What is public of the method is its abstract, so that estimators and schedule are
ours, and so are the criteria, which were fixed before the first run.

References:
  Revanth, Channappayya and Mohan, `Minimizing energy costs in deep learning model training
  <https://arxiv.org/abs/2406.07332>`_, 2024, abstract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.referee.judging import AllOf, ByBootstrap, LowerError
from experiments.reporting.referee.protocols import (
    ERROR,
    Claim,
    Contestant,
    Measure,
    Protocols,
    Scale,
    Setting,
)

FULL, FEWER, INCREMENT, ISOTROPIC = "30 epochs", "22 epochs", "Increment", "Isotropic noise"
GRADSAMP = "GradSamp, {}"
TENSOR, MODEL, ELEMENT = (GRADSAMP.format(each) for each in ("tensor", "model", "element"))
INSTEAD = {
    FULL: "training",
    FEWER: "nothing",
    INCREMENT: "increment",
    ISOTROPIC: "isotropic",
    TENSOR: "tensor",
    MODEL: "model",
    ELEMENT: "element",
}
RATES = {"sgd": (0.01, 0.03, 0.1, 0.3), "adam": (0.0003, 0.001, 0.003, 0.01)}
DIGITS, IMAGES, REVIEWS = "digits", "cifar10_5k", "sst2_1k"


def setting(
    task: str,
    model: str,
    model_options: Mapping[str, Any],
    *,
    optimizer: str = "sgd",
    batch_size: int = 64,
    epochs: int = 30,
    rates: tuple[float, ...] | None = None,
    names: Sequence[str] = tuple(INSTEAD),
) -> Setting:
    """One task with all contestants.

    Args:
      task: the data set.
      model: name of the model.
      model_options: its options.
      optimizer: ``"sgd"`` or ``"adam"``.
      batch_size: examples per step.
      epochs: those that are trained or skipped.
      rates: the grid of all contestants; None for that of the optimizer.
      names: of the contestants.

    Returns:
      The setting.
    """
    rates = RATES[optimizer] if rates is None else rates
    return Setting(
        name=task,
        options={
            "task": task,
            "model": model,
            "model_options": dict(model_options),
            "optimizer": optimizer,
            "epochs": epochs,
            "batch_size": batch_size,
            "period": 3,
            "start": 5,
        },
        budget=f"{epochs} epochs, from the sixth on the last of every three skipped",
        contestants=tuple(
            Contestant(name=name, options={"instead": INSTEAD[name]}, learning_rates=rates)
            for name in names
        ),
        files=task != DIGITS,
    )


def claims(task: str, names: str) -> tuple[Claim, ...]:
    """The claims about one of the settings.

    Args:
      task: its name.
      names: a letter for each claim.

    Returns:
      One claim for each of the three estimators, two of the default one against its rivals.
    """
    interval = "all of the 95 % bootstrap interval over seeds > 0"

    def saves(name: str, method: str) -> Claim:
        margins = (
            LowerError(method=method, rival=FULL, slack=0.005, among=(task,)),
            LowerError(method=method, rival=FEWER, among=(task,)),
        )
        return Claim(
            name=name,
            text=f"{method} saves gradients without loss ({task})",
            source="Revanth et al., 2024, abstract",
            criterion=f"the lesser of (test error of {FULL}, less that of {method}, + 0.005) and "
            f"(test error of {FEWER}, less that of {method}): {interval}",
            judge=ByBootstrap(AllOf(margins), settings=False),
        )

    def beats(name: str, rival: str) -> Claim:
        margin = LowerError(method=TENSOR, rival=rival, among=(task,))
        return Claim(
            name=name,
            text=f"{TENSOR} beats {rival.lower()} ({task})",
            source="ours",
            criterion=f"test error of {rival}, less that of {TENSOR}: {interval}",
            judge=ByBootstrap(margin, settings=False),
        )

    return (
        *(
            saves(name, method)
            for name, method in zip(names, (TENSOR, MODEL, ELEMENT), strict=False)
        ),
        *(
            beats(name, rival)
            for name, rival in zip(names[3:], (INCREMENT, ISOTROPIC), strict=True)
        ),
    )


SMALL_TRANSFORMER = {
    "embedding_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "feedforward_size": 64,
}
STUDY = Protocols(
    name="skipped_epochs",
    summary="GradSamp against fewer epochs, repeated increments and isotropic noise",
    free_rival=FEWER,
    measures={
        "error": ERROR,
        "gradients": Measure(text="gradients taken, relative to those of all epochs", worst=1.0),
    },
    scales={
        "smoke": Scale(
            settings=(
                setting(
                    DIGITS,
                    "mlp",
                    {"hidden_sizes": [8]},
                    batch_size=512,
                    epochs=9,
                    rates=(0.1,),
                    names=(FULL, FEWER, TENSOR),
                ),
            ),
            tuning_seeds=1,
            seeds=2,
        ),
        "small": Scale(
            settings=(
                setting(DIGITS, "mlp", {}),
                setting(IMAGES, "mlp", {"hidden_sizes": [32]}, batch_size=128),
                setting(REVIEWS, "transformer", SMALL_TRANSFORMER, optimizer="adam"),
            ),
            tuning_seeds=1,
            seeds=5,
        ),
        **{
            name: Scale(
                settings=(
                    setting(DIGITS, "mlp", {}),
                    setting(IMAGES, model, {}, batch_size=128),
                    setting(REVIEWS, "transformer", {}, optimizer="adam"),
                ),
                tuning_seeds=2,
                seeds=5,
            )
            for name, model in (("medium", "cnn"), ("full", "resnet20"))
        },
    },
    claims=(*claims(DIGITS, "abcde"), *claims(IMAGES, "fghij"), *claims(REVIEWS, "klmno")),
    left_out="measured energy, for which gradients stand; the paper's networks and settings, which "
    "are not public; at the scale small an MLP in place of a convolutional network",
)
