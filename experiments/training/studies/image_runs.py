"""What the runners share that train networks of their own on a task of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, data, timing

PyTree = Any


class ImageRunner:
    """The data, the compiled programs and the scores of a runner, see `protocol_runs.Runner`.

    A runner of this kind adds ``seconds`` and ``run``.

    Args:
      setting: ``task``, ``steps`` and ``batch_size``, and what the runner itself reads.
      data_dir: folder with the data files.
      folder: not used.
    """

    def __init__(self, setting: Mapping[str, Any], data_dir: Path | None, folder: Path):
        del folder
        self.setting = setting
        self.task = data.load_classification(setting["task"], data_dir=data_dir)
        pixels = self.task.train.x
        axes = tuple(range(pixels.ndim - 1))
        self._mean, self._deviation = (f(pixels, axis=axes) for f in (np.mean, np.std))
        self._programs: dict[str, Callable[..., Any]] = {}

    def config(self) -> dict[str, Any]:
        """Checksums of the data."""
        return {"data": self.task.checksums}

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Number of steps; every contestant computes one gradient in each."""
        del options
        return float(self.setting["steps"])

    def standardized(self, x: Any) -> jax.Array:
        """Images whose channels have mean 0 and deviation 1 on the training split.

        Args:
          x: images as in the task, with any axes before.
        """
        x = jnp.asarray(x)
        shape = (1,) * (x.ndim - 1) + (-1,)
        mean, deviation = self._mean.reshape(shape), self._deviation.reshape(shape)
        return (x - mean) / jnp.maximum(deviation, 1e-6)

    def batch(self, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Standardized images and labels of the training split.

        Args:
          rows: their numbers, of any shape.
        """
        return self.standardized(self.task.train.x[rows]), jnp.asarray(self.task.train.y[rows])

    def order(self, seed: int, part: np.ndarray | None = None) -> np.ndarray:
        """The rows of each step, (steps, batch size).

        Args:
          seed: chooses the order of the examples.
          part: rows of the training split that are trained on; all by default.
        """
        part = np.arange(len(self.task.train.y)) if part is None else part
        steps, size = self.setting["steps"], self.setting["batch_size"]
        return part[data.index_steps(len(part), batch_size=size, seed=seed, steps=steps)]

    def program(
        self,
        what: str,
        function: Callable[..., Any],
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """A function compiled for the options of a contestant, once.

        Args:
          what: name of the function.
          function: its first argument is the options.
          options: the contestant's; none by default.
        """
        options = dict(options or {})
        name = f"{what}: {cli.to_json(options)}"
        if name not in self._programs:
            self._programs[name] = jax.jit(functools.partial(function, options))
        return self._programs[name]

    def errors(self, predict: Callable[[jax.Array], jax.Array]) -> dict[str, float]:
        """Shares of wrong answers on the validation and the test split, NaN if not finite.

        Args:
          predict: from standardized images to logits.
        """
        wrong = {}
        for name, split in (("validation", self.task.validation), ("error", self.task.test)):
            logits = np.asarray(predict(self.standardized(split.x)))
            share = float(np.mean(logits.argmax(axis=-1) != split.y))
            wrong[name] = share if np.isfinite(logits).all() else float("nan")
        return wrong


def seconds_of(call: Callable[[], Any]) -> float:
    """The least seconds of five calls, after one that compiles.

    Args:
      call: what is timed; its arrays are waited for.
    """
    timing.timed(call)
    return min(timing.timed(call)[1] for _ in range(5))
