"""The study of StochGradAdam: does sampling gradient entries help, with clean and wrong examples?

Wrong examples are in the training split only; learning rates are chosen on the clean validation
split, errors are those on the clean test split. The criteria were fixed before the first run. The
paper's tables were not at hand: what is judged is its abstract; the claims on wrong examples are
ours.

References:
  Yun, `StochGradAdam: accelerating neural networks training with stochastic gradient sampling
  <https://arxiv.org/abs/2310.17042>`_, 2023, abstract.
"""

from __future__ import annotations

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


def settings(task: str, model: str, epochs: int, batch_size: int = 64) -> tuple[Setting, ...]:
    """Clean training examples, 20 and 40 % wrong labels, 20 % inputs of noise.

    Args:
      task: the data set.
      model: name of the model.
      epochs: passes over the training split.
      batch_size: examples per step.

    Returns:
      The four settings.
    """
    return tuple(
        Setting(
            name=name,
            task=task,
            model=model,
            epochs=epochs,
            contestants=CONTESTANTS,
            batch_size=batch_size,
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
        "small": Scale(
            settings=settings("digits", "mlp", 20), tuning_seeds=3, seeds=12, most_seeds=20
        ),
        "medium": Scale(
            settings=settings("cifar10_5k", "cnn", 20, 128), tuning_seeds=2, seeds=6, most_seeds=12
        ),
        "full": Scale(
            settings=settings("cifar10", "resnet20", 40, 128),
            tuning_seeds=2,
            seeds=5,
            most_seeds=10,
        ),
    },
    claims=CLAIMS,
    left_out="U-Net on ISBI, which labels pixels and has no error to rank by here; ViT-Ti; small "
    "trains a multilayer perceptron in place of a convolutional network",
)
