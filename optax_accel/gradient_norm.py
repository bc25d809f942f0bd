r"""GNP: penalize the norm of the gradient, with a second gradient instead of second derivatives.

.. math::
  \min_x L(x) + \lambda \|\nabla L(x)\|: \qquad
  g = (1 - \alpha)\, \nabla L(x)
    + \alpha\, \nabla L\Big(x + \rho\, \frac{\nabla L(x)}{\|\nabla L(x)\|}\Big), \qquad
  \alpha = \lambda / \rho .

The second gradient contains the Hessian product of the penalty's gradient as a difference quotient
of step :math:`\rho` (the paper's r): exact on quadratics, and of first order in it elsewhere.
:math:`\alpha = 0` is plain training, :math:`\alpha = 1` is SAM with radius :math:`\rho`.

Zhao, Zhang, Hu, `Penalizing gradient norm for efficiently improving generalization in deep learning
<https://arxiv.org/abs/2202.03599>`_, ICML 2022.  Faithful: the formula of the paper.  The authors'
configuration interpolates with the *unit* gradient in place of the gradient
(``gnp.norm_perturbations``), which the paper does not; we follow the paper.  Ours: a gradient of
norm zero, for which their code divides by zero, is not perturbed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import check_inner, check_number, value_of
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select, with_fixed_leaves
from optax_accel._numerics import norm
from optax_accel.refresh import Cost, announce_cost


class GNPState(NamedTuple):
    """State of :func:`gnp`.

    Attributes:
      count: number of updates made; int32 scalar.
      gradient_norm: the penalized norm of the gradient (of the leaves in ``mask``) at the
        parameters of the last step, with ``axis_name`` the mean over the replicas; infinity before
        the first step; float32 scalar.
      inner_state: state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    gradient_norm: jax.Array
    inner_state: chex.ArrayTree


def gnp(
    inner: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.8,
    *,
    axis_name: str | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Feeds any transformation the gradient of the loss plus a penalty on its gradient's norm.

    Two gradients a step, at the parameters and at a point ahead of them; ``update`` needs
    ``value_fn`` (an :class:`~optax_accel.Objective` or a function of the parameters) and
    ``params``.  ``value_fn`` must be the loss of the incoming gradient, with the same batch and the
    same key of dropout.  Update statistics of batch normalization in the first pass only.  Clip
    gradients in ``inner``, which sees the mixed gradient (the paper clips it to a norm of 5).

    ``optax.contrib.sam(inner, chain(normalize(), sgd(rho)), opaque_mode=True)`` makes the steps of
    ``alpha=1``; it takes a ``grad_fn`` of two arguments.

    Args:
      inner: transformation or optimizer that takes the step.
      rho: radius of the perturbation, at least 0, float or schedule: SAM's rho, the paper's r. The
        paper: 0.1 on CIFAR (the default), 0.05 on ImageNet.
      alpha: :math:`\lambda / \rho`, at least 0, float or schedule. The paper: 0.8. With warm-up of
        an adaptive optimizer's learning rate the penalty should warm up too, by a schedule of
        ``rho`` or ``alpha`` (Zhao et al., `When will gradient regularization be harmful?
        <https://arxiv.org/abs/2406.09723>`_, 2024).
      axis_name: axis of ``pmap``, ``shard_map`` or ``vmap`` for *local* perturbations, as in the
        authors' code: each replica perturbs with its own gradient and penalizes its own norm, and
        the mixed gradients are averaged, one all-reduce a step; the incoming gradient is not used
        and need not be averaged.  ``None``: one perturbation, the same on all replicas, for the
        norm of the mean gradient; an Objective that has an ``axis_name`` then averages at both
        points.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to perturb, whose gradient's norm is penalized.  ``None``: all.
        Masked-out integers, booleans and PRNG keys are hidden from ``inner``; their updates pass
        unchanged.

    Returns:
      A transformation with state :class:`GNPState`.

    Raises:
      ValueError: ``rho`` or ``alpha`` below 0; in ``update``: missing ``value_fn`` or ``params``.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.gnp(optax.sgd(0.1), rho=0.5, alpha=0.8)
      >>> param = jnp.array(1.0)
      >>> updates, state = tx.update(jax.grad(loss)(param), tx.init(param), param, value_fn=loss)
      >>> round(float(param + updates), 4)  # 1 - 0.1 * (0.2 * 1 + 0.8 * 1.5)
      0.86

    References:
      Zhao et al., `Penalizing gradient norm <https://arxiv.org/abs/2202.03599>`_, algorithm 1.
    """
    check_number("rho", rho, 0, allow_schedule=True)
    check_number("alpha", alpha, 0, allow_schedule=True)
    check_inner(inner)
    return with_fixed_leaves(
        lambda mask: _gnp(optax.with_extra_args_support(inner), rho, alpha, axis_name, mask), mask
    )


def _gnp(
    inner: optax.GradientTransformationExtraArgs,
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule,
    axis_name: str | None,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    name = "gnp"

    def init_fn(params: chex.ArrayTree) -> GNPState:
        check_params(params, name)
        check_selected(params, mask, name)
        announce_cost(Cost("a gradient at the perturbed point", 1))
        return GNPState(
            count=jnp.zeros((), jnp.int32),
            gradient_norm=jnp.full((), jnp.inf, jnp.float32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: GNPState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, GNPState]:
        objective = as_objective(
            value_fn,
            extra_args,
            method=name,
            params=params,
            why="take the gradient at the perturbed point",
        )
        radius, weight = value_of(rho, state.count), value_of(alpha, state.count)
        point, first = params, updates
        if axis_name is not None:
            mean = objective.averaged_over(axis_name)
            objective, point = objective.local, mean.vary(params)
            first = objective.grad(point)
        ahead, length = perturb(point, first, radius, resolve(params, mask))
        second = objective.grad(ahead)
        mixed = jax.tree.map(
            lambda g, h: ((1 - weight) * _widen(g) + weight * _widen(h)).astype(g.dtype),
            first,
            second,
        )
        length = jnp.asarray(length, jnp.float32)
        if axis_name is not None:
            mixed, length = mean.mean((mixed, length))
        inner_args = {**extra_args, "value_fn": value_fn}
        if "grad" in inner_args:
            inner_args["grad"] = mixed
        new_updates, inner_state = inner.update(mixed, state.inner_state, params, **inner_args)
        return new_updates, GNPState(
            count=optax.safe_increment(state.count),
            gradient_norm=length,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def perturb(
    params: chex.ArrayTree, gradient: chex.ArrayTree, radius: Any, chosen: chex.ArrayTree | None
) -> tuple[chex.ArrayTree, jax.Array]:
    """The point at that distance along the gradient, and the norm of the gradient."""
    direction = select(gradient, chosen)
    length = norm(direction)
    divisor = jnp.where(length > 0, length, 1)
    ahead = jax.tree.map(
        lambda x, g: (_widen(x) + radius * (_widen(g) / divisor)).astype(jnp.result_type(x)),
        select(params, chosen),
        direction,
    )
    return merge(ahead, params, chosen), length


def _widen(x: jax.Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))
