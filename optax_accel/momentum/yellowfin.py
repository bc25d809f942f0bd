r"""YellowFin: SGD whose learning rate and momentum are tuned by a closed form in each step.

For a quadratic of curvatures between :math:`h_{min}` and :math:`h_{max}`, gradient variance C and
distance D to the minimum, the momentum :math:`\mu` and the rate :math:`\eta` are those for which
the expected squared distance after one step is least, among those with which all directions
contract at the same rate:

.. math::
  \mu, \eta = \arg\min_\mu \; \mu D^2 + \eta^2 C \quad\text{with}\quad
  \mu \ge \left(\frac{\sqrt{r} - 1}{\sqrt{r} + 1}\right)^2,\;
  r = \frac{h_{max}}{h_{min}},\; \eta = \frac{(1 - \sqrt\mu)^2}{h_{min}} .

Curvatures are estimated by squared norms of gradients, so the method depends on the scale of the
loss: a loss that is c times as large gets a rate smaller by :math:`c^2`, not by c.

Zhang and Mitliagkas, `YellowFin and the art of momentum tuning <https://arxiv.org/abs/1706.03471>`_,
MLSys 2019.  Faithful to the authors' code (``JianGoForIt/YellowFin``, ``tuner_utils/yellowfin.py``)
with its default options: unsmoothed rate and momentum, logarithmic averages of the curvatures, slow
start, adaptive clipping, no correction for sparse gradients.  Ours: the root of the cubic equation
and the bias corrections in forms that keep their digits in float32, and the refusal of gradients
that are not finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import (
    check_count,
    check_dtype,
    check_floating_leaves,
    check_learning_rate,
    check_number,
    static_integer,
    with_checked_init,
)
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import one_minus_power, total

# Constants of the authors' code: `EPS`, `LARGE_FLOAT_VAL` and the root of `stat_protect_fac`.
_EPS = 1e-6
_NO_LIMIT = 1e15
_PROTECTION = 10.0


class ScaleByYellowFinState(NamedTuple):
    """State of :func:`scale_by_yellowfin`; scalars are of the widest float.

    Attributes:
      count: number of updates made; int32 scalar.
      rejected: number of gradients that were refused, because they were not finite; int32 scalar.
      tuned_learning_rate: the learning rate of the last update (before the first, of that).
      tuned_momentum: the momentum of the last update (before the first, of that).
      curvature_range: estimates of the least and the largest curvature; shape (2,).
      recent_squared_norms: the squared norms of the last gradients, as many as the window holds.
      mean_squared_norm: running mean of the squared norm of the gradient, before bias correction,
        as are the next ones.
      mean_norm: running mean of the norm of the gradient.
      mean_log_range: running means of the logarithms of the curvatures; shape (2,).
      mean_distance: running mean of the distance to the minimum.
      mean_gradient: running mean of the gradient, like the parameters, in at least float32.
      velocity: the momentum buffer, like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    rejected: jax.Array
    tuned_learning_rate: jax.Array
    tuned_momentum: jax.Array
    curvature_range: jax.Array
    recent_squared_norms: jax.Array
    mean_squared_norm: jax.Array
    mean_norm: jax.Array
    mean_log_range: jax.Array
    mean_distance: jax.Array
    mean_gradient: chex.ArrayTree
    velocity: chex.ArrayTree


def _estimate(
    updates: chex.ArrayTree, state: ScaleByYellowFinState, norm: jax.Array, decay: float
) -> tuple[ScaleByYellowFinState, jax.Array]:
    """The running means with one gradient more, and the rate and the momentum tuned by them.

    Args:
      updates: the gradient.
      state: the state before it.
      norm: its norm, which may not be finite; then the mean of the gradient stays.
      decay: decay of the means.

    Returns:
      The state without a velocity, and the factor by which the gradient is clipped for the step.
    """
    first = state.count == 0
    count = optax.safe_increment(state.count)
    usable = jnp.isfinite(norm)

    # Clipped loosely for the statistics, tightly for the step.
    limit = jnp.where(first, _NO_LIMIT, jnp.sqrt(state.curvature_range[1]))
    for_statistics = jnp.where(first, _NO_LIMIT, _PROTECTION * limit)
    clipped = jnp.minimum(norm, for_statistics)
    scale = _clip_factor(norm, for_statistics)

    weight = one_minus_power(decay, count)

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return decay * old + (1 - decay) * new

    size = state.recent_squared_norms.size
    recent = state.recent_squared_norms.at[state.count % size].set(clipped**2 + _EPS)
    filled = jnp.arange(size) < count
    extremes = jnp.stack(
        [jnp.min(recent, initial=jnp.inf, where=filled), jnp.max(recent, initial=0)]
    )
    log_range = mean(state.mean_log_range, jnp.log(extremes + _EPS))
    curvatures = jnp.exp(log_range / weight)

    squared_norm = mean(state.mean_squared_norm, clipped**2)
    mean_norm = mean(state.mean_norm, clipped)
    distance = mean(state.mean_distance, mean_norm / weight / (squared_norm / weight + _EPS))
    # A refused gradient keeps the old mean, by a new one with weights 1 and 0.
    kept, added = jnp.where(usable, decay, 1), jnp.where(usable, (1 - decay) * scale, 0)
    gradient = jax.tree.map(
        lambda g, old: (
            kept.astype(old.dtype) * old
            + added.astype(old.dtype) * jnp.where(usable, g, 0).astype(old.dtype)
        ),
        updates,
        state.mean_gradient,
    )
    variance = squared_norm / weight - _sum_of_squares(gradient) / weight**2
    momentum, rate = _tuned(curvatures, jnp.maximum(variance, _EPS), distance / weight)
    slow_start = jnp.minimum(1.0, count.astype(weight.dtype) / (10 * size))
    estimates = state._replace(
        count=count,
        tuned_learning_rate=rate * slow_start,
        tuned_momentum=momentum,
        curvature_range=curvatures,
        recent_squared_norms=recent,
        mean_squared_norm=squared_norm,
        mean_norm=mean_norm,
        mean_log_range=log_range,
        mean_distance=distance,
        mean_gradient=gradient,
        velocity=None,
    )
    return estimates, scale * _clip_factor(clipped, limit)


def _step(
    updates: chex.ArrayTree,
    velocity: chex.ArrayTree,
    momentum: jax.Array,
    rate: jax.Array,
    clip: Callable[[jax.Array], jax.Array],
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """One heavy-ball step of a clipped gradient: the update and the new velocity."""
    velocity = jax.tree.map(
        lambda g, v: momentum.astype(v.dtype) * v + clip(g).astype(v.dtype), updates, velocity
    )
    new_updates = jax.tree.map(
        lambda g, v: (rate.astype(v.dtype) * v).astype(g.dtype), updates, velocity
    )
    return new_updates, velocity


def scale_by_yellowfin(
    *,
    initial_learning_rate: float = 1e-4,
    initial_momentum: float = 0.0,
    decay: float = 0.999,
    window: int = 20,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum and a learning rate, both tuned in each step.

    The updates contain the tuned rate: ``optax.scale_by_learning_rate(1.0)`` after it makes it
    descend.  A gradient whose squared norm is not finite is refused: the update is 0, and nothing
    but the count of refusals changes.  It keeps two copies of the parameters.

    Args:
      initial_learning_rate: the rate of the first step, greater than 0; 1e-4 in the authors' code,
        1 in their paper.
      initial_momentum: the momentum of the first step, in [0, 1); 0 in the paper.
      decay: decay of all running means, in [0, 1); 0.999 in the authors' code.
      window: number of steps whose squared norms bound the curvature, at least 1; 20 in the paper.
        In the first ``10 * window`` steps the rate rises linearly (slow start).
      accumulator_dtype: dtype of the momentum buffer; ``None`` (default) is that of the
        parameters.

    Returns:
      A transformation with state :class:`ScaleByYellowFinState`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = optax.chain(oa.scale_by_yellowfin(), optax.scale_by_learning_rate(1.0))
      >>> params = jnp.array([1.0, 10.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> [round(float(h), 2) for h in optax.tree.get(state, "curvature_range")]
      [101.0, 101.0]

    References:
      Zhang and Mitliagkas, `YellowFin <https://arxiv.org/abs/1706.03471>`_, and the authors' code.
    """
    check_number("initial_learning_rate", initial_learning_rate, 0, open_low=True)
    check_number("initial_momentum", initial_momentum, 0, 1, open_high=True)
    check_number("decay", decay, 0, 1, open_high=True)
    check_count("window", window, 1)
    check_dtype("accumulator_dtype", accumulator_dtype)

    def init_fn(params: chex.ArrayTree) -> ScaleByYellowFinState:
        check_floating_leaves(params, "scale_by_yellowfin")
        check_undivided(params, "scale_by_yellowfin")
        dtype = jnp.result_type(float)
        return ScaleByYellowFinState(
            count=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            tuned_learning_rate=jnp.asarray(initial_learning_rate, dtype),
            tuned_momentum=jnp.asarray(initial_momentum, dtype),
            curvature_range=jnp.zeros(2, dtype),
            recent_squared_norms=jnp.zeros(static_integer("window", window, 1), dtype),
            mean_squared_norm=jnp.zeros((), dtype),
            mean_norm=jnp.zeros((), dtype),
            mean_log_range=jnp.zeros(2, dtype),
            mean_distance=jnp.zeros((), dtype),
            mean_gradient=jax.tree.map(_wide_zeros, params),
            velocity=optax.tree.zeros_like(params, dtype=accumulator_dtype),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByYellowFinState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByYellowFinState]:
        del params, extra_args
        norm = jnp.sqrt(_sum_of_squares(updates).astype(state.mean_norm.dtype))
        usable = jnp.isfinite(norm)
        first = state.count == 0
        estimates, step_scale = _estimate(updates, state, norm, decay)
        momentum = jnp.where(first, initial_momentum, estimates.tuned_momentum)
        rate = jnp.where(first, initial_learning_rate, estimates.tuned_learning_rate)
        new_updates, velocity = _step(
            updates,
            state.velocity,
            jnp.where(usable, momentum, 1),
            jnp.where(usable, rate, 0),
            lambda g: jnp.where(usable, step_scale.astype(g.dtype) * g, 0),
        )
        accepted = estimates._replace(
            tuned_learning_rate=rate, tuned_momentum=momentum, mean_gradient=None
        )
        refused = state._replace(
            rejected=optax.safe_increment(state.rejected), mean_gradient=None, velocity=None
        )
        scalars = jax.tree.map(
            lambda new, old: jnp.where(usable, new.astype(old.dtype), old), accepted, refused
        )
        return new_updates, scalars._replace(
            mean_gradient=estimates.mean_gradient, velocity=velocity
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def yellowfin(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    initial_learning_rate: float = 1e-4,
    initial_momentum: float = 0.0,
    decay: float = 0.999,
    window: int = 20,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """YellowFin: SGD with momentum that tunes its own learning rate and momentum.

    The tuned values can be read from the state: ``optax.tree.get(state, "tuned_learning_rate")``,
    ``"tuned_momentum"`` and ``"curvature_range"``.

    Args:
      learning_rate: factor of the tuned rate, at least 0; float or schedule. 1 (default) leaves
        the rate as it was tuned; the authors lower it to decay the rate.
      initial_learning_rate: the rate of the first step, greater than 0; 1e-4 in the authors' code.
      initial_momentum: the momentum of the first step, in [0, 1); 0 in the paper.
      decay: decay of all running means, in [0, 1); 0.999 in the authors' code.
      window: number of steps whose squared norms bound the curvature, at least 1; 20 in the paper.
        In the first ``10 * window`` steps the rate rises linearly.
      accumulator_dtype: dtype of the momentum buffer; ``None`` (default) is that of the
        parameters.

    Returns:
      The optimizer.

    Raises:
      ValueError: an argument outside its range.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * (p[0] ** 2 + 10 * p[1] ** 2)
      >>> tx = oa.yellowfin(initial_learning_rate=0.01)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(p), 5) for p in params]
      [0.98953, 0.89571]

    References:
      Zhang and Mitliagkas, `YellowFin <https://arxiv.org/abs/1706.03471>`_, and the authors' code.
    """
    check_learning_rate(learning_rate)
    scale = scale_by_yellowfin(
        initial_learning_rate=initial_learning_rate,
        initial_momentum=initial_momentum,
        decay=decay,
        window=window,
        accumulator_dtype=accumulator_dtype,
    )
    return with_checked_init(
        optax.chain(scale, optax.scale_by_learning_rate(learning_rate)),
        functools.partial(check_floating_leaves, method="yellowfin"),
    )


def _tuned(
    curvatures: jax.Array, variance: jax.Array, distance: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The momentum and the rate for these estimates (SingleStep of the paper)."""
    low, high = curvatures[0] + _EPS, curvatures[1] + _EPS
    p = (distance + _EPS) ** 2 * low**2 / (2 * (variance + _EPS))
    ratio = jnp.maximum(high / low, 1 + _EPS)
    least = (jnp.sqrt(ratio) - 1) / (jnp.sqrt(ratio) + 1)
    momentum = jnp.maximum(_root_of_momentum(p) ** 2, least**2)
    return momentum, (1 - jnp.sqrt(momentum)) ** 2 / low


def _root_of_momentum(p: jax.Array) -> jax.Array:
    """The x in (0, 1) for which ``p * x = (1 - x) ** 3``.

    With y = x - 1 the equation is ``y**3 + p * y + p = 0``, whose real root is a hyperbolic sine.
    Vieta's formula, in the authors' code, is a difference of two numbers of size ``sqrt(p)``, which
    in float32 has no digits left where p is large: where the variance is small.
    """
    size = jnp.sqrt(p / 3)
    return 1 - 2 * size * jnp.sinh(jnp.arcsinh(1.5 / size) / 3)


def _clip_factor(norm: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(norm > limit, limit / norm, 1.0)


def _sum_of_squares(tree: chex.ArrayTree) -> jax.Array:
    wide = [leaf.astype(_wide_dtype(leaf)).ravel() for leaf in jax.tree.leaves(tree)]
    return total([jnp.vdot(x, x).real for x in wide])


def _wide_zeros(param: jax.Array) -> jax.Array:
    return jnp.zeros_like(param, dtype=_wide_dtype(param))


def _wide_dtype(x: jax.Array) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
