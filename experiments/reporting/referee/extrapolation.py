"""The study of extrapolation and large batches: who needs how much, and where the batch ends.

The settings differ in the batch only, and have the same number of passes over the data; the target
is the same. Costs are gradients of one batch, so that a method with two gradients in a step needs
no more steps than its rival where it needs no more than twice the rival's gradients. The criteria
were fixed before the first run.

References:
  Lin, Kong, Stich, Jaggi, `Extrapolation for large-batch training in deep learning
  <https://arxiv.org/abs/2006.05720>`_, ICML 2020, abstract.

  Foret, Kleiner, Mobahi, Neyshabur, `Sharpness-aware minimization
  <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, section 3.

  Shallue, Lee, Antognini, Sohl-Dickstein, Frostig, Dahl, `Measuring the effects of data parallelism
  <https://arxiv.org/abs/1811.03600>`_, JMLR 20, 2019, section 4: the steps fall in proportion to
  the batch, then less, then not at all.
"""

from __future__ import annotations

from experiments.methods import METHODS
from experiments.methods.gradients import EXTRAP_NOISE
from experiments.reporting.referee.judging import AtMost, ByBootstrap, LowerError
from experiments.reporting.referee.sequential import SequentialTest
from experiments.reporting.referee.study import Claim, Contestant, Scale, Setting, Study

NESTEROV, EXTRAP, PAST, NOISE = "Nesterov", "Extrap-SGD", "Extrap-SGD past", "Extrap-SGD noise"
SAM = "SAM"
CONTESTANTS = (
    Contestant(name=NESTEROV, trials=(METHODS["nesterov_sgd"],)),
    Contestant(name=EXTRAP, trials=(METHODS["extrap_sgd"],)),
    Contestant(name=PAST, trials=(METHODS["extrap_sgd_past"],)),
    Contestant(name=NOISE, trials=(EXTRAP_NOISE,)),
    Contestant(name=SAM, trials=(METHODS["sam_sgd"],)),
    Contestant(name="GNP", trials=(METHODS["gnp_sgd"],)),
)
BATCH, LARGE, WHOLE = "batch", "large_batch", "whole_set"


def settings(
    task: str, model: str, epochs: int, sizes: tuple[int, int, int], target: float
) -> tuple[Setting, ...]:
    """The same network with three batches.

    Args:
      task: the data set.
      model: name of the model.
      epochs: passes over the training split.
      sizes: examples per step of the three.
      target: validation accuracy to which the cost is counted.

    Returns:
      The settings.
    """
    return tuple(
        Setting(
            name=name,
            task=task,
            model=model,
            epochs=epochs,
            contestants=CONTESTANTS,
            batch_size=size,
            target=target,
        )
        for name, size in zip((BATCH, LARGE, WHOLE), sizes, strict=True)
    )


_TEST = SequentialTest(sigma=0.2, planned=8)
_CRITERION = "one-sided sequential test of level 0.05, sigma 0.2 for a seed"


def _cheaper(name: str, text: str, source: str, method: str, share: float) -> Claim:
    return Claim(
        name=name,
        text=text,
        source=source,
        criterion=f"mean logarithm of the ratio of the gradients to {share:g} x Nesterov's, with "
        f"the whole set as batch, < 0: {_CRITERION}",
        judge=AtMost(method=method, rival=NESTEROV, share=share, test=_TEST, among=(WHOLE,)),
    )


def _scales(name: str, method: str, large: str, small: str, words: str) -> Claim:
    return Claim(
        name=name,
        text=f"the steps of {method} fall in proportion to the batch {words}",
        source="Shallue et al., 2019, section 4",
        criterion=f"steps with four times the batch, over those without, <= 1/3 (1/4 is in "
        f"proportion): {_CRITERION}",
        judge=AtMost(
            method=method,
            rival=method,
            share=1 / 3,
            test=_TEST,
            among=(large,),
            rival_among=(small,),
        ),
    )


def _lower(name: str, method: str, source: str) -> Claim:
    return Claim(
        name=name,
        text=f"{method} has a lower error than Nesterov with the whole set as batch",
        source=source,
        criterion=f"test error of Nesterov, less that of {method}, > 0: all of the 95 % bootstrap "
        "interval over seeds",
        judge=ByBootstrap(
            LowerError(method=method, rival=NESTEROV, among=(WHOLE,)), settings=False
        ),
    )


_LIN = "Lin et al., 2020, abstract"
CLAIMS = (
    _cheaper("a", "Extrap-SGD reaches the target in no more steps than Nesterov", _LIN, EXTRAP, 2),
    _cheaper("b", "Extrap-SGD reaches it with no more gradients", "ours", EXTRAP, 1),
    _cheaper("c", "past gradients reach it with no more gradients", _LIN, PAST, 1),
    _cheaper("d", "noise reaches it with no more gradients", _LIN, NOISE, 1),
    _lower("e", EXTRAP, _LIN),
    _lower("f", SAM, "Foret et al., 2021, section 3"),
    _scales("g", NESTEROV, LARGE, BATCH, "up to four times the small one"),
    _scales("h", NESTEROV, WHOLE, LARGE, "from there to the whole set"),
    _scales("i", EXTRAP, WHOLE, LARGE, "from there to the whole set"),
)


def _scale(settings: tuple[Setting, ...], tuning_seeds: int, seeds: int) -> Scale:
    return Scale(settings=settings, tuning_seeds=tuning_seeds, seeds=seeds, most_seeds=2 * seeds)


STUDY = Study(
    name="extrapolation",
    summary="extrapolated gradients, SAM and GNP from batches of 64 to the whole set",
    free_rival=NESTEROV,
    unit="gradients",
    scales={
        "small": _scale(settings("digits", "mlp", 50, (64, 256, 1024), 0.9), 2, 8),
        "medium": _scale(settings("mnist5k", "mlp", 60, (256, 1024, 4096), 0.9), 2, 6),
        "full": _scale(settings("cifar10_5k", "resnet20", 100, (256, 1024, 4096), 0.5), 2, 5),
    },
    claims=CLAIMS,
    left_out="post-local SGD, whose workers keep parameters of their own; LSTM and Transformer, "
    "which do not classify and have no error to rank by here; a rate of the extrapolation other "
    "than the learning rate; the largest batches are 1,024 of 1,077 and 4,096 of 5,000 examples",
)
