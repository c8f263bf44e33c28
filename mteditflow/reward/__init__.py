"""Rewards: rollout -> scores, one instruction score and one consistency per turn of every trajectory."""

from typing import Protocol

import torch
from torch import Tensor

from mteditflow.config import EMBEDDED, Config, RewardConfig
from mteditflow.distributed import Ranks
from mteditflow.reward.exact import ExactReward
from mteditflow.reward.simulated import SimulatedJudge
from mteditflow.types import Rollout, Scores

WORLD_JUDGES = ("exact", "thinking", "direct")  # know what the embedded world's pictures should show


class Reward(Protocol):
    """Scores the N trajectories of a rollout. A trajectory that could not be scored is not valid; it never gets a
    default number.
    """

    def __call__(self, rollout: Rollout, iteration: int) -> Scores:
        """Scores of N trajectories; `iteration` is what a judge's own chance depends on."""
        ...


def build_reward(config: RewardConfig, seed: int) -> Reward:
    """The reward of the embedded world: the exact verifier, or a judge whose chance is a function of `seed`."""
    return ExactReward(config.scale) if config.judge == "exact" else SimulatedJudge(config, seed)


def check_judge(config: Config) -> None:
    """Raise ValueError where the judge knows only the embedded world, and the data are another's."""
    if config.data.path != EMBEDDED and config.reward.judge in WORLD_JUDGES:
        raise ValueError(
            f"reward.judge is {config.reward.judge!r}: knows only the embedded world's pictures, not those of "
            f"data.path {config.data.path!r}; take a judge that looks at yours"
        )


def of_all_ranks(scores: Scores, group: Tensor, ranks: Ranks) -> tuple[Scores, Tensor]:
    """The scores and groups (N,) of every rank's trajectories, on every rank; groups are numbered through."""
    num_groups, num_rows = int(group.max()) + 1, len(group)
    every = Scores(
        instruction=ranks.gather(scores.instruction),
        consistency=ranks.gather(scores.consistency),
        valid=ranks.gather(scores.valid),
        truth=None if scores.truth is None else ranks.gather(scores.truth),
    )
    rank = torch.arange(ranks.world_size * num_rows, device=group.device) // num_rows
    return every, ranks.gather(group) + rank * num_groups
