r"""Pruning directed by sharpness: a loss made flat along the weights that are about to be pruned.

Until it prunes, the method trains at the worst point of a small ball in the space of the weights
that pruning is about to remove, as SAM does in the space of all of them:

.. math::
  \epsilon = \rho\, \frac{p \odot g}{\|p \odot g\|}, \qquad
  g = \nabla L(w), \qquad g' = \nabla L(w + \epsilon) ,

where :math:`p` is 1 for the entries of each tensor with the smallest absolute values, as many as
the sparsity says.  Then :math:`w \leftarrow (1 - p) \odot w`, and these entries stay 0.  What that
costs is predicted by one Hessian product,

.. math::
  L((1 - p) \odot w) - L(w) \approx
  -g^\top (p \odot w) + \tfrac12 (p \odot w)^\top H (p \odot w) .

Inspired by Ren and Honavar, `EsaCL <https://arxiv.org/abs/2401.05667>`_, 2024, which prunes without
retraining, guided by the sharpness of the loss, and selects the examples from which the landscape
is estimated.  Neither its pruning criterion nor its settings are used here: the formulas above, the
choice by magnitude, and all defaults are ours.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._arguments import (
    HOLD_FIXED,
    as_arrays,
    check_count,
    check_inner,
    check_number,
    check_real_leaves,
    is_placeholder,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, resolve, with_fixed_leaves
from optax_accel._mesh_axes import filled_like, with_auto_axes
from optax_accel._numerics import vdot, zeros
from optax_accel.gradient_norm import perturb
from optax_accel.objective import Objective, ValueFn
from optax_accel.refresh import Cost, announce_cost


class SharpnessDirectedState(NamedTuple):
    """State of :func:`sharpness_directed`.

    Attributes:
      count: number of updates made; int32 scalar.
      pruned: the entries that are about to be pruned, and from ``prune_step`` on are 0; booleans
        like the parameters.
      gradient_norm: the norm of the gradient of these entries at the parameters of the last step;
        infinity before the first step; float32 scalar.
      inner_state: state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    pruned: chex.ArrayTree
    gradient_norm: jax.Array
    inner_state: chex.ArrayTree


def sharpness_directed(
    inner: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    sparsity: optax.ScalarOrSchedule,
    prune_step: int,
    refresh_every: int = 100,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with any optimizer where the loss is worst for pruning, and then prunes.

    Two gradients a step, at the parameters and at a point ahead of them; ``update`` needs
    ``value_fn`` (an :class:`~optax_accel.Objective` or a function of the parameters), the loss of
    the incoming gradient with the same batch and the same key of dropout, and ``params``.  Wrap the
    whole optimizer, weight decay included: what stands behind it in a chain may move pruned
    entries.  To train on after ``prune_step`` with one gradient a step, or with another optimizer,
    use :func:`keep_pruned`.

    Args:
      inner: transformation or optimizer that takes the steps.
      rho: radius of the perturbation, at least 0, float or schedule; 0.05 by default, SAM's.
      sparsity: share of the entries of each tensor that are pruned, in [0, 1], float or schedule.
        Of a schedule the value at ``prune_step - 1`` is the final sparsity. The number of entries
        is rounded to the nearest integer.
      prune_step: number of updates, at least 1, after which the entries are 0 and stay so.
      refresh_every: number of steps after which the entries with the smallest absolute values are
        looked up again, at least 1; 100 by default. The last step before ``prune_step`` always
        does.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the tensors to prune, usually without biases and normalization, as
        ``lambda params: jax.tree.map(lambda p: p.ndim > 1, params)``. ``None`` (default): all.

    Returns:
      A transformation with state :class:`SharpnessDirectedState`.

    Raises:
      ValueError: an argument outside its range; in ``update``: missing ``value_fn`` or ``params``.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: jnp.sum((p - jnp.array([1.0, 0.1, -0.2, 2.0])) ** 2)
      >>> tx = oa.sharpness_directed(optax.adam(0.1), sparsity=0.5, prune_step=30)
      >>> @jax.jit
      ... def train_step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.ones(4)
      >>> state = tx.init(params)
      >>> for _ in range(40):
      ...     params, state = train_step(params, state)
      >>> [bool(entry == 0) for entry in params]
      [False, True, True, False]

    References:
      Ren and Honavar, `EsaCL <https://arxiv.org/abs/2401.05667>`_, 2024; Foret et al.,
      `Sharpness-aware minimization <https://arxiv.org/abs/2010.01412>`_, 2021.
    """
    check_inner(inner)
    check_number("rho", rho, 0, allow_schedule=True)
    check_number("sparsity", sparsity, 0, 1, allow_schedule=True)
    check_count("prune_step", prune_step, 1)
    check_count("refresh_every", refresh_every, 1)
    base = optax.with_extra_args_support(inner)
    method = functools.partial(_directed, base, rho, sparsity, prune_step, refresh_every)
    return with_fixed_leaves(method, mask)


def _directed(
    inner: optax.GradientTransformationExtraArgs,
    rho: optax.ScalarOrSchedule,
    sparsity: optax.ScalarOrSchedule,
    prune_step: chex.Numeric,
    refresh_every: chex.Numeric,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    name = "sharpness_directed"

    def init_fn(params: chex.ArrayTree) -> SharpnessDirectedState:
        check_params(params, name)
        check_selected(params, mask, name)
        announce_cost(Cost("a gradient at the perturbed point", 1))
        return SharpnessDirectedState(
            count=jnp.zeros((), jnp.int32),
            pruned=jax.tree.map(lambda p: filled_like(zeros(p.shape, bool), p), params),
            gradient_norm=jnp.full((), jnp.inf, jnp.float32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: SharpnessDirectedState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, SharpnessDirectedState]:
        objective = as_objective(
            value_fn, extra_args, method=name, params=params, why="take the gradient ahead"
        )
        last = state.count == prune_step - 1
        due = (state.count < prune_step) & ((state.count % refresh_every == 0) | last)
        share = value_of(sparsity, state.count)
        pruned = lax.cond(
            due, lambda: _smallest(params, share, resolve(params, mask)), lambda: state.pruned
        )
        direction = jax.tree.map(lambda g, p: jnp.where(p, g, 0), updates, pruned)
        radius = jnp.where(state.count < prune_step, value_of(rho, state.count), 0)
        ahead, length = perturb(params, direction, radius, None)
        gradient = jax.tree.map(lambda h, g: h.astype(g.dtype), objective.grad(ahead), updates)
        prunes = state.count >= prune_step - 1
        gradient = _without(gradient, pruned, state.count >= prune_step)
        inner_args = {**extra_args, "value_fn": value_fn}
        if "grad" in inner_args:
            inner_args["grad"] = gradient
        new_updates, inner_state = inner.update(gradient, state.inner_state, params, **inner_args)
        return _to_zero(new_updates, params, pruned, prunes), SharpnessDirectedState(
            count=optax.safe_increment(state.count),
            pruned=pruned,
            gradient_norm=jnp.asarray(length, jnp.float32),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class KeepPrunedState(NamedTuple):
    """State of :func:`keep_pruned`.

    Attributes:
      pruned: the entries that are kept at 0; booleans like the parameters.
      inner_state: state of the inner transformation.
    """

    pruned: chex.ArrayTree
    inner_state: chex.ArrayTree


def keep_pruned(
    inner: optax.GradientTransformation, pruned: chex.ArrayTree
) -> optax.GradientTransformationExtraArgs:
    """Keeps pruned entries at 0 while any optimizer trains the others.

    The optimizer sees a gradient of 0 for pruned entries, and whatever it returns for them, as
    momentum and weight decay do, they are set to 0.

    Args:
      inner: the optimizer; with all that stands behind it in a chain.
      pruned: the entries to keep at 0, boolean arrays like the parameters: the field ``pruned`` of
        the state of :func:`sharpness_directed`, or what :func:`smallest_entries` returns.

    Returns:
      A transformation with state :class:`KeepPrunedState`. Its ``update`` needs ``params``.

    Raises:
      ValueError: in ``init``: ``pruned`` does not fit the parameters; in ``update``: missing
        ``params``.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> params = jnp.array([0.0, 2.0])
      >>> tx = oa.keep_pruned(optax.adam(0.1), jnp.array([True, False]))
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> [round(float(x), 2) for x in updates]
      [0.0, -0.1]
    """
    check_inner(inner)
    base = optax.with_extra_args_support(inner)

    def init_fn(params: chex.ArrayTree) -> KeepPrunedState:
        if is_placeholder(params):
            return KeepPrunedState(params, base.init(params))
        check_real_leaves(params, "keep_pruned", HOLD_FIXED)
        return KeepPrunedState(_fitting(pruned, params, "keep_pruned"), base.init(params))

    def update_fn(
        updates: chex.ArrayTree,
        state: KeepPrunedState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, KeepPrunedState]:
        if params is None:
            raise ValueError("keep_pruned needs the parameters: tx.update(grads, state, params).")
        gradient = _without(updates, state.pruned, True)
        if "grad" in extra_args:
            extra_args["grad"] = gradient
        new_updates, inner_state = base.update(gradient, state.inner_state, params, **extra_args)
        new_updates = _to_zero(new_updates, params, state.pruned, True)
        return new_updates, KeepPrunedState(state.pruned, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def smallest_entries(
    params: chex.ArrayTree, sparsity: chex.Numeric, *, mask: Mask = None
) -> chex.ArrayTree:
    """The entries of each tensor with the smallest absolute values: magnitude pruning.

    Args:
      params: the parameters, real floating-point arrays.
      sparsity: their share of each tensor, in [0, 1]; the number of entries is rounded to the
        nearest integer.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the tensors to prune. ``None`` (default): all.

    Returns:
      Boolean arrays like the parameters. Of entries of one size those of lower indices are chosen,
      so that all devices agree.

    Raises:
      ValueError: ``sparsity`` outside its range, or ``mask`` does not fit the parameters.
      TypeError: parameters that are not real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> oa.smallest_entries(jnp.array([0.3, -0.1, 2.0, 0.2]), 0.5).tolist()
      [False, True, False, True]
    """
    check_number("sparsity", sparsity, 0, 1)
    check_real_leaves(params, "smallest_entries", "leave it out")
    return _smallest(as_arrays(params), sparsity, resolve(params, mask))


def _smallest(
    params: chex.ArrayTree, sparsity: chex.Numeric, chosen: chex.ArrayTree | None
) -> chex.ArrayTree:
    def of_leaf(share: jax.Array, leaf: jax.Array) -> jax.Array:
        number = jnp.round(share * leaf.size).astype(jnp.int32)
        order = jnp.argsort(jnp.abs(leaf).ravel(), stable=True)
        first = lax.broadcasted_iota(jnp.int32, order.shape, 0) < number
        found = jnp.zeros(leaf.size, bool).at[order].set(first, unique_indices=True)
        return found.reshape(leaf.shape)

    share = jnp.asarray(sparsity, jnp.float32)
    chosen = jax.tree.map(lambda _: True, params) if chosen is None else chosen
    return jax.tree.map(
        lambda leaf, is_chosen: (
            with_auto_axes(of_leaf, share, leaf, out_like=leaf)
            if is_chosen and leaf.size
            else filled_like(jnp.zeros((), bool), leaf)
        ),
        params,
        chosen,
    )


def _without(gradient: chex.ArrayTree, pruned: chex.ArrayTree, where: Any) -> chex.ArrayTree:
    return jax.tree.map(lambda g, p: jnp.where(p & where, 0, g), gradient, pruned)


def _to_zero(
    updates: chex.ArrayTree, params: chex.ArrayTree, pruned: chex.ArrayTree, where: Any
) -> chex.ArrayTree:
    """Updates that make the pruned entries 0."""
    return jax.tree.map(
        lambda u, x, p: jnp.where(p & where, 0 - x.astype(u.dtype), u), updates, params, pruned
    )


def _fitting(pruned: chex.ArrayTree, params: chex.ArrayTree, name: str) -> chex.ArrayTree:
    """``pruned`` as arrays, checked against the parameters."""

    def fit(leaf: Any, entries: Any) -> jax.Array:
        if jnp.shape(entries) != jnp.shape(leaf) or jnp.result_type(entries) != np.dtype(bool):
            raise ValueError(
                f"a leaf of shape {jnp.shape(leaf)} has one of shape {jnp.shape(entries)} and "
                f"dtype {jnp.result_type(entries)}"
            )
        return jnp.asarray(entries)

    try:
        return jax.tree.map(fit, params, pruned)
    except ValueError as error:
        raise ValueError(
            f"`pruned` of {name} must be boolean arrays like the parameters: {error}."
        ) from error


# -- what pruning costs, and which examples tell ---------------------------------------------------


def predicted_increase(
    objective: Objective | ValueFn, params: chex.ArrayTree, pruned: chex.ArrayTree
) -> jax.Array:
    r"""How much the loss will rise when entries are set to 0, by its second-order expansion.

    :math:`-g^\top (p \odot w) + \frac12 (p \odot w)^\top H (p \odot w)`, by one gradient and one
    Hessian product: exact on quadratics.  The lowest value chooses among candidates.

    Args:
      objective: the loss, an :class:`~optax_accel.Objective` or a function of the parameters.
      params: the parameters, real floating-point arrays.
      pruned: the entries that would be set to 0, boolean arrays like the parameters.

    Returns:
      The predicted increase, a scalar.

    Raises:
      ValueError: ``pruned`` does not fit the parameters.
      TypeError: parameters that are not real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * (w - 1) ** 2)
      >>> params = jnp.array([2.0, 1.0])
      >>> [float(oa.predicted_increase(loss, params, jnp.arange(2) == i)) for i in range(2)]
      [0.0, 2.0]

    References:
      The criterion of LeCun et al., Optimal brain damage, 1989, with all of the Hessian.
    """
    if not isinstance(objective, Objective):
        objective = Objective.from_value_fn(objective)
    objective = objective.without_aux
    check_real_leaves(params, "predicted_increase", "leave it out")
    params = as_arrays(params)
    pruned = _fitting(pruned, params, "predicted_increase")
    removed = jax.tree.map(lambda w, p: jnp.where(p, w, 0), params, pruned)
    product = objective.hvp(params, removed)
    return 0.5 * vdot(removed, product) - vdot(objective.grad(params), removed)


def el2n_scores(logits: chex.Array, labels: chex.Array) -> jax.Array:
    """How wrong a classifier is about each example: the norm of its error in probabilities.

    Args:
      logits: of shape (examples, classes).
      labels: the classes, integers of shape (examples,).

    Returns:
      Scores of shape (examples,), from 0 (right and sure) to the square root of 2.

    Raises:
      ValueError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> scores = oa.el2n_scores(jnp.array([[0.0, 0.0], [9.0, 0.0]]), jnp.array([0, 1]))
      >>> [round(float(score), 3) for score in scores]
      [0.707, 1.414]

    References:
      Paul, Ganguli and Dziugaite, `Deep learning on a data diet
      <https://arxiv.org/abs/2107.07075>`_, 2021, definition 2.3.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "`logits` must have the shape (examples, classes) and `labels` (examples,), got "
            f"{logits.shape} and {labels.shape}."
        )
    error = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return jnp.linalg.norm(error, axis=-1)


def select_examples(scores: chex.Array, fraction: float) -> np.ndarray:
    """The examples with the highest scores, from which to estimate the loss around the parameters.

    Args:
      scores: one number for each example, such as :func:`el2n_scores` or the norms of their
        gradients; of shape (examples,).
      fraction: the share of the examples to select, in (0, 1].

    Returns:
      Their indices, ascending, int32: the nearest integer to ``fraction * examples``, at least one.
      Of equal scores those of lower indices are selected.

    Raises:
      ValueError: ``fraction`` outside its range, or scores that are empty, not a vector, or NaN.

    Example:
      >>> import optax_accel as oa
      >>> oa.select_examples([0.1, 0.9, 0.9, 0.3], 0.5).tolist()
      [1, 2]
    """
    check_number("fraction", fraction, 0, 1, open_low=True)
    known = np.asarray(scores, np.float64)
    if known.ndim != 1 or not known.size or np.isnan(known).any():
        raise ValueError(
            "`scores` must be a vector with a number for each example, got the shape "
            f"{known.shape}{' with NaN' if np.isnan(known).any() else ''}."
        )
    number = max(1, round(float(fraction) * known.size))
    return np.sort(np.argsort(-known, kind="stable")[:number]).astype(np.int32)
