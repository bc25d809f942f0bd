"""The transformation that weights the dominant and the bulk component of the updates.

It follows the eigenspace with a tracker, decides when the projection is active, and weights the two
components; :mod:`optax_accel.subspace.optimizers` states the rule and its papers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    as_arrays,
    check_choice,
    check_count,
    check_number,
    is_placeholder,
    known_integer,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._mesh_axes import check_undivided
from optax_accel.curvature import BlockTracker, Eigenspace, GradientTracker, Tracker, blocks
from optax_accel.objective import Objective
from optax_accel.refresh import Cost, RefreshLike, announce_cost, announce_eigenspace, of_eigenspace
from optax_accel.subspace._component import dominant_component
from optax_accel.subspace._metric import Metric, Roots

_NAME = "interpolate_subspaces"


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
        dominant, alignment = dominant_component(vector, space, everything, counted, roots)
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
