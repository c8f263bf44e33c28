"""Where the time of an iteration goes, by phase, without a wait for the GPU.

`phase(NAME)`, around a block or on a function, names what runs in it: to traces (torch.profiler's, and on a GPU an NVTX
range) and to the clock, if one runs. A clock has one timeline, of the thread that started it: the host's time on a
CPU; on a GPU that of its stream, by events that are read when the iteration is over. So what the host does while the
GPU works costs nothing, what the GPU waits for counts where it waits, and the seconds of all phases add up to the
iteration: they are *exposed* seconds. What another thread does is no part of them, and is counted beside.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, Self, get_args

import torch
from torch.profiler import record_function

from mteditflow.record import ending

Phase = Literal[
    "encode text", "encode images", "denoise", "decode", "score", "forward, backward", "optimizer", "evaluate", "save"
]
PHASES: tuple[Phase, ...] = get_args(Phase)
ROLLOUT: tuple[Phase, ...] = PHASES[:4]
STEP: tuple[Phase, ...] = PHASES[:7]
"""Those of every iteration; evaluations and checkpoints come now and then."""
OTHER = "other"
"""What is in no phase."""

Stamp = float | torch.cuda.Event


class Clock:
    """Counts seconds by phase from `with Clock(device) as clock:` on; at most one runs in a process."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._is_cuda, self._now = device.type == "cuda", now
        self._inside: set[int] = set()  # threads that are within a phase
        self._beside: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        global _running
        assert _running is None, "a clock runs already"
        self._thread = threading.get_ident()
        self._marks: list[tuple[str, Stamp]] = [(OTHER, self._stamp())]  # what begins, and when
        _running = self
        return self

    def __exit__(self, *_: object) -> None:
        global _running
        _running = None

    @contextmanager
    def count(self, name: Phase) -> Iterator[None]:
        """Count what runs within as a phase. A phase in a phase is part of it: evaluating denoises, too."""
        thread = threading.get_ident()
        if thread in self._inside:
            yield
            return
        is_beside, start = thread != self._thread, self._now()
        if not is_beside:
            self._marks.append((name, self._stamp()))
        self._inside.add(thread)
        try:
            yield
        finally:
            self._inside.discard(thread)
            if is_beside:
                with self._lock:
                    self._beside[name] = self._beside.get(name, 0.0) + self._now() - start
            else:
                self._marks.append((OTHER, self._stamp()))

    def read(self) -> dict[str, float]:
        """Seconds of every phase and of what is in none, since the start or the last `read`; these begin anew.

        On a GPU the one wait of an iteration, for the work that is queued.
        """
        assert self._thread == threading.get_ident() and self._thread not in self._inside, "read between phases"
        marks: list[tuple[str, Stamp]] = [*self._marks, (OTHER, self._stamp())]
        seconds: dict[str, float] = {name: 0.0 for name in (*PHASES, OTHER)}
        self._marks = marks[-1:]
        last = marks[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        for (name, start), (_, end) in pairwise(marks):
            seconds[name] += _seconds(start, end)
        return seconds

    def read_beside(self) -> dict[str, float]:
        """Seconds of the phases that other threads have ended since the last `read_beside`; they begin anew."""
        with self._lock:
            beside, self._beside = self._beside, {}
        return beside

    def _stamp(self) -> Stamp:
        if not self._is_cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_running: Clock | None = None


def _seconds(start: Stamp, end: Stamp) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Show what runs within as a phase, in a trace and on the clock that runs, if one does. Where the run is asked to
    stop, none begins, but what is done is saved.
    """
    if name != "save":
        ending.check()
    with trace_range(name):
        if _running is None:
            yield
        else:
            with _running.count(name):
                yield


@contextmanager
def trace_range(name: str) -> Iterator[None]:
    """Show what runs within as a range of this name in traces: of torch.profiler, and on a GPU of Nsight (NVTX)."""
    is_cuda = torch.cuda.is_initialized()
    if is_cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if is_cuda:
            torch.cuda.nvtx.range_pop()


def traced(name: str, numbers: Iterable[int]) -> Iterator[int]:
    """Yield the numbers, and show what is done with each as a range in traces, such as `turn 2`."""
    for number in numbers:
        ending.check()
        with trace_range(f"{name} {number}"):
            yield number
