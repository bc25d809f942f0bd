r"""Training inside, outside or between the dominant and the bulk subspace of the Hessian.

With :math:`u_1, \dots, u_k` the leading eigenvectors of the loss Hessian and
:math:`P = \sum_i u_i u_i^\top`, the projection onto the *dominant* subspace, an incoming update
:math:`\delta` becomes

.. math::
  a\, P \delta + b\, (I - P) \delta .

``(a, b) = (1, 0)`` is Dom-SGD, ``(0, 1)`` Bulk-SGD (Song, Ahn, Yun, `Does SGD really happen in tiny
subspaces? <https://arxiv.org/abs/2405.16002>`_, ICLR 2025), anything between them the interpolated
methods of Zakarin, Singh, `Accelerating neural network training along sharp and flat directions
<https://arxiv.org/abs/2505.11972>`_, 2025.

Faithful: the projection acts on the applied update, at the parameters before the step, with one
eigenspace of the whole parameter vector; dominant means algebraically largest.  Our reading: the
linear form with weights ``a`` and ``b``, which covers every linear interpolation (the second
paper's own formula was not available to us).  Ours: the eigenspace is tracked (by default with
warm-started block sweeps) instead of solved from scratch at every step, and on a curvature batch of
the caller's choice instead of the whole training set.  Ours, too: a number of directions that
adapts, those whose eigenvalue exceeds a threshold, and subspaces in the metric of the optimizer.

An optimizer that divides its step by a diagonal :math:`D` descends as plain SGD does in the
coordinates :math:`z = D^{1/2} \theta`, where the Hessian is :math:`D^{-1/2} H D^{-1/2}` (Cohen et
al., `Adaptive gradient methods at the edge of stability <https://arxiv.org/abs/2207.14484>`_, 2022,
section 2). With ``metric="preconditioned"`` dominant directions are the leading eigenvectors
:math:`U` of that matrix, and updates are projected there: :math:`P = D^{-1/2} U U^\top D^{1/2}`,
orthogonal in the metric :math:`D`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    as_arrays,
    check_choice,
    check_count,
    check_learning_rate,
    check_number,
    is_placeholder,
    known_integer,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select, with_fixed_leaves
from optax_accel._mesh_axes import check_undivided
from optax_accel._metric import Metric, Roots, chain_in_metric, check_metric, scaled
from optax_accel.curvature import (
    BlockTracker,
    Eigenspace,
    GradientTracker,
    Preconditioner,
    Tracker,
    blocks,
)
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, RefreshLike, announce_cost, announce_eigenspace, of_eigenspace

_NAME = "interpolate_subspaces"
# Combinations of at most this many directions are written out as a sum.
_UNROLLED = 32
# Arrays of at most this many entries are packed: copying them costs less than compiling for each.
_PACKED = 4096
BaseOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


class InterpolateSubspacesState(NamedTuple):
    """State of :func:`interpolate_subspaces`; every field can be read with ``optax.tree.get``.

    Attributes:
      count: number of updates made; int32 scalar.
      space: the tracked :class:`~optax_accel.curvature.Eigenspace`: ``basis`` (orthonormal, leaves
        ``(k, *leaf.shape)``; masked-out leaves are ``optax.MaskedNode``), ``eigenvalues`` ``(k,)``,
        ``ready``, ``accepted``, ``rejected`` and the tracker's ``memory``.
      alignment: chi_k of the last incoming update, ``|P d| / |d|`` in [0, 1] (0 for ``d = 0``).
      alignment_ema: its exponential moving average, started at the first value.
      active: whether the projection has been switched on; boolean scalar.
      next_refresh: the ``count`` at which the next refresh is due; int32 scalar.
      num_dominant: with a threshold for the eigenvalues, how many of the tracked directions exceed
        it and count as dominant, int32 scalar; None without.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    space: Eigenspace
    alignment: jax.Array
    alignment_ema: jax.Array
    active: jax.Array
    next_refresh: jax.Array
    num_dominant: jax.Array | None = None


def interpolate_subspaces(
    num_directions: int,
    dominant_weight: optax.ScalarOrSchedule,
    bulk_weight: optax.ScalarOrSchedule,
    *,
    tracker: Tracker | None = None,
    start_step: int = 0,
    switch_alignment: float | None = None,
    alignment_decay: float = 0.9,
    min_eigenvalue: optax.ScalarOrSchedule | None = None,
    metric: Metric = "euclidean",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights the dominant and the bulk component of the updates: ``a P d + b (I - P) d``.

    The place in the chain decides what is projected.  *Last*, ``optax.chain(base,
    interpolate_subspaces(...))``, it works on the applied update: momentum and Adam moments keep
    seeing the full gradient, as in the papers' code.  *First*, it works on the gradient: the
    moments see the projected gradient.  For plain SGD the two agree.

    ``update`` takes these extra arguments:

    * ``value_fn``: an :class:`~optax_accel.Objective` or a function of the parameters, as in
      Optax's line searches; required unless the next one is passed.
    * ``curvature_value_fn``: the objective whose curvature is tracked; default ``value_fn``.  The
      papers use the whole training set; a fixed few hundred examples give nearly the same subspace.
    * ``refresh``: ``None`` (default): the eigenspace is refreshed inside the compiled step, by
      ``lax.cond`` on the step count.  A static Python value drives it from the host, so that the
      loop alternates compiled steps without a conditional (required for speed with convolutions on
      CPU, and under ``vmap``, where a conditional runs both its branches): ``False`` keeps the
      basis, ``True`` refreshes it, ``"cold"`` and ``"warm"`` also say how; of the words for K-FAC,
      ``"factors"`` keeps the basis and ``"inverses"`` refreshes it.
      :func:`~optax_accel.refresh_at` gives the value for a step, and for a tracker that chooses its
      period :class:`~optax_accel.RefreshSchedule`.

    * ``grad``: the gradient, for trackers that follow gradients; default: the incoming updates.
    * ``preconditioner_diagonal``: required with ``metric="preconditioned"``: the diagonal that the
      optimizer divides its step by, a pytree like the parameters, positive. Entries that are
      infinite take no part. ``Preconditioner.diagonal`` reads it from the state of the optimizer;
      :func:`bulk_sgd` and its siblings do that themselves.

    Until there is a basis, updates pass unchanged. They also do after a refresh that met numbers
    that are not finite, until the next one that did not (``space.accepted``, ``space.rejected``).
    Call ``update`` under ``jit``: outside, the conditional is compiled anew at every step.

    Args:
      num_directions: k, usually the number of classes. With 0 everything is bulk and updates are
        multiplied by ``bulk_weight``; from the number of parameters that take part on everything is
        dominant and they are multiplied by ``dominant_weight``.  Where that weight is the number 0,
        so that every update would be zero, ``init`` raises an error.
      dominant_weight: a, the weight of the component in the dominant subspace; float or schedule.
      bulk_weight: b, the weight of the component orthogonal to it; float or schedule.
      tracker: how the eigenspace is followed; default ``BlockTracker()``.
      start_step: before this step updates pass unchanged, and nothing is tracked.
      switch_alignment: if not None, tracking starts at ``start_step``, but the projection is
        switched on, for good, only when the moving average of chi_k exceeds this value (0.95 in
        public replications of Song et al.).
      alignment_decay: decay of that moving average, in [0, 1); default 0.9, as in those
        replications.
      min_eigenvalue: if not None, only directions whose eigenvalue at the last refresh is larger
        count as dominant, at most ``num_directions``; float or schedule. The others stay tracked,
        and ``num_dominant`` in the state says how many count. ``1 / learning_rate``, say, is half
        of the curvature at which gradient descent becomes unstable (Cohen et al., 2021).
      metric: in which metric directions are dominant and projections orthogonal: ``"euclidean"``
        (default) or ``"preconditioned"``, that of the optimizer's preconditioner.
      mask: pytree of booleans like the parameters, or a function from the parameters to one: True
        leaves take part, the others are held fixed in the curvature and their updates pass
        unchanged.  One at least has to be True.  Use this instead of ``optax.masked``, inside
        which no loss can be evaluated.

    Returns:
      A transformation with state :class:`InterpolateSubspacesState`.  Memory: ``k`` (plus the
      tracker's oversampling) copies of the parameters.

    Raises:
      ValueError: an argument is outside its range; in ``init``, every update would be zero; in
        ``update``, ``value_fn`` is missing.
      TypeError: an argument is of the wrong type, or parameters are not real floating point.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = optax.chain(optax.sgd(0.1), oa.interpolate_subspaces(1, 0.25, 0.75))
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> grads = jnp.array([1.0, 2.0, 2.0])
      >>> updates, state = tx.update(grads, state, params, value_fn=loss)
      >>> [round(float(u), 4) for u in updates]
      [-0.025, -0.15, -0.15]
      >>> round(float(optax.tree.get(state, "alignment")), 4)
      0.3333
    """
    interpolation = _InterpolateSubspaces(
        num_directions=num_directions,
        dominant_weight=dominant_weight,
        bulk_weight=bulk_weight,
        tracker=BlockTracker() if tracker is None else tracker,
        start_step=start_step,
        switch_alignment=switch_alignment,
        alignment_decay=alignment_decay,
        min_eigenvalue=min_eigenvalue,
        metric=metric,
        mask=mask,
    )
    return optax.GradientTransformationExtraArgs(interpolation.init, interpolation.update)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _InterpolateSubspaces:
    """The settings of :func:`interpolate_subspaces`, checked, and what it does with them."""

    num_directions: int
    dominant_weight: optax.ScalarOrSchedule
    bulk_weight: optax.ScalarOrSchedule
    tracker: Tracker
    start_step: int
    switch_alignment: float | None
    alignment_decay: float
    min_eigenvalue: optax.ScalarOrSchedule | None
    metric: Metric
    mask: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.tracker, Tracker):
            raise TypeError(
                "`tracker` must be a Tracker, such as optax_accel.BlockTracker(), "
                f"got {getattr(self.tracker, '__name__', self.tracker)!r}."
            )
        check_count("num_directions", self.num_directions, 0)
        check_number("dominant_weight", self.dominant_weight, allow_schedule=True)
        check_number("bulk_weight", self.bulk_weight, allow_schedule=True)
        check_count("start_step", self.start_step, 0)
        if self.switch_alignment is not None:
            check_number("switch_alignment", self.switch_alignment, 0, 1)
        check_number("alignment_decay", self.alignment_decay, 0, 1, open_high=True)
        check_choice("metric", self.metric, ("euclidean", "preconditioned"))
        if self.min_eigenvalue is not None:
            check_number("min_eigenvalue", self.min_eigenvalue, allow_schedule=True)
            _check_sees_largest(self.tracker)

    def init(self, params: chex.ArrayTree) -> InterpolateSubspacesState:
        check_params(params, _NAME)
        check_selected(params, self.mask, _NAME)
        check_undivided(params, _NAME)
        announce_eigenspace(self.tracker.refresh_every, self.start_step)
        self._announce_cost(params)
        params = as_arrays(params)
        selected = select(params, resolve(params, self.mask))
        k = known_integer(self.num_directions)
        if k is None:
            raise TypeError(
                "`num_directions` decides the shape of the state and must be known when it is "
                "made, got a traced array. Under `jit` or `eval_shape`, use "
                "optax_accel.inject_hyperparams instead of Optax's: it keeps static arguments as "
                "they are."
            )
        if jax.tree.leaves(params):  # a placeholder has none
            size = blocks.dimension(selected)
            most = k if self.min_eigenvalue is None else min(k, size - 1)
            _check_trains(most, size, self.dominant_weight, self.bulk_weight)
        space = self.tracker.init(selected, k)
        # Two arrays, because one can be donated only once.
        alignment, alignment_ema = (jnp.zeros((), space.eigenvalues.dtype) for _ in range(2))
        return InterpolateSubspacesState(
            count=jnp.zeros((), jnp.int32),
            space=space,
            alignment=alignment,
            alignment_ema=alignment_ema,
            active=jnp.zeros((), bool),
            next_refresh=jnp.array(self.start_step, jnp.int32),
            num_dominant=None if self.min_eigenvalue is None else jnp.zeros((), jnp.int32),
        )

    def update(
        self,
        updates: chex.ArrayTree,
        state: InterpolateSubspacesState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        grad: chex.ArrayTree | None = None,
        refresh: RefreshLike = None,
        preconditioner_diagonal: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, InterpolateSubspacesState]:
        refresh = of_eigenspace(refresh)
        count, space, next_refresh = state.count, state.space, state.next_refresh
        params = None if params is None else as_arrays(params)
        chosen = resolve(updates if params is None else params, self.mask)
        k = space.eigenvalues.shape[0]
        roots = self._roots(preconditioner_diagonal, updates, chosen)
        started = count >= self.start_step
        if k > 0 and refresh is not False:
            check_params(params, _NAME, "tx.update(grads, state, params, value_fn=objective)")
            check_undivided(params, _NAME)
            objective = None
            if self.tracker.needs_objective:
                objective = self._objective(
                    value_fn, curvature_value_fn, extra_args, params
                ).precompose(lambda part: merge(part, params, chosen))
            selected = select(params, chosen)
            gradient = select(updates if grad is None else grad, chosen)
            if roots is not None:
                objective, selected, gradient = roots.change(
                    objective, selected, gradient, is_update=grad is None
                )

            def refreshed(old: Eigenspace) -> Eigenspace:
                cold = {"cold": True, "warm": False}.get(refresh)  # type: ignore[arg-type]
                return self.tracker.refresh(old, objective, selected, gradient, cold=cold)

            every = self.tracker.refresh_every
            due = jnp.ones((), bool)
            if refresh is not None or (every == 1 and known_integer(self.start_step) == 0):
                space = refreshed(space)
            else:
                if every == "adaptive":
                    due = started & (count >= next_refresh)
                else:
                    due = started & ((count - self.start_step) % every == 0)
                space = lax.cond(due, refreshed, lambda old: old, space)
            next_refresh = jnp.where(due, count + self.tracker.next_period(space), next_refresh)

        vector = select(updates, chosen)
        everything = k == blocks.dimension(vector) and self.min_eigenvalue is None
        counted = num_dominant = None
        if self.min_eigenvalue is not None:
            least = jnp.asarray(value_of(self.min_eigenvalue, count), space.eigenvalues.dtype)
            counted = (space.eigenvalues > least) & space.usable
            num_dominant = jnp.sum(counted, dtype=jnp.int32)
        dominant, alignment = _dominant_component(vector, space, everything, counted, roots)
        measured = space.usable & started
        alignment = jnp.where(measured, alignment, 0)
        alignment_ema = self._average(alignment, state, measured)
        switched = True if self.switch_alignment is None else alignment_ema > self.switch_alignment
        # Without directions there is nothing to track and nothing to wait for.
        active = (started if k == 0 else measured) & switched | state.active
        applied = active & (k == 0 or space.usable)
        weighted = self._weigh(vector, dominant, count, applied, everything)
        new_state = InterpolateSubspacesState(
            count=optax.safe_increment(count),
            space=space,
            alignment=alignment,
            alignment_ema=alignment_ema,
            active=active,
            next_refresh=next_refresh,
            num_dominant=num_dominant,
        )
        return merge(weighted, updates, chosen), new_state

    def _announce_cost(self, params: chex.ArrayTree) -> None:
        k = known_integer(self.num_directions)
        if not k or not self.tracker.needs_objective or is_placeholder(params):
            return
        selected = select(as_arrays(params), resolve(params, self.mask))
        warm, cold = (self.tracker.num_products(selected, k, cold=cold) for cold in (False, True))
        noun = "product" if warm == 1 else "products"
        words = f"{warm} curvature {noun} a refresh, up to {cold} in the first one"
        if not cold:
            words = "the gradients that its tracker takes at a refresh"
        announce_cost(Cost(words))

    def _objective(
        self,
        value_fn: Any,
        curvature_value_fn: Any,
        extra_args: dict[str, Any],
        params: chex.ArrayTree,
    ) -> Objective:
        """The loss whose curvature is tracked."""
        argument = "value_fn" if curvature_value_fn is None else "curvature_value_fn"
        return as_objective(
            value_fn if curvature_value_fn is None else curvature_value_fn,
            extra_args,
            method=_NAME,
            params=params,
            why="track the dominant subspace of its Hessian",
            argument=argument,
            needs_outputs=getattr(self.tracker, "curvature", None) == "gauss_newton",
        )

    def _roots(
        self, diagonal: chex.ArrayTree | None, updates: chex.ArrayTree, chosen: Any
    ) -> Roots | None:
        """The roots of the preconditioner's diagonal; None in the Euclidean metric."""
        if self.metric == "euclidean":
            return None
        if diagonal is None:
            raise ValueError(
                f'{_NAME}(metric="preconditioned") needs the extra argument '
                "`preconditioner_diagonal`, what the optimizer divides its step by. Call it as: "
                "tx.update(updates, state, params, value_fn=objective, "
                "preconditioner_diagonal=preconditioner.diagonal(optimizer_state, params)), or use "
                'bulk_sgd(..., base=optax.adam, metric="preconditioned", preconditioner='
                "optax_accel.curvature.adam_preconditioner()), which passes it."
            )
        given: Any = jax.tree.structure(diagonal)
        want: Any = jax.tree.structure(updates)
        if given != want:
            raise ValueError(
                f"`preconditioner_diagonal` of {_NAME} must be a pytree like the parameters, "
                f"{want}, got {given}."
            )
        return Roots.of(select(diagonal, chosen))

    def _average(
        self, alignment: jax.Array, state: InterpolateSubspacesState, measured: jax.Array
    ) -> jax.Array:
        """The moving average of the alignment after this update."""
        ema = self.alignment_decay * state.alignment_ema + (1 - self.alignment_decay) * alignment
        ema = jnp.where(state.space.ready, ema, alignment)
        # One update that is not finite must not decide the switch for good.
        return jnp.where(measured & jnp.isfinite(ema), ema, state.alignment_ema)

    def _weigh(
        self,
        vector: chex.ArrayTree,
        dominant: chex.ArrayTree,
        count: jax.Array,
        applied: jax.Array,
        everything: bool,
    ) -> chex.ArrayTree:
        """The weighted sum of the dominant and the bulk component where it is applied."""
        a = jnp.where(applied, value_of(self.dominant_weight, count), 1)
        b = jnp.where(applied, value_of(self.bulk_weight, count), 1)

        def weigh(u: jax.Array, d: jax.Array) -> jax.Array:
            bulk = jnp.zeros_like(d) if everything else u.astype(d.dtype) - d
            mixed = (a.astype(d.dtype) * d + b.astype(d.dtype) * bulk).astype(u.dtype)
            # Not 1 * P u + 1 * (u - P u), which rounds: inactive means untouched.
            return jnp.where(applied, mixed, u)

        return jax.tree.map(weigh, vector, dominant)


def _check_sees_largest(tracker: Tracker) -> None:
    """Raises ``ValueError`` if a tracker's eigenvalues cannot be compared with a threshold."""
    if isinstance(tracker, GradientTracker):
        raise ValueError(
            "a threshold for the eigenvalues needs a tracker that takes curvature products, such "
            "as BlockTracker(); those of GradientTracker are energies of gradients."
        )
    if getattr(tracker, "order", "algebraic") in ("smallest", "both"):
        raise ValueError(
            "a threshold for the eigenvalues picks the largest ones: give the tracker "
            f'`order="algebraic"`, got order="{tracker.order}".'  # type: ignore[attr-defined]
        )


def project_to_dominant(
    num_directions: int,
    *,
    tracker: Tracker | None = None,
    start_step: int = 0,
    switch_alignment: float | None = None,
    alignment_decay: float = 0.9,
    min_eigenvalue: optax.ScalarOrSchedule | None = None,
    metric: Metric = "euclidean",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Projects updates onto the dominant Hessian subspace: ``P d``.

    It is :func:`interpolate_subspaces` with weights 1 and 0.

    Args:
      num_directions: k, usually the number of classes.
      tracker: how the eigenspace is followed; default ``BlockTracker()``.
      start_step: before this step updates pass unprojected, and nothing is tracked.
      switch_alignment: if not None, tracking starts at ``start_step``, but the projection is
        switched on, for good, only when the moving average of chi_k exceeds this value, in [0, 1].
      alignment_decay: decay of that moving average, in [0, 1); default 0.9.
      min_eigenvalue: if not None, only directions whose eigenvalue is larger count as dominant, at
        most ``num_directions``; float or schedule.
      metric: in which metric directions are dominant and projections orthogonal: ``"euclidean"``
        (default) or ``"preconditioned"``, that of the optimizer's preconditioner, whose diagonal
        ``update`` then takes; see :func:`interpolate_subspaces`.
      mask: pytree of booleans like the parameters, or a function from the parameters to one: True
        leaves take part, the others are held fixed in the curvature and their updates pass
        unprojected.

    Returns:
      A transformation with the state and the extra arguments of :func:`interpolate_subspaces`.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.project_to_dominant(1)
      >>> params = jnp.ones(3)
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(params), params, value_fn=loss)
      >>> [round(abs(float(u)), 4) for u in updates]
      [1.0, 0.0, 0.0]
    """
    return interpolate_subspaces(
        num_directions,
        1.0,
        0.0,
        tracker=tracker,
        start_step=start_step,
        switch_alignment=switch_alignment,
        alignment_decay=alignment_decay,
        min_eigenvalue=min_eigenvalue,
        metric=metric,
        mask=mask,
    )


def project_to_bulk(
    num_directions: int,
    *,
    tracker: Tracker | None = None,
    start_step: int = 0,
    switch_alignment: float | None = None,
    alignment_decay: float = 0.9,
    min_eigenvalue: optax.ScalarOrSchedule | None = None,
    metric: Metric = "euclidean",
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes the dominant Hessian subspace from updates: ``d - P d``.

    It is :func:`interpolate_subspaces` with weights 0 and 1.

    Args:
      num_directions: k, usually the number of classes.
      tracker: how the eigenspace is followed; default ``BlockTracker()``.
      start_step: before this step updates pass unprojected, and nothing is tracked.
      switch_alignment: if not None, tracking starts at ``start_step``, but the projection is
        switched on, for good, only when the moving average of chi_k exceeds this value, in [0, 1].
      alignment_decay: decay of that moving average, in [0, 1); default 0.9.
      min_eigenvalue: if not None, only directions whose eigenvalue is larger count as dominant, at
        most ``num_directions``; float or schedule.
      metric: in which metric directions are dominant and projections orthogonal: ``"euclidean"``
        (default) or ``"preconditioned"``, that of the optimizer's preconditioner, whose diagonal
        ``update`` then takes; see :func:`interpolate_subspaces`.
      mask: pytree of booleans like the parameters, or a function from the parameters to one: True
        leaves take part, the others are held fixed in the curvature and their updates pass
        unprojected.

    Returns:
      A transformation with the state and the extra arguments of :func:`interpolate_subspaces`.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.project_to_bulk(1)
      >>> params = jnp.ones(3)
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(params), params, value_fn=loss)
      >>> [round(abs(float(u)), 4) for u in updates]
      [0.0, 1.0, 1.0]
    """
    return interpolate_subspaces(
        num_directions,
        0.0,
        1.0,
        tracker=tracker,
        start_step=start_step,
        switch_alignment=switch_alignment,
        alignment_decay=alignment_decay,
        min_eigenvalue=min_eigenvalue,
        metric=metric,
        mask=mask,
    )


def interpolated_sgd(
    learning_rate: optax.ScalarOrSchedule,
    num_directions: int,
    dominant_weight: optax.ScalarOrSchedule,
    bulk_weight: optax.ScalarOrSchedule,
    *,
    base: BaseOptimizer | None = None,
    tracker: Tracker | None = None,
    start_step: int = 0,
    switch_alignment: float | None = None,
    alignment_decay: float = 0.9,
    sharpness_factor: float | None = None,
    metric: Metric = "euclidean",
    preconditioner: Preconditioner | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """The base optimizer with its update's dominant and bulk components weighted.

    SGD is ``(1, 1)``, Dom-SGD ``(1, 0)``, Bulk-SGD ``(0, 1)``; between SGD and Bulk-SGD
    ``(1 - alpha, 1)``, between Dom- and Bulk-SGD ``(1 - alpha, alpha)`` (our reading of Zakarin,
    Singh, 2025).

    Args:
      learning_rate: float or schedule, passed to ``base``.
      num_directions: k, usually the number of classes.
      dominant_weight: a, the weight of the component in the dominant subspace; float or schedule.
      bulk_weight: b, the weight of the component orthogonal to it; float or schedule.
      base: the optimizer, as a function of the learning rate: ``optax.sgd`` (default),
        ``optax.adam``, ``functools.partial(optax.sgd, momentum=0.9)`` ...
      tracker: how the eigenspace is followed; default ``BlockTracker()``.
      start_step: before this step the base optimizer's updates pass unchanged, and nothing is
        tracked.
      switch_alignment: if not None, tracking starts at ``start_step``, but the projection is
        switched on, for good, only when the moving average of chi_k exceeds this value, in [0, 1].
      alignment_decay: decay of that moving average, in [0, 1); default 0.9.
      sharpness_factor: c; if not None, only directions whose eigenvalue exceeds ``c /
        learning_rate`` count as dominant, at most ``num_directions``. Gradient descent is stable
        along a direction up to ``2 / learning_rate`` (Cohen et al., 2021), so that 2 takes those
        at the edge of stability and 1 those half way there (ours).
      metric: in which metric directions are dominant and projections orthogonal: ``"euclidean"``
        (default) or ``"preconditioned"``, that of the base optimizer's ``preconditioner``.
      preconditioner: with ``metric="preconditioned"``, the
        :class:`~optax_accel.curvature.Preconditioner` of ``base``, such as
        ``optax_accel.curvature.adam_preconditioner()``.
      mask: pytree of booleans like the parameters, or a function from the parameters to one: True
        leaves take part, the others are held fixed in the curvature and get the base optimizer's
        update.

    Returns:
      A transformation whose ``update`` takes the extra arguments of :func:`interpolate_subspaces`.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.interpolated_sgd(0.1, 1, dominant_weight=0.5, bulk_weight=1.0)
      >>> params = jnp.ones(3)
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(params), params, value_fn=loss)
      >>> [round(float(u), 4) for u in updates]
      [-0.05, -0.1, -0.1]
    """
    check_learning_rate(learning_rate)
    factory = optax.sgd if base is None else base
    if not callable(factory):
        raise TypeError(
            f"`base` must be a function of the learning rate, such as optax.sgd, got {base!r}. "
            "Under optax.inject_hyperparams use optax_accel.inject_hyperparams, which leaves it be."
        )

    check_metric(metric, preconditioner)
    min_eigenvalue = None
    if sharpness_factor is not None:
        check_number("sharpness_factor", sharpness_factor, 0)
        min_eigenvalue = functools.partial(_over_rate, sharpness_factor, learning_rate)

    def make(mask: Mask) -> optax.GradientTransformation:
        projection = interpolate_subspaces(
            num_directions,
            dominant_weight,
            bulk_weight,
            tracker=tracker,
            start_step=start_step,
            switch_alignment=switch_alignment,
            alignment_decay=alignment_decay,
            min_eigenvalue=min_eigenvalue,
            metric=metric,
            mask=mask,
        )
        if preconditioner is None:
            return optax.chain(factory(learning_rate), projection)
        return chain_in_metric(factory(learning_rate), projection, preconditioner)

    make(mask)  # bad arguments show here
    return with_fixed_leaves(make, mask)


def dom_sgd(
    learning_rate: optax.ScalarOrSchedule,
    num_directions: int,
    *,
    base: BaseOptimizer | None = None,
    tracker: Tracker | None = None,
    start_step: int = 0,
    switch_alignment: float | None = None,
    alignment_decay: float = 0.9,
    sharpness_factor: float | None = None,
    metric: Metric = "euclidean",
    preconditioner: Preconditioner | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Dom-SGD: the base optimizer restricted to the dominant subspace.

    A diagnostic, not an accelerator: Song et al. (arXiv 2405.16002) show that it stops reducing the
    training loss although the gradient lies mostly in that subspace.

    It is :func:`interpolated_sgd` with weights 1 and 0.

    Args:
      learning_rate: float or schedule, passed to ``base``.
      num_directions: k, usually the number of classes.
      base: the optimizer, as a function of the learning rate: ``optax.sgd`` (default),
        ``optax.adam``, ``functools.partial(optax.sgd, momentum=0.9)`` ...
      tracker: how the eigenspace is followed; default ``BlockTracker()``.
      start_step: before this step updates pass unprojected, and nothing is tracked.
      switch_alignment: if not None, tracking starts at ``start_step``, but the projection is
        switched on, for good, only when the moving average of chi_k exceeds this value, in [0, 1].
      alignment_decay: decay of that moving average, in [0, 1); default 0.9.
      sharpness_factor: c; if not None, only directions whose eigenvalue exceeds ``c /
        learning_rate`` count as dominant, at most ``num_directions``. Gradient descent is stable
        along a direction up to ``2 / learning_rate`` (Cohen et al., 2021), so that 2 takes those
        at the edge of stability and 1 those half way there (ours).
      metric: in which metric directions are dominant and projections orthogonal: ``"euclidean"``
        (default) or ``"preconditioned"``, that of the base optimizer's ``preconditioner``.
      preconditioner: with ``metric="preconditioned"``, the
        :class:`~optax_accel.curvature.Preconditioner` of ``base``, such as
        ``optax_accel.curvature.adam_preconditioner()``.
      mask: pytree of booleans like the parameters, or a function from the parameters to one: True
        leaves take part, the others are held fixed in the curvature and their updates pass
        unprojected.

    Returns:
      A transformation whose ``update`` takes the extra arguments of :func:`interpolate_subspaces`.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.dom_sgd(0.1, num_directions=1)
      >>> params = jnp.ones(3)
      >>> updates, _ = tx.update(jnp.ones(3), tx.init(params), params, value_fn=loss)
      >>> [round(abs(float(u)), 4) for u in updates]
      [0.1, 0.0, 0.0]
    """
    return interpolated_sgd(
        learning_rate,
        num_directions,
        1.0,
        0.0,
        base=base,
        tracker=tracker,
        start_step=start_step,
        switch_alignment=switch_alignment,
        alignment_decay=alignment_decay,
        sharpness_factor=sharpness_factor,
        metric=metric,
        preconditioner=preconditioner,
        mask=mask,
    )


def bulk_sgd(
    learning_rate: optax.ScalarOrSchedule,
    num_directions: int,
    *,
    base: BaseOptimizer | None = None,
    tracker: Tracker | None = None,
    start_step: int = 0,
    switch_alignment: float | None = None,
    alignment_decay: float = 0.9,
    sharpness_factor: float | None = None,
    metric: Metric = "euclidean",
    preconditioner: Preconditioner | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Bulk-SGD: the base optimizer restricted to the complement of the dominant subspace.

    It is :func:`interpolated_sgd` with weights 0 and 1.

    Args:
      learning_rate: float or schedule, passed to ``base``.
      num_directions: k, usually the number of classes.
      base: the optimizer, as a function of the learning rate: ``optax.sgd`` (default),
        ``optax.adam``, ``functools.partial(optax.sgd, momentum=0.9)`` ...
      tracker: how the eigenspace is followed; default ``BlockTracker()``.
      start_step: before this step updates pass unprojected, and nothing is tracked.
      switch_alignment: if not None, tracking starts at ``start_step``, but the projection is
        switched on, for good, only when the moving average of chi_k exceeds this value, in [0, 1].
      alignment_decay: decay of that moving average, in [0, 1); default 0.9.
      sharpness_factor: c; if not None, only directions whose eigenvalue exceeds ``c /
        learning_rate`` count as dominant, at most ``num_directions``. Gradient descent is stable
        along a direction up to ``2 / learning_rate`` (Cohen et al., 2021), so that 2 takes those
        at the edge of stability and 1 those half way there (ours).
      metric: in which metric directions are dominant and projections orthogonal: ``"euclidean"``
        (default) or ``"preconditioned"``, that of the base optimizer's ``preconditioner``.
      preconditioner: with ``metric="preconditioned"``, the
        :class:`~optax_accel.curvature.Preconditioner` of ``base``, such as
        ``optax_accel.curvature.adam_preconditioner()``.
      mask: pytree of booleans like the parameters, or a function from the parameters to one: True
        leaves take part, the others are held fixed in the curvature and their updates pass
        unprojected.

    Returns:
      A transformation whose ``update`` takes the extra arguments of :func:`interpolate_subspaces`.

    Raises:
      ValueError, TypeError: an argument is outside its range or of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.bulk_sgd(0.1, num_directions=1)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     value, grads = jax.value_and_grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(p), 4) for p in params]
      [1.0, 0.729, 0.9703]
    """
    return interpolated_sgd(
        learning_rate,
        num_directions,
        0.0,
        1.0,
        base=base,
        tracker=tracker,
        start_step=start_step,
        switch_alignment=switch_alignment,
        alignment_decay=alignment_decay,
        sharpness_factor=sharpness_factor,
        metric=metric,
        preconditioner=preconditioner,
        mask=mask,
    )


def _over_rate(
    factor: chex.Numeric, learning_rate: optax.ScalarOrSchedule, count: jax.Array
) -> jax.Array:
    """``factor / learning_rate``; infinite at rate 0, where nothing is unstable."""
    return jnp.asarray(factor, jnp.float32) / jnp.asarray(
        value_of(learning_rate, count), jnp.float32
    )


def _check_trains(k: int, size: int, dominant_weight: Any, bulk_weight: Any) -> None:
    """Raises ``ValueError`` if every update would be zero; ``size`` counts parameters taking part.

    Weights that are schedules or arrays may change, so they count as nonzero.
    """
    if size == 0:  # nothing is projected
        return

    def is_zero(weight: Any) -> bool:
        return not callable(weight) and not isinstance(weight, jax.Array) and weight == 0

    message = "every update would be zero, and nothing would ever be trained: "
    if is_zero(dominant_weight) and is_zero(bulk_weight):
        raise ValueError(
            f"{message}`dominant_weight` and `bulk_weight` are both 0; give one of them another "
            "value."
        )
    if k >= size and is_zero(dominant_weight):
        raise ValueError(
            f"{message}`num_directions` is {k}, at least the number of parameters that take part, "
            f"{size}, so that all of them are dominant, and the dominant component has weight 0. "
            f"Use at most {size - 1} directions, or a `dominant_weight` other than 0."
        )
    if k == 0 and is_zero(bulk_weight):
        raise ValueError(
            f"{message}with `num_directions=0` everything is bulk, and the bulk component has "
            "weight 0. Use at least 1 direction, or a `bulk_weight` other than 0."
        )


def _coefficients(basis: chex.ArrayTree, vector: chex.ArrayTree, dtype: Any) -> jax.Array:
    """The inner products of a vector with the rows of a basis: ``(k,)``."""

    def leaf(b: jax.Array, v: jax.Array) -> jax.Array:
        if b.dtype == v.dtype:
            return blocks.inner([b], [v[None]])[:, 0]
        # A dot product would first write a wide copy of a narrow basis, a fused sum does not.
        return jnp.sum(b.astype(v.dtype) * v[None], axis=tuple(range(1, b.ndim)))

    products = jax.tree.leaves(jax.tree.map(leaf, basis, vector))
    return functools.reduce(jnp.add, products, jnp.zeros((), dtype)).astype(dtype)


def _dominant_component(
    vector: chex.ArrayTree,
    space: Eigenspace,
    everything: bool,
    counted: jax.Array | None,
    roots: Roots | None,
) -> tuple[chex.ArrayTree, jax.Array]:
    """``P v`` in the basis' dtype, at least float32, and ``|P v| / |v|``, in the metric.

    Args:
      vector: the update.
      space: the tracked directions.
      everything: whether they span the whole space.
      counted: which of them count, ``(k,)``; None for all.
      roots: those of the preconditioner; None in the Euclidean metric.
    """

    def widen(v: jax.Array, b: jax.Array) -> jax.Array:
        return v.astype(jnp.promote_types(b.dtype, jnp.float32))

    wide = jax.tree.map(widen, vector, space.basis)
    k, dtype = space.eigenvalues.shape[0], space.eigenvalues.dtype
    if k == 0:
        return jax.tree.map(jnp.zeros_like, wide), jnp.zeros((), dtype)
    # The biases and scales of a deep network are many small arrays of few shapes.
    packing = blocks.Packing(wide, largest=_PACKED)
    inner = wide if roots is None else scaled(wide, roots.roots)
    packed, basis = packing.pack(inner), packing.pack(space.basis, axis=1)
    block = blocks.as_block(packed)
    squared = blocks.inner(block, block)[0, 0]
    coefficients = _coefficients(basis, packed, dtype)
    if counted is not None:
        coefficients = jnp.where(counted, coefficients, 0)
    ratio = jnp.sum(coefficients**2) / jnp.where(squared > 0, squared, 1)
    alignment = jnp.sqrt(jnp.minimum(ratio, 1)).astype(dtype)
    if everything:
        return wide, alignment

    def combination(b: jax.Array, v: jax.Array, joint: bool) -> jax.Array:
        # A sum is fused with what is done to the update, a dot product is not. Of a joint array it
        # would be fused anew for each array in it, and take long to compile.
        if joint or k > _UNROLLED:
            return cast(jax.Array, blocks.combine(coefficients, b.astype(v.dtype)))
        weights = coefficients.astype(v.dtype)
        return functools.reduce(jnp.add, (weights[i] * b[i].astype(v.dtype) for i in range(k)))

    combined = tuple(map(combination, basis, packed, packing.joint))
    dominant = packing.unpack(combined)
    return dominant if roots is None else scaled(dominant, roots.inverses), alignment
