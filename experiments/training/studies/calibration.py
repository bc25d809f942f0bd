r"""What predicted probabilities are worth: accuracy, likelihood and calibration.

The calibration error is how far the confidence of a prediction, its largest probability, is from
the share of predictions that are right. With B bins of equal width, bin b holding the :math:`n_b`
of the n examples whose confidence lies in ((b - 1) / B, b / B],

.. math:: ECE = \sum_b \frac{n_b}{n} \, |accuracy_b - confidence_b|.

It is never negative, so few examples make it too large: compare it only on equal numbers of them.

References:
  Guo et al., `On calibration of modern neural networks <https://arxiv.org/abs/1706.04599>`_,
  section 2: expected calibration error (ECE), here too with 15 bins.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BINS = 15  # Guo et al., section 2


def average(probabilities: Any, last: int | None = None) -> np.ndarray:
    """The prediction of an ensemble: the mean of its members' probabilities.

    >>> average([[[0.8, 0.2]], [[0.4, 0.6]]]).round(3)
    array([[0.6, 0.4]])

    Args:
      probabilities: `(members, examples, classes)`.
      last: number of members, the last ones, to average; default: all.

    Returns:
      `(examples, classes)`, float64.

    Raises:
      ValueError: another shape, or fewer than `last` members.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 3 or not len(probabilities):
        raise ValueError(
            "`probabilities` must have the shape (members, examples, classes) with at least one "
            f"member, got {probabilities.shape}."
        )
    members = len(probabilities)
    last = members if last is None else last
    if not 1 <= last <= members:
        raise ValueError(f"`last` must lie between 1 and the {members} members, got {last}.")
    return probabilities[members - last :].mean(axis=0)


def calibration_error(probabilities: Any, labels: Any, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal width.

    >>> calibration_error([[0.75, 0.25]] * 4, [0, 0, 0, 1])  # sure to 3/4, right in 3 of 4
    0.0
    >>> calibration_error([[1.0, 0.0]] * 4, [1, 1, 1, 1])
    1.0

    Args:
      probabilities: `(examples, classes)`.
      labels: integers, `(examples,)`.
      bins: number of bins; 15 in the paper.

    Returns:
      A number between 0, calibrated, and 1, sure and wrong.

    Raises:
      ValueError: wrong shapes, no bin, or rows that are not probabilities.
    """
    probabilities, labels = _check(probabilities, labels)
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}.")
    confidence = np.minimum(probabilities.max(axis=1), 1.0)  # rounding
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    # n_b cancels: the sums of each bin are all it takes.
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def scores(probabilities: Any, labels: Any, bins: int = BINS) -> dict[str, float]:
    """Accuracy, mean negative log likelihood and calibration error of one prediction.

    >>> scores([[0.5, 0.5], [0.0, 1.0]], [0, 1])
    {'accuracy': 1.0, 'nll': 0.346..., 'calibration_error': 0.25}

    Args:
      probabilities: `(examples, classes)`.
      labels: integers, `(examples,)`.
      bins: number of bins of the calibration error; 15 in the paper.

    Returns:
      `accuracy`, `nll` (infinite where a label has probability 0) and `calibration_error`. A
      prediction that is not finite, from a diverged training, is a failure: accuracy 0, NLL
      infinite, calibration error NaN.

    Raises:
      ValueError: wrong shapes, no bin, or rows that are not probabilities.
    """
    if not np.all(np.isfinite(probabilities)):
        return {"accuracy": 0.0, "nll": math.inf, "calibration_error": math.nan}
    probabilities, labels = _check(probabilities, labels)
    with np.errstate(divide="ignore"):
        log_likelihood = np.log(probabilities[np.arange(len(labels)), labels])
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == labels)),
        "nll": -float(log_likelihood.mean()),
        "calibration_error": calibration_error(probabilities, labels, bins),
    }


def _check(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            "`probabilities` must have the shape (examples, classes) and `labels` (examples,), "
            f"with at least one example, got {probabilities.shape} and {labels.shape}."
        )
    # float32 softmax rounds by far less.
    sums = probabilities.sum(axis=1)
    if not (np.all(probabilities >= 0) and np.allclose(sums, 1, rtol=0, atol=1e-3)):
        raise ValueError(
            "`probabilities` must not be negative and add up to 1 in each row; outputs of a "
            "network become probabilities by softmax."
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"`labels` must lie between 0 and {probabilities.shape[1] - 1}, got "
            f"{labels.min()} to {labels.max()}."
        )
    return probabilities, labels
