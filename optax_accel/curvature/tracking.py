"""Tracking an eigenspace of a curvature matrix along training: what trackers share.

A :class:`Tracker` is a value that says how the eigenspace is followed; an :class:`Eigenspace` is
the estimate so far, arrays only. The trackers differ in what a refresh costs and in what it sees:

* :class:`~optax_accel.BlockTracker`: a block of curvature products every few steps; the default.
* :class:`~optax_accel.RoundRobinTracker`: one curvature product at every step, so that no step is
  much dearer than the others.
* :class:`~optax_accel.GradientTracker`: no curvature product, only first derivatives.
* :class:`~optax_accel.ExactTracker`: Lanczos to a tolerance, from scratch: the reference.

They follow the dominant eigenspace, that of the largest eigenvalues, unless told otherwise: with
``order="smallest"`` that of the smallest ones, with ``order="both"`` both ends of the spectrum.

``python -m experiments.trackers`` measures them against ARPACK.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import check_choice, check_flag, check_integer
from optax_accel._derivatives import has_primitive
from optax_accel._numerics import total, zeros
from optax_accel.curvature import blocks
from optax_accel.curvature._block_iteration import subspace_sweep
from optax_accel.curvature._block_krylov import block_krylov
from optax_accel.curvature._krylov import ritz_pairs
from optax_accel.curvature._lanczos import lanczos
from optax_accel.curvature.eigensolvers import ORDERS, Order, PowerOrder
from optax_accel.objective import Objective


class Eigenspace(NamedTuple):
    """An estimate of the leading eigenspace, and whether it can be relied on.

    What leads is what the tracker's ``order`` says.

    Attributes:
      basis: orthonormal block, leaves ``(k, *leaf.shape)``, leading direction first; zeros before
        the first refresh.
      eigenvalues: ``(k,)``, of the last refresh.
      ready: whether the basis holds an estimate yet; boolean scalar.
      accepted: whether the last refresh was accepted; boolean scalar. A refresh that met numbers
        that are not finite changes neither basis nor eigenvalues.
      rejected: number of refreshes that were not accepted; int32 scalar.
      memory: whatever else the tracker keeps, a NamedTuple that it defines.
      residual_norms: ``|H v - lambda v|`` of each direction, ``(k,)``, of the last refresh, if the
        tracker was asked for them (``residuals=True``); else None. Within this distance of lambda
        lies an eigenvalue of the matrix that the refresh saw.
    """

    basis: chex.ArrayTree
    eigenvalues: jax.Array
    ready: jax.Array
    accepted: jax.Array
    rejected: jax.Array
    memory: Any
    residual_norms: jax.Array | None = None

    @property
    def usable(self) -> jax.Array:
        """Whether there is an estimate that the last refresh did not cast doubt on."""
        return self.ready & self.accepted


class Tracker(abc.ABC):
    """How a dominant eigenspace is followed: the interface of all trackers.

    A tracker is a frozen dataclass; all that changes is in the :class:`Eigenspace`.

    Attributes:
      refresh_every: steps between refreshes; ``"adaptive"`` if the eigenspace decides.
    """

    refresh_every: int | Literal["adaptive"]

    @property
    def needs_objective(self) -> bool:
        """Whether a refresh evaluates the objective."""
        return True

    @abc.abstractmethod
    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a basis of zeros, not ready.

        Args:
          params: the parameters (or their shapes).
          num_directions: how many directions are followed; fewer if the dimension is smaller.

        Returns:
          The eigenspace.
        """

    @abc.abstractmethod
    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        """The eigenspace after one refresh.

        Args:
          space: the eigenspace before.
          objective: the loss whose curvature is followed; None if ``needs_objective`` is False.
          params: the parameters.
          gradient: the mini-batch gradient of the step, like the parameters.
          cold: static; whether to start anew (a tracker without a cold start goes on). With
            ``None`` (default) it is decided in the graph, by ``space.ready``.

        Returns:
          The new eigenspace; the old one, not accepted, where numbers were not finite.
        """

    def next_period(self, space: Eigenspace) -> int | jax.Array:
        """Steps from a refresh to the next one.

        Args:
          space: the eigenspace after the refresh.

        Returns:
          Their number, an int32 scalar if the eigenspace decides.
        """
        del space
        assert self.refresh_every != "adaptive"
        return self.refresh_every

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        """Curvature-vector products of one refresh.

        Args:
          params: the parameters (or their shapes).
          num_directions: how many directions are followed.
          cold: whether the refresh is a cold start instead of a warm one.

        Returns:
          The number of products; an upper bound where the tracker stops at a tolerance.
        """
        del params, num_directions, cold
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisTracker(Tracker):
    """The settings of all trackers: the dtypes of basis and linear algebra, the random start."""

    accumulator_dtype: Any = None
    storage_dtype: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_period()
        check_integer("seed", self.seed, 0)
        for name in ("accumulator_dtype", "storage_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not _is_real_dtype(dtype):
                raise ValueError(f"`{name}` must be a real floating-point dtype, got {dtype!r}.")

    def _check_period(self) -> None:
        if self.refresh_every == "adaptive":
            raise ValueError(
                '`refresh_every="adaptive"` is for BlockTracker, which sees how far a refresh '
                f"turns the basis; {type(self).__name__} needs a number of steps."
            )
        check_integer("refresh_every", self.refresh_every, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvatureTracker(BasisTracker):
    """The settings of trackers that take curvature products: the matrix, the Lanczos cold start."""

    cold_start_products: int | None = None
    order: Order = "algebraic"
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    residuals: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cold_start_products is not None:
            check_integer("cold_start_products", self.cold_start_products, 1)
        check_choice("order", self.order, ORDERS)
        check_choice("curvature", self.curvature, ("hessian", "gauss_newton"))
        check_flag("residuals", self.residuals)

    @property
    def power_order(self) -> PowerOrder | None:
        """The order, where power steps can follow it."""
        return self.order if self.order in ("algebraic", "magnitude") else None


def vector_like(tracker: BasisTracker, params: chex.ArrayTree) -> chex.ArrayTree:
    """Shapes of the parameters in the dtypes of the linear algebra."""

    def like(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = tracker.accumulator_dtype or jnp.promote_types(leaf.dtype, jnp.float32)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map(like, params)


def load(tracker: BasisTracker, block: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """A vector or block in the dtypes of the linear algebra."""
    return jax.tree.map(lambda b, x: b.astype(x.dtype), block, vector_like(tracker, params))


def store(tracker: BasisTracker, block: chex.ArrayTree) -> chex.ArrayTree:
    """A block in the dtype in which it is kept between steps."""
    return block if tracker.storage_dtype is None else optax.tree.cast(block, tracker.storage_dtype)


def no_basis(tracker: BasisTracker, params: chex.ArrayTree, num: int) -> chex.ArrayTree:
    """A block of ``num`` rows of zeros, as it is stored."""
    like = vector_like(tracker, params)
    return jax.tree.map(lambda x: zeros((num, *x.shape), tracker.storage_dtype or x.dtype), like)


def or_random(
    tracker: BasisTracker,
    ready: jax.Array,
    rows: chex.ArrayTree,
    params: chex.ArrayTree,
    first: chex.Numeric = 0,
    packing: blocks.Packing | None = None,
) -> chex.ArrayTree:
    """The rows of a basis from number ``first`` on, or before there is an estimate random ones.

    With a ``packing``, rows are packed.

    Their length is about 1, and they are as orthogonal as random vectors of this dimension are.
    """
    like = vector_like(tracker, params)
    leaves = jax.tree.leaves(rows)
    num = leaves[0].shape[0] if leaves else 0
    length = math.sqrt(max(blocks.dimension(like), 1) / 3)  # of uniform entries in [-1, 1)

    def drawn() -> chex.ArrayTree:
        draw = blocks.random_block if packing is None else packing.random_block
        random = draw(jax.random.key(tracker.seed), like, num, first)
        return jax.tree.map(lambda x, row: (x / length).astype(row.dtype), random, rows)

    return lax.cond(ready, lambda: rows, drawn)


def new_space(tracker: BasisTracker, params: chex.ArrayTree, k: int, memory: Any) -> Eigenspace:
    """An eigenspace of ``k`` directions without an estimate: a basis of zeros, not ready."""
    dtype = blocks.scalar_dtype(vector_like(tracker, params))
    residuals = isinstance(tracker, CurvatureTracker) and tracker.residuals
    return Eigenspace(
        basis=no_basis(tracker, params, k),
        eigenvalues=jnp.zeros((k,), dtype),
        ready=jnp.zeros((), bool),
        accepted=jnp.ones((), bool),
        rejected=jnp.zeros((), jnp.int32),
        memory=memory,
        residual_norms=jnp.zeros((k,), dtype) if residuals else None,
    )


def accept(
    tracker: BasisTracker,
    old: Eigenspace,
    values: jax.Array,
    basis: chex.ArrayTree,
    memory: Any,
    valid: jax.Array,
    packing: blocks.Packing | None = None,
    residual_norms: jax.Array | None = None,
) -> Eigenspace:
    """The new estimate if it is finite, else the old one; with a ``packing``, basis is packed."""
    # The squared norms of the rows tell a basis from NaNs at the cost of a pass.
    norms = jax.tree.map(lambda b: jnp.sum(jnp.square(b), tuple(range(1, b.ndim))), basis)
    valid &= jnp.all(jnp.isfinite(total(jax.tree.leaves(norms)))) & jnp.all(jnp.isfinite(values))

    def chosen() -> chex.ArrayTree:
        return store(tracker, basis if packing is None else packing.unpack(basis, axis=1))

    new = old._replace(basis=None, eigenvalues=values, ready=jnp.ones((), bool), memory=memory)
    if old.residual_norms is not None:
        assert residual_norms is not None
        new = new._replace(residual_norms=residual_norms[: values.shape[0]])
    new = jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, old._replace(basis=None))
    return new._replace(
        # A conditional, because what is selected would be fused with all that reads it.
        basis=lax.cond(valid, chosen, lambda: old.basis),
        accepted=valid,
        rejected=old.rejected + ~valid,
    )


def curvature_operator(
    tracker: CurvatureTracker, objective: Objective | None, params: chex.ArrayTree
) -> Any:
    """The product with the matrix whose eigenspace is followed."""
    assert objective is not None
    if tracker.curvature == "hessian":
        return objective.hessian(params)
    return objective.gauss_newton(params)


def block_product(
    product: Callable[[chex.ArrayTree], chex.ArrayTree], like: chex.ArrayTree
) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    """The product with every row of a block.

    In a loop where a compiled program runs on one CPU device, because what a single row needs then
    stays in the cache. On two cores, the ten products of a sweep took 0.8 of the time of the
    vectorized ones with 500 or 1,000 examples on a dense network of 199,210 parameters, 0.77 on a
    transformer of 0.8 million (16 sequences of 64 tokens), and the same with 50 or 128 examples.
    XLA runs convolutions slowly inside loops, so they are vectorized, as is everything on other
    devices.

    Args:
      product: a linear function of a pytree like the parameters.
      like: shapes and dtypes of a row.
    """
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    if not one_cpu or loops_slowly(product, like):
        return jax.vmap(product)

    def products(block: chex.ArrayTree) -> chex.ArrayTree:
        # Outside `jit` a loop would be compiled anew at every call.
        traced = any(isinstance(rows, jax.core.Tracer) for rows in jax.tree.leaves(block))
        return lax.map(product, block) if traced else jax.vmap(product)(block)

    return products


def loops_slowly(product: Callable[[chex.ArrayTree], chex.ArrayTree], like: chex.ArrayTree) -> bool:
    """Whether XLA runs a product slowly inside loops: one with convolutions, on a CPU."""
    if jax.default_backend() != "cpu":
        return False
    return has_primitive(jax.make_jaxpr(product)(like).jaxpr, "conv_general_dilated")


def spectrum_shift(tracker: CurvatureTracker, smallest: jax.Array) -> jax.Array:
    """What is added to the spectrum so that the wanted end leads in magnitude."""
    return jnp.maximum(-smallest, 0) * (tracker.order == "algebraic")


def next_shift(
    tracker: CurvatureTracker, shift: jax.Array, before: jax.Array, values: jax.Array
) -> jax.Array:
    """The shift of a power step.

    Negative curvature seen before is forgotten slowly: the step damps what it shifts away, so a
    direction gone from the block may still be there in the spectrum. Where the whole spectrum has
    shrunk, so has that curvature, and its old size would stop the iteration: in Adam's metric the
    eigenvalues of an MLP on the digits were 40 times smaller after 20 steps than after the first.

    Args:
      tracker: the tracker.
      shift: the one before; scalar.
      before: the eigenvalues of the last refresh, ``(k,)``.
      values: the Ritz values, ``(m,)``.
    """
    old, new = (jnp.max(jnp.abs(each), initial=0) for each in (before, values))
    shrunk = jnp.where(old > new, new / jnp.where(old > new, old, 1), 1)
    return jnp.maximum(0.9 * shrunk * shift, spectrum_shift(tracker, jnp.min(values)))


def cold_start_products(tracker: CurvatureTracker, params: chex.ArrayTree, tracked: int) -> int:
    """The budget of products of a Lanczos cold start."""
    size = blocks.dimension(params)
    if tracked == size or not tracked:
        return tracked
    # The smallest eigenvalues of a loss lie close together beside the largest ones.
    usual = max(3 * tracked, 20) if tracker.power_order else max(6 * tracked, 40)
    return min(max(tracker.cold_start_products or usual, tracked), size)


class Solution(NamedTuple):
    """Leading eigenpairs, solved for from scratch.

    Attributes:
      values: Ritz values, ``(k,)``, the leading one first.
      basis: the orthonormal block of their vectors, packed.
      smallest: the smallest Ritz value.
      num_products: products used; int32 scalar.
      residual_norms: ``(k,)``, if the tracker is asked for them; else None.
    """

    values: jax.Array
    basis: tuple[jax.Array, ...]
    smallest: jax.Array
    num_products: jax.Array
    residual_norms: jax.Array | None


def solve(
    tracker: CurvatureTracker,
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    params: chex.ArrayTree,
    packing: blocks.Packing,
    num: int,
    *,
    num_products: int,
    tolerance: float | None = None,
) -> Solution:
    """Solves from scratch for the leading eigenpairs."""
    like = vector_like(tracker, params)
    residuals: jax.Array | None
    if num == blocks.dimension(params):  # the whole space: exact
        if tracker.power_order is None or tracker.residuals:
            values, whole, smallest, residuals = block_krylov(
                jax.vmap(product), blocks.identity(like), depth=1, order=tracker.order
            )
        else:
            zero, residuals = jnp.zeros((), blocks.scalar_dtype(like)), None
            values, whole, smallest = subspace_sweep(
                jax.vmap(product), blocks.identity(like), shift=zero, order=tracker.power_order
            )
        used = jnp.asarray(num, jnp.int32)
        return Solution(values, packing.pack(whole, axis=1), smallest, used, residuals)
    key = jax.random.key(tracker.seed)

    def packed_product(packed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return packing.pack(product(packing.unpack(packed)))

    def draw(number: chex.Numeric) -> tuple[jax.Array, ...]:
        return tuple(x[0] for x in packing.random_block(key, like, 1, number))

    # Without a tolerance nothing is judged, so nothing that judges is compiled.
    if tolerance is None and num_products <= 2 * num + 16 and not tracker.residuals:
        values, basis, smallest = ritz_pairs(
            packed_product, draw, num, num_products=num_products, order=tracker.order
        )
        return Solution(values, basis, smallest, jnp.asarray(num_products, jnp.int32), None)
    values, basis, residuals, used, _, smallest = lanczos(
        packed_product,
        jax.eval_shape(packing.pack, like),
        num,
        key=key,
        num_products=num_products,
        order=tracker.order,
        tolerance=tolerance,
        start=draw(0),
    )
    return Solution(values, basis, smallest, used, residuals if tracker.residuals else None)


def _is_real_dtype(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # a word that names no dtype
        return False
