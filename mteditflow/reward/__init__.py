"""Rewards: rollout -> scores. Each is one name and one file, and says (N, K) of the turns of every trajectory.

The instruction score comes first: a trajectory without one is not valid, and never gets a default number. Consistency
and further rewards (`reward.also`) go with any of them. A reward is called with any trajectories of any groups, a wave
of a rollout, and its score of one does not depend on the others.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mteditflow.advantage import advantages
from mteditflow.config import EMBEDDED, Config
from mteditflow.config.reward import RewardConfig
from mteditflow.config.rubric import check_rubric
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, alone, local_device
from mteditflow.guards import MAX_INVALID_SHARE, GuardError
from mteditflow.reward.exact import ExactConsistency, ExactInstruction, SimulatedJudge
from mteditflow.reward.user_function import build_also
from mteditflow.types import FAULTS, Rollout, Score, Scores

if TYPE_CHECKING:
    from mteditflow.reward.vlm import Ask, Question

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

    ValueError, one line: a model, a server or a function that is not there, a rubric that cannot be used.
    """
    # Models are imported where they are wanted: a run on the embedded world needs neither transformers' Auto classes
    # nor the extra 'judge'.
    check_rubric(config)
    device = local_device()
    rewards: dict[str, Reward] = {INSTRUCTION: _build_judge(config, device)}
    match config.reward.consistency_measure:
        case "none":
            pass
        case "exact":
            rewards[CONSISTENCY] = ExactConsistency()
        case path:
            from mteditflow.reward.dino import DinoConsistency

            rewards[CONSISTENCY] = DinoConsistency(path, device, is_edival_compat=config.reward.is_edival_compat)
    weights = {INSTRUCTION: 1.0, CONSISTENCY: config.advantage.consistency_weight}
    rewards |= build_also(config, device)
    weights |= {also.name: also.weight for also in config.reward.also_rewards}
    return Rewards(rewards=rewards, weights={name: weights[name] for name in rewards})


def _build_judge(config: Config, device: torch.device) -> Reward:
    reward = config.reward
    match reward.judge:
        case "exact":
            return ExactInstruction(reward.scale)
        case "vlm":
            from mteditflow.reward.vlm import VlmJudge, sample_question

            num_turns = config.data.num_turns
            if config.data.path != EMBEDDED:  # whose evaluation is the verifier's
                num_turns = max(num_turns, config.num_held_out_turns)
            task = training_tasks(config, 0, alone())[0]
            ask = build_ask(reward, device, sample_question(task, num_turns, reward))
            return VlmJudge(reward, ask)
        case _:
            return SimulatedJudge(reward)


def build_ask(config: RewardConfig, device: torch.device, sample: "Question") -> "Ask":
    """The VLM of a config, in this process or behind its url, which is asked the sample. ValueError: it is not there,
    or no VLM.
    """
    if not config.url:
        from mteditflow.reward.vlm_local import LocalVlm

        return LocalVlm(config, device)
    try:
        from mteditflow.reward.vlm_server import RemoteVlm
    except ModuleNotFoundError as error:
        raise ValueError(f"reward.url needs the package {error.name}: pip install 'mteditflow[judge]'") from error
    ask = RemoteVlm(config)
    try:
        ask.check(sample)
    except BaseException:
        ask.close()
        raise
    return ask


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


def check_scores(scores: Scores, config: Config) -> None:
    """Stop where too many trajectories could not be scored: a run on the few that are left learns little."""
    share = 1 - scores.valid.float().mean().item()
    if share > MAX_INVALID_SHARE:
        raise GuardError(
            f"{share:.0%} of the trajectories could not be scored, more than {MAX_INVALID_SHARE:.0%}: look at the "
            f"reward, judge {config.reward.judge!r}{_reasons(scores)}"
        )


def _reasons(scores: Scores) -> str:
    """What a judge's faults were, and the last of its words that gave no score, in brackets."""
    if scores.faults is None:
        return ""
    counts = Counter(FAULTS[fault] for fault in scores.faults.tolist() if fault)
    said = [word for word, valid in zip(scores.words, scores.valid.tolist(), strict=False) if word and not valid]
    quoted = f"; the last answer without a score ends {' '.join(said[-1].split())[-120:]!r}" if said else ""
    return f" ({', '.join(f'{name} {count}' for name, count in counts.most_common())}{quoted})"


def is_trained_by_group(config: Config, ranks: Ranks) -> bool:
    """Whether a group is trained on as soon as it is scored: advantage.std is 'group', no group lies across ranks, and
    no base is cut over them, since they then run equally many microbatches. Else the scores of every rank are needed.
    """
    is_whole = len(ranks.share(config.rollout.num_tasks * config.rollout.group_size)) % config.rollout.group_size == 0
    return config.advantage.std == "group" and is_whole and config.distributed.shard == "none"


def say_waits(config: Config, ranks: Ranks) -> list[str]:
    """Say where training cannot begin before the last trajectory is scored."""
    is_slow, num_groups = config.reward.judge == "vlm", config.rollout.num_tasks / ranks.world_size
    if config.reward.overlap == "off" or not is_slow or num_groups < 2 or is_trained_by_group(config, ranks):
        return []
    if config.advantage.std == "group":
        cause = "a base that is cut" if config.distributed.shard != "none" else "a group that lies across ranks"
        return [f"training waits for the last score of all ranks, because of {cause} (docs/scaling.md)"]
    return [
        "advantage.std is 'global', over the scores of all groups: training waits for the last of them; with "
        "'group' it begins with the first group that is scored"
    ]


class Judged:
    """What the trajectories of an iteration are worth, group after group as their scores come in.

    Once iterated to its end: `scores`, `group` and `advantages` of the trajectories of all ranks, in their order.
    """

    scores: Scores
    group: Tensor  # (N,), numbered through
    advantages: Tensor  # (N, K)

    def __init__(self, scores: Iterable[Scores], config: Config, ranks: Ranks) -> None:
        """scores: of one wave after another of this rank's trajectories."""
        self._waves, self._config, self._ranks = scores, config, ranks

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the advantages (M, K) of this rank's trajectories in order, group by group or all at once. GuardError,
        before the last is used, where too many trajectories have no score.
        """
        config, size = self._config, self._config.rollout.group_size
        num_rows, is_by_group = config.rollout.num_tasks * size, is_trained_by_group(config, self._ranks)
        share, num_yielded, waves = self._ranks.share(num_rows), 0, list[Scores]()
        for wave in self._waves:
            waves.append(wave)
            if is_by_group:
                so_far = join_scores(waves)
                while num_yielded + size <= len(so_far.valid):
                    rows = slice(num_yielded, num_yielded + size)
                    num_yielded = rows.stop
                    one = torch.zeros(size, dtype=torch.int64)
                    yield advantages(cut_scores(so_far, rows), one, config.advantage)
        self.scores, self.group = gather_scores(join_scores(waves), self._ranks), torch.arange(num_rows) // size
        check_scores(self.scores, config)
        self.advantages = advantages(self.scores, self.group, config.advantage)
        if not is_by_group:
            yield self.advantages[share.start : share.stop]


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


def cut_scores(scores: Scores, rows: slice) -> Scores:
    """The scores of some trajectories."""
    tensors = {name: getattr(scores, name) for name in ("truth", "faults", "off_mass")}
    cut = {name: value if value is None else value[rows] for name, value in tensors.items()}
    rewards = {name: values[rows] for name, values in scores.rewards.items()}
    return Scores(rewards=rewards, weights=scores.weights, valid=scores.valid[rows], words=scores.words[rows], **cut)


def gather_scores(scores: Scores, ranks: Ranks) -> Scores:
    """The scores of every rank's trajectories, on every rank, in their order; a judge's words stay this rank's."""

    def gathered(values: Tensor | None) -> Tensor | None:
        return None if values is None else ranks.gather(values)

    return Scores(
        rewards={name: ranks.gather(values) for name, values in scores.rewards.items()},
        weights=scores.weights, valid=ranks.gather(scores.valid), truth=gathered(scores.truth), words=scores.words,
        faults=gathered(scores.faults), off_mass=gathered(scores.off_mass),
    )  # fmt: skip
