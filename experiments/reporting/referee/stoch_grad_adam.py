"""The studies of StochGradAdam: does sampling gradients help, with clean and wrong examples?

One study for each kind of network, with the same claims: convolutional ones (a multilayer
perceptron at the scale "small"), ViT-Ti, and a U-Net, whose labels and errors are those of pixels.

Wrong examples are in the training split only; learning rates are chosen on the clean validation
split, errors are those on the clean test split. The criteria were fixed before the first run. The
paper's tables were not at hand: what is judged is its abstract; the claims on wrong examples are
ours. At the scale "small" every seed is tuned anew; the first entries in `evidence/` come from one
tuning on three seeds for all, which put Adam at a rate of .003 and StochGradAdam at .03.

References:
  Yun, `StochGradAdam: accelerating neural networks training with stochastic gradient sampling
  <https://arxiv.org/abs/2310.17042>`_, 2023, abstract.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from experiments.methods import METHODS
from experiments.reporting.referee.judging import AtMost, ByBootstrap, LowerError
from experiments.reporting.referee.sequential import SequentialTest
from experiments.reporting.referee.study import Claim, Contestant, Scale, Setting, Study

ADAM, SAMPLED = "Adam", "StochGradAdam"
CONTESTANTS = (
    Contestant(name=ADAM, trials=(METHODS["adam"],)),
    Contestant(name=SAMPLED, trials=(METHODS["stoch_grad_adam"],)),
    Contestant(name="SGD momentum", trials=(METHODS["sgd"],)),
)
CLEAN, NOISE_20, NOISE_40, OUTLIERS = "clean", "label_noise_20", "label_noise_40", "outliers_20"


def scale(
    task: str,
    model: str,
    epochs: int,
    *,
    seeds: int,
    most_seeds: int,
    tuning_seeds: int = 2,
    batch_size: int = 128,
    target: float | None = None,
    model_options: Mapping[str, Any] = MappingProxyType({}),
) -> Scale:
    """Clean training examples, 20 and 40 % wrong labels, 20 % inputs of noise.

    Args:
      task: the data set.
      model: name of the model.
      epochs: passes over the training split.
      seeds: fresh seeds of the final runs.
      most_seeds: how many of these the sequential test may ask for.
      tuning_seeds: seeds of every trial.
      batch_size: examples per step.
      target: validation accuracy to which the steps are counted; None for the task's own.
      model_options: options of the model besides its defaults.

    Returns:
      A scale with the four settings.
    """
    settings = tuple(
        Setting(
            name=name,
            task=task,
            model=model,
            epochs=epochs,
            contestants=CONTESTANTS,
            batch_size=batch_size,
            target=target,
            model_options=dict(model_options),
            label_noise=label_noise,
            outliers=outliers,
        )
        for name, label_noise, outliers in (
            (CLEAN, 0.0, 0.0),
            (NOISE_20, 0.2, 0.0),
            (NOISE_40, 0.4, 0.0),
            (OUTLIERS, 0.0, 0.2),
        )
    )
    return Scale(settings=settings, tuning_seeds=tuning_seeds, seeds=seeds, most_seeds=most_seeds)


def _lower(name: str, words: str, source: str, setting: str) -> Claim:
    return Claim(
        name=name,
        text=f"StochGradAdam has a lower error than Adam {words}",
        source=source,
        criterion=f"test error of Adam, less that of StochGradAdam, in {setting} > 0: all of the "
        "95 % bootstrap interval over seeds",
        judge=ByBootstrap(LowerError(method=SAMPLED, rival=ADAM, among=(setting,)), settings=False),
    )


CLAIMS = (
    _lower("a", "on clean examples", "Yun, 2023, abstract", CLEAN),
    _lower("b", "with 20 % wrong labels", "ours", NOISE_20),
    _lower("c", "with 40 % wrong labels", "ours", NOISE_40),
    _lower("d", "with 20 % outliers", "ours", OUTLIERS),
    Claim(
        name="e",
        text="StochGradAdam reaches the target in no more steps than Adam on clean examples",
        source="Yun, 2023, title: accelerating",
        criterion="mean logarithm of the ratio of the steps < 0: one-sided sequential test of "
        "level 0.05, sigma 0.2 for a seed",
        judge=AtMost(
            method=SAMPLED,
            rival=ADAM,
            share=1.0,
            test=SequentialTest(sigma=0.2, planned=10),
            among=(CLEAN,),
        ),
    ),
)
STUDY = Study(
    name="stoch_grad_adam",
    summary="StochGradAdam and Adam on clean examples, wrong labels and outliers",
    free_rival=ADAM,
    unit="steps",
    scales={
        "small": dataclasses.replace(
            scale("digits", "mlp", 20, batch_size=64, tuning_seeds=1, seeds=12, most_seeds=20),
            own_tuning=True,
        ),
        "medium": scale("cifar10_5k", "cnn", 20, seeds=6, most_seeds=12),
        "full": scale("cifar10_5k", "resnet20", 40, seeds=5, most_seeds=10),
    },
    claims=CLAIMS,
    left_out="the whole of CIFAR-10; small trains a multilayer perceptron in place of a "
    "convolutional network",
)
VIT = Study(
    name="stoch_grad_adam_vit",
    summary="the claims of stoch_grad_adam with ViT-Ti, patches of 4 pixels",
    free_rival=ADAM,
    unit="steps",
    scales={
        name: scale(
            "cifar10_5k",
            "vit_ti",
            epochs,
            seeds=seeds,
            most_seeds=2 * seeds,
            target=target,
            model_options={"patch_size": 4},
        )
        for name, epochs, seeds, target in (("medium", 10, 4, 0.35), ("full", 40, 5, 0.4))
    },
    claims=CLAIMS,
    left_out="a scale small: a step takes a second on two cores",
)
UNET = Study(
    name="stoch_grad_adam_unet",
    summary="the claims of stoch_grad_adam with a U-Net on membranes of cells, errors of pixels",
    free_rival=ADAM,
    unit="steps",
    scales={
        name: scale(
            "segmentation",
            "unet",
            epochs,
            seeds=seeds,
            most_seeds=2 * seeds,
            batch_size=8,
            target=0.85,
            model_options={"width": width, "norm": "batch"},
        )
        for name, epochs, seeds, width in (("medium", 5, 4, 8), ("full", 20, 5, 16))
    },
    claims=CLAIMS,
    left_out="a scale small; the challenge's scores, which compare borders; the paper's width 64",
)
STUDIES = (STUDY, VIT, UNET)
