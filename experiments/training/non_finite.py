"""What is done about steps that are not finite: the policies of `--non-finite`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.training.history import Bad, History

# This many skipped steps in a row, or rollbacks without a new checkpoint, end the run: what is
# wrong is then not a batch.
MAX_SKIPPED = 10
MAX_ROLLBACKS = 3


class NonFiniteError(Exception):
    """The run met numbers that are not finite; the message is one line."""


class NonFinitePolicy:
    """Decides whether a run ends, leaves a step out, or goes back to its latest checkpoint.

    Args:
      name: one of `options.NON_FINITE`.
      history: where the metrics are, and where events are recorded.
      console: where they are told.
    """

    def __init__(self, name: str, history: History, console: Console):
        self._name, self._history, self._console = name, history, console
        self._latest_skipped = self._skipped = self._rollbacks = 0

    def judge(self, bad: list[Bad], state: Any) -> Bad | None:
        """Says what to do about the bad ones of the steps that were waited for.

        Args:
          bad: the steps that are not finite.
          state: the state behind the latest step.

        Returns:
          The step in front of which the run has to go back; ``None`` to go on.

        Raises:
          NonFiniteError: the run cannot go on; its metrics up to that step are written.
        """
        for step in bad:
            if self._name == "skip":
                self._skip(step)
                continue
            step = dataclasses.replace(step, where=not_finite(state))
            if self._name == "raise":
                hint = "--resume with --non-finite skip or rollback, or start with a lower rate"
                raise self._end(step, f"{step}; {hint}", where=step.where)
            if self._rollbacks == MAX_ROLLBACKS:
                hint = f"{MAX_ROLLBACKS} rollbacks did not help; start with a lower rate"
                raise self._end(step, f"{step}; {hint}", where=step.where)
            self._rollbacks += 1
            return step
        return None

    def _skip(self, bad: Bad) -> None:
        follows = bad.step == self._latest_skipped + 1
        self._latest_skipped = bad.step
        self._skipped = self._skipped + 1 if follows else 1
        if self._skipped >= MAX_SKIPPED:
            hint = "start with a lower --learning-rate, or look at the data"
            raise self._end(bad, f"{bad}: {MAX_SKIPPED} steps in a row were; {hint}")
        self._console.print(f"{bad}: skipped", soft_wrap=True)
        self._history.add_event(bad.event(self._name))

    def went_back(self, bad: Bad, step: int) -> None:
        """Tells that the run went back to a step because of a bad one."""
        self._console.print(f"{bad}: back to step {step}", soft_wrap=True)
        self._history.add_event(bad.event(self._name, where=bad.where, back_to=step))

    def saved(self) -> None:
        """Has to be called when a new checkpoint is saved: rollbacks are counted from there on."""
        self._rollbacks = 0

    def _end(self, bad: Bad, message: str, **more: Any) -> NonFiniteError:
        self._history.forget_after(bad.step)
        self._history.write()
        self._history.add_event(bad.event(self._name, **more))
        return NonFiniteError(message)


def not_finite(state: Any) -> str | None:
    """Where a state is not finite, e.g. ``params/head/kernel (3 of 40 entries)``."""

    def count(leaf: jax.Array) -> jax.Array | None:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return None
        return jnp.sum(~jnp.isfinite(leaf))

    counts = jax.device_get(jax.jit(lambda tree: jax.tree.map(count, tree))(state))
    sizes = {path: leaf.size for path, leaf in jax.tree.leaves_with_path(state)}
    for path, wrong in jax.tree.leaves_with_path(counts):
        if wrong and sizes[path] > 1:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"{name} ({wrong} of {sizes[path]} entries)"
    return None
