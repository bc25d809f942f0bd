r"""GaLore: an optimizer whose state lives in a low-rank subspace of each weight's gradient.

For a weight matrix with gradient :math:`G_t \in \mathbb{R}^{m \times n}`, :math:`m \ge n`, and the
:math:`r` leading right singular vectors :math:`V` of the gradient at the last refresh,

.. math::
  R_t = G_t V, \qquad N_t = \operatorname{Adam}(R_t), \qquad
  W_{t+1} = W_t - \eta\, \alpha\, N_t V^\top ;

for :math:`m < n` the left ones serve in the same way, :math:`R_t = U^\top G_t`.  Adam keeps moments
of :math:`m \times r` numbers and not of :math:`m \times n`.  Every ``refresh_every`` steps the
subspace is that of the current gradient; the moments stay as they are.

Zhao et al., `GaLore: memory-efficient LLM training by gradient low-rank projection
<https://arxiv.org/abs/2403.03507>`_, ICML 2024.  Faithful: the trajectory of the authors' AdamW
(``jiaweizzhao/GaLore``): ``eps`` is added before the bias correction, the singular vectors are
computed in at least float32, weight decay sees the stepped weights, moments are neither reset nor
rotated.  Singular vectors have no sign of their own, and the moments depend on it: each new one
points where the old one did, so that runs on different devices agree (ours).
``optax.contrib.galore`` follows another trajectory: it projects the longer side, so that
its moments are smaller and its basis is larger, and its default scale is 1.
Ours: ``projection="long"``, the randomized range finder, refreshes at different steps for different
parameters, stacks of matrices, convolution kernels as matrices of windows and inputs by outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._adam import scale_by_adam
from optax_accel._arguments import (
    as_arrays,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_floating_leaves,
    check_inner,
    check_learning_rate,
    check_number,
    is_placeholder,
    known_integer,
    static_integer,
    with_checked_init,
)
from optax_accel._masking import Mask
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import stack
from optax_accel._random import as_key
from optax_accel.low_rank._eight_bits import in_eight_bits
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
    replaced,
    start_columns,
    svd,
    widened,
)
from optax_accel.refresh import EigenspaceRefresh, RefreshLike, announce_eigenspace, of_eigenspace

# Columns beyond the rank of the range finder: 5 or 10 (Halko et al., 2011, section 4.2).
_OVERSAMPLING = 10


class ScaleByGaLoreState(NamedTuple):
    """State of :func:`scale_by_galore`.

    Attributes:
      count: number of updates made; int32 scalar.
      low_rank_basis: orthonormal bases of the subspaces, a tree like the parameters: for a matrix
        of (m, n) whose columns are projected (rank, n), else (m, rank); for other arrays the axes
        of the other side have length 1 but for the last. ``optax.MaskedNode`` for what is not
        projected.
      inner_state: state of the inner transformation on the reduced gradients: for a matrix of
        (m, n) whose columns are projected (m, rank), else (rank, n).
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    low_rank_basis: chex.ArrayTree
    inner_state: chex.ArrayTree


def scale_by_galore(
    rank: int,
    inner: optax.GradientTransformation | None = None,
    *,
    refresh_every: int = 200,
    scale: float = 0.25,
    projection: Projection = "short",
    method: Method = "svd",
    stagger: int = 0,
    dimension_numbers: DimensionNumbers = None,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs a transformation in a low-rank subspace of each matrix's gradient.

    Each gradient is reduced, given to ``inner``, led back and multiplied by ``scale``; what is not
    projected goes through ``inner`` as it is.  Singular vectors are computed in at least float32
    and kept in the dtype of the parameter.  A gradient that is not finite leaves the basis as it
    was.  Within ``jax.vmap`` give ``refresh``: a condition would run both its branches there.

    Args:
      rank: r, the number of directions kept of each matrix, at least 1. Matrices whose smaller side
        is below it are not projected.
      inner: a transformation that works entry by entry and needs no parameters, such as
        ``optax.scale_by_adam()`` or ``optax.trace(0.9)``; ``None`` (default) is the authors' Adam,
        with ``eps`` 1e-6 added before the bias correction.
      refresh_every: steps between two refreshes of a basis, at least 1; the authors' default is
        200, and 500 for models of 7 billion parameters.
      scale: alpha, the factor of the projected updates, 0.25 in the authors' recipes for
        pretraining and 4 for fine-tuning on GLUE.
      projection: ``"short"`` (default, the authors') projects the smaller side of a matrix, the
        columns of a square one; ``"long"`` the other side, as ``optax.contrib.galore`` does.
      method: ``"svd"`` (default, the authors'), or ``"range_finder"``, a randomized one that starts
        from the old basis and costs a few products with the gradient.
      stagger: number of steps between the refreshes of one parameter and the next, so that they
        share the work out; ``refresh_every`` must be a multiple of it.  0 (default) refreshes all
        at once, as the authors do.
      dimension_numbers: which axes form the matrices: one ``optax.contrib.GaLoreDimensionNumbers``
        for all parameters of two axes or more, a tree like the parameters with one or ``None`` (do
        not project) for each, or a function from the parameters to such a tree. Axes that it does
        not name number a stack of matrices, each with its own basis.  ``None`` (default) takes the
        last axis as one side and all others together as the other, which fits dense layers and
        convolutions. Attention kernels of (inputs, heads, size) take ``GaLoreDimensionNumbers(0,
        (1, 2))``; give ``None`` for embeddings and the head, as the authors do.
      key: PRNG key or integer seed of the range finder.

    Returns:
      A transformation with state :class:`ScaleByGaLoreState`. Its ``update`` takes ``refresh``, as
      :func:`~optax_accel.refresh_at` gives it: ``False`` keeps all bases, ``True`` refreshes those
      that are due, ``"cold"`` refreshes all without use of the old ones.

    Raises:
      ValueError: an argument outside its range; in ``init``: a rank above the smaller side of every
        matrix, or of one that ``dimension_numbers`` names, or axes that a parameter lacks.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.scale_by_galore(2, optax.trace(0.9))
      >>> params = {"w": jnp.ones((8, 3)), "b": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "trace")["w"].shape, state.low_rank_basis["w"].shape
      ((8, 2), (2, 3))

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2; Halko,
      Martinsson and Tropp, `Finding structure with randomness <https://arxiv.org/abs/0909.4061>`_,
      2011.
    """
    check_count("rank", rank, 1)
    check_count("refresh_every", refresh_every, 1)
    check_count("stagger", stagger, 0)
    check_number("scale", scale, 0)
    check_choice("projection", projection, PROJECTIONS)
    check_choice("method", method, METHODS)
    key = as_key(key)
    spacing, period = known_integer(stagger), known_integer(refresh_every)
    if spacing and period is not None and period % spacing:
        raise ValueError(
            f"`refresh_every` must be a multiple of `stagger`, {spacing}, got {period}: the bases "
            "of all parameters then fall due at steps that `stagger` divides."
        )
    if inner is None:
        inner = scale_by_adam("scale_by_galore", 0.9, 0.999, 1e-6, eps_before_correction=True)
    check_inner(inner)
    base = optax.with_extra_args_support(inner)

    def layouts_of(tree: chex.ArrayTree, size: int) -> list[Layout | None]:
        return layouts(tree, dimension_numbers, projection, size, "scale_by_galore")

    def init_fn(params: chex.ArrayTree) -> ScaleByGaLoreState:
        count = jnp.zeros((), jnp.int32)
        every = spacing or static_integer("refresh_every", refresh_every, 1)
        announce_eigenspace(every, 0, starts_anew=False)
        if is_placeholder(params):
            # What is reduced has other shapes than the parameters: nothing counts as like them.
            return ScaleByGaLoreState(count, jnp.zeros(()), base.init(jnp.zeros(())))
        check_floating_leaves(params, "scale_by_galore")
        check_undivided(params, "scale_by_galore")
        params = as_arrays(params)
        size = known_rank("rank", rank)
        leaves, structure = flatten(params)
        bases, reduced = [], []
        for leaf, layout in zip(leaves, layouts_of(params, size), strict=True):
            bases.append(empty_basis(layout, size, leaf.dtype))
            shape = leaf.shape if layout is None else layout.reduced_shape(size)
            reduced.append(jnp.zeros(shape, leaf.dtype))
        inner_state = base.init(structure.unflatten(reduced))
        return ScaleByGaLoreState(count, structure.unflatten(bases), inner_state)

    def columns_of(layout: Layout, basis: jax.Array) -> int:
        """Number of columns of the range finder."""
        return min(basis.shape[layout.other[-1]] + _OVERSAMPLING, *layout.sizes)

    def new_basis(
        layout: Layout,
        gradient: jax.Array,
        old: jax.Array,
        random: jax.Array | None,
        cold: jax.Array,
    ) -> jax.Array:
        matrix, basis = layout.matrix(widened(gradient)), layout.basis_matrix(old)
        size = basis.shape[-1]
        if random is None:
            new, _ = svd(matrix, size)
        else:
            start = start_columns(random, widened(basis), columns_of(layout, old), cold)
            new, _ = range_finder(matrix, size, start)
        return layout.basis_array(replaced(new, basis))

    def refreshed(
        count: jax.Array,
        found: dict[int, Layout],
        gradients: list[jax.Array],
        old: list[Any],
        mode: EigenspaceRefresh,
    ) -> dict[int, jax.Array]:
        """The bases of this step, by the numbers of the parameters that are projected."""
        kept = {i: old[i] for i in found}
        # No basis yet: this is the first step, or gradients were not finite.
        missing = {i: ~jnp.any(basis) for i, basis in kept.items()}
        cold = stack(list(missing.values())).any() | (mode == "cold")

        def new(numbers: Collection[int]) -> dict[int, jax.Array]:
            random = None
            if method == "range_finder":
                shapes = [(found[i].sizes[0], columns_of(found[i], old[i])) for i in numbers]
                random = random_columns(jax.random.fold_in(key, count), shapes)
            return {i: new_basis(found[i], gradients[i], old[i], random, cold) for i in numbers}

        if mode == "cold" or (mode is not None and spacing == 0):
            return new(found)
        if spacing == 0:
            due = (count % refresh_every == 0) | stack(list(missing.values())).any()
            return lax.cond(due, lambda: new(found), lambda: kept)
        for position, (i, basis) in enumerate(list(kept.items())):
            due = ((count - stagger * position) % refresh_every == 0) | missing[i]
            kept |= lax.cond(due, functools.partial(new, [i]), lambda i=i, basis=basis: {i: basis})
        return kept

    def update_fn(
        updates: chex.ArrayTree,
        state: ScaleByGaLoreState,
        params: chex.ArrayTree | None = None,
        *,
        refresh: RefreshLike = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, ScaleByGaLoreState]:
        del params
        mode = of_eigenspace(refresh)
        check_undivided(updates, "scale_by_galore")
        gradients, structure = flatten(updates)
        bases = structure.flatten_up_to(state.low_rank_basis)
        found = {
            i: layout
            for i, layout in enumerate(layouts_of(updates, 1))
            if layout is not None and not isinstance(bases[i], optax.MaskedNode)
        }
        if mode is not False and found:
            new = refreshed(state.count, found, gradients, bases, mode)
            bases = [new.get(i, basis) for i, basis in enumerate(bases)]
        reduced = [
            reduce(found[i], gradient, bases[i]) if i in found else gradient
            for i, gradient in enumerate(gradients)
        ]
        scaled, inner_state = base.update(
            structure.unflatten(reduced), state.inner_state, None, refresh=refresh, **extra_args
        )
        new_updates = structure.flatten_up_to(scaled)
        for i, layout in found.items():
            dtype = gradients[i].dtype
            new_updates[i] = lead_back(layout, new_updates[i], bases[i], scale, dtype)
        return structure.unflatten(new_updates), ScaleByGaLoreState(
            optax.safe_increment(state.count), structure.unflatten(bases), inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    refresh_every: int = 200,
    scale: float = 0.25,
    projection: Projection = "short",
    method: Method = "svd",
    stagger: int = 0,
    weight_decay: float = 0.0,
    mask: Mask = None,
    dimension_numbers: DimensionNumbers = None,
    mu_dtype: Any = None,
    eight_bits: bool = False,
    key: chex.PRNGKey | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: AdamW whose moments live in a low-rank subspace of each matrix's gradient.

    Args:
      learning_rate: float or schedule, at least 0. The authors pretrain with 0.01 (0.005 for 7
        billion parameters) and fine-tune with 3e-5; with ``scale`` 0.25 the former is 0.0025 for
        what is projected.
      rank: r, the number of directions kept of each matrix, at least 1; the authors take 128 for 60
        million parameters, 256 for 130 and 350, 1,024 for a billion, and 4 for fine-tuning.
        Matrices whose smaller side is below it are trained by AdamW, like all vectors.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment before its bias correction, at least 0; 1e-6 is
        the authors' default.
      refresh_every: steps between two refreshes of a basis, at least 1; 200 (default) is the
        authors'.
      scale: factor of the projected updates, at least 0; the authors' is 0.25, and 4 for
        fine-tuning on GLUE.
      projection: ``"short"`` (default, the authors') projects the smaller side of a matrix, the
        columns of a square one; ``"long"`` the other side, as ``optax.contrib.galore`` does.
      method: ``"svd"`` (default, the authors') or ``"range_finder"``, which is faster and starts
        from the old basis.
      stagger: number of steps between the refreshes of one parameter and the next; 0 (default)
        refreshes all at once, as the authors do.
      weight_decay: decoupled decay, at least 0; as in the authors' code it multiplies the stepped
        weights by ``1 - learning_rate * weight_decay``, and ``update`` then needs ``params``.
      mask: which parameters decay: a tree of booleans like the parameters, a prefix of one, or a
        function that returns one; ``None`` (default) means all.
      dimension_numbers: which axes form the matrices: one ``optax.contrib.GaLoreDimensionNumbers``,
        a tree of these and ``None`` (do not project), or a function from the parameters to one;
        ``None`` (default) takes the last axis as one side and all others as the other. Attention
        kernels of (inputs, heads, size) take ``GaLoreDimensionNumbers(0, (1, 2))``.
      mu_dtype: dtype of the first moment, e.g. ``jnp.bfloat16``; ``None`` (default) is that of the
        parameters.
      eight_bits: whether both moments are kept in eight bits with a scale for each 2,048 entries,
        as in the authors' 8-bit GaLore and in Dettmers et al. (2022); the codes, powers of
        2 ** (1/6) with stochastic rounding, are ours. False (default) keeps them whole.
      key: PRNG key or integer seed of the range finder.

    Returns:
      The optimizer; its ``update`` takes ``refresh`` as :func:`scale_by_galore`'s does.

    Raises:
      ValueError: an argument outside its range; in ``init``: a rank above the smaller side of every
        matrix, or of one that ``dimension_numbers`` names, or axes that a parameter lacks.
      TypeError: in ``init``: parameters that are not floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> tx = oa.galore(learning_rate=0.01, rank=1)
      >>> params = jnp.zeros((3, 2))
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
      >>> updates, state = tx.update(gradient, tx.init(params), params)
      >>> [round(float(u), 4) for u in updates[:, 0]]  # the column of the larger singular value
      [-0.0025, -0.0, -0.0025]

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
    """
    check_learning_rate(learning_rate)
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, 0, 1, open_high=True)
    check_number("eps", eps, 0)
    check_number("weight_decay", weight_decay, 0)
    check_dtype("mu_dtype", mu_dtype)
    check_flag("eight_bits", eight_bits)
    if eight_bits and mu_dtype is not None:
        raise ValueError(
            f"`mu_dtype` {mu_dtype!r} and `eight_bits` both choose how the first moment is kept: "
            "leave one out."
        )
    adam = scale_by_adam("galore", b1, b2, eps, eps_before_correction=True, mu_dtype=mu_dtype)
    if eight_bits:
        adam = in_eight_bits(adam)
    decays = isinstance(weight_decay, jax.Array) or weight_decay != 0
    chain = optax.chain(
        scale_by_galore(
            rank,
            adam,
            refresh_every=refresh_every,
            scale=scale,
            projection=projection,
            method=method,
            stagger=stagger,
            dimension_numbers=dimension_numbers,
            key=key,
        ),
        optax.scale_by_learning_rate(learning_rate),
        *([decay_after_step(learning_rate, weight_decay, mask)] if decays else []),
    )
    return with_checked_init(chain, functools.partial(check_floating_leaves, method="galore"))
