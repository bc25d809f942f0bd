"""Data parallelism in four modes behind one interface, in one process or in many.

* ``jit``: global view. The step is written for the whole batch, the batch is sharded over the mesh,
  the state is replicated, and the compiler inserts the collectives. The default.
* ``fsdp``: the same, with parameters and optimizer state sharded over the same devices: each holds
  its part of every large array, eigenbases included, and the compiler gathers what a computation
  needs: activations where the batch is small, else one parameter at a time, and in a step that
  refreshes an eigenbasis that parameter's leaf of the basis with it.
* ``shard_map``: the step is written for one device's part of the batch and averages over
  ``axis_name``.
* ``pmap``: the same step, with a copy of the state per device along a leading axis; JAX keeps it in
  maintenance, and many code bases still use it.

Methods whose workers hold parameters of their own run with ``workers=n``: the state has a leading
axis of workers, and the step sees one worker's state and part of the batch.

On a CPU mesh steps that are queued without waiting can hang: fetch a metric at least every
`FETCH_EVERY` steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import cli
from optax_accel.sharding import shardings_like

PyTree = Any
AXIS = "batch"
MODES = ("jit", "fsdp", "pmap", "shard_map")
FETCH_EVERY = 16
# Parameters with fewer elements stay replicated in the mode ``fsdp``: each sharded array costs a
# collective of its own, and those of the models here that are smaller (biases, normalization, small
# heads) hold a few per cent of the parameters.
MIN_SHARDED_SIZE = 2**12


def check_divisible(size: int, parts: int, option: str, what: str = "devices") -> None:
    """Raises ``ValueError`` naming ``option`` if a batch does not split evenly over the devices."""
    if size % parts:
        below = size - size % parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        raise ValueError(
            f"{option} {size} does not split evenly over {parts} {what}; use e.g. {nearest}"
        )


def check_memory(need: float, what: str, devices: Sequence[jax.Device]) -> None:
    """Raises `UsageError` for what cannot fit into the memory of the devices, before it is made.

    Args:
      need: bytes, over all devices.
      what: what takes them, for the message.
      devices: the devices; virtual ones share the memory of the machine.
    """
    statistics = [] if devices[0].platform == "cpu" else [d.memory_stats() for d in devices]
    limits = [memory["bytes_limit"] for memory in statistics if memory]
    available = sum(limits) if limits else cli.host_memory() * jax.process_count()
    cli.check_memory(need, what, available)


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
    """Runs a training step on several devices, of this process or of all.

    A state is in *global view* as the step of one device would see it (with workers, behind a
    leading axis of workers), and *placed* as :meth:`step` takes it.

    >>> def step(state, batch, curvature, *, refresh, axis_name):
    ...     mean = jnp.mean(batch)
    ...     mean = mean if axis_name is None else lax.pmean(mean, axis_name)
    ...     return state + mean, {"mean": mean}
    >>> parallel = Parallel("shard_map", jax.devices()[:1], step)
    >>> state = parallel.init(lambda: jnp.zeros(()))
    >>> state, metrics = parallel.step(state, parallel.put_batch(np.arange(4.0)))
    >>> float(parallel.get_state(state)), float(metrics["mean"])
    (1.5, 1.5)

    Args:
      mode: one of `MODES`.
      devices: the devices; the batch is split evenly over them. In a run of several processes those
        of all of them, the same in each process.
      step: the step. It is given ``axis_name="batch"`` in the modes where it sees one device's
        part of the batch, and has to return the same state and metrics on all of them.
      workers: number of workers with a state of their own; ``None`` if all devices compute one
        state. The step sees one worker's state and part of the batch, with ``axis_name``, and
        returns that worker's state. Equal to the number of devices (``shard_map``, ``pmap``) or a
        multiple of it (``jit``, which maps over the workers, so that one device can simulate any
        number).
      min_sharded_size: for ``fsdp``: parameters with fewer elements are replicated.

    Raises:
      ValueError: unknown mode, or workers that do not fit the mode or the devices.
    """

    def __init__(
        self,
        mode: str,
        devices: Sequence[jax.Device],
        step: Step,
        *,
        workers: int | None = None,
        min_sharded_size: int = MIN_SHARDED_SIZE,
    ):
        if mode not in MODES:
            raise ValueError(f"unknown parallel mode {mode!r}; valid modes are {', '.join(MODES)}")
        _check_workers(mode, len(devices), workers)
        self.mode = mode
        self.workers = workers
        mesh = jax.make_mesh(
            (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        self.mesh = mesh
        self.replicated = jax.NamedSharding(mesh, jax.P())
        self.sharded = jax.NamedSharding(mesh, jax.P(AXIS))
        self._local_devices = sum(d.process_index == jax.process_index() for d in devices)
        self._min_sharded_size = min_sharded_size
        self._step = step
        self._compiled: dict[bool | str | None, Any] = {}
        # Leading axis of a placed state, spread over the devices.
        self._copies = mesh.size if mode == "pmap" else workers
        self._broadcast = jax.jit(self._with_copies, out_shardings=self.sharded)
        self._first = jax.jit(_first_copy, out_shardings=self.replicated)
        self._mean = jax.jit(mean_of_copies, out_shardings=self.replicated)

    def init(self, make_state: Callable[[], PyTree]) -> PyTree:
        """A placed state, computed where it lies: no device ever holds what it does not keep.

        Args:
          make_state: a pure function; what it returns is one worker's state, the same for all.
        """
        if self._copies is None:
            placement = self._placement(jax.eval_shape(make_state))
            return jax.jit(make_state, out_shardings=placement)()
        make_copies = jax.jit(lambda: self._with_copies(make_state()), out_shardings=self.sharded)
        return self._to_native(make_copies())

    def abstract_state(self, make_state: Callable[[], PyTree]) -> PyTree:
        """Shapes, dtypes and shardings of the state in global view, to restore a checkpoint into.

        Args:
          make_state: as for :meth:`init`.
        """
        state = jax.eval_shape(make_state)
        if self.workers is not None:
            state = jax.eval_shape(self._with_copies, state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self._placement(state),
        )

    def put_state(self, state: PyTree) -> PyTree:
        """A placed copy of a state in global view; :meth:`step` consumes the copy."""
        placed = jax.tree.map(_put, state, self._placement(state))
        if self.mode == "pmap" and self.workers is None:
            # The leading axis only exists spread over the devices, never on one of them.
            placed = self._broadcast(placed)
        return self._to_native(placed)

    def get_state(self, state: PyTree) -> PyTree:
        """A placed state in global view, e.g. to save it."""
        state = self._to_global(state)
        return self._first(state) if self.mode == "pmap" and self.workers is None else state

    def consensus(self, state: PyTree) -> PyTree:
        """What to evaluate of a placed state, in global view without an axis of workers.

        With workers the mean over them of what is floating point, and worker 0's other leaves.
        """
        if self.workers is None:
            return self.get_state(state)
        return self._mean(self._to_global(state))

    def shape_batch(self, batch: PyTree) -> PyTree:
        """Gives arrays with a leading batch axis the shape that :meth:`step` wants."""
        if self.mode == "pmap":  # wants the devices as an axis of their own
            return _split(batch, self._local_devices)
        return batch

    def put_batch(self, batch: PyTree) -> PyTree:
        """Shapes and places arrays with a leading batch axis for :meth:`step`.

        Args:
          batch: this process's rows of the global batch, as many in each process. The devices of
            a process get its rows in their order in the mesh.

        Raises:
          ValueError: the rows do not split evenly.
        """
        parts = (self.workers or self.mesh.size) * self._local_devices // self.mesh.size
        for rows in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
            check_divisible(rows, parts, "a batch of", "devices or workers")
        shaped = self.shape_batch(batch)
        with jax.transfer_guard("allow"):  # this is the transfer that is meant
            return jax.make_array_from_process_local_data(self.sharded, shaped)

    def put_whole(self, batch: PyTree) -> PyTree:
        """Places arrays that all processes have alike, in global view.

        Args:
          batch: arrays with a leading batch axis, spread over the devices if it splits evenly.
        """

        def put(part: np.ndarray) -> jax.Array:
            sharding = self.replicated if len(part) % self.mesh.size else self.sharded
            return jax.make_array_from_callback(part.shape, sharding, part.__getitem__)

        with jax.transfer_guard("allow"):
            return jax.tree.map(put, batch)

    def step(
        self,
        state: PyTree,
        batch: PyTree,
        curvature: PyTree = None,
        refresh: bool | str | None = None,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """One step.

        Args:
          state: from :meth:`init`, :meth:`put_state` or the previous step; its buffers are
            overwritten.
          batch: from :meth:`put_batch`.
          curvature: another batch from :meth:`put_batch`, or ``None``.
          refresh: static: each value is a program of its own, compiled at its first use.

        Returns:
          The new state and the metrics, scalars in global view. With workers those that the step
          did not average: the mean over the workers where floating point, else worker 0's.
        """
        return self._program(refresh, state)(state, batch, curvature)

    def lower(
        self,
        state: PyTree,
        batch: PyTree,
        curvature: PyTree = None,
        refresh: bool | str | None = None,
    ) -> Any:
        """The program of one step, lowered for the compiler and not run.

        Args:
          state: the state before the step; abstract arrays will do, here and below.
          batch: from :meth:`put_batch`.
          curvature: another batch from :meth:`put_batch`, or ``None``.
          refresh: static: each value is a program of its own.

        Returns:
          What ``jax.jit(f).lower(...)`` returns.
        """
        return self._program(refresh, state).lower(state, batch, curvature)

    def _program(self, refresh: bool | str | None, state: PyTree) -> Any:
        if refresh not in self._compiled:
            self._compiled[refresh] = self._compile(refresh, state)
        return self._compiled[refresh]

    def _compile(self, refresh: bool | str | None, state: PyTree) -> Any:
        per_worker = self.workers is not None
        axis_name = None if self.mode in ("jit", "fsdp") and not per_worker else AXIS

        def step(state: PyTree, batch: PyTree, curvature: PyTree) -> Any:
            state, metrics = self._step(
                state, batch, curvature, refresh=refresh, axis_name=axis_name
            )
            if per_worker:
                metrics = jax.tree.map(self._agreed, metrics)
            return state, metrics

        def one_worker(state: PyTree, batch: PyTree, curvature: PyTree) -> Any:
            worker = jax.tree.map(lambda a: lax.squeeze(a, (0,)), state)
            worker, metrics = step(worker, batch, curvature)
            return jax.tree.map(lambda a: lax.expand_dims(a, (0,)), worker), metrics

        def all_workers(state: PyTree, batch: PyTree, curvature: PyTree) -> Any:
            parts = _split((batch, curvature), self.workers)
            mapped = jax.vmap(step, axis_name=AXIS, out_axes=(0, None))
            return mapped(state, *parts)

        if self.mode == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS,
                out_axes=(0, None),
                donate_argnums=0,
                devices=list(np.ravel(self.mesh.devices)),
            )
        if self.mode == "shard_map":
            spec = jax.P(AXIS) if per_worker else jax.P()
            mapped = jax.shard_map(
                one_worker if per_worker else step,
                mesh=self.mesh,
                in_specs=(spec, jax.P(AXIS), jax.P(AXIS)),
                out_specs=(spec, jax.P()),
            )
            return jax.jit(mapped, donate_argnums=0)
        return jax.jit(
            all_workers if per_worker else step,
            donate_argnums=0,
            out_shardings=(self._placement(state), self.replicated),
        )

    def _agreed(self, metric: jax.Array) -> jax.Array:
        """One value for all workers; no communication where it is known to be one already."""
        if self.mode == "shard_map":
            with contextlib.suppress(ValueError):  # it varies
                lax.pcast(metric, AXIS, to="varying")
                return metric
        if jnp.issubdtype(metric.dtype, jnp.inexact):
            return lax.pmean(metric, AXIS)
        first = jnp.where(lax.axis_index(AXIS) == 0, metric, jnp.zeros_like(metric))
        return lax.psum(first.astype(jnp.int32), AXIS).astype(metric.dtype)

    def _placement(self, state: PyTree) -> PyTree:
        """The sharding of each leaf of a state in global view."""
        if self.mode == "fsdp":
            params = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=self._parameter_sharding(leaf.shape)
                ),
                getattr(state, "params", state),
            )
            return shardings_like(state, params)
        sharding = self.replicated if self.workers is None else self.sharded
        return jax.tree.map(lambda _: sharding, state)

    def _parameter_sharding(self, shape: tuple[int, ...]) -> jax.NamedSharding:
        """Along the largest axis that splits evenly; the last of several."""
        axes = [axis for axis, size in enumerate(shape) if size % self.mesh.size == 0]
        if not axes or math.prod(shape) < max(self._min_sharded_size, 1):
            return self.replicated
        axis = max(axes, key=lambda axis: (shape[axis], axis))
        return jax.NamedSharding(self.mesh, jax.P(*[None] * axis, AXIS))

    def _with_copies(self, state: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self._copies, *a.shape)), state)

    # `pmap` takes and gives arrays of this process alone, one row for each of its devices.

    def _to_native(self, state: PyTree) -> PyTree:
        if self.mode != "pmap" or self._local_devices == self.mesh.size:
            return state
        local = jax.NamedSharding(self.mesh.local_mesh, jax.P(AXIS))
        return jax.tree.map(lambda a: _rewrap(a, self._local_devices, local), state)

    def _to_global(self, state: PyTree) -> PyTree:
        if self.mode != "pmap" or self._local_devices == self.mesh.size:
            return state
        return jax.tree.map(lambda a: _rewrap(a, self.mesh.size, self.sharded), state)


def _check_workers(mode: str, num_devices: int, workers: int | None) -> None:
    if workers is None:
        return
    if mode == "fsdp":
        raise ValueError(
            f"mode fsdp shares one state among all devices, got workers={workers}; use jit, "
            "shard_map or pmap for workers with a state of their own"
        )
    if mode == "jit":
        if workers < 1 or workers % num_devices:
            raise ValueError(
                f"mode jit needs a multiple of the {num_devices} devices as workers, got {workers}"
            )
    elif workers != num_devices:
        raise ValueError(
            f"mode {mode} runs one worker a device, got workers={workers} on {num_devices} "
            "devices; use the mode jit to simulate more"
        )


def _put(leaf: Any, sharding: jax.NamedSharding) -> jax.Array:
    """A copy of an array on the devices; each receives its own part only."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
    # NumPy does not know random keys.
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    value = leaf if is_key else np.asarray(leaf)
    # Copied, because the step is given these buffers to overwrite, and two leaves of the state
    # may share one.
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index].copy())


def _rewrap(array: jax.Array, rows: int, sharding: jax.NamedSharding) -> jax.Array:
    """The same buffers, one row a device, as an array of other devices besides this process's."""
    return jax.make_array_from_single_device_arrays(
        (rows, *array.shape[1:]), sharding, [shard.data for shard in array.addressable_shards]
    )


def _split(batch: PyTree, parts: int | None) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)


def _first_copy(state: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[0], state)


def mean_of_copies(state: PyTree) -> PyTree:
    """The mean over the leading axis of what is floating point, and the first of other leaves."""
    return jax.tree.map(
        lambda a: jnp.mean(a, axis=0) if jnp.issubdtype(a.dtype, jnp.inexact) else a[0], state
    )
