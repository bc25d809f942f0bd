r"""Optimize in other coordinates, without touching the model.

A map :math:`w = \psi(\theta)` gives the parameters from coordinates.  The model keeps computing
with :math:`w`; each step pulls its gradient back, lets any optimizer move the coordinates, and
returns the update that takes the parameters to the image of the new ones:

.. math::
  \theta_{t+1} = \mathrm{inner}\big(\theta_t, J_\psi(\theta_t)^\top \nabla L(w_t)\big), \qquad
  w_{t+1} - w_t = \psi(\theta_{t+1}) - w_t .

Weight normalization, :math:`w = g\, v / \|v\|` for each output unit: Salimans and Kingma, `Weight
normalization <https://arxiv.org/abs/1602.07868>`_, NeurIPS 2016, equation 2.  Powerpropagation,
:math:`w = \theta |\theta|^{\alpha - 1}`: Schwarz et al., `Powerpropagation: A sparsity inducing
weight reparameterisation <https://arxiv.org/abs/2110.00296>`_, NeurIPS 2021, section 2.  Faithful:
both maps.  Ours: the start of weight normalization at the weights that the model has (v = w,
g = norm of w) instead of the paper's initialization from data, its treatment of units whose weights
are all zero, and exact derivatives of powerpropagation at 0, where the plain formula gives NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import check_floating_leaves, check_inner, check_integer, check_number
from optax_accel._masking import (
    Mask,
    check_selected,
    merge,
    precompose_all,
    select,
    with_fixed_leaves,
)


@dataclasses.dataclass(frozen=True)
class Reparametrization:
    """A pair of maps between one array of parameters and its coordinates.

    Args:
      forward: the array from its coordinates; differentiable, of the shape of the parameters.
      inverse: the coordinates of an array, any pytree of floating-point arrays, such that
        ``forward(inverse(w))`` is ``w``. It is called at the start and whenever the parameters have
        been changed from outside.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> positive = oa.Reparametrization(forward=jnp.exp, inverse=jnp.log)
      >>> tx = oa.reparametrize(optax.sgd(0.5), positive, mask=True)
      >>> param = jnp.array(1.0)
      >>> state = tx.init(param)
      >>> for _ in range(50):  # towards -1, which it never reaches
      ...     updates, state = tx.update(param + 1, state, param)
      ...     param = optax.apply_updates(param, updates)
      >>> round(float(param), 4), round(float(state.coordinates), 4)
      (0.0333, -3.4025)
    """

    forward: Callable[[chex.ArrayTree], jax.Array]
    inverse: Callable[[jax.Array], chex.ArrayTree]


def weight_norm(output_axes: int | tuple[int, ...] = -1) -> Reparametrization:
    """Weight normalization: a length and a direction for each output unit.

    The coordinates of an array are ``{"lengths": g, "directions": v}``, v of the array's shape and
    g of that of its output axes.  The gradient of a unit's direction is orthogonal to it, so that
    gradient steps let its norm grow, which lowers the effective learning rate.  A unit whose
    weights are all zero starts with length 0 and a direction of equal entries, so that it can
    learn.

    Args:
      output_axes: the axes of the output units; the norm is over the others.  -1 (default) is the
        last axis, as in the kernels of dense layers and convolutions in Flax.

    Returns:
      The pair of maps, for :func:`reparametrize`.

    Raises:
      TypeError: an axis is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> coordinates = oa.weight_norm().inverse(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
      >>> coordinates["lengths"].tolist()
      [5.0, 0.0]
    """
    output_axes = output_axes if isinstance(output_axes, tuple) else (output_axes,)
    for axis in output_axes:
        check_integer("output_axes", axis, -sys.maxsize)

    def norm_axes(w: jax.Array) -> tuple[int, ...]:
        for axis in output_axes if w.ndim else ():
            if not -w.ndim <= axis < w.ndim:
                raise ValueError(
                    f"`output_axes` must lie in [-{w.ndim}, {w.ndim - 1}] for an array of shape "
                    f"{w.shape}, got {axis}; leave it out with `mask=`."
                )
        outputs = {range(w.ndim)[axis] for axis in output_axes} if w.ndim else set()
        return tuple(axis for axis in range(w.ndim) if axis not in outputs)

    def lengths(v: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """The norms (1 in place of 0) and whether they are positive, with axes of length 1."""
        squares = jnp.sum(v * v, axes, keepdims=True)
        return jnp.sqrt(jnp.where(squares > 0, squares, 1)), squares > 0

    def forward(coordinates: dict[str, jax.Array]) -> jax.Array:
        g, v = coordinates["lengths"], coordinates["directions"]
        axes = norm_axes(v)
        norm, positive = lengths(v, axes)
        return jnp.where(positive, jnp.expand_dims(g, axes) / norm, 0) * v

    def inverse(w: jax.Array) -> dict[str, jax.Array]:
        axes = norm_axes(w)
        norm, positive = lengths(w, axes)
        fan_in = max(1, math.prod(w.shape[axis] for axis in axes))
        v = jnp.where(positive, w, fan_in**-0.5)
        return {"lengths": jnp.squeeze(jnp.where(positive, norm, 0), axes), "directions": v}

    return Reparametrization(forward, inverse)


def powerprop(alpha: float) -> Reparametrization:
    r"""Powerpropagation: weights as signed powers, :math:`w = \theta |\theta|^{\alpha - 1}`.

    Gradients of large weights are amplified, those of small ones are damped, so that the small ones
    gather near 0 and can be pruned.  A weight that is exactly 0 stays 0 if alpha is greater than 1.

    Args:
      alpha: the power, at least 1; 1 is the identity. The paper's experiments use 2 to 5.

    Returns:
      The pair of maps, for :func:`reparametrize`.

    Raises:
      ValueError: alpha below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> maps = oa.powerprop(alpha=2.0)
      >>> theta = maps.inverse(jnp.array([4.0, 0.0, -9.0]))
      >>> theta.tolist(), maps.forward(theta).tolist()
      ([2.0, 0.0, -3.0], [4.0, 0.0, -9.0])
    """
    check_number("alpha", alpha, 1)

    def forward(theta: jax.Array) -> jax.Array:
        # The derivative of |0| ** (alpha - 1) is not finite, and 0 times it would be NaN.
        safe = jnp.where(theta == 0, 1, theta)
        slope_at_zero = jnp.where(jnp.asarray(alpha) == 1, 1, 0).astype(theta.dtype)
        power = safe * jnp.abs(safe) ** (alpha - 1)
        return jnp.where(theta == 0, slope_at_zero * theta, power)

    def inverse(w: jax.Array) -> jax.Array:
        return jnp.sign(w) * jnp.abs(w) ** (1 / alpha)

    return Reparametrization(forward, inverse)


class ReparametrizeState(NamedTuple):
    """State of :func:`reparametrize`.

    Attributes:
      coordinates: like the parameters, with the coordinates of each reparametrized array in its
        place, in float32 or wider; ``optax.MaskedNode`` in place of the others.
      image: the parameters that the last update led to, to be compared with those of the next one;
        ``optax.MaskedNode`` in place of those that are not reparametrized.
      resets: number of updates whose parameters differed from ``image``; int32 scalar.
      inner_state: state of the inner transformation.
    """

    coordinates: chex.ArrayTree
    image: chex.ArrayTree
    resets: jax.Array
    inner_state: chex.ArrayTree


def reparametrize(
    inner: optax.GradientTransformation,
    reparametrization: Reparametrization,
    *,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets any optimizer work in other coordinates of the parameters.

    The steps are those of ``inner`` on a model that is written in the coordinates.  The inner
    transformation sees one tree: like the parameters, with coordinates in place of the arrays that
    are reparametrized.  An extra argument ``grad`` of ``update`` is also pulled back, and
    ``value_fn`` becomes a function of the coordinates, so that line searches and curvature methods
    work inside.

    The place of weight decay in the chain decides what decays: inside, as in
    ``reparametrize(optax.adamw(1e-3), weight_norm())``, the coordinates; in front, as in
    ``optax.chain(optax.add_decayed_weights(1e-4), reparametrize(...))``, the parameters, through
    the gradient of the penalty on them, pulled back.  The same holds for clipping.

    ``params`` agree with the coordinates in the state up to one rounding, which does not
    accumulate: each update leads from the current ``params`` to the image of the new coordinates.
    In bfloat16 the coordinates are a master copy of the parameters in float32.

    If an array differs from the result of the last update by more than the rounding of its dtype,
    it was changed from outside: loaded, averaged (``optax.lookahead``), pruned, projected, or
    changed by a transformation chained *behind*.  Then its coordinates are computed anew from the
    array, the inner state is kept, and ``resets`` in the state counts the update.  For weight
    normalization this discards the growth of the directions.

    Args:
      inner: transformation or optimizer.
      reparametrization: :func:`weight_norm`, :func:`powerprop` or any other
        :class:`Reparametrization`, applied to each array.
      mask: pytree of booleans like the parameters (or a prefix of it: True for everything), or a
        function from the parameters to one: arrays to reparametrize; the inner transformation sees
        the others unchanged, except for masked-out integers, booleans and PRNG keys, which are
        hidden from it and whose updates pass unchanged.  ``None`` (default) selects floating-point
        arrays with two or more axes, because both papers leave out biases.

    Returns:
      A transformation with state :class:`ReparametrizeState`.  Memory: the coordinates, a copy of
      the reparametrized arrays, and the inner state.

    Raises:
      TypeError: ``inner`` or ``reparametrization`` has another type; in ``init``: parameters to
        reparametrize that are not real floating-point numbers.
      ValueError: in ``init``: the maps do not give back the shape of the parameters; in ``update``:
        missing ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.reparametrize(optax.adam(0.01), oa.weight_norm())
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> [round(float(x), 4) for x in (params["kernel"][0, 0], params["bias"][0])]
      [0.995, -0.01]
      >>> [round(float(x), 4) for x in state.coordinates["kernel"]["lengths"]]
      [1.99, 1.99]

    References:
      Salimans and Kingma, `Weight normalization <https://arxiv.org/abs/1602.07868>`_, 2016; Schwarz
      et al., `Powerpropagation <https://arxiv.org/abs/2110.00296>`_, 2021.
    """
    check_inner(inner)
    if not isinstance(reparametrization, Reparametrization):
        raise TypeError(
            "`reparametrization` must be a Reparametrization, such as weight_norm() or "
            f"powerprop(2.0), got {reparametrization!r}."
        )
    rule = _real_matrices if mask is None else mask
    return with_fixed_leaves(
        lambda chosen: _reparametrize(
            optax.with_extra_args_support(inner), reparametrization, chosen, by_rule=mask is None
        ),
        rule,
    )


def _reparametrize(
    inner: optax.GradientTransformationExtraArgs,
    maps: Reparametrization,
    chosen: chex.ArrayTree,
    *,
    by_rule: bool,
) -> optax.GradientTransformationExtraArgs:
    """The transformation for a resolved mask, of the user's or by our rule."""

    def init_fn(params: chex.ArrayTree) -> ReparametrizeState:
        check_selected(params, chosen, "reparametrize", may_be_none=by_rule)
        selected = select(params, chosen)
        coordinates = jax.tree_util.tree_map_with_path(
            functools.partial(_first_coordinates, maps), selected
        )
        return ReparametrizeState(
            coordinates=coordinates,
            image=jax.tree.map(lambda w: jnp.array(w, jnp.result_type(w), copy=True), selected),
            resets=jnp.zeros((), jnp.int32),
            inner_state=inner.init(merge(coordinates, params, chosen)),
        )

    def update_fn(
        updates: chex.ArrayTree,
        state: ReparametrizeState,
        params: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ReparametrizeState]:
        if params is None:
            raise ValueError(
                "reparametrize needs the parameters, which it leads to the image of the new "
                "coordinates. Call it as: tx.update(grads, state, params)."
            )
        selected = select(params, chosen)
        moved_away = jax.tree.map(_differ, selected, state.image)
        coordinates = _current_coordinates(maps, moved_away, selected, state.coordinates)
        point = merge(coordinates, params, chosen)

        def to_params(coordinates: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(
                lambda m, p, c: maps.forward(c).astype(p.dtype) if m else c,
                chosen,
                params,
                coordinates,
            )

        gradient = _pull_back(maps, chosen, updates, point)
        if "grad" in extra_args:
            same = extra_args["grad"] is updates
            extra_args["grad"] = (
                gradient if same else _pull_back(maps, chosen, extra_args["grad"], point)
            )
        extra_args = precompose_all(extra_args, to_params)
        inner_updates, inner_state = inner.update(gradient, state.inner_state, point, **extra_args)
        moved = optax.apply_updates(point, inner_updates)

        def lead(m: bool, g: jax.Array, p: jax.Array, u: Any, c: chex.ArrayTree) -> jax.Array:
            return _rounded(maps.forward(c) - _widen(p), g.dtype) if m else u

        new_updates = jax.tree.map(lead, chosen, updates, params, inner_updates, moved)
        away = jax.tree.leaves(moved_away)
        return new_updates, ReparametrizeState(
            coordinates=select(moved, chosen),
            image=optax.apply_updates(selected, select(new_updates, chosen)),
            resets=jnp.where(
                jnp.any(jnp.stack(away)) if away else False,
                optax.safe_increment(state.resets),
                state.resets,
            ),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _first_coordinates(maps: Reparametrization, path: Any, w: jax.Array) -> chex.ArrayTree:
    """The coordinates of an array, checked to give its shape back."""
    coordinates = maps.inverse(_widen(w))
    shape = jax.eval_shape(maps.forward, coordinates).shape
    if shape != jnp.shape(w):
        raise ValueError(
            "reparametrize: `forward(inverse(w))` must have the shape of the parameters, but for "
            f"{jax.tree_util.keystr(path) or '(root)'} it is {shape}, not {jnp.shape(w)}."
        )
    # Copies with strong dtypes: a step may donate parameters and state.
    return jax.tree.map(lambda c: jnp.array(c, c.dtype, copy=True), coordinates)


def _current_coordinates(
    maps: Reparametrization,
    moved_away: chex.ArrayTree,
    params: chex.ArrayTree,
    coordinates: chex.ArrayTree,
) -> chex.ArrayTree:
    """The coordinates, computed anew from arrays that were changed from outside."""
    return jax.tree.map(
        lambda away, w, c: jax.tree.map(
            lambda new, old: jnp.where(away, new, old), maps.inverse(_widen(w)), c
        ),
        moved_away,
        params,
        coordinates,
    )


def _pull_back(
    maps: Reparametrization,
    chosen: chex.ArrayTree,
    gradient: chex.ArrayTree,
    point: chex.ArrayTree,
) -> chex.ArrayTree:
    """The gradient with respect to the coordinates."""

    def pull(is_chosen: bool, g: jax.Array, c: chex.ArrayTree) -> chex.ArrayTree:
        if not is_chosen:
            return g
        image, transposed = jax.vjp(maps.forward, c)
        return transposed(g.astype(image.dtype))[0]

    return jax.tree.map(pull, chosen, gradient, point)


def _differ(params: jax.Array, image: jax.Array) -> jax.Array:
    """Whether an array was changed by more than the rounding of the sum that led to it."""
    p, q = _widen(params), _widen(image)
    # Sums of narrow numbers are computed in float32 and rounded once, those of others as compilers
    # see fit: with or without fused multiplication.
    spacings = 1 if params.dtype.itemsize < 4 else 4
    rounding = spacings * jnp.finfo(params.dtype).eps * jnp.maximum(jnp.abs(p), jnp.abs(q))
    same = (p == q) | (jnp.abs(p - q) <= rounding) | (jnp.isnan(p) & jnp.isnan(q))
    return ~jnp.all(same)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """A cast that compilers do not remove, so that the state keeps what the caller applies."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def _real_matrices(params: chex.ArrayTree) -> chex.ArrayTree:
    """The default mask; leaves that cannot be trained raise an error without a mask."""
    check_floating_leaves(params, "reparametrize", "leave it out with `mask=`")
    return jax.tree.map(
        lambda p: jnp.ndim(p) >= 2 and jnp.issubdtype(jnp.result_type(p), jnp.floating), params
    )


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
