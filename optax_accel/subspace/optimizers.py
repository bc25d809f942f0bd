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

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from optax_accel._arguments import check_learning_rate, check_number, value_of
from optax_accel._masking import Mask, with_fixed_leaves
from optax_accel.curvature import Preconditioner, Tracker
from optax_accel.subspace._metric import Metric, chain_in_metric, check_metric
from optax_accel.subspace.interpolation import interpolate_subspaces

BaseOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


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
        at the edge of stability and 1 those half way there (ours). With
        ``metric="preconditioned"`` it is ``c / 2`` times the stability threshold of the
        ``preconditioner``, which of Adam is ``38 / learning_rate``: 2 is the edge in both.
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
        threshold = _of_descent if preconditioner is None else preconditioner.threshold
        min_eigenvalue = functools.partial(
            _share_of_edge, sharpness_factor, threshold, learning_rate
        )

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
        at the edge of stability and 1 those half way there (ours). With
        ``metric="preconditioned"`` it is ``c / 2`` times the stability threshold of the
        ``preconditioner``, which of Adam is ``38 / learning_rate``: 2 is the edge in both.
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
        at the edge of stability and 1 those half way there (ours). With
        ``metric="preconditioned"`` it is ``c / 2`` times the stability threshold of the
        ``preconditioner``, which of Adam is ``38 / learning_rate``: 2 is the edge in both.
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


def _of_descent(rate: chex.Numeric) -> chex.Numeric:
    """The stability threshold of gradient descent."""
    return 2 / rate


def _share_of_edge(
    factor: chex.Numeric,
    threshold: Callable[[chex.Numeric], chex.Numeric],
    learning_rate: optax.ScalarOrSchedule,
    count: jax.Array,
) -> jax.Array:
    """``factor / 2`` times the threshold; infinite at rate 0, where nothing is unstable."""
    rate = jnp.asarray(value_of(learning_rate, count), jnp.float32)
    return jnp.asarray(factor, jnp.float32) / 2 * jnp.asarray(threshold(rate), jnp.float32)
