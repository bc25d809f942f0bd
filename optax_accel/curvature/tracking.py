"""Tracking the dominant eigenspace of a curvature matrix along training.

A :class:`Tracker` is a value that says how the eigenspace is followed; an :class:`Eigenspace` is
what it knows so far, arrays only.  What a refresh costs and what it sees differs:

* :class:`BlockTracker`: a block of curvature products every few steps; the default.
* :class:`RoundRobinTracker`: one curvature product at every step, no step dearer than the others.
* :class:`GradientTracker`: no curvature product, only first derivatives.
* :class:`ExactTracker`: Lanczos to a tolerance, from scratch: the reference.

``python -m experiments.trackers`` measures them against ARPACK.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import check_choice, check_integer, check_number
from optax_accel.curvature import blocks
from optax_accel.curvature._block_iteration import subspace_sweep
from optax_accel.curvature._lanczos import lanczos
from optax_accel.curvature.eigensolvers import Order
from optax_accel.objective import Objective


class Eigenspace(NamedTuple):
    """An estimate of the leading eigenspace, and how it fares.

    Attributes:
      basis: orthonormal block, leaves ``(k, *leaf.shape)``, leading direction first.
      eigenvalues: ``(k,)``, of the last refresh.
      ready: whether the basis holds an estimate yet; boolean scalar.
      accepted: whether the last refresh was accepted; boolean scalar. A refresh that met numbers
        that are not finite changes neither basis nor eigenvalues.
      rejected: how many refreshes were not; int32 scalar.
      memory: what else the tracker keeps; a NamedTuple of its own.
    """

    basis: chex.ArrayTree
    eigenvalues: jax.Array
    ready: jax.Array
    accepted: jax.Array
    rejected: jax.Array
    memory: Any

    @property
    def usable(self) -> jax.Array:
        """Whether there is an estimate that the last refresh did not cast doubt on."""
        return self.ready & self.accepted


class Tracker(abc.ABC):
    """How a dominant eigenspace is followed: the interface of all trackers.

    A tracker is a frozen dataclass; all that changes is in the :class:`Eigenspace`.

    Attributes:
      refresh_every: steps between refreshes.
    """

    refresh_every: int

    @property
    def needs_objective(self) -> bool:
        """Whether a refresh looks at the objective."""
        return True

    @abc.abstractmethod
    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a random orthonormal basis, not ready."""

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
          objective: whose curvature is followed; None if ``needs_objective`` is False.
          params: the parameters.
          gradient: the mini-batch gradient of the step, like the parameters.
          cold: static; whether to start anew (a tracker without a cold start goes on). ``None``
            (default): decided in the graph, by ``space.ready``.

        Returns:
          The new eigenspace; the old one, not accepted, where numbers were not finite.
        """

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        """Curvature-vector products of one refresh.

        Args:
          params: the parameters (or their shapes).
          num_directions: how many directions are followed.
          cold: of a cold start instead of a warm refresh.

        Returns:
          The number of products; an upper bound where the tracker stops at a tolerance.
        """
        del params, num_directions, cold
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BasisTracker(Tracker):
    """What all trackers share: the dtypes of basis and linear algebra, the random start."""

    accumulator_dtype: Any = None
    storage_dtype: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("refresh_every", self.refresh_every, 1)
        check_integer("seed", self.seed, 0)
        for name in ("accumulator_dtype", "storage_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"`{name}` must be a real floating-point dtype, got {dtype!r}.")

    def _like(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """Shapes of the parameters in the dtypes of the linear algebra."""

        def like(leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = self.accumulator_dtype or jnp.promote_types(leaf.dtype, jnp.float32)
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

        return jax.tree.map(like, params)

    def _load(self, block: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda b, x: b.astype(x.dtype), block, self._like(params))

    def _store(self, block: chex.ArrayTree) -> chex.ArrayTree:
        return block if self.storage_dtype is None else optax.tree.cast(block, self.storage_dtype)

    def _random_basis(self, params: chex.ArrayTree, num: int) -> chex.ArrayTree:
        like = self._like(params)
        if not num:
            return jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), like)
        return blocks.random_basis(jax.random.key(self.seed), like, num)

    def _new_space(
        self, params: chex.ArrayTree, basis: chex.ArrayTree, k: int, memory: Any
    ) -> Eigenspace:
        return Eigenspace(
            basis=self._store(blocks.rows(basis, 0, k)),
            eigenvalues=jnp.zeros((k,), blocks.scalar_dtype(self._like(params))),
            ready=jnp.zeros((), bool),
            accepted=jnp.ones((), bool),
            rejected=jnp.zeros((), jnp.int32),
            memory=memory,
        )

    def _accept(
        self,
        old: Eigenspace,
        values: jax.Array,
        basis: chex.ArrayTree,
        memory: Any,
        valid: jax.Array,
    ) -> Eigenspace:
        """The new estimate if it is finite, else the old one."""
        # The squared norms of the rows tell a basis from NaNs at the cost of a pass.
        norms = jax.tree.map(lambda b: jnp.sum(jnp.square(b), tuple(range(1, b.ndim))), basis)
        valid &= jnp.all(jnp.isfinite(sum(jax.tree.leaves(norms)))) & jnp.all(jnp.isfinite(values))
        new = old._replace(
            basis=self._store(basis), eigenvalues=values, ready=jnp.ones((), bool), memory=memory
        )
        return jax.tree.map(lambda n, o: jnp.where(valid, n, o), new, old)._replace(
            accepted=valid, rejected=old.rejected + ~valid
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CurvatureTracker(_BasisTracker):
    """What the trackers by curvature products share: the matrix, the Lanczos cold start."""

    cold_start_products: int | None = None
    order: Order = "algebraic"
    curvature: Literal["hessian", "gauss_newton"] = "hessian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cold_start_products is not None:
            check_integer("cold_start_products", self.cold_start_products, 1)
        check_choice("order", self.order, ("algebraic", "magnitude"))
        check_choice("curvature", self.curvature, ("hessian", "gauss_newton"))

    def _operator(self, objective: Objective | None, params: chex.ArrayTree) -> Any:
        assert objective is not None
        if self.curvature == "hessian":
            return objective.hessian(params)
        return objective.gauss_newton(params)

    def _shift(self, smallest: jax.Array) -> jax.Array:
        return jnp.maximum(-smallest, 0) * (self.order == "algebraic")

    def _cold_products(self, params: chex.ArrayTree, tracked: int) -> int:
        size = blocks.dimension(params)
        if tracked == size or not tracked:
            return tracked
        return min(max(self.cold_start_products or max(3 * tracked, 20), tracked), size)

    def _solve(
        self, objective: Objective | None, params: chex.ArrayTree, num: int, **options: Any
    ) -> tuple[jax.Array, chex.ArrayTree, jax.Array, jax.Array]:
        """Leading Ritz values and vectors, the smallest value, and the number of products."""
        product = self._operator(objective, params)
        like = self._like(params)
        if num == blocks.dimension(params):  # the whole space: exact
            zero = jnp.zeros((), blocks.scalar_dtype(like))
            found = subspace_sweep(
                jax.vmap(product), blocks.identity(like), shift=zero, order=self.order
            )
            return *found, jnp.asarray(num, jnp.int32)
        key = jax.random.key(self.seed)
        pairs = lanczos(product, like, num, key=key, order=self.order, **options)
        return pairs.eigenvalues, pairs.basis, pairs.smallest, pairs.num_products


class BlockMemory(NamedTuple):
    """What :class:`BlockTracker` keeps besides the basis.

    Attributes:
      guard: the oversampled directions, leaves ``(oversampling, *leaf.shape)``; None without any.
      shift: scalar added to the spectrum so that its algebraic top leads.
    """

    guard: chex.ArrayTree
    shift: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTracker(_CurvatureTracker):
    """Warm-started block power iteration with a Lanczos cold start.

    The dominant Hessian subspace of a network moves slowly, so one block product every few steps,
    started from the last basis, follows it; only the first estimate needs a full eigensolver.

    Within its budget the cold start may miss copies of a multiple eigenvalue, of which a Krylov
    space has one each.  Sweeps find them, from rounding errors if need be: of a fourfold eigenvalue
    among 300, in float32 and with three directions, the third copy was missing at first and
    accurate to 1e-4 after 20 sweeps.  :class:`ExactTracker` counts copies at every solve.

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
      curvature: ``"hessian"`` (default) or ``"gauss_newton"`` (needs ``Objective(predict, loss)``).
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis is kept between steps, e.g. ``jnp.bfloat16``; ``None``
        (default): as ``accumulator_dtype``.
      seed: of the random start.

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
        """Curvature-vector products of one refresh, see :meth:`Tracker.num_products`."""
        _, tracked = self._sizes(params, num_directions)
        return self._cold_products(params, tracked) if cold else tracked * self.power_iterations

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a random orthonormal basis, not ready."""
        k, tracked = self._sizes(params, num_directions)
        basis = self._random_basis(params, tracked)
        memory = self._memory(basis, k, jnp.zeros(()))
        if self.oversampling and num_directions and not jax.tree.leaves(params):
            memory = memory._replace(guard=basis)  # a placeholder for what states usually have
        return self._new_space(params, basis, k, memory)

    def _memory(self, basis: chex.ArrayTree, k: int, shift: jax.Array) -> BlockMemory:
        tracked = jax.tree.leaves(basis)[0].shape[0] if jax.tree.leaves(basis) else 0
        # Not a block of no rows: Orbax cannot save arrays of size zero.
        guard = self._store(blocks.rows(basis, k, tracked)) if tracked > k else None
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
        """One refresh: ``power_iterations`` sweeps, or Lanczos. See :meth:`Tracker.refresh`."""

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
        values, basis, smallest, _ = self._solve(
            objective, params, tracked, num_products=self._cold_products(params, tracked)
        )
        return self._finish(space, values, basis, self._shift(smallest))

    def _sweep(
        self, space: Eigenspace, objective: Objective | None, params: chex.ArrayTree
    ) -> Eigenspace:
        products = jax.vmap(self._operator(objective, params))
        basis = space.basis
        if space.memory.guard is not None:
            basis = blocks.concatenate(basis, space.memory.guard)
        basis = self._load(basis, params)
        if self.storage_dtype is not None:  # what rounding has taken from it
            basis = blocks.orthonormalize(basis)
        shift, values = space.memory.shift, space.eigenvalues
        for _ in range(self.power_iterations):
            values, basis, smallest = subspace_sweep(products, basis, shift=shift, order=self.order)
            # Negative curvature seen before is forgotten slowly: the sweep damps what it shifts
            # away, so a direction gone from the block may still be there in the spectrum.
            shift = jnp.maximum(0.9 * shift, self._shift(smallest))
        return self._finish(space, values, basis, shift)

    def _finish(
        self, old: Eigenspace, values: jax.Array, basis: chex.ArrayTree, shift: jax.Array
    ) -> Eigenspace:
        k = old.eigenvalues.shape[0]
        memory = self._memory(basis, k, shift)
        basis = blocks.rows(basis, 0, k)
        return self._accept(old, values[:k], basis, memory, jnp.isfinite(shift))


class RoundRobinMemory(NamedTuple):
    """What :class:`RoundRobinTracker` keeps besides the basis.

    Attributes:
      images: products with the rows of the basis, as far as they are made, like the basis.
      position: number of them; int32 scalar.
      shift: as in :class:`BlockMemory`.
    """

    images: chex.ArrayTree
    position: jax.Array
    shift: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobinTracker(_CurvatureTracker):
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
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis and its products are kept between steps, e.g.
        ``jnp.bfloat16``; ``None`` (default): the dtype of the linear algebra.
      seed: integer from which the random start is drawn; default 0.

    Raises:
      ValueError, TypeError: an argument outside its range.
    """

    refresh_every: int = 1

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        """Curvature-vector products of one refresh, see :meth:`Tracker.num_products`."""
        k = min(num_directions, blocks.dimension(params))
        return min(k, 1) + (self._cold_products(params, k) if cold else 0)

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a random orthonormal basis, not ready."""
        k = min(num_directions, blocks.dimension(params))
        basis = self._random_basis(params, k)
        memory = RoundRobinMemory(
            images=self._store(jax.tree.map(jnp.zeros_like, basis)),
            position=jnp.zeros((), jnp.int32),
            shift=jnp.zeros((), blocks.scalar_dtype(basis)),
        )
        return self._new_space(params, basis, k, memory)

    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        """One product, after Lanczos at a cold start. See :meth:`Tracker.refresh`."""

        def start(old: Eigenspace) -> Eigenspace:
            k = old.eigenvalues.shape[0]
            values, basis, smallest, _ = self._solve(
                objective, params, k, num_products=self._cold_products(params, k)
            )
            shift = self._shift(smallest)
            memory = old.memory._replace(position=jnp.zeros((), jnp.int32), shift=shift)
            return self._accept(old, values, basis, memory, jnp.isfinite(shift))

        if cold:
            space = start(space)
        elif cold is None:
            space = lax.cond(space.ready, lambda old: old, start, space)
        return self._advance(space, objective, params)

    def _advance(
        self, space: Eigenspace, objective: Objective | None, params: chex.ArrayTree
    ) -> Eigenspace:
        k = space.eigenvalues.shape[0]
        images, position, shift = space.memory
        row = jax.tree.map(
            lambda b: lax.dynamic_index_in_dim(b, position, keepdims=False), space.basis
        )
        image = self._operator(objective, params)(self._load(row, params))
        valid = jnp.all(jnp.isfinite(blocks.inner(*[blocks.as_block(image)] * 2)))

        def put(block: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.where(valid, new, 0).astype(block.dtype)
            return lax.dynamic_update_index_in_dim(block, new, position, 0)

        made = position + valid
        space = space._replace(
            accepted=valid,
            rejected=space.rejected + ~valid,
            memory=RoundRobinMemory(jax.tree.map(put, images, image), made, shift),
        )

        def sweep(old: Eigenspace) -> Eigenspace:
            basis, images = self._load((old.basis, old.memory.images), (params, params))
            values, basis, smallest = subspace_sweep(
                lambda _: images, basis, shift=shift, order=self.order
            )
            memory = RoundRobinMemory(
                images=old.memory.images,
                position=jnp.zeros((), jnp.int32),
                shift=jnp.maximum(0.9 * shift, self._shift(smallest)),
            )
            return self._accept(old, values, basis, memory, jnp.ones((), bool))

        return lax.cond(made == k, sweep, lambda old: old, space)


class GradientMemory(NamedTuple):
    """What :class:`GradientTracker` keeps besides the basis, with ``rows="gradient"``.

    Attributes:
      rows: centered gradients not yet in the basis, leaves ``(buffer, *leaf.shape)``.
      position: number of them; int32 scalar.
      mean: moving average of the gradients.
      seen: number of gradients seen; int32 scalar.
    """

    rows: chex.ArrayTree
    position: jax.Array
    mean: chex.ArrayTree
    seen: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTracker(_BasisTracker):
    r"""The dominant subspace without curvature products: principal directions of gradients.

    The outlying curvature of a classifier is spanned by the class means of the gradients of its
    outputs (Papyan, 2019, 2020).  This tracker keeps a sketch of rows, its k leading principal
    directions and their energies (frequent directions: Liberty, 2013, Ghashami et al., 2016,
    with forgetting instead of shrinking, our reading), compressed through a small Gram matrix.

    ``rows="outputs"`` takes the gradients of the mean outputs on the batch, one row per class: with
    them as :math:`J`, :math:`J^\top J` is the Gauss-Newton matrix of the squared error for
    gradients alike in all examples.  They cost one backward pass per class, no second derivative.
    ``rows="gradient"`` needs no objective at all: it takes the deviations of the mini-batch
    gradients (the extra argument ``grad`` of ``update``, else its incoming updates) from their
    moving average, whose covariance resembles the Hessian; a row has to come from every step or
    nearly, ``refresh_every=1, decay=0.9``.

    On the problem of :class:`BlockTracker`'s ``refresh_every``, on mini-batches of 50, the outputs'
    rows gave chi_k within 0.02 and a mean squared cosine of 0.99 (``refresh_every=10, decay=0.8``:
    0.01 and 0.995), centered gradients within 0.11 and 0.71.  Gradients that are not
    centered, as they are or normalized, contain the mean, which need not be dominant (chi_k wrong
    by up to 0.8), and so do the class means of the loss gradient (squared cosine 0.6).

    Args:
      rows: ``"outputs"`` (default; needs ``Objective(predict, loss)`` with outputs of shape
        ``(..., classes)`` and at least ``num_directions`` classes) or ``"gradient"``.
      refresh_every: steps between refreshes; default 50, at which a refresh, about ten steps of SGD
        on the problem above, hardly shows in the time.
      decay: weight of the old sketch at a refresh, the new rows have ``1 - decay``; default 0.5.
      buffer: rows ``"gradient"``: gradients gathered before the sketch is compressed, default 10
        (at least k are).
      accumulator_dtype: dtype of the linear algebra; ``None`` (default): each leaf's own, but at
        least float32.
      storage_dtype: dtype in which the basis is kept between steps, e.g. ``jnp.bfloat16``; ``None``
        (default): the dtype of the linear algebra.
      seed: integer from which the random start is drawn; default 0.

    Raises:
      ValueError, TypeError: an argument outside its range.

    References:
      Papyan, `Measurements of three-level hierarchical structure in the outliers in the spectrum of
      deepnet Hessians <https://arxiv.org/abs/1901.08244>`_, 2019; `Traces of class/cross-class
      structure pervade deep learning spectra <https://arxiv.org/abs/2008.11865>`_, 2020. Liberty,
      `Simple and deterministic matrix sketching <https://arxiv.org/abs/1206.0594>`_, 2013.
      Ghashami, Liberty, Phillips, Woodruff, `Frequent directions
      <https://arxiv.org/abs/1501.01711>`_, 2016.
    """

    rows: Literal["outputs", "gradient"] = "outputs"
    refresh_every: int = 50
    decay: float = 0.5
    buffer: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ("outputs", "gradient"))
        check_number("decay", self.decay, 0, 1, open_high=True)
        check_integer("buffer", self.buffer, 1)

    @property
    def needs_objective(self) -> bool:
        """Whether a refresh looks at the objective."""
        return self.rows == "outputs"

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a random orthonormal basis, not ready."""
        k = min(num_directions, blocks.dimension(params))
        memory = None
        if self.rows == "gradient":
            like = self._like(params)
            num = max(self.buffer, k)
            memory = GradientMemory(
                rows=self._store(jax.tree.map(lambda x: jnp.zeros((num, *x.shape), x.dtype), like)),
                position=jnp.zeros((), jnp.int32),
                mean=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
                seen=jnp.zeros((), jnp.int32),
            )
        return self._new_space(params, self._random_basis(params, k), k, memory)

    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        """Takes new rows into the sketch. See :meth:`Tracker.refresh`; there is no cold start."""
        if self.rows == "outputs":
            assert objective is not None
            rows = self._output_gradients(objective, params, space.eigenvalues.shape[0])
            return self._compress(space, rows, params, self.decay)
        return self._collect(space, gradient, params)

    def _output_gradients(
        self, objective: Objective, params: chex.ArrayTree, k: int
    ) -> chex.ArrayTree:
        shape = jax.eval_shape(objective.outputs, params)
        if (
            not hasattr(shape, "shape")
            or not shape.shape
            or shape.shape[-1] < min(k, blocks.dimension(params))
        ):
            raise ValueError(
                'GradientTracker(rows="outputs") follows at most one direction per class: '
                f"num_directions={k} needs outputs of shape (..., {k}) or more, got {shape}; lower "
                'num_directions, or use rows="gradient" or another tracker.'
            )

        def mean_output(weights: jax.Array, outputs: jax.Array) -> jax.Array:
            outputs = outputs.astype(weights.dtype).reshape(-1, weights.shape[0])
            return jnp.mean(outputs @ weights)

        def gradient(weights: jax.Array) -> chex.ArrayTree:
            return Objective(
                objective.outputs, lambda out: mean_output(weights, out), objective.axis_name
            ).grad(params)

        dtype = blocks.scalar_dtype(self._like(params))
        return self._load(jax.vmap(gradient)(jnp.eye(shape.shape[-1], dtype=dtype)), params)

    def _collect(
        self, space: Eigenspace, gradient: chex.ArrayTree, params: chex.ArrayTree
    ) -> Eigenspace:
        memory = space.memory
        gradient = self._load(gradient, params)
        valid = jnp.all(jnp.isfinite(blocks.inner(*[blocks.as_block(gradient)] * 2)))
        # The first deviation is zero, because the average starts at the first gradient.
        rate = jnp.where(memory.seen > 0, 1 - self.decay, 1)

        def deviation(g: jax.Array, mean: jax.Array) -> jax.Array:
            return jnp.where(valid, g - mean, 0) * (memory.seen > 0)

        new = jax.tree.map(deviation, gradient, memory.mean)

        def put(block: jax.Array, row: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(block, row.astype(block.dtype), position, 0)

        def follow(g: jax.Array, mean: jax.Array) -> jax.Array:
            return mean + rate.astype(mean.dtype) * jnp.where(valid, g - mean, 0)

        position = memory.position
        filled = position + (valid & (memory.seen > 0))
        space = space._replace(
            accepted=valid,
            rejected=space.rejected + ~valid,
            memory=GradientMemory(
                rows=jax.tree.map(put, memory.rows, new),
                position=filled,
                mean=jax.tree.map(follow, gradient, memory.mean),
                seen=memory.seen + valid,
            ),
        )
        num = jax.tree.leaves(memory.rows)[0].shape[0]

        def compress(old: Eigenspace) -> Eigenspace:
            rows = self._load(old.memory.rows, params)
            new = self._compress(old, rows, params, self.decay)
            return new._replace(memory=old.memory._replace(position=jnp.zeros((), jnp.int32)))

        return lax.cond(filled == num, compress, lambda old: old, space)

    def _compress(
        self, space: Eigenspace, rows: chex.ArrayTree, params: chex.ArrayTree, decay: float
    ) -> Eigenspace:
        """The leading principal directions of the old sketch and the new rows."""
        k = space.eigenvalues.shape[0]
        num = jax.tree.leaves(rows)[0].shape[0]
        dtype = space.eigenvalues.dtype
        old = jnp.where(space.ready, decay, 0)
        weights = jnp.concatenate([old * space.eigenvalues, jnp.full((num,), 1, dtype) * (1 - old)])
        weights = jnp.sqrt(weights.astype(dtype))
        basis = self._load(space.basis, params)
        cross, own = blocks.inner(basis, rows), blocks.inner(rows, rows)
        # The old basis is orthonormal, but for rows that are zero still; those have no energy.
        gram = jnp.block([[jnp.eye(k, dtype=dtype), cross], [cross.T, own]])
        gram = weights[:, None] * gram * weights[None, :]
        energies, vectors = jnp.linalg.eigh(gram)
        energies, vectors = energies[::-1][:k], vectors[:, ::-1][:, :k]
        # What is lost in rounding becomes zero, no noise blown up.
        floor = jnp.sqrt(jnp.finfo(dtype).eps) * jnp.max(jnp.abs(energies), initial=0)
        seen = energies > floor
        energies = jnp.where(seen, energies, 0)
        scale = jnp.where(seen, lax.rsqrt(jnp.where(seen, energies, 1)), 0)
        vectors = (weights[:, None] * vectors * scale[None, :]).T
        # A not finite row makes its own entry of the Gram matrix not finite.
        valid = jnp.all(jnp.isfinite(gram))

        def rotate() -> chex.ArrayTree:
            from_old = blocks.combine(vectors[:, :k], basis)
            from_new = blocks.combine(vectors[:, k:], rows)
            return self._store(jax.tree.map(jnp.add, from_old, from_new))

        return space._replace(
            basis=lax.cond(valid, rotate, lambda: space.basis),
            eigenvalues=jnp.where(valid, energies, space.eigenvalues),
            ready=space.ready | valid,
            accepted=valid,
            rejected=space.rejected + ~valid,
        )


class ExactMemory(NamedTuple):
    """What :class:`ExactTracker` says of the last solve.

    Attributes:
      num_products: curvature-vector products it took; int32 scalar.
    """

    num_products: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactTracker(_CurvatureTracker):
    """Lanczos to a tolerance, from a random start at every refresh: the reference.

    Args:
      refresh_every: steps between refreshes; default 1, the protocol of Song et al., 2024.
      tolerance: relative error of the eigenvalues; default 1e-4.
      cold_start_products: budget of products of a solve; ``None`` (default): 20 per direction.
      order: ``"algebraic"`` (default) follows the largest eigenvalues, ``"magnitude"`` the largest
        in magnitude.
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

    refresh_every: int = 1
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tolerance", self.tolerance, 0, 1, open_low=True)

    def num_products(self, params: chex.ArrayTree, num_directions: int, *, cold: bool) -> int:
        """The budget of products of one refresh, see :meth:`Tracker.num_products`."""
        size = blocks.dimension(params)
        k = min(num_directions, size)
        return k if k == size else max(self.cold_start_products or 20 * k, k)

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        """An eigenspace without an estimate: a random orthonormal basis, not ready."""
        k = min(num_directions, blocks.dimension(params))
        memory = ExactMemory(jnp.zeros((), jnp.int32))
        return self._new_space(params, self._random_basis(params, k), k, memory)

    def refresh(
        self,
        space: Eigenspace,
        objective: Objective | None,
        params: chex.ArrayTree,
        gradient: chex.ArrayTree,
        *,
        cold: bool | None = None,
    ) -> Eigenspace:
        """A solve from scratch. See :meth:`Tracker.refresh`."""
        k = space.eigenvalues.shape[0]
        values, basis, _, used = self._solve(
            objective,
            params,
            k,
            num_products=self.num_products(params, k, cold=True),
            tolerance=self.tolerance,
        )
        return self._accept(space, values, basis, ExactMemory(used), jnp.ones((), bool))
