"""How the process of a run ends: asked by a signal, by a fault, or because another rank is gone.

**Signals** (torchrun hands on its own; SLURM sends SIGUSR1 before it takes a machine away). Each `phase` looks, so that
the microbatch at work ends and `Stopped` is raised. But no handler in Python runs while the main thread is in C++, as
in a collective that a dead rank will never enter. So signals go into a pipe too, which a thread reads: GRACE_S after
one it saves and ends the process, whatever the main thread does. Until there is something to lose it does so at once.

**Ranks.** torchrun ends the others as soon as one has ended, if need be by SIGKILL after 30 s. So a rank with a fault
says it, and is gone: nothing is destroyed, joined or waited for. One rank speaks, the first with a fault; what the
others get from it, a broken connection and SIGTERM, is no cause. Who has spoken is on a `Board`, in torchrun's store. A
rank that was killed cannot speak: another sees that its process is gone.
"""

import errno
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import psutil

from mteditflow.config.errors import first_line, printable, write_error_file
from mteditflow.record.files import is_disk_full

if TYPE_CHECKING:  # torch is imported after signals are heeded
    from mteditflow.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 12.0  # from a signal to the end: torchrun and SLURM kill after 30
LOST_S = 6.0  # that a rank which lost another waits for torchrun's SIGTERM before it speaks
FIRST_S = 3.0  # that other ranks leave to the first, where all have the same to say
STORE_S = 5  # for a word to the board
PERIOD_S = 0.5

REMEDIES = {
    errno.ENOENT: "give a path that is there",
    errno.EACCES: "take a path that you may read and write",
    errno.EPERM: "take a path that you may read and write",
    errno.EROFS: "take a path that you may write to",
    errno.ENOTDIR: "part of the path is a file and must be a folder: take another path",
    errno.EISDIR: "give a file, this is a folder",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""Of a path that the system refuses."""

T = TypeVar("T")
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|pair closure|Broken pipe")
_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)


class Stopped(BaseException):
    """The run is asked to stop."""


class Ending:
    """Around all that the process of a run does; one at a time, entered by the main thread.

    What is raised within ends the process: SystemExit with 128 and the signal's number where it was asked to stop; the
    fault itself of a single process; with several ranks there and then.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self._is_over, self._is_saved = False, False
        self._save: Callable[[], str] | None = None
        self._after = "goes on from there"
        self._board: Board | None = None
        self._is_one_of_many = os.environ.get("WORLD_SIZE", "1") != "1"
        self._is_main = os.environ.get("RANK", "0") == "0"
        self._hold, self._is_asked = threading.RLock(), threading.Event()

    def __enter__(self) -> Self:
        global _current
        assert _current is None, "a run is at work in this process already"
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before: dict[int, Any] = {}
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                self._before[number] = signal.signal(number, self._on_signal)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        _current = self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_alike = self._is_one_of_many and self._board is None and not self.asked  # on all ranks, most likely
        if error is None or isinstance(error, SystemExit) or (is_alike and explain(error) is not None):
            self._close()
            return
        if self._is_one_of_many and is_of_a_lost_rank(error) and not self.asked:
            self._is_asked.wait(LOST_S)
        with self._hold:
            if self.asked:
                self.save()
            self._is_over, code = True, self._say_end(error)
            if self._is_one_of_many:
                _exit(code)
        self._close()
        if self.asked:
            raise SystemExit(code) from None

    def meet(self, ranks: "Ranks") -> None:
        """Let the ranks that were joined know of one another's end."""
        if ranks.world_size > 1:
            self._board = Board(ranks)

    def begin(self, save: Callable[[], str]) -> None:
        """From here on there is something to lose. `save` keeps it, and says where the same command goes on."""
        self._save = save

    def save(self) -> None:
        """Call what was given to `begin`, once."""
        with self._hold:
            if self._save is not None and not self._is_saved:
                self._is_saved, self._after = True, self._save()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.asked = self.asked or number

    def _watch(self) -> None:
        parent, deadline = os.getppid(), 0.0
        while True:
            ready, *_ = select.select([self._read], [], [], PERIOD_S)
            numbers = os.read(self._read, 64) if ready else b""
            if 0 in numbers:
                return
            number = next((n for n in numbers if n in self._before), 0)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:  # torchrun is gone
                number = number or signal.SIGTERM
            if number and not deadline:
                self.asked = self.asked or number
                deadline = time.monotonic() + (GRACE_S if self._save is not None else 0)
                self._is_asked.set()
            if deadline and time.monotonic() >= deadline:
                # A checkpoint at work is finished; of several ranks, which may wait there for one that is dead, not for
                # long: it appears whole or not at all.
                is_held = self._hold.acquire(timeout=GRACE_S if self._is_one_of_many else -1)
                if not self._is_over:
                    if is_held:
                        self.save()
                    _exit(self._say_end(Stopped()))
                self._hold.release()

    def _say_end(self, error: BaseException) -> int:
        """Say why the process ends, if nobody has; returns the exit code."""
        if self.asked:
            self._say_stop()
            code = 128 + self.asked
        elif self._is_one_of_many:
            code = self._say_fault(error)
        else:
            code = 1  # the fault of a single process is the caller's to say
        if self._board is not None:
            self._board.leave()
        return code

    def _say_stop(self) -> None:
        board = self._board
        if board is None and self._is_one_of_many:  # the rank that failed before all had met speaks itself
            return
        goes_on = f"the same command {self._after}"
        cause = board.cause() if board is not None else ""
        if board is not None and not cause and (gone := board.gone()):
            cause = f"{' and '.join(gone)} ended without a word: killed, perhaps for want of memory, or crashed"
            if not self._is_main:
                board.wait_for_cause(FIRST_S)
            if board.claim(cause):
                _print(f"{cause}; {goes_on}" if self._is_main else cause)
        if cause:
            write_error_file(f"ended by {signal.Signals(self.asked).name}, after this: {cause}")
        elif self._is_main:
            _print(f"stopped by {signal.Signals(self.asked).name}; {goes_on}")

    def _say_fault(self, error: BaseException) -> int:
        explained, board, is_lost = explain(error), self._board, is_of_a_lost_rank(error)
        text = explained or f"{type(error).__name__}: {first_line(error)}"
        if is_lost:
            gone = board.gone() if board is not None else []
            text = f"{' and '.join(gone) or 'another rank'} is gone, or too slow ({first_line(error)})"
        line = f"rank {os.environ.get('RANK')}: {printable(' '.join(text.split()))}"
        if board is not None and not self._is_main and not is_lost:
            board.wait_for_cause(FIRST_S)
        if board is None or board.claim(line):
            if explained is None and not is_lost:
                traceback.print_exception(error)
            _print(line)
            write_error_file(line)
        elif is_lost:
            write_error_file(f"ended after this: {board.cause()}")
        else:
            write_error_file(line)
        return 1 if explained is None else 2

    def _close(self) -> None:
        global _current
        if self._board is not None:
            self._board.leave()
        _current = None
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)


class Board:
    """What ranks let one another know of their end. Where the store is gone, too, nothing is known."""

    def __init__(self, ranks: "Ranks") -> None:
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        self.ranks, self._host = ranks, socket.gethostname()
        store: Any = dist.distributed_c10d._get_default_store()
        mine = store.clone()
        mine.set_timeout(timedelta(seconds=STORE_S))
        self._store = PrefixStore("ending", mine)
        self._store.set(f"process/{ranks.rank}", f"{os.getpid()} {self._host}")

    def claim(self, line: str) -> bool:
        """Whether this rank is the first to speak, and says this."""

        def ask() -> bool:
            if self._store.add("num_claims", 1) > 1:
                return False
            self._store.set("cause", line)
            return True

        return _ask(ask, True)

    def cause(self) -> str:
        """What was said; '' if nothing."""
        return _ask(lambda: self._store.get("cause").decode() if self._store.check(["cause"]) else "", "")

    def wait_for_cause(self, seconds: float) -> None:
        """Wait until something is said, at most so long."""
        end = time.monotonic() + seconds
        while not self.cause() and time.monotonic() < end:
            time.sleep(0.05)

    def leave(self) -> None:
        """Say that this rank ends, by a way of its own."""
        _ask(lambda: self._store.set(f"left/{self.ranks.rank}", ""), None)

    def gone(self) -> list[str]:
        """The ranks of this host whose process is not there any more and has not said so."""

        def ask() -> list[str]:
            found = []
            for rank in range(self.ranks.world_size):
                if self._store.check([f"left/{rank}"]) or not self._store.check([f"process/{rank}"]):
                    continue
                number, host = self._store.get(f"process/{rank}").decode().split(" ", 1)
                if host == self._host and not _is_alive(int(number)):
                    found.append(f"rank {rank} (process {number})")
            return found

        return _ask(ask, [])


_current: Ending | None = None


def check() -> None:
    """Raise Stopped in the main thread where the run is asked to stop."""
    if _current is not None and _current.asked and threading.current_thread() is threading.main_thread():
        raise Stopped


@contextmanager
def held() -> Iterator[None]:
    """Have what is done within finished before the process ends by a signal."""
    with nullcontext() if _current is None else _current._hold:
        yield


def begin(save: Callable[[], str]) -> None:
    """As `Ending.begin`, of the run that is at work, if it heeds signals."""
    if _current is not None:
        _current.begin(save)


def save() -> None:
    """As `Ending.save`."""
    if _current is not None:
        _current.save()


def result(future: "Future[T]") -> T:
    """The result of a future, waited for as long as the run is not asked to stop."""
    while True:
        try:
            return future.result(timeout=PERIOD_S)
        except TimeoutError:
            if future.done():  # a TimeoutError of its work, or done just now
                return future.result()
            check()


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error is what a collective raises where another rank is gone, or does not come."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (type(error) is RuntimeError and _LOST.search(str(error)) is not None)


def explain(error: BaseException) -> str | None:
    """Say in one line what is wrong where the user can mend it; None: a fault of the program."""
    if isinstance(error, ValueError):
        return str(error)
    if is_disk_full(error):
        return f"no room on the disk: free some and run again ({error})"
    is_memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if is_memory or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
        return (
            f"out of memory ({first_line(error)}): lower rollout.microbatch_size with optimizer.microbatch_size, or "
            f"take a smaller model.base; --dry_run says what fits"
        )
    if isinstance(error, OSError):
        return _explain_path(error)
    return None


def _explain_path(error: OSError) -> str:
    """Say path, reason and remedy of what the system refused."""
    if error.strerror is None:  # a library's, in words of its own
        return first_line(error)
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    return f"{path}: {error.strerror}; {REMEDIES.get(error.errno or 0, 'see what is there, or take another path')}"


def _is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _ask(what: Callable[[], T], default: T) -> T:
    try:
        return what()
    except RuntimeError:  # the store's host has ended
        return default


def _print(line: str) -> None:
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
    print(f"{cursor}mteditflow: {line}", file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """End the process here and now: no thread is waited for, no process group destroyed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _forget() -> None:
    """In a fork: its signals are not those of the run."""
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        for number in _current._before:
            signal.signal(number, signal.SIG_DFL)
        _current = None


os.register_at_fork(after_in_child=_forget)
