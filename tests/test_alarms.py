"""Alarms: closed forms of what they measure, and that a hacked run rings and an honest one does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from rollouts import rollout_of

from mteditflow.config import Config
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, alone
from mteditflow.pictures import round_to_8_bit
from mteditflow.record.alarms import (
    ALARMS,
    colourfulness,
    edge_density,
    find_alarms,
    held_out_figures,
    is_unedited,
    rollout_figures,
    saturation,
)
from mteditflow.types import Condition, Rollout, Scores
from mteditflow.world.render import render

NOTHING = Condition(text={}, image=torch.zeros(0))


def made(pictures: list[torch.Tensor], config: Config) -> tuple[Rollout, Scores]:
    """A rollout of two trajectories per task that made these pictures (N, 3, 64, 64), turn by turn."""
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    rollout = rollout_of(tasks, torch.stack(pictures))
    return rollout, scores_of(torch.full((len(rollout.group), len(pictures)), 0.9))


def scores_of(consistency: torch.Tensor) -> Scores:
    rewards = {"instruction": torch.full_like(consistency, 0.9), "consistency": consistency}
    return Scores(rewards=rewards, weights={}, valid=torch.ones(len(consistency)).bool())


@pytest.fixture
def config() -> Config:
    default = Config()
    return replace(default, data=replace(default.data, num_turns=2))


def honest(config: Config) -> list[torch.Tensor]:
    """The pictures that the instructions ask for, without a fault."""
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    return [render([task.truth.scenes()[turn + 1] for task in tasks]).repeat_interleave(2, dim=0) for turn in range(2)]


def test_closed_forms() -> None:
    stripes = torch.tensor([1.0, -1.0]).repeat(1, 3, 4, 2)  # columns of white and black, 4 x 4
    assert edge_density(stripes).item() == pytest.approx((2 + 0) / 2)
    assert saturation(stripes).item() == 0 and colourfulness(stripes).item() == 0
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 4, 4)
    assert edge_density(red).item() == 0 and saturation(red).item() == 1
    assert colourfulness(red).item() == pytest.approx(0.3 * (1 + 0.25) ** 0.5)  # opponents 1 and 1/2, no spread
    half = torch.cat([red[..., :2], -red[..., :2]], dim=-1)  # red and cyan: opponents 1, 1/2 and -1, -1/2
    assert colourfulness(half).item() == pytest.approx((1 + 0.25) ** 0.5)


def test_a_small_edit_is_one_and_noise_is_none() -> None:
    before = torch.zeros(3, 3, 64, 64)
    after = before.clone()
    after[0, :, 8:16, 8:16] = 0.4  # one block by a fifth of the range
    after[1] += 0.1 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert is_unedited(before, after).tolist() == [False, True, True]


def test_honest_pictures_do_not_ring(config: Config) -> None:
    figures = rollout_figures(*made(honest(config), config), alone())
    assert figures.keys() == ALARMS.keys() - {"alarm/held_out_gap"}
    assert figures["alarm/no_edit_share"] == 0 and figures["alarm/over_edit_share"] == 0
    assert find_alarms(figures) == []


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("noise", "alarm/edge_density_drift"),
        ("grey", "alarm/saturation_drift"),
        ("grey", "alarm/colourfulness_drift"),
        ("vivid", "alarm/colourfulness_drift"),
        ("ignored", "alarm/no_edit_share"),
        ("repainted", "alarm/over_edit_share"),
    ],
)
def test_a_hacked_run_rings(fault: str, expected: str, config: Config) -> None:
    pictures = honest(config)
    rollout, scores = made(pictures, config)
    match fault:
        case "noise":
            noise = torch.randn(pictures[1].shape, generator=torch.Generator().manual_seed(0))
            pictures[1] = (pictures[1] + 0.2 * noise).clamp(-1, 1)
        case "grey":
            pictures[1] = pictures[1].mean(1, keepdim=True).expand_as(pictures[1])
        case "vivid":
            grey = pictures[1].mean(1, keepdim=True)
            pictures[1] = (grey + 3 * (pictures[1] - grey)).clamp(-1, 1)
        case "ignored":
            sources = torch.stack([task.source for task in rollout.tasks])[rollout.group]
            pictures = [round_to_8_bit(sources), round_to_8_bit(sources)]
        case "repainted":
            scores = scores_of(torch.full_like(scores.instruction, 0.5))
    rollout = replace(
        rollout, turns=[replace(turn, image=own) for turn, own in zip(rollout.turns, pictures, strict=True)]
    )
    assert expected in find_alarms(rollout_figures(rollout, scores, alone()))


def test_a_picture_that_is_not_finite_is_left_out(config: Config) -> None:
    pictures = honest(config)
    whole = rollout_figures(*made(pictures, config), alone())
    pictures[0][3] = torch.nan
    figures = rollout_figures(*made(pictures, config), alone())
    assert all(value == value for value in figures.values())
    assert figures["alarm/edge_density_drift"] == pytest.approx(whole["alarm/edge_density_drift"], abs=0.05)


def test_the_gap_between_judge_and_truth() -> None:
    values: dict[str, Any] = {"reward/success_1": 0.9, "reward/success_2": 0.7, "heldout/MT_1": 50, "heldout/MT_2": 30}
    assert held_out_figures(values) == {"alarm/held_out_gap": pytest.approx(0.4)}
    assert held_out_figures({"reward/success_1": 0.9}) == {}
    assert find_alarms(values | held_out_figures(values)) == ["alarm/held_out_gap"]
    assert find_alarms({"alarm/held_out_gap": float("nan")}) == []
