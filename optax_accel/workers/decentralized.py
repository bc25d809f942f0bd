r"""Decentralized momentum: workers that mix parameters with a few neighbors, without all-reduce.

Worker i with parameters :math:`x_i`, mixing matrix W, learning rate γ, momentum β:

.. math::
  \text{DmSGD:}\quad & m_i \leftarrow \beta m_i + \nabla f_i(x_i), \quad
    x_i \leftarrow \textstyle\sum_j W_{ij} (x_j - \gamma m_j) \\
  \text{DecentLaM:}\quad & \tilde g_i = \big(x_i - \textstyle\sum_j W_{ij} (x_j - \gamma
    \nabla f_j(x_j))\big) / \gamma, \quad m_i \leftarrow \beta m_i + \tilde g_i, \quad
    x_i \leftarrow x_i - \gamma m_i

Both send one copy of the parameters to each neighbor in each step.  Where the workers' losses
differ, the fixed points are biased: DmSGD's by :math:`O(\gamma^2 / (1 - \beta)^2)`, DecentLaM's by
:math:`O(\gamma^2)`, that of decentralized gradient descent, for every momentum.

DecentLaM's momentum also drives the workers together: without gradients the parts of :math:`x`
along an eigenvector of W with eigenvalue λ obey :math:`x_{t+1} = (\beta + \lambda) x_t - \beta
x_{t-1}`.  That shrinks for every β < 1 if W is symmetric (λ real), but *grows* for large β on many
directed or changing graphs, the exponential ones among them.

Yuan et al., `DecentLaM: Decentralized momentum SGD for large-batch deep training
<https://arxiv.org/abs/2104.11981>`_, ICCV 2021.  The rules above are those of a third party's
public implementation (the authors' code was not available to us).  Our reading: the step at a
learning rate of 0, the place of weight decay, and the condition on W.
"""

from __future__ import annotations

from collections.abc import Callable
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
    check_dtype,
    check_learning_rate,
    check_number,
    check_real_leaves,
    known_integer,
    value_of,
)
from optax_accel._means import vary_over
from optax_accel.workers.topologies import Topology, consensus_distance, widen


class DecentralizedState(NamedTuple):
    """State of :func:`decentlam` and :func:`dmsgd`, one for each worker.

    Attributes:
      count: number of updates made; int32 scalar.
      momentum: this worker's m, like the parameters.
      consensus_distance: root mean square over the workers of the distance of their parameters to
        the mean over the workers, after the step at which it was last computed; float32 scalar,
        the same on all workers. NaN before the first time, or if it is never computed.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    momentum: chex.ArrayTree
    consensus_distance: jax.Array


def decentlam(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    *,
    topology: Topology,
    axis_name: str | None = None,
    consensus_every: int = 100,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""DecentLaM: momentum SGD on a graph of workers, without a bias from the momentum.

    ``update`` takes *this worker's own* gradient, not averaged, and this worker's ``params``; run
    it under ``shard_map``, ``pmap`` or ``vmap`` with a named axis over the workers.  It applies the
    learning rate itself: chain nothing that rescales updates behind it.  Chain transformations of
    the gradient before it, weight decay included, which belongs to the loss of each worker:
    ``optax.chain(optax.add_decayed_weights(1e-4), decentlam(...))``.

    With one worker, and with :func:`topologies.complete <optax_accel.topologies.complete>` and
    common initial parameters, this is parallel momentum SGD.

    Args:
      learning_rate: γ, at least 0, float or schedule.  Where it is 0 the parameters are mixed and
        nothing is added to the momentum (the rule divides by γ).
      momentum: β in [0, 1).
      topology: who averages with whom, made by a constructor of ``optax_accel.topologies``.  With
        the default momentum a symmetric one, such as ``ring``, ``mesh_2d`` or ``exponential(n,
        symmetric=True)``; on the directed exponential graphs the method diverges from a momentum
        of about 0.5 (0.7 on few workers).
      axis_name: the axis of the workers; ``None`` (default) means a single worker.
      consensus_every: steps between computations of the state's ``consensus_distance``, each of
        which costs an all-reduce of the parameters; 0 means never. 100 (our choice) keeps that
        below a hundredth of the traffic of parallel SGD.
      accumulator_dtype: dtype of the momentum; values are sent in at least this dtype. ``None``
        (default) is that of the parameters.  For bfloat16 parameters ``jnp.float32`` keeps the
        rounding of the parameters, divided by γ, out of the momentum, and doubles the traffic.

    Returns:
      The optimizer, with state :class:`DecentralizedState`.

    Raises:
      ValueError: a hyperparameter outside its range, or a momentum with which the method diverges
        on the topology; in ``update``: the axis has another number of workers than the topology, or
        ``params`` is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> targets = jnp.arange(4.0)  # each worker has its own; all together want their mean
      >>> tx = oa.decentlam(0.1, topology=oa.topologies.ring(4), axis_name="workers")
      >>> def step(x, state, target):
      ...     updates, state = tx.update(x - target, state, x)
      ...     return optax.apply_updates(x, updates), state
      >>> step = jax.jit(jax.vmap(step, axis_name="workers"))
      >>> x = jnp.zeros(4)
      >>> state = jax.vmap(tx.init, axis_name="workers")(x)
      >>> for _ in range(300):
      ...     x, state = step(x, state, targets)
      >>> round(float(x.mean()), 3), round(float(x.max() - x.min()), 2)
      (1.5, 0.12)

    References:
      Yuan et al., `DecentLaM <https://arxiv.org/abs/2104.11981>`_, 2021.
    """
    tx = _mixing(
        "decentlam",
        _decentlam_step,
        learning_rate,
        momentum,
        topology=topology,
        axis_name=axis_name,
        consensus_every=consensus_every,
        accumulator_dtype=accumulator_dtype,
    )
    if isinstance(momentum, int | float) and (growth := consensus_growth(topology, momentum)) >= 1:
        raise ValueError(
            f"decentlam diverges with momentum {momentum} on {topology!r}, whatever the learning "
            f"rate: differences between the workers grow by {growth:.3g} a step. Use a symmetric "
            "topology, such as topologies.ring, mesh_2d or exponential(n, symmetric=True), a "
            "smaller `momentum`, or dmsgd."
        )
    return tx


def dmsgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    *,
    topology: Topology,
    axis_name: str | None = None,
    consensus_every: int = 100,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """DmSGD: momentum SGD on a graph of workers, the baseline of :func:`decentlam`.

    Each worker keeps its own momentum and mixes the parameters after its step.  ``update`` is
    called like that of :func:`decentlam` and communicates as much; momentum 0 is decentralized SGD.

    Args:
      learning_rate: at least 0, float or schedule.
      momentum: momentum of each worker, in [0, 1).
      topology: who averages with whom, made by a constructor of ``optax_accel.topologies``; any
        graph is stable.
      axis_name: the axis of the workers; ``None`` (default) means a single worker.
      consensus_every: steps between computations of the state's ``consensus_distance``, each of
        which costs an all-reduce of the parameters; 0 means never.
      accumulator_dtype: dtype of the momentum; values are sent in at least this dtype. ``None``
        (default) is that of the parameters.

    Returns:
      The optimizer, with state :class:`DecentralizedState`.

    Raises:
      ValueError: a hyperparameter outside its range; in ``update``: the axis has another number of
        workers than the topology, or ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.dmsgd(0.5, topology=oa.topologies.ring(1))  # a single worker: SGD with momentum
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(x, tx.init(x), x)
      >>> updates.tolist()
      [-0.5, 1.0]

    References:
      Yuan et al., `DecentLaM <https://arxiv.org/abs/2104.11981>`_, 2021.
    """
    return _mixing(
        "dmsgd",
        _dmsgd_step,
        learning_rate,
        momentum,
        topology=topology,
        axis_name=axis_name,
        consensus_every=consensus_every,
        accumulator_dtype=accumulator_dtype,
    )


# ``step(rate, momentum, x, gradient, m, mix)`` gives the new momentum and the new parameters.
_Step = Callable[
    [Any, Any, chex.ArrayTree, chex.ArrayTree, chex.ArrayTree, Callable[[Any], Any]],
    tuple[chex.ArrayTree, chex.ArrayTree],
]


def _mixing(
    method: str,
    step: _Step,
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    *,
    topology: Topology,
    axis_name: str | None,
    consensus_every: int,
    accumulator_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    check_learning_rate(learning_rate)
    check_number("momentum", momentum, 0, 1, open_high=True)
    check_count("consensus_every", consensus_every, 0)
    check_dtype("accumulator_dtype", accumulator_dtype)
    if not isinstance(topology, Topology):
        raise TypeError(
            "`topology` must be a Topology, such as optax_accel.topologies.ring(8); got "
            f"{topology!r}."
        )

    def init_fn(params: chex.ArrayTree) -> DecentralizedState:
        check_real_leaves(params, method, HOLD_FIXED)
        return DecentralizedState(
            count=jnp.zeros((), jnp.int32),
            momentum=optax.tree.zeros_like(params, dtype=accumulator_dtype),
            consensus_distance=jnp.full((), jnp.nan, jnp.float32),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: DecentralizedState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, DecentralizedState]:
        del extra_args
        if params is None:
            raise ValueError(
                f"{method} needs this worker's parameters, which it mixes with those of others. "
                "Call it as: tx.update(grads, state, params)."
            )
        rate, params = value_of(learning_rate, state.count), as_arrays(params)

        def mix(tree: chex.ArrayTree) -> chex.ArrayTree:
            # Values are sent in the dtypes of parameters and momentum, not in that of the sums.
            sent = jax.tree.map(
                lambda t, p, m: t.astype(jnp.promote_types(p.dtype, m.dtype)),
                tree,
                params,
                state.momentum,
            )
            return widen(topology.mix(sent, state.count, axis_name))

        x, grads, old = widen(params), widen(updates), widen(state.momentum)
        new, moved = step(rate, momentum, x, grads, old, mix)
        new_updates = jax.tree.map(lambda y, x, g: (y - x).astype(g.dtype), moved, x, updates)
        return new_updates, DecentralizedState(
            count=optax.safe_increment(state.count),
            momentum=optax.tree.cast_like(new, state.momentum),
            consensus_distance=distance(state, optax.apply_updates(params, new_updates)),
        )

    def distance(state: DecentralizedState, params: chex.ArrayTree) -> jax.Array:
        if known_integer(consensus_every) == 0:
            return state.consensus_distance
        every = jnp.maximum(consensus_every, 1)
        return lax.cond(
            (consensus_every > 0) & (state.count % every == 0),
            lambda: consensus_distance(params, axis_name),
            lambda: vary_over(state.consensus_distance, axis_name),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decentlam_step(
    rate: Any,
    momentum: Any,
    x: chex.ArrayTree,
    gradient: chex.ArrayTree,
    m: chex.ArrayTree,
    mix: Callable[[chex.ArrayTree], chex.ArrayTree],
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    mixed = mix(jax.tree.map(lambda x, g: x - _scale(rate, g), x, gradient))

    def add(m: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        step = jnp.asarray(rate, m.dtype)
        corrected = jnp.where(step > 0, (x - y) / jnp.where(step > 0, step, 1), 0)
        return _scale(momentum, m) + corrected

    new = jax.tree.map(add, m, x, mixed)
    # x - rate * new, without the division.
    moved = jax.tree.map(lambda y, m: y - _scale(rate, _scale(momentum, m)), mixed, m)
    return new, moved


def _dmsgd_step(
    rate: Any,
    momentum: Any,
    x: chex.ArrayTree,
    gradient: chex.ArrayTree,
    m: chex.ArrayTree,
    mix: Callable[[chex.ArrayTree], chex.ArrayTree],
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    new = jax.tree.map(lambda m, g: _scale(momentum, m) + g, m, gradient)
    return new, mix(jax.tree.map(lambda x, m: x - _scale(rate, m), x, new))


def _scale(factor: Any, x: jax.Array) -> jax.Array:
    return jnp.asarray(factor, x.dtype) * x


def consensus_growth(topology: Topology, momentum: float) -> float:
    """The factor by which differences between DecentLaM's workers grow a step, without gradients.

    It is the spectral radius of the recursion in the module's docstring; for a cycle of matrices
    that of the whole cycle to the power 1 / period.
    """
    n, matrices = topology.num_workers, topology.matrices - 1 / topology.num_workers
    if topology.period == 1:
        symmetric = np.array_equal(matrices[0], matrices[0].T)
        values = np.linalg.eigvalsh(matrices[0]) if symmetric else np.linalg.eigvals(matrices[0])
        middle = (momentum + values.astype(complex)) / 2
        root = np.sqrt(middle**2 - momentum)
        return float(max(np.abs(middle + root).max(), np.abs(middle - root).max()))
    product = np.eye(2 * n)
    for w in matrices:
        step = np.block(
            [[momentum * np.eye(n) + w, -momentum * np.eye(n)], [np.eye(n), np.zeros((n, n))]]
        )
        product = step @ product
    return float(np.abs(np.linalg.eigvals(product)).max() ** (1 / topology.period))
