"""The extra arguments of ``update``: the objective, and means of values over replicas."""

from __future__ import annotations

from typing import Any

import chex
import jax
import optax

from optax_accel._means import as_array, mean_over, vary_over
from optax_accel.objective import Objective, ValueFn


def as_objective(
    value_fn: Objective | ValueFn | None,
    extra_args: dict[str, Any],
    *,
    method: str,
    params: chex.ArrayTree,
    why: str,
    argument: str = "value_fn",
    needs_outputs: bool = False,
) -> Objective:
    """The objective in the extra argument ``value_fn`` of a method's ``update``.

    Args:
      value_fn: an :class:`Objective` or a function ``value_fn(params, **kwargs) -> scalar``.
      extra_args: the extra arguments of ``update``; those that ``value_fn`` names are bound to it.
      method: name of the calling method, for messages.
      params: the parameters given to ``update``.
      why: the purpose for which the method evaluates the loss, for messages.
      argument: name of the extra argument, for messages.
      needs_outputs: whether the method needs ``predict`` and ``loss``, for messages.

    Returns:
      An objective of the parameters alone.

    Raises:
      ValueError: ``value_fn`` or ``params`` is missing, or ``params`` has masked-out holes.
      TypeError: ``value_fn`` is not callable or lacks an argument.
    """
    call = f"tx.update(grads, state, params, {argument}=objective)"
    if value_fn is None:
        plain = " or any function of the parameters that returns the scalar loss"
        accepted = "(predict, loss)" if needs_outputs else plain
        raise ValueError(
            f"{method} needs the extra argument `{argument}` to {why}. Call it as: {call}, with an "
            f"optax_accel.Objective{accepted}. "
            "TrainState.apply_gradients of Flax does not pass extra arguments on; write instead:\n"
            "    updates, opt_state = state.tx.update("
            f"grads, state.opt_state, state.params, {argument}=objective)\n"
            "    state = state.replace(step=state.step + 1, opt_state=opt_state, "
            "params=optax.apply_updates(state.params, updates))"
        )
    if not callable(value_fn):
        raise TypeError(f"{method}: `{argument}` must be callable, got {type(value_fn).__name__}.")
    check_params(params, method, call)
    if not isinstance(value_fn, Objective):
        value_fn = Objective.from_value_fn(value_fn)
    return value_fn.without_aux.bind(**extra_args)


def check_params(
    params: chex.ArrayTree, method: str, call: str = "tx.init(params)", *, loss: bool = True
) -> None:
    """Raises ``ValueError`` if ``params`` is missing or has the holes of ``optax.masked``.

    Holes are allowed where the method evaluates no ``loss``.
    """
    if params is None:
        raise ValueError(f"{method} needs the parameters. Call it as: {call}.")
    if not loss:
        return
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{method} met a MaskedNode: inside optax.masked or optax.partition the loss cannot be "
            f"evaluated, because a part of the parameters is hidden. Give {method} its own `mask=` "
            "instead and chain it outside."
        )


def mean_arguments(
    updates: chex.ArrayTree,
    extra_args: dict[str, Any],
    axis_name: str,
    where: jax.Array | None = None,
) -> tuple[chex.ArrayTree, dict[str, Any]]:
    """The mean over replicas of the gradient and of the extra arguments ``value`` and ``grad``.

    Replicas count with the ``weight`` of the Objective in ``value_fn``, if it has one.

    Args:
      updates: this replica's gradient.
      extra_args: all extra arguments of ``update``.
      axis_name: the axis of the replicas.
      where: boolean scalar, whether to average in this step; ``None`` means always.

    Returns:
      The mean gradient, and the extra arguments with the means in place.
    """
    local = {name: extra_args[name] for name in ("value", "grad") if name in extra_args}
    if local.get("grad") is updates:  # not sent twice
        del local["grad"]
    objective = extra_args.get("value_fn")
    weight = None
    if isinstance(objective, Objective):
        weight = objective.bind(**extra_args).batch_weight()
    values = vary_over(jax.tree.map(as_array, (updates, local)), axis_name)
    updates, means = mean_over(values, axis_name, where, weight)
    if "grad" in extra_args:
        means.setdefault("grad", updates)
    return updates, extra_args | means
