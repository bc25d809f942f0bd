"""Faults that are injected into training runs, and what has to come of each."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import data
from experiments.training.studies.drill import Failed, Ground, Run, expect

# Seconds between SIGTERM and SIGKILL that Kubernetes and Google Cloud's spot machines allow.
GRACE = 30
# Seconds within which the survivors of a lost worker have to end.
BOUND = 90
# Bytes: more than the metrics of the first half of a run, less than the largest array of a
# checkpoint. (How many files the arrays share differs from save to save.)
FILE_LIMIT = 60_000


@dataclasses.dataclass(frozen=True)
class Survived:
    """What a fault cost that was survived.

    Attributes:
      lost: number of steps that were done again, for each time the fault was injected.
      detail: a remark for the table.
    """

    lost: list[int]
    detail: str = ""


# Killed and interrupted -------------------------------------------------------------------------


def killed(ground: Ground, times: int) -> Survived:
    """Kills one run again and again, at random moments, by SIGKILL.

    One in six hits while the run starts or restores, the others up to 15 steps further on.

    Args:
      ground: where the run is.
      times: how often it is killed.
    """
    run = ground.new("killed")
    lost, during_save = [], 0
    for _ in range(times):
        began, before = run.saved()[-1], run.unfinished()
        file = _identity(run.metrics)

        def progress(file: int = file) -> int:
            # The run replaces the file when it goes on.
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
    """Sends a signal that asks the run to end.

    Args:
      ground: where the run is.
      signum: the signal.
      code: the exit code that has to follow.
    """
    run = ground.new("interrupted")
    with run.going() as process:
        run.wait(process, run.steps_written, int(ground.rng.integers(1, ground.steps // 5)))
        process.send_signal(signum)
        began = time.monotonic()
    seconds = time.monotonic() - began
    err = process.errors
    expect(process.returncode == code, f"exit code {process.returncode}, not {code}: {err}")
    clear = err.startswith("to continue: ") and err.count("\n") == 1
    expect(clear, f"not one line that says how to go on: {err}")
    expect(seconds < GRACE, f"took {seconds:.0f} seconds, longer than the grace period")
    expect(run.saved()[-1] < ground.steps, "the run ended before it could be interrupted")
    lost = run.lost()
    expect(lost == 0, f"{lost} steps were not saved")
    run.finish()
    run.expect_same(ground.reference)
    return Survived([lost], f"saved within {seconds:.1f} s")


# Files ------------------------------------------------------------------------------------------


SMALL_FILES = f"""
import resource, sys
from experiments import train
resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_LIMIT}, {FILE_LIMIT}))
sys.exit(train.main(sys.argv[1:]))
"""


def disk_full(ground: Ground) -> Survived:
    """Lets no file grow beyond a limit, so that saving a checkpoint fails as on a full disk."""
    run = ground.half_done("full")
    before = run.files("checkpoints")

    run.script = SMALL_FILES
    # TensorStore's threads complain with stack traces until the interpreter ends.
    run.refused("cannot save the checkpoint of step ", alone=False)
    run.script = None
    after = run.files("checkpoints")
    expect(before.items() <= after.items(), "an earlier checkpoint has changed")
    lost = run.lost()
    run.finish()
    run.expect_same(ground.reference)
    return Survived([lost])


def not_a_folder(ground: Ground) -> Survived:
    """Puts a file where the folder of checkpoints should be."""
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
    """Damages the newest checkpoint.

    Args:
      ground: where the run is.
      damage: changes files in the folder of a checkpoint.
    """
    run = ground.half_done("damaged")
    *_, previous, newest = run.saved()
    damage(run.checkpoint(newest))
    lost = run.steps_written() - previous
    out = run.finish()
    said = f"passing over the checkpoint of step {newest}, it is damaged: "
    expect(said in out, f"the damage is not reported: {out}")
    expect(f"resuming at step {previous}" in out, f"not from the checkpoint before: {out}")
    run.expect_same(ground.reference)
    return Survived([lost])


def other_configuration(ground: Ground) -> Survived:
    """Continues the run with another learning rate."""
    run = ground.half_done("configuration")
    before = run.files()
    run.refused("is a run with --learning-rate 0.003, now 0.125", "--learning-rate", "0.125")
    expect(run.files() == before, "the folder has changed")
    return Survived([0])


def other_code(ground: Ground) -> Survived:
    """Replaces the checkpoints by those of another optimizer, as if its code had changed."""
    run, other = ground.half_done("code"), ground.new("other-method")
    other.finish("--method", "sgd", "--steps", "5")
    shutil.rmtree(run.folder / "checkpoints")
    shutil.copytree(other.folder / "checkpoints", run.folder / "checkpoints")
    before = run.files()
    run.refused("the checkpoint of step 5 does not fit this model and optimizer: opt_state/")
    expect(run.files() == before, "the folder has changed")
    return Survived([0])


def second_run(ground: Ground) -> Survived:
    """Starts a second run in the same folder, once as a new run and once to continue."""
    run = ground.new("second")
    with run.going() as process:
        run.wait(process, run.steps_written, 20)
        with process.stopped():  # or it might end before the others have started
            before = run.files()
            run.refused(f"is in use by process {process.pid} on ")
            run.refused(f"is in use by process {process.pid} on ", resume=False)
            expect(run.files() == before, "the folder has changed")
    expect(process.returncode == 0, f"the first one: exit code {process.returncode}")
    run.expect_same(ground.reference)
    return Survived([0, 0])


# Numbers ----------------------------------------------------------------------------------------

# A row of the data that is NaN, so that one batch of every epoch has a gradient of NaN.
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
    """Which of the first batches of a run, counted from 1, contain the broken row."""
    batches = data.index_batches(len(data.load_task("digits").train), batch_size=64, seed=0)
    return [batch for batch in range(1, number + 1) if BROKEN_ROW in next(batches)]


def not_finite(ground: Ground, policy: str) -> Survived:
    """Feeds the run a batch whose gradient is not finite, once in every epoch.

    Args:
      ground: where the run is.
      policy: the value of ``--non-finite``: ``"raise"``, ``"skip"`` or ``"rollback"``.
    """
    run = ground.new(f"nan-{policy}")
    run.options = ("--steps", str(BROKEN_STEPS), "--non-finite", policy)
    run.script = BROKEN_DATA
    steps = broken_batches()
    if policy == "raise":
        run.refused(f"step {steps[0]} is not finite (loss nan", code=1)
        events, lost = run.events(), [run.lost()]
        expect([event["step"] for event in events] == steps[:1], f"the events are {events}")
        _expect_finite(run)
        run.finish("--non-finite", "skip")  # goes on from the latest checkpoint
        return Survived(lost)
    run.finish()
    events, rows = run.events(), run.rows()
    expect(rows[-1]["step"] == BROKEN_STEPS, f"ended with step {rows[-1]['step']}")
    if policy == "skip":
        skipped = [event["step"] for event in events]
        expect(skipped == steps, f"skipped {skipped}, not {steps}")
        lost = [0] * len(events)
    else:
        # Going back, the run leaves out the batches up to the broken one.
        lost = [event["step"] - event["back_to"] for event in events]
        seen = broken_batches(BROKEN_STEPS + sum(lost))
        expect(len(events) == len(seen), f"went back {len(events)} times, not {len(seen)}")
        expect(events[0]["step"] == steps[0], f"went back at {events[0]['step']}")
    missing = [row["step"] for row in rows if row["loss"] is None]
    expect(missing == (steps if policy == "skip" else []), f"losses missing at {missing}")
    _expect_finite(run)
    return Survived(lost)


def _expect_finite(run: Run) -> None:
    for name, leaf in run.state().items():
        expect(bool(np.isfinite(leaf.astype(float)).all()), f"{name} is not finite")


# Processes --------------------------------------------------------------------------------------


def lost_worker(ground: Ground, number: int) -> Survived:
    """Kills one of two processes and launches the run again.

    Args:
      ground: where the run is.
      number: id of the process to kill, 0 or 1.
    """
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
    code, err = launcher.returncode, launcher.errors
    expect(code == 128 + signal.SIGKILL, f"exit code {code}, not that of the killed process")
    expect(seconds < BOUND, f"the survivor took {seconds:.0f} seconds to end")
    said = [line for line in err.splitlines() if f"error: process {1 - number} of 2 " in line]
    clear = bool(said) and f"--name {run.folder.name} --resume" in said[0]
    expect(clear, f"the survivor does not say how to go on: {err[-500:]}")
    expect(run.steps_written() < 100, "the run ended before it could lose a process")
    lost = run.lost()
    run.finish()
    run.expect_same(expected)
    return Survived([lost], f"ended within {seconds:.0f} s")


def _worker(launcher: int, number: int) -> int:
    """The process id of a worker, read from Linux's ``/proc``."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"--process-id" in words and words[words.index(b"--process-id") + 1] == b"%d" % number:
            return int(pid)
    raise Failed(f"there is no process {number}")


# All of them ------------------------------------------------------------------------------------

Fault = Callable[[Ground], Survived]
# By name: the fault, how often it is injected, and how often with --quick.
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
