"""The studies of extrapolation and large batches: who needs how much, and where the batch ends.

One study for each kind of network, with the same claims: networks for images, an LSTM and a
Transformer that predict the next token, whose error is the share of wrong tokens.

The settings differ in the batch only, and have the same number of passes over the data; the target
is the same. Eight workers share a batch for post-local SGD and for local extrapolation. Costs are
gradients of one batch, so that a method with two gradients in a step needs no more steps than its
rival where it needs no more than twice the rival's gradients. The criteria were fixed before the
first run.

References:
  Lin, Kong, Stich, Jaggi, `Extrapolation for large-batch training in deep learning
  <https://arxiv.org/abs/2006.05720>`_, ICML 2020, abstract.

  Lin, Stich, Patel, Jaggi, `Don't use large mini-batches, use local SGD
  <https://arxiv.org/abs/1808.07217>`_, ICLR 2020, abstract.

  Foret, Kleiner, Mobahi, Neyshabur, `Sharpness-aware minimization
  <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, section 3.

  Shallue, Lee, Antognini, Sohl-Dickstein, Frostig, Dahl, `Measuring the effects of data parallelism
  <https://arxiv.org/abs/1811.03600>`_, JMLR 20, 2019, section 4: the steps fall in proportion to
  the batch, then less, then not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from experiments.methods import METHODS
from experiments.methods.gradients import EXTRAP_NOISE, EXTRAP_UNIFORM
from experiments.reporting.referee.judging import AtMost, ByBootstrap, LowerError
from experiments.reporting.referee.sequential import SequentialTest
from experiments.reporting.referee.study import Claim, Contestant, Scale, Setting, Study

NESTEROV, EXTRAP, PAST, NOISE = "Nesterov", "Extrap-SGD", "Extrap-SGD past", "Extrap-SGD noise"
LOCAL, POST_LOCAL, SAM = "Extrap-SGD local", "post-local SGD", "SAM"
CONTESTANTS = (
    Contestant(name=NESTEROV, trials=(METHODS["nesterov_sgd"],)),
    Contestant(name=EXTRAP, trials=(METHODS["extrap_sgd"],)),
    Contestant(name=PAST, trials=(METHODS["extrap_sgd_past"],)),
    Contestant(name=NOISE, trials=(EXTRAP_NOISE,)),
    Contestant(name="Extrap-SGD uniform noise", trials=(EXTRAP_UNIFORM,)),
    Contestant(name=LOCAL, trials=(METHODS["extrap_sgd_local"],)),
    Contestant(name=POST_LOCAL, trials=(METHODS["post_local_sgd"],)),
    Contestant(name=SAM, trials=(METHODS["sam_sgd"],)),
    Contestant(name="GNP", trials=(METHODS["gnp_sgd"],)),
)
BATCH, LARGE, WHOLE = "batch", "large_batch", "whole_set"


def scale(
    task: str,
    model: str,
    epochs: int,
    sizes: tuple[int, int, int],
    target: float,
    *,
    seeds: int,
    tuning_seeds: int = 2,
    examples: int | None = None,
    model_options: Mapping[str, Any] = MappingProxyType({}),
) -> Scale:
    """The same network with three batches.

    Args:
      task: the data set.
      model: name of the model.
      epochs: passes over the training examples.
      sizes: examples per step of the three.
      target: validation accuracy to which the cost is counted.
      seeds: fresh seeds of the final runs, of which a sequential test may ask for twice as many.
      tuning_seeds: seeds of every trial.
      examples: number of training examples that are used; None for all.
      model_options: options of the model besides its defaults.

    Returns:
      A scale with the three settings.
    """
    settings = tuple(
        Setting(
            name=name,
            task=task,
            model=model,
            epochs=epochs,
            contestants=CONTESTANTS,
            batch_size=size,
            target=target,
            examples=examples,
            model_options=dict(model_options),
            workers=8,
        )
        for name, size in zip((BATCH, LARGE, WHOLE), sizes, strict=True)
    )
    return Scale(settings=settings, tuning_seeds=tuning_seeds, seeds=seeds, most_seeds=2 * seeds)


_TEST = SequentialTest(sigma=0.2, planned=8)
_CRITERION = "one-sided sequential test of level 0.05, sigma 0.2 for a seed"


def _cheaper(name: str, text: str, source: str, method: str, share: float) -> Claim:
    return Claim(
        name=name,
        text=text,
        source=source,
        criterion=f"mean logarithm of the ratio of the gradients to {share:g} x Nesterov's, with "
        f"the largest batch, < 0: {_CRITERION}",
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
        text=f"{method} has a lower error than Nesterov with the largest batch",
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
    _scales("h", NESTEROV, WHOLE, LARGE, "from there to the largest one"),
    _scales("i", EXTRAP, WHOLE, LARGE, "from there to the largest one"),
    _lower("j", POST_LOCAL, "Lin et al., 2020 (local SGD), abstract"),
    _cheaper(
        "k", "local extrapolation reaches the target in no more steps than Nesterov", _LIN, LOCAL, 2
    ),
)


STUDY = Study(
    name="extrapolation",
    summary="extrapolated gradients, local steps, SAM and GNP, batches of 64 to the whole set",
    free_rival=NESTEROV,
    unit="gradients",
    scales={
        "small": dataclasses.replace(
            scale("digits", "mlp", 50, (64, 256, 1024), 0.9, seeds=8, tuning_seeds=1),
            own_tuning=True,
        ),
        "medium": scale("mnist5k", "mlp", 60, (256, 1024, 4096), 0.9, seeds=6),
        "full": scale("cifar10_5k", "resnet20", 100, (256, 1024, 4096), 0.5, seeds=5),
    },
    claims=CLAIMS,
    left_out="a rate of the extrapolation other than the learning rate; the largest batches are "
    "1,024 of 1,077 and 4,096 of 5,000 examples",
)
LSTM = Study(
    name="extrapolation_lstm",
    summary="the claims of extrapolation with an LSTM that predicts letters or words",
    free_rival=NESTEROV,
    unit="gradients",
    scales={
        "medium": scale(
            *("tiny_shakespeare", "lstm_lm", 20, (32, 128, 512), 0.35),
            seeds=4,
            examples=2048,
            model_options={"hidden_size": 128, "num_layers": 1},
        ),
        "full": scale(
            *("wikitext2", "lstm_lm", 10, (64, 256, 1024), 0.2),
            seeds=4,
            model_options={"hidden_size": 200, "tied": True, "dropout_rate": 0.2},
        ),
    },
    claims=CLAIMS,
    left_out="a scale small; the networks of Lin et al., which have 1,500 units; batches beyond "
    "1,024 windows",
)
TRANSFORMER = Study(
    name="extrapolation_transformer",
    summary="the claims of extrapolation with a Transformer that predicts letters",
    free_rival=NESTEROV,
    unit="gradients",
    scales={
        "medium": scale(
            *("tiny_shakespeare", "transformer_lm", 20, (32, 128, 512), 0.35),
            seeds=4,
            examples=2048,
            model_options={"embedding_size": 64, "num_layers": 2, "num_heads": 2},
        ),
        "full": scale(
            *("tiny_shakespeare", "transformer_lm", 20, (32, 128, 512), 0.5),
            seeds=4,
            model_options={"embedding_size": 128, "num_layers": 4, "num_heads": 4},
        ),
    },
    claims=CLAIMS,
    left_out="a scale small; Adam, by which Lin et al. train their Transformer for translation; "
    "medium reads 2,048 windows of the text",
)
STUDIES = (STUDY, LSTM, TRANSFORMER)
