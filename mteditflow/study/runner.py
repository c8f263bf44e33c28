"""A grid of configs x seeds, and what it says of the paper's findings. `python -m mteditflow.study configs/study.yaml`

Every cell at every seed is an ordinary run, `STUDY/cells/CELL/seed-N`, trained by `python -m mteditflow.train` in a
process of its own, so that a crash costs one run. Killed at any moment, the same command goes on: finished runs stay as
they are, half-trained ones resume from their checkpoints, and a run that another process is at work on (left behind by
a killed study, or of a second study in the same folder) is waited for. SIGINT, SIGTERM and SIGUSR1 stop the runs, too,
which save. study.json, study.md and the figures are written after every finished run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mteditflow.config.cli import from_yaml, to_yaml
from mteditflow.config.version import git_commit
from mteditflow.policy import with_start
from mteditflow.record.checkpoint import lock
from mteditflow.record.figures import figure, read_figures
from mteditflow.record.files import check_folder
from mteditflow.record.metrics import FILE, read_lines
from mteditflow.study.cells import CellRun, Comparison, read_study, runs_of, select
from mteditflow.study.study_page import write_study
from mteditflow.watch.pace import num_sessions_left, session_seconds, step_seconds
from mteditflow.watch.progress import duration

POLL_S = 0.5
NICE = 10  # how much lower the priority of a run is than the study's
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run at work in a slot: a GPU, or some cores."""

    run: CellRun
    slot: int
    process: subprocess.Popen[bytes]
    start: float


def is_finished(run: CellRun) -> bool:
    """Whether the run was trained to its end with this very config, and has all that it makes then; the report is last,
    but can be asked for before.
    """
    names = ("config.yaml", "comparison.json", "evaluation_before.safetensors", "evaluation_before.json")
    files = (*names, "evaluation_after.json", "report.html")
    is_exported = any((run.folder / name).is_file() for name in ("lora/README.md", "weights/README.md"))
    if not is_exported or not all((run.folder / name).is_file() for name in files):
        return False
    path, config = run.folder / "config.yaml", with_start(run.config)
    try:
        return path.read_text() == to_yaml(config) or from_yaml(path) == config  # parsing takes a quarter of a second
    except ValueError:  # of another version of the program: train says what is wrong with it
        return False


def expected_seconds(run: CellRun, runs: Sequence[CellRun]) -> float | None:
    """Seconds of the iterations that the run has still to do, from the seconds per turn-image of runs with iterations
    done: its own cell's where there are some, else all; None where nothing is measured.
    """
    started = [row for row in ((other, *_progress(other)) for other in runs) if row[1]]
    started = [row for row in started if row[0].cell is run.cell] or started
    num_images = sum(done * _turn_images(other) for other, done, _ in started)
    if not num_images:
        return None
    seconds = sum(seconds for *_, seconds in started) / num_images
    return seconds * _turn_images(run) * (run.config.run.num_iterations - _progress(run)[0])


def whole_seconds(run: CellRun, runs: Sequence[CellRun]) -> float | None:
    """Add to `expected_seconds` the evaluations that the run has still to make; those of a run that has not begun take
    what they take in the others.
    """
    iterations = expected_seconds(run, runs)
    started = [lines for lines in (_lines(other) for other in (run, *runs)) if lines]
    if iterations is None:
        return None
    sessions = num_sessions_left(_progress(run)[0], run.config)
    return iterations + sessions * session_seconds(started[0], run.config)


def _lines(run: CellRun) -> list[dict[str, Any]]:
    path = run.folder / FILE
    return read_lines(path) if path.is_file() else []


def _turn_images(run: CellRun) -> int:
    """Count the turns that an iteration makes."""
    config = run.config
    return config.rollout.num_tasks * config.rollout.group_size * config.data.num_turns


def _progress(run: CellRun) -> tuple[int, float]:
    """Read how many iterations are done, and the seconds that they took."""
    lines = _lines(run)
    return len(lines), sum(step_seconds(line) + (line.get("time/save_s") or 0.0) for line in lines)


def make_slots(num_jobs: int | None) -> list[dict[str, Any]]:
    """Say where runs work side by side: an environment and, without GPUs, cores for each. None: one per GPU or core.

    Two processes of two threads on two cores are several times slower than two of one: every run has cores of its own.
    """
    import torch

    num_gpus, cores = torch.cuda.device_count(), sorted(os.sched_getaffinity(0))
    num_jobs = num_jobs or num_gpus or len(cores)
    if num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        return [{"env": {"CUDA_VISIBLE_DEVICES": visible[i % num_gpus]}, "cores": cores} for i in range(num_jobs)]
    shares = [cores[i::num_jobs] or [cores[i % len(cores)]] for i in range(num_jobs)]
    return [{"env": {"OMP_NUM_THREADS": "1"}, "cores": share} for share in shares]


class Runner:
    """Runs at work, those to come, and those that failed."""

    def __init__(self, pending: list[CellRun], slots: list[dict[str, Any]]) -> None:
        self.pending, self.slots = pending, slots
        self.jobs: list[Job] = []
        self.failed: dict[str, str] = {}
        self.num_done, self.is_stopping, self.is_waiting, self.asked = 0, False, False, 0

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Pass the request on as SIGTERM: every run saves its last finished iteration."""
        self.is_stopping, self.asked = True, number
        for job in self.jobs:
            job.process.terminate()

    def start(self) -> list[str]:
        """Start what free slots can take; returns a line for each."""
        lines = []
        for slot in sorted(set(range(len(self.slots))) - {job.slot for job in self.jobs}):
            run = next((run for run in self.pending if not _is_held(run.folder)), None)
            if run is None or self.is_stopping:
                if self.pending and not (self.jobs or self.is_stopping or self.is_waiting):
                    self.is_waiting = True
                    lines.append(f"waiting for another process at work in {self.pending[0].folder}")
                break
            self.pending.remove(run)
            if is_finished(run):  # by the process that was waited for
                self.num_done += 1
                continue
            self.jobs.append(self._launch(run, slot))
            lines.append(f"started {run.label}: {run.folder}")
        return lines

    def _launch(self, run: CellRun, slot: int) -> Job:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "commit").write_text(git_commit() + "\n")
        with (run.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mteditflow.train", *run.arguments],
                env=os.environ | self.slots[slot]["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # else Ctrl-C reaches the run itself, which would not save
            )  # fmt: skip
        os.sched_setaffinity(process.pid, self.slots[slot]["cores"])
        priority = os.getpriority(os.PRIO_PROCESS, 0) + NICE  # an hours' job gives way to who works beside it
        os.setpriority(os.PRIO_PROCESS, process.pid, priority)
        if self.is_stopping:  # asked between the look at it and now
            process.terminate()
        return Job(run=run, slot=slot, process=process, start=time.monotonic())

    def reap(self) -> list[str]:
        """Take in the runs that have ended; returns a line for each."""
        lines = []
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            label = job.run.label
            if job.process.returncode == 0 and is_finished(job.run):
                self.num_done += 1
                lines.append(f"finished {label}: {_result(job.run)}, {(time.monotonic() - job.start) / 60:.1f} minutes")
            elif self.is_stopping:
                lines.append(f"stopped {label}")
            elif _is_held(job.run.folder):  # another process took the folder between the look at it and the start
                self.pending.append(job.run)
                lines.append(f"waiting for another process at work in {job.run.folder}")
            else:
                self.failed[label] = _last_line(job.run.folder / "log.txt", job.process.returncode)
                lines.append(f"failed {label}: {self.failed[label]}")
        return lines

    def time_left(self) -> str:
        """Say how long all of it still takes, in as many slots; empty where nothing is measured yet."""
        at_work = [job.run for job in self.jobs]
        left = [whole_seconds(run, at_work) for run in (*at_work, *self.pending)]
        known = [seconds for seconds in left if seconds is not None]
        return f", {duration(sum(known) / len(self.slots))} left" if known and len(known) == len(left) else ""

    def status(self) -> Table:
        """What is at work, as a table."""
        title = f"{self.num_done} runs finished, {len(self.failed)} failed, {len(self.pending)} to come"
        table = Table(title=f"{title}{self.time_left()}")
        for column in ("at work", "iteration", "time left"):
            table.add_column(column)
        for job in self.jobs:
            done, left = _progress(job.run)[0], whole_seconds(job.run, [job.run])
            words = "unknown" if left is None else duration(left)
            table.add_row(job.run.label, f"{done}/{job.run.config.run.num_iterations}", words)
        return table


def _is_held(folder: Path) -> bool:
    """Whether a process is at work in a run folder."""
    if not folder.exists():
        return False
    try:
        with lock(folder):
            return False
    except ValueError:
        return True


def _result(run: CellRun) -> str:
    before, after = (read_figures(run.folder / f"evaluation_{name}.json")["turns"][-1] for name in ("before", "after"))
    return f"O at turn {after['turn']} {figure(before, 'O').value} to {figure(after, 'O').value}"


def _last_line(path: Path, code: int) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1] if lines else 'it said nothing'} ({ended}, {path})"


def write_finished(folder: Path, comparisons: list[Comparison], command: str) -> Path | None:
    """Write the page of what is finished so far; None where nothing is."""
    runs = runs_of(comparisons, folder)
    done = [run for run in runs if is_finished(run)]
    if not done:
        return None
    commits = sorted({(run.folder / "commit").read_text().strip() for run in done if (run.folder / "commit").is_file()})
    how = {"command": command, "commits": commits, "num_finished": len(done), "num_runs": len(runs)}
    return write_study(folder, comparisons, done, how)


def work(runner: Runner, page: Any, console: Console) -> None:
    """Run everything to its end, or until asked to stop; `page()` is called after every finished run."""
    is_live = console.is_terminal
    handlers = {number: signal.signal(number, runner.stop) for number in STOPPING}
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while runner.jobs or (runner.pending and not runner.is_stopping):
                ended = runner.reap()
                for line in [*ended, *runner.start()]:
                    console.print(line, soft_wrap=True, highlight=False, markup=False)
                if any(line.startswith("finished") for line in ended):
                    page()
                    if left := runner.time_left():
                        console.print(f"{runner.num_done} runs finished{left}", highlight=False)
                if is_live:
                    live.update(runner.status(), refresh=True)
                time.sleep(POLL_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def plan(runs: list[CellRun]) -> Table:
    """List what would be run."""
    num_done = sum(map(is_finished, runs))
    left = [whole_seconds(run, runs) for run in runs if not is_finished(run)]
    total = "unknown" if None in left else f"{sum(s for s in left if s is not None) / 60:.0f}"
    table = Table(title=f"{len(runs)} runs, {num_done} finished; minutes of the others: {total}")
    for column in ("cell", "seed", "folder", "state", "minutes left"):
        table.add_column(column, overflow="fold")
    for run in runs:
        is_done, done, seconds = is_finished(run), _progress(run)[0], whole_seconds(run, runs)
        state = "finished" if is_done else f"iteration {done}/{run.config.run.num_iterations}" if done else "to come"
        minutes = "" if is_done else "unknown" if seconds is None else f"{seconds / 60:.1f}"
        table.add_row(run.cell.name, str(run.seed), run.cell.key, state, minutes)
    return table


def run_study(
    study: Path, folder: Path, *, only: list[str] | None, seeds: list[int] | None, num_jobs: int | None,
    is_dry_run: bool, command: str,
) -> int:  # fmt: skip
    """Run what a study file asks for: 0 when all is finished, 1 when a run failed, 128 and the signal's number when it
    was stopped. ValueError: one line.

    `command` is what the page says that it was made by.
    """
    if num_jobs is not None and num_jobs < 1:
        raise ValueError(f"--jobs is {num_jobs}: must be at least 1")
    everything = read_study(study)
    chosen = runs_of(select(everything, only, seeds), folder)
    check_folder(folder, "--folder")
    console = Console()
    reported = [replace(it, seeds=tuple(sorted({*it.seeds, *(seeds or ())}))) for it in everything]
    if is_dry_run:
        console.print(plan(chosen))
        return 0
    pending = [run for run in chosen if not is_finished(run)]
    runner = Runner(pending, make_slots(num_jobs))
    runner.num_done = len(chosen) - len(pending)
    console.print(f"{len(chosen)} runs, {runner.num_done} finished already", highlight=False)
    work(runner, lambda: write_finished(folder, reported, command), console)
    path = write_finished(folder, reported, command)
    for label, line in runner.failed.items():
        print(f"mteditflow: {label} failed: {line}", file=sys.stderr)
    console.print(f"report: {path}" if path else "nothing is finished yet", soft_wrap=True, highlight=False)
    if runner.is_stopping:
        console.print("stopped; the same command goes on from there")
        return 128 + runner.asked
    return 1 if runner.failed else 0
