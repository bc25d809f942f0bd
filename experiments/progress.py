"""The one line at the bottom of a terminal: how far a command is, how long it takes, what it does.

    compare ━━━━━━━━╸━━━━━━━━━━━  42% 0:01:10 elapsed, 0:01:36 left  kfac: compiling

A command shows it by `show`; whatever it calls says how far it is by `advance`, and what happens
now by `tell`, which do nothing where no command shows them. Where the output goes to a file or a
pipe there is no such line.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
_shown: tuple[Progress, TaskID] | None = None


class _Time(ProgressColumn):
    """The time since the start, and what is left if the rest is as fast as what is done."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        elapsed, left = task.elapsed or 0.0, "time left not known yet"
        if task.total and task.completed >= task.total:
            left = "almost done"
        elif expected := task.fields["seconds"]:
            left = f"{_clock(max(expected - elapsed, 0.0))} left"
        return Text(f"{_clock(elapsed)} elapsed, {left}")


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=math.ceil(seconds)))


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
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        _Time(),
        TextColumn("{task.fields[now]}", markup=False, table_column=Column(no_wrap=True)),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        _shown = progress, progress.add_task(title, total=work, now="", seconds=None)
        try:
            yield
        finally:
            _shown = None


def expect(work: float) -> None:
    """Adds to what there is to do."""
    if _shown is not None:
        progress, task = _shown
        progress.update(task, total=(progress.tasks[0].total or 0.0) + work)


def advance(work: float = 1.0) -> None:
    """Says that something of it is done."""
    if _shown is not None:
        progress, task = _shown
        progress.update(task, advance=work)
        state = progress.tasks[0]
        if state.completed and state.total and state.elapsed:
            # At the mean speed up to now; between two calls the time left just runs down.
            seconds = state.elapsed * max(state.total / state.completed, 1.0)
            progress.update(task, seconds=seconds)


def tell(now: str) -> None:
    """Says what happens now, such as ``"kfac: compiling"``."""
    if _shown is not None:
        progress, task = _shown
        progress.update(task, now=now)


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
