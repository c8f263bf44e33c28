"""Rollouts of given pictures, for what scores them."""

from collections.abc import Callable

import torch
from torch import Tensor

from mteditflow.flow import make_schedule
from mteditflow.noise import NoiseSource
from mteditflow.types import Condition, EditTask, Rollout, Scores, Turn

NOTHING = Condition(text={}, image=torch.zeros(0))


def rollout_of(
    tasks: list[EditTask], pictures: Tensor, noise: NoiseSource | None = None, group: Tensor | None = None
) -> Rollout:
    """Of pictures (K, N, 3, H, W), N / P of each task in order, or those of `group` (N,)."""
    turns = [
        Turn(condition=NOTHING, latents=torch.zeros(0), old_log_prob=torch.zeros(0), image=picture)
        for picture in pictures
    ]
    num_rows = pictures.shape[1]
    group = torch.arange(num_rows) * len(tasks) // num_rows if group is None else group
    member = torch.tensor([int((group[:n] == group[n]).sum()) for n in range(num_rows)])
    schedule, noise = make_schedule(torch.linspace(1, 0, 3)), noise or NoiseSource(seed=0, step=0)
    return Rollout(tasks=tasks, turns=turns, group=group, member=member, schedule=schedule, noise=noise)


class GivenRewards:
    """A run's rewards by one function, rollout -> scores; the function's waves come one after another."""

    is_remote = False

    def __init__(self, function: Callable[[Rollout], Scores]) -> None:
        self.function, self.rewards = function, {"instruction": self}

    def __call__(self, rollout: Rollout) -> Scores:
        return self.function(rollout)

    def combine(self, scores: dict[str, Scores]) -> Scores:
        return scores["instruction"]

    def close(self) -> None: ...
