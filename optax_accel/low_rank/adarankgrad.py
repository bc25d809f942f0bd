r"""AdaRankGrad: Adam in a subspace whose rank follows the gradient and that the moments follow.

At a refresh, with the singular values :math:`\sigma_i` and left singular vectors :math:`u_i` of the
gradient :math:`G`, a new subspace :math:`Q = (u_1 \dots u_r)` has the smallest rank that leaves
little of the gradient out,

.. math::
  r = \min \{ r' : \| G - P_{r'} G \|_F < \xi\, \| G \|_F \},

and the moments of Adam are carried over with :math:`B = Q^\top Q_{\text{old}}`:
:math:`M \leftarrow B M`, :math:`V \leftarrow (B \circ B) V`.  Between refreshes Adam makes
:math:`N` of :math:`\hat G = Q^\top G`, and :math:`W \leftarrow W - \eta\, \alpha\, Q N`.  A
subspace is left after ``refresh_every`` steps, or once :math:`\|\hat G\|` has fallen to a fraction
of what it was at its start.

Refael et al., `AdaRankGrad: adaptive gradient-rank and moments for memory-efficient LLMs training
and fine-tuning <https://arxiv.org/abs/2410.17881>`_, ICLR 2025.  There is no code of the authors;
the blocks are those of the paper and of its successor by the same authors (Refael et al., `SUMO
<https://arxiv.org/abs/2505.24749>`_, 2025, algorithm 1).  Our reading in two places: the second
moment takes the squares of ``B``, as ``B V`` would have negative entries, and the gradient's norm
that ends a subspace is relative to the one at its start, because the paper's threshold is not
public.  Ours as well: all shapes are static, so that ``max_rank`` directions are allocated and
those beyond the rank are zero (:func:`low_rank_bytes` tells both sizes); the factor ``scale`` is
GaLore's.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_accel._adam import scale_by_adam, zeros_for_squares
from optax_accel._arguments import (
    as_arrays,
    check_choice,
    check_count,
    check_floating_leaves,
    check_learning_rate,
    check_number,
    is_placeholder,
    known_integer,
    static_integer,
    with_checked_init,
)
from optax_accel._masking import Mask
from optax_accel._mesh_axes import check_undivided
from optax_accel._random import as_key
from optax_accel.low_rank._subspaces import (
    METHODS,
    PROJECTIONS,
    DimensionNumbers,
    Layout,
    Method,
    Projection,
    decay_after_step,
    empty_basis,
    flatten,
    known_rank,
    layouts,
    lead_back,
    random_columns,
    range_finder,
    reduce,
    reduced_by,
    start_columns,
    svd,
    widened,
)
from optax_accel.refresh import EigenspaceRefresh, RefreshLike, announce_eigenspace, of_eigenspace

RefreshRule: TypeAlias = Literal["period", "convergence", "either"]
_RULES = ("period", "convergence", "either")
# Added to the gradient's norm in the relative residual, as in the third-party code of the rank.
_RESIDUAL_EPS = 1e-8


class ScaleByAdaRankGradState(NamedTuple):
    """State of :func:`scale_by_adarankgrad`.

    Attributes:
      count: number of updates made; int32 scalar.
      low_rank_basis: orthonormal bases, as in :class:`ScaleByGaLoreState`; columns beyond the rank
        are zero.
      mu: first moments of the reduced gradients, and of those that are not projected.
      nu: their second moments; real, in at least float32.
      subspace_rank: the rank of each matrix, int32; ``optax.MaskedNode`` for what is not projected.
      start_norm: the norm of the reduced gradient when the subspace was new, likewise.
      allocated_rank: ``max_rank``; int32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    low_rank_basis: chex.ArrayTree
    mu: chex.ArrayTree
    nu: chex.ArrayTree
    subspace_rank: chex.ArrayTree
    start_norm: chex.ArrayTree
    allocated_rank: jax.Array


class _Subspace(NamedTuple):
    """What a refresh replaces, for one parameter."""

    basis: jax.Array
    mu: jax.Array
    nu: jax.Array
    rank: jax.Array
    start_norm: jax.Array


def scale_by_adarankgrad(
    max_rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_rank: int = 1,
    rank_step: int = 1,
    residual: float = 0.2,
    refresh: RefreshRule = "either",
    refresh_every: int = 200,
    convergence: float = 0.1,
    scale: float = 0.25,
    projection: Projection = "short",
    method: Method = "range_finder",
    dimension_numbers: DimensionNumbers = None,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam in subspaces whose rank follows the gradient.

    Args:
      max_rank: the largest rank of a subspace, at least 1; it decides the memory. Matrices whose
        smaller side is below it are not projected.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the bias-corrected second moment, at least 0.
      min_rank: the smallest rank of a subspace, from 1 to ``max_rank``.
      rank_step: ranks are ``min_rank``, ``min_rank + rank_step``, ...; at least 1.
      residual: xi, the share of the gradient's norm that a subspace may leave out, in (0, 1); 0.2
        as in the third-party code of the rank.
      refresh: when a subspace is replaced: ``"period"`` every ``refresh_every`` steps,
        ``"convergence"`` when the gradient in it has become small, ``"either"`` (default) both.
      refresh_every: the period in steps, at least 1; 200 as in GaLore.
      convergence: sigma; a subspace has converged when the norm of the gradient in it is at most
        this fraction of what it was at its start; in [0, 1). The default, 0.1, is ours.
      scale: alpha, the factor of the projected updates, at least 0; GaLore's 0.25.
      projection: ``"short"`` (default) projects the smaller side of a matrix, the columns of a
        square one; ``"long"`` the other side.
      method: ``"range_finder"`` (default, the paper's), a randomized one with twice ``max_rank``
        columns that starts from the old basis, or ``"svd"``. The former sees residuals above about
        3e-4 in float32.
      dimension_numbers: which axes form the matrices: one ``optax.contrib.GaLoreDimensionNumbers``,
        a tree of these and ``None`` (do not project), or a function from the parameters to one;
        ``None`` (default) takes the last axis as one side and all others as the other.
      key: PRNG key or integer seed of the range finder.

    Returns:
      A transformation with state :class:`ScaleByAdaRankGradState`. With the extra argument
      ``refresh`` the loop decides instead: ``True`` replaces all subspaces, ``"cold"`` without use
      of the old ones, and for the rule ``"period"`` ``False`` keeps all. With the other rules
      ``False`` means ``None``, because no loop knows from the step when a gradient has become
      small; :func:`~optax_accel.refresh_at` drives the rule ``"period"`` only.

    Raises:
      ValueError: an argument outside its range; in ``init``: a rank above the smaller side of every
        matrix, or of one that ``dimension_numbers`` names, or axes that a parameter lacks.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> tx = oa.scale_by_adarankgrad(4, residual=0.2)
      >>> gradient = jnp.zeros((5, 4)).at[jnp.arange(4), jnp.arange(4)].set(
      ...     jnp.array([3.0, 2.0, 1.0, 0.5]))
      >>> _, state = tx.update(gradient, tx.init(gradient), gradient)
      >>> int(state.subspace_rank)  # 0.5 / |gradient| = 0.13 < 0.2
      3

    References:
      Refael et al., `AdaRankGrad <https://arxiv.org/abs/2410.17881>`_, 2025.
    """
    for name, value in (("b1", b1), ("b2", b2), ("convergence", convergence)):
        check_number(name, value, 0, 1, open_high=True)
    for name, value in (("eps", eps), ("scale", scale)):
        check_number(name, value, 0)
    for name, count in (("max_rank", max_rank), ("min_rank", min_rank), ("rank_step", rank_step)):
        check_count(name, count, 1)
    check_count("refresh_every", refresh_every, 1)
    check_number("residual", residual, 0, 1, open_low=True, open_high=True)
    check_choice("refresh", refresh, _RULES)
    check_choice("projection", projection, PROJECTIONS)
    check_choice("method", method, METHODS)
    key, rule = as_key(key), refresh
    adam = scale_by_adam("scale_by_adarankgrad", b1, b2, eps)
    lowest, highest = known_integer(min_rank), known_integer(max_rank)
    if lowest is not None and highest is not None and lowest > highest:
        raise ValueError(f"`min_rank` must be at most `max_rank`, {highest}, got {lowest}.")

    def layouts_of(tree: chex.ArrayTree, size: int) -> list[Layout | None]:
        return layouts(tree, dimension_numbers, projection, size, "scale_by_adarankgrad")

    def init_fn(params: chex.ArrayTree) -> ScaleByAdaRankGradState:
        count = jnp.zeros((), jnp.int32)
        if rule == "period":  # else the step alone does not tell when a refresh is due
            every = static_integer("refresh_every", refresh_every, 1)
            announce_eigenspace(every, 0, starts_anew=False)
        if is_placeholder(params):
            # What is reduced has other shapes than the parameters: nothing counts as like them.
            return ScaleByAdaRankGradState(count, *(jnp.zeros(()) for _ in range(6)))
        check_floating_leaves(params, "scale_by_adarankgrad")
        check_undivided(params, "scale_by_adarankgrad")
        params = as_arrays(params)
        size = known_rank("max_rank", max_rank)
        leaves, structure = flatten(params)
        found = layouts_of(params, size)
        mu = [
            jnp.zeros(leaf.shape if layout is None else layout.reduced_shape(size), leaf.dtype)
            for leaf, layout in zip(leaves, found, strict=True)
        ]

        def per_matrix(dtype: Any) -> chex.ArrayTree:
            return structure.unflatten(
                [
                    optax.MaskedNode() if layout is None else jnp.zeros(layout.stack_shape, dtype)
                    for layout in found
                ]
            )

        return ScaleByAdaRankGradState(
            count,
            structure.unflatten(
                [empty_basis(la, size, leaf.dtype) for la, leaf in zip(found, leaves, strict=True)]
            ),
            structure.unflatten(mu),
            zeros_for_squares(structure.unflatten(mu)),
            per_matrix(jnp.int32),
            per_matrix(jnp.result_type(float)),
            jnp.array(size, jnp.int32),
        )

    def replaced(
        gradient: jax.Array, old: _Subspace, step_key: jax.Array, cold: Any
    ) -> tuple[_Subspace, jax.Array]:
        """The subspaces of matrices, with the moments carried over, and what is reduced by them."""
        matrix, basis = widened(gradient), widened(old.basis)
        size = basis.shape[-1]
        square = jnp.sum(jnp.abs(matrix) ** 2, axis=(-2, -1))
        if method == "svd":
            new, squares = svd(matrix, size)
            unseen = jnp.zeros_like(square)
        else:
            columns = min(2 * size, *matrix.shape[-2:])
            random = random_columns(step_key, [(matrix.shape[-2], columns)])
            start = start_columns(random, basis, columns, cold)
            new, squares = range_finder(matrix, size, start)
            unseen = jnp.maximum(square - jnp.sum(squares, -1), 0)
        rank = _rank(squares, unseen, square, min_rank, size, rank_step, residual)
        column = lax.broadcasted_iota(jnp.int32, new.shape, new.ndim - 1)
        new = jnp.where(column < rank[..., None, None], new, 0)
        change = jnp.conj(new.mT) @ basis
        new = new.astype(old.basis.dtype)
        reduced = reduced_by(new, gradient)
        subspace = _Subspace(
            new,
            change.astype(old.mu.dtype) @ old.mu,
            (jnp.abs(change) ** 2).astype(old.nu.dtype) @ old.nu,
            rank,
            _norms(reduced).astype(old.start_norm.dtype),
        )
        return subspace, reduced

    def subspace_at(
        layout: Layout,
        gradient: jax.Array,
        old: _Subspace,
        kept: jax.Array,
        count: jax.Array,
        mode: EigenspaceRefresh,
    ) -> tuple[_Subspace, jax.Array]:
        """The subspace of this step: the old one, or a new one for the matrices that are due.

        Args:
          layout: of the parameter.
          gradient: the parameter's gradient.
          old: its subspace.
          kept: the gradient reduced by it.
          count: number of updates made before.
          mode: what the loop says about a refresh, but for False.

        Returns:
          The subspace and the gradient that is reduced by it.
        """
        due = jnp.ones(layout.stack_shape, bool)
        if mode is None:
            due &= (count == 0) if rule == "convergence" else (count % refresh_every == 0)
            due |= old.start_norm == 0  # no subspace yet: gradients were zero or not finite
            if rule != "period":
                due |= _norms(layout.reduced_matrix(kept)) <= convergence * old.start_norm

        def renewed() -> tuple[_Subspace, jax.Array]:
            before = _as_matrices(layout, old, kept)
            cold = (count == 0) | (mode == "cold")
            step_key = jax.random.fold_in(key, count)
            new = replaced(layout.matrix(gradient), before[0], step_key, cold)
            chosen = due & jnp.isfinite(new[0].start_norm)
            matrices = chosen[..., None, None]
            selected = _Subspace(matrices, matrices, matrices, chosen, chosen), matrices
            return _as_arrays(layout, *jax.tree.map(jnp.where, selected, new, before))

        if mode is not None:
            return renewed()
        return lax.cond(jnp.any(due), renewed, lambda: (old, kept))

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByAdaRankGradState,
        params: chex.ArrayTree | None = None,
        *,
        refresh: RefreshLike = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByAdaRankGradState]:
        del params, extra_args
        mode = of_eigenspace(refresh)
        if mode is False and rule != "period":
            mode = None
        check_undivided(updates, "scale_by_adarankgrad")
        gradients, structure = flatten(updates)
        fields = [structure.flatten_up_to(field) for field in state[1:6]]
        subspaces = [_Subspace(*parts) for parts in zip(*fields, strict=True)]
        found = {
            i: layout
            for i, layout in enumerate(layouts_of(updates, 1))
            if layout is not None and not isinstance(subspaces[i].basis, optax.MaskedNode)
        }
        reduced = [
            reduce(found[i], gradient, subspaces[i].basis) if i in found else gradient
            for i, gradient in enumerate(gradients)
        ]
        for i, layout in found.items() if mode is not False else ():
            subspaces[i], reduced[i] = subspace_at(
                layout, gradients[i], subspaces[i], reduced[i], state.count, mode
            )
        basis, mu, nu, rank, start_norm = (
            structure.unflatten([subspace[field] for subspace in subspaces]) for field in range(5)
        )
        scaled, moments = adam.update(
            structure.unflatten(reduced), optax.ScaleByAdamState(state.count, mu, nu)
        )
        new_updates = structure.flatten_up_to(scaled)
        for i, layout in found.items():
            update = new_updates[i]
            new_updates[i] = lead_back(layout, update, subspaces[i].basis, scale, update.dtype)
        return structure.unflatten(new_updates), ScaleByAdaRankGradState(
            moments.count, basis, moments.mu, moments.nu, rank, start_norm, state.allocated_rank
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rank(
    squares: jax.Array,
    unseen: jax.Array,
    square: jax.Array,
    lowest: Any,
    highest: int,
    step: Any,
    residual: Any,
) -> jax.Array:
    """The smallest of the ranks that leaves a relative residual below the threshold.

    Args:
      squares: of the singular values, in descending order, ``(*stack, s)``.
      unseen: what of the gradient's squared norm they do not contain, ``(*stack)``.
      square: the gradient's squared norm, ``(*stack)``.
      lowest: the first rank that is tried.
      highest: the last rank that may be tried, a Python integer.
      step: the distance between ranks that are tried.
      residual: the threshold.

    Returns:
      The ranks, ``(*stack)``, int32; the largest that was tried where none is small enough.
    """
    tails = jnp.flip(jnp.cumsum(jnp.flip(squares, -1), -1), -1)  # of i + 1 and what follows it
    tails = jnp.pad(tails, [(0, 0)] * (tails.ndim - 1) + [(0, 1)])[..., 1 : highest + 1]
    left = jnp.sqrt(tails + unseen[..., None]) / (jnp.sqrt(square)[..., None] + _RESIDUAL_EPS)
    ranks = 1 + lax.broadcasted_iota(jnp.int32, left.shape, left.ndim - 1)
    tried = (ranks >= lowest) & ((ranks - lowest) % step == 0)
    enough = tried & (left < residual)
    largest = jnp.max(jnp.where(tried, ranks, 0))
    first = jnp.min(jnp.where(enough, ranks, highest), -1)
    return jnp.where(jnp.any(enough, -1), first, largest).astype(jnp.int32)


def _norms(matrices: jax.Array) -> jax.Array:
    """The Frobenius norm of each matrix of a stack."""
    return jnp.sqrt(jnp.sum(jnp.abs(widened(matrices)) ** 2, axis=(-2, -1)))


def _as_matrices(
    layout: Layout, subspace: _Subspace, reduced: jax.Array
) -> tuple[_Subspace, jax.Array]:
    """A subspace and a reduced gradient in the axes of a parameter, as matrices."""
    matrices = subspace._replace(
        basis=layout.basis_matrix(subspace.basis),
        mu=layout.reduced_matrix(subspace.mu),
        nu=layout.reduced_matrix(subspace.nu),
    )
    return matrices, layout.reduced_matrix(reduced)


def _as_arrays(
    layout: Layout, subspace: _Subspace, reduced: jax.Array
) -> tuple[_Subspace, jax.Array]:
    """The inverse of `_as_matrices`."""
    arrays = subspace._replace(
        basis=layout.basis_array(subspace.basis),
        mu=layout.reduced_array(subspace.mu),
        nu=layout.reduced_array(subspace.nu),
    )
    return arrays, layout.reduced_array(reduced)


def adarankgrad(
    learning_rate: optax.ScalarOrSchedule,
    max_rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    min_rank: int = 1,
    rank_step: int = 1,
    residual: float = 0.2,
    refresh: RefreshRule = "either",
    refresh_every: int = 200,
    convergence: float = 0.1,
    scale: float = 0.25,
    projection: Projection = "short",
    method: Method = "range_finder",
    weight_decay: float = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = None,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdaRankGrad: Adam in subspaces whose rank follows the gradient.

    Args:
      learning_rate: float or schedule, at least 0; like GaLore's, for updates times ``scale``.
      max_rank: the largest rank of a subspace, at least 1; it decides the memory. Matrices whose
        smaller side is below it are trained by AdamW, like all vectors.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the bias-corrected second moment, at least 0.
      min_rank: the smallest rank of a subspace, from 1 to ``max_rank``.
      rank_step: ranks are ``min_rank``, ``min_rank + rank_step``, ...; at least 1.
      residual: xi, the share of the gradient's norm that a subspace may leave out, in (0, 1).
      refresh: when a subspace is replaced: ``"period"`` every ``refresh_every`` steps,
        ``"convergence"`` when the gradient in it has become small, ``"either"`` (default) both.
      refresh_every: the period in steps, at least 1; 200 as in GaLore.
      convergence: sigma; a subspace has converged when the norm of the gradient in it is at most
        this fraction of what it was at its start; in [0, 1).
      scale: factor of the projected updates, at least 0; GaLore's 0.25.
      projection: ``"short"`` (default) projects the smaller side of a matrix, the columns of a
        square one; ``"long"`` the other side.
      method: ``"range_finder"`` (default, the paper's) or ``"svd"``.
      weight_decay: decoupled decay, at least 0; as GaLore's it multiplies the stepped weights by
        ``1 - learning_rate * weight_decay``, and ``update`` then needs ``params``.
      mask: which parameters decay: a tree of booleans like the parameters, a prefix of one, or a
        function that returns one; ``None`` (default) means all.
      dimension_numbers: which axes form the matrices: one ``optax.contrib.GaLoreDimensionNumbers``,
        a tree of these and ``None`` (do not project), or a function from the parameters to one;
        ``None`` (default) takes the last axis as one side and all others as the other.
      key: PRNG key or integer seed of the range finder.

    Returns:
      The optimizer; its ``update`` takes ``refresh`` as :func:`scale_by_adarankgrad`'s does.

    Raises:
      ValueError: an argument outside its range; in ``init``: a rank above the smaller side of every
        matrix, or of one that ``dimension_numbers`` names, or axes that a parameter lacks.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum((p["w"] - 1) ** 2)  # whose gradient has rank one
      >>> tx = oa.adarankgrad(learning_rate=0.4, max_rank=4)
      >>> params = {"w": jnp.zeros((6, 5))}
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(50):
      ...     updates, state = update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(optax.tree.get(state, "subspace_rank")["w"]), bool(loss(params) < 0.1)
      (1, True)

    References:
      Refael et al., `AdaRankGrad <https://arxiv.org/abs/2410.17881>`_, 2025.
    """
    check_learning_rate(learning_rate)
    check_number("weight_decay", weight_decay, 0)
    decays = isinstance(weight_decay, jax.Array) or weight_decay != 0
    chain = optax.chain(
        scale_by_adarankgrad(
            max_rank,
            b1=b1,
            b2=b2,
            eps=eps,
            min_rank=min_rank,
            rank_step=rank_step,
            residual=residual,
            refresh=refresh,
            refresh_every=refresh_every,
            convergence=convergence,
            scale=scale,
            projection=projection,
            method=method,
            dimension_numbers=dimension_numbers,
            key=key,
        ),
        optax.scale_by_learning_rate(learning_rate),
        *([decay_after_step(learning_rate, weight_decay, mask)] if decays else []),
    )
    return with_checked_init(chain, functools.partial(check_floating_leaves, method="adarankgrad"))


class LowRankBytes(NamedTuple):
    """What the bases and moments of AdaRankGrad occupy, in bytes.

    Attributes:
      allocated: what the arrays occupy, of ``max_rank`` directions for each matrix.
      effective: what arrays of the current ranks would occupy.
    """

    allocated: int
    effective: int


def low_rank_bytes(state: chex.ArrayTree) -> LowRankBytes:
    """The bytes of AdaRankGrad's state, as allocated and at the current ranks.

    Static shapes allocate ``max_rank`` directions; a run that would restart with the effective
    ranks needs the second number.

    Args:
      state: the state of an optimizer that contains :func:`scale_by_adarankgrad`, of arrays whose
        values are known (outside of ``jit``).

    Returns:
      Both sizes, of bases and moments; those of parameters that are not projected count in both.

    Raises:
      ValueError: there is no such state in it, or its values are not known.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> tx = oa.scale_by_adarankgrad(4)
      >>> gradient = jnp.ones((6, 5))  # of rank 1
      >>> _, state = tx.update(gradient, tx.init(gradient))
      >>> oa.low_rank_bytes(state)  # (5 + 2 * 6) numbers of 4 bytes for each direction
      LowRankBytes(allocated=272, effective=68)
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, ScaleByAdaRankGradState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]
    if not found:
        raise ValueError("low_rank_bytes found no state of scale_by_adarankgrad.")
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found)) or any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found)
    ):
        raise ValueError(
            "low_rank_bytes reads the ranks in the state, whose values must be known: call it "
            "outside of jit, on arrays."
        )
    allocated, effective = 0, 0
    for node in found:
        moments, structure = flatten(node.mu)
        columns = [
            structure.flatten_up_to(tree)
            for tree in (node.nu, node.low_rank_basis, node.subspace_rank)
        ]
        for mu, nu, basis, rank in zip(moments, *columns, strict=True):
            projected = not isinstance(basis, optax.MaskedNode)
            size = sum(array.nbytes for array in (mu, nu, *([basis] if projected else [])))
            allocated += size
            if projected:
                size = round(size * float(np.mean(rank)) / int(node.allocated_rank))
            effective += size
    return LowRankBytes(allocated, effective)
