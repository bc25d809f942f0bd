"""Finished units of a study's work, one verified file each, and parameters kept on the way.

units/<group>/<name>.json   the rows of a unit
snapshots/<name>.npz        parameters by step
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.cli import UsageError
from experiments.runs.records import read_file, read_record, write_record

PyTree = Any
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work whose result is stored in one file when it is finished.

    Attributes:
      group: the folder it is stored in, such as the panel of a report that shows it.
      identity: the values that tell it from the other units of its group; they begin every row.
      work: computes the rows.
    """

    group: str
    identity: dict[str, Any]
    work: Callable[[], Rows]

    @property
    def name(self) -> str:
        """The file's name, without extension."""
        return "-".join(str(value) for value in self.identity.values() if value is not None)


class Store:
    """The units and snapshots in a study's folder.

    Args:
      folder: the study's folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, unit: Unit) -> Path:
        """The file that holds a unit's rows."""
        return self.folder / "units" / unit.group / f"{unit.name}.json"

    def save(self, unit: Unit, rows: Rows) -> None:
        """Stores the rows of a finished unit.

        Args:
          unit: the unit.
          rows: what its work returned, as plain JSON.
        """
        path = self.path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {"identity": unit.identity, "rows": rows})

    def load(self, unit: Unit) -> Rows | None:
        """Reads the rows of a unit.

        Args:
          unit: the unit.

        Returns:
          The rows, each beginning with the unit's identity; ``None`` for an unfinished unit.

        Raises:
          UsageError: the file is damaged.
        """
        content = read_record(self.path(unit))
        if content is None:
            return None
        return [{**content["identity"], **row} for row in content["rows"]]

    def save_snapshots(self, name: str, snapshots: dict[int, PyTree]) -> None:
        """Stores parameters by step, in the order of the dictionary.

        Args:
          name: the file's name, without extension.
          snapshots: parameters by step.
        """
        buffer = io.BytesIO()
        leaves: dict[str, Any] = {
            f"{step}/{i}": np.asarray(leaf)
            for step, params in snapshots.items()
            for i, leaf in enumerate(jax.tree.leaves(params))
        }
        np.savez(buffer, **leaves)
        path = self._snapshots_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        cli.write_atomic(path, buffer.getvalue())

    def snapshots(self, name: str, like: PyTree, made_by: Unit) -> dict[int, PyTree]:
        """Reads what `save_snapshots` stored.

        Args:
          name: the file's name, without extension.
          like: parameters of the same structure and shapes.
          made_by: the unit whose work stores the file; a message says to delete its rows.

        Returns:
          Parameters by step, in the order in which they were stored.

        Raises:
          UsageError: the file is missing or damaged.
        """
        path = self._snapshots_path(name)
        structure, shapes = jax.tree.structure(like), [x.shape for x in jax.tree.leaves(like)]
        snapshots = {}
        try:
            with np.load(io.BytesIO(read_file(path))) as file:
                for step in dict.fromkeys(int(key.split("/")[0]) for key in file.files):
                    leaves = [file[f"{step}/{i}"] for i in range(len(shapes))]
                    if [leaf.shape for leaf in leaves] != shapes:
                        raise ValueError("other shapes")
                    snapshots[step] = jax.tree.unflatten(structure, [*map(jnp.asarray, leaves)])
            if not snapshots:
                raise ValueError("it is empty")
        except Exception as error:  # NumPy and zipfile raise many types of exceptions
            raise UsageError(
                f"{path} is missing or damaged ({type(error).__name__}); delete "
                f"{self.path(made_by)}, so that both are made again"
            ) from error
        return snapshots

    def _snapshots_path(self, name: str) -> Path:
        return self.folder / "snapshots" / f"{name}.npz"
