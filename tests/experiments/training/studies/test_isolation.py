"""A call that crashes, hangs or runs out of memory costs one call, not the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from experiments.training.studies.isolation import Isolated, Outcome


def make(answer: int) -> Callable[[str], int]:
    """Misbehaves on demand, in the other process."""

    def call(name: str) -> int:
        match name:
            case "memory":
                raise RuntimeError("RESOURCE_EXHAUSTED: 5 GiB\nand a long trace")
            case "fails":
                raise ValueError("no")
            case "exits":
                os._exit(3)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                time.sleep(600)
            case "process":
                return os.getpid()
        return answer

    return call


def test_outcomes() -> None:
    with Isolated(make, 7) as isolated:
        first, second = isolated.call("process", 60), isolated.call("process", 60)
        assert first.status == "done"
        assert first == second  # one process serves all calls
        assert first.value != os.getpid()
        memory = isolated.call("memory", 60)
        assert memory == Outcome("out of memory", None, "RuntimeError: RESOURCE_EXHAUSTED: 5 GiB")
        third = isolated.call("process", 60)
        assert third.value != first.value  # the memory of the old one is free
        assert isolated.call("fails", 60) == Outcome("failed", None, "ValueError: no")
        assert isolated.call("exits", 60).reason == "the process ended with exit code 3"
        assert isolated.call("killed", 60).status == "out of memory"
        assert isolated.call("", 60) == Outcome("done", 7)
        begin = time.monotonic()
        assert isolated.call("hangs", 0.1) == Outcome("stopped", None, "took more than 0 s")
        assert time.monotonic() - begin < 60
        fourth = isolated.call("process", 60)
    # The process has ended and has been waited for: there is none with its number.
    assert not os.path.exists(f"/proc/{fourth.value}")
