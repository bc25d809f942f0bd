"""The line at the bottom of a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from experiments import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_work_time_and_activity_are_shown(
    terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    terminal.get_time = lambda: now[0]  # type: ignore[method-assign]

    def refreshed() -> str:
        before = len(written(terminal))
        assert progress._shown is not None
        progress._shown.refresh()
        return written(terminal)[before:]

    with progress.show(terminal, "compare", 3):
        with progress.show(terminal, "inside", 1):  # adds to what there is to do
            pass
        progress.tell("kfac: compiling")
        assert "compare ────────────   0% 0:00, ? left  kfac: compiling" in refreshed()
        now[0] = 110.0
        progress.advance()
        assert "compare ━━━─────────  25% 0:10, 0:30 left" in refreshed()
        now[0] = 115.0  # runs down between two calls
        progress.tell(f"seed [3] {100 * '.'}")  # too long for the line, and no markup
        assert "  25% 0:15, 0:25 left  seed [3] ..." in refreshed()
        assert max(map(len, refreshed().splitlines())) <= 110  # 100 and control characters
        now[0] = 7400.0
        progress.advance(3)
        assert " 100% 2:01:40, 0:00 left" in refreshed()
    assert progress._shown is None
    progress.advance()
    progress.tell("nobody shows this")


def test_counted_work_is_timed_behind_the_first_piece(terminal: Console) -> None:
    now = [0.0]
    terminal.get_time = lambda: now[0]  # type: ignore[method-assign]
    line = progress.Line(terminal, "sgd", 100, counted=True, hidden=False)
    line.start(20)  # a run that is resumed
    for seconds, done in ((50.0, 30), (60.0, 50)):
        now[0] = seconds
        line.complete(done)
    line.refresh()
    line.stop()
    assert "sgd ━━━━━━────── 50/100 1:00, 0:25 left" in written(terminal)


def test_each_item_is_a_piece_of_work(terminal: Console) -> None:
    with progress.show(terminal, "a"):
        seen = []
        for item in progress.each("xyz", "item {}".format):
            assert progress._shown is not None
            state = progress._shown.task
            seen.append((item, state.completed, state.total, state.fields["now"]))
    assert seen == [("x", 0, 3, "item x"), ("y", 1, 3, "item y"), ("z", 2, 3, "item z")]
    assert [*progress.each("xyz")] == [*"xyz"]


def test_a_file_gets_plain_lines_only() -> None:
    console = Console(file=io.StringIO())
    with progress.show(console, "a", 2):
        progress.tell("compiling")
        progress.advance()
        console.print("a result")
    assert written(console) == "a result\n"
