"""How far an evaluation is: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 30.0  # seconds


def start_bars() -> Progress | None:
    """Begin to draw bars on stderr, `stop` ends it; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn(), TextColumn("{task.description}"))  # fmt: skip
    bars = Progress(*columns, console=Console(stderr=True), speed_estimate_period=600)  # s: an iteration takes many
    bars.start()
    return bars


@contextmanager
def show_sessions(num: int, bars: Progress | None, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many of `num` sessions are evaluated, first how many were there before: it moves
    a bar, or says in a line, at most every LINE_EVERY seconds, what is done and how long the rest takes at this pace.
    """
    if bars is not None:
        task = bars.add_task("held-out sessions", total=num)
        try:
            yield lambda done: bars.update(task, completed=done)
        finally:
            bars.remove_task(task)
        return
    start = last = time.monotonic()
    before: int | None = None

    def line(done: int) -> None:
        nonlocal last, before
        now, before = time.monotonic(), done if before is None else before
        if done in (before, num) or now - last < LINE_EVERY:
            return
        last, left = now, (now - start) / (done - before) * (num - done)
        say(f"evaluated {done} of {num} held-out sessions, {duration(left)} left")

    yield line


def duration(seconds: float) -> str:
    """Say how long it takes, in the unit that fits."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"
