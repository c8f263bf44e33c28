"""A trajectory that could not be scored is masked and counted, and has no part in anybody's advantage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_judge import save_dino

from mteditflow.advantage import advantages
from mteditflow.config import AdvantageConfig, Config, DataConfig, RewardConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.guards import GuardError
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.record.alarms import rollout_figures
from mteditflow.record.metrics import score_figures
from mteditflow.reward import build_reward, check_judge, check_scores
from mteditflow.reward.dino import DinoConsistency
from mteditflow.rollout import sample_rollout
from mteditflow.types import Scores

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def scores_of(valid: list[bool]) -> Scores:
    instruction = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0], [torch.nan, 0.5]])
    rewards = {"instruction": instruction, "consistency": torch.full((4, 2), 0.5)}
    return Scores(rewards=rewards, weights={"instruction": 1.0, "consistency": 0.1}, valid=torch.tensor(valid))


def test_a_reward_that_fails_is_masked_and_counted(tiny_config: Config) -> None:
    scores, group = scores_of([True, True, True, False]), torch.zeros(4, dtype=torch.int64)
    advantage = advantages(scores, group, AdvantageConfig())
    assert (advantage[3] == 0).all() and (advantage[:3] != 0).all()
    alone = replace(
        scores, rewards={name: values[:3] for name, values in scores.rewards.items()}, valid=scores.valid[:3]
    )
    assert torch.equal(advantage[:3], advantages(alone, group[:3], AdvantageConfig()))  # as if it had not been there
    figures = score_figures(scores, advantage, group, AdvantageConfig())
    assert figures["reward/valid_share"] == 0.75 and figures["reward/instruction"] == pytest.approx(2.5 / 6, rel=1e-6)
    assert figures["reward/mean"] == pytest.approx(2.5 / 6 + 0.1 * 0.5, rel=1e-6)  # what is maximised
    check_scores(scores, tiny_config)
    check_scores(scores_of([True, True, False, False]), tiny_config)  # half is allowed
    with pytest.raises(GuardError, match=r"75% of the trajectories .* more than 50%") as caught:
        check_scores(scores_of([True, False, False, False]), tiny_config)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_not_finite_is_not_scored(tiny_config: Config) -> None:
    policy = build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=False)
    tasks, reward = training_tasks(tiny_config, 0, ONE_RANK), build_reward(tiny_config)
    rollout = sample_rollout(policy, build_objective(tiny_config), tasks, tiny_config, 0)
    whole = reward(rollout)
    images = rollout.turns[1].image.clone()
    images[2, 0, 5, 5] = torch.nan
    broken = replace(rollout, turns=[rollout.turns[0], replace(rollout.turns[1], image=images)])
    scores = reward(broken)
    assert scores.valid.tolist() == [True, True, False, True] and whole.valid.all()
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(scores.instruction[keep], whole.instruction[keep])
    advantage = advantages(scores, rollout.group, AdvantageConfig())
    assert (advantage[2:] == 0).all()  # and the other one of its group has nobody to be compared with


@pytest.mark.parametrize("judge", ["exact", "simulated_direct"])
def test_dino_consistency_goes_with_any_judge(judge: str, tiny_config: Config, tmp_path: Path) -> None:
    """In the place of the world's own; none leaves it out, and the judge as it is."""
    save_dino(tmp_path, "dinov3")
    policy = build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=False)
    tasks = training_tasks(tiny_config, 0, ONE_RANK)
    rollout = sample_rollout(policy, build_objective(tiny_config), tasks, tiny_config, 0)
    config = replace(tiny_config, reward=RewardConfig(judge=judge, consistency=str(tmp_path)))  # pyright: ignore[reportArgumentType]
    scores = build_reward(config)(rollout)
    kept = DinoConsistency(str(tmp_path), ONE_RANK.device).score(tasks, rollout.group, rollout.pictures)
    assert torch.equal(scores.rewards["consistency"], kept)
    alone = replace(
        config, reward=replace(config.reward, consistency="none"), advantage=AdvantageConfig(consistency_weight=0)
    )
    found = build_reward(alone)(rollout)
    assert list(found.rewards) == ["instruction"] and torch.equal(found.instruction, scores.instruction)
    advantage = advantages(found, rollout.group, alone.advantage)
    figures = score_figures(found, advantage, rollout.group, alone.advantage) | rollout_figures(
        rollout, found, ONE_RANK
    )
    assert figures["reward/mean"] == pytest.approx(figures["reward/instruction"])
    assert not figures.keys() & {"reward/consistency", "alarm/over_edit_share"}


def test_the_worlds_consistency_knows_only_its_own_pictures() -> None:
    mine = Config(data=DataConfig(path="mine.jsonl"), reward=RewardConfig(judge="vlm", consistency="exact"))
    with pytest.raises(ValueError, match=r"reward.consistency is 'exact': knows only .*; take 'none' or a DINO"):
        check_judge(mine)
    check_judge(replace(mine, reward=RewardConfig(judge="vlm")))  # auto: EdiVal's DINO
    assert mine.reward.consistency_measure == "exact" == RewardConfig(judge="simulated_direct").consistency_measure
    assert "dinov3" in RewardConfig(judge="vlm").consistency_measure
