r"""Training by data assimilation: an ensemble of networks corrected by a Kalman gain, no gradient.

The members :math:`\theta_j` of an ensemble are drawn from a prior around the parameters.  Where
network outputs :math:`D_j = f(\theta_j)` differ from the targets d, the members are moved by their
sample covariances with the outputs (ensemble smoother with multiple data assimilation, ESMDA):

.. math::
  \theta_j \leftarrow \theta_j + C_{\theta D} (C_{DD} + \alpha_i R)^{-1}
  (d + \sqrt{\alpha_i} R^{1/2} z_j - D_j), \qquad z_j \sim N(0, I), \qquad
  \sum_i \frac{1}{\alpha_i} = 1 ,

with the covariance R of the targets' noise.  One iteration with :math:`\alpha = 1` is the update of
the ensemble Kalman filter (EnKF) with perturbed observations.  For a linear network and a Gaussian
prior the mean tends to that of the posterior as the ensemble grows.

Chen et al., `A novel neural network training framework with data assimilation
<https://doi.org/10.1007/s11227-022-04629-7>`_, J. Supercomputing 2022; Emerick, Reynolds, `Ensemble
smoother with multiple data assimilation <https://doi.org/10.1016/j.cageo.2012.03.011>`_, Computers
and Geosciences 2013; Evensen, `Sequential data assimilation
<https://doi.org/10.1029/94JC00572>`_, 1994.  The rule is that of these papers.  Our reading,
because Chen et al.'s settings could not be read: the prior, the sizes of ensembles and the noise.

The Kalman gain is a combination of the members' deviations from their mean A (a row for each
member).  With the outputs' deviations Y, and R = I by a change of units, it is

.. math::
  A^\top G, \qquad G = \frac{Y}{N - 1} \Bigl(\frac{Y^\top Y}{N - 1} + \alpha I\Bigr)^{-1}
  = (Y Y^\top + \alpha (N - 1) I)^{-1} Y ,

and the smaller of the two systems is solved: of as many equations as there are targets or members.
So the members never leave the space that the first ones span: it takes about as many members as
parameters, and these methods suit small networks only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._arguments import (
    as_arrays,
    check_count,
    check_number,
    is_placeholder,
    shown,
    static_integer,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._mesh_axes import check_undivided, filled_like, with_auto_axes
from optax_accel._random import as_key, hash_normal, map_with_keys
from optax_accel.curvature import blocks
from optax_accel.natural_gradient.likelihoods import recognize
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, announce_cost

# Under other names, so that they are not injected: one is used by `init` only, one is a sequence.
PriorScale: TypeAlias = float
Alphas: TypeAlias = Sequence[float]

_TOLERANCE = 1e-4  # published schedules are rounded: 9.333, 7, 4, 2 sum up to 1 + 4e-6


class ESMDAState(NamedTuple):
    """State of :func:`esmda` and :func:`enkf`.

    Attributes:
      count: number of iterations made; int32 scalar.
      ensemble: the members: leaves ``(num_members, *shape)``, in at least float32.
      spread: root mean square, over the parameters, of the members' standard deviations; scalar.
      data_mismatch: mean over members and targets of half the squared residuals over the variances
        of the noise, before the last update; about 0.5 where outputs differ from the targets by
        noise alone, NaN before the first update; scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    ensemble: chex.ArrayTree
    spread: jax.Array
    data_mismatch: jax.Array


def esmda(
    *,
    num_members: int,
    noise: optax.ScalarOrSchedule,
    alphas: Alphas = (4.0, 4.0, 4.0, 4.0),
    prior_scale: PriorScale = 1.0,
    inflation: optax.ScalarOrSchedule = 1.0,
    localization: chex.ArrayTree | None = None,
    mask: Mask = None,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Ensemble smoother with multiple data assimilation: one iteration in each update.

    The ensemble is the state; an update moves the parameters to its mean and ignores the incoming
    gradient, whose computation XLA therefore removes from a compiled step.  It takes the extra
    argument ``value_fn``, the :class:`~optax_accel.Objective` of this step's batch, required: built
    from ``predict``, whose outputs are one array with a leading axis of examples, and from a loss
    that is a sum or mean of squared errors.  The targets are where that loss is smallest, in the
    precision of the outputs, and a target of relative weight w in it has the noise's variance over
    w; those of weight 0 (masked, padded) do not count.

    Give the same batch ``len(alphas)`` times: together these updates assimilate it once.  The
    update after that begins with the first of ``alphas`` again and takes its batch for new data; on
    the same batch it makes the ensemble too sure of itself.

    What stands behind it in a chain changes the parameters, not the ensemble.  An iteration with
    outputs that are not finite changes nothing but ``data_mismatch``.  With an ``axis_name`` of the
    objective each replica evaluates all members on its own examples, and two matrices of
    ``num_members`` squared numbers are summed over the replicas.  To evaluate members on different
    devices instead, shard the leading axis of the state's ``ensemble``.

    Args:
      num_members: size of the ensemble, at least 2; about as many as there are parameters, or more.
      noise: standard deviation of the targets' errors, in their units, above 0; float or schedule.
        A noise that is lost in rounding errors beside the spread of the outputs counts as large as
        these.
      alphas: the factors by which the noise's variance is inflated in one iteration after the
        other, each above 0; their inverses have to sum up to 1. Default: four times 4; decreasing
        ones, such as 9.333, 7, 4, 2, are usual, too (Emerick and Reynolds 2013).
      prior_scale: standard deviation of the first members around the parameters, above 0: of
        arrays with two or more axes times the root of their fan-in, which is the product of all
        axes but the last. Default 1: around parameters of 0 they are as LeCun's initialization
        draws them, and biases from the standard normal distribution (our reading). Members of
        another kind can be put into the state, ``state._replace(ensemble=...)``.
      inflation: factor by which members are moved away from their mean before each iteration,
        against a spread that shrinks too fast; at least 1, default 1; float or schedule.
      localization: factors of the Kalman gain, against correlations that are chance in a small
        ensemble: a pytree like the parameters that are trained, whose leaves have the parameter's
        axes and then those of the targets, each of full length or 1. ``None`` (default): all 1.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to train. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.
      key: PRNG key or integer seed of the first members and of the targets' perturbations.

    Returns:
      A transformation with state :class:`ESMDAState`; ``optax.tree.get(state, "spread")`` reads how
      far the members are apart.

    Raises:
      ValueError: an argument outside its range, here; in ``update``: missing ``value_fn`` or
        ``params``, an objective without ``predict``, outputs without an axis of examples, or a loss
        that is no squared error.
      TypeError: an argument of another kind; parameters that are not real floating point.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> x = jnp.linspace(-1, 1, 20)
      >>> objective = oa.Objective(
      ...     predict=lambda params: params["a"] * x + params["b"],
      ...     loss=lambda outputs: jnp.mean((outputs - (2 * x + 1)) ** 2),
      ... )
      >>> params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
      >>> tx = oa.esmda(num_members=50, noise=0.05)
      >>> state, spread = tx.init(params), []
      >>> for _ in range(4):
      ...     grads = objective.grad(params)  # not used: a compiled step leaves it out
      ...     updates, state = tx.update(grads, state, params, value_fn=objective)
      ...     params = optax.apply_updates(params, updates)
      ...     spread.append(float(optax.tree.get(state, "spread")))
      >>> [round(float(p), 1) for p in params.values()], spread == sorted(spread, reverse=True)
      ([2.0, 1.0], True)

    References:
      Chen et al., `Training by data assimilation <https://doi.org/10.1007/s11227-022-04629-7>`_,
      2022; Emerick, Reynolds, `ESMDA <https://doi.org/10.1016/j.cageo.2012.03.011>`_, 2013,
      section 2.
    """
    return _transformation(
        _Settings(
            name="esmda",
            num_members=num_members,
            noise=noise,
            alphas=_checked_alphas(alphas),
            prior_scale=prior_scale,
            inflation=inflation,
            localization=localization,
            mask=mask,
            key=as_key(key),
        )
    )


def enkf(
    *,
    num_members: int,
    noise: optax.ScalarOrSchedule,
    prior_scale: PriorScale = 1.0,
    inflation: optax.ScalarOrSchedule = 1.0,
    localization: chex.ArrayTree | None = None,
    mask: Mask = None,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Ensemble Kalman filter with perturbed observations: each update assimilates its batch once.

    It is :func:`esmda` with ``alphas=(1.0,)``, for batches that are seen once: one example after
    the other, say.  ``update`` takes ``value_fn``, the :class:`~optax_accel.Objective` of this
    step's batch, as there, and the state is the same.

    Args:
      num_members: size of the ensemble, at least 2; about as many as there are parameters, or more.
      noise: standard deviation of the targets' errors, in their units, above 0; float or schedule.
        A noise that is lost in rounding errors beside the spread of the outputs counts as large as
        these.
      prior_scale: standard deviation of the first members around the parameters, above 0, default
        1: of arrays with two or more axes times the root of their fan-in, which is the product of
        all axes but the last.
      inflation: factor by which members are moved away from their mean before each update, against
        a spread that shrinks too fast; at least 1, default 1; float or schedule.
      localization: factors of the Kalman gain: a pytree like the parameters that are trained, whose
        leaves have the parameter's axes and then those of the targets, each of full length or 1.
        ``None`` (default): all 1.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves to train. Updates of the others pass through unchanged.
        ``None`` (default) selects all leaves.
      key: PRNG key or integer seed of the first members and of the targets' perturbations.

    Returns:
      A transformation with state :class:`ESMDAState`.

    Raises:
      ValueError, TypeError: as :func:`esmda`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> objective = oa.Objective(
      ...     predict=lambda w, x: w * x, loss=lambda out, y: jnp.mean((out - y) ** 2)
      ... )
      >>> w, tx = jnp.zeros(()), oa.enkf(num_members=50, noise=0.1)
      >>> state = tx.init(w)
      >>> for x in jnp.linspace(0.5, 1.5, 10):  # one point at a time
      ...     batch = {"x": x[None], "y": 3 * x[None]}
      ...     updates, state = tx.update(w, state, w, value_fn=objective, **batch)
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(w), 1)
      3.0

    References:
      Evensen, `Sequential data assimilation <https://doi.org/10.1029/94JC00572>`_, 1994; Burgers,
      van Leeuwen, Evensen, `Analysis scheme in the ensemble Kalman filter
      <https://doi.org/10.1175/1520-0493(1998)126%3C1719:ASITEK%3E2.0.CO;2>`_, 1998.
    """
    return _transformation(
        _Settings(
            name="enkf",
            num_members=num_members,
            noise=noise,
            alphas=(1.0,),
            prior_scale=prior_scale,
            inflation=inflation,
            localization=localization,
            mask=mask,
            key=as_key(key),
        )
    )


def esmda_step(
    predict: Callable[[chex.ArrayTree], jax.Array],
    ensemble: chex.ArrayTree,
    targets: chex.Array,
    *,
    noise: chex.Numeric,
    alpha: chex.Numeric = 1.0,
    key: chex.PRNGKey | int | None = None,
    perturbations: chex.Array | None = None,
    localization: chex.ArrayTree | None = None,
) -> chex.ArrayTree:
    r"""One iteration of ESMDA as a plain function of the ensemble; with alpha = 1, of the EnKF.

    Args:
      predict: maps the parameters of one member to its outputs, an array like the targets.
      ensemble: a pytree of parameters whose leaves have a leading axis of at least 2 members.
      targets: the observations d, an array of any shape.
      noise: standard deviation of the targets' errors, above 0: a number, or an array that
        broadcasts to the targets.
      alpha: factor of the noise's variance, above 0; default 1.
      key: PRNG key or integer seed from which the perturbations of the targets are drawn.
      perturbations: these perturbations in units of their standard deviation
        :math:`\sqrt{\alpha}\,\mathrm{noise}`, ``(members, *targets.shape)``, in place of a key.
      localization: factors of the Kalman gain: a pytree like the parameters of one member, whose
        leaves have the parameter's axes and then those of the targets, each of full length or 1.
        ``None`` (default): all 1.

    Returns:
      The new ensemble.

    Raises:
      ValueError: an argument outside its range, fewer than 2 members, outputs that are not like the
        targets, or neither or both of ``key`` and ``perturbations``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> new = oa.esmda_step(
      ...     lambda theta: theta**2,
      ...     jnp.array([0.0, 1.0, 2.0]),
      ...     jnp.array(3.0),
      ...     noise=0.5,
      ...     perturbations=jnp.array([0.1, -0.2, 0.1]),
      ... )
      >>> [round(float(theta), 3) for theta in new]
      [1.331, 1.829, 1.585]
    """
    if not isinstance(noise, jax.core.Tracer) and not np.all(np.asarray(noise) > 0):
        raise ValueError(f"`noise` must lie in (0, inf), got {shown(noise)}.")
    check_number("alpha", alpha, 0, open_low=True)
    ensemble, targets = as_arrays(ensemble), jnp.asarray(targets)
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(ensemble)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            "esmda_step: all leaves of `ensemble` must have a leading axis of at least 2 members, "
            f"of the same number; got {', '.join(map(str, sorted(sizes))) or 'no leaves'}."
        )
    outputs = jax.vmap(predict)(ensemble)
    if jnp.shape(outputs)[1:] != targets.shape:
        raise ValueError(
            f"esmda_step: `predict` gives outputs of shape {jnp.shape(outputs)[1:]}, but `targets` "
            f"have the shape {targets.shape}; they must be the same."
        )
    if (key is None) == (perturbations is None):
        raise ValueError("esmda_step: give either `key` or `perturbations`, the one or the other.")
    dtype = jnp.result_type(jnp.float32, outputs, targets)
    if perturbations is None:
        perturbations = jax.random.normal(as_key(key), outputs.shape, dtype)
    noise, weights = jnp.broadcast_to(noise, targets.shape), jnp.ones(targets.shape, dtype)
    perturbations = jnp.reshape(perturbations, outputs.shape)
    arguments = outputs, targets, weights, perturbations, noise, alpha, localization
    return analysis(ensemble, *arguments)[0]


class _Settings(NamedTuple):
    """The arguments of the two methods."""

    name: str
    num_members: int
    noise: optax.ScalarOrSchedule
    alphas: tuple[float, ...]
    prior_scale: float
    inflation: optax.ScalarOrSchedule
    localization: chex.ArrayTree | None
    mask: Mask
    key: jax.Array


def _checked_alphas(alphas: Any) -> tuple[float, ...]:
    if isinstance(alphas, int | float | str) or not len(alphas):
        raise TypeError(f"`alphas` must be a sequence of numbers, such as [4] * 4, got {alphas!r}.")
    for alpha in alphas:
        check_number("alphas", alpha, 0, open_low=True)
    total = math.fsum(1 / float(alpha) for alpha in alphas)
    if abs(total - 1) > _TOLERANCE:
        raise ValueError(
            "the inverses of `alphas` must sum up to 1, so that a batch is assimilated once; those "
            f"of {shown(tuple(alphas))} sum up to {total:.6g}. Multiply each by {total:.6g}, or "
            "take n times n, such as [4] * 4."
        )
    return tuple(map(float, alphas))


def _transformation(settings: _Settings) -> optax.GradientTransformationExtraArgs:
    name, mask = settings.name, settings.mask
    check_count("num_members", settings.num_members, 2)
    check_number("noise", settings.noise, 0, open_low=True, allow_schedule=True)
    check_number("prior_scale", settings.prior_scale, 0, open_low=True)
    check_number("inflation", settings.inflation, 1, allow_schedule=True)

    def init_fn(params: chex.ArrayTree) -> ESMDAState:
        count, nan = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, jnp.float32)
        if is_placeholder(params):
            return ESMDAState(count, params, jnp.zeros(()), nan)
        check_params(params, name)
        check_selected(params, mask, name)
        check_undivided(params, name)
        number = static_integer("num_members", settings.num_members, 2)
        announce_cost(Cost(f"the outputs of {number} members of an ensemble, in place of it"))
        trained = select(as_arrays(params), resolve(params, mask))
        _check_localization(settings.localization, trained, name)
        ensemble, spread = _first_members(settings.key, trained, settings.prior_scale, number)
        return ESMDAState(count, ensemble, spread, nan)

    def update_fn(
        updates: chex.ArrayTree,
        state: ESMDAState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ESMDAState]:
        params = None if params is None else as_arrays(params)
        objective = as_objective(
            value_fn,
            extra_args,
            method=name,
            params=params,
            why="evaluate the members of its ensemble",
            needs_outputs=True,
        )
        chosen = resolve(params, mask)
        objective = objective.precompose(lambda part: merge(part, params, chosen))
        position, incoming = select(params, chosen), select(as_arrays(updates), chosen)
        if not jax.tree.leaves(position):
            return updates, state._replace(count=optax.safe_increment(state.count))
        new = _iteration(settings, objective, state, position)
        moves = jax.tree.map(
            lambda members, p, u: (members.mean(0) - p.astype(members.dtype)).astype(u.dtype),
            new.ensemble,
            position,
            incoming,
        )
        return merge(moves, updates, chosen), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnums=3)  # one program instead of one for each operation
def _first_members(
    key: jax.Array, params: chex.ArrayTree, scale: Any, num_members: int
) -> tuple[chex.ArrayTree, jax.Array]:
    """The members of the prior, and their spread."""

    def draw(leaf_key: jax.Array, leaf: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        deviation = jnp.asarray(scale, dtype) / math.sqrt(max(fan_in, 1))
        normal = jax.random.normal(leaf_key, (num_members, *leaf.shape), dtype)
        return leaf.astype(dtype)[None] + deviation * normal

    ensemble = map_with_keys(draw, key, params)
    return ensemble, _spread(ensemble)


def _iteration(
    settings: _Settings, objective: Objective, state: ESMDAState, position: chex.ArrayTree
) -> ESMDAState:
    """The state after one more iteration, in which all replicas agree."""
    name, count = settings.name, state.count
    ensemble = _inflated(state.ensemble, value_of(settings.inflation, count))

    def outputs_of(member: chex.ArrayTree) -> chex.ArrayTree:
        member = jax.tree.map(lambda m, p: m.astype(p.dtype), member, position)
        return objective.outputs(member)

    one = jax.eval_shape(outputs_of, position)
    _check_outputs(one, name)
    (outputs,) = jax.tree.leaves(jax.vmap(outputs_of)(ensemble))
    targets, weights = targets_of(objective, outputs[0], jax.tree.structure(one), name)
    alphas = jnp.asarray(settings.alphas, jnp.result_type(float))
    numbers = {
        "key": settings.key,
        "count": count,
        "noise": value_of(settings.noise, count),
        "alpha": alphas[count % len(settings.alphas)],
        "localization": settings.localization,
    }
    new, spread, mismatch, finite = with_auto_axes(
        lambda *arrays: _corrected(*arrays[:4], axis_name=objective.axis_name, **arrays[4]),
        *(ensemble, outputs, targets, weights, numbers),
    )
    return ESMDAState(
        count=jnp.where(finite, optax.safe_increment(count), count),
        ensemble=jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.ensemble),
        spread=jnp.where(finite, spread.astype(state.spread.dtype), state.spread),
        data_mismatch=mismatch,
    )


@functools.partial(jax.jit, static_argnames="axis_name")  # one program outside of others, too
def _corrected(
    ensemble: chex.ArrayTree,
    outputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    key: jax.Array,
    count: jax.Array,
    axis_name: str | None,
    **settings: Any,
) -> tuple[chex.ArrayTree, jax.Array, jax.Array, jax.Array]:
    """The new ensemble, its spread, the data mismatch before, and whether all is finite."""
    first = 0 if axis_name is None else lax.axis_index(axis_name) * outputs.shape[1]
    perturbations = perturbations_of(
        key, count, outputs.shape, jnp.promote_types(outputs.dtype, jnp.float32), first
    )
    new, mismatch = analysis(
        ensemble, outputs, targets, weights, perturbations, axis_name=axis_name, **settings
    )
    finite = jnp.isfinite(mismatch)
    for leaf in jax.tree.leaves(new):
        finite &= jnp.all(jnp.isfinite(leaf))
    return new, _spread(new), mismatch.astype(jnp.float32), finite


def _check_outputs(outputs: chex.ArrayTree, name: str) -> None:
    leaves = jax.tree.leaves(outputs)
    shapes = [leaf.shape for leaf in leaves]
    if len(leaves) != 1 or not shapes[0] or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise ValueError(
            f"{name}: the outputs of `predict` must be one real floating-point array whose first "
            f"axis counts the examples, got shapes {', '.join(map(str, shapes)) or 'of nothing'}; "
            "return the outputs before they are summed up, and sum in `loss`."
        )


def targets_of(
    objective: Objective, outputs: jax.Array, structure: Any, name: str
) -> tuple[jax.Array, jax.Array]:
    """Where the loss of each output is smallest, and how it weighs there, at most 1.

    Args:
      objective: of the parameters.
      outputs: of one member.
      structure: of the pytree of the outputs, which has one leaf.
      name: the method's.

    Raises:
      ValueError: the loss is not a weighted sum of squares, or there are no examples.
    """
    if outputs.size == 0:
        raise ValueError(
            f"{name} needs at least one example, the outputs have the shape {outputs.shape}."
        )
    zeros, ones = (  # marked as varying, or the gradient would be summed over the replicas
        structure.unflatten([filled_like(jnp.asarray(value, outputs.dtype), outputs)])
        for value in (0, 1)
    )
    zeros, ones = objective.vary((zeros, ones))
    likelihood, reason = recognize(objective, zeros)
    if likelihood != "gaussian":
        reason = reason or f"its likelihood is {likelihood}"
        raise ValueError(
            f"{name} needs a loss that is a sum or mean of squared errors, such as "
            f"jnp.mean((outputs - y) ** 2), written out in `loss`; of this one {reason}."
        )
    slope = jax.grad(objective.loss_of_outputs)(zeros)
    curvature = objective.loss_hessian(zeros)(ones)  # a diagonal matrix, times ones
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    (slope,), (curvature,) = jax.tree.leaves(slope), jax.tree.leaves(curvature)
    slope, curvature = slope.astype(dtype), curvature.astype(dtype)
    counts = curvature > 0
    targets = jnp.where(counts, -slope / jnp.where(counts, curvature, 1), 0)
    if objective.axis_name is None:
        largest = jnp.max(curvature)
    else:  # replicas whose losses were divided by different numbers
        weight = objective.batch_weight()
        curvature = curvature if weight is None else curvature * weight.astype(dtype)
        largest = lax.pmax(jnp.max(curvature), objective.axis_name)
    return targets, jnp.where(counts, curvature / jnp.where(largest > 0, largest, 1), 0)


def perturbations_of(
    key: jax.Array, count: jax.Array, shape: tuple[int, ...], dtype: Any, first: chex.Numeric
) -> jax.Array:
    """Standard normal numbers (members, examples, ...); ``first`` is the first example's number.

    Those of an example depend on its number only, so that any division of the batch has the same.
    """
    members, examples, *rest = shape
    start = first * (members * math.prod(rest))
    normal = hash_normal(key, (examples, members, *rest), dtype, count, start)
    return jnp.moveaxis(normal, 0, 1)


def analysis(
    ensemble: chex.ArrayTree,
    outputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    perturbations: jax.Array,
    noise: chex.Numeric,
    alpha: chex.Numeric,
    localization: chex.ArrayTree | None = None,
    axis_name: str | None = None,
) -> tuple[chex.ArrayTree, jax.Array]:
    """The Kalman update of an ensemble whose outputs are known.

    Args:
      ensemble: leaves (members, ...).
      outputs: (members, *targets' shape): of this replica's examples.
      targets: of the outputs of one member.
      weights: how much each target counts, at most 1: divisors of its variance.
      perturbations: standard normal numbers like the outputs.
      noise: standard deviation of targets of weight 1, a scalar or like the targets.
      alpha: factor of the noise's variance.
      localization: factors of the gain, leaves (..., *targets' shape).
      axis_name: the axis of the replicas.

    Returns:
      The new ensemble, and the data mismatch of the old one.
    """

    def over_replicas(tree: Any) -> Any:
        return tree if axis_name is None else lax.psum(tree, axis_name)

    members, *shape = outputs.shape
    size = math.prod(shape)
    dtype = jnp.result_type(jnp.float32, outputs.dtype, targets.dtype)
    scale = (jnp.sqrt(weights.astype(dtype)) / jnp.asarray(noise, dtype)).reshape(1, size)
    outputs = outputs.reshape(members, size).astype(dtype)
    deviations = (outputs - outputs.mean(0, keepdims=True)) * scale
    residuals = (targets.reshape(1, size).astype(dtype) - outputs) * scale
    alpha = jnp.asarray(alpha, dtype)
    noisy = residuals + jnp.sqrt(alpha) * perturbations.reshape(members, size).astype(dtype)

    in_ensemble_space = axis_name is not None or size > members
    gains = gain_weights(deviations, alpha, in_ensemble_space, over_replicas)
    apart = jax.tree.map(lambda x: x - x.mean(0, keepdims=True), ensemble)
    if localization is None and in_ensemble_space:
        moves = blocks.combine(over_replicas(_products(noisy, gains, -1)), apart)
    else:
        factors = localization if localization is not None else jax.tree.map(lambda _: None, apart)

        def move(leaf: jax.Array, factor: Any) -> jax.Array:
            gain = _products(leaf, gains, 0)  # (*parameter's shape, targets)
            if factor is not None:
                full = jnp.broadcast_to(factor, (*leaf.shape[1:], *shape))
                gain = gain * full.reshape(gain.shape).astype(gain.dtype)
            return _products(noisy, gain, -1)

        moves = over_replicas(jax.tree.map(move, apart, factors))
    new = jax.tree.map(lambda x, move: (x + move).astype(x.dtype), ensemble, moves)
    squares = over_replicas(jnp.sum(jnp.square(residuals)))
    counted = over_replicas(jnp.sum((scale > 0).astype(dtype)))
    return new, squares / (2 * members * jnp.maximum(counted, 1))


def gain_weights(
    deviations: jax.Array,
    alpha: jax.Array,
    in_ensemble_space: bool,
    over_replicas: Callable[[Any], Any] = lambda tree: tree,
) -> jax.Array:
    """The matrix G, (members, targets), that the members' deviations make the Kalman gain with.

    A multiple of the identity below rounding errors would be lost: a smaller alpha counts as these.
    """
    dtype, freedom = deviations.dtype, deviations.shape[0] - 1
    if in_ensemble_space:
        matrix = over_replicas(_products(deviations, deviations, -1)) / freedom
    else:
        matrix = _products(deviations, deviations, 0) / freedom
    floor = 8 * jnp.finfo(dtype).eps * jnp.trace(matrix)
    identity = jnp.eye(matrix.shape[0], dtype=dtype)
    root = jax.scipy.linalg.cho_factor(matrix + jnp.maximum(alpha, floor) * identity, lower=True)
    if in_ensemble_space:
        return jax.scipy.linalg.cho_solve(root, deviations) / freedom
    return jax.scipy.linalg.cho_solve(root, deviations.T).T / freedom


def _products(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Sums over the first (0) or last (-1) axis of products of two arrays, in the wider dtype."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    axes = (((axis % left.ndim,), (axis % right.ndim,)), ((), ()))
    wide = left.astype(dtype), right.astype(dtype)
    return lax.dot_general(*wide, axes, precision=lax.Precision.HIGHEST)


@jax.jit
def _inflated(ensemble: chex.ArrayTree, factor: Any) -> chex.ArrayTree:
    """The members, as many times as far from their mean."""

    def inflate(x: jax.Array) -> jax.Array:
        # As a sum, so that a factor of 1 changes no digit.
        return x + jnp.asarray(factor - 1, x.dtype) * (x - x.mean(0, keepdims=True))

    return jax.tree.map(inflate, ensemble)


def _spread(ensemble: chex.ArrayTree) -> jax.Array:
    """The root of the mean over all parameters of the members' variances."""
    leaves = jax.tree.leaves(ensemble)
    total, size = jnp.zeros((), jnp.float32), sum(leaf[0].size for leaf in leaves)
    for leaf in leaves:
        total = total + jnp.sum(jnp.var(leaf, 0, ddof=1))
    return jnp.sqrt(total / max(size, 1))


def _check_localization(
    localization: chex.ArrayTree | None, params: chex.ArrayTree, name: str
) -> None:
    """Raises ``ValueError`` if factors of the gain do not fit the parameters."""
    if localization is None:
        return
    wanted = (
        "a pytree like the parameters whose leaves have the parameter's axes, then the targets'"
    )
    own, structure = jax.tree.structure(localization), jax.tree.structure(params)
    if str(own) != str(structure):
        raise ValueError(
            f"{name}: `localization` must be {wanted}; its structure is {own}, that of the "
            f"parameters {structure}."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(localization), strict=True
    )
    for (path, leaf), factor in pairs:
        axes = jnp.shape(factor)[: leaf.ndim]
        fits = all(n in (1, full) for n, full in zip(axes, leaf.shape, strict=False))
        if jnp.ndim(factor) <= leaf.ndim or not fits:
            raise ValueError(
                f"{name}: `localization` must be {wanted}, each of full length or 1; for the "
                f"parameter {jax.tree_util.keystr(path) or '(root)'} of shape {leaf.shape} it has "
                f"the shape {jnp.shape(factor)}."
            )
