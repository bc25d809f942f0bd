"""Tracking by the principal directions of gradients, without curvature products."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_accel._arguments import check_choice, check_integer, check_number
from optax_accel._numerics import zeros
from optax_accel.curvature import blocks
from optax_accel.curvature.tracking import (
    BasisTracker,
    Eigenspace,
    load,
    new_space,
    store,
    vector_like,
)
from optax_accel.objective import Objective


class GradientMemory(NamedTuple):
    """What :class:`GradientTracker` keeps besides the basis, with ``rows="gradient"``.

    Attributes:
      rows: centered gradients not yet in the basis, leaves ``(buffer, *leaf.shape)``.
      position: number of those gradients; int32 scalar.
      mean: moving average of the gradients.
      seen: number of gradients seen; int32 scalar.
    """

    rows: chex.ArrayTree
    position: jax.Array
    mean: chex.ArrayTree
    seen: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTracker(BasisTracker):
    r"""The dominant subspace without curvature products: principal directions of gradients.

    The outlying curvature of a classifier is spanned by the class means of the gradients of its
    outputs (Papyan, 2019, 2020).  This tracker keeps a sketch of rows, its k leading principal
    directions and their energies (frequent directions: Liberty, 2013, Ghashami et al., 2016,
    with forgetting instead of shrinking, our reading), compressed through a small Gram matrix.

    ``rows="outputs"`` takes the gradients of the mean outputs on the batch, one row per class: with
    these rows as :math:`J`, :math:`J^\top J` is the Gauss-Newton matrix of the squared error if the
    gradients are the same for all examples. They cost one backward pass per class, no second
    derivative. ``rows="gradient"`` needs no objective at all: it takes the deviations of the
    mini-batch gradients (the extra argument ``grad`` of ``update``, else its incoming updates) from
    their moving average, whose covariance resembles the Hessian; a row has to come from every step
    or nearly, ``refresh_every=1, decay=0.9``.

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
      decay: weight of the old sketch at a refresh; the new rows have weight ``1 - decay``. Default
        0.5.
      buffer: with ``rows="gradient"``, the number of gradients gathered before the sketch is
        compressed; default 10, raised to ``num_directions`` if that is more.
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
        return self.rows == "outputs"

    def init(self, params: chex.ArrayTree, num_directions: int) -> Eigenspace:
        k = min(num_directions, blocks.dimension(params))
        memory = None
        if self.rows == "gradient":
            like = vector_like(self, params)
            num = max(self.buffer, k)
            memory = GradientMemory(
                rows=store(self, jax.tree.map(lambda x: zeros((num, *x.shape), x.dtype), like)),
                position=jnp.zeros((), jnp.int32),
                mean=jax.tree.map(lambda x: zeros(x.shape, x.dtype), like),
                seen=jnp.zeros((), jnp.int32),
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

        dtype = blocks.scalar_dtype(vector_like(self, params))
        return load(self, jax.vmap(gradient)(jnp.eye(shape.shape[-1], dtype=dtype)), params)

    def _collect(
        self, space: Eigenspace, gradient: chex.ArrayTree, params: chex.ArrayTree
    ) -> Eigenspace:
        memory = space.memory
        gradient = load(self, gradient, params)
        # Energies are squares, so a gradient whose square overflows must not reach mean and buffer.
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
            rows = load(self, old.memory.rows, params)
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
        basis = load(self, space.basis, params)
        cross, among = blocks.inner(basis, rows), blocks.inner(rows, rows)
        # The old basis is orthonormal, except for rows that are still zero; those have no energy.
        gram = jnp.block([[jnp.eye(k, dtype=dtype), cross], [cross.T, among]])
        gram = weights[:, None] * gram * weights[None, :]
        energies, vectors = jnp.linalg.eigh(gram)
        energies, vectors = energies[::-1][:k], vectors[:, ::-1][:, :k]
        # Directions lost in rounding become zero instead of amplified noise.
        floor = jnp.sqrt(jnp.finfo(dtype).eps) * jnp.max(jnp.abs(energies), initial=0)
        seen = energies > floor
        energies = jnp.where(seen, energies, 0)
        scale = jnp.where(seen, lax.rsqrt(jnp.where(seen, energies, 1)), 0)
        vectors = (weights[:, None] * vectors * scale[None, :]).T
        # A row that is not finite makes its entry of the Gram matrix not finite.
        valid = jnp.all(jnp.isfinite(gram))

        def rotate() -> chex.ArrayTree:
            from_old = blocks.combine(vectors[:, :k], basis)
            from_new = blocks.combine(vectors[:, k:], rows)
            return store(self, jax.tree.map(jnp.add, from_old, from_new))

        return space._replace(
            basis=lax.cond(valid, rotate, lambda: space.basis),
            eigenvalues=jnp.where(valid, energies, space.eigenvalues),
            ready=space.ready | valid,
            accepted=valid,
            rejected=space.rejected + ~valid,
        )
