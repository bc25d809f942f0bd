"""Orbax checkpoints of a training run: the one place that knows Orbax.

A checkpoint holds the leaves of a pytree by name and a JSON record (where the data iterator
stands; name, shape, dtype and fingerprint of each leaf). Stored by name, a state needs nothing but
arrays in it, whatever tuples and dictionaries it is made of; restored into a target, it comes back
with the target's structure, and a target of another structure is refused instead of half-filled.

Orbax writes in the background, under a temporary name that becomes the final one when all is on
disk; what a killed run leaves under a temporary name is never read and goes with the next save.
Array data on disk carries no checksum there: a flipped bit would come back as a wrong number. So
each leaf has a fingerprint, computed where it lives before it is saved and again after it was
restored, the same for any sharding.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

PyTree = Any

# A damaged checkpoint steps aside under this name when its step is about to be done again.
DAMAGED = ".damaged"
UNFINISHED = ".orbax-checkpoint-tmp"

# What goes wrong is raised or said through `warn`, once; Orbax would add a traceback per thread.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CheckpointError(ValueError):
    """A checkpoint cannot be saved, or does not fit; the message is one line."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: the step it was saved at.
      state: the state, like the target it was restored into.
      data: the record given to :meth:`Checkpoints.save`, e.g. the data iterator's state.
    """

    step: int
    state: PyTree
    data: Any


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run; a context manager.

    In a run of several processes all of them make the same calls with the same directory, which
    all of them can read and write.

    Args:
      directory: where they are kept; made when it does not exist.
      keep: how many of the latest to keep.
      warn: is given a line for each damaged checkpoint that `restore` passes over; default: prints
        it on the standard error output.

    Raises:
      CheckpointError: the directory cannot be made or read.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from experiments.runs.checkpoints import Checkpoints
      >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(10, state, data={"next_index": 10})
      ...     restored = checkpoints.restore(jax.eval_shape(lambda: state))
      >>> restored.step, restored.state["w"].tolist(), restored.data
      (10, [0.0, 1.0, 2.0], {'next_index': 10})
    """

    def __init__(
        self, directory: str | Path, keep: int = 3, *, warn: Callable[[str], None] = _to_stderr
    ):
        self._directory = Path(directory).absolute()
        self._warn = warn
        self._damaged: set[int] = set()  # found by `restore`, still under their own names
        self._pending: int | None = None
        self._tidy = False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = _Manager(
                self._directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot keep checkpoints in {self._directory}: {_reason(error)}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            self._warn(str(failure))  # the error under way says more

    def close(self) -> None:
        """Waits as `wait` does and ends the background threads.

        Raises:
          CheckpointError: the save under way failed.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # says again what `wait` has said
                self._manager.close()

    def latest(self) -> int | None:
        """The step of the latest checkpoint, ``None`` if there is none.

        One that is being saved counts, one that `restore` found damaged does not.
        """
        return max(self._steps(), default=None)

    def save(self, step: int, state: PyTree, data: Any = None) -> None:
        """Saves a checkpoint in the background, after the save before it.

        Returns when the state has been read: its buffers may be donated to the next step. (Where
        the host shares memory with the device, as on a CPU, JAX makes the donating step leave the
        buffers alone until they are written.)

        Args:
          step: number of steps done; the latest step is left as it is.
          state: a pytree of arrays, random keys included.
          data: anything JSON can hold, e.g. the state of a Grain iterator.

        Raises:
          CheckpointError: this save or the one before it failed, or there is a checkpoint of a
            later step. Complete checkpoints are left as they are.
        """
        self.wait()
        latest = self.latest()
        if step == latest:
            return
        if latest is not None and step < latest:
            raise CheckpointError(
                f"cannot save step {step}: {self._directory} holds a checkpoint of step {latest}"
            )
        leaves = _named_leaves(state)
        kinds = _kinds(leaves)
        record = json.dumps(
            {
                "data": data,
                "leaves": {name: [kinds[name], fingerprint(x)] for name, x in leaves.items()},
            }
        )
        try:
            self._make_way()
            # Forced: Orbax would leave out, silently, a step it finds inconvenient.
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_without_empty(leaves)),
                    meta=ocp.args.JsonSave(
                        {"record": record, "crc32": zlib.crc32(record.encode())}
                    ),
                ),
                force=True,
            )
        except Exception as error:
            raise self._not_saved(step, error) from error
        self._pending = step

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          CheckpointError: saving it failed. Complete checkpoints are left as they are.
        """
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(step, error) from error
        if step is not None and jax.process_index() == 0:
            for path in self._directory.glob(f"*{DAMAGED}"):
                number = path.name.removesuffix(DAMAGED)
                if number.isdecimal() and int(number) <= step:
                    shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the first one first; those found damaged do not count."""
        return sorted(self._steps())

    def restore(self, target: PyTree, at: int | None = None) -> Restored:
        """Restores the latest checkpoint that is whole.

        A damaged one is passed over, with a line to `warn`. It stays on disk until a later save
        has reached its step again, under another name from the next save on.

        Args:
          target: a pytree of arrays or ``jax.ShapeDtypeStruct`` like the one saved; leaves come
            back with its shardings; where it names none, on the first device (on all devices in a
            run of several processes).
          at: the last step that counts as one of them; default: all count.

        Returns:
          The step, the state and the record.

        Raises:
          CheckpointError: there is no checkpoint, all are damaged, or the leaves are not those of
            the target; the message names the first that differs.
        """
        self.wait()
        leaves = _named_leaves(target)
        kinds = _kinds(leaves)
        if not self._steps():
            raise CheckpointError(f"no checkpoint in {self._directory}")

        def latest() -> int | None:
            return max((s for s in self._steps() if at is None or s <= at), default=None)

        while (step := latest()) is not None:
            try:
                record = _together(lambda: self._read_record(step))
                _check_same({name: x[0] for name, x in record["leaves"].items()}, kinds, step)
                stored = _together(lambda: self._read_leaves(step, leaves))
                for name, (_, expected) in record["leaves"].items():
                    if fingerprint(stored[name]) != expected:
                        raise _Damage(f"the bits of {name} have changed")
            except _Damage as damage:
                self._damaged.add(step)
                self._warn(f"passing over the checkpoint of step {step}, it is damaged: {damage}")
                continue
            state = jax.tree.unflatten(
                jax.tree.structure(target), [stored[name] for name in leaves]
            )
            return Restored(step, state, record["data"])
        raise CheckpointError(
            f"all checkpoints in {self._directory} are damaged: steps "
            + ", ".join(map(str, sorted(self._damaged)))
        )

    def _steps(self) -> set[int]:
        return set(self._manager.all_steps()) - self._damaged

    # Read by Orbax's handlers alone: its manager would wait for all processes after each read, and
    # for ever if one of them finds the checkpoint damaged.

    def _read_record(self, step: int) -> Any:
        meta = ocp.JsonCheckpointHandler().restore(self._directory / str(step) / "meta")
        if zlib.crc32(meta["record"].encode()) != meta["crc32"]:
            raise _Damage("its record has changed")
        return json.loads(meta["record"])

    def _read_leaves(self, step: int, leaves: dict[str, Any]) -> dict[str, jax.Array]:
        default = _default_sharding()
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default)
            for name, x in leaves.items()
        }
        # Orbax closes its event loop at the first error, and each read still under way would print
        # a traceback of its own.
        with mock.patch.object(asyncio, "new_event_loop", _PatientLoop):
            stored = ocp.StandardCheckpointHandler().restore(
                self._directory / str(step) / "state",
                args=ocp.args.StandardRestore(_without_empty(abstract)),
            )
            jax.block_until_ready(stored)
        return {
            name: stored[name] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding)
            for name, x in abstract.items()
        }

    def _make_way(self) -> None:
        """Before a save: removes what killed saves left, and moves damaged checkpoints aside."""
        if not self._tidy and jax.process_index() == 0:
            for path in self._directory.glob(f"*{UNFINISHED}*"):
                shutil.rmtree(path)
        if self._damaged and jax.process_index() == 0:
            for step in self._damaged:
                aside = self._directory / f"{step}{DAMAGED}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self._directory / str(step), aside)
        if jax.process_count() > 1 and (self._damaged or not self._tidy):
            multihost_utils.sync_global_devices("checkpoints: made way")
        if self._damaged:
            self._manager.reload()
        self._tidy = True
        self._damaged.clear()

    def _not_saved(self, step: int | None, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot save the checkpoint of step {step} in {self._directory}: {_reason(error)}"
        )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, without its question whether the machine is about to be taken back.

    The service it asks wants one counter for all questions, and `cluster.stop_signals` asks it.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Damage(Exception):
    """A checkpoint is not what was saved."""


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that finishes its tasks before it closes."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.wait(tasks))
            for task in tasks:
                task.cancelled() or task.exception()  # seen, so not printed
        super().close()


def _together(read: Callable[[], Any]) -> Any:
    """Reads in all processes; damage seen by one of them is damage to all.

    Raises:
      _Damage: anything went wrong in any process.
    """
    result, problem = None, None
    try:
        result = read()
    except Exception as error:
        problem = _reason(error)
    well = problem is None
    if jax.process_count() > 1:
        well = bool(np.all(multihost_utils.process_allgather(np.array(well))))
    if not well:
        raise _Damage(problem or "another process cannot read it")
    return result


def _reason(error: BaseException) -> str:
    """One line: the system's own words where there are some."""
    while error.__cause__ is not None:
        error = error.__cause__
    number = getattr(error, "errno", None)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    if code is not None:
        number = int(code[1])
    if number is not None:
        return os.strerror(number)
    text = re.sub(r'Error opening "\w+" driver: ', "", str(error).split(" [")[0])
    return textwrap.shorten(text, 500) or type(error).__name__


def _default_sharding() -> jax.sharding.Sharding:
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), jax.P())


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves in order, each under its path, e.g. ``opt_state/0/mu/head/kernel``."""
    paths, _ = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) != len(paths):
        raise CheckpointError("two leaves of the state have the same path; rename one of them")
    return named


def _without_empty(leaves: dict[str, Any]) -> dict[str, Any]:
    # Orbax refuses to save arrays without elements; their shape says all there is to know.
    return {name: x for name, x in leaves.items() if x.size}


def _kinds(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in leaves.items()}


def _check_same(saved: dict[str, str], wanted: dict[str, str], step: int) -> None:
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"the checkpoint of step {step} does not fit this model and optimizer: {name} is "
                f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
            )


# Fingerprints -----------------------------------------------------------------------------------


def fingerprint(array: jax.Array) -> int:
    """A number that changes when any bit of an array does.

    The sum, modulo 2**32, of each word scrambled together with its index: the order of summation
    does not matter, so the result is the same however the array is spread over devices and
    processes. One changed word always changes it, several do but for a chance of 2**-32.

    Args:
      array: of any shape and dtype, random keys included.

    Returns:
      An integer below 2**32. In a run of several processes all have to call it.

    Example:
      >>> import jax.numpy as jnp
      >>> from experiments.runs.checkpoints import fingerprint
      >>> x = jnp.arange(4.0)
      >>> fingerprint(x) == fingerprint(x.copy()), fingerprint(x) == fingerprint(-x)
      (True, False)
    """
    # Fetched at once: collective programs that queue up can hang on a CPU mesh.
    return int(_fingerprint(array))


@jax.jit
def _fingerprint(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    # Eight bytes become two words along a new last axis.
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_scramble(words ^ _scramble(index)), dtype=jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (32 bits): one to one, and each bit touches all others."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
