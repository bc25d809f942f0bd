"""The one line at the bottom of a terminal: how far a command is, how long it takes, what it does.

    compare ━━━━━─────── 42% 1:10, 1:36 left  kfac: compiling

A command shows it by `show`; whatever it calls says how far it is by `advance`, and what happens
now by `tell`, which do nothing where no command shows them. Where the output goes to a file or a
pipe there is no such line.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
BAR = 12  # characters


class Line:
    """The line itself.

    Args:
      console: where.
      title: what it begins with.
      work: what there is to do, in any unit.
      counted: whether the work is shown as a number rather than in percent; then the time left
        follows from the pieces behind the first one, which takes the compilation.
      hidden: whether nothing is shown.
    """

    def __init__(
        self, console: Console, title: str, work: float, *, counted: bool = False, hidden: bool
    ):
        self._counted = counted
        self._start: tuple[float, float] | None = None if counted else (0.0, 0.0)  # time, work
        column = _Column(console, counted)
        self._progress = Progress(column, console=console, transient=not counted, disable=hidden)
        self._id = self._progress.add_task(title, total=work, now="", seconds=None, start=False)
        self.task = self._progress.tasks[0]

    def start(self, done: float = 0.0) -> None:
        """Shows the line, with what was done before; the clock starts with the first call."""
        self._progress.start()
        self._progress.start_task(self._id)
        self._start = None if self._counted else (0.0, done)
        self._progress.update(self._id, completed=done, seconds=None)

    def stop(self) -> None:
        """Stops showing it."""
        self._progress.stop()

    def refresh(self) -> None:
        """Shows it now, and not only some times a second."""
        self._progress.refresh()

    def expect(self, work: float) -> None:
        """Adds to what there is to do."""
        self._progress.update(self._id, total=(self.task.total or 0.0) + work)

    def complete(self, done: float) -> None:
        """Says how much of it is done."""
        self._progress.update(self._id, completed=done)
        now, total = self.task.elapsed or 0.0, self.task.total or 0.0
        if self._start is None:
            self._start = now, done
        begin, before = self._start
        if done > before:
            # At the mean speed up to now; between two calls the time left just runs down.
            seconds = now + (now - begin) * max(total - done, 0.0) / (done - before)
            self._progress.update(self._id, seconds=seconds)

    def tell(self, now: str) -> None:
        """Says what happens now, such as ``"kfac: compiling"``."""
        self._progress.update(self._id, now=now)


class _Column(ProgressColumn):
    """All of the line as one text, whose end is cut off where it is too long."""

    def __init__(self, console: Console, counted: bool):
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._counted = counted
        self._signs = ("━", "─") if console.encoding.startswith("utf") else ("#", "-")

    def render(self, task: Task) -> Text:
        done, total, elapsed = task.completed, task.total or 0.0, task.elapsed or 0.0
        share = min(done / total, 1.0) if total else 0.0
        full, empty = self._signs
        filled = round(BAR * share)
        amount = f"{done:.0f}/{total:.0f}" if self._counted else f"{share:4.0%}"
        left = "?" if task.fields["seconds"] is None else _clock(task.fields["seconds"] - elapsed)
        if total and done >= total:
            left = "0:00"
        return Text.assemble(
            f"{task.description} ",
            (full * filled, "bar.complete"),
            (empty * (BAR - filled), "bar.back"),
            f" {amount} {_clock(elapsed)}, {left} left  {task.fields['now']}",
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_shown: Line | None = None


@contextlib.contextmanager
def show(console: Console, title: str, work: float = 0.0) -> Iterator[None]:
    """Shows the line while a block runs.

    Args:
      console: where; nothing is shown unless it is a terminal.
      title: what the line begins with.
      work: what there is to do, in any unit; inside of another `show` it is added to what that
        one has to do.
    """
    global _shown
    if _shown is not None:
        expect(work)
        yield
        return
    _shown = Line(console, title, work, hidden=not console.is_terminal)
    try:
        _shown.start()
        yield
    finally:
        _shown.stop()
        _shown = None


def expect(work: float) -> None:
    """Adds to what there is to do."""
    if _shown is not None:
        _shown.expect(work)


def advance(work: float = 1.0) -> None:
    """Says that something of it is done."""
    if _shown is not None:
        _shown.complete(_shown.task.completed + work)


def tell(now: str) -> None:
    """Says what happens now, such as ``"kfac: compiling"``."""
    if _shown is not None:
        _shown.tell(now)


def each(
    items: Sequence[T], name: Callable[[T], str] = str, *, expected: bool = False
) -> Iterator[T]:
    """The items, each a piece of work of the same size.

    Args:
      items: what to go through.
      name: what is shown while the work on an item goes on.
      expected: whether their number is part of what `show` or `expect` was told; else it is added.

    Yields:
      One item after the other.
    """
    expect(0 if expected else len(items))
    for item in items:
        tell(name(item))
        yield item
        advance()
