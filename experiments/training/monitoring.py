"""The monitor of a run's curvature: what it watches, when it records, which metrics it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_accel as oa
from experiments.training.step import TrainState
from optax_accel.curvature import (
    Preconditioner,
    adagrad_preconditioner,
    adam_preconditioner,
    rmsprop_preconditioner,
    sgd_preconditioner,
)
from optax_accel.refresh import of_damping, of_eigenspace, of_factors, of_monitor

PyTree = Any
# The methods of the catalogue whose stability threshold is known, with what they divide steps by.
PRECONDITIONERS: Mapping[str, Preconditioner] = {
    "plain_sgd": sgd_preconditioner(),
    "sgd": sgd_preconditioner(momentum=0.9),
    "nesterov_sgd": sgd_preconditioner(momentum=0.9, nesterov=True),
    "adam": adam_preconditioner(),
    "adamw": adam_preconditioner(),
    "nadam": adam_preconditioner(nesterov=True),
    "rmsprop": rmsprop_preconditioner(),
    "adagrad": adagrad_preconditioner(),
}
# Numbers of a record that are no metrics of their own.
_NOT_SHOWN = ("recorded_step", "recorded_loss", "noise_moments", "density_nodes", "density_weights")
_PLURALS = {
    "leading_eigenvalues": "eigenvalue",
    "leading_residuals": "eigenvalue_residual",
    "smallest_eigenvalues": "smallest_eigenvalue",
    "smallest_residuals": "smallest_eigenvalue_residual",
    "effective_eigenvalues": "effective_eigenvalue",
    "effective_residuals": "effective_eigenvalue_residual",
}


def watch(
    tx: optax.GradientTransformation,
    method: str,
    learning_rate: float,
    *,
    every: int,
    parts: int = 1,
    batch_size: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Puts the monitor around an optimizer.

    Args:
      tx: the optimizer.
      method: name of the method in it; those in `PRECONDITIONERS` get an effective sharpness.
      learning_rate: its learning rate.
      every: steps between records.
      parts: parts in which a step sees its batch; from two on the noise scale is estimated.
      batch_size: examples in a batch.

    Returns:
      The optimizer, whose state is an `optax_accel.MonitorCurvatureState`.
    """
    return oa.monitor_curvature(
        tx,
        every=every,
        preconditioner=PRECONDITIONERS.get(method),
        inner_learning_rate=learning_rate,
        num_smallest=1,
        noise_scale=parts > 1,
        batch_size=batch_size,
    )


def joined_refresh(refresh: Any, step: int, every: int) -> Any:
    """The argument ``refresh`` of a step with that of the monitor joined to it.

    >>> joined_refresh(None, 0, 9), joined_refresh(None, 1, 9)
    (True, False)
    >>> joined_refresh("warm", 1, 100)
    Refresh(eigenspace='warm', factors=True, inverses=True, damping=True, monitor=False)

    Args:
      refresh: the argument for the method; None for one without curvature.
      step: zero-based number of the step.
      every: steps between records.

    Returns:
      A static value that means the same to the method.
    """
    if refresh == "sample":
        return refresh
    monitor = step % every == 0
    if refresh is None:
        return monitor
    factors = of_factors(refresh)
    return oa.Refresh(
        eigenspace=of_eigenspace(refresh),
        factors=bool(factors),
        inverses=factors == "inverses",
        damping=of_damping(refresh),
        monitor=monitor,
    )


def without_records(state: TrainState, refresh: Any) -> TrainState:
    """The state that a step needs: without what the monitor keeps where it records nothing.

    Args:
      state: the state before the step.
      refresh: the step's argument.

    Returns:
      The state; the same one without a monitor and for a step that may record.
    """
    monitor = state.opt_state
    if not isinstance(monitor, oa.MonitorCurvatureState) or of_monitor(refresh) is not False:
        return state
    return state._replace(opt_state=monitor.without_records())


def with_records(state: TrainState, before: TrainState) -> TrainState:
    """The whole state after a step of `without_records`.

    Args:
      state: the state after the step.
      before: the state before it.

    Returns:
      The state.
    """
    monitor = state.opt_state
    if not isinstance(monitor, oa.MonitorCurvatureState) or monitor.record is not None:
        return state
    return state._replace(opt_state=monitor.with_records_of(before.opt_state))


def metrics(opt_state: PyTree) -> dict[str, jax.Array]:
    """What the monitor recorded in the last step, NaN where it recorded nothing.

    Args:
      opt_state: the state of the optimizer.

    Returns:
      Scalars by names such as ``monitor/sharpness``; none without a monitor, and of a state
      `without_records` only how many records were left out.
    """
    if not isinstance(opt_state, oa.MonitorCurvatureState):
        return {}
    skipped = {"monitor/skipped": opt_state.num_skipped}
    record = opt_state.record
    if record is None:
        return skipped
    new = record.recorded_step == opt_state.count - 1
    named: dict[str, jax.Array] = {}
    for name, value in record._asdict().items():
        if value is None or name in _NOT_SHOWN:
            continue
        if name not in _PLURALS:
            named[name] = value
            continue
        for i in range(value.shape[0]):
            named[f"{_PLURALS[name]}_{i + 1}"] = value[i]
    shown = {f"monitor/{name}": jnp.where(new, value, jnp.nan) for name, value in named.items()}
    return shown | skipped
