"""A grid of configs x seeds, and what it says of the paper's findings. `python -m mteditflow.study configs/study.yaml`

Every cell at every seed is an ordinary run, `STUDY/cells/CELL/seed-N`, trained by `python -m mteditflow.train` in a
process of its own, so that a crash costs one run. Killed at any moment, the same command goes on: finished runs stay as
they are, half-trained ones resume from their checkpoints, and a run that another process is at work on (left behind by
a killed study, or of a second study in the same folder) is waited for. SIGINT and SIGTERM are passed on to the runs,
which save. study.json, study.md and the figures are written after every finished run.
"""

import json
import os
import shutil
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

from mteditflow.config.cli import from_yaml
from mteditflow.config.version import git_commit
from mteditflow.report.html import figure
from mteditflow.study.cells import CellRun, Comparison, read_study, runs_of, select

POLL_S = 0.5
BASE_FILES = ("evaluation_before.safetensors", "evaluation_before.json")  # as evaluate.py writes them, json last


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run at work in a slot: a GPU, or some cores."""

    run: CellRun
    slot: int
    process: subprocess.Popen[bytes]
    start: float


def is_finished(run: CellRun) -> bool:
    """Whether the run was trained to its end with this very config."""
    files = ("config.yaml", "comparison.json", "evaluation_after.json", *BASE_FILES)
    if not all((run.folder / name).is_file() for name in files):
        return False
    try:
        return from_yaml(run.folder / "config.yaml") == run.config
    except ValueError:  # of another version of the program: train says what is wrong with it
        return False


def share_base(run: CellRun, runs: Sequence[CellRun]) -> None:
    """Give a run the base's evaluation that another of the study has made: grid.py makes sure that all would be equal.

    Both files appear whole or not at all, and the run takes them for its own only where sessions, turns and steps fit.
    """
    sources = [other.folder for other in runs if all((other.folder / name).is_file() for name in BASE_FILES)]
    if not sources or run.folder in sources:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in BASE_FILES:
        temporary = run.folder / f".{name}"
        shutil.copyfile(sources[0] / name, temporary)
        temporary.replace(run.folder / name)


def expected_seconds(run: CellRun, runs: Sequence[CellRun]) -> float | None:
    """Seconds of the iterations that the run has still to do, from the seconds per turn-image of runs with iterations
    done: its own cell's where there are some, else all; None where nothing is measured.
    """
    measured = [(other, *_progress(other)) for other in runs]
    measured = [it for it in measured if it[0].cell is run.cell and it[1]] or [it for it in measured if it[1]]
    num_images = sum(done * _turn_images(other) for other, done, _ in measured)
    if not num_images:
        return None
    seconds = sum(seconds for *_, seconds in measured) / num_images
    return seconds * _turn_images(run) * (run.config.run.num_iterations - _progress(run)[0])


def _turn_images(run: CellRun) -> int:
    config = run.config
    return config.rollout.num_tasks * config.rollout.group_size * config.data.num_turns


def _progress(run: CellRun) -> tuple[int, float]:
    """Iterations done, and the seconds that they took."""
    from mteditflow.record.metrics import FILE, read_lines

    path = run.folder / FILE
    lines = read_lines(path) if path.is_file() else []
    return len(lines), sum(
        v or 0.0 for line in lines for k, v in line.items() if k.startswith("time/") and k[-2:] == "_s"
    )


def slots_of(num_jobs: int | None) -> list[dict[str, Any]]:
    """Where runs work side by side: an environment and, without GPUs, cores for each. None: one per GPU or core.

    Two processes of two threads on two cores are several times slower than two of one: every run has cores of its own.
    """
    import torch

    num_gpus, cores = torch.cuda.device_count(), sorted(os.sched_getaffinity(0))
    num_jobs = num_jobs or num_gpus or len(cores)
    if num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        return [{"env": {"CUDA_VISIBLE_DEVICES": visible[i % num_gpus]}, "cores": cores} for i in range(num_jobs)]
    own = [cores[i::num_jobs] or [cores[i % len(cores)]] for i in range(num_jobs)]
    return [{"env": {"OMP_NUM_THREADS": "1"}, "cores": each} for each in own]


class Runner:
    """Runs at work, those to come, and those that failed."""

    def __init__(self, pending: list[CellRun], every: list[CellRun], slots: list[dict[str, Any]]) -> None:
        self.pending, self.every, self.slots = pending, every, slots
        self.jobs: list[Job] = []
        self.failed: dict[str, str] = {}
        self.num_done, self.is_stopping, self.is_waiting = 0, False, False

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Pass SIGTERM on: every run saves after the iteration at work."""
        self.is_stopping = True
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
            share_base(run, self.every)
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

    def status(self) -> Table:
        """What is at work, as a table."""
        table = Table(title=f"{self.num_done} runs finished, {len(self.failed)} failed, {len(self.pending)} to come")
        for column in ("at work", "iteration", "minutes left"):
            table.add_column(column)
        for job in self.jobs:
            done, left = _progress(job.run)[0], expected_seconds(job.run, [job.run])
            shown = "unknown" if left is None else f"{left / 60:.0f}"
            table.add_row(job.run.label, f"{done}/{job.run.config.run.num_iterations}", shown)
        return table


def _is_held(folder: Path) -> bool:
    """Whether a process is at work in a run folder."""
    from mteditflow.record.checkpoint import lock

    if not folder.exists():
        return False
    try:
        with lock(folder):
            return False
    except ValueError:
        return True


def _result(run: CellRun) -> str:
    before, after = (
        json.loads((run.folder / f"evaluation_{name}.json").read_text())["turns"][-1] for name in ("before", "after")
    )
    return f"O at turn {after['turn']} {figure(before['O'])} to {figure(after['O'])}"


def _last_line(path: Path, code: int) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1] if lines else 'it said nothing'} ({ended}, {path})"


def write(folder: Path, comparisons: list[Comparison], command: str) -> Path | None:
    """The page of what is finished so far; None where nothing is."""
    from mteditflow.study.statistics import write_findings

    every = runs_of(comparisons, folder)
    done = [run for run in every if is_finished(run)]
    if not done:
        return None
    commits = sorted({(run.folder / "commit").read_text().strip() for run in done if (run.folder / "commit").is_file()})
    how = {"command": command, "commits": commits, "num_finished": len(done), "num_runs": len(every)}
    return write_findings(folder, comparisons, done, how)


def work(runner: Runner, page: Any, console: Console) -> None:
    """Run everything to its end, or until asked to stop; `page()` is called after every finished run."""
    is_live = console.is_terminal
    handlers = {number: signal.signal(number, runner.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while runner.jobs or (runner.pending and not runner.is_stopping):
                ended = runner.reap()
                for line in [*ended, *runner.start()]:
                    console.print(line, soft_wrap=True, highlight=False, markup=False)
                if any(line.startswith("finished") for line in ended):
                    page()
                if is_live:
                    live.update(runner.status(), refresh=True)
                time.sleep(POLL_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def plan(runs: list[CellRun]) -> Table:
    """What would be run."""
    num_done = sum(map(is_finished, runs))
    left = [expected_seconds(run, runs) for run in runs if not is_finished(run)]
    minutes = "unknown" if None in left else f"{sum(s for s in left if s is not None) / 60:.0f}"
    table = Table(title=f"{len(runs)} runs, {num_done} finished; minutes of the others, evaluations aside: {minutes}")
    for column in ("cell", "seed", "folder", "state", "minutes left"):
        table.add_column(column, overflow="fold")
    for run in runs:
        is_done, done, seconds = is_finished(run), _progress(run)[0], expected_seconds(run, runs)
        state = "finished" if is_done else f"iteration {done}/{run.config.run.num_iterations}" if done else "to come"
        shown = "" if is_done else "unknown" if seconds is None else f"{seconds / 60:.1f}"
        table.add_row(run.cell.name, str(run.seed), run.cell.key, state, shown)
    return table


def run_study(
    study: Path, folder: Path, *, only: list[str] | None, seeds: list[int] | None, num_jobs: int | None,
    is_dry_run: bool, command: str,
) -> int:  # fmt: skip
    """Run what a study file asks for: 0 when all is finished, 1 when a run failed or was stopped. ValueError: one line.

    `command` is what the page says that it was made by.
    """
    if num_jobs is not None and num_jobs < 1:
        raise ValueError(f"--jobs is {num_jobs}: must be at least 1")
    everything = read_study(study)
    chosen = runs_of(select(everything, only, seeds), folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--folder is '{folder}': no folder; choose another")
    console = Console()
    shown = [replace(it, seeds=tuple(sorted({*it.seeds, *(seeds or ())}))) for it in everything]
    if is_dry_run:
        console.print(plan(chosen))
        return 0
    pending = [run for run in chosen if not is_finished(run)]
    runner = Runner(pending, runs_of(shown, folder), slots_of(num_jobs))
    runner.num_done = len(chosen) - len(pending)
    console.print(f"{len(chosen)} runs, {runner.num_done} finished already", highlight=False)
    work(runner, lambda: write(folder, shown, command), console)
    path = write(folder, shown, command)
    for label, line in runner.failed.items():
        print(f"mteditflow: {label} failed: {line}", file=sys.stderr)
    console.print(f"report: {path}" if path else "nothing is finished yet", soft_wrap=True, highlight=False)
    if runner.is_stopping:
        console.print("stopped; the same command goes on from there")
    return 1 if runner.failed or runner.is_stopping else 0
