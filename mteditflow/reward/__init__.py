"""Rewards: rollout -> scores, one instruction score and one consistency per turn of every trajectory."""

from typing import Protocol

import torch
from torch import Tensor

from mteditflow.distributed import Ranks
from mteditflow.reward.exact import ExactReward
from mteditflow.types import Rollout, Scores


class Reward(Protocol):
    """Scores the N trajectories of a rollout. A trajectory that could not be scored is not valid; it never gets a
    default number.
    """

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of N trajectories."""
        ...


def build_reward() -> Reward:
    """The reward of the embedded world."""
    return ExactReward()


def of_all_ranks(scores: Scores, group: Tensor, ranks: Ranks) -> tuple[Scores, Tensor]:
    """The scores and groups (N,) of every rank's trajectories, on every rank; groups are numbered through."""
    num_groups, num_rows = int(group.max()) + 1, len(group)
    every = Scores(
        instruction=ranks.gather(scores.instruction),
        consistency=ranks.gather(scores.consistency),
        valid=ranks.gather(scores.valid),
    )
    rank = torch.arange(ranks.world_size * num_rows, device=group.device) // num_rows
    return every, ranks.gather(group) + rank * num_groups
