"""What surrounds a method in training, and what its state tells."""

from __future__ import annotations

from typing import Any

import jax
import optax

import optax_accel as oa
from experiments.training.precision import PRECISIONS, Precision

PyTree = Any


def wrap(
    tx: optax.GradientTransformation,
    learning_rate: float,
    *,
    clip: float | None = None,
    weight_decay: float = 0.0,
    precision: Precision = PRECISIONS["f32"],
) -> optax.GradientTransformationExtraArgs:
    """Puts clipping in front of a method, weight decay behind it and a loss scale around both.

    Weight decay is decoupled (Loshchilov and Hutter, 2019): after the method's own step the
    parameters that `is_decayed` selects shrink by ``learning_rate * weight_decay``, as in
    ``optax.adamw`` of a constant rate; what the method evaluates does not contain it.

    >>> import jax.numpy as jnp
    >>> tx = wrap(optax.adam(0.1), 0.1, clip=1.0, weight_decay=0.01)
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> [round(float(updates[name].sum()), 4) for name in ("kernel", "bias")]
    [-0.004, 0.0]

    Args:
      tx: the method.
      learning_rate: its learning rate, which scales the weight decay.
      clip: largest norm of the gradient over all parameters; longer ones are shortened to it.
        Gradients that the method evaluates elsewhere are not clipped. ``None``: no clipping.
      weight_decay: rate of the weight decay, at least 0.
      precision: what the network computes in; float16 adds `optax_accel.dynamic_loss_scale`.

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

    >>> import jax.numpy as jnp
    >>> is_decayed({"linear": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    {'linear': {'bias': False, 'kernel': True}}

    Args:
      params: the parameters.

    Returns:
      A pytree of booleans: false for vectors and scalars and for what is named bias or scale.
    """

    def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim > 1 and name not in ("bias", "scale")

    return jax.tree.map_with_path(decayed, params)


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

    matches = optax.tree_utils.tree_get_all_with_path(opt_state, name, filtering=belongs_to_a_state)
    return matches[-1][1] if matches else None


def find_schedule_free(opt_state: PyTree) -> optax.contrib.ScheduleFreeState | None:
    """The state of a schedule-free optimizer in that of an optimizer; None if there is none.

    Args:
      opt_state: the state of the optimizer, which may have others around it.
    """

    def is_schedule_free(inner: Any) -> bool:
        return isinstance(inner, optax.contrib.ScheduleFreeState)

    leaves = jax.tree.leaves(opt_state, is_leaf=is_schedule_free)
    return next(filter(is_schedule_free, leaves), None)
