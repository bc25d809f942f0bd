r"""Post-local SGD: average gradients first, and later only parameters, now and then.

Until ``switch_step`` all workers take the same steps with the mean gradient.  From then on worker k
takes steps of its own, :math:`x^k \leftarrow \mathrm{inner}(x^k, g^k)`, and after every H of them
:math:`x^k \leftarrow \frac{1}{K} \sum_j x^j`.

Lin, Stich, Patel, Jaggi, `Don't use large mini-batches, use local SGD
<https://arxiv.org/abs/1808.07217>`_, ICLR 2020.  As in the public code (``epfml/LocalSGD-Code``),
every worker keeps its own momentum, which is not averaged.  Our reading: neither the switch nor an
averaging changes the momentum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import check_count, check_inner
from optax_accel._extra_args import mean_arguments
from optax_accel._means import vary_over
from optax_accel.objective import Objective
from optax_accel.workers.topologies import distance_to, widen


class PostLocalSGDState(NamedTuple):
    """State of :func:`post_local_sgd`, one for each worker.

    Attributes:
      count: number of updates made; int32 scalar.
      consensus_distance: root mean square over the workers of the distance of their parameters to
        the mean over the workers, right before the last averaging of parameters, 0 before the
        first; float32 scalar, the same on all workers.
      inner_state: this worker's state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    consensus_distance: jax.Array
    inner_state: chex.ArrayTree


def post_local_sgd(
    inner: optax.GradientTransformation,
    *,
    local_steps: int,
    switch_step: int,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Averages gradients at every step, then, after a switch, parameters every few steps.

    ``update`` takes *this worker's own* gradient, not averaged, and this worker's ``params``; run
    it under ``shard_map``, ``pmap`` or ``vmap`` with a named axis over the workers, all starting
    with the same parameters.  Before the switch a step costs one all-reduce of the gradient, after
    it one of the parameters every ``local_steps`` steps, which also gives the consensus distance.

    An inner transformation that needs ``value_fn`` gets one that averages over the workers before
    the switch and is the worker's own afterwards.  There are two ways to combine it with an
    extragradient: ``post_local_sgd(extragradient(...))`` extrapolates with the mean gradient before
    the switch, ``extragradient(post_local_sgd(...))`` with the worker's own throughout, which is
    Lin et al.'s local extrapolation with one all-reduce a step.  In both, give the extragradient no
    ``axis_name``; in the second, give it a ``value_fn`` without ``axis_name`` too.

    Args:
      inner: transformation or optimizer; give it no ``axis_name``.
      local_steps: H, steps between two averagings of the parameters; 32 in the public code's
        command for ResNet-20 on CIFAR-10 with 16 workers. 1 averages after every step.
      switch_step: number of steps with averaged gradients. The public code switches at the first
        decay of the learning rate, half of the training in that command.
      axis_name: the axis of the workers; ``None`` (default) means a single worker, for which this
        is the inner transformation.

    Returns:
      A transformation with state :class:`PostLocalSGDState`.

    Raises:
      ValueError: an argument outside its range; in ``update``: missing ``params``.
      TypeError: ``inner`` is not a transformation, or a count is not an integer.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> targets = jnp.arange(4.0)  # each worker has its own; all together want their mean
      >>> tx = oa.post_local_sgd(optax.sgd(0.5), local_steps=2, switch_step=2, axis_name="workers")
      >>> def step(x, state, target):
      ...     updates, state = tx.update(x - target, state, x)
      ...     return optax.apply_updates(x, updates), state
      >>> step = jax.jit(jax.vmap(step, axis_name="workers"))
      >>> x, state = jnp.zeros(4), jax.vmap(tx.init)(jnp.zeros(4))
      >>> for _ in range(4):
      ...     x, state = step(x, state, targets)
      ...     print(x.tolist())
      [0.75, 0.75, 0.75, 0.75]
      [1.125, 1.125, 1.125, 1.125]
      [0.5625, 1.0625, 1.5625, 2.0625]
      [1.40625, 1.40625, 1.40625, 1.40625]
      >>> round(float(state.consensus_distance[0]), 4)  # before this averaging
      0.8385

    References:
      Lin et al., `Local SGD <https://arxiv.org/abs/1808.07217>`_, 2020.
    """
    check_count("local_steps", local_steps, 1)
    check_count("switch_step", switch_step, 0)
    check_inner(inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: chex.ArrayTree) -> PostLocalSGDState:
        return PostLocalSGDState(
            count=jnp.zeros((), jnp.int32),
            consensus_distance=jnp.zeros((), jnp.float32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: PostLocalSGDState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, PostLocalSGDState]:
        if params is None:
            raise ValueError(
                "post_local_sgd needs this worker's parameters, which it averages. Call it as: "
                "tx.update(grads, state, params)."
            )
        together = state.count < switch_step
        if axis_name is not None:
            updates, extra_args = _average(updates, extra_args, axis_name, together)
        new_updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        distance = state.consensus_distance
        if axis_name is not None:
            due = ~together & ((state.count - switch_step + 1) % local_steps == 0)
            new_updates, distance = lax.cond(
                due,
                lambda updates: _to_mean(params, updates, axis_name),
                lambda updates: (updates, vary_over(distance, axis_name)),
                vary_over(new_updates, axis_name),
            )
        return new_updates, PostLocalSGDState(
            count=optax.safe_increment(state.count),
            consensus_distance=distance,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _average(
    updates: chex.ArrayTree, extra_args: dict[str, Any], axis_name: str, where: jax.Array
) -> tuple[chex.ArrayTree, dict[str, Any]]:
    """The gradient and the extra arguments of ``update``, averaged over the workers where true."""
    updates, extra_args = mean_arguments(updates, extra_args, axis_name, where)
    for name, argument in extra_args.items():
        if name.endswith("value_fn") and callable(argument):
            if not isinstance(argument, Objective):
                argument = Objective.from_value_fn(argument)
            extra_args[name] = argument.averaged_over(axis_name, where)
    return updates, extra_args


def _to_mean(
    params: chex.ArrayTree, updates: chex.ArrayTree, axis_name: str
) -> tuple[chex.ArrayTree, jax.Array]:
    """Updates that lead to the mean over the workers, and their consensus distance before."""
    ends = widen(optax.apply_updates(params, updates))
    mean = lax.pmean(ends, axis_name)
    distance = distance_to(mean, ends, axis_name)
    to_mean = jax.tree.map(
        lambda m, p, u: (m - p.astype(m.dtype)).astype(u.dtype), mean, params, updates
    )
    return vary_over(to_mean, axis_name), distance
