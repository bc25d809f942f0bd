r"""Forward gradients: unbiased estimates of the gradient from forward-mode derivatives alone.

A random direction :math:`u` with :math:`E[u u^\top] = I` and one Jacobian-vector product give

.. math::
  \hat g = (\nabla L \cdot u)\, u, \qquad E[\hat g] = \nabla L .

Either the *weights* are moved along :math:`u`, one direction and one number for the whole batch, or
the *activations* :math:`z = x W` of tapped layers are, with a direction for every example:

.. math::
  \hat g_z = \big(\textstyle\sum_l \partial_{z_l} L_n \cdot u_l\big)\, u \odot 1[z \text{ active}],
  \qquad \hat g_W = x^\top \hat g_z .

For a layer with :math:`p` inputs and :math:`q` outputs and :math:`N` examples the variance of an
entry, on average, is :math:`\frac{q+2}{N} V + \frac{q+1}{N} S` with perturbed activations and
:math:`\frac{pq+2}{N} V + \frac{pq+1}{N} S` with perturbed weights, where :math:`V` is the variance
of the gradients of single examples and :math:`S` the mean square of the gradient; a direction of
the weights that all examples share leaves :math:`S` undivided by :math:`N`. Several samples divide
everything but the variance of the batch itself by their number.

Ren, Kornblith, Liao, Hinton, `Scaling forward gradient with local losses
<https://arxiv.org/abs/2210.03310>`_, ICLR 2023, sections 3 and 4.  Faithful: both estimators, the
mask of inactive units, losses of patches and groups.  Ours: taps, which say in the network itself
what is perturbed; directions that are orthogonal or signs; differences of two losses in place of a
derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import check_choice, check_count, check_inner, static_integer
from optax_accel._derivatives import derivative as derivative_of
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select, with_fixed_leaves
from optax_accel._means import sum_dtype
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import norm
from optax_accel._random import as_key, hash_bits
from optax_accel.curvature import blocks
from optax_accel.gradients.taps import Cutting, Perturbing, Tapped, Taps, check_tapped, check_taps
from optax_accel.objective import Objective, ValueFn
from optax_accel.refresh import Cost, announce_cost

Perturb = Literal["weights", "activations"]
Directions = Literal["normal", "signs", "orthogonal"]
Derivative = Literal["exact", "antithetic"]


@jax.custom_jvp
def _moving(x: jax.Array, direction: jax.Array, distance: jax.Array) -> jax.Array:
    """``x + distance * direction`` at the distance 0, without the addition."""
    del direction, distance
    return x


@_moving.defjvp
def _moving_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, direction, _), (x_moved, _, distance_moved) = primals, tangents
    return x, x_moved + distance_moved.astype(x.dtype) * direction


class ForwardGradientState(NamedTuple):
    """State of :func:`forward_gradient`.

    Attributes:
      count: number of updates made; int32 scalar.
      rng_key: the PRNG key given at construction; step ``t`` draws from ``fold_in(rng_key, t)``.
      objective_value: the loss at the parameters of the last step, with ``axis_name`` in the
        Objective the mean over the replicas; infinity before the first step; float32 scalar.
      draws: how many directions each sample has drawn, int32 of shape ``(num_samples,)``, which is
        also where ``update`` knows their number from if Optax's ``inject_hyperparams`` has made an
        array of it.
      inner_state: state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    rng_key: chex.PRNGKey
    objective_value: jax.Array
    draws: jax.Array
    inner_state: chex.ArrayTree


def forward_gradient(
    inner: optax.GradientTransformation | None = None,
    *,
    perturb: Perturb = "weights",
    num_samples: int = 1,
    directions: Directions = "normal",
    derivative: Derivative = "exact",
    key: chex.PRNGKey | int = 0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by an estimate that needs no back-propagation.

    ``update`` needs ``value_fn`` (an :class:`~optax_accel.Objective` or a function of the
    parameters) and ``params``.  The incoming gradient is not used: in a compiled step XLA removes
    its computation, and any tree like the parameters may be given in its place.  The memory of
    perturbed weights does not grow with the depth of the network; perturbed activations keep the
    inputs of the layers, as back-propagation does, up to the loss that they belong to.

    The variance grows with the number of perturbed values (see the module), so learning rates are
    far smaller than those of the exact gradient, and ``inner`` may clip the estimate.

    With replicas (an ``axis_name`` in the Objective), weights are moved in the same direction
    everywhere and one number is averaged; activations are moved in a direction for each replica,
    and the estimated gradients are averaged.

    Args:
      inner: transformation or optimizer that takes the estimate. ``None`` (default): the estimate
        is the update, for ``optax.chain``.
      perturb: ``"weights"`` (default) works for any loss. ``"activations"`` has a far smaller
        variance, and needs a loss with taps: ``value_fn``, or ``predict`` and ``loss`` of the
        Objective, take an argument ``tap`` (:class:`Taps`).
      num_samples: number of directions whose estimates are averaged, at least 1; the paper's
        number of passes. Their derivatives are vectorized, the loss itself is evaluated once.
      directions: how they are drawn. ``"normal"`` (default, the paper's): standard normal.
        ``"signs"``: 1 or -1 at random, whose variance is lower by twice the mean square of the
        gradient. ``"orthogonal"``: normal ones made orthogonal to each other and equally long, over
        all weights together, or over each tap of each example; with as many samples as perturbed
        values the estimate is exact. At most that many samples.
      derivative: ``"exact"`` (default): a Jacobian-vector product. ``"antithetic"``: the difference
        of the losses at both ends of a short step along :math:`\pm u`, two evaluations for each
        sample, for losses without forward-mode derivative (``jax.custom_vjp``). An exact derivative
        along :math:`-u` would give the same estimate as along :math:`u`.
      key: PRNG key or integer seed; default 0.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves whose gradient is estimated. The others keep what comes in.
        ``None`` (default): all.

    Returns:
      A transformation with state :class:`ForwardGradientState`.

    Raises:
      ValueError: an argument outside its range; in ``update``: missing ``value_fn`` or ``params``,
        or, with perturbed activations, a loss without taps or with micro-batches.
      TypeError: ``inner`` is not a transformation; in ``init``: parameters that are not real
        floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = oa.forward_gradient(optax.sgd(0.1), num_samples=2, directions="orthogonal")
      >>> w = jnp.array([1.0, -2.0])
      >>> updates, state = jax.jit(lambda w: tx.update(w, tx.init(w), w, value_fn=loss))(w)
      >>> [round(float(u), 4) for u in updates]  # two samples of two weights: exact
      [-0.1, 0.2]

    References:
      Ren et al., `Scaling forward gradient with local losses
      <https://arxiv.org/abs/2210.03310>`_, 2023; Baydin et al., `Gradients without backpropagation
      <https://arxiv.org/abs/2202.08587>`_, 2022.
    """
    _check_options(perturb, num_samples, directions, derivative)
    if inner is not None:
        check_inner(inner)
    initial_key = as_key(key)
    inner = optax.with_extra_args_support(optax.identity() if inner is None else inner)
    name = "forward_gradient"

    def make(mask: chex.ArrayTree | None) -> optax.GradientTransformationExtraArgs:
        def init_fn(params: chex.ArrayTree) -> ForwardGradientState:
            check_params(params, name)
            check_selected(params, mask, name)
            check_undivided(params, name)
            announce_cost(Cost("forward passes with directional derivatives"))
            return ForwardGradientState(
                count=jnp.zeros((), jnp.int32),
                rng_key=jnp.copy(initial_key),
                objective_value=jnp.full((), jnp.inf, jnp.float32),
                draws=jnp.zeros(static_integer("num_samples", num_samples, 1), jnp.int32),
                inner_state=inner.init(params),
            )

        def update_fn(
            updates: chex.ArrayTree,
            state: ForwardGradientState,
            params: chex.ArrayTree | None = None,
            *,
            value_fn: Any = None,
            **extra_args: Any,
        ) -> tuple[chex.ArrayTree, ForwardGradientState]:
            value, estimate = _estimate(
                value_fn,
                params,
                jax.random.fold_in(state.rng_key, state.count),
                _Options(perturb, len(state.draws), directions, derivative),
                mask,
                extra_args,
            )
            chosen = resolve(params, mask)
            estimate = merge(select(estimate, chosen), updates, chosen)
            estimate = jax.tree.map(lambda e, u: e.astype(jnp.result_type(u)), estimate, updates)
            inner_args = {**extra_args, "value_fn": value_fn}
            if "grad" in inner_args:
                inner_args["grad"] = estimate
            new_updates, inner_state = inner.update(
                estimate, state.inner_state, params, **inner_args
            )
            return new_updates, ForwardGradientState(
                count=optax.safe_increment(state.count),
                rng_key=state.rng_key,
                objective_value=value.astype(jnp.float32),
                draws=optax.safe_increment(state.draws),
                inner_state=inner_state,
            )

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return with_fixed_leaves(make, mask)


def forward_value_and_grad(
    value_fn: Objective | ValueFn,
    params: chex.ArrayTree,
    *,
    key: chex.PRNGKey | int,
    perturb: Perturb = "weights",
    num_samples: int = 1,
    directions: Directions = "normal",
    derivative: Derivative = "exact",
    mask: Mask = None,
    **kwargs: Any,
) -> tuple[jax.Array, chex.ArrayTree]:
    """The loss and the estimate of its gradient that :func:`forward_gradient` takes.

    Args:
      value_fn: an Objective or a function ``value_fn(params, **kwargs) -> scalar``.
      params: pytree of real floating-point arrays.
      key: PRNG key or integer seed; the same key gives the same directions.
      perturb: ``"weights"`` (default) or ``"activations"``, which needs a loss with taps.
      num_samples: number of directions whose estimates are averaged, at least 1; default 1.
      directions: ``"normal"`` (default), ``"signs"`` or ``"orthogonal"``.
      derivative: ``"exact"`` (default), by a Jacobian-vector product, or ``"antithetic"``, by the
        difference of two losses.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: leaves whose gradient is estimated; that of the others is 0. ``None``
        (default): all.
      **kwargs: arguments of ``value_fn``, such as the batch; those that it does not name are
        ignored.

    Returns:
      The loss, a scalar, and the estimate, like ``params`` in structure, shapes and dtypes.

    Raises:
      ValueError: an argument outside its range, or a loss without taps where they are needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> loss = lambda w: jnp.sum(w**2)
      >>> value, estimate = oa.forward_value_and_grad(
      ...     loss, jnp.array([3.0, 4.0]), key=0, num_samples=100_000
      ... )
      >>> float(value), [round(float(g)) for g in estimate]  # the gradient is (6, 8)
      (25.0, [6, 8])
    """
    _check_options(perturb, num_samples, directions, derivative)
    num_samples = static_integer("num_samples", num_samples, 1)
    options = _Options(perturb, num_samples, directions, derivative)
    return _estimate(value_fn, params, as_key(key), options, mask, kwargs)


class _Options(NamedTuple):
    """How a gradient is estimated, as :func:`forward_gradient` describes it."""

    perturb: Perturb
    num_samples: int
    directions: Directions
    derivative: Derivative


def _estimate(
    value_fn: Any,
    params: chex.ArrayTree,
    key: jax.Array,
    options: _Options,
    mask: Mask,
    kwargs: dict[str, Any],
) -> tuple[jax.Array, chex.ArrayTree]:
    """The loss and the estimate of its gradient."""

    def objective_of(arguments: dict[str, Any]) -> Objective:
        return as_objective(
            value_fn,
            arguments,
            method="forward_gradient",
            params=params,
            why="take its derivative along random directions",
        ).precompose(lambda part: merge(part, params, chosen))

    chosen = resolve(params, mask)
    part = select(params, chosen)
    if options.perturb == "weights":
        value, estimate = _by_weights(objective_of(kwargs), part, key, options)
    else:
        check_taps(value_fn)
        value, estimate = _by_activations(
            lambda taps: objective_of({**kwargs, "tap": taps}), part, key, options
        )
    estimate = jax.tree.map(lambda e, p: e.astype(p.dtype), estimate, part)
    return value, merge(estimate, jax.tree.map(jnp.zeros_like, params), chosen)


def _by_weights(
    objective: Objective, params: chex.ArrayTree, key: jax.Array, options: _Options
) -> tuple[jax.Array, chex.ArrayTree]:
    _, num, directions, derivative = options
    leaves, treedef = jax.tree.flatten(params)
    dtype = blocks.scalar_dtype(params)
    block = [_drawn(key, i, (num, *p.shape), dtype, directions) for i, p in enumerate(leaves)]
    block = jax.tree.unflatten(treedef, block)
    if directions == "orthogonal":
        size = blocks.dimension(params)
        _check_orthogonal(num, size, "perturbed weights")
        block = _orthogonal(block, size)

    def of_sample(direction: chex.ArrayTree) -> tuple[jax.Array, jax.Array]:
        direction = jax.tree.map(lambda u, p: u.astype(p.dtype), direction, params)
        if derivative == "exact":
            return jax.jvp(objective, (params,), (direction,))
        return objective(params), _difference(objective, params)(direction)

    if num == 1:
        value, slope = of_sample(jax.tree.map(lambda b: b[0], block))
        slopes = slope[None]
    else:
        value, slopes = jax.vmap(of_sample, out_axes=(None, 0), axis_size=num)(block)
    return value, blocks.combine(slopes.astype(dtype) / num, block)


def _difference(
    function: Callable[[chex.ArrayTree], chex.ArrayTree], point: chex.ArrayTree
) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    """The derivative of a function along a vector, by the difference of two of its values."""
    return derivative_of("finite_difference", lambda at, _: function(at), point, None, norm)


def _by_activations(
    objective_of: Callable[[Taps], Objective],
    params: chex.ArrayTree,
    key: jax.Array,
    options: _Options,
) -> tuple[jax.Array, chex.ArrayTree]:
    _, num, directions, derivative = options
    plain = objective_of(Taps())
    params = plain.vary(params)
    if plain.axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(plain.axis_name))
    tapped: list[Tapped] = []

    def draw(sample: jax.Array, index: int, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        block = _drawn(key, index, (num, *x.shape), sum_dtype(x.dtype), directions)
        if directions == "orthogonal":
            block = _orthogonal_behind(block, len(axes))
        return block[sample]

    def losses_at(distance: jax.Array, sample: jax.Array) -> tuple[Any, list[jax.Array]]:
        def move(x: jax.Array, direction: jax.Array) -> jax.Array:
            if derivative == "exact":
                return _moving(x, direction, distance)
            return x + distance.astype(x.dtype) * direction

        taps = Perturbing(functools.partial(draw, sample), move)
        objective_of(taps).local(params)
        check_tapped(taps)
        tapped[:] = taps.tapped
        return taps.losses, [tap.array for tap in taps.tapped]

    def of_sample(sample: jax.Array) -> list[jax.Array]:
        zero = jnp.zeros((), jnp.float32)
        at = functools.partial(losses_at, sample=sample)
        if derivative == "exact":
            _, slopes, along = jax.jvp(at, (zero,), (jnp.ones_like(zero),), has_aux=True)
        else:
            along = at(zero)[1]
            slopes = _difference(lambda distance: at(distance)[0], zero)(jnp.ones_like(zero))
        return [
            _share(slopes[tap.loss], tap.axes, direction)
            for tap, direction in zip(tapped, along, strict=True)
        ]

    if num == 1:
        pulled = of_sample(jnp.zeros((), jnp.int32))
    else:
        pulled = jax.vmap(of_sample)(jnp.arange(num))
        pulled = [jnp.mean(each, axis=0) for each in pulled]

    def segments(params: chex.ArrayTree, offsets: dict[str, jax.Array]) -> tuple[Any, Any]:
        taps = Cutting(offsets)
        value = objective_of(taps).local(params)
        return value, taps.arrays

    offsets = plain.vary({tap.loss: jnp.zeros((), jnp.float32) for tap in tapped})
    (value, arrays), pull = jax.vjp(segments, params, offsets)
    one = jnp.ones_like(value)
    weights = pull((one, [jnp.zeros_like(x) for x in arrays]))[1]
    pulled = [
        (weights[tap.loss].astype(each.dtype) * each).astype(x.dtype)
        for tap, each, x in zip(tapped, pulled, arrays, strict=True)
    ]
    return plain.mean((value, pull((one, pulled))[0]))


def _share(slopes: jax.Array, axes: tuple[int, ...], direction: jax.Array) -> jax.Array:
    """A direction times the derivatives of the losses that its activation depends on."""
    others = [axis for axis in range(slopes.ndim) if axis not in axes]
    dtype = sum_dtype(direction.dtype)
    moved = jnp.transpose(slopes.astype(dtype), (*axes, *others))
    total = jnp.sum(moved, axis=tuple(range(len(axes), slopes.ndim)))
    behind = (1,) * (direction.ndim - len(axes))
    return total.reshape(*total.shape, *behind) * direction.astype(dtype)


def _drawn(
    key: jax.Array, index: int, shape: tuple[int, ...], dtype: Any, directions: Directions
) -> jax.Array:
    """Independent numbers of mean 0 and variance 1, of float32 precision, for one array."""
    bits = hash_bits(key, shape, jnp.asarray(index, jnp.uint32))
    if directions == "signs":
        return jnp.where(bits >> 31 == 1, 1.0, -1.0).astype(dtype)
    # The odd multiples of 2**-23 in (-1, 1): neither end, where the inverse is infinite.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1
    return (math.sqrt(2) * lax.erf_inv(uniform)).astype(dtype)


def _orthogonal(block: chex.ArrayTree, size: int) -> chex.ArrayTree:
    """Rows orthogonal to each other, as long as normal ones are in the mean square."""
    return jax.tree.map(lambda b: math.sqrt(size) * b, blocks.orthonormalize(block))


def _orthogonal_behind(block: jax.Array, num_axes: int) -> jax.Array:
    """The same for the entries behind the first axes of an array, separately along these."""
    num, *shape = block.shape
    size = math.prod(shape[num_axes:])
    _check_orthogonal(num, size, "values of a tap for each loss")
    flat = block.reshape(num, math.prod(shape[:num_axes]), size)
    made = jax.vmap(functools.partial(_orthogonal, size=size), in_axes=1, out_axes=1)(flat)
    return made.reshape(block.shape)


def _check_options(perturb: Any, num_samples: Any, directions: Any, derivative: Any) -> None:
    check_choice("perturb", perturb, get_args(Perturb))
    check_choice("directions", directions, get_args(Directions))
    check_choice("derivative", derivative, get_args(Derivative))
    check_count("num_samples", num_samples, 1)


def _check_orthogonal(num: int, size: int, what: str) -> None:
    if num > size:
        raise ValueError(
            f"forward_gradient: at most {size} directions can be orthogonal, the number of {what}, "
            f"but num_samples is {num}: take fewer samples, or directions='normal'."
        )
