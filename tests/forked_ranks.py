"""torchrun whose ranks are forks of this process, which are spared the seconds that a new process imports for.

The agent is torch's own, in a process of its own; only `Popen` is another.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.utils.tensorboard import SummaryWriter

from mteditflow import train, update
from mteditflow.config import command, errors
from mteditflow.record import ending
from mteditflow.world.render import atlas

PRELOADED = (train, SummaryWriter, atlas())
PATIENCE = 300  # seconds for another process, on a machine that others use too
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class Fork:
    """What torchrun needs of Popen, as a fork that calls a function."""

    started: ClassVar[list["Fork"]] = []

    def __init__(self, call: Callable[[], int]) -> None:
        self.started.append(self)
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                for number in HEEDED:
                    signal.signal(number, signal.SIG_DFL)
                code = call()
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, or the signal as a negative number; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, waited for."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def start(log: Path, arguments: Sequence[str], *, num_ranks: int = 2, num_restarts: int = 0, act: str = "") -> Fork:
    """torchrun of `mteditflow train ARGUMENTS`, which writes to `log`; `act` is done in ranks, as `_prepare` reads."""

    def launch() -> int:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        subprocess_handler.Popen = popen  # pyright: ignore[reportPrivateImportUsage]
        words = ["--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", str(num_restarts), "--no-python"]
        torchrun.main([*words, "mteditflow", *arguments])
        return 0

    def popen(args: Sequence[str], env: dict[str, str], stdout: Any, stderr: Any, start_new_session: bool) -> Fork:
        assert stdout is None and stderr is None and start_new_session

        def train_in_rank() -> int:
            os.environ.clear()
            os.environ.update(env)
            with (log.parent / "pids").open("a") as file:
                file.write(f"{os.getpid()}\n")
            return command.train([*args[1:], *_prepare(act, log.parent)])

        return Fork(train_in_rank)

    return Fork(launch)


def _prepare(act: str, folder: Path) -> list[str]:
    """WHAT@RANK is done by a rank, or @all of them, before the optimizer's second step, in the first of its starts;
    --WORDS are for its command line.
    """
    what, _, where = act.partition("@")
    if where not in (os.environ["RANK"], "all") or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return []
    errors.FIRST_S = 0.2
    if what.startswith("--"):
        return what.replace("=", " ").split()
    step, calls = update.step, []

    def act_and_step(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            ACTS[what](folder)
        return step(*args)

    update.step = act_and_step
    return []


def hang(folder: Path, grace_s: float = 0.5) -> None:
    """Wait for ever outside of Python, as in a collective of which a rank is missing."""
    ending.GRACE_S = grace_s
    (folder / f"hangs-{os.environ.get('RANK', '0')}").touch()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def _lose_the_judge(_: Path) -> None:
    raise ValueError("reward.url 'http://judge' gave no answer in 600 s")


ACTS: dict[str, Callable[[Path], object]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda _: {}["trouble"],
    "lose the judge": _lose_the_judge,
    "fill memory": lambda _: torch.empty(2**60, dtype=torch.uint8),
    "hang": hang,
}
