"""One training step and one evaluation as pure functions: what `train` and `compare` share.

A Flax NNX model is split once into ``(graphdef, params, rest)``; everything after that is a
function of pytrees, so the same step runs under ``jit``, ``vmap``, ``pmap`` and ``shard_map``.
``rest`` is all state that is not trained: batch statistics, dropout keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import optax_accel as oa
from experiments.training.losses import LossFn, find_loss
from experiments.training.precision import PRECISIONS, Precision
from optax_accel._means import vary_over

PyTree = Any
Batch = tuple[jax.Array, jax.Array]


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
    rest: PyTree,
    x: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    loss: str | LossFn = "cross_entropy",
    axis_name: str | None = None,
    accumulate: int = 1,
    unroll: bool = False,
) -> oa.Objective:
    """The training loss of one batch, the mean over its examples, model in training mode.

    Without a batch the objective takes it by name in each call, ``objective(params, x=x, y=y)``,
    as curvature operators over many batches need it.

    Args:
      graphdef: static part of the model.
      rest: the model's other variables; held fixed, so the loss depends on parameters only.
      x: inputs, ``(batch, ...)``; ``None`` to give them in each call.
      y: integer labels, ``(batch,)``; given where ``x`` is.
      loss: one of `LOSSES`, or a function of outputs and labels.
      axis_name: axis over which replicas are averaged (``pmap``, ``shard_map``).
      accumulate: number of micro-batches (:meth:`optax_accel.Objective.accumulated`) of the batch.
      unroll: whether the micro-batches are written one after the other in the program instead of
        in a loop, which is much faster for convolutions on a CPU.

    Returns:
      An objective of the parameters.

    Raises:
      ValueError: unknown loss.
    """

    def predict(params: PyTree, x: jax.Array, micro_batch: jax.Array | None = None) -> PyTree:
        return _forward(graphdef, params, _own_keys(rest, micro_batch), x)[0]

    unbound = oa.Objective(predict, find_loss(loss), axis_name)
    if x is None:
        return unbound
    if accumulate > 1:
        return unbound.accumulated(accumulate, unroll=unroll, x=x, y=y)
    return unbound.bind(x=x, y=y)


def complete(
    tx: optax.GradientTransformation,
    learning_rate: float,
    *,
    clip: float | None = None,
    weight_decay: float = 0.0,
    precision: Precision = PRECISIONS["f32"],
) -> optax.GradientTransformationExtraArgs:
    """A method with what surrounds it: clipping in front, weight decay behind, a loss scale around.

    Weight decay is decoupled (Loshchilov and Hutter, 2019): after the method's own step the
    parameters that `is_decayed` selects shrink by ``learning_rate * weight_decay``, as in
    ``optax.adamw`` of a constant rate; what the method evaluates does not contain it.

    >>> tx = complete(optax.adam(0.1), 0.1, clip=1.0, weight_decay=0.01)
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> [round(float(updates[name].sum()), 4) for name in ("kernel", "bias")]
    [-0.004, 0.0]

    Args:
      tx: the method.
      learning_rate: its learning rate, for weight decay.
      clip: largest norm of the gradient over all parameters; longer ones are shortened to it.
        Gradients that the method takes itself, elsewhere, are not clipped.
      weight_decay: its rate, at least 0.
      precision: float16 adds `optax_accel.dynamic_loss_scale`.

    Returns:
      The optimizer.
    """
    parts = [tx]
    if clip is not None:
        parts.insert(0, optax.clip_by_global_norm(clip))
    if weight_decay:
        parts.append(optax.add_decayed_weights(-learning_rate * weight_decay, is_decayed))
    whole = optax.with_extra_args_support(tx if len(parts) == 1 else optax.chain(*parts))
    return oa.dynamic_loss_scale(whole) if precision.needs_loss_scale else whole


def is_decayed(params: PyTree) -> PyTree:
    """Mask for weight decay: all but biases and the scales and biases of normalization layers.

    >>> is_decayed({"linear": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    {'linear': {'bias': False, 'kernel': True}}

    Args:
      params: the parameters.

    Returns:
      A pytree of booleans: false for vectors and scalars, and for what is called bias or scale.
    """

    def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim > 1 and name not in ("bias", "scale")

    return jax.tree.map_with_path(decayed, params)


def averaged(state: TrainState) -> TrainState:
    """The state to evaluate: with the moving averages of parameters and statistics, if it has any.

    >>> state = TrainState(jnp.array(1), jnp.ones(()), (), (), average=(jnp.zeros(()), ()))
    >>> float(averaged(state).params)
    0.0
    """
    if state.average is None:
        return state
    params, rest = state.average
    return state._replace(params=params, rest=rest)


def init_state(
    tx: optax.GradientTransformation, params: PyTree, rest: PyTree, *, average: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
      tx: the optimizer.
      params: initial parameters.
      rest: initial other variables.
      average: whether to keep moving averages of both, for a `train_step` with ``ema``.

    Returns:
      A state with ``step == 0``.
    """
    # Copied: a buffer can be given to the next step only once.
    kept = jax.tree.map(jnp.copy, (params, rest)) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, rest, tx.init(params), kept)


def train_step(
    tx: optax.GradientTransformationExtraArgs,
    graphdef: nnx.GraphDef[Any],
    state: TrainState,
    x: jax.Array,
    y: jax.Array,
    *,
    curvature: Batch | None = None,
    refresh: bool | str | None = None,
    loss: str | LossFn = "cross_entropy",
    axis_name: str | None = None,
    per_worker: bool = False,
    skip_non_finite: bool = False,
    accumulate: int = 1,
    unroll: bool = False,
    value_fn_graphdef: nnx.GraphDef[Any] | None = None,
    ema: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on one batch.

    The optimizer gets every extra argument a method of this project can ask for; those that do
    not ask ignore them, and XLA drops what nobody uses.

    With micro-batches the optimizer still makes one update, with the mean gradient, and what it is
    given to evaluate is the mean over the micro-batches too: of a model without batch statistics
    and dropout the whole batch's, up to rounding.  Batch normalization normalizes each micro-batch
    by itself, and its running statistics are updated once for each, one after the other.  Each
    micro-batch draws masks of dropout of its own.

    Where the state of the optimizer has a ``loss_scale`` (`optax_accel.dynamic_loss_scale`), the
    loss is multiplied by it before it is differentiated.

    Args:
      tx: the optimizer.
      graphdef: static part of the model.
      state: the state before the step.
      x: inputs, ``(batch, ...)``; under ``axis_name`` this replica's part.
      y: integer labels, ``(batch,)``.
      curvature: ``(x, y)`` on which curvature is estimated; ``None`` for the batch itself.
      refresh: static; what the optimizer does about its curvature estimate in this step
        (``Method.refresh``). ``None`` for methods without curvature or to decide in the graph.
      loss: one of `LOSSES`, or a function of outputs and labels.
      axis_name: axis over which replicas are averaged. Batch normalization uses the statistics of
        each replica's own batch, and its running statistics are averaged.
      per_worker: static; each replica of ``axis_name`` is a worker with a state of its own and
        the optimizer gets that worker's own gradient. Only the metrics are averaged.
      skip_non_finite: static; a step that is not ``finite`` leaves everything but ``step`` as it
        was.
      accumulate: static; number of micro-batches (of each replica's part of the batch). The
        curvature batch is divided into ones of the same size.
      unroll: static; for convolutions on a CPU: `optax_accel.mean_over_micro_batches`.
      value_fn_graphdef: the model on which the optimizer evaluates the loss itself, and products
        with its curvature, e.g. the same one that computes in float32. ``None``: ``graphdef``.
      ema: decay of the moving averages, for a state that has them: after step t they are the means
        of what there was after the steps up to t, with weights that fall by this factor a step.

    Returns:
      The new state and scalar metrics, the same on all replicas: ``loss``, the training loss at
      the point where the method evaluated it (the current one, except for extragradient: the
      extrapolated point), and ``finite``, whether that loss, the new parameters, the other
      variables and the optimizer's moments (arrays shaped like a parameter) all are, or else the
      loss scale left the step out and fell.

    Raises:
      ValueError: unknown loss.
    """
    loss_fn = find_loss(loss)
    scale = find_in_state(state.opt_state, "loss_scale")

    def loss_and_rest(params: PyTree, rest: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        x, y = batch
        outputs, rest = _forward(graphdef, params, rest, x)
        value = loss_fn(outputs, y)
        return value if scale is None else value * scale, rest

    value_and_grad = jax.value_and_grad(loss_and_rest, has_aux=True)
    varying = vary_over(state.params, axis_name)
    if accumulate == 1:
        (value, rest), grads = value_and_grad(varying, state.rest, (x, y))
    else:

        def one(rest: PyTree, batch: Batch, index: jax.Array) -> tuple[PyTree, PyTree]:
            # Statistics are handed on; keys and counters begin like the step's, as in `objective`.
            before = _replace_floats(_own_keys(state.rest, index), rest)
            (value, after), grads = value_and_grad(varying, before, batch)
            return _replace_keys(after, state.rest), (value, grads)

        rest, (value, grads) = oa.mean_over_micro_batches(
            one,
            (x, y),
            accumulate,
            carry=state.rest,
            unroll=unroll,
        )
    shared = None if per_worker else axis_name
    if shared is not None:
        value, grads = lax.pmean((value, grads), shared)
        rest = jax.tree.map(lambda leaf: lax.pmean(leaf, shared) if _is_float(leaf) else leaf, rest)

    def loss_of(x: jax.Array, y: jax.Array, accumulate: int) -> oa.Objective:
        return objective(
            graphdef if value_fn_graphdef is None else value_fn_graphdef,
            state.rest,
            x,
            y,
            loss=loss,
            axis_name=shared,
            accumulate=accumulate,
            unroll=unroll,
        )

    extra_args: dict[str, Any] = {
        "value": value,
        "grad": grads,
        "value_fn": loss_of(x, y, accumulate),
    }
    if curvature is not None:
        times = math.ceil(accumulate * _num_examples(curvature) / _num_examples((x, y)))
        extra_args["curvature_value_fn"] = loss_of(*curvature, times)
    if refresh is not None:
        extra_args["refresh"] = refresh
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra_args)
    params = optax.apply_updates(state.params, updates)
    # A method that evaluates the loss elsewhere keeps that value in its state. Reporting it lets
    # XLA drop the pass at the current parameters where the method has no use for it.
    logged = find_in_state(opt_state, "objective_value")
    value = value if scale is None else value / scale
    value = value if logged is None else logged
    alarming = value
    if scale is not None:
        left_out = ~find_in_state(opt_state, "gradient_finite")
        rest = jax.tree.map(lambda a, b: jnp.where(left_out, b, a), rest, state.rest)
        fell = find_in_state(opt_state, "loss_scale") < scale
        alarming = jnp.where(left_out & fell, 0, value)
    check = _total((params, rest, _shaped_like(opt_state, params)))
    if axis_name is not None and per_worker:
        value, alarming, check = lax.pmean((value, alarming, check), axis_name)
    finite = jnp.isfinite(alarming) & jnp.isfinite(check)
    metrics = {"loss": value, "finite": finite}
    new = TrainState(state.step + 1, params, rest, opt_state, state.average)
    if ema is not None:
        new = new._replace(average=_moving_average(new, ema))
    if skip_non_finite:
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        new = kept._replace(step=new.step)
    return new, metrics


def evaluate(
    graphdef: nnx.GraphDef[Any],
    params: PyTree,
    rest: PyTree,
    x: jax.Array,
    y: jax.Array,
    *,
    loss: str | LossFn = "cross_entropy",
) -> dict[str, jax.Array]:
    """Scores of a model in evaluation mode (running statistics, no dropout).

    Args:
      graphdef: static part of the model.
      params: parameters.
      rest: the other variables.
      x: inputs, ``(batch, ...)``.
      y: labels: integers, ``(batch,)`` or ``(batch, ...)``, or what else the loss takes.
      loss: one of `LOSSES`, or a function of outputs and labels.

    Returns:
      ``loss``, as the loss defines it; for integer labels ``accuracy``, the share of them that the
      largest output names; and where examples have many labels ``counted``, the share that is not
      -1. Divided by it, loss and accuracy are means over the labels that count; all three are
      means over examples before, so that batches of any size can be averaged.

    Raises:
      ValueError: unknown loss.
    """
    loss_fn = find_loss(loss)
    model = nnx.merge(graphdef, params, rest, copy=True)
    model.eval()
    outputs = jax.tree.map(_at_least_float32, model(x))
    scores = {"loss": loss_fn(outputs, y)}
    if jnp.issubdtype(y.dtype, jnp.integer):
        correct = jnp.argmax(outputs, axis=-1) == y  # never where y is -1
        scores["accuracy"] = jnp.mean(correct.astype(jnp.float32))
        if y.ndim > 1:
            scores["counted"] = jnp.mean((y >= 0).astype(jnp.float32))
    return scores


def find_in_state(opt_state: PyTree, name: str) -> Any:
    """The value that an optimizer's state has under a name, e.g. ``"alignment"``.

    As ``optax.tree.get``, but only for fields of states and scheduled values: a parameter that has
    the same name (the ``value`` projection of an attention layer, say) does not count.

    Args:
      opt_state: the state of the optimizer.
      name: name of a field of one of the states in it.

    Returns:
      The field of the last state in the chain that has it, ``None`` if there is none.
    """

    def belongs_to_a_state(path: tuple[Any, ...], _: Any) -> bool:
        if len(path) > 1 and getattr(path[-2], "tuple_name", None) == "WithSchedulesState":
            return path[-2].name == "scheduled"
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found = optax.tree_utils.tree_get_all_with_path(opt_state, name, filtering=belongs_to_a_state)
    return found[-1][1] if found else None


def _forward(
    graphdef: nnx.GraphDef[Any], params: PyTree, rest: PyTree, x: jax.Array
) -> tuple[jax.Array, PyTree]:
    """Outputs in training mode and the other variables as this pass leaves them."""
    # The copy is made of the tracers at hand: NNX refuses to write batch statistics that belong
    # to an outer trace, which `rest` does inside `grad`.
    model = nnx.merge(graphdef, params, rest, copy=True)
    model.train()
    outputs = jax.tree.map(_at_least_float32, model(x))
    return outputs, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))


def _shaped_like(opt_state: PyTree, params: PyTree) -> list[jax.Array]:
    """The arrays of an optimizer's state that have the shape of a parameter: its moments."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim}
    return [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape in shapes]


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
    """The averages behind a step, of what the state has and those before."""
    # So that the weights add up to one from the first step on, and the start counts nothing.
    steps = state.step.astype(jnp.float32)
    weight = (1 - decay) / -jnp.expm1(steps * math.log(decay))
    return jax.tree.map(
        lambda new, old: optax.incremental_update(new, old, weight) if _is_float(new) else new,
        (state.params, state.rest),
        state.average,
    )


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _is_float(x) else x


def _is_float(leaf: jax.Array) -> bool:
    # Others, counters and random keys, are the same on every replica.
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _replace_floats(rest: PyTree, by: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: new if _is_float(leaf) else leaf, rest, by)


def _replace_keys(rest: PyTree, by: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: new if _is_key(leaf) else leaf, rest, by)


def _own_keys(rest: PyTree, micro_batch: jax.Array | None) -> PyTree:
    """The variables as a micro-batch finds them, with random keys of its own."""
    if micro_batch is None:
        return rest
    fold = jnp.vectorize(jax.random.fold_in)
    return jax.tree.map(lambda leaf: fold(leaf, micro_batch) if _is_key(leaf) else leaf, rest)


def _num_examples(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
