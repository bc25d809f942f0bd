"""Data parallelism in three modes behind one interface.

* ``jit``: global view. The step is written for the whole batch, the batch is sharded over the mesh,
  the state is replicated, and the compiler inserts the collectives. The default.
* ``shard_map``: the step is written for one device's part of the batch and averages over
  ``axis_name``.
* ``pmap``: the same step, with a copy of the state per device along a leading axis; JAX keeps it in
  maintenance, and many code bases still use it.

On a CPU mesh steps that are queued without waiting can hang: fetch a metric at least every
`FETCH_EVERY` steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
AXIS = "batch"
MODES = ("jit", "pmap", "shard_map")
FETCH_EVERY = 16


def check_divisible(size: int, num_devices: int, option: str) -> None:
    """Raises ``ValueError`` naming ``option`` if a batch does not split evenly over the devices."""
    if size % num_devices:
        below = size - size % num_devices
        nearest = f"{below} or {below + num_devices}" if below else f"{num_devices}"
        raise ValueError(
            f"{option} {size} does not split evenly over {num_devices} devices; use e.g. {nearest}"
        )


class Step(Protocol):
    """A training step: pure; ``refresh`` and ``axis_name`` are static."""

    def __call__(
        self,
        state: PyTree,
        batch: PyTree,
        curvature: PyTree,
        *,
        refresh: bool | str | None,
        axis_name: str | None,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Returns the new state and scalar metrics."""


class Parallel:
    """Runs a training step on several devices.

    Args:
      mode: one of `MODES`.
      devices: the devices; the batch is split evenly over them.
      step: the step. It is given ``axis_name="batch"`` in the modes where it sees one device's
        part of the batch, and has to return the same state and metrics on all of them.

    Raises:
      ValueError: unknown mode or no device.
    """

    def __init__(self, mode: str, devices: Sequence[jax.Device], step: Step):
        if mode not in MODES:
            raise ValueError(f"unknown parallel mode {mode!r}; valid modes are {', '.join(MODES)}")
        self.mode = mode
        mesh = jax.make_mesh(
            (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        self.mesh = mesh
        self.replicated = jax.NamedSharding(mesh, jax.P())
        self.sharded = jax.NamedSharding(mesh, jax.P(AXIS))
        self._step = step
        self._compiled: dict[bool | str | None, Any] = {}

    def shape_batch(self, batch: PyTree) -> PyTree:
        """Gives arrays with a leading batch axis the shape that :meth:`step` wants."""
        if self.mode == "pmap":  # wants the devices as an axis of their own
            return jax.tree.map(lambda a: a.reshape(self.mesh.size, -1, *a.shape[1:]), batch)
        return batch

    def put_batch(self, batch: PyTree) -> PyTree:
        """Shapes and places arrays with a leading batch axis for :meth:`step`."""
        return jax.device_put(self.shape_batch(batch), self.sharded)

    def put_state(self, state: PyTree) -> PyTree:
        """A copy of the state on every device, for :meth:`step`, which consumes it."""
        if self.mode == "pmap":
            # The leading axis only exists spread over the devices, never on one of them.
            copies = jax.jit(
                lambda tree: jax.tree.map(
                    lambda a: jnp.broadcast_to(a, (self.mesh.size, *a.shape)), tree
                ),
                out_shardings=self.sharded,
            )
            return copies(jax.device_put(state, self.replicated))
        # Copied, because the step is given these buffers to overwrite, and two leaves of the
        # state may share one.
        return jax.device_put(jax.tree.map(lambda a: a.copy(), state), self.replicated)

    def get_state(self, state: PyTree) -> PyTree:
        """The state in global view (no leading axis, replicated), e.g. to evaluate or save."""
        if self.mode == "pmap":
            first = jax.jit(
                lambda tree: jax.tree.map(lambda a: a[0], tree), out_shardings=self.replicated
            )
            return first(state)
        return state

    def step(
        self,
        state: PyTree,
        batch: PyTree,
        curvature: PyTree = None,
        refresh: bool | str | None = None,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """One step.

        Args:
          state: from :meth:`put_state` or the previous step; its buffers are overwritten.
          batch: from :meth:`put_batch`.
          curvature: another batch from :meth:`put_batch`, or ``None``.
          refresh: static: each value is a program of its own, compiled at its first use.

        Returns:
          The new state and the metrics, scalars in global view.
        """
        if refresh not in self._compiled:
            self._compiled[refresh] = self._compile(refresh)
        return self._compiled[refresh](state, batch, curvature)

    def _compile(self, refresh: bool | str | None) -> Any:
        axis_name = None if self.mode == "jit" else AXIS

        def step(state: PyTree, batch: PyTree, curvature: PyTree) -> Any:
            return self._step(state, batch, curvature, refresh=refresh, axis_name=axis_name)

        if self.mode == "jit":
            return jax.jit(step, donate_argnums=0, out_shardings=self.replicated)
        if self.mode == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS,
                out_axes=(0, None),
                donate_argnums=0,
                devices=list(np.ravel(self.mesh.devices)),
            )
        mapped = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=(jax.P(), jax.P(AXIS), jax.P(AXIS)),
            out_specs=jax.P(),
        )
        return jax.jit(mapped, donate_argnums=0)
