"""Do to training runs what machines and people do to them, and see what is lost.

    python -m experiments.fault_drill --quick
    python -m experiments.fault_drill

Each fault is real: processes of `experiments.train` on the digits task, in a temporary folder, are
killed, interrupted, left without disk space or fed with broken numbers, and their checkpoints are
damaged. A fault is survived if the run, continued, ends with the metrics, the result and bit by bit
the state of a run that nothing happened to; or, where a run has to be refused, if it ends with the
right exit code and one clear line, and nothing in its folder has changed.

Lost steps are those behind the latest checkpoint that were in the metrics already and had to be
done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import cli, data
from experiments.reporting import tables
from experiments.runs.checkpoints import Checkpoints
from experiments.training.options import Options as TrainingOptions
from experiments.training.plan import prepare
from experiments.training.program import build

PROG = "python -m experiments.fault_drill"
ROOT = Path(__file__).parents[1]
# A method with random keys in its state. Saving every five steps, a run saves nearly all the time.
STEPS = 400
RUN: tuple[str, ...] = ("--task", "digits", "--method", "stoch_grad_adam", "--eval-every", "50")
RUN += ("--checkpoint-every", "5", "--keep", "3")
# How long anything may take on a busy machine, in seconds.
PATIENCE = 240
# Seconds between SIGTERM and SIGKILL: what Kubernetes and Google Cloud's spot machines give.
GRACE = 30
# Seconds within which the survivors of a lost worker have to end.
BOUND = 90
# Bytes: more than the metrics come to in the first half of a run, less than the largest array of a
# checkpoint. (The arrays share a file or two, as the moment has it.)
FILE_LIMIT = 15_000


class Failed(Exception):
    """A fault that was not survived; the message is one line."""


def expect(condition: bool, message: str) -> None:
    """Raises `Failed` if something is not as it should be."""
    if not condition:
        raise Failed(" ".join(message.split()))


@dataclasses.dataclass(frozen=True)
class Survived:
    """What one or several faults cost.

    Attributes:
      lost: steps that were done again, for each time the fault was injected.
      detail: more about it, for the table.
    """

    lost: list[int]
    detail: str = ""


# Runs -------------------------------------------------------------------------------------------


class Ground:
    """A folder with training runs, each in a process of its own.

    Args:
      folder: where; all runs that begin here are the same but for their names.
      seed: decides when faults happen.
      steps: length of a run.
    """

    def __init__(self, folder: Path, seed: int = 0, steps: int = STEPS):
        self.folder = folder
        self.steps = steps
        self.rng = np.random.default_rng(seed)
        self._names: dict[str, int] = {}

    def new(self, kind: str) -> Run:
        """A run that has not begun."""
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
        """A run that was interrupted somewhere and can be continued."""
        run = self.new(kind)
        shutil.copytree(self._half.folder, run.folder)
        return run


class Run:
    """One run of a `Ground`.

    Args:
      ground: where.
      name: its folder's name.
      options: of its own, besides `RUN`.
      script: Python code to run instead of the command, with the same arguments.
      processes: how many.
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
    def going(self, *options: str, resume: bool = True) -> Iterator[subprocess.Popen[str]]:
        """Starts or continues the run in a process; waits for its end at the end of the block.

        Args:
          *options: more options of the command.
          resume: whether to continue a run that has begun.

        Yields:
          The process. Its attribute ``told`` holds, at last, its output and its errors.

        Raises:
          Failed: it does not end.
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
        process = subprocess.Popen(
            [sys.executable, *train, *words, *options],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
            process.told = process.communicate(timeout=PATIENCE)  # type: ignore[attr-defined]
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.folder.name} did not end within {PATIENCE} seconds") from None
        finally:
            process.kill()
            process.communicate()

    def finish(self, *options: str) -> str:
        """Runs to the end; returns the output.

        Raises:
          Failed: the run ends otherwise.
        """
        with self.going(*options) as process:
            pass
        out, err = process.told  # type: ignore[attr-defined]
        expect(process.returncode == 0, f"exit code {process.returncode}: {err[-500:]}")
        return out

    def refused(
        self, message: str, *options: str, code: int = 2, resume: bool = True, alone: bool = True
    ) -> None:
        """Runs and expects that this fails with one clear line.

        Args:
          message: what the line has to hold.
          *options: of the command.
          code: the exit code to expect.
          resume: as for `going`.
          alone: whether nothing else may be said. If not, threads of the libraries may complain
            before, after and in the middle of the line.

        Raises:
          Failed: the run ends otherwise.
        """
        with self.going(*options, resume=resume) as process:
            pass
        _, err = process.told  # type: ignore[attr-defined]
        expect(process.returncode == code, f"exit code {process.returncode}, not {code}: {err}")
        said = [line for line in err.splitlines() if "error: " in line and message in line]
        clear = len(said) == 1
        if alone:
            clear = clear and err.startswith("error: ") and err.strip() == said[0]
        expect(clear, f"not one clear line about {message!r}: {err}")

    def wait(self, process: subprocess.Popen[str], value: Callable[[], float], goal: float) -> None:
        """Waits until a value has reached a goal.

        Raises:
          Failed: the run ends before.
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
        """How many steps are in the metrics."""
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def rows(self) -> list[dict[str, Any]]:
        """The metrics, without what depends on the clock."""
        rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [{key: x for key, x in row.items() if key != "seconds"} for row in rows]

    def events(self) -> list[dict[str, Any]]:
        """What was written about steps that were not finite."""
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / "checkpoints" / str(step)

    def saved(self) -> list[int]:
        """The steps that have a checkpoint, in order; 0, the start, always counts as one."""
        folder = self.folder / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [0, *sorted(int(name) for name in names if name.isdecimal())]

    def unfinished(self) -> set[str]:
        """What saves under way, or killed, have left."""
        return {path.name for path in (self.folder / "checkpoints").glob("*tmp*")}

    def lost(self) -> int:
        """How many of the steps done are not in a checkpoint."""
        return max(self.steps_written() - self.saved()[-1], 0)

    def files(self, below: str = "") -> dict[str, bytes]:
        """All files but the lock, which names the process."""
        paths = (path for path in (self.folder / below).rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in paths if path.name != "run.lock"}

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The leaves of the latest checkpoint, as bits or numbers."""
        options = json.loads((self.folder / "config.json").read_text())["options"]
        options = TrainingOptions(
            devices=1, **{name: options[name] for name in ("task", "method", "steps")}
        )
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
        """Raises `Failed`, naming the first difference, if two finished runs are not the same."""
        for mine, theirs in zip(self.rows(), other.rows(), strict=False):
            expect(mine == theirs, f"the metrics differ: {mine}, not {theirs}")
        written = self.steps_written(), other.steps_written()
        expect(written[0] == written[1], f"{written[0]} steps in the metrics, not {written[1]}")
        results = [(run.folder / "result.json").read_text() for run in (self, other)]
        expect(results[0] == results[1], f"the results differ: {results[0]}, not {results[1]}")
        expected = other.state()
        for name, leaf in self.state().items():
            expect(leaf.tobytes() == expected[name].tobytes(), f"{name} differs at the end")


# Faults: killed and interrupted -----------------------------------------------------------------


def killed(ground: Ground, times: int) -> Survived:
    """SIGKILL at a random moment, again and again in the life of one run.

    One in six hits while the run starts or restores, the others up to 15 steps further on.
    """
    run = ground.new("killed")
    lost, during_save = [], 0
    for _ in range(times):
        began, before = run.saved()[-1], run.unfinished()
        file = _identity(run.metrics)

        def progress(file: int = file) -> int:
            # The file is written anew when the run goes on.
            return run.steps_written() if _identity(run.metrics) != file else 0

        with run.going() as process:
            if ground.rng.random() < 1 / 6:
                time.sleep(ground.rng.uniform(0, 4))
            else:
                run.wait(process, progress, began + int(ground.rng.integers(1, 11)))
                time.sleep(ground.rng.uniform(0, 0.05))
            expect(process.poll() is None, "the run ended before it could be killed")
            process.kill()
        expect(process.returncode == -signal.SIGKILL, f"exit code {process.returncode}")
        expect(run.saved()[-1] >= began, f"checkpoint {began} is gone")
        during_save += bool(run.unfinished() - before)
        lost.append(run.lost() if progress() else 0)
    run.finish()
    run.expect_same(ground.reference)
    expect(not run.unfinished(), f"left over: {run.unfinished()}")
    return Survived(lost, f"{during_save} during a save")


def _identity(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def interrupted(ground: Ground, signum: int, code: int) -> Survived:
    """A signal that asks the run to end."""
    run = ground.new("interrupted")
    with run.going() as process:
        run.wait(process, run.steps_written, int(ground.rng.integers(1, 100)))
        process.send_signal(signum)
        began = time.monotonic()
    seconds = time.monotonic() - began
    _, err = process.told  # type: ignore[attr-defined]
    expect(process.returncode == code, f"exit code {process.returncode}, not {code}: {err}")
    expect(err.startswith("to continue: ") and err.count("\n") == 1, f"not how to go on: {err}")
    expect(seconds < GRACE, f"took {seconds:.0f} seconds, longer than the grace period")
    expect(run.saved()[-1] < ground.steps, "the run ended before it could be interrupted")
    lost = run.lost()
    expect(lost == 0, f"{lost} steps were not saved")
    run.finish()
    run.expect_same(ground.reference)
    return Survived([lost], f"saved within {seconds:.1f} s")


# Faults: files ----------------------------------------------------------------------------------


SMALL_FILES = f"""
import resource, sys
from experiments import train
resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_LIMIT}, {FILE_LIMIT}))
sys.exit(train.main(sys.argv[1:]))
"""


def disk_full(ground: Ground) -> Survived:
    """No file can grow beyond a limit, which fails writing a checkpoint as a full disk does."""
    run = ground.half_done("full")
    before = run.files("checkpoints")

    run.script = SMALL_FILES
    # TensorStore's threads complain, each with a stack trace, as late as the interpreter's end.
    run.refused("cannot save the checkpoint of step ", alone=False)
    run.script = None
    after = run.files("checkpoints")
    expect(before.items() <= after.items(), "an earlier checkpoint has changed")
    lost = run.lost()
    run.finish()
    run.expect_same(ground.reference)
    return Survived([lost])


def not_a_folder(ground: Ground) -> Survived:
    """A file stands where the checkpoints should be: nothing can be read or written there."""
    run = ground.half_done("no-folder")
    folder = run.folder / "checkpoints"
    folder.rename(run.folder / "aside")
    folder.touch()
    before = run.files()
    run.refused("cannot keep checkpoints in ")
    expect(run.files() == before, "the folder has changed")
    folder.unlink()
    (run.folder / "aside").rename(folder)
    run.finish()
    run.expect_same(ground.reference)
    return Survived([0])


def largest_file(folder: Path) -> Path:
    """The largest file below a folder."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(checkpoint: Path) -> None:
    """Changes one bit in the middle of the arrays."""
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(checkpoint: Path) -> None:
    """Cuts off half of the arrays."""
    path = largest_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def damaged(ground: Ground, damage: Callable[[Path], None]) -> Survived:
    """The newest checkpoint is not what was saved."""
    run = ground.half_done("damaged")
    *_, previous, newest = run.saved()
    damage(run.checkpoint(newest))
    lost = run.steps_written() - previous
    out = run.finish()
    said = f"passing over the checkpoint of step {newest}, it is damaged: "
    expect(said in out, f"nothing is said about the damage: {out}")
    expect(f"resuming at step {previous}" in out, f"not from the checkpoint before: {out}")
    run.expect_same(ground.reference)
    return Survived([lost])


def other_configuration(ground: Ground) -> Survived:
    """The run is continued with another learning rate."""
    run = ground.half_done("configuration")
    before = run.files()
    run.refused("is a run with learning_rate 0.003, now 0.125", "--learning-rate", "0.125")
    expect(run.files() == before, "the folder has changed")
    return Survived([0])


def other_code(ground: Ground) -> Survived:
    """The checkpoint is one of code whose optimizer keeps another state."""
    run, other = ground.half_done("code"), ground.new("other-method")
    other.finish("--method", "sgd", "--steps", "5")
    shutil.rmtree(run.folder / "checkpoints")
    shutil.copytree(other.folder / "checkpoints", run.folder / "checkpoints")
    before = run.files()
    run.refused("the checkpoint of step 5 does not fit this model and optimizer: opt_state/")
    expect(run.files() == before, "the folder has changed")
    return Survived([0])


def second_run(ground: Ground) -> Survived:
    """Another run is started in the same folder, once as a new one and once to continue."""
    run = ground.new("second")
    with run.going() as process:
        run.wait(process, run.steps_written, 20)
        process.send_signal(signal.SIGSTOP)  # or it might end before the others have started
        before = run.files()
        try:
            run.refused(f"is in use by process {process.pid} on ")
            run.refused(f"is in use by process {process.pid} on ", resume=False)
            expect(run.files() == before, "the folder has changed")
        finally:
            process.send_signal(signal.SIGCONT)
    expect(process.returncode == 0, f"the first one: exit code {process.returncode}")
    run.expect_same(ground.reference)
    return Survived([0, 0])


# Faults: numbers --------------------------------------------------------------------------------

# One broken row in the data: one batch of every epoch gives a gradient of NaN.
BROKEN_ROW = 6
BROKEN_DATA = f"""
import dataclasses, sys
import numpy as np
from experiments import data
from experiments import train
task = data.load_task("digits")
x = task.train.x.copy()
x[{BROKEN_ROW}] = np.nan
task = dataclasses.replace(task, train=data.Split(x, task.train.y))
data.load_task = lambda *args, **kwargs: task
sys.exit(train.main(sys.argv[1:]))
"""
BROKEN_STEPS = 60


def broken_batches(number: int = BROKEN_STEPS) -> list[int]:
    """Which of the first batches of a run, counted from 1, hold the broken row."""
    batches = data.index_batches(len(data.load_task("digits").train), batch_size=64, seed=0)
    return [batch for batch in range(1, number + 1) if BROKEN_ROW in next(batches)]


def not_finite(ground: Ground, policy: str) -> Survived:
    """A batch whose gradient is not finite, once in every epoch."""
    run = ground.new(f"nan-{policy}")
    run.options = ("--steps", str(BROKEN_STEPS), "--non-finite", policy)
    run.script = BROKEN_DATA
    steps = broken_batches()
    if policy == "raise":
        run.refused(f"step {steps[0]} is not finite (loss nan", code=1)
        events, lost = run.events(), [run.lost()]
        expect([event["step"] for event in events] == steps[:1], f"told: {events}")
        _expect_finite(run)
        run.finish("--non-finite", "skip")  # goes on from the latest checkpoint
        return Survived(lost)
    run.finish()
    events, rows = run.events(), run.rows()
    expect(rows[-1]["step"] == BROKEN_STEPS, f"ended with step {rows[-1]['step']}")
    if policy == "skip":
        found = [event["step"] for event in events]
        expect(found == steps, f"skipped {found}, not {steps}")
        lost = [0] * len(events)
    else:
        # Going back, the run leaves out the batches up to the broken one.
        lost = [event["step"] - event["back_to"] for event in events]
        seen = broken_batches(BROKEN_STEPS + sum(lost))
        expect(len(events) == len(seen), f"went back {len(events)} times, not {len(seen)}")
        expect(events[0]["step"] == steps[0], f"went back at {events[0]['step']}")
    finite = [row["step"] for row in rows if row["loss"] is None]
    expect(finite == (steps if policy == "skip" else []), f"losses missing at {finite}")
    _expect_finite(run)
    return Survived(lost)


def _expect_finite(run: Run) -> None:
    for name, leaf in run.state().items():
        expect(bool(np.isfinite(leaf.astype(float)).all()), f"{name} is not finite")


# Faults: processes ------------------------------------------------------------------------------


def lost_worker(ground: Ground, number: int) -> Survived:
    """One of two processes is killed; the run is launched again."""
    options = ("--steps", "100")
    expected = Run(ground, "two-processes", options, processes=2)
    if not (expected.folder / "result.json").exists():
        expected.finish()
    run = ground.new("lost-worker")
    run.options, run.processes = options, 2
    with run.going() as launcher:
        run.wait(launcher, run.steps_written, int(ground.rng.integers(5, 50)))
        os.kill(_worker(launcher.pid, number), signal.SIGKILL)
        began = time.monotonic()
    seconds = time.monotonic() - began
    _, err = launcher.told  # type: ignore[attr-defined]
    expect(launcher.returncode not in (0, None), "the run ended as if nothing had happened")
    expect(seconds < BOUND, f"the survivor took {seconds:.0f} seconds to end")
    expect("error: " in err and "to continue: " in err, f"nothing is said: {err[-500:]}")
    lost = run.lost()
    run.finish()
    run.expect_same(expected)
    return Survived([lost], f"ended within {seconds:.0f} s")


def _worker(launcher: int, number: int) -> int:
    """The process id of a worker (Linux)."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--process-id" in words and words[words.index(b"--process-id") + 1] == b"%d" % number:
            return int(pid)
    raise Failed(f"there is no process {number}")


# The drill --------------------------------------------------------------------------------------

Fault = Callable[[Ground], Survived]
# Name: (the fault, how often, how often with --quick).
FAULTS: dict[str, tuple[Fault, int, int]] = {
    "SIGKILL": (lambda ground: killed(ground, 20), 1, 0),
    "SIGKILL, 3 times": (lambda ground: killed(ground, 3), 0, 1),
    "SIGTERM": (lambda ground: interrupted(ground, signal.SIGTERM, 0), 3, 1),
    "Ctrl-C": (lambda ground: interrupted(ground, signal.SIGINT, 130), 3, 1),
    "disk full": (disk_full, 1, 1),
    "no folder for checkpoints": (not_a_folder, 1, 1),
    "bit flipped in a checkpoint": (lambda ground: damaged(ground, flip_a_bit), 1, 1),
    "checkpoint cut in half": (lambda ground: damaged(ground, cut_in_half), 1, 1),
    "other configuration": (other_configuration, 1, 1),
    "checkpoint of other code": (other_code, 1, 1),
    "second run in the folder": (second_run, 1, 1),
    "NaN, raise": (lambda ground: not_finite(ground, "raise"), 1, 1),
    "NaN, skip": (lambda ground: not_finite(ground, "skip"), 1, 1),
    "NaN, rollback": (lambda ground: not_finite(ground, "rollback"), 1, 1),
    "worker 1 of 2 lost": (lambda ground: lost_worker(ground, 1), 1, 1),
    "worker 0 of 2 lost": (lambda ground: lost_worker(ground, 0), 1, 0),
}


@dataclasses.dataclass(frozen=True)
class Options(cli.Options):
    """Do to training runs what machines and people do to them, and see what is lost."""

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Each fault once, and three kills instead of twenty."""
    seed: int = 0
    """Decides when the faults happen."""


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 1 if a fault was not survived."""
    options = cli.parse(Options(), argv, PROG)
    console = cli.console(120)
    columns = ["fault", "what happened", "times", "survived", "lost: mean", "max", "seconds"]
    table = tables.table(columns, "Faults injected into training runs", left=2)
    problems = []
    with tempfile.TemporaryDirectory(prefix="fault-drill-") as folder:
        ground = Ground(Path(folder), options.seed)
        console.print(f"a run of {ground.steps} steps that nothing happens to")
        ground.reference  # noqa: B018  (its time is nobody's)
        for name, (fault, often, seldom) in FAULTS.items():
            times = seldom if options.quick else often
            if not times:
                continue
            outcomes, began = [], time.monotonic()
            for _ in range(times):
                try:
                    outcomes.append(fault(ground))
                except Exception as failure:
                    problems.append(f"{name}: {type(failure).__name__}: {failure}")
            console.print(f"{name}: survived {len(outcomes)} of {times}")
            lost = [steps for outcome in outcomes for steps in outcome.lost]
            failed = times - len(outcomes)
            table.add_row(
                name,
                outcomes[-1].detail if outcomes else "",
                str(len(lost) + failed),
                str(len(lost)),
                f"{np.mean(lost):.1f}" if lost else "",
                str(max(lost)) if lost else "",
                f"{time.monotonic() - began:.0f}",
            )
    console.print(table)
    for problem in problems:
        console.print(f"not survived: {problem}", style="red", soft_wrap=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
