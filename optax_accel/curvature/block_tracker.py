"""Tracking by warm-started block power iteration."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_integer, check_number
from optax_accel.curvature import blocks
from optax_accel.curvature._block_iteration import power_step, ritz_residual_norms
from optax_accel.curvature._block_krylov import block_krylov
from optax_accel.curvature.tracking import (
    CurvatureTracker,
    Eigenspace,
    accept,
    block_product,
    cold_start_products,
    curvature_operator,
    load,
    new_space,
    next_shift,
    no_basis,
    or_random,
    solve,
    spectrum_shift,
    store,
    vector_like,
)
from optax_accel.objective import Objective

# Steps between two refreshes of an adaptive tracker, at least. On MNIST-5k at rate 0.1 refreshes
# every three steps follow the exact subspace no better than those every twenty.
SHORTEST_PERIOD = 5
# Block products of a refresh for orders that power steps do not serve; see `krylov_depth`.
_KRYLOV_DEPTH = 4


class AdaptivePeriod(NamedTuple):
    """How a :class:`BlockTracker` with ``refresh_every="adaptive"`` finds its period.

    Attributes:
      period: steps from the last accepted refresh to the next one; int32 scalar.
      drift: mean squared sine of the angles between the bases before and after the last accepted
        warm refresh, in [0, 1]; 0 before the first one.
      drift_floor: the part of ``drift`` that does not depend on the period; 0 at first.
      refreshes: number of accepted refreshes, the cold start included; int32 scalar.
    """

    period: jax.Array
    drift: jax.Array
    drift_floor: jax.Array
    refreshes: jax.Array


class BlockMemory(NamedTuple):
    """What :class:`BlockTracker` keeps besides the basis.

    Attributes:
      guard: the oversampled directions, leaves ``(oversampling, *leaf.shape)``; None if there are
        none.
      shift: scalar added to the spectrum so that its algebraic top leads.
      adaptive: the :class:`AdaptivePeriod`; None for a fixed period.
    """

    guard: chex.ArrayTree
    shift: jax.Array
    adaptive: AdaptivePeriod | None = None


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

    With ``refresh_every="adaptive"`` it refreshes when the eigenspace has moved. Each refresh tells
    how far: its drift is the mean squared sine of the angles between the bases before and after,
    which takes no product. The next period is the last one, P, times ``tolerance / (drift -
    floor)``, but at least halved and at most doubled, as the step of an ODE solver is chosen
    (Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, section II.4; the
    exponent 1 is for a random walk, whose squared distance grows with time). The floor is what the
    shortest period, 5 steps, drifts as well: the noise of mini-batches moves the parameters to and
    fro along the steepest directions, and the eigenspace with them, from step to step, and no
    period of several steps follows that. Curvature batches that change have such a floor too; give
    a fixed one (``curvature_value_fn=``).

    Args:
      refresh_every: steps between refreshes; default 20. With it and 500 of 5,000 MNIST images,
        k = 10, along 500 steps of SGD at rate 0.01 on a tanh network with 199,210 parameters, the
        alignment chi_k stayed within 0.01 of the one that ARPACK finds on all images, the mean
        squared cosine of the subspaces at 0.997. At rate 0.1 these were 0.013 and 0.98, no worse
        than with 5 or 10: there mini-batch noise moves the exact subspace itself that far within
        three steps, and only a refresh at every step (0.997) or every other (0.994) follows.
        ``"adaptive"``: refresh when the eigenspace has moved; the state shows
        ``drift``, ``period`` and ``refreshes``.
      tolerance: with ``refresh_every="adaptive"``, the drift beyond its floor that a period may
        bring, in (0, 1]; ``None`` (default): 0.005.
      max_refresh_every: with ``refresh_every="adaptive"``, the longest period in steps, at least 5;
        ``None`` (default): 50.
      power_iterations: block products of a warm refresh; default 1.
      krylov_depth: block products of a warm refresh that looks for the eigenpairs in the whole
        space of the products (block Krylov, Rayleigh-Ritz) instead of making power steps. Default:
        power steps for ``"algebraic"`` and ``"magnitude"``; 4 for ``"smallest"`` and ``"both"``,
        which power steps do not serve: the smallest eigenvalues of a loss lie close together,
        compared with the largest.  Along 400 steps of SGD on the digits (an MLP with 750
        parameters, k = 6, refreshed every 20 steps) the mean squared cosine for the smallest
        eigenvalues was 0.30, 0.56 and 0.72 with a depth of 2, 3 and 4, 0.63, 0.82 and 0.88 for
        both ends, and 0.19 and 0.60 with a shifted power step (ours). Take 2 with
        ``refresh_every="adaptive"`` in the metric of an adaptive optimizer, which turns the
        subspace early in training: for the largest 10 along 100 steps of Adam on the digits it was
        0.97, and 0.78 with the defaults, after five refreshes each (``experiments.trackers``).
      oversampling: directions tracked beyond the ones asked for, default 0. They guard the last
        direction against a small gap behind it, at one more product each per refresh.
      cold_start_products: Hessian-vector products of the Lanczos cold start; ``None`` (default):
        three per tracked direction, at least 20 (fewer only where the dimension is smaller), and
        twice that for ``"smallest"`` and ``"both"``.
      order: ``"algebraic"`` (default): the largest eigenvalues, the definition of Song et al.,
        2024; ``"magnitude"``: the largest in magnitude, what their code asks ARPACK for;
        ``"smallest"``: the smallest, the smallest one first; ``"both"``: the largest and the
        smallest in turn, ``eigenvalues[::2]`` the largest and ``[1::2]`` the smallest.
      curvature: the matrix whose eigenspace is followed: ``"hessian"`` (default) or
        ``"gauss_newton"`` (needs ``Objective(predict, loss)``).
      residuals: whether the state holds ``residual_norms``; default False. After a power step they
        are, as the eigenvalues, those of the basis before its last step, and take two passes over
        it; with ``krylov_depth`` those of the new basis.
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis is kept between steps, e.g. ``jnp.bfloat16``; ``None``
        (default): the dtype of the linear algebra.
      seed: integer from which the random start is drawn; default 0.

    Raises:
      ValueError, TypeError: an argument outside its range.
    """

    refresh_every: int | Literal["adaptive"] = 20
    tolerance: float | None = None
    max_refresh_every: int | None = None
    power_iterations: int = 1
    oversampling: int = 0
    krylov_depth: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("power_iterations", self.power_iterations, 1)
        check_integer("oversampling", self.oversampling, 0)
        if self.krylov_depth is not None:
            check_integer("krylov_depth", self.krylov_depth, 1)
        if self.power_iterations > 1 and (self.krylov_depth or self.power_order is None):
            raise ValueError(
                f"`power_iterations` is {self.power_iterations}, but a refresh with "
                f'`krylov_depth` or with `order="{self.order}"` makes no power steps: leave '
                "`power_iterations` out and set `krylov_depth`."
            )

    def _check_period(self) -> None:
        if isinstance(self.refresh_every, str) and self.refresh_every != "adaptive":
            raise ValueError(
                "`refresh_every` must be an integer of at least 1 or 'adaptive', got "
                f"{self.refresh_every!r}."
            )
        if self.refresh_every != "adaptive":
            check_integer("refresh_every", self.refresh_every, 1)
        for name in ("tolerance", "max_refresh_every"):
            if getattr(self, name) is not None and self.refresh_every != "adaptive":
                raise ValueError(
                    f'`{name}` is for `refresh_every="adaptive"`; with a period of '
                    f"{self.refresh_every} steps leave it out."
                )
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, 0, 1, open_low=True)
        if self.max_refresh_every is not None:
            check_integer("max_refresh_every", self.max_refresh_every, SHORTEST_PERIOD)

    def _sizes(self, params: chex.ArrayTree, num_directions: int) -> tuple[int, int]:
        """Tracked directions without and with the guard, cut to the dimension."""
        size = blocks.dimension(params)
        k = min(num_directions, size)
        return k, min(k + self.oversampling, size) if k else 0

    def _depth(self, params: chex.ArrayTree, tracked: int) -> int | None:
        """Block products of a refresh in a Krylov space, cut to the dimension; None: power steps.

        A block that is the whole space is exact after one.
        """
        depth = self.krylov_depth
        if depth is None and self.power_order is None:
            depth = _KRYLOV_DEPTH
        if depth is None or not tracked:
            return depth
        return min(depth, blocks.dimension(params) // tracked)

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        _, tracked = self._sizes(params, num_directions)
        if cold:
            return cold_start_products(self, params, tracked)
        return tracked * (self._depth(params, tracked) or self.power_iterations)

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        k, tracked = self._sizes(params, num_directions)
        adaptive = None
        if self.refresh_every == "adaptive":
            # Arrays of their own, because one can be donated only once.
            adaptive = AdaptivePeriod(
                period=jnp.full((), SHORTEST_PERIOD, jnp.int32),
                drift=jnp.zeros(()),
                drift_floor=jnp.zeros(()),
                refreshes=jnp.zeros((), jnp.int32),
            )
        # Not a block of no rows: Orbax cannot save arrays of size zero.
        guard = no_basis(self, params, tracked - k) if tracked > k else None
        if self.oversampling and num_directions and not jax.tree.leaves(params):
            guard = no_basis(self, params, 0)  # a placeholder for what states usually have
        shift = jnp.zeros((), blocks.scalar_dtype(vector_like(self, params)))
        return new_space(self, params, k, BlockMemory(guard, shift, adaptive))

    def next_period(self, space: Eigenspace) -> int | jax.Array:
        adaptive = space.memory.adaptive
        if adaptive is None:
            return super().next_period(space)
        # Whoever projects waits for an accepted refresh.
        return jnp.where(space.accepted, adaptive.period, SHORTEST_PERIOD)

    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        # Linearized here, once for both branches of the conditional.
        product = curvature_operator(self, objective, params)

        def start(old: Eigenspace) -> Eigenspace:
            return self._start(old, product, params)

        def sweep(old: Eigenspace) -> Eigenspace:
            return self._sweep(old, product, params)

        if cold is None:
            return lax.cond(space.ready, sweep, start, space)
        return start(space) if cold else sweep(space)

    def _start(self, space: Eigenspace, product: Any, params: chex.ArrayTree) -> Eigenspace:
        k = space.eigenvalues.shape[0]
        _, tracked = self._sizes(params, k)
        packing = blocks.Packing(params)
        found = solve(
            self,
            product,
            params,
            packing,
            tracked,
            num_products=cold_start_products(self, params, tracked),
        )
        adaptive = space.memory.adaptive
        if adaptive is not None:
            adaptive = adaptive._replace(
                period=jnp.full_like(adaptive.period, SHORTEST_PERIOD),
                refreshes=adaptive.refreshes + 1,
            )
        shift = spectrum_shift(self, found.smallest)
        residuals = found.residual_norms
        return self._finish(space, found.values, found.basis, packing, shift, adaptive, residuals)

    def _sweep(self, space: Eigenspace, product: Any, params: chex.ArrayTree) -> Eigenspace:
        basis = space.basis
        if space.memory.guard is not None:
            basis = blocks.concatenate(basis, space.memory.guard)
        basis = load(self, basis, params)
        packing = blocks.Packing(params)
        basis = packing.pack(basis, axis=1)
        basis = or_random(self, space.ready, basis, params, packing=packing)

        rows = block_product(product, vector_like(self, params))

        def products(packed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            return packing.pack(rows(packing.unpack(packed, axis=1)), axis=1)

        depth = self._depth(params, jax.tree.leaves(basis)[0].shape[0])
        if self.storage_dtype is not None or depth is not None:  # storage has rounded it
            basis = blocks.orthonormalize(basis)
        before = basis
        if depth is None:
            values, basis, shift, residuals = self._power_steps(products, basis, space)
        else:
            values, basis, smallest, residuals = block_krylov(
                products, basis, depth=depth, order=self.order
            )
            shift = spectrum_shift(self, smallest)
        adaptive = space.memory.adaptive
        if adaptive is not None:
            k = space.eigenvalues.shape[0]
            cosines = blocks.inner(*(blocks.rows(block, 0, k) for block in (before, basis)))
            drift = jnp.clip(1 - jnp.sum(jnp.square(cosines)) / max(k, 1), 0, 1)
            adaptive = self._adapted(adaptive, drift.astype(adaptive.drift.dtype))
        return self._finish(space, values, basis, packing, shift, adaptive, residuals)

    def _power_steps(
        self, products: Any, basis: tuple[jax.Array, ...], space: Eigenspace
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array | None]:
        """Ritz values, the next basis, the next shift, and residual norms if they are wanted."""
        order, values, residuals = self.power_order, space.eigenvalues, None
        shift = space.memory.shift
        assert order is not None
        for _ in range(self.power_iterations):
            images = products(basis)
            if self.residuals:
                residuals = ritz_residual_norms(basis, images, order)
            shift_of = functools.partial(next_shift, self, shift, values)
            values, basis, shift = power_step(images, basis, shift_of, order)
        return values, basis, shift, residuals

    def _adapted(self, old: AdaptivePeriod, drift: jax.Array) -> AdaptivePeriod:
        """The period after a refresh that found this drift."""
        tolerance = 0.005 if self.tolerance is None else self.tolerance
        longest = 50 if self.max_refresh_every is None else self.max_refresh_every
        # Half of the way, because one drift says little; up only where the floor can be seen.
        seen = (drift < old.drift_floor) | (old.period <= SHORTEST_PERIOD)
        floor = jnp.where(seen, (old.drift_floor + drift) / 2, old.drift_floor)
        excess = jnp.maximum(drift - floor, tolerance / 2)
        factor = jnp.maximum(tolerance / excess, 0.5)
        period = jnp.round(factor * old.period).astype(jnp.int32)
        return AdaptivePeriod(
            period=jnp.clip(period, SHORTEST_PERIOD, longest),
            drift=drift,
            drift_floor=floor,
            refreshes=old.refreshes + 1,
        )

    def _finish(
        self,
        old: Eigenspace,
        values: jax.Array,
        basis: tuple[jax.Array, ...],
        packing: blocks.Packing,
        shift: jax.Array,
        adaptive: AdaptivePeriod | None,
        residuals: jax.Array | None,
    ) -> Eigenspace:
        k = old.eigenvalues.shape[0]
        guard = old.memory.guard
        if guard is not None:
            rest = jax.tree.map(lambda b: b[k:], basis)
            guard = store(self, packing.unpack(rest, axis=1))
            basis = blocks.rows(basis, 0, k)
        memory = BlockMemory(guard, shift.astype(old.memory.shift.dtype), adaptive)
        valid = jnp.isfinite(shift)
        return accept(self, old, values[:k], basis, memory, valid, packing, residuals)
