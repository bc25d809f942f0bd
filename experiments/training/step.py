"""The training step: batch -> objective -> gradient -> update -> new parameters, as one function.

It is a pure function of pytrees and the same for every model, method and parallel mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import optax_accel as oa
from experiments.training.optimizers import find_in_state, find_schedule_free

PyTree = Any
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that one step reads and writes.

    Attributes:
      step: number of steps done, int32 scalar.
      params: the trained parameters.
      rest: the model's other variables (batch statistics, random streams).
      opt_state: the state of the optimizer.
      average: moving averages of ``(params, rest)``, ``None`` where none are kept.
    """

    step: jax.Array
    params: PyTree
    rest: PyTree
    opt_state: PyTree
    average: PyTree = None


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a training step does besides the update; static.

    Attributes:
      accumulate: number of micro-batches, of each replica's part of the batch. The curvature batch
        is divided into micro-batches of the same size.
      unroll: whether the micro-batches are written one after the other in the program instead of
        in a loop, which is much faster for convolutions on a CPU (jax#12868).
      per_worker: whether each replica is a worker with a state of its own, whose optimizer gets the
        gradient of that worker alone. Only the metrics are averaged.
      skip_non_finite: whether a step that is not finite leaves everything but ``step`` as it was.
      ema: decay of the moving averages, for a state that has them: after step t they are the means
        of parameters and other variables after the steps up to t, with weights that fall by this
        factor a step. ``None``: the state has none.
      value_fn: the objective on which the optimizer evaluates the loss itself, and products with
        its curvature, e.g. that of the same model computing in float32. ``None``: the objective
        that is differentiated.
      shares: whether the auxiliary output of the objective is a pair, the model's variables and
        the losses of a group and of all (see `networks.objective`), whose ratio the metrics hold.
      norms_every: in every how many steps the metrics hold the norms that `norm_names` lists, which
        are NaN in the others; 0 for never.
    """

    accumulate: int = 1
    unroll: bool = False
    per_worker: bool = False
    skip_non_finite: bool = False
    ema: float | None = None
    value_fn: oa.Objective | None = None
    shares: bool = False
    norms_every: int = 0


PLAIN = StepOptions()


def init_state(
    tx: optax.GradientTransformation, params: PyTree, rest: PyTree = (), *, average: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      params: initial parameters.
      rest: initial other variables of the model; by default it has none.
      average: whether to keep moving averages of both, for a `train_step` with ``ema``.

    Returns:
      A state with ``step == 0``.
    """
    # Copied: a buffer can be given to the next step only once.
    start = jax.tree.map(jnp.copy, (params, rest)) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, rest, tx.init(params), start)


def averaged(state: TrainState) -> TrainState:
    """The state to evaluate: with averages in place of the parameters, if it has any.

    These are the moving averages of parameters and statistics; where none are kept, the average of
    a schedule-free optimizer, whose parameters are only the points at which it takes gradients
    (Defazio et al., 2024, section 2).

    >>> state = TrainState(jnp.array(1), jnp.ones(()), (), (), average=(jnp.zeros(()), ()))
    >>> float(averaged(state).params)
    0.0

    Args:
      state: the state behind a step.

    Returns:
      A state whose ``params`` and ``rest`` are the averages.
    """
    if state.average is not None:
        params, rest = state.average
        return state._replace(params=params, rest=rest)
    inner = find_schedule_free(state.opt_state)
    if inner is None:
        return state
    return state._replace(params=_schedule_free_average(inner, state.params))


_schedule_free_average = jax.jit(optax.contrib.schedule_free_eval_params)


def train_step(
    tx: optax.GradientTransformationExtraArgs,
    objective: oa.Objective,
    state: TrainState,
    batch: Batch,
    curvature: Batch | None = None,
    *,
    refresh: bool | str | None = None,
    axis_name: str | None = None,
    options: StepOptions = PLAIN,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on one batch.

    The optimizer gets every extra argument a method of this project can ask for; those that do
    not ask ignore them, and XLA drops what nobody uses.

    With micro-batches the optimizer still makes one update, with the mean gradient, and what it is
    given to evaluate is the mean over the micro-batches too: of a model without batch statistics
    and dropout the whole batch's, up to rounding.  Batch normalization normalizes each micro-batch
    by itself, and its running statistics are updated once for each, one after the other.  Each
    micro-batch draws dropout masks of its own.

    Where the state of the optimizer has a ``loss_scale`` (`optax_accel.dynamic_loss_scale`), the
    loss is multiplied by it before it is differentiated.

    Args:
      tx: the optimizer.
      objective: the training loss (`networks.objective`, or any other). It takes the entries of
        ``batch`` by name. If the model has other variables, it also takes them as ``rest`` and
        returns them, as the pass leaves them, as its auxiliary output.
      state: the state before the step.
      batch: arrays with a leading axis of examples, by name, such as ``x`` and ``y``; under
        ``axis_name`` this replica's part.
      curvature: the batch on which curvature is estimated, with the entries of ``batch``.
        ``None``: ``batch`` itself.
      refresh: static; what the optimizer does about its curvature estimate in this step
        (``Method.refresh``). ``None`` for methods without curvature or to decide in the graph. With
        ``"sample"`` (`optax_accel.gradsamp`) neither the loss nor its gradient is evaluated.
      axis_name: axis over which replicas are averaged (``pmap``, ``shard_map``). Batch
        normalization uses the statistics of each replica's own batch, and its running statistics
        are averaged.
      options: static; micro-batches, workers, skipped steps, averages, another ``value_fn``.

    Returns:
      The new state and scalar metrics, the same on all replicas: ``loss``, the training loss at
      the point where the method evaluated it (the current one, except for extragradient: the
      extrapolated point; NaN of a step that evaluates none), and ``finite``, whether that loss,
      if any, the new parameters, the other variables and the optimizer's moments (arrays shaped
      like a parameter) all are finite, or the loss scale has left the step out and fallen. With
      ``options.norms_every`` also ``gradient_norm``, the Euclidean norm over all parameters of the
      gradient that the optimizer was given, without its loss scale, and ``update_norm``, that of
      the update, learning rate included; of several workers the means of theirs. With
      ``options.shares`` also ``share``, the group's loss over that of all, both summed over all
      examples, replicas and workers before; NaN where there is no loss.
    """

    def loss_on(objective: oa.Objective, batch: Batch, num_micro_batches: int) -> oa.Objective:
        if axis_name is not None and not options.per_worker:
            objective = objective.averaged_over(axis_name)
        return objective.accumulated(
            num_micro_batches, unroll=options.unroll, carry={"rest": state.rest}, **batch
        )

    scale = find_in_state(state.opt_state, "loss_scale")
    loss = loss_on(objective, batch, options.accumulate)
    scaled = loss if scale is None else loss.scaled(scale)
    sampled = refresh == "sample"  # an epoch that is not trained: nothing is evaluated
    if sampled:
        value, grads = (
            jnp.full((), jnp.nan, jnp.float32),
            jax.tree.map(jnp.zeros_like, state.params),
        )
        rest = state.rest
    else:
        value, grads = scaled.value_and_grad(state.params)
        value, rest = value if loss.has_aux else (value, state.rest)
    share = {}
    if options.shares:
        rest, parts = (rest, (jnp.zeros(()), jnp.zeros(()))) if sampled else rest
        share = {"share": _share(parts, axis_name if options.per_worker else None)}

    evaluated = objective if options.value_fn is None else options.value_fn
    extra_args: dict[str, Any] = {
        "value": value,
        "grad": grads,
        "value_fn": loss_on(evaluated, batch, options.accumulate),
    }
    if curvature is not None:
        number = math.ceil(options.accumulate * _num_examples(curvature) / _num_examples(batch))
        extra_args["curvature_value_fn"] = loss_on(evaluated, curvature, number)
    if refresh is not None:
        extra_args["refresh"] = refresh
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra_args)
    params = optax.apply_updates(state.params, updates)

    new = TrainState(state.step + 1, params, rest, opt_state, state.average)
    if scale is not None:  # a step that overflowed was left out
        new = new._replace(
            rest=_where(find_in_state(opt_state, "gradient_finite"), rest, state.rest)
        )
        value = value / scale
    norms: dict[str, jax.Array] = {}
    if options.norms_every:
        norms = _norms(grads, updates, norm_names(opt_state), new.step, options.norms_every)
        if scale is not None and "gradient_norm" in norms:
            norms["gradient_norm"] /= scale
        if sampled and "gradient_norm" in norms:
            norms["gradient_norm"] = value
    alarming = jnp.zeros(()) if sampled else None
    metrics = _metrics(
        value, state, new, norms, axis_name if options.per_worker else None, alarming
    )
    metrics |= share
    if options.ema is not None:
        new = new._replace(average=_moving_average(new, options.ema))
    if options.skip_non_finite:
        new = _where(metrics["finite"], new, state)._replace(step=new.step)
    return new, metrics


def _share(parts: tuple[jax.Array, jax.Array], axis_name: str | None) -> jax.Array:
    """The loss of the group over that of all; both are averaged over the axis before, if any."""
    part, whole = parts if axis_name is None else lax.pmean(parts, axis_name)
    return part.astype(jnp.float32) / whole.astype(jnp.float32)


def _norms(
    grads: PyTree, updates: PyTree, names: Sequence[str], step: jax.Array, every: int
) -> dict[str, jax.Array]:
    """The norms by name; NaN where they are not due in this step, counted from 1."""
    trees = {"gradient_norm": grads, "update_norm": updates}

    def computed() -> dict[str, jax.Array]:
        return {name: _norm(trees[name]) for name in names}

    if every == 1:
        return computed()
    shapes = jax.eval_shape(computed)
    missing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
    return lax.cond(step % every == 0, computed, lambda: missing)


def norm_names(opt_state: PyTree) -> tuple[str, ...]:
    """The norms that `train_step` can tell of a step without computing more for them.

    Args:
      opt_state: the state of the optimizer; shapes will do.

    Returns:
      ``update_norm``, and before it ``gradient_norm``, but for a method that evaluates the loss
      elsewhere: XLA drops the gradient at the current parameters, which its norm would bring back.
    """
    elsewhere = find_in_state(opt_state, "objective_value") is not None
    return ("update_norm",) if elsewhere else ("gradient_norm", "update_norm")


def _metrics(
    value: jax.Array,
    before: TrainState,
    after: TrainState,
    norms: dict[str, jax.Array],
    axis_name: str | None,
    alarming: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """``loss``, ``finite`` and norms of a step; over the workers of an axis, if one is named.

    ``alarming`` stands for the loss where ``finite`` looks at it.
    """
    # A method that evaluates the loss elsewhere keeps that value in its state. Reporting it lets
    # XLA drop the pass at the current parameters where the method has no use for it.
    evaluated = find_in_state(after.opt_state, "objective_value")
    loss = value if evaluated is None else evaluated
    alarming = loss if alarming is None else alarming
    scale = find_in_state(before.opt_state, "loss_scale")
    if scale is not None:  # an overflow is no alarm as long as a lower scale may help
        left_out = ~find_in_state(after.opt_state, "gradient_finite")
        fell = find_in_state(after.opt_state, "loss_scale") < scale
        alarming = jnp.where(left_out & fell, 0, alarming)
    check = _total((after.params, after.rest, _shaped_like(after.opt_state, after.params)))
    if axis_name is not None:
        loss, alarming, check, norms = lax.pmean((loss, alarming, check, norms), axis_name)
    return {"loss": loss, "finite": jnp.isfinite(alarming) & jnp.isfinite(check), **norms}


def _shaped_like(opt_state: PyTree, params: PyTree) -> list[jax.Array]:
    """The arrays of an optimizer's state that have the shape of a parameter: its moments."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim}
    return [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape in shapes]


def _norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all entries, computed in float32 at least."""

    def squares(x: jax.Array) -> jax.Array:
        return jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

    return jnp.sqrt(_total(jax.tree.map(squares, tree)))


def _total(tree: PyTree) -> jax.Array:
    """A sum over all floating-point entries: not finite if one of them is not."""

    def total(x: jax.Array) -> jax.Array:
        # As a product with ones: several times faster on a CPU than a sum or `all(isfinite)`.
        rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        ones = jnp.ones(rows.shape[-1], x.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.sum(jnp.matmul(rows, ones, preferred_element_type=wide))

    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    return jnp.asarray(sum(map(total, floats), start=0.0), jnp.float32)


def _moving_average(state: TrainState, decay: float) -> PyTree:
    """The averages after a step, of its parameters and variables and the averages before it."""
    # The weights add up to one from the first step on, and the initial values do not count.
    steps = state.step.astype(jnp.float32)
    weight = (1 - decay) / -jnp.expm1(steps * math.log(decay))

    def average(new: jax.Array, old: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(new.dtype, jnp.inexact)  # others are counters and random keys
        return optax.incremental_update(new, old, weight) if is_float else new

    return jax.tree.map(average, (state.params, state.rest), state.average)


def _where(condition: jax.Array, tree: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), tree, other)


def _num_examples(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
