"""Damped Gauss-Newton systems solved by conjugate gradients, for gradients of any size."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.sparse.linalg import cg

from optax_accel._derivatives import LinearFunction
from optax_accel._numerics import divided, max_norm, power_of_two, vdot
from optax_accel.curvature.blocks import Packing

# Iterations in the first window (Martens, 2010, section 4.4), and the growth of later ones.
_FIRST_WINDOW, _GROWTH = 10, 0.5
# The preconditioner is (diagonal + damping) ** 0.75 (Martens, 2010, section 4.7).
_POWER = 0.75
# Entries above which an array is not joined with others: a copy of it would take longer.
LARGEST_JOINED = 2**16


class Solution(NamedTuple):
    """A direction and what is known of it.

    Attributes:
      direction: d, like the gradient.
      slope: ``g^T d``, in units of the product of both entries of ``scale``.
      bending: ``d^T G d``, in the same units.
      scale: the powers of two by which direction and gradient were divided.
      num_iterations: how many were made.
      broken: 1 where CG met a number that is not finite, else 0.
    """

    direction: chex.ArrayTree
    slope: jax.Array
    bending: jax.Array
    scale: jax.Array
    num_iterations: jax.Array
    broken: jax.Array


def solve(
    curvature: LinearFunction,
    damping: jax.Array,
    gradient: chex.ArrayTree,
    start: chex.ArrayTree,
    diagonal: chex.ArrayTree | None,
    *,
    max_iterations: int,
    tolerance: Any,
) -> Solution:
    """Solves ``(G + damping I) d = -g``.

    CG squares its arguments, and squares of finite numbers may be infinite or 0. So it solves a
    system whose gradient and curvature have entries of about 1, divided by powers of two, which
    costs no digit.  The arrays of a vector are joined meanwhile: every operation of CG is compiled
    anew for each of them.

    Args:
      curvature: product with G.
      damping: scalar of at least 0.
      gradient: g.
      start: direction to start from, if the model prefers it to zero.
      diagonal: estimate of the diagonal of G to precondition with, or None.
      max_iterations: bound on the number of iterations.
      tolerance: decrease of the damped model, per iteration and relative to its whole decrease,
        below which the iterations end.

    Raises:
      ValueError: ``start`` is the direction of other parameters.
    """
    _check_start(start, gradient)
    packing = Packing(gradient, largest=LARGEST_JOINED)
    gradient, start = packing.pack(gradient), packing.pack(start)
    of_gradient = power_of_two(max_norm(gradient))
    gradient = divided(gradient, of_gradient)
    # The product with the warm start is needed anyway; a cold start has no use for it.
    warm = max_norm(start) > 0
    of_start = power_of_two(max_norm(start))
    probe = jax.tree.map(lambda s, g: jnp.where(warm, s, g), divided(start, of_start), gradient)

    def joined_curvature(vector: chex.ArrayTree) -> chex.ArrayTree:
        return packing.pack(curvature(packing.unpack(vector)))

    image = joined_curvature(probe)
    bounded = jnp.isfinite(max_norm(image))
    of_curvature = power_of_two(max_norm(image) + damping.astype(of_start.dtype))
    limits = jnp.finfo(of_gradient.dtype)
    of_direction = jnp.clip(of_gradient / of_curvature, limits.tiny, 1 / limits.tiny)
    damping = damping.astype(of_curvature.dtype) / of_curvature
    preconditioner = None
    if diagonal is not None:
        preconditioner = jax.tree.map(
            lambda d: jnp.maximum(d + damping.astype(d.dtype), jnp.finfo(d.dtype).tiny) ** _POWER,
            divided(packing.pack(diagonal), of_curvature),
        )

    def scaled(vector: chex.ArrayTree) -> chex.ArrayTree:
        return divided(joined_curvature(vector), of_curvature)

    system = _System(scaled, damping, gradient, preconditioner)
    relative = of_start / of_direction
    start = jax.tree.map(lambda p: jnp.where(warm, p * relative.astype(p.dtype), 0), probe)
    image = jax.tree.map(
        lambda i: jnp.where(warm, i * relative.astype(i.dtype), 0), divided(image, of_curvature)
    )
    first = _first_point(system, start, image, bounded)
    last = _iterate(system, first, max_iterations, tolerance)
    direction = jax.tree.map(lambda d: d * of_direction.astype(d.dtype), last.direction)
    return Solution(
        packing.unpack(direction),
        last.slope,
        last.bending,
        jnp.stack([of_direction, of_gradient]),
        last.num_iterations.astype(last.value.dtype),
        last.broken.astype(last.value.dtype),
    )


def _check_start(start: chex.ArrayTree, gradient: chex.ArrayTree) -> None:
    """Raises if a direction to start from is that of other parameters."""
    kept, needed = (
        {
            jax.tree_util.keystr(path) or "params": leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (start, gradient)
    )
    if [*kept.items()] != [*needed.items()]:  # the order matters, too
        raise ValueError(
            "hessian_free: these are not the parameters that `init` was called with. The direction "
            f"that it starts from has the shapes {kept}, the gradient has {needed}. After a change "
            "of the network call `init` again."
        )


@dataclasses.dataclass(frozen=True)
class _System:
    """``(G + damping I) d = -gradient``, in units in which entries are about 1."""

    curvature: LinearFunction
    damping: jax.Array
    gradient: chex.ArrayTree
    preconditioner: chex.ArrayTree | None

    def matrix(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(
            lambda g, v: g + self.damping.astype(v.dtype) * v, self.curvature(vector), vector
        )

    def model(
        self, vector: chex.ArrayTree, image: chex.ArrayTree
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The damped model, ``g^T v`` and ``v^T G v``."""
        slope, bending = vdot(self.gradient, vector), vdot(vector, image)
        damped = bending + self.damping * vdot(vector, vector)
        return slope + damped / 2, slope, bending

    def run_cg(
        self, right_side: chex.ArrayTree, start: chex.ArrayTree, precision: jax.Array, length: Any
    ) -> chex.ArrayTree:
        inverse = None
        if self.preconditioner is not None:
            inverse = self.precondition
        solution, _ = cg(
            self.matrix, right_side, start, tol=0.0, atol=precision, maxiter=length, M=inverse
        )
        return solution

    def precondition(self, vector: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(jnp.divide, vector, self.preconditioner)


class _Point(NamedTuple):
    """Where the iterations are, and the model there."""

    direction: chex.ArrayTree
    value: jax.Array
    slope: jax.Array
    bending: jax.Array
    num_iterations: jax.Array
    going_on: jax.Array
    broken: jax.Array


def _first_point(
    system: _System, start: chex.ArrayTree, image: chex.ArrayTree, bounded: jax.Array
) -> _Point:
    """The warm start, or zero where the model does not like it."""
    value, slope, bending = system.model(start, image)
    # Descent from the warm start never ends above it, so the step is at least no ascent.
    useful = (value < 0) & jnp.isfinite(value)
    # A gradient that is not finite must show: CG would return where it started.
    start = jax.tree.map(lambda s, g: jnp.where(useful, s, 0 * g), start, system.gradient)
    value, slope, bending = (jnp.where(useful, x, 0) for x in (value, slope, bending))
    # What follows from others differs between the devices where they do.
    return _Point(start, value, slope, bending, jnp.where(useful, 0, 0), bounded, ~bounded)


def _iterate(system: _System, first: _Point, max_iterations: int, tolerance: Any) -> _Point:
    """Runs CG for one window of iterations after the other, as long as the model falls."""
    right_side = optax.tree.scale(-1, system.gradient)
    # CG divides zero by zero where it goes on after it has arrived.
    arrived = jnp.finfo(first.value.dtype).eps * jnp.sqrt(vdot(system.gradient, system.gradient))

    def going_on(point: _Point) -> jax.Array:
        return point.going_on & (point.num_iterations < max_iterations)

    def window(point: _Point) -> _Point:
        iterations = point.num_iterations
        length = jnp.maximum(_FIRST_WINDOW, (_GROWTH * iterations).astype(jnp.int32))
        length = jnp.minimum(length, max_iterations - iterations)
        new = system.run_cg(right_side, point.direction, arrived, length)
        value, slope, bending = system.model(new, system.curvature(new))
        # A breakdown of CG (of a singular matrix, say) leaves what there was before.
        sound = jnp.isfinite(value)
        progress = sound & (point.value - value > length * tolerance * -value)
        direction, value, slope, bending = jax.tree.map(
            lambda n, o: jnp.where(sound, n, o), (new, value, slope, bending), tuple(point[:4])
        )
        return _Point(
            direction,
            value,
            slope,
            bending,
            iterations + length,
            progress,
            point.broken | ~sound,
        )

    return lax.while_loop(going_on, window, first)
