"""Orbax checkpoints of a training run: the one place that knows Orbax.

A checkpoint holds the leaves of a pytree by name and a JSON record (where the data iterator
stands, names, shapes and dtypes of the leaves). Stored by name, a state needs nothing but arrays
in it, whatever tuples and dictionaries it is made of; restored into a target, it comes back with
the target's structure, and a target of another structure is refused instead of half-filled.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

PyTree = Any


class CheckpointError(ValueError):
    """A checkpoint does not fit what it is restored into; the message is one line."""


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


class Checkpoints:
    """The checkpoints of one run; a context manager.

    Args:
      directory: where they are kept; made when it does not exist.
      keep: how many of the latest to keep.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from experiments.checkpoints import Checkpoints
      >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(10, state, data={"next_index": 10})
      ...     restored = checkpoints.restore(jax.eval_shape(lambda: state))
      >>> restored.step, restored.state["w"].tolist(), restored.data
      (10, [0.0, 1.0, 2.0], {'next_index': 10})
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                # A checkpoint that `save` has returned from is on disk: what the metrics files
                # hold can then never be behind it.
                enable_async_checkpointing=False,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, ``None`` if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: PyTree, data: Any = None) -> None:
        """Saves a checkpoint and returns when it is on disk.

        Args:
          step: number of steps done; a step that is saved already is left as it is.
          state: a pytree of arrays, random keys included.
          data: anything JSON can hold, e.g. the state of a Grain iterator.
        """
        if step in self._manager.all_steps():
            return
        leaves = _named_leaves(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_empty(leaves)),
                meta=ocp.args.JsonSave({"data": data, "leaves": _signature(leaves)}),
            ),
        )

    def restore(self, target: PyTree) -> Restored:
        """Restores the latest checkpoint.

        Args:
          target: a pytree of arrays or ``jax.ShapeDtypeStruct`` like the one saved; leaves come
            back with its shardings, on the first device where it names none.

        Returns:
          The step, the state and the record.

        Raises:
          CheckpointError: there is no checkpoint, or its leaves are not those of the target; the
            message names the first that differs.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._manager.directory}")
        record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        leaves = _named_leaves(target)
        _check_same(record.meta["leaves"], _signature(leaves), step)
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default)
            for name, x in leaves.items()
        }
        stored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(_without_empty(abstract))),
        ).state
        full = [
            stored[name] if name in stored else jnp.zeros(x.shape, x.dtype, device=x.sharding)
            for name, x in abstract.items()
        ]
        return Restored(
            step, jax.tree.unflatten(jax.tree.structure(target), full), record.meta["data"]
        )


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


def _signature(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in leaves.items()}


def _check_same(saved: dict[str, str], wanted: dict[str, str], step: int) -> None:
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"the checkpoint of step {step} does not fit this model and optimizer: {name} is "
                f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
            )
