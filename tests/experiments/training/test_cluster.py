"""Runs of several processes: how they start, how they stop, what happens when one is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments import launch
from experiments.cli import UsageError
from experiments.training import cluster

ROOT = Path(__file__).parents[3]
# Short enough for a test, long enough for a busy machine.
HEARTBEAT = 10


@contextlib.contextmanager
def workers(processes=2, ids=None, join=(), environment=lambda number: {}, **arguments):
    """Starts processes of a run on this machine; ends them at last."""
    address = f"127.0.0.1:{launch.free_port()}"
    timeouts = {"HEARTBEAT_TIMEOUT": HEARTBEAT} | arguments.pop("timeouts", {})
    started = []
    for i in range(processes) if ids is None else ids:
        own = {"coordinator": address, "processes": processes, "process_id": i} | dict(join)
        argument = json.dumps({"join": own, "timeouts": timeouts, **arguments})
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "tests/experiments/training/cluster_worker.py"),
                    argument,
                ],
                env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment(i),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


DETECT = {"distributed": True, "coordinator": None, "processes": None, "process_id": None}


def told(process):
    """The next thing that a worker tells; Gloo prints on the same stream."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(process.communicate(timeout=60))


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, [json.loads(x) for x in out.splitlines() if x[:1] == "{"], err


def last_line(err):
    return err.splitlines()[-1]


# One process ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, r"--processes and --process-id missing; .* go together"),
        ({"processes": 2, "process_id": 0}, r"--coordinator missing"),
        ({"coordinator": "a:1", "processes": 0, "process_id": 0}, r"--processes must be .* got 0"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, r"between 0 and .*\(1\), got 2"),
        ({"coordinator": "a:1", "processes": 2, "process_id": -1}, r"--process-id .* got -1"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, r"HOST:PORT, got 'a'"),
        ({"coordinator": ":1", "processes": 2, "process_id": 0}, r"HOST:PORT, got ':1'"),
        ({"coordinator": "a:b", "processes": 2, "process_id": 0}, r"HOST:PORT, got 'a:b'"),
        ({"coordinator": "a:65536", "processes": 2, "process_id": 0}, r"HOST:PORT"),
        (
            {"coordinator": "a:1", "processes": 2, "process_id": 0, "devices": 3},
            r"--devices 3 \(over all processes\) does not split evenly over --processes 2",
        ),
        ({"distributed": True, "processes": 2, "devices": 0}, r"--devices 0"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        cluster.initialize(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("127.0.0.1:5", "127.0.0.1:5"),
        ("127.1.2.3:5", "127.1.2.3:5"),
        ("localhost:5", "127.0.0.1:5"),
        ("[::1]:5", "[::1]:5"),
        ("10.0.0.1:5", None),
        ("[fd00::2]:5", None),
        ("node-0:5", None),
    ],
)
def test_a_local_run_listens_to_nobody_else(coordinator, address, monkeypatch):
    given, probed = {}, []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))

    def create_server(place, **_):
        probed.append(place)
        return socket.socket()

    monkeypatch.setattr(socket, "create_server", create_server)
    monkeypatch.setattr(cluster._LastWords, "start", lambda text: None)
    monkeypatch.setattr(cluster.atexit, "register", lambda function: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    cluster.initialize(coordinator=coordinator, processes=1, process_id=0)
    assert given["coordinator_bind_address"] == address
    (where,) = probed
    assert where == ("" if address is None else address.rpartition(":")[0].strip("[]"), 5)


def test_too_late():
    assert jax.devices()
    address = f"127.0.0.1:{launch.free_port()}"
    with pytest.raises(UsageError, match=r"cannot join the run: .*nothing may use JAX"):
        cluster.initialize(coordinator=address, processes=1, process_id=0)


def test_a_single_process_needs_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    cluster.initialize(devices=3)
    assert not jax.distributed.is_initialized()
    assert len(jax.devices()) == 8
    assert cluster.is_main()
    assert cluster.from_main(lambda: "value") == "value"
    cluster.advise("nothing")
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed")
    assert not cluster.worker_lost(lost)  # there is none to lose
    with pytest.raises(jax.errors.JaxRuntimeError), cluster.guard():
        raise lost


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_question_the_second_acts(signum):
    calls = []
    before = signal.signal(signum, lambda *_: calls.append("acted"))
    try:
        with cluster.stop_signals() as requested:
            assert requested() is None
            signal.raise_signal(signum)
            assert requested() == signum
            assert requested() == signum
            assert calls == []
            signal.raise_signal(signum)
            assert calls == ["acted"]
        signal.raise_signal(signum)  # the handlers are those of before
        assert calls == ["acted"] * 2
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_heard_while_a_process_computes(signum):
    program = """if True:
        import ctypes
        from experiments.training import cluster
        cluster.GRACE = 0.1
        with cluster.stop_signals(lambda line: print(line, flush=True)):
            print("computing", flush=True)
            # As while it compiles, no handler in Python runs: the process waits for its own lock.
            lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
            lock(mutex)
            lock(mutex)
    """
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signum)
        assert "the run ends after this step; a second one" in process.stdout.readline()
        process.send_signal(signum)
        assert "stopped at once" in process.communicate(timeout=60)[1]
        assert process.returncode == 128 + signum


# Starting ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed_starts():
    """Processes that cannot join a run, side by side: (exit code, output, errors) of each."""
    quick = {"timeouts": {"INITIALIZATION_TIMEOUT": 2}}
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = {"coordinator": f"127.0.0.1:{taken.getsockname()[1]}"}
        started = {
            "alone": workers(ids=[0], **quick),
            "unreachable": workers(ids=[1], **quick),
            "taken": workers(ids=[0], join=port, **quick),
            "no cluster": workers(ids=[0], join=DETECT, **quick),
        }
        entered = {name: stack.enter_context(context) for name, context in started.items()}
        yield {name: finish(process) for name, (process,) in entered.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unreachable", r"--coordinator 127.0.0.1:\d+ cannot be reached \(Connection refused\)"),
        ("taken", r"process 0 cannot listen on port \d+; take a free one"),
        ("no cluster", r"is found, give --coordinator HOST:PORT --processes N --process-id I"),
    ],
)
def test_errors_at_the_start(failed_starts, name, message):
    code, out, err = failed_starts[name]
    assert (code, out) == (2, [])
    assert re.search(f"^error: .*{message}", last_line(err))


@pytest.mark.slow
def test_the_others_do_not_come(failed_starts):
    code, _, err = failed_starts["alone"]
    assert code == -signal.SIGABRT  # by JAX
    expected = "error: process 0 could not join the run: within 2 seconds not all processes came"
    assert last_line(err).startswith(expected)


def test_detection_of_a_cluster():
    # SLURM's variables; JAX makes the port of the job's number.
    first = 2**16 - 2**12
    ports = (port for port in range(first, 2**16) if is_free(port))
    job = {"SLURM_JOB_ID": str(next(ports) - first), "SLURM_STEP_NODELIST": "localhost"}

    def environment(number):
        return job | {
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": f"{number}",
            "SLURM_LOCALID": f"{number}",
        }

    with workers(join=DETECT, environment=environment) as both:
        for i, process in enumerate(both):
            found = told(process)
            assert (found["main"], found["devices"]) == (i == 0, 2)


def is_free(port):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


# Stopping ---------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_behind_the_same_step():
    with workers(join={"devices": 4}) as (first, second):
        for i, process in enumerate((first, second)):
            assert told(process) == {
                # Process 0 did it; both know what came of it.
                "answers": [{"folder": "runs/a", "process": 0}, "the folder is taken"],
                "main": i == 0,
                "devices": 4,
            }
        assert told(first) == told(second) == {"started": True}
        second.send_signal(signal.SIGTERM)
        (code, (end,), err), (other_code, (other_end,), other_err) = map(finish, (first, second))
    assert (code, other_code) == (0, 0)
    assert end == other_end
    assert end["stopped_by"] == signal.SIGTERM
    assert end["step"] > 5
    assert "error" not in (err + other_err).lower()


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_missed():
    with workers(early_signal=True) as both:
        for code, told_, _ in map(finish, both):
            assert code == 0
            assert told_[-1] == {"step": 1, "stopped_by": signal.SIGTERM}


@pytest.mark.slow
def test_ctrl_c_to_one_process():
    with workers() as (first, second):
        for process in (first, second):
            while told(process) != {"started": True}:
                pass
        first.send_signal(signal.SIGINT)
        (code, (end,), _), (other_code, (other_end,), _) = map(finish, (first, second))
    assert (code, other_code) == (0, 0)
    assert end["step"] == other_end["step"]
    assert (end["stopped_by"], other_end["stopped_by"]) == (signal.SIGINT, signal.SIGTERM)


@pytest.mark.slow
def test_a_second_ctrl_c_acts_at_once():
    with workers() as (first, second):
        for process in (first, second):
            while told(process) != {"started": True}:
                pass
        second.send_signal(signal.SIGSTOP)  # so that no step is agreed on
        first.send_signal(signal.SIGINT)
        time.sleep(0.5)
        began = time.monotonic()
        first.send_signal(signal.SIGINT)
        # A step that waits for another process holds Python up, until the heartbeats end it.
        code, _, _ = finish(first)
        assert time.monotonic() - began < 2 * HEARTBEAT + 10
        assert code != 0


# Lost workers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "signum"),
    [
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_the_survivor_of_a_lost_worker_stops_and_says_so(victim, signum):
    with workers() as both:
        for process in both:
            while told(process) != {"started": True}:
                pass
        both[victim].send_signal(signum)
        began = time.monotonic()
        code, _, err = finish(both[1 - victim])
        assert time.monotonic() - began < 2 * HEARTBEAT + 10
    assert code in (1, -signal.SIGABRT)  # by Python or by JAX, whichever notices first
    who = f"error: process {1 - victim} of 2 "
    assert last_line(err).startswith(who)
    assert "another one of the run" in last_line(err)
    assert last_line(err).endswith("; start again with --resume")


@pytest.mark.slow
def test_an_uncaught_error_in_one_process_ends_all():
    with workers(bug=True) as (first, second):
        code, _, err = finish(second)
        assert code == 1
        assert "ArithmeticError: a bug" in err
        assert last_line(err) == "error: process 1 of 2 failed; start again with --resume"
        code, _, err = finish(first)
        assert code in (1, -signal.SIGABRT)
        assert last_line(err).endswith("; start again with --resume")


def test_a_killed_process_leaves_its_last_words():
    with workers(processes=1) as (process,):
        while told(process) != {"started": True}:
            pass
        process.kill()
        code, _, err = finish(process)
    assert code == -signal.SIGKILL
    assert last_line(err) == (
        "error: process 0 of 1 ended before its time: it was killed, or another one of the run was "
        "lost; start again with --resume"
    )
