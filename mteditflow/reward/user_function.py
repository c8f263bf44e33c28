"""A reward of the user's own: any function that looks at pictures (`reward.also`, docs/judge.md)."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mteditflow.config.errors import first_line
from mteditflow.config.reward import AlsoReward
from mteditflow.types import EditTask, Rollout, Score


class UserReward:
    """The function that an entry of reward.also names. ValueError, one line: there is none that can be called."""

    is_remote = False

    def __init__(self, also: AlsoReward) -> None:
        self.field = f"reward.also is {also.text!r}"
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())  # where `python -m` looks too
        try:
            module = importlib.import_module(also.module)
        except Exception as error:  # whatever a user's file raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(
                f"{self.field}: {also.module} cannot be imported from the working folder or sys.path ({reason}); "
                f"python -c 'import {also.module}' says where it fails"
            ) from error
        function = getattr(module, also.function, None)
        if not callable(function):
            raise ValueError(f"{self.field}: {module.__file__} has no function {also.function!r}")
        self.function = function

    def __call__(self, rollout: Rollout) -> Score:
        """The function's numbers (N, K)."""
        instructions = [rollout.tasks[g].instructions[: len(rollout.turns)] for g in rollout.group.tolist()]
        return Score(values=self.score(rollout.sources, instructions, rollout.pictures))

    def score(self, sources: Tensor, instructions: Sequence[tuple[str, ...]], pictures: Tensor) -> Tensor:
        """Call the function; ValueError, one line, where it does not give a number per trajectory and turn, (N, K)."""
        num_turns, num_rows = pictures.shape[:2]
        given: Any = self.function(sources.to(pictures.device), instructions, pictures.nan_to_num())
        try:
            values = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.field}: gives {type(given).__name__}, must give numbers (N, K)") from error
        if values.shape != (num_rows, num_turns) or values.isinf().any():
            what = "an infinite number" if values.shape == (num_rows, num_turns) else f"shape {tuple(values.shape)}"
            raise ValueError(
                f"{self.field}: gives {what}, must give a number, or NaN, per trajectory and turn: "
                f"(N, K) = ({num_rows}, {num_turns}) here"
            )
        return values

    def check(self, task: EditTask, num_turns: int) -> None:
        """Try the function on K turns that change nothing: what it gives of the wrong shape is found at once."""
        num_rows = num_turns + 1  # unlike K
        sources = task.source.repeat(num_rows, 1, 1, 1)
        self.score(sources, [task.instructions[:num_turns]] * num_rows, sources.repeat(num_turns, 1, 1, 1, 1))
