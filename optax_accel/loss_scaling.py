r"""Dynamic loss scaling: train in float16 without losing small gradients.

.. math:: g = \frac{1}{S} \nabla (S L), \qquad
  S \leftarrow \begin{cases} 2 S & \text{after } N \text{ finite gradients in a row,} \\
  S / 2 & \text{after one that is not finite, whose update is skipped.} \end{cases}

Numbers below 6e-8 are zero in float16, and gradients of activations are often smaller.  Multiplying
the loss by a scale S before it is differentiated moves them into the range; dividing the gradient
of the parameters by S, in float32, takes that back.  S is as large as possible without overflow,
which the rule finds by trial.

bfloat16 has the range of float32 and needs no such scale.

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
      loss_scale: the factor of the loss for the next gradient; float32 scalar.
      finite_steps: finite gradients since the scale changed last; int32 scalar.
      gradient_finite: whether the last gradient was finite; bool scalar, true before the first.
      skipped: number of updates that were skipped; int32 scalar.
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
    """Takes the gradient of the scaled loss and skips updates that are not finite.

    ``update`` takes the gradient of ``optax.tree.get(state, "loss_scale") * loss``.  The extra
    arguments ``value`` and ``grad``, if given, are also those of the scaled loss, as
    ``jax.value_and_grad`` returns them.  All three are divided by the scale in float32 before the
    inner transformation sees them; ``value_fn`` is the loss without the scale, preferably computed
    in float32.

    If the gradient is not finite, the updates are zero and the inner state stays the same, bit for
    bit.  Make it the outermost transformation: clipping and schedules belong inside.

    With micro-batches accumulate the gradient first (:meth:`optax_accel.Objective.accumulated`):
    they share one scale and one test.  Put it around ``optax.MultiSteps``, not inside: there each
    micro-batch is tested by itself, but an infinity would stay in the accumulator for ever.

    Args:
      inner: transformation or optimizer that takes the step.
      initial_scale: the first scale, from ``min_scale`` to ``max_scale``.
      growth_interval: finite gradients in a row after which the scale grows, at least 1.
      growth_factor: the factor by which the scale grows, at least 1.
      backoff_factor: the factor of the scale after a gradient that is not finite, between 0 and 1.
      min_scale: smallest scale, above 0.
      max_scale: largest scale.
      axis_name: axis of ``pmap``, ``shard_map`` or ``vmap`` over which replicas with different
        gradients agree whether all of them are finite. ``None`` (default): the gradients are
        already means over the replicas, finite on all or on none, or each worker keeps its own
        scale.

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
      >>> optax.apply_updates(params, updates).round(3).tolist()  # too large a scale: skipped
      [1.0, 1.0]
      >>> float(state.loss_scale), int(state.skipped)
      (32768.0, 1)

    References:
      Micikevicius et al., `Mixed precision training <https://arxiv.org/abs/1710.03740>`_, 2018;
      NVIDIA, `Train with mixed precision
      <https://docs.nvidia.com/deeplearning/performance/mixed-precision-training/>`_.
    """
    rule = _Rule(growth_interval, growth_factor, backoff_factor, min_scale, max_scale)
    rule.check(initial_scale)
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
            # A float16 gradient of float32 parameters becomes float32, so that no digit is lost.
            like = tree if params is None else params
            return jax.tree.map(lambda g, p: _divide(g, scale, p), tree, like)

        gradient = unscaled(updates)
        if extra_args.get("grad") is not None:
            same = extra_args["grad"] is updates
            extra_args["grad"] = gradient if same else unscaled(extra_args["grad"])
        if extra_args.get("value") is not None:
            extra_args["value"] = _divide(extra_args["value"], scale)
        new_updates, inner_state = inner.update(gradient, state.inner_state, params, **extra_args)

        # A selection, which the compiler fuses into the loops that write the results, no branch.
        new_updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new_updates)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state
        )
        new_scale, finite_steps = rule.next(scale, state.finite_steps, finite)
        return new_updates, DynamicLossScaleState(
            loss_scale=new_scale,
            finite_steps=finite_steps,
            gradient_finite=finite,
            skipped=jnp.where(finite, state.skipped, optax.safe_increment(state.skipped)),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Rule(NamedTuple):
    """When and by how much the scale changes."""

    growth_interval: Any
    growth_factor: Any
    backoff_factor: Any
    min_scale: Any
    max_scale: Any

    def check(self, initial_scale: Any) -> None:
        """Raises if a setting is outside its range."""
        check_number("min_scale", self.min_scale, 0, open_low=True)
        check_number("max_scale", self.max_scale, 0, open_low=True)
        check_number("initial_scale", initial_scale, 0, open_low=True)
        check_number("growth_factor", self.growth_factor, 1)
        check_number("backoff_factor", self.backoff_factor, 0, 1, open_low=True, open_high=True)
        check_count("growth_interval", self.growth_interval, 1)
        scales = (self.min_scale, initial_scale, self.max_scale)
        if not any(isinstance(s, jax.Array) for s in scales) and sorted(scales) != list(scales):
            raise ValueError(
                "`min_scale`, `initial_scale` and `max_scale` must be in this order, got "
                f"{self.min_scale}, {initial_scale} and {self.max_scale}."
            )

    def next(
        self, scale: jax.Array, finite_steps: jax.Array, finite: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The scale after a gradient, and the number of finite gradients since it changed."""
        finite_steps = jnp.where(finite, finite_steps + 1, 0)
        grows = finite_steps >= self.growth_interval
        larger = jnp.where(grows, jnp.minimum(scale * self.growth_factor, self.max_scale), scale)
        smaller = jnp.maximum(scale * self.backoff_factor, self.min_scale)
        return (
            jnp.where(finite, larger, smaller).astype(jnp.float32),
            jnp.where(grows, 0, finite_steps).astype(jnp.int32),
        )


def _all_finite(tree: chex.ArrayTree) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.ones((), bool)


def _divide(x: jax.Array, scale: jax.Array, like: jax.Array | None = None) -> jax.Array:
    """The quotient, computed in at least float32."""
    narrow = jnp.result_type(x)
    dtype = narrow if like is None else jnp.promote_types(narrow, jnp.result_type(like))
    return (jnp.asarray(x, jnp.promote_types(narrow, jnp.float32)) / scale).astype(dtype)
