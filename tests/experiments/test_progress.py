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
    with progress.show(terminal, "compare", 3):
        shown, _ = progress._shown or pytest.fail("nothing is shown")
        with progress.show(terminal, "inside", 1):  # adds to what there is to do
            pass
        progress.tell("kfac: compiling")
        shown.refresh()
        assert "compare" in written(terminal)
        assert "0:00:00 elapsed, time left not known yet kfac: compiling" in written(terminal)
        now[0] = 110.0
        progress.advance()
        shown.refresh()
        assert " 25% 0:00:10 elapsed, 0:00:30 left" in written(terminal)
        now[0] = 115.0  # runs down between two calls
        progress.tell("seed [3]")
        shown.refresh()
        assert " 25% 0:00:15 elapsed, 0:00:25 left" in written(terminal)
        assert "seed [3]" in written(terminal)
    assert progress._shown is None
    progress.advance()
    progress.tell("nobody shows this")


def test_each_item_is_a_piece_of_work(terminal: Console) -> None:
    with progress.show(terminal, "a"):
        seen = []
        for item in progress.each("xyz", "item {}".format):
            state = (progress._shown or pytest.fail("nothing is shown"))[0].tasks[0]
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
