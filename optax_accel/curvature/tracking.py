"""Tracking the dominant eigenspace of a curvature matrix along training."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_accel._arguments import check_choice, check_integer
from optax_accel.curvature import blocks
from optax_accel.curvature.eigensolvers import Order, lanczos, subspace_sweep
from optax_accel.objective import Objective

PyTree = Any


class Eigenspace(NamedTuple):
    """An estimate of the leading eigenspace.

    Attributes:
      basis: orthonormal block, leaves ``(k, *leaf.shape)``, leading direction first.
      guard: the oversampled directions, leaves ``(oversampling, *leaf.shape)``; None without any.
      eigenvalues: Ritz values ``(k,)`` of the basis of the last refresh.
      shift: scalar added to the spectrum so that its algebraic top leads.
      ready: whether the basis holds an estimate yet; boolean scalar.
    """

    basis: PyTree
    guard: PyTree
    eigenvalues: jax.Array
    shift: jax.Array
    ready: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTracker:
    """Warm-started block power iteration with a Lanczos cold start.

    The dominant Hessian subspace of a network moves slowly, so one block product every few steps,
    started from the last basis, follows it; only the first estimate needs a full eigensolver.

    Args:
      refresh_every: steps between refreshes. With the default, 5, and one sweep on 500 of 5,000
        MNIST images, k = 10, the alignment chi_k stayed within 0.007 of the one that ARPACK finds
        on all of them, and the mean squared cosine of the bases above 0.99 (tanh MLP with 199,210
        parameters, 300 steps of SGD); what is left of the error is the smaller batch's.
      power_iterations: block products of a warm refresh.
      oversampling: directions tracked beyond the ones asked for. They guard the last direction
        against a small gap behind it, at one more product each per refresh.
      cold_start_products: Hessian-vector products of the Lanczos cold start; ``None`` (default):
        three per tracked direction, at least 20 (fewer only where the dimension is smaller).
      order: ``"algebraic"`` (default): the largest eigenvalues, the definition of Song et al.,
        2024; ``"magnitude"``: the largest in magnitude, what their code asks ARPACK for.
      curvature: ``"hessian"`` (default) or ``"gauss_newton"`` (needs ``Objective(predict, loss)``).
      accumulator_dtype: dtype of basis and inner products; ``None`` (default): each leaf's own, but
        at least float32.
      seed: of the random start.

    Raises:
      ValueError, TypeError: an argument outside its range.
    """

    refresh_every: int = 5
    power_iterations: int = 1
    oversampling: int = 0
    cold_start_products: int | None = None
    order: Order = "algebraic"
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    accumulator_dtype: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("refresh_every", self.refresh_every, 1)
        check_integer("power_iterations", self.power_iterations, 1)
        check_integer("oversampling", self.oversampling, 0)
        if self.cold_start_products is not None:
            check_integer("cold_start_products", self.cold_start_products, 1)
        check_integer("seed", self.seed, 0)
        if self.accumulator_dtype is not None and not jnp.issubdtype(
            self.accumulator_dtype, jnp.floating
        ):
            raise ValueError(
                "`accumulator_dtype` must be a real floating-point dtype, got "
                f"{self.accumulator_dtype!r}."
            )
        check_choice("order", self.order, ("algebraic", "magnitude"))
        check_choice("curvature", self.curvature, ("hessian", "gauss_newton"))

    def _sizes(self, params: PyTree, num_directions: int) -> tuple[int, int]:
        """Tracked directions with and without the guard, cut to the dimension."""
        size = blocks.dimension(params)
        k = min(num_directions, size)
        return k, min(k + self.oversampling, size) if k else 0

    def _like(self, params: PyTree) -> PyTree:
        def like(leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = self.accumulator_dtype or jnp.promote_types(leaf.dtype, jnp.float32)
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

        return jax.tree.map(like, params)

    def num_products(self, params: PyTree, num_directions: int, *, cold: bool) -> int:
        """Curvature-vector products of one refresh.

        Args:
          params: the parameters (or their shapes).
          num_directions: k.
          cold: of the cold start instead of a warm refresh.

        Returns:
          The number of products.
        """
        k, tracked = self._sizes(params, num_directions)
        size = blocks.dimension(params)
        if not cold:
            return tracked * self.power_iterations
        if tracked == size or not k:
            return tracked
        wanted = self.cold_start_products or max(3 * tracked, 20)
        return min(max(wanted, tracked), size)

    def init(self, params: PyTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a random orthonormal basis, not ready."""
        k, tracked = self._sizes(params, num_directions)
        like = self._like(params)
        if k:
            keys = jax.random.split(jax.random.key(self.seed), tracked)
            start = jax.vmap(lambda key: blocks.random(key, like))(keys)
            basis = blocks.orthonormalize(start)
        else:
            basis = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), like)
        dtype = blocks.scalar_dtype(like)
        return Eigenspace(
            basis=blocks.rows(basis, 0, k),
            # Not a block of no rows: Orbax cannot save arrays of size zero.
            guard=blocks.rows(basis, k, tracked) if tracked > k else None,
            eigenvalues=jnp.zeros((k,), dtype),
            shift=jnp.zeros((), dtype),
            ready=jnp.zeros((), bool),
        )

    def cold_start(self, space: Eigenspace, objective: Objective, params: PyTree) -> Eigenspace:
        """A first estimate, by Lanczos; exact for problems no larger than the tracked block."""
        like = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape[1:], b.dtype), space.basis)
        k = space.eigenvalues.shape[0]
        _, tracked = self._sizes(params, k)
        product = self._operator(objective, params)
        if tracked == blocks.dimension(params):
            full = blocks.identity(like)
            values, basis, smallest = subspace_sweep(
                jax.vmap(product), full, shift=space.shift, order=self.order
            )
        else:
            pairs = lanczos(
                product,
                like,
                tracked,
                key=jax.random.key(self.seed),
                num_products=self.num_products(params, k, cold=True),
                order=self.order,
            )
            values, basis, smallest = pairs.eigenvalues, pairs.basis, pairs.smallest
        return self._accept(space, values, basis, self._shift(smallest))

    def refresh(self, space: Eigenspace, objective: Objective, params: PyTree) -> Eigenspace:
        """A warm refresh: ``power_iterations`` block sweeps from the last basis."""
        products = jax.vmap(self._operator(objective, params))
        basis = space.basis
        if space.guard is not None:
            basis = blocks.concatenate(basis, space.guard)
        shift, values = space.shift, space.eigenvalues
        for _ in range(self.power_iterations):
            values, basis, smallest = subspace_sweep(products, basis, shift=shift, order=self.order)
            # Negative curvature seen before is forgotten slowly: the sweep damps what it shifts
            # away, so a direction gone from the block may still be there in the spectrum.
            shift = jnp.maximum(0.9 * shift, self._shift(smallest))
        return self._accept(space, values, basis, shift)

    def _operator(self, objective: Objective, params: PyTree) -> Any:
        if self.curvature == "hessian":
            return objective.hessian(params)
        return objective.gauss_newton(params)

    def _shift(self, smallest: jax.Array) -> jax.Array:
        return jnp.maximum(-smallest, 0) * (self.order == "algebraic")

    def _accept(
        self, old: Eigenspace, values: jax.Array, basis: PyTree, shift: jax.Array
    ) -> Eigenspace:
        """The new estimate if it is finite and orthonormal, else the old one."""
        k = old.eigenvalues.shape[0]
        gram = blocks.inner(basis, basis)
        # Loose on purpose: this tells a basis from NaNs and zero rows, not good from better.
        valid = jnp.all(jnp.abs(gram - jnp.eye(gram.shape[0], dtype=gram.dtype)) < 0.1)
        valid &= jnp.all(jnp.isfinite(values)) & jnp.isfinite(shift)
        new = Eigenspace(
            basis=blocks.rows(basis, 0, k),
            guard=None if old.guard is None else blocks.rows(basis, k, gram.shape[0]),
            eigenvalues=values[:k],
            shift=shift,
            ready=jnp.ones((), bool),
        )
        return jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, old)
