"""A profile of a few training steps, for TensorBoard and for ui.perfetto.dev.

with StepTrace("trace", warm_up=10, steps=5) as trace:
    for batch in batches:
        with trace.step():
            state = train_step(state, batch)
        trace.done(state)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class StepTrace:
    """Records what hosts and devices do during a few steps; a context manager.

    The folder then holds ``plugins/profile``, which TensorBoard shows (``tensorboard --logdir``,
    with the package ``tensorboard-plugin-profile`` or ``xprof``), and in it a file
    ``perfetto_trace.json.gz`` to open at https://ui.perfetto.dev.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder, StepTrace(folder, 1, 2) as trace:
    ...     for i in range(4):
    ...         with trace.step():
    ...             result = jnp.ones(3) * i
    ...         _ = trace.done(result)
    ...     trace.file.name
    'perfetto_trace.json.gz'

    Args:
      folder: where the trace is written; ``None``: nothing is recorded.
      warm_up: steps before the first one recorded; they compile.
      steps: steps recorded, fewer where the loop ends before.
    """

    def __init__(self, folder: Path | str | None, warm_up: int = 10, steps: int = 5):
        self._folder = None if folder is None else Path(folder)
        self.file: Path | None = None  # once it is written
        self._first, self._end = warm_up, warm_up + steps
        self._step = 0
        self._recording = False

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Surrounds what starts a step."""
        if self._folder is None:
            yield
            return
        if self._step == self._first:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            yield
        self._step += 1

    def done(self, result: Any) -> bool:
        """Tells it what a step returns, for which it waits behind the last one recorded.

        Args:
          result: arrays that the step computes.

        Returns:
          Whether the trace was written just now; its ``file`` is the one for Perfetto.
        """
        if self._folder is None:
            return False
        if self._step == self._first:
            jax.block_until_ready(result)  # what comes before is not in the trace
        if not self._recording or self._step < self._end:
            return False
        jax.block_until_ready(result)
        self._stop()
        return True

    def _stop(self) -> None:
        if self._recording and self._folder is not None:
            self._recording = False
            jax.profiler.stop_trace()
            files = self._folder.glob("plugins/profile/*/perfetto_trace.json.gz")
            self.file = max(files, key=lambda file: file.stat().st_mtime)
