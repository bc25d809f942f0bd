"""Tracking by Lanczos to a tolerance at every refresh, the reference."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_accel._arguments import check_number
from optax_accel.curvature import blocks
from optax_accel.curvature.tracking import (
    CurvatureTracker,
    Eigenspace,
    accept,
    curvature_operator,
    new_space,
    solve,
)
from optax_accel.objective import Objective


class ExactMemory(NamedTuple):
    """What :class:`ExactTracker` reports of the last solve.

    Attributes:
      num_products: curvature-vector products it took; int32 scalar.
    """

    num_products: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactTracker(CurvatureTracker):
    """Lanczos to a tolerance, from a random start at every refresh: the reference.

    Args:
      refresh_every: steps between refreshes; default 1, the protocol of Song et al., 2024.
      tolerance: relative error of the eigenvalues; default 1e-4.
      cold_start_products: budget of products of a solve; ``None`` (default): 20 per direction.
      order: ``"algebraic"`` (default) follows the largest eigenvalues, ``"magnitude"`` the largest
        in magnitude, ``"smallest"`` the smallest, the smallest one first, ``"both"`` the largest
        and the smallest in turn: ``eigenvalues[::2]`` the largest, ``[1::2]`` the smallest.
      curvature: the matrix whose eigenspace is followed: ``"hessian"`` (default) or
        ``"gauss_newton"`` (needs ``Objective(predict, loss)``).
      residuals: whether the state holds ``residual_norms``; default False.
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis is kept between steps, e.g. ``jnp.bfloat16``; ``None``
        (default): the dtype of the linear algebra.
      seed: integer from which the random start is drawn; default 0.

    Raises:
      ValueError, TypeError: an argument outside its range.
    """

    refresh_every: int = 1
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tolerance", self.tolerance, 0, 1, open_low=True)

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        size = blocks.dimension(params)
        k = min(num_directions, size)
        return k if k == size else max(self.cold_start_products or 20 * k, k)

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        k = min(num_directions, blocks.dimension(params))
        memory = ExactMemory(jnp.zeros((), jnp.int32))
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
        k = space.eigenvalues.shape[0]
        packing = blocks.Packing(params)
        found = solve(
            self,
            curvature_operator(self, objective, params),
            params,
            packing,
            k,
            num_products=self.num_products(params, k, cold=True),
            tolerance=self.tolerance,
        )
        memory, valid = ExactMemory(found.num_products), jnp.ones((), bool)
        return accept(
            self, space, found.values, found.basis, memory, valid, packing, found.residual_norms
        )
