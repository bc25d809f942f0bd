"""The losses of the tasks, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.data.tasks import LOSSES as LOSSES_OF_KIND
from experiments.data.tasks import Defaults
from models import capsnet, deq_flow, detector, ncsn, vae


def _cross_entropy(outputs: jax.Array, y: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    if y.ndim == outputs.ndim and jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.mean(optax.softmax_cross_entropy(outputs, _smooth(y, label_smoothing)))
    counts = y >= 0
    labels = jnp.where(counts, y, 0)
    if label_smoothing:
        targets = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
        losses = optax.softmax_cross_entropy(outputs, _smooth(targets, label_smoothing))
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.mean(jnp.where(counts, losses, 0))


def _smooth(targets: jax.Array, label_smoothing: float) -> jax.Array:
    return optax.smooth_labels(targets, label_smoothing) if label_smoothing else targets


def _mse(outputs: jax.Array, y: jax.Array) -> jax.Array:
    if y.ndim < outputs.ndim:
        y = jax.nn.one_hot(y, outputs.shape[-1], dtype=outputs.dtype)
    return jnp.mean(0.5 * jnp.sum((outputs - y) ** 2, axis=-1))


def _elbo(outputs: vae.VaeOutputs, y: jax.Array) -> jax.Array:
    return jnp.mean(vae.negative_elbo(outputs, y))


def _margin(outputs: jax.Array | capsnet.CapsNetOutputs, y: jax.Array) -> jax.Array:
    if not isinstance(outputs, dict):
        return jnp.mean(capsnet.margin_loss(outputs, y))
    margins = capsnet.margin_loss(outputs["lengths"], y)
    return jnp.mean(margins + capsnet.reconstruction_loss(outputs["images"], outputs["inputs"]))


def _score_matching(outputs: ncsn.NcsnOutputs, y: jax.Array) -> jax.Array:
    del y  # the images, of which the outputs hold the noise that was added
    return jnp.mean(ncsn.denoising_score_matching(outputs))


def _flow(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return deq_flow.correction_loss(outputs, y)


def _detection(outputs: detector.DetectorOutputs, y: jax.Array) -> jax.Array:
    return jnp.mean(detector.detection_loss(outputs, y))


def _small_boxes(outputs: detector.DetectorOutputs, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = detector.cell_losses(outputs, y)
    return detector.small_and_all(losses.boxes, losses.targets)


def _small_classes(outputs: detector.DetectorOutputs, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = detector.cell_losses(outputs, y)
    return detector.small_and_all(losses.classes, losses.targets)


LossFn = Callable[[Any, jax.Array], jax.Array]
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
    "elbo": _elbo,
    "margin": _margin,
    "score_matching": _score_matching,
    "flow": _flow,
    "detection": _detection,
}
# The loss of a group of a batch and that of all of it, means over the examples, by the name that
# `--follow` has for it.
Group = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
GROUPS: dict[str, Group] = {"box": _small_boxes, "class": _small_classes}
# Losses of single models, which take the place of their tasks' defaults.
LOSS_OF_MODEL = {"capsnet": "margin"}
# The distribution whose parameters are the outputs, by loss, where K-FAC knows one.
LIKELIHOODS = {"cross_entropy": "categorical", "mse": "gaussian"}


def find_loss(loss: str | LossFn, *, label_smoothing: float = 0.0) -> LossFn:
    """The loss of that name, a function of a batch's outputs and labels.

    * ``cross_entropy`` is softmax cross-entropy of outputs ``(..., classes)`` against integers
      ``(...)``, or shares of the classes ``(..., classes)`` where examples are mixed. A label of -1
      (padding of sentences) does not count: the loss is the mean over all positions, those of -1
      as 0, so that it is linear in the examples, on several devices and in parts of a batch too.
    * ``mse`` is half the sum of squares over the outputs ``(batch, classes)``, against 1 for the
      label and 0 for the others, as in Song et al. (2024).
    * ``elbo`` is the bound of a variational autoencoder, `models.vae.negative_elbo`; its labels are
      the images.
    * ``margin`` is the loss of a capsule network, `models.capsnet.margin_loss`, and for a network
      that rebuilds its inputs also `models.capsnet.reconstruction_loss` (see `reads_labels`).
    * ``score_matching`` is that of a score network, `models.ncsn.denoising_score_matching`.
    * ``flow`` is the absolute error of optical flow, `models.deq_flow.correction_loss`.
    * ``detection`` is that of a detector, `models.detector.detection_loss`; its labels are boxes.

    All are means over the examples.

    >>> outputs, y = jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([0, 1])
    >>> float(find_loss("mse")(outputs, y))
    0.125

    Args:
      loss: one of `LOSSES`, or a function, which is returned as it is.
      label_smoothing: share of the label that goes to all classes alike, at least 0 and below 1
        (Szegedy et al., 2016, section 7); ``cross_entropy`` only.

    Returns:
      The function; it returns a scalar.

    Raises:
      ValueError: unknown loss, or one that has no labels to smooth.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; valid: {', '.join(LOSSES)}")
    if not label_smoothing:
        return LOSSES[loss]
    if loss != "cross_entropy":
        raise ValueError(f"label smoothing is for the loss cross_entropy, not for {loss}")
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label smoothing must be at least 0 and below 1, got {label_smoothing}")
    return functools.partial(_cross_entropy, label_smoothing=label_smoothing)


def choose(loss: str | None, model: str | None, defaults: Defaults) -> str:
    """The loss of a run.

    Args:
      loss: the one that a person names, if any.
      model: name of the model; `None` for that of the task.
      defaults: those of the task.

    Returns:
      The loss named, or that of the model if it has one and the task allows it, or the task's.
    """
    own = LOSS_OF_MODEL.get(model or defaults.model)
    return loss or (own if own in LOSSES_OF_KIND[defaults.kind] else None) or defaults.loss


def reads_labels(loss: LossFn, model: Any) -> bool:
    """Whether a model is called with the labels as well as the inputs, to compute its loss.

    The decoder of a capsule network reads the capsule of the true class (Sabour et al., 2017,
    section 4.1).

    Args:
      loss: what `find_loss` returns.
      model: the model.
    """
    return loss is _margin and getattr(model, "reconstructs", False)


def other_scores(loss: LossFn, outputs: Any, y: jax.Array) -> dict[str, jax.Array]:
    """What an evaluation reports besides the loss and the accuracy, or needs for that.

    Args:
      loss: what `find_loss` returns.
      outputs: those of a model in evaluation mode.
      y: the labels.

    Returns:
      For the loss ``flow`` the ``end_point_error``, `models.deq_flow.end_point_error`, the mean
      over the examples; for ``detection`` the ``detections``, rows of `models.detector.detections`.
    """
    if loss is _detection:
        return {"detections": detector.detections(outputs)}
    return {"end_point_error": deq_flow.end_point_error(outputs, y)} if loss is _flow else {}


def scores_of_classes(outputs: Any) -> jax.Array:
    """The outputs of which the largest is the predicted class: logits, or a capsule's lengths."""
    scores: jax.Array = outputs["lengths"] if isinstance(outputs, dict) else outputs
    return scores
