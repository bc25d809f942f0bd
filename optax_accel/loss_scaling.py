r"""Dynamic loss scaling: train in float16 without losing small gradients.

.. math:: g = \frac{1}{S} \nabla (S L), \qquad
  S \leftarrow \begin{cases} 2 S & \text{after } N \text{ finite gradients in a row,} \\
  S / 2 & \text{when one is not finite, whose update is left out.} \end{cases}

Numbers below 6e-8 are zero in float16, and gradients of activations are often smaller.  Multiplying
the loss by a scale S before it is differentiated moves them into the range; dividing the gradient
of the parameters by S, in float32, takes that back.  S is as large as it can be without overflow,
which is found by trying.

bfloat16 has the range of float32 and needs no scale.

Micikevicius et al., `Mixed precision training <https://arxiv.org/abs/1710.03740>`_, ICLR 2018,
section 3.2.  The factors, interval and first scale are those that PyTorch's ``GradScaler``, Flax's
``DynamicScale`` and jmp share; the largest scale is that of NVIDIA's apex.  Unlike in Flax the
scale grows after exactly ``growth_interval`` finite gradients (there: one more); unlike in jmp the
bounds are arguments of the transformation, so that no ``jit`` forgets them.

``optax.apply_if_finite`` is not underneath: it gives up after a number of errors and applies an
update that is not finite; and it runs the inner update in a ``lax.cond``, where curvature of
convolutions is many times slower on a CPU (jax#12868).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    HOLD_FIXED,
    check_count,
    check_inner,
    check_number,
    check_real_leaves,
)


class DynamicLossScaleState(NamedTuple):
    """State of :func:`dynamic_loss_scale`.

    Attributes:
      loss_scale: what to multiply the loss by before the next gradient; float32 scalar.
      finite_steps: finite gradients since the scale changed last; int32 scalar.
      gradient_finite: whether the last gradient was finite; bool scalar, true before the first.
      skipped: number of updates left out; int32 scalar.
      inner_state: state of the inner transformation.
    """

    loss_scale: jax.Array
    finite_steps: jax.Array
    gradient_finite: jax.Array
    skipped: jax.Array
    inner_state: chex.ArrayTree


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial_scale: float = 2.0**16,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes the gradient of the scaled loss, leaves out updates that are not finite.

    ``update`` is given the gradient of ``optax.tree.get(state, "loss_scale") * loss``, and of the
    extra arguments ``value`` and ``grad``, where there are, also those of the scaled loss, as
    ``jax.value_and_grad`` returns them.  All three are divided by the scale in float32, so that the
    inner transformation sees them without; ``value_fn`` is the loss without scale in the first
    place, better one that computes in float32.

    If the gradient is not finite, the updates are zero and the inner state stays what it was, bit
    for bit.  Put it outermost: what clips or counts steps belongs inside.

    With micro-batches accumulate the gradient first (:meth:`optax_accel.Objective.accumulated`):
    they share one scale and one test.  Put it around ``optax.MultiSteps``, not into it: there each
    micro-batch is tested by itself, whereas its accumulator never gets rid of an infinity.

    Args:
      inner: transformation or optimizer that takes the step.
      initial_scale: the first scale, from ``min_scale`` to ``max_scale``.
      growth_interval: finite gradients in a row after which the scale grows, at least 1.
      growth_factor: by how much, at least 1.
      backoff_factor: what the scale is multiplied by after a gradient that is not finite, between 0
        and 1.
      min_scale: smallest scale, above 0.
      max_scale: largest scale.
      axis_name: axis of ``pmap``, ``shard_map`` or ``vmap`` over which the test is agreed on, for
        replicas whose gradients differ. ``None``: the gradients are the mean over the replicas
        already, which is finite on all or on none; or each worker keeps a scale of its own.

    Returns:
      A transformation with state :class:`DynamicLossScaleState`.

    Raises:
      ValueError: a factor, interval or scale outside its range.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> def loss(params, x):  # a network that computes in float16
      ...     outputs = x.astype(jnp.float16) @ params.astype(jnp.float16)
      ...     return jnp.mean(outputs.astype(jnp.float32) ** 2)
      >>> tx = oa.dynamic_loss_scale(optax.adam(0.1))
      >>> params, x = jnp.ones(2), jnp.eye(2)
      >>> state = tx.init(params)
      >>> scale = optax.tree.get(state, "loss_scale")
      >>> grads = jax.grad(lambda p: scale * loss(p, x))(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> optax.apply_updates(params, updates).round(3).tolist()  # too large a scale: left out
      [1.0, 1.0]
      >>> float(state.loss_scale), int(state.skipped)
      (32768.0, 1)

    References:
      Micikevicius et al., `Mixed precision training <https://arxiv.org/abs/1710.03740>`_, 2018;
      NVIDIA, `Train with mixed precision
      <https://docs.nvidia.com/deeplearning/performance/mixed-precision-training/>`_.
    """
    check_number("min_scale", min_scale, 0, open_low=True)
    check_number("max_scale", max_scale, 0, open_low=True)
    check_number("initial_scale", initial_scale, 0, open_low=True)
    check_number("growth_factor", growth_factor, 1)
    check_number("backoff_factor", backoff_factor, 0, 1, open_low=True, open_high=True)
    check_count("growth_interval", growth_interval, 1)
    scales = (min_scale, initial_scale, max_scale)
    if not any(isinstance(s, jax.Array) for s in scales) and sorted(scales) != list(scales):
        raise ValueError(
            "`min_scale`, `initial_scale` and `max_scale` must be in this order, got "
            f"{min_scale}, {initial_scale} and {max_scale}."
        )
    check_inner(inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: chex.ArrayTree) -> DynamicLossScaleState:
        check_real_leaves(params, "dynamic_loss_scale", HOLD_FIXED)
        return DynamicLossScaleState(
            loss_scale=jnp.array(initial_scale, jnp.float32),
            finite_steps=jnp.zeros((), jnp.int32),
            gradient_finite=jnp.ones((), bool),
            skipped=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: DynamicLossScaleState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, DynamicLossScaleState]:
        scale = state.loss_scale
        finite = _all_finite(updates)
        if axis_name is not None:
            finite = lax.pmin(finite.astype(jnp.int32), axis_name) == 1

        def unscaled(tree: chex.ArrayTree) -> chex.ArrayTree:
            # Of a float16 gradient of float32 parameters nothing is lost again.
            like = tree if params is None else params
            return jax.tree.map(lambda g, p: _divide(g, scale, p), tree, like)

        gradient = unscaled(updates)
        if extra_args.get("grad") is not None:
            same = extra_args["grad"] is updates
            extra_args["grad"] = gradient if same else unscaled(extra_args["grad"])
        if extra_args.get("value") is not None:
            extra_args["value"] = _divide(extra_args["value"], scale)
        new_updates, inner_state = inner.update(gradient, state.inner_state, params, **extra_args)

        # Selected, not branched: the compiler puts it into the loops that write the results.
        new_updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new_updates)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state
        )
        finite_steps = jnp.where(finite, state.finite_steps + 1, 0)
        grows = finite_steps >= growth_interval
        larger = jnp.where(grows, jnp.minimum(scale * growth_factor, max_scale), scale)
        smaller = jnp.maximum(scale * backoff_factor, min_scale)
        return new_updates, DynamicLossScaleState(
            loss_scale=jnp.where(finite, larger, smaller).astype(jnp.float32),
            finite_steps=jnp.where(grows, 0, finite_steps).astype(jnp.int32),
            gradient_finite=finite,
            skipped=jnp.where(finite, state.skipped, optax.safe_increment(state.skipped)),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_finite(tree: chex.ArrayTree) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.ones((), bool)


def _divide(x: jax.Array, scale: jax.Array, like: jax.Array | None = None) -> jax.Array:
    """The quotient, computed in at least float32."""
    own = jnp.result_type(x)
    dtype = own if like is None else jnp.promote_types(own, jnp.result_type(like))
    return (jnp.asarray(x, jnp.promote_types(own, jnp.float32)) / scale).astype(dtype)
