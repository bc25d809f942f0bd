r"""Who averages with whom: communication graphs of workers with parameters of their own.

A :class:`Topology` is a doubly stochastic mixing matrix W (or a cycle of several): after one mixing
worker i holds :math:`\sum_j W_{ij} x_j`.  Rows that sum to 1 keep a consensus, columns that sum to
1 keep the mean over the workers.  Each worker receives only from the few others with
:math:`W_{ij} > 0`; a mixing step takes as many calls of ``lax.ppermute`` as its busiest worker has
partners.

The constructors follow BlueFog's topologies (Ying et al., `BlueFog
<https://arxiv.org/abs/2111.04287>`_, 2021).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._arguments import check_flag, check_integer
from optax_accel._means import vary_over
from optax_accel.workers._permutations import Round, completed, decompose

__all__ = [
    "Topology",
    "complete",
    "consensus_distance",
    "exponential",
    "from_matrix",
    "mesh_2d",
    "one_peer_exponential",
    "ring",
]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Topology:
    """A cycle of doubly stochastic mixing matrices, and how to carry them out.

    Made by the constructors of this module; immutable and hashable, so that it can be a static
    argument.

    Args:
      name: the call of the constructor, e.g. ``"ring(8)"``.
      matrices: float64, ``(period, num_workers, num_workers)``; entry ``[t, i, j]`` is the weight
        that worker i gives to what worker j holds, at steps t, t + period, ...

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> ring = oa.topologies.ring(4)
      >>> ring.max_degree, round(ring.spectral_gap, 4)
      (2, 0.6667)
      >>> mix = jax.vmap(lambda x: ring.mix(x, 0, "workers"), axis_name="workers")
      >>> mix(jnp.array([3.0, 0.0, 0.0, 6.0])).tolist()
      [3.0, 1.0, 2.0, 3.0]
    """

    name: str
    matrices: np.ndarray

    def __post_init__(self) -> None:
        self.matrices.flags.writeable = False

    def __repr__(self) -> str:
        return f"topologies.{self.name}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return self.name == other.name and np.array_equal(self.matrices, other.matrices)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.name, self.matrices.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return self.matrices.shape[1]

    @property
    def period(self) -> int:
        """Number of matrices in the cycle; 1 if all steps are alike."""
        return self.matrices.shape[0]

    def matrix(self, step: int) -> np.ndarray:
        """The mixing matrix of a step (a Python integer), float64, ``(workers, workers)``."""
        return self.matrices[step % self.period]

    @property
    def max_degree(self) -> int:
        """The largest number of other workers that a worker receives from or sends to in a step."""
        others = (self.matrices > 0) & ~np.eye(self.num_workers, dtype=bool)
        return int(max(others.sum(1).max(), others.sum(2).max()))

    @property
    def is_all_reduce(self) -> bool:
        """Whether every step takes the mean over all workers, by one all-reduce."""
        return bool(np.all(self.matrices == 1 / self.num_workers))

    @property
    def sends_per_step(self) -> float:
        """Copies of the parameters that the busiest worker sends at a step, averaged over a period.

        For :func:`complete` it is that of an all-reduce around a ring, ``2 (n - 1) / n``.
        """
        if self.is_all_reduce:
            return 2 * (self.num_workers - 1) / self.num_workers
        return sum(len(self._rounds(t)) for t in range(self.period)) / self.period

    @functools.cached_property
    def spectral_gap(self) -> float:
        """1 - σ, where a step multiplies every deviation from the mean by at most σ.

        σ is the second largest singular value of the matrix; for a cycle of matrices, that of their
        product to the power 1 / period.  A gap of 1 means the exact mean after each period.
        """
        n = self.num_workers
        product = functools.reduce(lambda product, w: w @ product, self.matrices, np.eye(n))
        sigma = np.linalg.norm(product - 1 / n, 2)
        rounding = 4 * n * np.finfo(np.float64).eps
        return 1 - (0.0 if sigma < rounding else min(float(sigma), 1.0) ** (1 / self.period))

    def mix(
        self, tree: chex.ArrayTree, step: jax.Array | int, axis_name: str | None
    ) -> chex.ArrayTree:
        """This worker's weighted mean over itself and the workers that it receives from.

        Works under ``shard_map``, ``pmap`` and ``vmap`` with that axis name.  Sums are computed in
        float32 or wider; values are sent in the dtype of the leaf, and in that of the sums in an
        all-reduce.

        Args:
          tree: this worker's values, floating-point or complex leaves.
          step: which matrix of the cycle, modulo the period; int32 scalar, the same on all workers.
          axis_name: the axis of the workers; ``None`` means a single worker, for which mixing
            changes nothing.

        Returns:
          A tree like ``tree``.

        Raises:
          ValueError: the axis has another number of workers than the topology, or there is none.
        """
        self.check_axis(axis_name)
        if axis_name is None:
            return tree
        tree = vary_over(tree, axis_name)
        if self.is_all_reduce:
            mean = vary_over(lax.pmean(widen(tree), axis_name), axis_name)
            return optax.tree.cast_like(mean, tree)
        branches = [functools.partial(self._mix, t, axis_name) for t in range(self.period)]
        return lax.switch(jnp.asarray(step) % self.period, branches, tree)

    def check_axis(self, axis_name: str | None) -> None:
        """Raises ``ValueError`` if the axis has another number of workers than the topology."""
        try:
            size = 1 if axis_name is None else lax.axis_size(axis_name)
        except NameError as error:
            raise ValueError(
                f"{self!r} mixes over the axis {axis_name!r}, which does not exist here. Run the "
                "step under jax.shard_map, jax.pmap or jax.vmap with an axis of that name."
            ) from error
        if size == self.num_workers:
            return
        if axis_name is None:
            raise ValueError(
                f"{self!r} connects {self.num_workers} workers, but `axis_name` is None, which "
                "means a single one. Run the step under jax.shard_map, jax.pmap or jax.vmap with "
                "a named axis over the workers, and give that name as `axis_name`."
            )
        raise ValueError(
            f"{self!r} connects {self.num_workers} workers, but the axis {axis_name!r} has {size}; "
            f"make the topology for {size} workers."
        )

    def _mix(self, t: int, axis_name: str, tree: chex.ArrayTree) -> chex.ArrayTree:
        rounds = self._rounds(t)
        table = np.stack([np.diagonal(self.matrices[t]), *(r.weights for r in rounds)])
        weights = jnp.asarray(table)[:, lax.axis_index(axis_name)]
        on_devices = axis_name in jax.sharding.get_abstract_mesh().manual_axes

        def leaf(x: jax.Array) -> jax.Array:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            total = weights[0].astype(wide) * x.astype(wide)
            for weight, r in zip(weights[1:], rounds, strict=True):
                # `vmap` permutes all of its rows; devices without a partner send nothing.
                pairs = r.pairs if on_devices else completed(r.pairs, self.num_workers)
                received = lax.ppermute(x, axis_name, pairs)
                total += weight.astype(wide) * received.astype(wide)
            return total.astype(x.dtype)

        return jax.tree.map(leaf, tree)

    @functools.cached_property
    def _decompositions(self) -> dict[int, tuple[Round, ...]]:
        return {}

    def _rounds(self, t: int) -> tuple[Round, ...]:
        if t not in self._decompositions:
            self._decompositions[t] = decompose(self.matrices[t])
        return self._decompositions[t]


def consensus_distance(tree: chex.ArrayTree, axis_name: str | None) -> jax.Array:
    r"""How far the workers are apart: the root mean square over them of ||x_i - mean x||.

    Costs an all-reduce of the tree.

    Args:
      tree: this worker's parameters.
      axis_name: the axis of the workers; ``None`` means a single worker.

    Returns:
      Float32 scalar, the same on all workers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_accel as oa
      >>> distance = lambda x: oa.topologies.consensus_distance(x, "workers")
      >>> jax.vmap(distance, axis_name="workers")(jnp.array([1.0, 3.0])).tolist()
      [1.0, 1.0]
    """
    if axis_name is None:
        return jnp.zeros((), jnp.float32)
    tree = widen(tree)
    return distance_to(lax.pmean(tree, axis_name), tree, axis_name)


def distance_to(mean: chex.ArrayTree, tree: chex.ArrayTree, axis_name: str) -> jax.Array:
    """The consensus distance where the mean is known already: an all-reduce of one number."""
    squares = [
        jnp.sum(jnp.abs(x - m) ** 2)
        for x, m in zip(jax.tree.leaves(tree), jax.tree.leaves(mean), strict=True)
    ]
    total = jnp.asarray(sum(squares, start=jnp.zeros(())), jnp.float32)
    return vary_over(jnp.sqrt(lax.pmean(vary_over(total, axis_name), axis_name)), axis_name)


def widen(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Leaves in float32 or wider, to compute with."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


# -- constructors ---------------------------------------------------------------------------------


def ring(num_workers: int) -> Topology:
    """Each worker averages with its left and its right neighbor, with weights 1/3.

    With two workers all weights are 1/2.

    Args:
      num_workers: number of workers, at least 1.

    Returns:
      The topology.

    Example:
      >>> import optax_accel as oa
      >>> oa.topologies.ring(8).matrix(0)[0].round(2).tolist()
      [0.33, 0.33, 0.0, 0.0, 0.0, 0.0, 0.0, 0.33]
    """
    return _circulant(f"ring({num_workers})", num_workers, [(1, -1)])


def exponential(num_workers: int, *, symmetric: bool = False) -> Topology:
    """Worker i averages with i + 1, i + 2, i + 4, ... (modulo their number), equal weights.

    The static exponential graph: directed, of degree ``ceil(log2(num_workers))``, doubly stochastic
    as it is circulant.

    Args:
      num_workers: number of workers, at least 1.
      symmetric: whether worker i also averages with i - 1, i - 2, ...; default False.  This doubles
        the degree at most and makes the matrix symmetric, as :func:`optax_accel.decentlam` needs it
        with a large momentum.

    Returns:
      The topology.

    Example:
      >>> import optax_accel as oa
      >>> oa.topologies.exponential(8).matrix(0)[0].tolist()
      [0.25, 0.25, 0.25, 0.0, 0.25, 0.0, 0.0, 0.0]
      >>> oa.topologies.exponential(8, symmetric=True).max_degree
      5
    """
    check_flag("symmetric", symmetric)
    offsets = _powers_of_two(num_workers)
    if not symmetric:
        return _circulant(f"exponential({num_workers})", num_workers, [offsets])
    name = f"exponential({num_workers}, symmetric=True)"
    return _circulant(name, num_workers, [(*offsets, *(-offset for offset in offsets))])


def one_peer_exponential(num_workers: int) -> Topology:
    """At step t worker i averages with i + 2 ** (t mod period) alone, weights 1/2.

    The period is ``ceil(log2(num_workers))``, with one send a step.  For a power of two each period
    ends in the exact mean.  For other numbers it does not, because the offsets reach some workers
    twice, but the deviations still shrink in each period (:attr:`Topology.spectral_gap`).

    Args:
      num_workers: number of workers, at least 1.

    Returns:
      The topology.

    Example:
      >>> import optax_accel as oa
      >>> topology = oa.topologies.one_peer_exponential(8)
      >>> topology.period, topology.sends_per_step, topology.spectral_gap
      (3, 1.0, 1.0)
    """
    steps: list[tuple[int, ...]] = [(offset,) for offset in _powers_of_two(num_workers)] or [()]
    return _circulant(f"one_peer_exponential({num_workers})", num_workers, steps)


def mesh_2d(rows: int, columns: int) -> Topology:
    """Neighbors on a rectangle (not wrapped around), with Metropolis weights.

    ``W_ij = 1 / (1 + max(degree_i, degree_j))`` between neighbors; the rest of each row goes to the
    worker itself.  The matrix is doubly stochastic although corners have fewer neighbors (Xiao and
    Boyd, `Fast linear iterations for distributed averaging
    <https://doi.org/10.1016/j.sysconle.2004.02.022>`_, 2004).

    Args:
      rows: number of rows; worker ``r * columns + c`` sits in row r, column c.
      columns: number of columns.

    Returns:
      The topology.

    Example:
      >>> import optax_accel as oa
      >>> oa.topologies.mesh_2d(2, 3).matrix(0)[0].round(2).tolist()
      [0.42, 0.25, 0.0, 0.33, 0.0, 0.0]
    """
    check_integer("rows", rows, 1)
    check_integer("columns", columns, 1)
    index = np.arange(rows * columns).reshape(rows, columns)
    right = zip(index[:, :-1].ravel(), index[:, 1:].ravel(), strict=True)
    below = zip(index[:-1].ravel(), index[1:].ravel(), strict=True)
    linked = np.zeros((index.size, index.size), bool)
    for i, j in (*right, *below):
        linked[i, j] = linked[j, i] = True
    degree = linked.sum(1)
    matrix = np.where(linked, 1 / (1 + np.maximum(degree[:, None], degree[None])), 0.0)
    np.fill_diagonal(matrix, 1 - matrix.sum(1))
    return Topology(f"mesh_2d({rows}, {columns})", matrix[None])


def complete(num_workers: int) -> Topology:
    """All workers average with all others, with weights 1/n: one all-reduce, no ``ppermute``.

    Args:
      num_workers: number of workers, at least 1.

    Returns:
      The topology.

    Example:
      >>> import optax_accel as oa
      >>> oa.topologies.complete(4).spectral_gap
      1.0
    """
    check_integer("num_workers", num_workers, 1)
    shape = (1, num_workers, num_workers)
    return Topology(f"complete({num_workers})", np.full(shape, 1 / num_workers))


def from_matrix(matrix: Any) -> Topology:
    """Any doubly stochastic matrix, or a sequence of them to be used in turn.

    Args:
      matrix: ``(n, n)`` or ``(period, n, n)``, a sequence of such matrices; entry (i, j) is the
        weight that worker i gives to what worker j holds.

    Returns:
      The topology.

    Raises:
      ValueError: a matrix is not square, has a negative entry, or a row or column that does not sum
        to 1 (up to the rounding of its dtype); or the workers never reach a consensus, because
        they fall into groups or pass their values around in a circle.

    Example:
      >>> import numpy as np
      >>> import optax_accel as oa
      >>> topology = oa.topologies.from_matrix(np.array([[0.8, 0.2], [0.2, 0.8]]))
      >>> round(topology.spectral_gap, 4)
      0.4
    """
    array = np.asarray(matrix)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"`matrix` must hold real numbers, got dtype {array.dtype}.")
    if array.ndim not in (2, 3) or array.shape[-1] != array.shape[-2] or not array.size:
        raise ValueError(
            "`matrix` must be square, (n, n), or a sequence of square ones, (period, n, n); got "
            f"shape {array.shape}."
        )
    matrices = array.astype(np.float64).reshape(-1, *array.shape[-2:])
    num_workers = matrices.shape[-1]
    precision = array.dtype if np.issubdtype(array.dtype, np.floating) else np.float64
    tolerance = 4 * num_workers * float(np.finfo(precision).eps)
    for t, w in enumerate(matrices):
        where = f" of matrix {t}" if array.ndim == 3 else ""
        if not np.all(w >= 0):  # NaN too
            i, j = (int(k) for k in np.argwhere(~(w >= 0))[0])
            raise ValueError(
                f"`matrix` must not be negative, but entry ({i}, {j}){where} is {w[i, j]}."
            )
        for axis, kind in ((1, "row"), (0, "column")):
            sums = w.sum(axis)
            wrong = np.flatnonzero(~(np.abs(sums - 1) <= tolerance))
            if wrong.size:
                raise ValueError(
                    f"`matrix` must be doubly stochastic, but {kind} {wrong[0]}{where} sums to "
                    f"{sums[wrong[0]]:.9g}, not 1. For an undirected graph with unequal degrees "
                    "use Metropolis weights: 1 / (1 + max(degree_i, degree_j)) between neighbors, "
                    "the rest on the diagonal."
                )
    _check_consensus(matrices)
    shape = ", ".join(map(str, array.shape))
    return Topology(f"from_matrix(<{shape}>)", matrices)


def _powers_of_two(num_workers: int) -> tuple[int, ...]:
    check_integer("num_workers", num_workers, 1)
    return tuple(2**k for k in range((num_workers - 1).bit_length()))


def _circulant(name: str, num_workers: int, steps: Sequence[Iterable[int]]) -> Topology:
    """Equal weights for the worker itself and those at the offsets of each step."""
    check_integer("num_workers", num_workers, 1)
    workers = np.arange(num_workers)
    matrices = np.zeros((len(steps), num_workers, num_workers))
    for matrix, offsets in zip(matrices, steps, strict=True):
        distinct = {offset % num_workers for offset in (0, *offsets)}
        for offset in distinct:
            matrix[workers, (workers + offset) % num_workers] = 1 / len(distinct)
    return Topology(name, matrices)


def _check_consensus(matrices: np.ndarray) -> None:
    """Raises unless powers of the product of the matrices tend to the mean over all workers."""
    hears = np.eye(len(matrices[0]), dtype=bool)
    for w in matrices:
        hears = (w > 0) @ hears  # a product of booleans: or, and
    # Breadth first from worker 0. In doubly stochastic matrices every path has one back.
    level = {0: 0}
    queue = [0]
    for i in queue:
        for j in map(int, np.flatnonzero(hears[i])):
            if j not in level:
                level[j] = level[i] + 1
                queue.append(j)
    missing = [i for i in range(len(hears)) if i not in level]
    if missing:
        raise ValueError(
            f"`matrix` must connect all workers, but workers 0 and {missing[0]} never exchange "
            f"anything ({len(level)} of {len(hears)} workers are connected with worker 0)."
        )
    # If all closed walks have a common divisor, values circulate for ever without mixing.
    receiver, sender = np.nonzero(hears)
    depth = np.array([level[i] for i in range(len(hears))])
    circle = int(np.gcd.reduce(depth[receiver] + 1 - depth[sender]))
    if circle != 1:
        raise ValueError(
            f"`matrix` never mixes: the workers fall into {circle} groups that only pass their "
            "values around in a circle; give each worker a positive weight for itself, on the "
            "diagonal."
        )
