r"""Extragradient: step with the gradient of a point ahead.

.. math::
  x_{t+1/2} = x_t - \hat\gamma\, \xi_t, \qquad
  x_{t+1} = \mathrm{inner}\big(x_t, \nabla f(x_{t+1/2})\big)

with an extrapolation direction :math:`\xi_t`: a fresh gradient, the past one, or noise.  On several
replicas the extrapolation can be *local*: each replica steps ahead with its own direction, without
communication, and only the gradients at the points ahead are averaged.

Lin, Kong, Stich, Jaggi, `Extrapolation for large-batch training in deep learning
<https://arxiv.org/abs/2006.05720>`_, ICML 2020.  Our reading: Extrap-SGD is reconstructed from the
abstract and reviews (its Algorithm 1 and hyperparameters were not available to us); the gradient
moves the stored point, as in PyTorch's Nesterov momentum, which is updated once a step.  Faithful
to public code: :func:`extra_adam` (Gidel et al., `A variational inequality perspective on GANs
<https://arxiv.org/abs/1802.10551>`_, 2019) and filter-normalized noise (Wen et al., `SmoothOut
<https://arxiv.org/abs/1805.07898>`_, 2018).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._adam import scale_by_adam
from optax_accel._arguments import (
    check_choice,
    check_flag,
    check_inner,
    check_learning_rate,
    check_number,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params, mean_arguments
from optax_accel._masking import Mask, check_selected, merge, resolve, select, with_fixed_leaves
from optax_accel._numerics import norm
from optax_accel._random import as_key, map_with_keys
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, announce_cost

Direction = Literal[
    "gradient",
    "past",
    "gaussian",
    "uniform",
    "filter_gaussian",
    "filter_uniform",
    "inner_update",
    "none",
]
_NOISE = ("gaussian", "uniform", "filter_gaussian", "filter_uniform")


class ExtragradientState(NamedTuple):
    """State of :func:`extragradient`.

    Attributes:
      count: number of updates made; int32 scalar.
      objective_value: the loss at the last extrapolated point (infinity before the first step);
        float32 scalar. Logging it instead of the loss at ``params`` saves a forward pass under
        ``jit``.
      rng_key: PRNG key of the noise directions, else None.
      past: this replica's last extrapolated gradient, for direction ``"past"``, else None.
      inner_state: state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    objective_value: jax.Array
    rng_key: chex.PRNGKey | None
    past: chex.ArrayTree
    inner_state: chex.ArrayTree


def extragradient(
    inner: optax.GradientTransformation,
    extrapolation_rate: optax.ScalarOrSchedule,
    direction: Direction = "gradient",
    *,
    axis_name: str | None = None,
    trust_ratio: bool = False,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Feeds any transformation the gradient of an extrapolated point.

    Directions :math:`\xi_t` (gradients per step, under ``jit``):

    * ``"gradient"`` (2): the gradient at ``params``.  Without ``axis_name`` it is the incoming one,
      so the caller decides between the same batch as ``value_fn`` and another, independent one; or
      ``extrapolation_value_fn`` gives the other batch.
    * ``"past"`` (1): the last extrapolated gradient, 0 at first: the single-call variant.  With
      ``inner = sgd(r)`` and ``extrapolation_rate = r`` the extrapolated points obey the recursion
      of ``optax.optimistic_gradient_descent(r)``, which starts with its first gradient in place of
      a past one.
    * ``"gaussian"``, ``"uniform"`` (1): noise from N(0, I) or U[-1, 1]; the rate is its amplitude.
    * ``"filter_gaussian"``, ``"filter_uniform"`` (1): the noise of each filter (last axis of a
      leaf; each scalar of a vector) scaled to the filter's norm.
    * ``"inner_update"`` (2): the inner transformation's own update, its state advanced twice a step
      (ExtraAdam, for an Adam inside); the rate is a multiple of that update, 1 in ExtraAdam.
    * ``"none"`` (1): no extrapolation, the inner transformation bit for bit; with ``axis_name``, on
      the mean of the incoming gradients.

    Where the incoming gradient is not used (past, noise, or with ``axis_name``), ``jit`` removes
    its computation, unless the training step also returns the loss at ``params``: return
    ``optax.tree.get(state, "objective_value")`` instead.

    ``update`` needs ``value_fn`` (an :class:`~optax_accel.Objective` or a function of the
    parameters) and ``params``.  Clip gradients in ``inner``, which sees the extrapolated gradient.
    With batch normalization update the statistics in one of the two passes only; with dropout use
    the same key in both.

    Args:
      inner: transformation or optimizer that takes the step from ``params``.
      extrapolation_rate: :math:`\hat\gamma`, at least 0, float or schedule. 0 leaves the inner
        transformation unchanged.
      direction: where to extrapolate to, one of the names above; default ``"gradient"``, the
        gradient at ``params``.
      axis_name: axis of ``pmap``, ``shard_map`` or ``vmap`` for *local* extrapolation: each replica
        extrapolates with its own direction and the gradients at the points ahead are averaged, one
        all-reduce of the parameters' size a step; the incoming gradient is not used and need not
        be averaged.  ``None``: global extrapolation, the same on all replicas; an Objective that
        has an ``axis_name`` then averages at both points.
      trust_ratio: scales the direction of each leaf with two or more axes by the leaf's norm over
        the direction's (1 if either is 0), as LARS scales steps.  Our reading of the paper's
        layer-wise variant.
      key: PRNG key or integer seed of the noise; with ``axis_name`` each replica draws different
        noise.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to extrapolate; the others stay at ``params``.  ``None``: all.
        Masked-out integers, booleans and PRNG keys are hidden from ``inner``; their updates pass
        unchanged.

    Returns:
      A transformation with state :class:`ExtragradientState`.

    Raises:
      ValueError: unknown direction, rate below 0, ``"inner_update"`` with ``axis_name``; in
        ``update``: missing ``value_fn`` or ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.extragradient(optax.sgd(0.1), extrapolation_rate=0.2)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> updates, state = tx.update(jax.grad(loss)(param), state, param, value_fn=loss)
      >>> round(float(param + updates), 4)
      0.92
    """
    return _extragradient(
        "extragradient",
        inner,
        extrapolation_rate,
        direction,
        axis_name=axis_name,
        trust_ratio=trust_ratio,
        key=key,
        mask=mask,
    )


def extrap_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    *,
    extrapolation_rate: optax.ScalarOrSchedule | None = None,
    direction: Direction = "gradient",
    axis_name: str | None = None,
    trust_ratio: bool = False,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Extrap-SGD: SGD with (Nesterov) momentum on extrapolated gradients.

    The momentum form is PyTorch's and Optax's, extrapolating from the stored point; with the
    look-ahead form ``y = x + u v`` it agrees after the change of variables ``params = y``.

    Args:
      learning_rate: float or schedule, at least 0.
      momentum: momentum in [0, 1), ``None`` for plain SGD. The paper's strong baseline is Nesterov.
      nesterov: whether the momentum has Nesterov's form; default True.
      extrapolation_rate: step ahead, at least 0, float or schedule; ``None`` (default): the
        learning rate (ratio 1, our choice: the paper's value is not known; tune it between 0.05
        and 1 times the learning rate).
      direction: where to extrapolate to, one of the words listed in :func:`extragradient`;
        ``"gradient"`` (default) steps ahead along the gradient.
      axis_name: axis of ``pmap``, ``shard_map`` or ``vmap`` for local extrapolation, the paper's
        method for large batches: each replica extrapolates with its own direction.
      trust_ratio: scales the direction of each leaf with two or more axes by the leaf's norm over
        the direction's.
      key: PRNG key or integer seed of the noise directions.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves to extrapolate; ``None``: all.

    Returns:
      The optimizer; its ``update`` needs ``value_fn``.

    Raises:
      ValueError: as :func:`extragradient`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.extrap_sgd(learning_rate=0.1)
      >>> param = jnp.array(1.0)
      >>> updates, _ = tx.update(jax.grad(loss)(param), tx.init(param), param, value_fn=loss)
      >>> round(float(param + updates), 4)
      0.829
    """
    check_learning_rate(learning_rate)
    check_flag("nesterov", nesterov)
    if momentum is not None:
        check_number("momentum", momentum, 0, 1, open_high=True)
    return _extragradient(
        "extrap_sgd",
        optax.sgd(learning_rate, momentum, nesterov if momentum is not None else False),
        learning_rate if extrapolation_rate is None else extrapolation_rate,
        direction,
        axis_name=axis_name,
        trust_ratio=trust_ratio,
        key=key,
        mask=mask,
    )


def extra_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """ExtraAdam: both half-steps are Adam steps that share moments and step count.

    Args:
      learning_rate: float or schedule, at least 0; counted in half-steps, two a step.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment *before* its bias correction, as in the authors'
        code.

    Returns:
      The optimizer; its ``update`` needs ``value_fn``.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * p**2
      >>> tx = oa.extra_adam(learning_rate=0.1)
      >>> param = jnp.array(1.0)
      >>> updates, _ = tx.update(jax.grad(loss)(param), tx.init(param), param, value_fn=loss)
      >>> round(float(param + updates), 4)
      0.9004

    References:
      Gidel et al., `A variational inequality perspective on GANs
      <https://arxiv.org/abs/1802.10551>`_, 2019, Algorithm 4.
    """
    check_learning_rate(learning_rate)
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    adam = scale_by_adam("extra_adam", b1, b2, eps, eps_before_correction=True)
    return _extragradient(
        "extra_adam",
        optax.chain(adam, optax.scale_by_learning_rate(learning_rate)),
        1.0,
        "inner_update",
    )


def _extragradient(
    method: str,
    inner: optax.GradientTransformation,
    rate: optax.ScalarOrSchedule,
    direction: Direction,
    *,
    axis_name: str | None = None,
    trust_ratio: bool = False,
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """:func:`extragradient` whose errors carry the name of another method."""
    check_choice("direction", direction, get_args(Direction))
    check_number("extrapolation_rate", rate, 0, allow_schedule=True)
    check_flag("trust_ratio", trust_ratio)
    if direction == "inner_update" and axis_name is not None:
        raise ValueError(
            f"{method}: direction 'inner_update' advances the inner state with the incoming "
            "gradient, which must be the same on all replicas; leave `axis_name` out."
        )
    check_inner(inner)
    inner = optax.with_extra_args_support(inner)
    if direction == "none":
        return with_fixed_leaves(lambda mask: _without_extrapolation(inner, axis_name), mask)
    initial_key = as_key(key) if direction in _NOISE else None
    return with_fixed_leaves(
        lambda mask: _with_extrapolation(
            method, inner, rate, direction, axis_name, trust_ratio, initial_key, mask
        ),
        mask,
    )


def _without_extrapolation(
    inner: optax.GradientTransformationExtraArgs, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
    """The inner transformation on the incoming gradients or, with an axis, on their mean."""

    def init_fn(params: chex.ArrayTree) -> ExtragradientState:
        return ExtragradientState(
            count=jnp.zeros((), jnp.int32),
            objective_value=jnp.full((), jnp.inf, jnp.float32),
            rng_key=None,
            past=None,
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: ExtragradientState,
        params: chex.ArrayTree | None = None,
        *,
        extrapolation_value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ExtragradientState]:
        del extrapolation_value_fn
        count = optax.safe_increment(state.count)
        if axis_name is not None:
            updates, extra_args = mean_arguments(updates, extra_args, axis_name)
        new_updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        value = jnp.asarray(extra_args.get("value", state.objective_value), jnp.float32)
        return new_updates, state._replace(
            count=count, objective_value=value, inner_state=inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_extrapolation(
    method: str,
    inner: optax.GradientTransformationExtraArgs,
    rate: optax.ScalarOrSchedule,
    direction: Direction,
    axis_name: str | None,
    trust_ratio: bool,
    initial_key: chex.PRNGKey | None,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    def init_fn(params: chex.ArrayTree) -> ExtragradientState:
        check_params(params, method)
        check_selected(params, mask, method)
        announce_cost(_cost(direction))
        return ExtragradientState(
            count=jnp.zeros((), jnp.int32),
            objective_value=jnp.full((), jnp.inf, jnp.float32),
            rng_key=None if initial_key is None else jnp.copy(initial_key),
            past=optax.tree.zeros_like(params) if direction == "past" else None,
            inner_state=inner.init(params),
        )

    def objective_of(
        argument: str, value_fn: Any, extra_args: dict[str, Any], params: Any, why: str
    ) -> _Global | _Local:
        objective = as_objective(
            value_fn, extra_args, method=method, params=params, why=why, argument=argument
        )
        return _Global(objective) if axis_name is None else _Local(objective, axis_name)

    def update_fn(
        updates: chex.ArrayTree,
        state: ExtragradientState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        extrapolation_value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ExtragradientState]:
        count = optax.safe_increment(state.count)
        inner_args = extra_args if value_fn is None else {**extra_args, "value_fn": value_fn}
        why = "take the gradient at the extrapolated point"
        loss = objective_of("value_fn", value_fn, extra_args, params, why)
        point, chosen = loss.vary(params), resolve(params, mask)
        step_rate = value_of(rate, state.count)
        inner_state = state.inner_state

        if direction == "inner_update":
            inner_step, inner_state = inner.update(updates, inner_state, params, **inner_args)
            step = jax.tree.map(jnp.negative, inner_step)
        elif direction == "past":
            step = state.past
        elif state.rng_key is not None:
            step_key = loss.key(jax.random.fold_in(state.rng_key, state.count))
            step = _noise(step_key, select(point, chosen), direction)
        elif extrapolation_value_fn is not None:
            name, why = "extrapolation_value_fn", "extrapolate with another batch"
            other = objective_of(name, extrapolation_value_fn, extra_args, params, why)
            step = other.objective.grad(point)
        else:
            step = loss.gradient(point, updates)

        ahead = _extrapolate(select(point, chosen), select(step, chosen), step_rate, trust_ratio)
        value, gradient, past = loss.value_and_gradients(merge(ahead, point, chosen))
        for argument, new in (("value", value), ("grad", gradient)):
            if argument in inner_args:
                inner_args[argument] = new
        new_updates, inner_state = inner.update(gradient, inner_state, params, **inner_args)
        return new_updates, ExtragradientState(
            count=count,
            objective_value=value.astype(jnp.float32),
            rng_key=state.rng_key,
            past=past if direction == "past" else None,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cost(direction: Direction) -> Cost:
    if direction == "past" or direction in _NOISE:  # XLA drops the gradient that nobody uses
        return Cost("its gradient at the extrapolated point, in place of the incoming one", 0)
    return Cost("a gradient at the extrapolated point", 1)


class _Global:
    """Global extrapolation: one direction, the same on all replicas."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def vary(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """The parameters, ready to be differentiated at."""
        return self.objective.vary(params)

    def key(self, key: chex.PRNGKey) -> chex.PRNGKey:
        """The key of the noise."""
        return key

    def gradient(self, point: chex.ArrayTree, updates: chex.ArrayTree) -> chex.ArrayTree:
        """The direction of the gradient: the incoming one, so that the caller picks the batch."""
        del point
        return updates

    def value_and_gradients(self, ahead: chex.ArrayTree) -> tuple[Any, Any, Any]:
        """Value and gradient ahead, and the gradient that direction ``"past"`` keeps."""
        value, gradient = self.objective.value_and_grad(ahead)
        return value, gradient, gradient


class _Local:
    """Local extrapolation: each replica takes its own direction; the gradients are averaged."""

    def __init__(self, objective: Objective, axis_name: str):
        self.objective = objective.local
        self._mean = objective.averaged_over(axis_name)
        self._axis_name = axis_name

    def vary(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """The parameters, marked as differing between the replicas."""
        return self._mean.vary(params)

    def key(self, key: chex.PRNGKey) -> chex.PRNGKey:
        """A key for this replica alone."""
        return jax.random.fold_in(key, lax.axis_index(self._axis_name))

    def gradient(self, point: chex.ArrayTree, updates: chex.ArrayTree) -> chex.ArrayTree:
        """This replica's gradient; the incoming one may already be a mean."""
        del updates
        return self.objective.grad(point)

    def value_and_gradients(self, ahead: chex.ArrayTree) -> tuple[Any, Any, Any]:
        """Mean value and gradient ahead, and this replica's gradient."""
        value, local = self.objective.value_and_grad(ahead)
        value, gradient = self._mean.mean((value, local))
        weight = self._mean.batch_weight()
        if weight is not None:  # a gradient without examples may be 0 / 0
            local = jax.tree.map(lambda g: jnp.where(weight == 0, 0, g), self._mean.vary(local))
        return value, gradient, local


def _extrapolate(
    params: chex.ArrayTree, step: chex.ArrayTree, rate: Any, trust_ratio: bool
) -> chex.ArrayTree:
    """``x - rate * step`` in the dtype of ``x``, leaf by leaf."""

    def move(x: jax.Array, xi: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scaled = jnp.asarray(rate, wide) * xi.astype(wide)
        if trust_ratio and x.ndim > 1:
            of_params, of_step = norm(x).astype(wide), norm(xi).astype(wide)
            usable = (of_params > 0) & (of_step > 0)
            scaled = scaled * jnp.where(usable, of_params / jnp.where(usable, of_step, 1), 1)
        return (x.astype(wide) - scaled).astype(x.dtype)

    return jax.tree.map(move, params, step)


def _noise(key: chex.PRNGKey, params: chex.ArrayTree, direction: str) -> chex.ArrayTree:
    def leaf_noise(leaf_key: jax.Array, x: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if direction.endswith("gaussian"):
            noise = jax.random.normal(leaf_key, x.shape, dtype)
        else:
            noise = jax.random.uniform(leaf_key, x.shape, dtype, -1, 1)
        if not direction.startswith("filter"):
            return noise
        # SmoothOut has its filters along the first axis (PyTorch); in JAX they are the last axis.
        axes = tuple(range(x.ndim - 1))
        norms = [jnp.sqrt(jnp.sum(a.astype(dtype) ** 2, axes, keepdims=True)) for a in (noise, x)]
        return noise / (norms[0] + 1e-6) * norms[1]

    return map_with_keys(leaf_noise, key, params)
