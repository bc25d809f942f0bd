"""Training runs in processes of their own, which a fault drill can stop, damage and continue."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs.checkpoints import Checkpoints
from experiments.runs.metric_files import TIMES
from experiments.training.options import Options
from experiments.training.plan import prepare
from experiments.training.program import build

ROOT = Path(__file__).parents[3]
# A method with random keys in its state. Saving every five steps, a run saves nearly all the time.
STEPS = 400
RUN: tuple[str, ...] = ("--task", "digits", "--method", "stoch_grad_adam", "--eval-every", "50")
RUN += ("--checkpoint-every", "5", "--keep", "3")
# A checkpoint is larger than the metrics of the first half of a run.
RUN += ("--model-options", '{"hidden_sizes": [300]}')
# Seconds that a run may take on a busy machine before it counts as hung.
PATIENCE = 240


class Failed(Exception):
    """A fault that was not survived; the message is one line."""


def expect(condition: bool, message: str) -> None:
    """Raises `Failed` with the message unless the condition holds."""
    if not condition:
        raise Failed(" ".join(message.split()))


class Process(subprocess.Popen[str]):
    """A process of a run.

    Attributes:
      output: what it printed on its standard output; set when it has ended.
      errors: what it printed on its standard error output; set when it has ended.
    """

    output = ""
    errors = ""

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the process for the length of the block: from its start on, nothing is written."""
        self.send_signal(signal.SIGSTOP)
        try:
            # The signal is only sent by now. Threads may still finish what they write.
            os.waitpid(self.pid, os.WUNTRACED)
            yield
        finally:
            self.send_signal(signal.SIGCONT)


class Ground:
    """A folder with training runs, each in a process of its own.

    Args:
      folder: the folder; all runs that start in it are the same except for their names.
      seed: decides when faults happen.
      steps: number of training steps of a run.
    """

    def __init__(self, folder: Path, seed: int = 0, steps: int = STEPS):
        self.folder = folder
        self.steps = steps
        self.rng = np.random.default_rng(seed)
        self._names: dict[str, int] = {}

    def new(self, kind: str) -> Run:
        """A run that has not started."""
        self._names[kind] = self._names.get(kind, -1) + 1
        return Run(self, f"{kind}-{self._names[kind]}")

    @functools.cached_property
    def reference(self) -> Run:
        """A run that nothing happened to."""
        run = self.new("reference")
        run.finish()
        return run

    @functools.cached_property
    def _half(self) -> Run:
        run = self.new("half")
        with run.going() as process:
            run.wait(process, run.steps_written, 50)
            process.send_signal(signal.SIGTERM)
        expect(process.returncode == 0, f"SIGTERM: exit code {process.returncode}")
        return run

    def half_done(self, kind: str) -> Run:
        """A copy of a run that was interrupted on its way and can be continued."""
        run = self.new(kind)
        shutil.copytree(self._half.folder, run.folder)
        return run


class Run:
    """One run of a `Ground`.

    Args:
      ground: the ground that the run belongs to.
      name: name of the run's folder.
      options: command-line options in addition to `RUN`.
      script: Python code that runs instead of the command, with the same arguments; None for the
        command.
      processes: number of processes.
    """

    def __init__(
        self,
        ground: Ground,
        name: str,
        options: Sequence[str] = (),
        script: str | None = None,
        processes: int = 1,
    ):
        self.ground = ground
        self.folder = ground.folder / name
        self.options = ("--steps", str(ground.steps), *options)
        self.script = script
        self.processes = processes

    @contextlib.contextmanager
    def going(self, *options: str, resume: bool = True) -> Iterator[Process]:
        """Starts or continues the run in a process and, after the block, waits for its end.

        Args:
          *options: further options of the command.
          resume: whether to continue a run that has started before.

        Yields:
          The process.

        Raises:
          Failed: the process does not end in time.
        """
        train = ["-m", "experiments.train"] if self.script is None else ["-c", self.script]
        if self.processes > 1:
            train = ["-m", "experiments.launch", "--processes", str(self.processes)]
            train += ["--devices", str(self.processes), "--", "train"]
        words = ["--runs-dir", str(self.folder.parent), "--name", self.folder.name]
        if resume and (self.folder / "config.json").exists():
            words.append("--resume")
        else:
            words += [*RUN, *self.options, *(["--devices", "1"] if self.processes == 1 else [])]
        process = Process(
            [sys.executable, *train, *words, *options],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
            process.output, process.errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.folder.name} did not end within {PATIENCE} seconds") from None
        finally:
            process.kill()
            process.communicate()

    def finish(self, *options: str) -> str:
        """Starts or continues the run and waits until it has finished.

        Args:
          *options: further options of the command.

        Returns:
          What the run printed.

        Raises:
          Failed: the run does not finish.
        """
        with self.going(*options) as process:
            pass
        code = process.returncode
        expect(code == 0, f"exit code {code}: {process.errors[-500:]}")
        return process.output

    def refused(
        self, message: str, *options: str, code: int = 2, resume: bool = True, alone: bool = True
    ) -> None:
        """Runs the command and expects it to fail with one clear line.

        Args:
          message: what the line has to contain.
          *options: further options of the command.
          code: the exit code to expect.
          resume: whether to continue a run that has started before.
          alone: whether the line has to be the whole error output. Otherwise threads of the
            libraries may complain before it, after it and in the middle of it.

        Raises:
          Failed: the run ends in another way.
        """
        with self.going(*options, resume=resume) as process:
            pass
        err = process.errors
        expect(process.returncode == code, f"exit code {process.returncode}, not {code}: {err}")
        said = [line for line in err.splitlines() if "error: " in line and message in line]
        clear = len(said) == 1
        if alone:
            clear = clear and err.startswith("error: ") and err.strip() == said[0]
        expect(clear, f"not one clear line about {message!r}: {err}")

    def wait(self, process: Process, value: Callable[[], float], goal: float) -> None:
        """Waits until a value has reached a goal.

        Args:
          process: the process of the run.
          value: reads the value, such as the number of steps written.
          goal: the value to wait for.

        Raises:
          Failed: the run ends before, or makes no progress.
        """
        deadline = time.monotonic() + PATIENCE
        while value() < goal:
            if process.poll() is not None:
                out, err = process.communicate()
                raise Failed(f"the run ended too early: {out[-300:]} {err[-500:]}")
            expect(time.monotonic() < deadline, f"no progress within {PATIENCE} seconds")
            time.sleep(0.002)

    @property
    def metrics(self) -> Path:
        """The file that grows with the steps."""
        return self.folder / "metrics.jsonl"

    def steps_written(self) -> int:
        """Number of steps in the metrics."""
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """The metrics without the times."""
        rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [{key: x for key, x in row.items() if key not in TIMES} for row in rows]

    def events(self) -> list[dict[str, Any]]:
        """The records of steps whose loss or gradient was not finite."""
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / "checkpoints" / str(step)

    def saved(self) -> list[int]:
        """The steps that have a checkpoint, in order; the start, 0, always counts as one."""
        folder = self.folder / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [0, *sorted(int(name) for name in names if name.isdecimal())]

    def unfinished(self) -> set[str]:
        """Names of what saves that are under way or were killed have left."""
        return {path.name for path in (self.folder / "checkpoints").glob("*tmp*")}

    def lost(self) -> int:
        """Number of steps in the metrics that the latest checkpoint does not have."""
        return max(self.steps_written() - self.saved()[-1], 0)

    def files(self, below: str = "") -> dict[str, bytes]:
        """The contents of all files except the lock, which names the process."""
        paths = (path for path in (self.folder / below).rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in paths if path.name != "run.lock"}

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The leaves of the latest checkpoint by their path; random keys as their bits."""
        saved = json.loads((self.folder / "config.json").read_text())["options"]
        names = ("task", "method", "steps", "model_options")
        options = Options(devices=1, **{name: saved[name] for name in names})
        target = jax.eval_shape(build(prepare(options)).make_state)
        with Checkpoints(self.folder / "checkpoints") as checkpoints:
            state = checkpoints.restore(target).state

        def plain(leaf: jax.Array) -> jax.Array:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.key_data(leaf) if is_key else leaf

        return {
            jax.tree_util.keystr(path): np.asarray(plain(leaf))
            for path, leaf in jax.tree.leaves_with_path(state)
        }

    def expect_same(self, other: Run) -> None:
        """Raises `Failed`, naming the first difference, if two finished runs differ."""
        for mine, theirs in zip(self.rows(), other.rows(), strict=False):
            expect(mine == theirs, f"the metrics differ: {mine}, not {theirs}")
        written = self.steps_written(), other.steps_written()
        expect(written[0] == written[1], f"{written[0]} steps in the metrics, not {written[1]}")
        results = [(run.folder / "result.json").read_text() for run in (self, other)]
        expect(results[0] == results[1], f"the results differ: {results[0]}, not {results[1]}")
        expected = other.state()
        for name, leaf in self.state().items():
            expect(leaf.tobytes() == expected[name].tobytes(), f"{name} differs at the end")
