"""Tracking by warm-started block power iteration."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_integer
from optax_accel.curvature import blocks
from optax_accel.curvature._block_iteration import subspace_sweep
from optax_accel.curvature.tracking import (
    CurvatureTracker,
    Eigenspace,
    accept,
    cold_start_products,
    curvature_operator,
    load,
    new_space,
    random_basis,
    solve,
    spectrum_shift,
    store,
)
from optax_accel.objective import Objective


class BlockMemory(NamedTuple):
    """What :class:`BlockTracker` keeps besides the basis.

    Attributes:
      guard: the oversampled directions, leaves ``(oversampling, *leaf.shape)``; None if there are
        none.
      shift: scalar added to the spectrum so that its algebraic top leads.
    """

    guard: chex.ArrayTree
    shift: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTracker(CurvatureTracker):
    """Warm-started block power iteration with a Lanczos cold start.

    The dominant Hessian subspace of a network moves slowly, so one block product every few steps,
    started from the last basis, follows it; only the first estimate needs a full eigensolver.

    Within its budget the cold start may miss copies of a multiple eigenvalue, because a Krylov
    space has one direction of each eigenspace. Sweeps find them, from rounding errors if need be:
    of a fourfold eigenvalue among 300, in float32 and with three directions, the third copy was
    missing at first and accurate to 1e-4 after 20 sweeps. :class:`ExactTracker` counts copies at
    every solve.

    Args:
      refresh_every: steps between refreshes; default 20. With it and 500 of 5,000 MNIST images,
        k = 10, along 500 steps of SGD at rates 0.01 and 0.1 on a tanh network with 199,210
        parameters, the alignment chi_k stayed within 0.01 of the one that ARPACK finds on all
        images, the mean squared cosine of the subspaces at 0.997 and 0.99; 5 and 10 were hardly
        better. At rate 0.1 mini-batch noise moves the exact subspace itself by a squared cosine of
        0.98 in 5 steps.
      power_iterations: block products of a warm refresh; default 1.
      oversampling: directions tracked beyond the ones asked for, default 0. They guard the last
        direction against a small gap behind it, at one more product each per refresh.
      cold_start_products: Hessian-vector products of the Lanczos cold start; ``None`` (default):
        three per tracked direction, at least 20 (fewer only where the dimension is smaller).
      order: ``"algebraic"`` (default): the largest eigenvalues, the definition of Song et al.,
        2024; ``"magnitude"``: the largest in magnitude, what their code asks ARPACK for.
      curvature: the matrix whose eigenspace is followed: ``"hessian"`` (default) or
        ``"gauss_newton"`` (needs ``Objective(predict, loss)``).
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis is kept between steps, e.g. ``jnp.bfloat16``; ``None``
        (default): the dtype of the linear algebra.
      seed: integer from which the random start is drawn; default 0.

    Raises:
      ValueError, TypeError: an argument outside its range.
    """

    refresh_every: int = 20
    power_iterations: int = 1
    oversampling: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("power_iterations", self.power_iterations, 1)
        check_integer("oversampling", self.oversampling, 0)

    def _sizes(self, params: chex.ArrayTree, num_directions: int) -> tuple[int, int]:
        """Tracked directions without and with the guard, cut to the dimension."""
        size = blocks.dimension(params)
        k = min(num_directions, size)
        return k, min(k + self.oversampling, size) if k else 0

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        _, tracked = self._sizes(params, num_directions)
        return (
            cold_start_products(self, params, tracked) if cold else tracked * self.power_iterations
        )

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        k, tracked = self._sizes(params, num_directions)
        basis = random_basis(self, params, tracked)
        memory = self._memory(basis, k, jnp.zeros(()))
        if self.oversampling and num_directions and not jax.tree.leaves(params):
            memory = memory._replace(guard=basis)  # a placeholder for what states usually have
        return new_space(self, params, basis, k, memory)

    def _memory(self, basis: chex.ArrayTree, k: int, shift: jax.Array) -> BlockMemory:
        tracked = jax.tree.leaves(basis)[0].shape[0] if jax.tree.leaves(basis) else 0
        # Not a block of no rows: Orbax cannot save arrays of size zero.
        guard = store(self, blocks.rows(basis, k, tracked)) if tracked > k else None
        return BlockMemory(guard, shift.astype(blocks.scalar_dtype(basis)))

    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        def start(old: Eigenspace) -> Eigenspace:
            return self._start(old, objective, params)

        def sweep(old: Eigenspace) -> Eigenspace:
            return self._sweep(old, objective, params)

        if cold is None:
            return lax.cond(space.ready, sweep, start, space)
        return start(space) if cold else sweep(space)

    def _start(
        self, space: Eigenspace, objective: Objective | None, params: chex.ArrayTree
    ) -> Eigenspace:
        k = space.eigenvalues.shape[0]
        _, tracked = self._sizes(params, k)
        values, basis, smallest, _ = solve(
            self,
            objective,
            params,
            tracked,
            num_products=cold_start_products(self, params, tracked),
        )
        return self._finish(space, values, basis, spectrum_shift(self, smallest))

    def _sweep(
        self, space: Eigenspace, objective: Objective | None, params: chex.ArrayTree
    ) -> Eigenspace:
        products = jax.vmap(curvature_operator(self, objective, params))
        basis = space.basis
        if space.memory.guard is not None:
            basis = blocks.concatenate(basis, space.memory.guard)
        basis = load(self, basis, params)
        if self.storage_dtype is not None:  # storage has rounded it
            basis = blocks.orthonormalize(basis)
        shift, values = space.memory.shift, space.eigenvalues
        for _ in range(self.power_iterations):
            values, basis, smallest = subspace_sweep(products, basis, shift=shift, order=self.order)
            # Negative curvature seen before is forgotten slowly: the sweep damps what it shifts
            # away, so a direction gone from the block may still be there in the spectrum.
            shift = jnp.maximum(0.9 * shift, spectrum_shift(self, smallest))
        return self._finish(space, values, basis, shift)

    def _finish(
        self, old: Eigenspace, values: jax.Array, basis: chex.ArrayTree, shift: jax.Array
    ) -> Eigenspace:
        k = old.eigenvalues.shape[0]
        memory = self._memory(basis, k, shift)
        basis = blocks.rows(basis, 0, k)
        return accept(self, old, values[:k], basis, memory, jnp.isfinite(shift))
