"""Solvers of the package optimistix in place of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

_TINY = 1e-8  # as in `solvers`


def is_optimistix_solver(value: Any) -> bool:
    """Whether a value is an instance of a class of optimistix, or of one derived from it.

    Args:
      value: anything; optimistix need not be installed.
    """
    return any(kind.__module__.split(".")[0] == "optimistix" for kind in type(value).__mro__)


def solve_by_optimistix(
    solver: Any,
    f: Callable[[chex.ArrayTree], chex.ArrayTree],
    z0: chex.ArrayTree,
    *,
    batched: bool,
    axis_name: str | None,
    differentiable: bool,
) -> tuple[chex.ArrayTree, dict[str, jax.Array]]:
    """Finds a fixed point by ``optimistix.fixed_point``, with all examples as one problem.

    Args:
      solver: of optimistix: a fixed-point solver, a root finder, a least-squares solver or a
        minimizer. Its own tolerances decide; the most steps are optimistix's 256.
      f: maps a state to one of the same structure, shapes and dtypes.
      z0: where it starts.
      batched: whether the first axis of all arrays are the examples.
      axis_name: has to be None.
      differentiable: whether reverse mode has to go through the steps.

    Returns:
      The state, and the fields of a report. All examples have the same ``steps`` and
      ``converged``, and ``residuals`` holds the last one only: optimistix does not tell more.

    Raises:
      ValueError: ``axis_name`` is given.
    """
    if axis_name is not None:
        raise ValueError(
            f"`axis_name` {axis_name!r} needs a solver of optax_accel.equilibrium: those of "
            "optimistix stop on each device by itself."
        )
    optimistix: Any = importlib.import_module("optimistix")
    kind = "RecursiveCheckpointAdjoint" if differentiable else "ImplicitAdjoint"
    found = optimistix.fixed_point(
        lambda z, _: f(z), solver, z0, adjoint=getattr(optimistix, kind)(), throw=False
    )
    z = found.value
    image = f(z)
    squares = _squares(jax.tree.map(jnp.subtract, image, z), batched)
    residual = jnp.sqrt(squares)
    converged = found.result == optimistix.RESULTS.successful
    report = {
        "residual": residual,
        "relative_residual": residual / (jnp.sqrt(_squares(image, batched)) + _TINY),
        "steps": jnp.broadcast_to(jnp.asarray(found.stats["num_steps"], jnp.int32), residual.shape),
        "converged": jnp.broadcast_to(jnp.asarray(converged), residual.shape),
        "residuals": residual[None],
    }
    return z, jax.lax.stop_gradient(report)


def _squares(tree: chex.ArrayTree, batched: bool) -> jax.Array:
    """The squared norm of each example, in at least float32."""
    total: jax.Array | float = 0.0
    for leaf in jax.tree.leaves(tree):
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        total = total + jnp.sum(wide**2, axis=tuple(range(int(batched), leaf.ndim)))
    return jnp.asarray(total)
