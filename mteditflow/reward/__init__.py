"""Rewards: rollout -> scores. Each is one name and one file, and says (N, K) of the turns of every trajectory.

The instruction score comes first: a trajectory without one is not valid, and never gets a default number. Consistency
and the user's functions (`reward.also`) go with any of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mteditflow.advantage import advantages
from mteditflow.config import EMBEDDED, Config
from mteditflow.config.reward import RewardConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, local_device
from mteditflow.guards import check_scores
from mteditflow.reward.exact import ExactConsistency, ExactInstruction
from mteditflow.reward.simulated import SimulatedJudge
from mteditflow.reward.user_function import UserReward
from mteditflow.types import Rollout, Score, Scores

INSTRUCTION, CONSISTENCY = "instruction", "consistency"


class Reward(Protocol):
    """One named reward."""

    is_remote: bool
    """Whether another machine computes it, so that several threads may ask at once."""

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
        return self.combine({name: reward(rollout) for name, reward in self.rewards.items()})

    def close(self) -> None:
        """Have what is on its way to a server end soon."""
        for reward in self.rewards.values():
            if close := getattr(reward, "close", None):
                close()

    def combine(self, scores: dict[str, Score]) -> Scores:
        """The scores of all rewards of the same trajectories."""
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


class Judged:
    """What the trajectories of an iteration are worth, group after group as their scores come in.

    Once iterated to its end: `scores`, `group` and `advantages` of all ranks.
    """

    scores: Scores
    group: Tensor  # (N of all ranks,), numbered through
    advantages: Tensor  # (N of all ranks, K)

    def __init__(self, scores: Iterable[Scores], group: Tensor, config: Config, ranks: Ranks) -> None:
        """scores: of one wave after another. group (N,): of this rank's trajectories."""
        self._waves, self._group, self._config, self._ranks = scores, group, config, ranks

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the advantages (G, K) of this rank's groups in order; those of a group need its own scores, or with
        advantage.std 'global' all. GuardError, before the last is used, where too many trajectories have no score.
        """
        waves, sizes, num_yielded = list[Scores](), self._group.bincount().tolist(), 0
        for wave in self._waves:
            waves.append(wave)
            if self._config.advantage.std != "group":
                continue
            so_far = join_scores(waves)
            while sizes and num_yielded + sizes[0] <= len(so_far.valid):
                rows = slice(num_yielded, num_yielded + sizes.pop(0))
                num_yielded = rows.stop
                one = torch.zeros(rows.stop - rows.start, dtype=torch.int64)
                yield advantages(so_far.rows(rows), one, self._config.advantage)
        self.scores, self.group = gather_scores(join_scores(waves), self._group, self._ranks)
        check_scores(self.scores, self._config)
        self.advantages = advantages(self.scores, self.group, self._config.advantage)
        if sizes:
            yield from self.advantages.chunk(self._ranks.world_size)[self._ranks.rank].split(sizes)


def join_scores(waves: Sequence[Scores]) -> Scores:
    """The scores of several waves as one."""
    first = waves[0]

    def joined(name: str) -> Tensor | None:
        parts = [getattr(wave, name) for wave in waves]
        return None if parts[0] is None else torch.cat(parts)

    return Scores(
        rewards={name: torch.cat([wave.rewards[name] for wave in waves]) for name in first.rewards},
        weights=first.weights, valid=torch.cat([wave.valid for wave in waves]), truth=joined("truth"),
        words=tuple(word for wave in waves for word in wave.words), faults=joined("faults"),
        off_mass=joined("off_mass"),
    )  # fmt: skip


def gather_scores(scores: Scores, group: Tensor, ranks: Ranks) -> tuple[Scores, Tensor]:
    """The scores and groups (N,) of every rank's trajectories, on every rank; groups are numbered through, and a
    judge's words stay this rank's.
    """
    num_groups, num_rows = int(group.max()) + 1, len(group)

    def gathered(values: Tensor | None) -> Tensor | None:
        return None if values is None else ranks.gather(values)

    every = Scores(
        rewards={name: ranks.gather(values) for name, values in scores.rewards.items()},
        weights=scores.weights, valid=ranks.gather(scores.valid), truth=gathered(scores.truth), words=scores.words,
        faults=gathered(scores.faults), off_mass=gathered(scores.off_mass),
    )  # fmt: skip
    rank = torch.arange(ranks.world_size * num_rows, device=group.device) // num_rows
    return every, ranks.gather(group) + rank * num_groups
