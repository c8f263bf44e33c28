"""The judge beside the rollout against the judge after each wave, as `mteditflow profile --overlap` has it: four groups
of four at FLUX.1-Kontext-dev's true shape, scored by a Qwen3-VL-8B of random weights that writes 96 tokens each.
"""

from dataclasses import dataclass, replace
from typing import Any

import measure
import pytest
import test_iteration
import test_judge
import torch
from tiny_judge import small_processor, without_video

from mteditflow.config import AdvantageConfig, Config, DataConfig, RewardConfig
from mteditflow.profile.command import build_case
from mteditflow.profile.overlap import compare
from mteditflow.reward import INSTRUCTION, Rewards
from mteditflow.reward.vlm import VlmJudge
from mteditflow.reward.vlm_local import LocalVlm

GOALS = {"exposed_percent": measure.Goal(value=5.0), "times_off_on": measure.Goal(value=1.0, is_least=True)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the editor's iteration and of its judge."""

    iteration: Config
    judge: test_judge.Size
    group_size: int
    num_steps: int
    rows: int
    tokens: int
    rounds: int


TRUE = Size(
    iteration=test_iteration.TRUE, judge=test_judge.TRUE, group_size=4, num_steps=4, rows=4, tokens=96, rounds=2
)
SMALL = Size(
    iteration=test_iteration.SMALL, judge=test_judge.SMALL, group_size=2, num_steps=3, rows=2, tokens=8, rounds=1
)


def build_rewards(size: Size, config: RewardConfig, device: torch.device) -> Rewards:
    """A judge of random weights, which always writes as long as it may."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        without_video(patch)
        processor = small_processor(16, (size.judge.picture**2 // 4, size.judge.picture**2))
    model = test_judge.build_model(size.judge, processor.tokenizer, device, dtype)
    judge = VlmJudge(config, LocalVlm(config, device, (processor, model)))
    return Rewards(rewards={INSTRUCTION: judge}, weights={INSTRUCTION: 1.0})


def time_overlap(size: Size) -> dict[str, Any]:
    """The row of the pair; random words are no scores, so that what is trained on is praised by turns."""
    config = replace(
        size.iteration,
        data=DataConfig(num_turns=1),
        rollout=replace(
            size.iteration.rollout, num_tasks=4, group_size=size.group_size, num_steps=size.num_steps, window_size=2,
            microbatch_size=size.rows, wave_size=size.group_size,
        ),
        optimizer=replace(size.iteration.optimizer, microbatch_size=size.rows),
        advantage=AdvantageConfig(std="group", consistency_weight=0),
        reward=RewardConfig(
            judge="vlm", consistency="none", num_retries=0, max_answer_tokens=size.tokens, num_parallel=size.group_size
        ),
    )  # fmt: skip
    case = build_case(config)
    figures = compare(case, build_rewards(size, config.reward, case.policy.device), size.rounds)
    on = figures["medians"]["on"]
    return figures | {
        "exposed_percent": 100 * on["exposed_s"] / on["total_s"], "times_off_on": figures["times_off"]["on"]
    }  # fmt: skip


def test_overlap(record: measure.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mteditflow.reward.check_scores", lambda *_: None)
    record.add("overlap", time_overlap(TRUE if torch.cuda.is_available() else SMALL), GOALS)
