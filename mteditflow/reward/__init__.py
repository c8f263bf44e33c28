"""Rewards: rollout -> scores, one instruction score and one consistency per turn of every trajectory."""

from typing import Protocol

import torch
from torch import Tensor

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.reward import RewardConfig
from mteditflow.distributed import Ranks, local_device
from mteditflow.reward.exact import ExactReward
from mteditflow.reward.simulated import SimulatedJudge
from mteditflow.reward.vlm import VlmReward
from mteditflow.types import Rollout, Scores

WORLD_JUDGES = ("exact", "thinking", "direct")  # know what the embedded world's pictures should show


class Reward(Protocol):
    """Scores the N trajectories of a rollout. A trajectory that could not be scored is not valid; it never gets a
    default number.
    """

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of N trajectories; a judge's own chance depends on `rollout.noise`."""
        ...


def build_reward(config: RewardConfig) -> Reward:
    """The judge that `config` names; on this process's GPU or else the CPU.

    ValueError, one line: a model or a server that is not there.
    """
    match config.judge:
        case "exact":
            return ExactReward(config.scale)
        case "vlm":
            return _vlm_reward(config)
        case _:
            return SimulatedJudge(config)


def _vlm_reward(config: RewardConfig) -> VlmReward:
    # Imported here: a run on the embedded world needs neither transformers' Auto classes nor the extra 'judge'.
    device = local_device()
    if config.url:
        try:
            from mteditflow.reward.vlm_server import RemoteVlm
        except ModuleNotFoundError as error:
            raise ValueError(f"reward.url needs the package {error.name}: pip install 'mteditflow[judge]'") from error
        ask = RemoteVlm(config)
    else:
        from mteditflow.reward.vlm_local import LocalVlm

        ask = LocalVlm(config, device)
    if config.consistency == "none":
        return VlmReward(config, ask, None)
    from mteditflow.reward.dino import DinoConsistency

    return VlmReward(config, ask, DinoConsistency(config, device))


def check_judge(config: Config) -> None:
    """Raise ValueError where the judge knows only the embedded world, and the data are another's."""
    if config.data.path != EMBEDDED and config.reward.judge in WORLD_JUDGES:
        raise ValueError(
            f"reward.judge is {config.reward.judge!r}: knows only the embedded world's pictures, not those of "
            f"data.path {config.data.path!r}; take 'vlm' (docs/judge.md)"
        )


def gather_scores(scores: Scores, group: Tensor, ranks: Ranks) -> tuple[Scores, Tensor]:
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
