r"""Anderson acceleration of training itself: extrapolate the iterates of any optimizer.

The iterates of an optimizer are those of a fixed-point iteration :math:`x_{i+1} = g(x_i)`.  Every
few steps the last n of them are mixed so that the mixed residual is least:

.. math::
  r_i = x_{i+1} - x_i, \qquad
  c = \frac{z}{1^T z}, \quad (R^T R / \|R^T R\|_2 + \lambda I)\, z = 1, \qquad
  x \leftarrow \sum_i c_i\, x_{i+1}

and the optimizer goes on from there.  On a quadratic, gradient descent of step 1/L reaches with it
the rate of Chebyshev's method without knowing the smallest eigenvalue.

Scieur, d'Aspremont, Bach, `Regularized nonlinear acceleration <https://arxiv.org/abs/1606.04133>`_,
NeurIPS 2016; restarted and for networks: Scieur, Oyallon, d'Aspremont, Bach, `Nonlinear
acceleration of deep neural networks <https://arxiv.org/abs/1805.09639>`_, 2018.  Faithful: the
weights, and that the history begins anew after an extrapolation.  Ours: the mixing of
:math:`x_{i+1}` in place of :math:`x_i`, which is one more step of the optimizer; the safeguard, by
the loss of the batch at hand in place of a search over :math:`\lambda`; the state of the optimizer
inside, which is left as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    check_count,
    check_flag,
    check_inner,
    check_number,
    known_integer,
    static_integer,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select, with_fixed_leaves
from optax_accel._numerics import total
from optax_accel.equilibrium.solvers import mixing_weights
from optax_accel.refresh import (
    Cost,
    RefreshLike,
    announce_cost,
    announce_eigenspace,
    of_eigenspace,
)


class AndersonAccelerationState(NamedTuple):
    """State of :func:`anderson_acceleration`.

    Attributes:
      count: number of updates made; int32 scalar.
      iterates: the last parameters, like the parameters with an axis of ``memory`` in front.
      consecutive: how many of them followed each other without an extrapolation; int32 scalar.
      mixing: the weights of the last extrapolation that was tried, (memory,), float32; 0 at first.
      accepted: number of extrapolations that were taken; int32 scalar.
      inner_state: state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    iterates: chex.ArrayTree
    consecutive: jax.Array
    mixing: jax.Array
    accepted: jax.Array
    inner_state: chex.ArrayTree


def anderson_acceleration(
    inner: optax.GradientTransformation,
    memory: int = 5,
    every: int | None = None,
    *,
    ridge: float = 1e-8,
    safeguard: bool = True,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Every few steps replaces the update by one that leads to a mixture of the last iterates.

    It gains where the optimizer's steps are nearly deterministic and nearly linear: full batches,
    large batches, the end of a schedule.  With noisy gradients the weights fit the noise, and the
    safeguard then rejects most extrapolations.

    It has to be the outermost, with all that changes the steps inside: its history takes for the
    next parameters what its updates lead to.  ``anderson_acceleration(optax.chain(clip, sgd))``,
    not ``chain(anderson_acceleration(sgd), scale(0.5))``.

    ``update`` needs ``params``, and with ``safeguard`` also ``value_fn`` (an
    :class:`~optax_accel.Objective` or a function of the parameters).  It keeps ``memory`` copies of
    the parameters.

    Args:
      inner: the transformation or optimizer whose iterates are mixed, its learning rate included.
      memory: the number of iterates that are kept, at least 2; default 5, that of the experiments
        with networks of Scieur et al. (2018).
      every: an extrapolation is tried at every so many steps, at least ``memory``; None (default)
        is ``memory``.
      ridge: :math:`\lambda`, relative to the norm of the inner products, at least 0; default 1e-8
        (our choice: of the powers of ten the best on quadratics in float32).
      safeguard: whether an extrapolation is taken only where the loss is not larger than after the
        plain step, at the price of two values of the loss; default True.  What is not finite is
        never taken.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves that are mixed; the others follow the inner transformation.
        ``None`` (default): all.

    Returns:
      A transformation with state :class:`AndersonAccelerationState`.  Its ``update`` takes the
      extra argument ``refresh``, a static Python value: None (default) decides in the graph whether
      this step extrapolates, False does not, ``"warm"``, ``"cold"`` or True does;
      :func:`~optax_accel.refresh_at` gives it.

    Raises:
      ValueError: ``memory``, ``every`` or ``ridge`` outside its range; in ``update``: missing
        ``params`` or ``value_fn``.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([1.0, 0.1]) * p**2)
      >>> tx = oa.anderson_acceleration(optax.sgd(0.5))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 1e-6)  # gradient descent alone: 0.018
      True

    References:
      Scieur et al., `Regularized nonlinear acceleration <https://arxiv.org/abs/1606.04133>`_,
      algorithm 1; `Nonlinear acceleration of deep neural networks
      <https://arxiv.org/abs/1805.09639>`_.
    """
    check_inner(inner)
    check_count("memory", memory, 2)
    if every is not None:
        check_count("every", every, known_integer(memory) or 2)
    check_number("ridge", ridge, 0)
    check_flag("safeguard", safeguard)
    return with_fixed_leaves(
        lambda mask: _anderson_acceleration(
            optax.with_extra_args_support(inner), memory, every, ridge, safeguard, mask
        ),
        mask,
    )


def _anderson_acceleration(
    inner: optax.GradientTransformationExtraArgs,
    memory: Any,
    every: Any,
    ridge: Any,
    safeguard: bool,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    name = "anderson_acceleration"

    def init_fn(params: chex.ArrayTree) -> AndersonAccelerationState:
        check_params(params, name, loss=safeguard)
        check_selected(params, mask, name)
        kept = static_integer("memory", memory, 2)
        period = kept if every is None else static_integer("every", every, kept)
        announce_eigenspace(period, period - 1, starts_anew=False)
        if safeguard:
            announce_cost(Cost(f"two values of the loss every {period} steps"))
        return AndersonAccelerationState(
            count=jnp.zeros((), jnp.int32),
            iterates=jax.tree.map(
                lambda leaf: jnp.zeros((kept, *jnp.shape(leaf)), jnp.result_type(leaf)),
                select(params, resolve(params, mask)),
            ),
            consecutive=jnp.zeros((), jnp.int32),
            mixing=jnp.zeros(kept, jnp.float32),
            accepted=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: AndersonAccelerationState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        refresh: RefreshLike = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, AndersonAccelerationState]:
        mode = of_eigenspace(refresh)
        objective = None
        if safeguard:
            why = "compare the loss after an extrapolation with that after the plain step"
            objective = as_objective(value_fn, extra_args, method=name, params=params, why=why)
        else:
            check_params(params, name, "tx.update(grads, state, params)", loss=False)
        if value_fn is not None:
            extra_args["value_fn"] = value_fn
        plain, inner_state = inner.update(
            updates, state.inner_state, params, refresh=refresh, **extra_args
        )
        chosen = resolve(params, mask)
        kept = state.mixing.size
        slot = state.count % kept
        iterates = jax.tree.map(
            lambda old, new: lax.dynamic_update_index_in_dim(old, new, slot, 0),
            state.iterates,
            select(params, chosen),
        )
        consecutive = jnp.minimum(state.consecutive + 1, kept)
        # The slots of the last iterates that followed each other.
        present = (slot - jnp.arange(kept)) % kept < consecutive

        def extrapolated() -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
            mixed, weights = _mix(
                iterates, select(params, chosen), select(plain, chosen), slot, present, ridge
            )
            new = merge(mixed, plain, chosen)
            taken = jnp.isfinite(weights).all()
            if objective is not None:
                after = objective(optax.apply_updates(params, new))
                taken &= jnp.isfinite(after) & (
                    after <= objective(optax.apply_updates(params, plain))
                )
            new = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, plain)
            return new, weights, taken

        def not_now() -> tuple[chex.ArrayTree, jax.Array, jax.Array]:
            return plain, state.mixing, jnp.zeros((), bool)

        if mode is False or not jax.tree.leaves(iterates):
            new, weights, taken = not_now()
        elif mode is None:
            due = (state.count + 1) % (kept if every is None else every) == 0
            new, weights, taken = lax.cond(due, extrapolated, not_now)
        else:
            new, weights, taken = extrapolated()
        return new, AndersonAccelerationState(
            optax.safe_increment(state.count),
            iterates,
            jnp.where(taken, 0, consecutive),
            weights,
            state.accepted + taken.astype(jnp.int32),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mix(
    iterates: chex.ArrayTree,
    params: chex.ArrayTree,
    updates: chex.ArrayTree,
    slot: jax.Array,
    present: jax.Array,
    ridge: Any,
) -> tuple[chex.ArrayTree, jax.Array]:
    """The update that leads to the mixture, and its weights."""

    def wide(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    def next_moves(old: jax.Array, now: jax.Array, update: jax.Array) -> jax.Array:
        """The successor of each iterate, seen from the present one."""
        after = jnp.roll(wide(old), -1, 0) - wide(now)[None]
        return lax.dynamic_update_index_in_dim(after, wide(update).astype(after.dtype), slot, 0)

    def inner_products(after: jax.Array, old: jax.Array, now: jax.Array) -> jax.Array:
        residuals = (after - (wide(old) - wide(now)[None])).reshape(present.size, -1)
        residuals = jnp.where(jnp.broadcast_to(present[:, None], residuals.shape), residuals, 0)
        return jnp.matmul(residuals, residuals.T, precision="highest")

    after = jax.tree.map(next_moves, iterates, params, updates)
    gram = total(jax.tree.leaves(jax.tree.map(inner_products, after, iterates, params)))
    finite = jnp.isfinite(gram).all()  # LAPACK complains of the rest
    gram = jnp.where(finite, gram, jnp.eye(present.size, dtype=gram.dtype))
    gram /= jnp.maximum(jnp.linalg.norm(gram, 2), jnp.finfo(gram.dtype).tiny)
    weights, solved = mixing_weights(gram[None], present, ridge, 0.0)
    weights = jnp.where(finite & solved[0], weights[0], jnp.nan)

    def mixed(after: jax.Array, update: jax.Array) -> jax.Array:
        # Absent iterates have weight 0, but may be anything.
        there = present.reshape(-1, *[1] * (after.ndim - 1))
        after = jnp.where(jnp.broadcast_to(there, after.shape), after, 0)
        move = jnp.tensordot(weights.astype(after.dtype), after, 1, precision="highest")
        return move.astype(update.dtype)

    return jax.tree.map(mixed, after, updates), weights.astype(jnp.float32)
