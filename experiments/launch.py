"""Start a run of several processes on this machine, to try out what a cluster will do.

    python -m experiments.launch --processes 2 -- train --task digits --method demon_sgd
    python -m experiments.launch --processes 2 --devices 8 -- train --task digits --parallel fsdp

What follows ``--`` is a command that knows ``--coordinator``, ``--processes`` and ``--process-id``,
and its own options, all of which every process gets. The processes run on virtual CPU devices
unless JAX_PLATFORMS says otherwise (GPUs have to be divided between them). Process 0 prints as if
it ran alone; each line of the others starts with their number.

Ctrl-C and SIGTERM are passed on to all processes; the second one ends them at once. If one process
fails, the others have `GRACE` seconds to end. If the launcher itself is killed, its processes
receive SIGTERM (on Linux), upon which they save and end. The exit code is that of the first process
that failed.

JAX's coordination service listens on the loopback interface only, so that nobody else on the
network can join. (Gloo, which carries the collectives on CPUs, listens at the address that this
machine's name resolves to.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import ClassVar

from experiments import cli
from experiments.cli import UsageError
from experiments.training import cluster

PROG = "python -m experiments.launch"
COMMANDS = ("train",)
# Seconds between one process's failure and the end of the others. Those that meet the same error
# need a moment to say so; those that hang would take `cluster.HEARTBEAT_TIMEOUT`.
GRACE = 10
_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


@dataclasses.dataclass(frozen=True)
class Options(cli.DryRunOptions):
    """Start a run of several processes on this machine; what each one runs follows --."""

    limits: ClassVar = {"processes": cli.Range(1, 256)}

    processes: int = 2
    """Number of processes."""
    devices: int | None = None
    """Number of virtual CPU devices over all processes; default: one for each."""


def run(command: Sequence[str], processes: int) -> int:
    """Runs copies of a command that differ in their process id, until all have ended.

    Args:
      command: program and arguments; each copy gets ``--coordinator``, ``--processes`` and
        ``--process-id`` in addition.
      processes: number of copies.

    Returns:
      The exit code of the first process that failed (128 + signal if a signal ended it), or 0.
    """
    received: list[int] = []
    previous = {
        signum: signal.signal(signum, lambda signum, _: received.append(signum))
        for signum in (signal.SIGINT, signal.SIGTERM)
    }
    running: dict[int, subprocess.Popen[bytes]] = {}
    prefixes: list[subprocess.Popen[bytes]] = []
    try:
        address = f"127.0.0.1:{free_port()}"
        for i in range(processes):
            arguments = ["--coordinator", address, "--processes", f"{processes}"]
            output = None
            if i:
                prefixes.append(_prefix(i))
                output = prefixes[-1].stdin
            running[i] = subprocess.Popen(
                [*command, *arguments, "--process-id", f"{i}"],
                env={"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C comes through this process, once
                preexec_fn=functools.partial(_end_with_parent, os.getpid()),
            )
            if output is not None:
                output.close()  # the process has it, and the prefixes end with the process
        return _wait(running, received)
    finally:
        for process in running.values():  # there are none unless something went wrong here
            process.kill()
            process.wait()
        for prefix in prefixes:
            prefix.wait()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _wait(running: dict[int, subprocess.Popen[bytes]], received: list[int]) -> int:
    """Waits for all processes, which it removes as they end; returns the first code but 0."""
    code = forwarded = 0
    deadline = float("inf")
    while running:
        time.sleep(0.05)
        for i, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[i]
            if process.returncode and not code:
                code = process.returncode if process.returncode > 0 else 128 - process.returncode
                deadline = time.monotonic() + GRACE
                if running and not received:
                    print(
                        f"process {i} ended with exit code {code}; the others have {GRACE} seconds",
                        file=sys.stderr,
                    )
        for signum in received[forwarded:]:
            for process in running.values():
                process.send_signal(signal.SIGKILL if forwarded else signum)
            forwarded += 1
        if time.monotonic() > deadline:
            for process in running.values():
                process.kill()
    return code


# Puts a number before each line. It outlives the launcher: a process whose output nobody reads
# would be killed by printing its next line, before it has saved.
_PREFIX = """if True:
    import signal, sys
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    told = True
    for line in sys.stdin.buffer:
        try:
            told and sys.stderr.buffer.write(sys.argv[1].encode() + line)
            told and sys.stderr.buffer.flush()
        except OSError:
            told = False
"""


def _prefix(number: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PREFIX, f"[{number}] "],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _end_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent was killed before
            os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def dry_run(started: Sequence[str], processes: int) -> int:
    """Prints what would be started; returns the exit code."""
    own = f"see {shlex.join(['python', *started, '--dry-run'])}"
    lines = {
        "plan": f"{processes} times {shlex.join(['python', *started])} on this "
        "machine, each with --coordinator, --processes and --process-id",
        "runs": "1, by all processes together",
        "parameters": own,
        "memory": f"{processes} times that of one process: {own}",
        "time": cli.TIME_NOT_KNOWN,
    }
    return cli.print_forecast(cli.console(120), lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options = cli.parse(Options(), words[:split], PROG)
    command = words[split + 1 :]
    try:
        cluster.check_processes(options.processes, options.devices)
        if not command:
            raise UsageError(f"no command; give one after --, e.g. {PROG} -- {COMMANDS[0]}")
        cli.check_known("command", command[0], COMMANDS)
    except UsageError as error:
        return cli.fail(error)
    if options.devices is not None:
        command += ["--devices", f"{options.devices}"]
    started = ["-m", f"experiments.{command[0]}", *command[1:]]
    if options.dry_run:
        return dry_run(started, options.processes)
    return run([sys.executable, *started], options.processes)


if __name__ == "__main__":
    sys.exit(main())
