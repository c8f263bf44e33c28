"""Rewards beside the judge's (`reward.also`, docs/judge.md): a function or a class of the user's, or a model.

A function looks at whole trajectories. A class, and a model by transformers (reward/models.py), scores edits one by
one: a turn is an edit of the turn before. Edits go through it `batch_size` at a time, the last ones filled up, so that
their bits do not depend on the wave they come in.

All are tried before anything is trained. Whatever they raise later, or give that is no number, is one line that names
the entry, the iteration and the trajectory, and stops the run: training must not go on by a reward that is broken.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import chain, islice
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.errors import first_line
from mteditflow.config.reward import AlsoReward
from mteditflow.data import training_tasks
from mteditflow.distributed import alone
from mteditflow.noise import EVALUATION
from mteditflow.types import EditTask, Rollout, Score

BATCH_SIZE = 8  # edits per call of a class that does not say
NUM_TRIED = 8  # tasks, the first of training, on which a reward is tried
BATCH_SHARE = 0.05  # of the largest number: what the batch may change. bfloat16 rounds to 0.4 %

Function = Callable[[Tensor, Sequence[tuple[str, ...]], Tensor], Any]
"""Sources (N, 3, H, W), instructions (N tuples of K), pictures (K, N, 3, H, W) -> (N, K) numbers."""


class EditModel(Protocol):
    """What scores M edits, each by itself. M is its attribute `batch_size`, or else BATCH_SIZE."""

    def __call__(self, sources: Tensor, instructions: Sequence[str], pictures: Tensor) -> Any:
        """Give (M) numbers, or NaN, of edits (M, 3, H, W) in [-1, 1] of sources (M, 3, H, W)."""
        ...


class NoNumbersError(ValueError):
    """What a user's code gave is not what a reward is: what it gives, and what it must give."""


class UserReward:
    """What an entry of reward.also names, resident on `device`. ValueError, one line: there is none that scores."""

    is_remote = False  # a user's code need not bear several threads

    def __init__(self, also: AlsoReward, device: torch.device) -> None:
        self.field, self.device = f"reward.also is {also.text!r}", device
        self._module: ModuleType | None = None
        if not also.module:
            from mteditflow.reward.models import load_model

            self.function: Function = by_edit(load_model(also.path, device, self.field))
            return
        self._module = self._import(also.module)
        found = getattr(self._module, also.function, None)
        if not callable(found):
            raise ValueError(f"{self.field}: {self._module.__file__} has no function or class {also.function!r}")
        if isinstance(found, type):
            try:
                self.function = by_edit(found(also.path, device))
            except Exception as error:  # whatever a user's file raises
                raise ValueError(f"{self.field}: {also.function}(path, device) {self._raised(error)}") from error
        elif also.path:
            raise ValueError(f"{self.field}: {also.function} is a function, and a path is a class's: leave it out")
        else:
            self.function = found

    def _import(self, name: str) -> ModuleType:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())  # where `python -m` looks too
        try:
            return importlib.import_module(name)
        except Exception as error:  # whatever a user's file raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(
                f"{self.field}: {name} cannot be imported from the working folder or sys.path ({reason}); "
                f"python -c 'import {name}' says where it fails"
            ) from error

    def _raised(self, error: Exception) -> str:
        """Say what was raised and, for a user's file, in which line of it."""
        file = self._module.__file__ if self._module else None
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" (line {lines[-1]} of {file})" if lines else ""
        return f"raises {type(error).__name__}: {first_line(error)}{where}"

    def __call__(self, rollout: Rollout) -> Score:
        """Score a wave, (N, K)."""
        place, members = rollout.group.tolist(), rollout.member.tolist()
        instructions = [rollout.tasks[g].instructions[: len(rollout.turns)] for g in place]
        step = rollout.noise.step
        when = "in an evaluation" if step == EVALUATION.step else f"in iteration {step + 1}"
        rows = [f"trajectory {m} of task {rollout.tasks[g].id} {when}" for g, m in zip(place, members, strict=True)]
        return Score(values=self.score(rollout.sources, instructions, rollout.pictures, rows))

    def score(
        self, sources: Tensor, instructions: list[tuple[str, ...]], pictures: Tensor, rows: Sequence[str]
    ) -> Tensor:
        """Score N trajectories, (N, K) float32 on the host; `rows` says which they are. The function gets copies.

        ValueError, one line: it raises, or does not give a number or NaN per trajectory and turn.
        """
        here = f"called with {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        copies = sources.to(self.device, copy=True), list(instructions), pictures.to(self.device).float().nan_to_num()
        try:
            with torch.no_grad():  # of this thread
                given = self.function(*copies)
            legend = "per trajectory and turn: (N, K)"
            values = numbers(given, (pictures.shape[1], pictures.shape[0]), legend)
        except NoNumbersError as error:
            raise ValueError(f"{self.field}: {error}; {here}") from error
        except Exception as error:  # whatever a user's code raises
            raise ValueError(f"{self.field}: {self._raised(error)}; {here}") from error
        infinite = values.isinf().nonzero()
        if len(infinite):
            row, turn = infinite[0].tolist()
            raise ValueError(
                f"{self.field}: gives an infinite number, must give a number, or NaN: turn {turn + 1} of {rows[row]}"
            )
        return values

    def check(self, tasks: Sequence[EditTask], num_turns: int) -> None:
        """Try the reward on pictures that are the sources, every second one mirrored. ValueError, one line: faults of
        shape, nothing but NaN, or numbers that depend on the trajectories beside.
        """
        num_rows = max(len(tasks), num_turns + 1)  # unlike K
        rows = [tasks[row % len(tasks)] for row in range(num_rows)]
        sources = torch.stack([task.source for task in rows]).to(self.device)
        edits = torch.stack([s.flip(-1) if row % 2 else s for row, s in enumerate(sources)])
        pictures = edits.expand(num_turns, *edits.shape)
        instructions = [task.instructions[:num_turns] for task in rows]
        names = [f"trajectory {row} of task {task.id} in the trial before training" for row, task in enumerate(rows)]
        whole = self.score(sources, instructions, pictures, names)
        if whole.isnan().all():
            raise ValueError(
                f"{self.field}: gives NaN alone, for {num_rows} trajectories of {len(tasks)} tasks: must give numbers; "
                f"where it has none for a kind of edit, 0 for the whole group teaches as little as NaN"
            )
        alone = self.score(sources[:1], instructions[:1], pictures[:, :1], names[:1])
        again = self.score(sources, instructions, pictures, names)
        first, second, single = (values.nan_to_num() for values in (whole, again, alone))
        difference = (single - first[:1]).abs().max()
        if torch.equal(first, second) and difference > BATCH_SHARE * first.abs().max():
            raise ValueError(
                f"{self.field}: gives a trajectory {whole[0].tolist()} beside others and {alone[0].tolist()} alone: "
                f"it is called with any part of a rollout, and must score each trajectory by itself"
            )


def build_also(config: Config, device: torch.device) -> dict[str, UserReward]:
    """Load the rewards of reward.also, by name, each tried on the first tasks of training, of one size."""
    rewards = {also.name: UserReward(also, device) for also in config.reward.also_rewards}
    if rewards:
        iterations = (training_tasks(config, iteration, alone()) for iteration in range(NUM_TRIED))
        first, *others = islice(chain.from_iterable(iterations), NUM_TRIED)
        tasks = [first, *(task for task in others if task.source.shape == first.source.shape)]  # as in a rollout
        for reward in rewards.values():
            reward.check(tasks, config.data.num_turns)
    return rewards


def by_edit(model: EditModel) -> Function:
    """Have a model of edits score whole trajectories, (N, K). ValueError: its batch_size is none."""
    size = getattr(model, "batch_size", BATCH_SIZE)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size is {size!r}, must be a whole number from 1 on")

    def score(sources: Tensor, instructions: Sequence[tuple[str, ...]], pictures: Tensor) -> Tensor:
        num_turns, num_rows = pictures.shape[:2]
        before = torch.cat([sources[None], pictures[:-1]]).flatten(0, 1)  # (K N, 3, H, W), turn by turn
        after, texts = pictures.flatten(0, 1), [row[turn] for turn in range(num_turns) for row in instructions]
        values = []
        for start in range(0, len(after), size):
            rows = [min(row, len(after) - 1) for row in range(start, start + size)]
            given = model(before[rows], [texts[row] for row in rows], after[rows])
            values.append(numbers(given, (len(rows),), "per edit: (M,)"))
        return torch.cat(values)[: len(after)].reshape(num_turns, num_rows).T

    return score


def numbers(given: Any, shape: tuple[int, ...], legend: str) -> Tensor:
    """Read what a user's code gave as float32 on the host. NoNumbersError: it has another shape, or is no numbers."""
    must = f"must give a number, or NaN, {legend} = {shape}"
    try:
        values = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoNumbersError(f"gives {type(given).__name__} ({first_line(error)}), {must}") from error
    if values.is_complex() or values.shape != shape:
        what = "complex numbers" if values.is_complex() else f"shape {tuple(values.shape)}"
        raise NoNumbersError(f"gives {what}, {must}")
    return values.float().cpu()
