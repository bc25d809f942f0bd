"""A Flax NNX model as functions of pytrees: its parts, its loss as an objective, its scores.

A model is split once into ``(graphdef, params, rest)``; everything after that is a function of
pytrees, so the same step runs under ``jit``, ``vmap``, ``pmap`` and ``shard_map``.  ``rest`` is all
state that is not trained: batch statistics, random streams of dropout.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import optax_accel as oa
from experiments.training.losses import (
    Group,
    LossFn,
    find_loss,
    other_scores,
    reads_labels,
    scores_of_classes,
)

PyTree = Any


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], PyTree, PyTree]:
    """Splits a model into its static part, its parameters and the rest, all plain arrays.

    Args:
      model: a Flax NNX model.

    Returns:
      ``(graphdef, params, rest)``; ``params`` holds the ``nnx.Param`` variables.
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    # Without the `Variable` wrappers an optimizer sees arrays only, and so does a checkpoint.
    params, rest = (nnx.as_pure(state) for state in states)
    return graphdef, params, rest


def objective(
    graphdef: nnx.GraphDef[Any],
    loss: str | LossFn = "cross_entropy",
    *,
    group: Group | None = None,
) -> oa.Objective:
    """The training loss of a model: the mean over the examples of a batch, in training mode.

    The objective takes ``x``, ``y`` and ``rest`` by name: inputs, labels, and the model's other
    variables, which are held fixed, so that the loss depends on the parameters alone.  Its
    auxiliary output is ``rest`` as the pass leaves it.  With micro-batches
    (:meth:`optax_accel.Objective.accumulated`) each of them draws dropout masks of its own, and the
    random streams advance by one step, however many there are.

    >>> graphdef, params, rest = split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    >>> x, y = jnp.zeros((3, 2)), jnp.array([0, 1, 0])
    >>> (loss, _), gradient = objective(graphdef).value_and_grad(params, rest=rest, x=x, y=y)
    >>> round(float(loss), 4)  # log 2: both classes are as likely
    0.6931

    Args:
      graphdef: static part of the model.
      loss: one of `LOSSES`, or a function of outputs and labels.
      group: gives of outputs and labels the loss of a group and that of all, scalars that are means
        over the examples. The auxiliary output is then a pair, ``rest`` and these two; over
        micro-batches and replicas they are averaged one by one. ``None``: there is no group.

    Returns:
      The objective; ``bind`` and ``given`` fix what it takes by name.

    Raises:
      ValueError: unknown loss.
    """
    loss_fn = find_loss(loss)

    def predict(
        params: PyTree,
        x: jax.Array,
        rest: PyTree,
        y: jax.Array | None = None,
        micro_batch: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        # The copy is made of the tracers at hand: NNX refuses to write batch statistics that belong
        # to an outer trace, which `rest` does inside `grad`.
        before = rest if micro_batch is None else _fold_into_keys(rest, micro_batch)
        model = nnx.merge(graphdef, params, before, copy=True)
        model.train()
        inputs = (x, y) if reads_labels(loss_fn, model) else (x,)
        outputs = jax.tree.map(_at_least_float32, model(*inputs))
        after = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
        if micro_batch is not None:  # the next one folds its number into the same keys
            after = jax.tree.map(lambda new, old: old if _is_key(old) else new, after, rest)
        return outputs, after

    if group is None:
        return oa.Objective(predict, lambda outputs, y: loss_fn(outputs, y), has_aux="predict")
    return oa.Objective(
        predict, lambda outputs, y: (loss_fn(outputs, y), group(outputs, y)), has_aux="both"
    )


def evaluate(
    graphdef: nnx.GraphDef[Any],
    params: PyTree,
    rest: PyTree,
    batch: dict[str, jax.Array],
    *,
    loss: str | LossFn = "cross_entropy",
) -> dict[str, jax.Array]:
    """Scores of a model in evaluation mode (running statistics, no dropout).

    Args:
      graphdef: static part of the model.
      params: parameters.
      rest: the model's other variables.
      batch: inputs ``x``, ``(batch, ...)``, and labels ``y``: integers, ``(batch,)`` or
        ``(batch, ...)``, or whatever else the loss takes.
      loss: one of `LOSSES`, or a function of outputs and labels.

    Returns:
      ``loss``, as the loss defines it; for integer labels ``accuracy``, the share of them for which
      the output of that class is the largest; and where examples have many labels ``counted``, the
      share that is not -1. Divided by it, loss and accuracy are means over the labels that count;
      all three are means over examples before, so that batches of any size can be averaged. Some
      losses add `losses.other_scores`.

    Raises:
      ValueError: unknown loss.
    """
    loss_fn, y = find_loss(loss), batch["y"]
    model = nnx.merge(graphdef, params, rest, copy=True)
    model.eval()
    inputs = (batch["x"], y) if reads_labels(loss_fn, model) else (batch["x"],)
    outputs = jax.tree.map(_at_least_float32, model(*inputs))
    scores = {"loss": loss_fn(outputs, y)} | other_scores(loss_fn, outputs, y)
    if jnp.issubdtype(y.dtype, jnp.integer):
        correct = jnp.argmax(scores_of_classes(outputs), axis=-1) == y  # never where y is -1
        scores["accuracy"] = jnp.mean(correct.astype(jnp.float32))
        if y.ndim > 1:
            scores["counted"] = jnp.mean((y >= 0).astype(jnp.float32))
    return scores


def _at_least_float32(x: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _fold_into_keys(rest: PyTree, number: jax.Array) -> PyTree:
    """The same variables with other random keys, derived from them and a number."""
    fold = jnp.vectorize(jax.random.fold_in)
    return jax.tree.map(lambda leaf: fold(leaf, number) if _is_key(leaf) else leaf, rest)
