"""Tracking by one curvature product at every step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._numerics import max_norm
from optax_accel.curvature import blocks
from optax_accel.curvature._block_iteration import power_step, ritz_residual_norms
from optax_accel.curvature.tracking import (
    CurvatureTracker,
    Eigenspace,
    accept,
    cold_start_products,
    curvature_operator,
    load,
    new_space,
    next_shift,
    no_basis,
    or_random,
    solve,
    spectrum_shift,
    vector_like,
)
from optax_accel.objective import Objective


class RoundRobinMemory(NamedTuple):
    """What :class:`RoundRobinTracker` keeps besides the basis.

    Attributes:
      images: the products with the first rows of the basis that have been made; shaped like the
        basis.
      position: number of those products; int32 scalar.
      shift: scalar added to the spectrum so that its algebraic top leads.
    """

    images: chex.ArrayTree
    position: jax.Array
    shift: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobinTracker(CurvatureTracker):
    """Block power iteration spread over the steps: one curvature product at each.

    The products with the k rows of the basis are made one a step, each at the parameters of its
    step; when all are there, Rayleigh-Ritz and orthonormalization give the next basis.  No step is
    much dearer than the others, and the product stands in no conditional, so that convolutions run
    at full speed on a CPU also when the graph decides (the Lanczos start apart).  Memory: 2k copies
    of the parameters.

    Args:
      refresh_every: steps between products; default 1.
      cold_start_products: Hessian-vector products of the Lanczos cold start; ``None`` (default):
        three per direction, at least 20 (fewer only where the dimension is smaller).
      order: ``"algebraic"`` (default) follows the largest eigenvalues, ``"magnitude"`` the largest
        in magnitude.
      curvature: the matrix whose eigenspace is followed: ``"hessian"`` (default) or
        ``"gauss_newton"`` (needs ``Objective(predict, loss)``).
      residuals: whether the state holds ``residual_norms``; default False. They are those of the
        last round's products, which were made at as many points.
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis and its products are kept between steps, e.g.
        ``jnp.bfloat16``; ``None`` (default): the dtype of the linear algebra.
      seed: integer from which the random start is drawn; default 0.

    Raises:
      ValueError, TypeError: an argument outside its range.
    """

    refresh_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power_order is None:
            raise ValueError(
                f'`order="{self.order}"` is for BlockTracker and ExactTracker, got it for '
                "RoundRobinTracker, which makes one power step in a round: too few to tell small "
                'eigenvalues apart. Its orders are "algebraic" and "magnitude".'
            )

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        k = min(num_directions, blocks.dimension(params))
        return min(k, 1) + (cold_start_products(self, params, k) if cold else 0)

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        k = min(num_directions, blocks.dimension(params))
        memory = RoundRobinMemory(
            images=no_basis(self, params, k),
            position=jnp.zeros((), jnp.int32),
            shift=jnp.zeros((), blocks.scalar_dtype(vector_like(self, params))),
        )
        return new_space(self, params, k, memory)

    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        # Linearized once, for the cold start and for the product of this step.
        product = curvature_operator(self, objective, params)

        def start(old: Eigenspace) -> Eigenspace:
            k, packing = old.eigenvalues.shape[0], blocks.Packing(params)
            num_products = cold_start_products(self, params, k)
            found = solve(self, product, params, packing, k, num_products=num_products)
            shift = spectrum_shift(self, found.smallest)
            memory = old.memory._replace(position=jnp.zeros((), jnp.int32), shift=shift)
            valid, residuals = jnp.isfinite(shift), found.residual_norms
            return accept(self, old, found.values, found.basis, memory, valid, packing, residuals)

        if cold:
            space = start(space)
        elif cold is None:
            space = lax.cond(space.ready, lambda old: old, start, space)
        return self._advance(space, product, params)

    def _advance(self, space: Eigenspace, product: Any, params: chex.ArrayTree) -> Eigenspace:
        k = space.eigenvalues.shape[0]
        images, position, shift = space.memory
        row = jax.tree.map(
            lambda b: lax.dynamic_index_in_dim(b, position, keepdims=False), space.basis
        )
        row = or_random(self, space.ready, blocks.as_block(row), params, position)
        basis = jax.tree.map(
            lambda b, new: lax.dynamic_update_slice_in_dim(b, new, position, 0), space.basis, row
        )
        row = jax.tree.map(lambda x: x[0], load(self, row, params))
        image = product(row)
        valid = jnp.isfinite(max_norm(image))

        def put(block: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.where(valid, new, 0).astype(block.dtype)
            return lax.dynamic_update_index_in_dim(block, new, position, 0)

        position_after = position + valid
        space = space._replace(
            basis=basis,
            accepted=valid,
            rejected=space.rejected + ~valid,
            memory=RoundRobinMemory(jax.tree.map(put, images, image), position_after, shift),
        )

        def sweep(old: Eigenspace) -> Eigenspace:
            basis, images = load(self, (old.basis, old.memory.images), (params, params))
            order = self.power_order
            assert order is not None
            residuals = ritz_residual_norms(basis, images, order) if self.residuals else None
            shift_of = functools.partial(next_shift, self, shift, old.eigenvalues)
            values, basis, shift_after = power_step(images, basis, shift_of, order)
            memory = RoundRobinMemory(
                images=old.memory.images,
                position=jnp.zeros((), jnp.int32),
                shift=shift_after,
            )
            valid = jnp.ones((), bool)
            return accept(self, old, values, basis, memory, valid, residual_norms=residuals)

        return lax.cond(position_after == k, sweep, lambda old: old, space)
