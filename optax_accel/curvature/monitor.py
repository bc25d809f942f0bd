r"""Watching the curvature that an optimizer sees while it trains, without changing a bit of it.

Whether a step :math:`d` makes progress is decided by the Hessian :math:`H` along it and by the
largest curvature that the optimizer is stable at.  The monitor records both, at the parameters
before the step:

* the *sharpness*, the largest eigenvalues of :math:`H`, and the smallest ones if asked;
* the *effective sharpness*, the largest eigenvalues of :math:`P^{-1/2} H P^{-1/2}` for the
  preconditioner :math:`P` of this step, its stability threshold, and the ratio of the two (Cohen et
  al. 2021, appendix B; 2022, section 2);
* :math:`d^T H d / |d|^2` for the applied update and for the gradient;
* :math:`\chi_k`, the share of the length of the gradient and of the update within the span of the
  leading eigenvectors (Song, Ahn, Yun 2025, section 3);
* the decrease of the loss that the quadratic model predicts, :math:`-g^T d - \frac12 d^T H d`, and
  the actual one, on the same batch;
* the gradient noise scale :math:`\mathrm{tr}(\Sigma) / |G|^2` (McCandlish et al. 2018, appendix A)
  from the lengths of the gradients of the batch's parts;
* the trace of :math:`H` (Hutchinson's estimator), and nodes and weights of its spectral density.

Ours: that all of it is one element of a chain, tracked with warm-started products; the ratio of the
thresholds; the follower of the smallest eigenvalues.

References:
  Cohen et al., `Gradient descent on neural networks typically occurs at the edge of stability
  <https://arxiv.org/abs/2103.00065>`_, 2021; Cohen et al., `Adaptive gradient methods at the edge
  of stability <https://arxiv.org/abs/2207.14484>`_, 2022; Song, Ahn, Yun, `Does SGD really happen
  in tiny subspaces? <https://arxiv.org/abs/2405.16002>`_, 2025; McCandlish et al., `An empirical
  model of large-batch training <https://arxiv.org/abs/1812.06162>`_, 2018.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_accel._arguments import (
    as_arrays,
    check_count,
    check_flag,
    check_inner,
    check_number,
    is_placeholder,
    known_integer,
    static_integer,
    value_of,
)
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import norm, vdot
from optax_accel.curvature import blocks
from optax_accel.curvature._measures import (
    GivenProduct,
    alignment,
    follow_smallest,
    quotients,
    unit,
)
from optax_accel.curvature.block_tracker import BlockTracker
from optax_accel.curvature.density import spectral_density
from optax_accel.curvature.preconditioners import Ones, Preconditioner, preconditioned
from optax_accel.curvature.tracking import (
    CurvatureTracker,
    Eigenspace,
    curvature_operator,
    new_space,
    vector_like,
)
from optax_accel.objective import Objective
from optax_accel.refresh import (
    Cost,
    RefreshLike,
    announce_cost,
    announce_monitor,
    of_monitor,
)

_NAME = "monitor_curvature"


class CurvatureRecord(NamedTuple):
    """What :func:`monitor_curvature` recorded last; all zero before the first record.

    Scalars are of at least float32.  What was not asked for is None.

    Attributes:
      recorded_step: number of updates before the one that was recorded, int32; -1 before.
      recorded_loss: the loss before the update, on the batch on which curvature is taken.
      sharpness: the largest eigenvalue.
      leading_eigenvalues: the k largest ones, ``(k,)``, descending.
      smallest_eigenvalues: the smallest ones, ``(num_smallest,)``, ascending.
      effective_sharpness: the largest eigenvalue between the preconditioner's roots.
      effective_eigenvalues: the k largest ones of that matrix, ``(k,)``, descending.
      stability_threshold: the effective sharpness at which the iteration stops converging.
      stability_ratio: effective sharpness over threshold; 1 is the edge of stability.
      update_curvature: the Rayleigh quotient of the applied update; 0 for an update of zeros.
      gradient_curvature: that of the gradient.
      update_alignment: chi_k of the applied update, in [0, 1].
      gradient_alignment: chi_k of the gradient, in [0, 1].
      predicted_decrease: of the loss, by the quadratic model.
      actual_decrease: of the loss, by the update.
      hessian_trace: Hutchinson's estimate.
      noise_scale: the gradient noise scale, in examples for the ``batch_size`` given, else in
        batches; infinite where the estimate of the squared gradient is not positive.
      noise_moments: the running means behind it, ``(2,)``: of the squared length of the true
        gradient, and of the trace of the covariance of the batch's gradient.
      density_nodes: of the last densities, ``(records, products)``.
      density_weights: their weights, zero where there is none yet.
    """

    recorded_step: jax.Array
    recorded_loss: jax.Array
    sharpness: jax.Array
    leading_eigenvalues: jax.Array
    smallest_eigenvalues: jax.Array | None
    effective_sharpness: jax.Array | None
    effective_eigenvalues: jax.Array | None
    stability_threshold: jax.Array | None
    stability_ratio: jax.Array | None
    update_curvature: jax.Array
    gradient_curvature: jax.Array
    update_alignment: jax.Array
    gradient_alignment: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array
    hessian_trace: jax.Array | None
    noise_scale: jax.Array | None
    noise_moments: jax.Array | None
    density_nodes: jax.Array | None
    density_weights: jax.Array | None


class MonitorCurvatureState(NamedTuple):
    """State of :func:`monitor_curvature`; every field can be read with ``optax.tree.get``.

    Attributes:
      count: number of updates made; int32 scalar.
      num_records: number of records made; int32 scalar.
      num_skipped: number of records that were due, but met numbers that are not finite; int32.
      record: the last :class:`CurvatureRecord`.
      inner_state: state of the inner transformation; ``()`` without one.
      smallest_space: the tracked eigenspace at the lower end; None if not asked for.
      effective_space: the tracked eigenspace between the preconditioner's roots; None without a
        preconditioner, and where that is the identity.
      leading_space: the tracked :class:`~optax_accel.curvature.Eigenspace` of the sharpness.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    num_records: jax.Array
    num_skipped: jax.Array
    record: CurvatureRecord
    inner_state: chex.ArrayTree
    smallest_space: Eigenspace | None
    effective_space: Eigenspace | None
    leading_space: Eigenspace

    def without_records(self) -> MonitorCurvatureState:
        """The state for a step with ``refresh=False``, which touches neither record nor spaces.

        A compiled step that gets them returns the same arrays, but handing an array through takes
        about 2 microseconds on a CPU, which adds up where a step is short and a network has many
        arrays. They wait outside, for :meth:`with_records_of`.

        Returns:
          The state with None in the place of the record and the spaces.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> import optax_accel as oa
          >>> loss = lambda p: jnp.sum(p**2)
          >>> tx = oa.monitor_curvature(optax.sgd(0.1), every=100)
          >>> params = jnp.ones(3)
          >>> grads, state = jax.grad(loss)(params), tx.init(params)
          >>> _, state = tx.update(grads, state, params, value_fn=loss, refresh="cold")
          >>> _, light = tx.update(grads, state.without_records(), params, refresh=False)
          >>> state = light.with_records_of(state)
          >>> int(state.count), round(float(state.record.sharpness), 3)
          (2, 2.0)
        """
        absent: Any = None
        return self._replace(
            record=absent, smallest_space=None, effective_space=None, leading_space=absent
        )

    def with_records_of(self, other: MonitorCurvatureState) -> MonitorCurvatureState:
        """The state with record and spaces of the one that :meth:`without_records` left them in.

        Args:
          other: the state before the step.

        Returns:
          The whole state after the step.
        """
        return self._replace(
            record=other.record,
            smallest_space=other.smallest_space,
            effective_space=other.effective_space,
            leading_space=other.leading_space,
        )


def monitor_curvature(
    inner: optax.GradientTransformation | None = None,
    num_directions: int = 1,
    *,
    every: int = 400,
    start_step: int = 0,
    preconditioner: Preconditioner | None = None,
    inner_learning_rate: optax.ScalarOrSchedule | None = None,
    tracker: CurvatureTracker | None = None,
    num_smallest: int = 0,
    trace_probes: int = 0,
    density_products: int = 0,
    density_records: int = 8,
    noise_scale: bool = False,
    noise_decay: float = 0.9,
    batch_size: int = 1,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Records the curvature that an optimizer sees, every few steps; its updates pass unchanged.

    It wraps a *whole* optimizer, ``monitor_curvature(optax.adam(1e-3), ...)``, because only around
    it are all three things at hand: the gradient that came in, the update that is applied, and the
    state after it, which holds the preconditioner.  Without ``inner`` it is the last element of a
    chain: what comes in is then the applied update, the gradient is the extra argument ``grad`` or
    is computed anew, and there is no state to read a preconditioner from, but for that of plain
    SGD.  Put it outside of ``optax.partition`` and ``optax.masked``, and with
    ``optax.MultiSteps`` around that too: inside, it would measure every micro-step.

    ``update`` takes these extra arguments, and passes them on:

    * ``value_fn``: an :class:`~optax_accel.Objective` or a function of the parameters; required
      unless the next one is passed, in steps that may record.
    * ``curvature_value_fn``: the objective whose loss, decrease and curvature are recorded; default
      ``value_fn``.  A fixed batch shows the course of training without the noise of the batches,
      a small one costs less.
    * ``refresh``: None (default) decides in the graph by the step count.  A static Python value
      drives it from the host: ``False`` records nothing, ``True`` does, ``"cold"`` from a new
      Lanczos process, ``"warm"`` from the spaces at hand. :func:`~optax_accel.refresh_at` gives it,
      with a period of its own beside other methods. A loop on a CPU with convolutions needs it.
    * ``grad``: the gradient, without ``inner``.

    Under mixed precision give a ``value_fn`` that computes in float32. With float16, wrap the whole
    optimizer, :func:`~optax_accel.dynamic_loss_scale` included: its scale is in the gradient that
    comes in, and in nothing that is recorded. A step that overflows, as any batch whose numbers are
    not finite, is counted in ``num_skipped`` and never recorded.

    A record takes, by default, a gradient, a value of the loss, two products for the quotients and
    two for the sharpness; with a preconditioner two more; ``3 num_smallest`` for the smallest
    eigenvalues; one for each probe of the trace; ``density_products`` for a density.  The first
    record finds each space by a Lanczos process of 20 products instead.  Memory: ``num_directions +
    1`` copies of the parameters for each of the one or two spaces, ``num_smallest`` for the third;
    while it records, three more, and those of the Lanczos process.

    Args:
      inner: the optimizer that is watched; None (default): the last element of a chain.
      num_directions: k, how many leading eigenvalues are followed, at least 1 (default). The number
        of classes shows chi_k as Song et al. define it.
      every: steps between records; default 400 (ours). With Adam and its preconditioner a record
        takes the time of 10 to 14 plain steps on three small networks, 2 to 3.5% of the training
        time at this period. The other steps take 2 to 9% longer where the spaces pass through a
        step that donates its state, 1% on an MLP where they wait outside of it, as
        :meth:`~optax_accel.MonitorCurvatureState.without_records` lets them (with other programs on
        the machine, in CPU time). ``python -m experiments.bench --tables monitor`` measures both.
      start_step: the step of the first record; default 0.
      preconditioner: what ``inner`` divides its steps by, e.g.
        :func:`~optax_accel.curvature.adam_preconditioner`; None (default): no effective sharpness.
      inner_learning_rate: the rate of ``inner``, or its schedule, for the stability threshold;
        None (default): the ``learning_rate`` in the state, as ``inject_hyperparams`` keeps it.
      tracker: how the eigenspaces are followed; default ``BlockTracker(oversampling=1)``. Its
        ``refresh_every`` is not used; its ``seed`` is that of all random vectors.
      num_smallest: how many smallest eigenvalues are followed, at most half of the dimension;
        default 0.
      trace_probes: random vectors for the trace, at least 0; default 0, no trace.
      density_products: products for a density (one process of stochastic Lanczos quadrature, see
        :func:`~optax_accel.curvature.spectral_density`), at least 0; default 0, no density.
      density_records: how many of the last densities are kept, whose mean is the running one.
      noise_scale: whether the noise scale is estimated, from the parts in which the objective sees
        its batch: micro-batches (``objective.accumulated``) or replicas (``axis_name``).
      noise_decay: decay of the running means behind it, in [0, 1); default 0.9 (ours: McCandlish et
        al., appendix A.1, average both over the steps, whose ratio alone would be biased).
      batch_size: number of examples in a batch, over all its parts: the unit of the noise scale;
        default 1, which states it in batches.
      mask: pytree of booleans like the parameters (or a prefix of it), or a function from the
        parameters to one: the leaves whose curvature is watched; the others are held fixed in all
        that is recorded. None (default): all.

    Returns:
      A transformation with state :class:`MonitorCurvatureState`.

    Raises:
      ValueError: an argument is outside its range; in ``init``: more directions than parameters, a
        preconditioner whose state is not in ``inner``, no learning rate; in ``update``: no
        ``value_fn``, a batch in one part with ``noise_scale``.
      TypeError: an argument is of the wrong type; parameters that are not real floating-point
        numbers; in ``update``: an objective that cannot be differentiated twice.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_accel as oa
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([10.0, 1.0, 0.1]) * p**2)
      >>> tx = oa.monitor_curvature(
      ...     optax.sgd(0.1), preconditioner=oa.curvature.sgd_preconditioner(),
      ...     inner_learning_rate=0.1)
      >>> params = jnp.ones(3)
      >>> grads = jax.grad(loss)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
      >>> [round(float(optax.tree.get(state, name)), 3)
      ...  for name in ("sharpness", "stability_threshold", "stability_ratio")]
      [10.0, 20.0, 0.5]
      >>> round(float(state.record.predicted_decrease), 3)  # exact on a parabola
      5.096
    """
    if inner is not None:
        check_inner(inner)
    if preconditioner is not None and not isinstance(preconditioner, Preconditioner):
        raise TypeError(
            "`preconditioner` must be an optax_accel.curvature.Preconditioner, such as "
            f"adam_preconditioner(), got {preconditioner!r}."
        )
    monitor = _Monitor(
        inner=None if inner is None else optax.with_extra_args_support(inner),
        num_directions=num_directions,
        every=every,
        start_step=start_step,
        preconditioner=preconditioner,
        inner_learning_rate=inner_learning_rate,
        tracker=BlockTracker(oversampling=1) if tracker is None else tracker,
        num_smallest=num_smallest,
        trace_probes=trace_probes,
        density_products=density_products,
        density_records=density_records,
        noise_scale=noise_scale,
        noise_decay=noise_decay,
        batch_size=batch_size,
        mask=mask,
    )
    return optax.GradientTransformationExtraArgs(monitor.init, monitor.update)


class _Step(NamedTuple):
    """What a step hands to a record."""

    params: chex.ArrayTree
    update: chex.ArrayTree
    gradient: chex.ArrayTree | None
    diagonal: chex.ArrayTree | None
    learning_rate: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Monitor:
    """The settings of :func:`monitor_curvature`, checked, and what it does with them."""

    inner: optax.GradientTransformationExtraArgs | None
    num_directions: int
    every: int
    start_step: int
    preconditioner: Preconditioner | None
    inner_learning_rate: optax.ScalarOrSchedule | None
    tracker: CurvatureTracker
    num_smallest: int
    trace_probes: int
    density_products: int
    density_records: int
    noise_scale: bool
    noise_decay: float
    batch_size: int
    mask: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.tracker, CurvatureTracker):
            raise TypeError(
                "`tracker` of monitor_curvature must follow the curvature by its products, such as "
                f"optax_accel.BlockTracker() or ExactTracker(), got {self.tracker!r}."
            )
        lowest = {"num_directions": 1, "every": 1, "density_records": 1, "batch_size": 1}
        for name in ("start_step", "num_smallest", "trace_probes", "density_products"):
            lowest[name] = 0
        for name, low in lowest.items():
            check_count(name, getattr(self, name), low)
        if self.inner_learning_rate is not None:
            check_number("inner_learning_rate", self.inner_learning_rate, 0, allow_schedule=True)
        check_number("noise_decay", self.noise_decay, 0, 1, open_high=True)
        check_flag("noise_scale", self.noise_scale)

    @property
    def _tracks_effective(self) -> bool:
        given = self.preconditioner
        return given is not None and not isinstance(given.diagonal, Ones)

    def init(self, params: chex.ArrayTree) -> MonitorCurvatureState:
        check_params(params, _NAME)
        check_selected(params, self.mask, _NAME)
        check_undivided(params, _NAME)
        announce_monitor(self.every, self.start_step)
        every = known_integer(self.every) or "few"
        announce_cost(Cost(f"curvature products, a gradient and a loss every {every} steps"))
        inner_state = () if self.inner is None else self.inner.init(params)
        params = as_arrays(params)
        selected = select(params, resolve(params, self.mask))
        if not is_placeholder(params):
            self._check(params, selected, inner_state)
        k = static_integer("num_directions", self.num_directions, 1)
        leading = self.tracker.init(selected, k)
        effective = smallest = None
        if self._tracks_effective:
            effective = self.tracker.init(selected, k)
        if num_smallest := static_integer("num_smallest", self.num_smallest, 0):
            smallest = new_space(self.tracker, selected, num_smallest, None)
        zero = jnp.zeros((), jnp.int32)
        return MonitorCurvatureState(
            count=zero,
            num_records=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            record=self._empty(leading.eigenvalues.dtype, leading.eigenvalues.shape[0]),
            inner_state=inner_state,
            smallest_space=smallest,
            effective_space=effective,
            leading_space=leading,
        )

    def _check(self, params: Any, selected: Any, inner_state: Any) -> None:
        """Raises where the settings do not fit the parameters or the optimizer."""
        size = blocks.dimension(selected)
        limits = {"num_directions": size, "num_smallest": size // 2, "density_products": size}
        for name, most in limits.items():
            if getattr(self, name) > most:
                share = "half of " if name == "num_smallest" else ""
                raise ValueError(
                    f"`{name}` of {_NAME} is {getattr(self, name)}, more than {share}the "
                    f"{size} parameters that are watched: give at most {most}."
                )
        if self.preconditioner is not None:
            jax.eval_shape(self.preconditioner.diagonal, inner_state, params)
            self._rate(inner_state, jnp.zeros((), jnp.int32))

    def _empty(self, dtype: Any, k: int) -> CurvatureRecord:
        def zeros(*shape: int, wanted: bool = True) -> Any:
            return jnp.zeros(shape, dtype) if wanted else None

        effective = self.preconditioner is not None
        smallest = static_integer("num_smallest", self.num_smallest, 0)
        products = static_integer("density_products", self.density_products, 0)
        density = (static_integer("density_records", self.density_records, 1), products)
        probes = static_integer("trace_probes", self.trace_probes, 0)
        return CurvatureRecord(
            recorded_step=jnp.full((), -1, jnp.int32),
            recorded_loss=zeros(),
            sharpness=zeros(),
            leading_eigenvalues=zeros(k),
            smallest_eigenvalues=zeros(smallest, wanted=smallest > 0),
            effective_sharpness=zeros(wanted=effective),
            effective_eigenvalues=zeros(k, wanted=effective),
            stability_threshold=zeros(wanted=effective),
            stability_ratio=zeros(wanted=effective),
            update_curvature=zeros(),
            gradient_curvature=zeros(),
            update_alignment=zeros(),
            gradient_alignment=zeros(),
            predicted_decrease=zeros(),
            actual_decrease=zeros(),
            hessian_trace=zeros(wanted=probes > 0),
            noise_scale=zeros(wanted=self.noise_scale),
            noise_moments=zeros(2, wanted=self.noise_scale),
            density_nodes=zeros(*density, wanted=products > 0),
            density_weights=zeros(*density, wanted=products > 0),
        )

    def _rate(self, inner_state: Any, count: jax.Array) -> Any:
        """The learning rate of a step."""
        if self.inner_learning_rate is not None:
            return value_of(self.inner_learning_rate, count)
        found = optax.tree.get_all_with_path(inner_state, "learning_rate")
        if not found:
            raise ValueError(
                f"{_NAME} needs the learning rate for the stability threshold of its "
                "`preconditioner`, and the state of the optimizer has none: give "
                "`inner_learning_rate=`, a number or the schedule, or make the optimizer with "
                "optax_accel.inject_hyperparams."
            )
        return found[-1][1]

    def update(
        self,
        updates: chex.ArrayTree,
        state: MonitorCurvatureState,
        params: chex.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        curvature_value_fn: Any = None,
        refresh: RefreshLike = None,
        **extra_args: Any,
    ) -> tuple[chex.ArrayTree, MonitorCurvatureState]:
        mode = of_monitor(refresh)
        given = {"value_fn": value_fn, "curvature_value_fn": curvature_value_fn, "refresh": refresh}
        gradient, inner_state = extra_args.get("grad"), state.inner_state
        applied = updates
        if self.inner is not None:
            handed_on = _taken_by(self.inner.update, given)
            applied, inner_state = self.inner.update(
                updates, inner_state, params, **handed_on, **extra_args
            )
            gradient = updates
        new = state._replace(count=optax.safe_increment(state.count), inner_state=inner_state)
        if mode is False:
            return applied, new
        if state.record is None:
            raise ValueError(
                f"{_NAME} cannot record in a state `without_records()`: use it in steps with "
                "`refresh=False` only, and join `with_records_of(state)` after them."
            )
        check_params(params, _NAME, "tx.update(grads, state, params, value_fn=objective)")
        objective = as_objective(
            value_fn if curvature_value_fn is None else curvature_value_fn,
            extra_args,
            method=_NAME,
            params=params,
            why="take products with its Hessian",
            argument="value_fn" if curvature_value_fn is None else "curvature_value_fn",
            needs_outputs=self.tracker.curvature == "gauss_newton",
        )
        whole = as_arrays(params)
        chosen = resolve(whole, self.mask)
        objective = objective.precompose(lambda part: merge(part, whole, chosen))
        diagonal = rate = None
        if self.preconditioner is not None:
            diagonal = select(self.preconditioner.diagonal(inner_state, whole), chosen)
            rate = self._rate(inner_state, state.count)
        step = _Step(
            params=select(whole, chosen),
            update=select(applied, chosen),
            gradient=None if gradient is None else select(gradient, chosen),
            diagonal=diagonal,
            learning_rate=rate,
        )

        def recorded(old: MonitorCurvatureState) -> MonitorCurvatureState:
            cold = {"cold": True, "warm": False}.get(mode)  # type: ignore[arg-type]
            return self._record(old, objective, step, cold, state.count)

        kept = new._replace(inner_state=())  # not carried through a conditional
        if mode is None:
            elapsed = state.count - self.start_step
            due = (elapsed >= 0) & (elapsed % self.every == 0)
            kept = lax.cond(due, recorded, lambda old: old, kept)
        else:
            kept = recorded(kept)
        return applied, kept._replace(inner_state=inner_state)

    def _record(
        self,
        old: MonitorCurvatureState,
        objective: Objective,
        step: _Step,
        cold: bool | None,
        count: jax.Array,
    ) -> MonitorCurvatureState:
        """The state with a new record, or with the old one where numbers are not finite."""
        params, before = step.params, old.record
        like = vector_like(self.tracker, params)
        dtype = before.sharpness.dtype
        value, own, squared_norm, parts = objective.value_and_grad_of_parts(params)
        product = curvature_operator(self.tracker, objective, params)
        gradient = own if step.gradient is None else step.gradient
        direction, length = unit(step.update, like)
        slope, _ = unit(gradient, like)
        probes = 0
        if before.hessian_trace is not None:
            probes = static_integer("trace_probes", self.trace_probes, 1)
        key = jax.random.fold_in(jax.random.key(self.tracker.seed), count)
        (along, against), trace = quotients(product, [direction, slope], probes, key, like)

        def followed(space: Eigenspace, product: Any) -> Eigenspace:
            given: Any = GivenProduct(product)
            return self.tracker.refresh(space, given, params, own, cold=cold)

        leading = followed(old.leading_space, product)
        effective, smallest = old.effective_space, old.smallest_space
        if effective is not None:
            effective = followed(effective, preconditioned(product, step.diagonal))
        if smallest is not None:
            smallest = follow_smallest(self.tracker, smallest, product, params, cold)
        predicted = -length * (vdot(_wide(own, like), direction) + length * along / 2)
        after = objective(optax.apply_updates(params, step.update))
        found: dict[str, Any] = {
            "recorded_step": count,
            "recorded_loss": value,
            "sharpness": leading.eigenvalues[0],
            "leading_eigenvalues": leading.eigenvalues,
            "update_curvature": along,
            "gradient_curvature": against,
            "update_alignment": alignment(direction, leading),
            "gradient_alignment": alignment(slope, leading),
            "predicted_decrease": predicted,
            "actual_decrease": value - after,
        }
        if self.preconditioner is not None:
            values = (leading if effective is None else effective).eigenvalues
            threshold = self.preconditioner.threshold(step.learning_rate)
            found |= {
                "effective_sharpness": values[0],
                "effective_eigenvalues": values,
                "stability_threshold": threshold,
                "stability_ratio": values[0] / threshold,
            }
        if smallest is not None:
            found["smallest_eigenvalues"] = smallest.eigenvalues
        if probes:
            found["hessian_trace"] = trace
        if before.density_nodes is not None:
            found |= self._density(before, product, key, like, old.num_records)
        if self.noise_scale:
            found |= self._noise(before, norm(own) ** 2, squared_norm, parts, old.num_records)
        spaces = [space for space in (leading, effective, smallest) if space is not None]
        valid = jnp.stack([space.accepted for space in spaces]).all()
        for name, number in found.items():
            if name != "noise_scale":
                valid &= jnp.isfinite(number).all()
        record = before._replace(
            **{
                name: jnp.where(valid, jnp.asarray(number).astype(_dtype(name, dtype)), previous)
                for name, number in found.items()
                for previous in [getattr(before, name)]
            }
        )
        return old._replace(
            num_records=old.num_records + valid,
            num_skipped=old.num_skipped + ~valid,
            record=record,
            smallest_space=smallest,
            effective_space=effective,
            leading_space=leading,
        )

    def _density(
        self, before: CurvatureRecord, product: Any, key: jax.Array, like: Any, number: jax.Array
    ) -> dict[str, Any]:
        """The nodes and weights with those of a new probe in the place of the oldest ones."""
        assert before.density_nodes is not None
        num_records, num_products = before.density_nodes.shape
        found = spectral_density(
            product,
            key=jax.random.fold_in(key, 1),
            num_probes=1,
            num_products=num_products,
            like=like,
        )
        row = number % num_records

        def put(kept: Any, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(kept, new[0].astype(kept.dtype), row, 0)

        return {
            "density_nodes": put(before.density_nodes, found.nodes),
            "density_weights": put(before.density_weights, found.weights),
        }

    def _noise(
        self,
        before: CurvatureRecord,
        squared_mean: jax.Array,
        mean_of_squares: jax.Array,
        parts: int,
        number: jax.Array,
    ) -> dict[str, Any]:
        """McCandlish et al. 2018, equations A.2 to A.4, with a part as the unit of batch sizes."""
        if parts < 2:
            raise ValueError(
                f"{_NAME} estimates the noise scale from the parts of a batch, and its objective "
                "sees the whole batch at once: give it micro-batches, "
                "`value_fn=objective.accumulated(4, x=x, y=y)`, or replicas (`axis_name`), or "
                "leave out `noise_scale=True`."
            )
        squared_gradient = (parts * squared_mean - mean_of_squares) / (parts - 1)
        # Of the gradient of a whole batch, which is that of a part over their number.
        noise = (mean_of_squares - squared_mean) / (parts - 1)
        assert before.noise_moments is not None
        new = jnp.stack([squared_gradient, noise]).astype(before.noise_moments.dtype)
        decay = jnp.where(number == 0, 0, jnp.asarray(self.noise_decay, new.dtype))
        moments = decay * before.noise_moments + (1 - decay) * new
        positive = moments[0] > 0
        ratio = jnp.where(positive, moments[1] / jnp.where(positive, moments[0], 1), jnp.inf)
        return {"noise_scale": self.batch_size * ratio, "noise_moments": moments}


def _taken_by(update: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the monitor's own extra arguments that were given and that ``inner`` takes.

    Optax's SAM, for one, refuses arguments that it does not know.
    """
    parameters = inspect.signature(update).parameters
    takes_all = any(other.kind is other.VAR_KEYWORD for other in parameters.values())
    return {
        name: value
        for name, value in given.items()
        if value is not None and (takes_all or name in parameters)
    }


def _dtype(name: str, dtype: Any) -> Any:
    return jnp.int32 if name == "recorded_step" else dtype


def _wide(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda leaf, x: leaf.astype(x.dtype), tree, like)
