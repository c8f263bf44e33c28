"""What a run says of itself: one JSON line per iteration, boards such as TensorBoard, a progress bar.

The JSON lines are the truth: synced one by one, cut back on resume to the iterations that the checkpoint holds, so that
each iteration has exactly one line after any kill. Values that depend on the clock or the machine have keys that begin
with one of TIMED (profile/account.py); all the others are bit-equal in a resumed run.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL.Image import Image
from torch import Tensor

from mteditflow.advantage import SUCCESS, mean_reward
from mteditflow.config import AdvantageConfig, Config
from mteditflow.distributed import Ranks
from mteditflow.pictures import to_pil
from mteditflow.record.files import is_disk_full, replace_file
from mteditflow.types import FAULTS, Scores
from mteditflow.watch.boards import Rows, open_boards
from mteditflow.watch.pace import CORE_WAIT, NUM_NEWEST, say_sharing, seconds_left
from mteditflow.watch.progress import duration, show_sessions, start_bars

FILE = "metrics.jsonl"
TIMED = ("time/", "beside/", "speed/", "gpu/", "memory/", "reward/exposed_s", "reward/judge_s", "reward/overlap")


class Reporter:
    """Writes a run's metrics; one per run, on the first rank.

    `iteration` is the first that will be written: lines of it and of later ones, left by a killed run, are removed.
    """

    def __init__(self, folder: Path, *, iteration: int, num_iterations: int, config: Config | None = None) -> None:
        """config: of the run, for the boards that it names, and so that evaluations are part of the time left."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        truncate(self._path, iteration)
        self._lines = read_lines(self._path)[-NUM_NEWEST:] if self._path.exists() else []
        self._session_s: float | None = None  # that one of an evaluation takes
        self._file = self._path.open("ab", buffering=0)  # nothing is left to be written when the disk is full
        names, settings = (config.run.log_to, asdict(config)) if config else ((), {})
        self._boards = open_boards(folder, iteration, names, settings)
        self._num_iterations, self._config = num_iterations, config
        self._progress = start_bars()
        if self._progress is not None:
            self._task = self._progress.add_task("", total=num_iterations, completed=iteration, left="")

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Append the line of an iteration, durably; ValueError when the disk is full."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            rest = (json.dumps({"iteration": iteration, **line}, allow_nan=False) + "\n").encode()
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise ValueError(f"no room on the disk to write {self._path}: free some and run again") from error
        for board in self._boards:
            board.figures(iteration, values)
        self._lines = [*self._lines[-NUM_NEWEST:], {"iteration": iteration, **line}]
        self._show(iteration, values)

    def image(self, name: str, iteration: int, image: Tensor | Image) -> None:
        """Show an image (3, H, W) in [-1, 1], or a picture, on the boards."""
        picture = to_pil(image) if isinstance(image, Tensor) else image
        for board in self._boards:
            board.picture(name, iteration, picture)

    def table(self, name: str, iteration: int, rows: Rows) -> None:
        """Show a table on the boards; one without rows is not shown."""
        for board in self._boards if rows else ():
            board.table(name, iteration, rows)

    def say(self, text: str) -> None:
        """Print a line for the user, above the progress bar where there is one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def show_sessions(self, num: int) -> Iterator[Callable[[int], None]]:
        """Give a function that shows how many of `num` sessions are evaluated, and learn how long one takes."""
        told: list[tuple[int, float]] = []
        with show_sessions(num, self._progress, self.say) as show:

            def tell(done: int) -> None:
                told.append((done, time.monotonic()))
                show(done)

            yield tell
        (before, start), (after, end) = (told[0], told[-1]) if told else ((0, 0.0), (0, 0.0))
        if after > before:
            self._session_s = (end - start) / (after - before)

    def close(self) -> None:
        """Let go of the terminal and the files."""
        if self._progress is not None:
            self._progress.stop()
        for board in self._boards:
            board.close()
        self._file.close()

    def _show(self, iteration: int, values: dict[str, float]) -> None:
        done, seconds = iteration + 1, seconds_left(self._lines, self._num_iterations, self._config, self._session_s)
        left = "" if seconds is None else f"{duration(seconds)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, left=left, description=summary(values))
            return
        told = [f"iteration {done}/{self._num_iterations}", summary(values), left]
        if sharing := say_sharing(values.get(CORE_WAIT, 0.0)):
            told.append(f"({sharing})")
        self.say("  ".join(told))


def used_memory() -> tuple[str, float]:
    """Name and value, GiB, of this process's memory: its peak on the GPU where it uses one, else what is resident."""
    if torch.cuda.is_initialized():
        return "memory/cuda_peak_gib", torch.cuda.max_memory_allocated() / 2**30
    return "memory/rss_gib", psutil.Process().memory_info().rss / 2**30


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics.jsonl; one that a kill tore is left out."""
    return [value for value, _ in _whole_lines(path)]


def put_line(path: Path, line: dict[str, Any]) -> None:
    """Put the line of line["iteration"], its first value, in its place, durably: at the end or, where a run repeats it,
    among the others, which stay. A line that a kill tore goes.
    """
    iteration, content = line["iteration"], path.read_bytes() if path.is_file() else b""
    text = json.dumps(line, allow_nan=False)
    *_, last, torn = (b"\n" + content).rsplit(b"\n", 2)
    number = re.match(rb'{"iteration": (\d+)', last)
    if content and (torn or number is None or int(number[1]) >= iteration):
        others = [(value["iteration"], old) for value, old in _whole_lines(path) if value["iteration"] != iteration]
        lines = [f"{text}\n" for _, text in sorted([*others, (iteration, text)])]
        replace_file(path, "".join(lines).encode(), is_durable=True)
        return
    with path.open("ab") as file:
        file.write(f"{text}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def summary(values: dict[str, float]) -> str:
    """Say in one line what to watch; what an iteration lacks is left out."""
    names = {"reward": "reward/mean", "instruction": "reward/instruction", "consistency": "reward/consistency"}
    parts = [f"{word} {values[name]:z.3f}" for word, name in names.items() if name in values]
    held_out = {int(name.removeprefix("heldout/O_")): value for name, value in values.items() if "heldout/O_" in name}
    if held_out:
        turn = max(held_out)
        parts.append(f"held-out O at turn {turn} {held_out[turn]:.1f} %")
    seconds = [value for name, value in values.items() if name.startswith("time/") and name.endswith("_s")]
    return "  ".join([*parts, f"{sum(seconds):.1f} s"] if seconds else parts)


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("iteration"), int):
            yield value, text


def truncate(path: Path, iteration: int) -> None:
    """Keep the lines before `iteration`, atomically."""
    if path.exists():
        lines = [f"{text}\n" for value, text in _whole_lines(path) if value["iteration"] < iteration]
        replace_file(path, "".join(lines).encode(), is_durable=True)


def score_figures(scores: Scores, advantages: Tensor, group: Tensor, config: AdvantageConfig) -> dict[str, float]:
    """Describe an iteration's scores, over the valid trajectories.

    reward/mean: what training maximises, `advantage.mean_reward`. reward/NAME: mean of a reward over trajectories and
    turns where it is defined. reward/std: within a group, of the mean instruction score, averaged over the groups. A
    group without spread has advantages (N, K) of 0 alone.
    """
    valid, instruction = scores.valid, scores.instruction[scores.valid]
    others = {name: values[valid].nanmean() for name, values in list(scores.rewards.items())[1:]}
    means = scores.instruction.mean(1)
    spread = [means[rows].std(correction=0) for g in group.unique() if (rows := (group == g) & valid).sum() > 1]
    no_spread = [not advantages[group == g].any() for g in group.unique()]
    values = {
        "reward/mean": mean_reward(scores, config),
        "reward/std": torch.stack(spread).mean() if spread else torch.zeros(()),
        "reward/instruction": instruction.mean(),
        **{f"reward/{name}": mean for name, mean in others.items()},
        "reward/valid_share": valid.float().mean(),
        "reward/zero_spread_share": torch.tensor(no_spread).float().mean(),
    }
    if scores.faults is not None:  # trajectories, by why a judge gave them no score
        counts = scores.faults.bincount(minlength=len(FAULTS))
        values |= {f"judge/fault_{name}": count for name, count in zip(FAULTS[1:], counts[1:], strict=True)}
    if scores.off_mass is not None:
        values["judge/off_mass"] = scores.off_mass[valid].mean()
    for turn, score in enumerate(instruction.T, start=1):
        values |= {f"reward/turn_{turn}": score.mean(), f"reward/success_{turn}": (score >= SUCCESS).float().mean()}
    if scores.truth is not None:
        truth = scores.truth[valid]
        values |= {
            "judge/bias": (instruction - truth).mean(),
            "judge/std": (instruction - truth).std(correction=0),
            "judge/agreement": ((instruction >= SUCCESS) == (truth >= SUCCESS)).float().mean(),
            "judge/truth": truth.mean(),
        }
    return {name: value.item() for name, value in values.items()}


class Tally:
    """Means, and largest values, of named figures over the rows of all microbatches and ranks.

    Sums and counts are added up, and a mean is formed last: a mean of means would depend on how many rows a microbatch
    had, and with it on the number of ranks.
    """

    def __init__(self, means: Sequence[str], worst: Sequence[str]) -> None:
        self._means: dict[str, list[Tensor]] = {name: [] for name in means}
        self._worst: dict[str, list[Tensor]] = {name: [] for name in worst}
        self._count = 0.0

    def add(self, values: dict[str, Tensor], count: float) -> None:
        """Count figures, 0-d: means over `count` rows, or the largest of them; of no rows, nothing."""
        if count:
            self._count += count
            for name, value in values.items():
                if name in self._worst:
                    self._worst[name].append(value)
                else:
                    self._means[name].append(value.double() * count)

    def keep_largest(self, name: str, kept: str, ranks: Ranks) -> float:
        """The largest of a figure so far, of all ranks, kept as another figure; NaN where there was none."""
        largest = self._largest([name], ranks)[name]
        self._worst[kept] = [torch.tensor(largest)]
        return largest

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The figures of all ranks by name, NaN where no row was counted, and num_transitions, how many were."""
        sums = [torch.stack(values).sum() if values else torch.tensor(0.0) for values in self._means.values()]
        total = torch.stack([value.double().to(ranks.device) for value in (torch.tensor(self._count), *sums)])
        ranks.sum_([total])
        count, *sums = total.tolist()
        means = {name: value / count if count else math.nan for name, value in zip(self._means, sums, strict=True)}
        return means | self._largest(list(self._worst), ranks) | {"num_transitions": count}

    def _largest(self, names: list[str], ranks: Ranks) -> dict[str, float]:
        if not names:
            return {}
        none = torch.tensor(-math.inf)
        found = [torch.stack(self._worst[name]).max() if self._worst[name] else none for name in names]
        largest = torch.stack([value.double().to(ranks.device) for value in found])
        ranks.max_(largest)
        return dict(zip(names, largest.masked_fill(largest == -math.inf, math.nan).tolist(), strict=True))
