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

Ours: that all of it is one element of a chain; the start of the Krylov spaces (see
``num_products``); the ratio of the thresholds.

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
import numpy as np
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
from optax_accel._derivatives import differentiable
from optax_accel._extra_args import as_objective, check_params
from optax_accel._masking import Mask, check_selected, merge, resolve, select
from optax_accel._mesh_axes import check_undivided
from optax_accel._numerics import norm, vdot
from optax_accel.curvature import blocks
from optax_accel.curvature._measures import (
    Spectrum,
    alignment,
    quotients,
    spectrum_ends,
    unit,
)
from optax_accel.curvature._vectors import check_vector
from optax_accel.curvature.density import spectral_density
from optax_accel.curvature.preconditioners import (
    Ones,
    Preconditioner,
    check_preconditioner,
    preconditioned,
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
      leading_residuals: how good they are, ``(k,)``: there is an eigenvalue within that distance of
        each, ``|H v - lambda v|``.
      smallest_eigenvalues: the smallest ones, ``(num_smallest,)``, ascending.
      smallest_residuals: how good they are, ``(num_smallest,)``.
      effective_sharpness: the largest eigenvalue between the preconditioner's roots.
      effective_eigenvalues: the k largest ones of that matrix, ``(k,)``, descending.
      effective_residuals: how good they are, ``(k,)``.
      stability_threshold: the effective sharpness at which the iteration stops converging;
        infinite at rate 0.
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
    leading_residuals: jax.Array
    smallest_eigenvalues: jax.Array | None
    smallest_residuals: jax.Array | None
    effective_sharpness: jax.Array | None
    effective_eigenvalues: jax.Array | None
    effective_residuals: jax.Array | None
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
      effective_start: what the last record found between the preconditioner's roots, from which
        the next one starts: a vector; None without a preconditioner, and where it is the identity.
      leading_start: the same of the curvature itself.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    num_records: jax.Array
    num_skipped: jax.Array
    record: CurvatureRecord
    inner_state: chex.ArrayTree
    effective_start: chex.ArrayTree | None
    leading_start: chex.ArrayTree

    def without_records(self) -> MonitorCurvatureState:
        """The state for a step with ``refresh=False``, which touches nothing of the records.

        A compiled step that gets them returns the same arrays, but handing an array through takes
        about 2 microseconds on a CPU, which adds up where a step is short and a network has many
        arrays. They wait outside, for :meth:`with_records_of`.

        Returns:
          The state with None in the place of the record and of what the next one starts from.

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
        return self._replace(record=absent, effective_start=None, leading_start=absent)

    def with_records_of(self, other: MonitorCurvatureState) -> MonitorCurvatureState:
        """The state with what :meth:`without_records` left in another one.

        Args:
          other: the state before the step.

        Returns:
          The whole state after the step.
        """
        return self._replace(
            record=other.record,
            effective_start=other.effective_start,
            leading_start=other.leading_start,
        )


def monitor_curvature(
    inner: optax.GradientTransformation | None = None,
    num_directions: int = 1,
    *,
    every: int = 1000,
    start_step: int = 0,
    preconditioner: Preconditioner | None = None,
    inner_learning_rate: optax.ScalarOrSchedule | None = None,
    num_smallest: int = 0,
    num_products: int | None = None,
    trace_probes: int = 0,
    density_products: int = 0,
    density_records: int = 8,
    noise_scale: bool = False,
    noise_decay: float = 0.9,
    batch_size: int = 1,
    mask: Mask = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Records the curvature that an optimizer sees, every few steps; its updates pass unchanged.

    It wraps a *whole* optimizer, ``monitor_curvature(optax.adam(1e-3), ...)``, because only around
    it are all three things at hand: the gradient that came in, the update that is applied, and the
    state after it, which holds the preconditioner.  Without ``inner`` it is the last element of a
    chain: what comes in is then the applied update, the gradient is the extra argument ``grad`` or
    is computed anew, and there is no state to read a preconditioner from, but for that of plain
    SGD.  Put it outside of ``optax.partition``, ``optax.masked`` and ``optax.MultiSteps``: inside
    of the last it would take one batch for all of which the update is made.  Around it, it records
    at the micro-steps that apply an update, one from those that are due on; a loop that drives it
    from the host gives ``every`` a multiple of the number of micro-steps and ``start_step`` one
    less than that.

    ``update`` takes these extra arguments, and passes them on:

    * ``value_fn``: an :class:`~optax_accel.Objective` or a function of the parameters; required
      unless the next one is passed, in steps that may record.
    * ``curvature_value_fn``: the objective whose loss, decrease and curvature are recorded; default
      ``value_fn``.  A fixed batch shows the course of training without the noise of the batches,
      a small one costs less.
    * ``refresh``: None (default) decides in the graph by the step count.  A static Python value
      drives it from the host: ``False`` records nothing, ``True``, ``"cold"`` and ``"warm"`` do.
      :func:`~optax_accel.refresh_at` gives it, with a period of its own beside other methods. A
      loop on a CPU with convolutions needs it.
    * ``grad``: the gradient, without ``inner``.

    Under mixed precision give a ``value_fn`` that computes in float32. With float16, wrap the whole
    optimizer, :func:`~optax_accel.dynamic_loss_scale` included: its scale is in the gradient that
    comes in, and in nothing that is recorded. A step that overflows, as any batch whose numbers are
    not finite, is counted in ``num_skipped`` and never recorded.

    A record takes, by default, a gradient, a value of the loss, two products for the quotients,
    ``4 + 2 num_directions + 4 num_smallest`` for the eigenvalues; with a preconditioner ``4 + 2
    num_directions`` more; one for each probe of the trace; ``density_products`` for a density. The
    eigenvalues are those of a Krylov space that starts from what the last record found, the
    gradient and a random vector; all records run the same program, and the residual norms in each
    say how good it is. Memory: one or two copies of the parameters; while it records, those of the
    Lanczos process, one for each product.

    Args:
      inner: the optimizer that is watched; None (default): the last element of a chain.
      num_directions: k, how many leading eigenvalues are followed, at least 1 (default). The number
        of classes shows chi_k as Song et al. define it.
      every: steps between records; default 1000 (ours). On two CPU cores a record of the default
        size in Adam's metric took as long as 18 plain steps of a small GPT, 18 of a CNN and 36 of
        an MLP of 1.7 ms: 1 to 4 % of the training (``python -m experiments.bench --tables
        monitor``). Other steps cost nothing measurable where the records wait outside, as
        :meth:`~optax_accel.MonitorCurvatureState.without_records` lets them.
      start_step: the step of the first record; default 0.
      preconditioner: what ``inner`` divides its steps by, e.g.
        :func:`~optax_accel.curvature.adam_preconditioner`; None (default): no effective sharpness.
      inner_learning_rate: the rate of ``inner``, or its schedule, for the stability threshold;
        None (default): the ``learning_rate`` in the state, as ``inject_hyperparams`` keeps it.
      num_smallest: how many smallest eigenvalues are followed, at most half of the dimension;
        default 0.
      num_products: products of a record with the Hessian, and with the preconditioned one, for
        their eigenvalues, at least as many as these; more make them more accurate. Default (ours):
        ``4 + 2 num_directions``, and ``4 num_smallest`` with the Hessian. Along 3,200 steps of Adam
        and of momentum on a small MLP, recorded every 400, the largest errors were then 0.5% of the
        sharpness and 0.001% of the effective one, and the smallest eigenvalue was off by 1.5% of
        the sharpness.
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
      seed: integer from which all random vectors are drawn; default 0.

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
        num_smallest=num_smallest,
        num_products=num_products,
        trace_probes=trace_probes,
        density_products=density_products,
        density_records=density_records,
        noise_scale=noise_scale,
        noise_decay=noise_decay,
        batch_size=batch_size,
        mask=mask,
        seed=seed,
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
    num_smallest: int
    num_products: int | None
    trace_probes: int
    density_products: int
    density_records: int
    noise_scale: bool
    noise_decay: float
    batch_size: int
    mask: Mask
    seed: int

    def __post_init__(self) -> None:
        lowest = {"num_directions": 1, "every": 1, "density_records": 1, "batch_size": 1}
        for name in ("start_step", "num_smallest", "trace_probes", "density_products", "seed"):
            lowest[name] = 0
        for name, low in lowest.items():
            check_count(name, getattr(self, name), low)
        if self.num_products is not None:
            check_count("num_products", self.num_products, 1)
        if self.inner_learning_rate is not None:
            check_number("inner_learning_rate", self.inner_learning_rate, 0, allow_schedule=True)
            if not callable(self.inner_learning_rate):
                _check_scalar(self.inner_learning_rate)
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
        like = _vector_like(selected)
        zero = jnp.zeros((), jnp.int32)
        return MonitorCurvatureState(
            count=zero,
            num_records=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            record=self._empty(blocks.scalar_dtype(like), k),
            inner_state=inner_state,
            effective_start=_zeros(selected, like) if self._tracks_effective else None,
            leading_start=_zeros(selected, like),
        )

    def _ends_wanted(self) -> tuple[int, int]:
        """How many of the largest and of the smallest eigenvalues."""
        return (
            static_integer("num_directions", self.num_directions, 1),
            static_integer("num_smallest", self.num_smallest, 0),
        )

    def _products(self, num_leading: int, num_smallest: int) -> int:
        """Products of one operator in a record."""
        if self.num_products is not None:
            return static_integer("num_products", self.num_products, 1)
        return 4 + 2 * num_leading + 4 * num_smallest

    def _check(self, params: Any, selected: Any, inner_state: Any) -> None:
        """Raises where the settings do not fit the parameters or the optimizer."""
        size = blocks.dimension(selected)
        if not size:
            raise ValueError(f"{_NAME} was given no parameters to watch, only {params!r}.")
        limits = {"num_directions": size, "num_smallest": size // 2, "density_products": size}
        for name, most in limits.items():
            if getattr(self, name) > most:
                share = "half of " if name == "num_smallest" else ""
                raise ValueError(
                    f"`{name}` of {_NAME} is {getattr(self, name)}, more than {share}the "
                    f"{size} parameters that are watched: give at most {most}."
                )
        least = max(self._ends_wanted()[0], min(sum(self._ends_wanted()), size))
        if self._products(*self._ends_wanted()) < least:
            raise ValueError(
                f"`num_products` of {_NAME} is {self.num_products}, fewer than the {least} "
                "eigenvalues asked for: give more, or leave it out."
            )
        if self.preconditioner is not None:
            rate = self._rate(inner_state, jnp.zeros((), jnp.int32))
            check_preconditioner(_NAME, self.preconditioner, inner_state, params, rate)

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
            leading_residuals=zeros(k),
            smallest_eigenvalues=zeros(smallest, wanted=smallest > 0),
            smallest_residuals=zeros(smallest, wanted=smallest > 0),
            effective_sharpness=zeros(wanted=effective),
            effective_eigenvalues=zeros(k, wanted=effective),
            effective_residuals=zeros(k, wanted=effective),
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
        """The learning rate of a step, of which ``count`` came before."""
        if self.inner_learning_rate is not None:
            rate = value_of(self.inner_learning_rate, count)
            _check_scalar(rate)
            return rate
        found = [
            (jax.tree_util.keystr(path), rate)
            for path, rate in optax.tree.get_all_with_path(inner_state, "learning_rate")
            if isinstance(rate, jax.Array | np.ndarray)  # not the state of a schedule
        ]
        if not found:
            raise ValueError(
                f"{_NAME} needs the learning rate for the stability threshold of its "
                "`preconditioner`, and the state of the optimizer has none: give "
                "`inner_learning_rate=`, a number or the schedule, or make the optimizer with "
                "optax_accel.inject_hyperparams."
            )
        if len(found) > 1:
            raise ValueError(
                f"{_NAME} found {len(found)} learning rates in the state of the optimizer, at "
                f"{' and '.join(path for path, _ in found)}, and cannot tell which one the "
                "stability threshold is for: give `inner_learning_rate=`."
            )
        _check_scalar(found[0][1])
        return found[0][1]

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
        accumulation = _accumulation(inner_state)
        applied = updates
        if params is not None:
            for what, tree in (("updates", updates), ("`grad`", gradient)):
                if tree is not None:
                    check_vector(f"{_NAME}, {what}", params, tree, whose="the parameters")
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
        )
        whole = as_arrays(params)
        chosen = resolve(whole, self.mask)
        objective = objective.precompose(lambda part: merge(part, whole, chosen))
        diagonal = rate = None
        if self.preconditioner is not None:
            diagonal = select(self.preconditioner.diagonal(inner_state, whole), chosen)
            made = state.count if accumulation is None else accumulation.gradient_step
            rate = self._rate(inner_state, made)
        step = _Step(
            params=select(whole, chosen),
            update=select(applied, chosen),
            gradient=None if gradient is None else select(gradient, chosen),
            diagonal=diagonal,
            learning_rate=rate,
        )

        def recorded(old: MonitorCurvatureState) -> MonitorCurvatureState:
            return self._record(old, objective, step, state.count)

        kept = new._replace(inner_state=())  # not carried through a conditional
        if mode is None:
            due = self._is_due(state.count, accumulation, _accumulation(inner_state))
            kept = lax.cond(due, recorded, lambda old: old, kept)
        else:
            kept = recorded(kept)
        return applied, kept._replace(inner_state=inner_state)

    def _is_due(
        self,
        count: jax.Array,
        before: optax.MultiStepsState | None,
        after: optax.MultiStepsState | None,
    ) -> jax.Array:
        """Whether a step records.

        Around ``optax.MultiSteps`` only the last micro-step of each update applies one: it records
        where one of its micro-steps is due.
        """
        elapsed = count - self.start_step
        if before is None or after is None:
            return (elapsed >= 0) & (elapsed % self.every == 0)
        applies = after.gradient_step != before.gradient_step
        return applies & (elapsed >= 0) & (elapsed % self.every <= before.mini_step)

    def _record(
        self,
        old: MonitorCurvatureState,
        objective: Objective,
        step: _Step,
        count: jax.Array,
    ) -> MonitorCurvatureState:
        """The state with a new record, or with the old one where numbers are not finite."""
        params, before = step.params, old.record
        like = _vector_like(params)
        with differentiable(_NAME):
            value, own, squared_norm, parts = objective.value_and_grad_of_parts(params)
        product = objective.hessian(params)
        gradient = own if step.gradient is None else step.gradient
        direction, length = unit(step.update, like)
        slope, _ = unit(gradient, like)
        probes = static_integer("trace_probes", self.trace_probes, 0)
        key = jax.random.fold_in(jax.random.key(self.seed), count)
        (along, against), trace = quotients(product, [direction, slope], probes, key, like)
        leading = self._ends(product, old.leading_start, own, key, like, both=True)
        effective = leading
        if old.effective_start is not None:
            half, scaled = preconditioned(product, step.diagonal), _halved(own, step.diagonal)
            effective = self._ends(half, old.effective_start, scaled, key, like, both=False)
        predicted = -length * (vdot(_wide(own, like), direction) + length * along / 2)
        after = objective(optax.apply_updates(params, step.update))
        found: dict[str, Any] = {
            "recorded_step": count,
            "recorded_loss": value,
            "sharpness": leading.leading[0],
            "leading_eigenvalues": leading.leading,
            "leading_residuals": leading.leading_residuals,
            "update_curvature": along,
            "gradient_curvature": against,
            "update_alignment": alignment(direction, leading.leading_vectors),
            "gradient_alignment": alignment(slope, leading.leading_vectors),
            "predicted_decrease": predicted,
            "actual_decrease": value - after,
        }
        if self.preconditioner is not None:
            threshold = self._threshold(step.learning_rate, before.sharpness.dtype)
            found |= {
                "effective_sharpness": effective.leading[0],
                "effective_eigenvalues": effective.leading,
                "effective_residuals": effective.leading_residuals,
                "stability_threshold": threshold,
                "stability_ratio": effective.leading[0] / threshold,
            }
        if before.smallest_eigenvalues is not None:
            found["smallest_eigenvalues"] = leading.smallest
            found["smallest_residuals"] = leading.smallest_residuals
        if probes:
            found["hessian_trace"] = trace
        if before.density_nodes is not None:
            found |= self._density(before, product, key, like, old.num_records)
        if self.noise_scale:
            found |= self._noise(before, norm(own) ** 2, squared_norm, parts, old.num_records)
        valid = jnp.ones((), bool)
        for name, number in found.items():
            if name == "stability_threshold":  # infinite at rate 0
                valid &= ~jnp.isnan(number)
            elif name != "noise_scale":
                valid &= jnp.isfinite(number).all()

        def kept(new: Any, previous: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(valid, n.astype(o.dtype), o), new, previous)

        record = {name: kept(jnp.asarray(n), getattr(before, name)) for name, n in found.items()}
        starts: dict[str, Any] = {"leading_start": kept(leading.start, old.leading_start)}
        if old.effective_start is not None:
            starts["effective_start"] = kept(effective.start, old.effective_start)
        return old._replace(
            num_records=old.num_records + valid,
            num_skipped=old.num_skipped + ~valid,
            record=before._replace(**record),
            **starts,
        )

    def _ends(
        self, product: Any, start: Any, gradient: Any, key: jax.Array, like: Any, *, both: bool
    ) -> Spectrum:
        """The ends of one operator's spectrum."""
        num_leading, num_smallest = self._ends_wanted()
        num_smallest *= both
        num_products = self._products(num_leading, num_smallest)
        return spectrum_ends(
            product,
            start,
            gradient,
            num_leading,
            num_smallest,
            num_products=min(num_products, blocks.dimension(like)),
            key=jax.random.fold_in(key, 2),
            like=like,
        )

    def _threshold(self, rate: Any, dtype: Any) -> jax.Array:
        """The stability threshold of a learning rate."""
        assert self.preconditioner is not None
        # Of an array, because Python's own division raises at rate 0.
        return jnp.asarray(self.preconditioner.threshold(jnp.asarray(rate, dtype)))

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


def _accumulation(inner_state: Any) -> optax.MultiStepsState | None:
    """The state of ``optax.MultiSteps`` in that of the optimizer, if there is one."""

    def is_one(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    found = [node for node in jax.tree.leaves(inner_state, is_leaf=is_one) if is_one(node)]
    return found[0] if len(found) == 1 else None


def _check_scalar(rate: Any) -> None:
    if jnp.shape(rate) != ():
        raise ValueError(
            f"the learning rate of {_NAME} must be one number, got an array of shape "
            f"{jnp.shape(rate)}."
        )


def _vector_like(params: chex.ArrayTree) -> chex.ArrayTree:
    """Shapes of the parameters in the dtypes of the linear algebra, at least float32."""

    def like(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(like, params)


def _zeros(params: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """A vector of zeros, placed like the parameters."""
    return jax.tree.map(lambda p, x: jnp.zeros_like(p, dtype=x.dtype), params, like)


def _halved(gradient: chex.ArrayTree, diagonal: chex.ArrayTree) -> chex.ArrayTree:
    """The gradient in the coordinates of the preconditioned operator."""
    return jax.tree.map(lambda g, d: g.astype(d.dtype) / jnp.sqrt(d), gradient, diagonal)


def _wide(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map(lambda leaf, x: leaf.astype(x.dtype), tree, like)
