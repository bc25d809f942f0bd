"""Several processes on this machine: how they start, are seen and end; training with them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import launch, train
from experiments.runs.metric_files import TIMES

ROOT = Path(__file__).parents[2]

# What a process of `run` does: tells its number and, where its number is in a table, ends with that
# exit code; a process without one waits, and ends with the number of the signal it gets.
WORKER = """
import json, signal, sys, time
codes, deaf = json.loads(sys.argv[1])
assert sys.argv[2::2] == ["--coordinator", "--processes", "--process-id"]
address, processes, number = sys.argv[3::2]
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, _: None if deaf else sys.exit(signum))
print(f"process {number} of {processes} at {address}", flush=True)
print("a complaint", file=sys.stderr, flush=True)
time.sleep(0.3 * int(number))
if number in codes:
    sys.exit(codes[number])
print("waiting", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""


@contextlib.contextmanager
def launcher(processes, codes, deaf=False, grace=0.5, worker=WORKER):
    """A process that runs some of these workers."""
    command = [sys.executable, "-c", worker, json.dumps([codes, deaf])]
    script = f"import sys; from experiments import launch; launch.GRACE = {grace}; "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script} sys.exit(launch.run({command!r}, {processes}))"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out.splitlines(), sorted(err.splitlines())


def test_all_processes_know_of_each_other_and_are_seen():
    with launcher(3, {"0": 0, "1": 0, "2": 0}) as process:
        code, out, err = finish(process)
    assert code == 0
    (first,) = out
    start, _, port = first.rpartition(":")
    assert start == "process 0 of 3 at 127.0.0.1"
    assert err == [
        *("[1] a complaint", f"[1] process 1 of 3 at 127.0.0.1:{port}"),
        *("[2] a complaint", f"[2] process 2 of 3 at 127.0.0.1:{port}"),
        "a complaint",
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_failure_ends_all_and_gives_the_exit_code(victim):
    with launcher(3, {str(victim): 7}) as process:
        code, _, err = finish(process)
    assert code == 7
    assert f"process {victim} ended with exit code 7; the others have 0.5 seconds" in err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all(signum):
    with launcher(2, {}) as process:
        while process.stdout.readline() != "waiting\n":
            pass
        while process.stderr.readline() != "[1] waiting\n":
            pass
        process.send_signal(signum)
        code, _, err = finish(process)
    assert code == signum
    assert err == []  # it was asked for


def test_a_second_signal_acts_at_once():
    with launcher(2, {}, deaf=True) as process:
        while process.stderr.readline() != "[1] waiting\n":
            pass
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        code, _, _ = finish(process)
    assert code == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's PR_SET_PDEATHSIG")
def test_a_killed_launcher_s_processes_end_in_order():
    # As `train` does when it is asked to end: says something before and after it saves.
    farewell = 'print("saving", flush=True); time.sleep(0.5); print("saved", flush=True); '
    worker = WORKER.replace("sys.exit(signum))", "end(signum))", 1).replace(
        "import json",
        f"def end(signum): {farewell} sys.exit(signum)\nimport json",
        1,
    )
    with launcher(2, {}, worker=worker) as process:
        while process.stdout.readline() != "waiting\n":
            pass
        while process.stderr.readline() != "[1] waiting\n":
            pass
        process.kill()
        # Their outputs end only with them.
        out, err = process.communicate(timeout=30)
    assert out.splitlines() == ["saving", "saved"]
    assert err.splitlines() == ["[1] saving", "[1] saved"]


# The command itself never starts JAX's backends; other tests in this process have.
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert launch.run([sys.executable, "-c", "pass"], 1) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--processes 2",
            "no command; give one after --, e.g. python -m experiments.launch -- train",
        ),
        ("--processes 2 --", "no command"),
        ("-- trian --steps 3", "unknown command 'trian' (did you mean 'train'?); valid: train"),
        ("--processes 0 -- train", "--processes must be at least 1, got 0"),
        (
            "--processes 2 --devices 3 -- train",
            "--devices 3 (over all processes) does not split evenly over --processes 2; use a",
        ),
    ],
)
def test_wrong_input(words, message, capsys):
    assert launch.main(shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_unknown_option(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--proceses", "2", "--", "train"])
    assert stop.value.code == 2
    assert "--processes" in capsys.readouterr().err


# Training ---------------------------------------------------------------------------------------

# Processes make virtual devices before they read the folder of a run: also where it is resumed.
DEVICES = ["--devices", "4"]
QUICK = ["--task", "digits", "--method", "sgd", "--steps", "20"]
# Random numbers of its own, and many checkpoints.
LONG = ["--task", "digits", "--method", "stoch_grad_adam", "--steps", "300"]
LONG += ["--eval-every", "100", "--checkpoint-every", "20"]


@contextlib.contextmanager
def training(folder, *arguments):
    """Two processes, by the command as typed."""
    command = [sys.executable, "-m", "experiments.launch", "--processes", "2", "--", "train"]
    process = subprocess.Popen(
        [*command, *DEVICES, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def complete(folder, *arguments):
    with training(folder, *arguments) as process:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err


def rows(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def result(folder, name):
    return json.loads((folder / "runs" / name / "result.json").read_text())


def wait_for_rows(process, folder, name, number):
    path = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*DEVICES, *QUICK, "--name", "one"]) == 0
    complete(tmp_path, *QUICK, "--name", "two")
    one, two = rows(tmp_path, "one"), rows(tmp_path, "two")
    # Written once: by process 0 alone.
    assert [row["step"] for row in two] == list(range(1, 21))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(b[key], a[key], rtol=1e-5)
    losses = [result(tmp_path, name)["test_loss"] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's PR_SET_PDEATHSIG")
def test_stopped_runs_save_one_common_step_and_resume_continues(tmp_path):
    """Stopped by a signal, then by the death of its launcher; a fault drill kills a process."""
    complete(tmp_path, *LONG, "--name", "full")
    with training(tmp_path, *LONG, "--name", "stopped") as process:
        wait_for_rows(process, tmp_path, "stopped", 50)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, out + err
    step = rows(tmp_path, "stopped")[-1]["step"]
    assert f"interrupted: saved step {step} of 300" in out
    assert step < 300
    assert (tmp_path / f"runs/stopped/checkpoints/{step}").is_dir()

    with training(tmp_path, "--name", "stopped", "--resume") as process:
        wait_for_rows(process, tmp_path, "stopped", step + 10)
        process.kill()
        out, err = process.communicate(timeout=100)
    later = rows(tmp_path, "stopped")[-1]["step"]
    assert f"interrupted: saved step {later} of 300" in out
    assert step < later < 300
    command = train.resume_command(
        Path("runs/stopped"), devices=4, coordinator="127.0.0.1:80", processes=2
    )
    assert err.count(f"to continue: {command}") == 2
    for sign in ("Traceback", "Check failure", "error: "):
        assert sign not in err

    complete(tmp_path, "--name", "stopped", "--resume")
    assert rows(tmp_path, "stopped") == rows(tmp_path, "full")
    assert result(tmp_path, "stopped") == result(tmp_path, "full")
