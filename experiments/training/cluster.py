"""Starting and stopping runs of several processes.

The distributed engine is JAX's: `jax.distributed` brings the processes together, its coordination
service watches over them by heartbeats, its preemption service agrees on a step at which all stop.
This module adds what a command line needs around it: `initialize` joins a run, `from_main` runs on
one process what only one may do, `stop_signals` ends all processes after the same step, and a
process that ends prematurely leaves one line that says so and how to go on.

Lost workers (jax 0.10): when one is killed, the collectives of the others fail at once or hang. In
both cases the coordination service ends them: as soon as the connection to process 0 breaks, or, if
it is another process that died or hangs, `HEARTBEAT_TIMEOUT` seconds after its last sign of life.
It aborts the process from a C++ thread, with a stack trace and without returning to Python, so the
line comes from a small helper process (`_LastWords`) that outlives it.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.cli import UsageError

T = TypeVar("T")
# Seconds for the handler of a second signal to run, which waits for the end of a compilation.
GRACE = 2.0

# Seconds that the processes of a run wait for each other at the start: the nodes of a cluster, and
# their containers, do not start at the same time. (JAX: 300)
INITIALIZATION_TIMEOUT = 120
# Seconds without a sign of life after which a process counts as lost, which bounds how long the
# others hang. C++ threads send the signs, so neither Python nor a long computation delays them; a
# machine that swaps or a network that fails does. (JAX: 100)
HEARTBEAT_TIMEOUT = 30
# Seconds that a process waits for the others at its end. It bounds how long a process that failed
# alone holds up the run, and how long process 0 may go on writing results. (JAX: 300)
SHUTDOWN_TIMEOUT = 60
# Each virtual CPU device has its own threads.
MOST_VIRTUAL = 512

# What the errors of collectives and of the coordination service say when a peer is gone, in lower
# case: Gloo's (CPU), NCCL's (GPU), the network's, the service's.
_LOST = (
    *("gloo", "nccl", "socket closed", "connection closed", "connection reset", "broken pipe"),
    *("heartbeat", "unhealthy", "coordination", "unavailable:", "deadline_exceeded:"),
)


def initialize(
    *,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    devices: int | None = None,
) -> None:
    """Joins a run of several processes; does nothing if none of the first four arguments is set.

    Call it before anything that starts JAX's backends, such as `jax.devices()`.

    Args:
      distributed: let JAX detect what is not passed: under SLURM, Open MPI, Kubernetes (with the
        package ``kubernetes``) and on Cloud TPUs.
      coordinator: ``HOST:PORT`` at which the other processes reach process 0.
      processes: number of processes.
      process_id: number of this process, from 0 to ``processes`` - 1.
      devices: number of devices over all processes; on a CPU that many virtual ones are made if
        ``processes`` is set.

    Raises:
      UsageError: these do not fit together, no cluster is found or process 0 cannot be reached.
    """
    explicit = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [name for name, value in explicit.items() if value is None]
    if not distributed and len(missing) == len(explicit):
        return
    if not distributed and missing:
        raise UsageError(
            f"{' and '.join(missing)} missing; {', '.join(explicit)} go together, or with "
            "--distributed, which asks the cluster for what is missing"
        )
    _check_arguments(coordinator, processes, process_id, devices)
    who = "this process" if process_id is None else f"process {process_id}"
    _LastWords.start(
        f"error: {who} could not join the run: within {INITIALIZATION_TIMEOUT} seconds not all "
        "processes came, or the port of process 0 is taken; start all of them together, with the "
        "same --coordinator and --processes"
    )
    try:
        if processes is not None and devices is not None:
            jax.config.update("jax_num_cpu_devices", devices // processes)
        if coordinator is not None and process_id is not None:
            _check_coordinator(coordinator, process_id)
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            # Given everything, JAX would still ask the cluster for the devices of this process.
            cluster_detection_method=None if missing else "deactivate",
            coordinator_bind_address=None if coordinator is None else _bind_address(coordinator),
            initialization_timeout=INITIALIZATION_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except Exception as error:
        _LastWords.stop()
        if isinstance(error, UsageError):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        fix = (
            "where no cluster (SLURM, Open MPI, Kubernetes, Cloud TPU) is found, give "
            "--coordinator HOST:PORT --processes N --process-id I"
            if missing
            else "nothing may use JAX's devices before"
        )
        raise UsageError(f"cannot join the run: {reason}; {fix}") from error
    # Before JAX's own handler, so that the last words still stand while it waits for the others.
    atexit.register(_leave)
    sys.excepthook = _fail
    advise("start all processes again")


def _check_arguments(
    coordinator: str | None, processes: int | None, process_id: int | None, devices: int | None
) -> None:
    """Raises `UsageError` for values that cannot be meant, before anybody waits for anybody."""
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise UsageError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if processes is not None:
        check_processes(processes, devices)
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        raise UsageError(
            f"--process-id must be between 0 and --processes - 1 ({(processes or 1) - 1}), got "
            f"{process_id}"
        )


def check_processes(processes: int, devices: int | None) -> None:
    """Raises `UsageError` if ``--devices`` (over all) does not split over ``--processes``."""
    if processes < 1:
        raise UsageError(f"--processes must be at least 1, got {processes}")
    if devices is not None and (devices < 1 or devices % processes):
        raise UsageError(
            f"--devices {devices} (over all processes) does not split evenly over --processes "
            f"{processes}; use a multiple of {processes}"
        )
    check_virtual_devices(0 if devices is None else devices // processes)


def check_virtual_devices(number: int) -> None:
    """Raises `UsageError` for more virtual CPU devices than one process can have."""
    if number > MOST_VIRTUAL:
        raise UsageError(f"--devices must be at most {MOST_VIRTUAL} in a process, got {number}")


def _check_coordinator(address: str, process_id: int) -> None:
    """Waits until process 0 listens, or, as process 0, tries the port: JAX would just abort."""
    host, _, port = address.rpartition(":")
    if process_id == 0:
        try:
            at, _, _ = (_bind_address(address) or "").rpartition(":")
            family = socket.AF_INET6 if at.startswith("[") else socket.AF_INET
            socket.create_server((at.strip("[]"), int(port)), family=family).close()
        except OSError:
            raise UsageError(
                f"--coordinator {address}: process 0 cannot listen on port {port}; take a free one"
            ) from None
        return
    deadline = time.monotonic() + INITIALIZATION_TIMEOUT
    while True:
        try:
            # An IPv6 host stands in brackets.
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"--coordinator {address} cannot be reached ({error.strerror or error}); name "
                    "the host of process 0, and a port that is free there and not blocked"
                ) from None
            time.sleep(0.1)


def _bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: on the loopback interface only, if that is how others reach it.

    JAX's coordination service has no authentication and would listen on all interfaces.

    Args:
      coordinator: ``HOST:PORT`` as the others name it.

    Returns:
      An address and the port; ``None``, which means JAX's default, if the processes are on several
      machines.
    """
    host, _, port = coordinator.rpartition(":")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        loopback = False
    return f"{host}:{port}" if loopback else None


def is_main() -> bool:
    """Whether this is process 0, the one that writes files; also true for a single process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_main(function: Callable[[], T]) -> T:
    """Calls a function on process 0 only, while the others wait.

    Example:
        >>> from_main(lambda: {"resume": False})
        {'resume': False}

    Args:
      function: what to run; its result has to be plain JSON.

    Returns:
      The result, on all processes.

    Raises:
      Exception: that of the function; on the other processes a `UsageError` with its message.
    """
    if not jax.distributed.is_initialized():
        return function()
    failure = None
    answer: dict[str, Any] = {}
    if is_main():
        try:
            answer = {"result": function()}
        except Exception as error:
            failure, answer = error, {"error": str(error) or type(error).__name__}
    message = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(message.size)))
    padded = message if is_main() else np.zeros(size, np.uint8)
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise UsageError(answer["error"])
    return answer["result"]


def gather(numbers: np.ndarray) -> np.ndarray:
    """The numbers of all processes, those of process 0 first; all processes have to call it.

    Example:
        >>> gather(np.array([3, 4])).shape
        (1, 2)

    Args:
      numbers: an array of the same shape and dtype, of 32 bits at most, on every process.

    Returns:
      The arrays, stacked.
    """
    if not jax.distributed.is_initialized():
        return numbers[None]
    return np.asarray(multihost_utils.process_allgather(numbers)).reshape(-1, *numbers.shape)


@contextlib.contextmanager
def stop_signals(say: Callable[[str], None] | None = None) -> Iterator[Callable[[], int | None]]:
    """Records the first Ctrl-C or SIGTERM, so that a loop can ask for it after each step.

    The second Ctrl-C acts at once (so does a second SIGTERM, in a single process). Python's own
    handlers wait for the end of a compilation; a thread, in a single process, does not.

    With several processes, all have to ask equally often. A signal to one of them stops all: JAX's
    preemption service agrees on a step that none has passed. It counts the questions from 1 rather
    than the steps: a signal that arrives before the first question ends the run at that question,
    and would be missed if a resumed run began to count at a later step.

    Args:
      say: gets a line at once when a signal arrives, from another thread; in a single process.

    Yields:
      A function that returns the signal's number (for a signal to another process: SIGTERM) or
      ``None``. It takes about 10 microseconds.
    """
    several = jax.distributed.is_initialized()
    received: int | None = None

    def receive(signum: int, frame: Any) -> None:
        nonlocal received
        received = signum
        if several:
            signal.signal(signum, lambda *_: abort("error: stopped at once", 128 + signum))
            signal.raise_signal(signal.SIGTERM)
        else:
            signal.signal(signum, act)

    def act(signum: int, frame: Any) -> None:
        handled.set()
        signal.signal(signum, previous[signum])
        signal.raise_signal(signum)

    # SIGTERM has a handler of JAX's in a distributed run, of which Python knows nothing.
    caught: list[int] = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    previous: dict[int, Any] = {signum: signal.getsignal(signum) for signum in caught}
    questions = itertools.count(1)
    handled = threading.Event()

    def requested() -> int | None:
        if not several:
            return received
        reached = multihost_utils.reached_preemption_sync_point(next(questions))
        return (received or signal.SIGTERM) if reached else None

    for signum in caught:
        signal.signal(signum, receive)
    try:
        with contextlib.nullcontext() if several else _watched_signals(caught, handled, say):
            yield requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _watched_signals(
    caught: list[int], handled: threading.Event, say: Callable[[str], None] | None
) -> Iterator[None]:
    """Tells of signals as they arrive, and ends a process that cannot handle the second one.

    Args:
      caught: which signals.
      handled: set by the handler of the second signal, which runs between two steps of Python.
      say: gets the line that says what will happen.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        arrived = 0
        while data := reader.recv(1):
            if data[0] not in caught:
                continue
            arrived += 1
            name = signal.Signals(data[0]).name
            if arrived == 1 and say is not None:
                say(f"{name}: the run ends after this step; a second one ends it at once")
            # The handler is waited for, so that what it runs can clean up.
            if arrived == 2 and not handled.wait(GRACE):
                print(f"{name}: stopped at once", file=sys.stderr, flush=True)
                os._exit(128 + data[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        handled.set()
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()


# Lost workers -----------------------------------------------------------------------------------


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Ends the process at once, in one line, if an error says that another one is gone.

    Belongs around as little as possible: what cleans up further out may wait for all processes.
    """
    try:
        yield
    except Exception as error:
        if worker_lost(error):
            abort(f"error: {_who()} lost another one of the run; {_LastWords.advice}")
        raise


def worker_lost(error: BaseException) -> bool:
    """Whether an error of a computation says that another process of the run is gone."""
    text = str(error).lower()
    return (
        jax.distributed.is_initialized()
        # Which of the two it is depends on whether the computation was waited for.
        and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
        and not isinstance(error, UsageError)
        and any(sign in text for sign in _LOST)
    )


def advise(advice: str) -> None:
    """Sets what the last line of a process that ends before its time tells to do.

    Args:
      advice: one line, e.g. how to go on from which step.
    """
    if jax.distributed.is_initialized():
        _LastWords.advice = advice
        _LastWords.say(
            f"error: {_who()} ended before its time: it was killed, or another one of the run was "
            f"lost; {advice}"
        )


def abort(message: str, code: int = 1) -> NoReturn:
    """Leaves a run of several processes with a message and an exit code, and waits for nobody."""
    _LastWords.say(message)  # after all that JAX's threads have to say
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        # The others end when they lose their connection to this one; where they have met the same
        # error, they should be able to say so.
        time.sleep(1)
    os._exit(code)


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _fail(*error: Any) -> None:
    """What an uncaught error does: leaves the others at once, instead of keeping them waiting."""
    sys.__excepthook__(*error)
    abort(f"error: {_who()} failed; {_LastWords.advice}")


def _leave() -> None:
    """The orderly end: waits for the other processes."""
    jax.distributed.shutdown()
    _LastWords.stop()


class _LastWords:
    """A process that says something when this one is gone, however that came about."""

    _SCRIPT = """if True:
        import json, signal, sys
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        line = '""'
        for line in sys.stdin:  # until the other end is closed
            pass
        sys.stderr.write(json.loads(line))
    """
    _process: subprocess.Popen[str] | None = None
    advice = ""

    @classmethod
    def start(cls, text: str) -> None:
        cls._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", cls._SCRIPT],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is not meant for it
        )
        cls.say(text)

    @classmethod
    def say(cls, text: str) -> None:
        """Replaces what it is to say."""
        if cls._process is not None and cls._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                cls._process.stdin.write(json.dumps(text and text + "\n") + "\n")
                cls._process.stdin.flush()

    @classmethod
    def stop(cls) -> None:
        """Ends it without a word."""
        cls.say("")
        if cls._process is not None:
            cls._process.communicate()
            cls._process = None
