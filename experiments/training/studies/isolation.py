"""A process of its own for measurements that may run out of time or memory, or crash."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

Status = Literal["done", "failed", "out of memory", "stopped"]
Function = Callable[[str], Any]


class Outcome(NamedTuple):
    """What became of a call.

    Attributes:
      status: ``"done"``; ``"failed"``, it raised an exception or the process crashed; ``"out of
        memory"``, of the device or of the machine; ``"stopped"``, it took too long.
      value: what the function returned; None unless the call is done.
      reason: why it is not done, in one line.
    """

    status: Status
    value: Any = None
    reason: str = ""


class Isolated:
    """Calls a function in another process, one call at a time.

    That process starts at the first call and serves all further ones, so that the function can
    keep what it has compiled. After a call that is not done it is replaced: memory is free again,
    and a device that is in an invalid state is opened anew.

    Args:
      make: makes the function, in the other process; both it and its arguments can be pickled.
      *args: its arguments.
    """

    def __init__(self, make: Callable[..., Function], *args: Any):
        self._make, self._args = make, args
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def call(self, name: str, seconds: float) -> Outcome:
        """Calls the function.

        Args:
          name: its argument.
          seconds: the process is killed after this time.

        Returns:
          What became of the call.
        """
        if self._process is None:
            # Spawned, not forked: JAX has threads, and a device belongs to one process.
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(other, self._make, self._args), daemon=True
            )
            self._process.start()
            other.close()
        assert self._connection is not None
        try:
            self._connection.send(name)
            if self._connection.poll(seconds):
                outcome = Outcome(*self._connection.recv())
            else:
                outcome = Outcome("stopped", reason=f"took more than {seconds:.0f} s")
        except (EOFError, OSError):
            outcome = _crash(self._process)
        if outcome.status != "done":
            self.close()
        return outcome

    def close(self) -> None:
        """Ends the process; a further call starts another one."""
        if self._process is not None:
            assert self._connection is not None
            self._process.kill()  # a compilation does not heed SIGTERM
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _crash(process: multiprocessing.process.BaseProcess) -> Outcome:
    """What the exit code of a process says that ended in the middle of a call."""
    process.join()
    code = process.exitcode
    if code == -signal.SIGKILL:
        return Outcome(
            "out of memory", reason="the system killed the process, as it does without memory left"
        )
    return Outcome("failed", reason=f"the process ended with exit code {code}")


def _serve(connection: Connection, make: Callable[..., Function], args: tuple[Any, ...]) -> None:
    """Answers calls until the other side goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    function = make(*args)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            outcome = Outcome("done", function(name))
        except Exception as error:
            text = str(error)
            is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
            line = text.strip().partition("\n")[0][:300]
            outcome = Outcome(
                "out of memory" if is_memory else "failed",
                reason=f"{type(error).__name__}: {line}" if line else type(error).__name__,
            )
        connection.send(tuple(outcome))
