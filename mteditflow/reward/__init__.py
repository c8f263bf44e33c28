"""Rewards: rollout -> scores. Each is one name and one file, and says (N, K) of the turns of every trajectory.

The instruction score comes first: a trajectory without one is not valid, and never gets a default number. Consistency
and the user's functions (`reward.also`) go with any of them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.reward import RewardConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, local_device
from mteditflow.reward.exact import ExactConsistency, ExactInstruction
from mteditflow.reward.simulated import SimulatedJudge
from mteditflow.reward.user_function import UserReward
from mteditflow.types import Rollout, Score, Scores

INSTRUCTION, CONSISTENCY = "instruction", "consistency"


class Reward(Protocol):
    """One named reward."""

    def __call__(self, rollout: Rollout) -> Score:
        """Score N trajectories; a reward's own chance depends on `rollout.noise`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """What a run is rewarded for, by name, the instruction score first."""

    rewards: dict[str, Reward]
    weights: dict[str, float]

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of the N trajectories."""
        scores = {name: reward(rollout) for name, reward in self.rewards.items()}
        first, values = scores[INSTRUCTION], {name: score.values for name, score in scores.items()}
        valid = ~first.values.isnan().any(1)
        return Scores(
            rewards=values, weights=self.weights, valid=valid, truth=first.truth, words=first.words,
            faults=first.faults, off_mass=first.off_mass,
        )  # fmt: skip


def build_reward(config: Config) -> Rewards:
    """The rewards that `config` names; models on this process's GPU or else the CPU.

    ValueError, one line: a model, a server or a function that is not there.
    """
    # Models are imported where they are wanted: a run on the embedded world needs neither transformers' Auto classes
    # nor the extra 'judge'.
    device = local_device()
    rewards: dict[str, Reward] = {INSTRUCTION: _build_judge(config.reward, device)}
    match config.reward.consistency_measure:
        case "none":
            pass
        case "exact":
            rewards[CONSISTENCY] = ExactConsistency()
        case path:
            from mteditflow.reward.dino import DinoConsistency

            rewards[CONSISTENCY] = DinoConsistency(path, device, is_edival_compat=config.reward.is_edival_compat)
    weights = {INSTRUCTION: 1.0, CONSISTENCY: config.advantage.consistency_weight}
    for also in config.reward.also_rewards:
        task = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=device))[0]
        function = rewards[also.function] = UserReward(also)
        function.check(task, config.data.num_turns)
        weights[also.function] = also.weight
    return Rewards(rewards=rewards, weights={name: weights[name] for name in rewards})


def _build_judge(config: RewardConfig, device: torch.device) -> Reward:
    match config.judge:
        case "exact":
            return ExactInstruction(config.scale)
        case "vlm":
            from mteditflow.reward.vlm import VlmJudge

            if not config.url:
                from mteditflow.reward.vlm_local import LocalVlm

                return VlmJudge(config, LocalVlm(config, device))
            try:
                from mteditflow.reward.vlm_server import RemoteVlm
            except ModuleNotFoundError as error:
                raise ValueError(
                    f"reward.url needs the package {error.name}: pip install 'mteditflow[judge]'"
                ) from error
            return VlmJudge(config, RemoteVlm(config))
        case _:
            return SimulatedJudge(config)


def check_judge(config: Config) -> None:
    """Raise ValueError where judge or consistency knows only the embedded world, and the data are another's."""
    reward = config.reward
    if config.data.path == EMBEDDED:
        return
    for field, value, is_of_world, remedy in (
        ("judge", reward.judge, reward.judge != "vlm", "'vlm'"),
        ("consistency", reward.consistency, reward.consistency_measure == "exact", "'none' or a DINO"),
    ):
        if is_of_world:
            raise ValueError(
                f"reward.{field} is {value!r}: knows only the embedded world's pictures, not those of "
                f"data.path {config.data.path!r}; take {remedy} (docs/judge.md)"
            )


def gather_scores(scores: Scores, group: Tensor, ranks: Ranks) -> tuple[Scores, Tensor]:
    """The scores and groups (N,) of every rank's trajectories, on every rank; groups are numbered through."""
    num_groups, num_rows = int(group.max()) + 1, len(group)
    gathered = Scores(
        rewards={name: ranks.gather(values) for name, values in scores.rewards.items()},
        weights=scores.weights,
        valid=ranks.gather(scores.valid),
        truth=None if scores.truth is None else ranks.gather(scores.truth),
    )
    rank = torch.arange(ranks.world_size * num_rows, device=group.device) // num_rows
    return gathered, ranks.gather(group) + rank * num_groups
