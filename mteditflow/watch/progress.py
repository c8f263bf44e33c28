"""How far something is that takes more than some seconds: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY = 30.0  # seconds
SOME_SECONDS = 5.0  # what took longer is said, where nobody has seen it on a bar

Say = Callable[[str], None]
T = TypeVar("T")


def start_bars() -> Progress | None:
    """Begin to draw bars on stderr, `stop` ends it; None where that is no terminal. A task has a field `left`."""
    if not sys.stderr.isatty():
        return None
    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
               TextColumn("{task.description}"))  # fmt: skip
    bars = Progress(*columns, console=Console(stderr=True))
    bars.start()
    return bars


@contextmanager
def show(verb: str, num: int, things: str, bars: Progress | None, say: Say) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many of `num` things are done, first how many were there before: it moves a bar,
    or says in a line, at most every LINE_EVERY seconds, what is done and how long the rest takes at this pace.
    """
    task = None if bars is None else bars.add_task(things, total=num, left="")
    start = last = time.monotonic()
    before: int | None = None

    def tell(done: int) -> None:
        nonlocal last, before
        now, before = time.monotonic(), done if before is None else before
        left = f"{duration((now - start) / (done - before) * (num - done))} left" if before < done < num else ""
        if bars is not None and task is not None:
            bars.update(task, completed=done, left=left)
        elif left and now - last >= LINE_EVERY:
            last = now
            say(f"{verb} {done} of {num} {things}, {left}")

    try:
        yield tell
    finally:
        if bars is not None and task is not None:
            bars.remove_task(task)


def show_sessions(num: int, bars: Progress | None, say: Say) -> AbstractContextManager[Callable[[int], None]]:
    """As `show`, of the sessions of an evaluation."""
    return show("evaluated", num, "held-out sessions", bars, say)


def track(items: Sequence[T], verb: str, things: str, first: int = 0) -> Iterator[T]:
    """Yield the items from the `first` on, and show how many are done, on a bar of its own or in lines on stderr."""
    bars = start_bars()
    try:
        with show(verb, len(items), things, bars, _print) as tell:
            for number, item in enumerate(items[first:], start=first):
                tell(number)
                yield item
            tell(len(items))
    finally:
        if bars is not None:
            bars.stop()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that something is at work whose length nobody knows; elsewhere say what took more than some
    seconds.
    """
    bars, start = start_bars(), time.monotonic()
    if bars is not None:
        bars.add_task(what, total=None, left="")
    try:
        yield
    finally:
        if bars is not None:
            bars.stop()
    if bars is None and (seconds := time.monotonic() - start) > SOME_SECONDS:
        _print(f"{what}: {duration(seconds)}")


def duration(seconds: float) -> str:
    """Say how long it takes, in the unit that fits."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
