"""Projections onto the dominant and the bulk subspace: both ends of the interpolation."""

from __future__ import annotations

import optax

from optax_accel._masking import Mask
from optax_accel.curvature import Tracker
from optax_accel.subspace._metric import Metric
from optax_accel.subspace.interpolation import interpolate_subspaces


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
