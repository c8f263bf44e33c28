"""The judge beside the rollout against the judge after each wave, as `mteditflow profile --overlap` has it: four groups
of four at FLUX.1-Kontext-dev's true shape, scored by a Qwen3-VL-8B of random weights that writes 96 tokens each. And,
on a CPU, the miniature beside a judge that takes as long as the rollout and no core (as behind a server): how much of
its time is waited for, by size of wave.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import measure
import pytest
import test_answers
import test_iteration
import torch
from rich.console import Console
from rich.table import Table
from tiny_judge import small_processor, without_video

from mteditflow.config import AdvantageConfig, Config, DataConfig, RewardConfig, RolloutConfig
from mteditflow.profile import overlap
from mteditflow.profile.command import build_case
from mteditflow.profile.overlap import compare
from mteditflow.reward import INSTRUCTION, Rewards
from mteditflow.reward.vlm import VlmJudge
from mteditflow.reward.vlm_local import LocalVlm
from mteditflow.rollout import sample_waves
from mteditflow.types import Rollout, Score

GOALS = {"exposed_percent": measure.Goal(value=5.0), "times_off_on": measure.Goal(value=1.0, is_least=True)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the editor's iteration and of its judge."""

    iteration: Config
    judge: test_answers.Size
    group_size: int
    num_steps: int
    rows: int
    tokens: int
    rounds: int


TRUE = Size(
    iteration=test_iteration.TRUE, judge=test_answers.TRUE, group_size=4, num_steps=4, rows=4, tokens=96, rounds=2
)
SMALL = Size(
    iteration=test_iteration.SMALL, judge=test_answers.SMALL, group_size=2, num_steps=3, rows=2, tokens=8, rounds=1
)


def build_rewards(size: Size, config: RewardConfig, device: torch.device) -> Rewards:
    """A judge of random weights, which always writes as long as it may."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        without_video(patch)
        processor = small_processor(16, (size.judge.picture**2 // 4, size.judge.picture**2))
    model = test_answers.build_model(size.judge, processor.tokenizer, device, dtype)
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
    figures = compare(case, lambda: build_rewards(size, config.reward, case.policy.device), size.rounds)
    on = figures["medians"]["on"]
    return figures | {
        "exposed_percent": 100 * on["exposed_s"] / on["total_s"], "times_off_on": figures["times_off"]["on"]
    }  # fmt: skip


def test_overlap(record: measure.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mteditflow.reward.check_scores", lambda *_: None)
    record.add("overlap", time_overlap(TRUE if torch.cuda.is_available() else SMALL), GOALS)


WAITED = {"waited_percent": measure.Goal(value=20.0)}  # of the judge's time, on one core and in waves of 2 or 4 of 16


class Waiting:
    """A judge that sleeps, for each wave, as long as that wave took to roll out."""

    is_remote = False

    def __init__(self) -> None:
        self.seconds = dict[int, float]()  # by the address of a wave's latents, which live until it is scored

    def roll(self, *arguments: Any) -> Iterator[Rollout]:
        """The waves of `sample_waves`, each timed."""
        waves, start = sample_waves(*arguments), time.perf_counter()
        for wave in waves:
            self.seconds[wave.turns[0].latents.data_ptr()] = time.perf_counter() - start
            yield wave
            start = time.perf_counter()

    def __call__(self, rollout: Rollout) -> Score:
        time.sleep(self.seconds[rollout.turns[0].latents.data_ptr()])
        return Score(values=torch.full((len(rollout.group), len(rollout.turns)), 0.5))


def time_waiting(wave_size: int, std: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two groups of 16 in microbatches of 2; T_a without the judge, T_b the judge alone, T_ab both."""
    rollout = RolloutConfig(num_tasks=2, group_size=16, microbatch_size=2, wave_size=wave_size)
    advantage = AdvantageConfig(std=std)  # pyright: ignore[reportArgumentType]
    config = Config(data=DataConfig(num_turns=1), rollout=rollout, advantage=advantage)
    config = replace(config, optimizer=replace(config.optimizer, microbatch_size=2))
    judge = Waiting()
    monkeypatch.setattr(overlap, "sample_waves", judge.roll)
    figures = compare(build_case(config), lambda: Rewards(rewards={INSTRUCTION: judge}, weights={INSTRUCTION: 1.0}))
    off, on = figures["medians"]["off"], figures["medians"]["on"]
    found = {"wave_size": wave_size, "std": std, "t_a": off["total_s"] - off["judge_s"], "t_b": off["judge_s"]}
    found |= {"t_ab": on["total_s"], "waited_percent": 100 * on["exposed_s"] / on["judge_s"]}
    return found | {"efficiency": figures["efficiency"]["on"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="figures of a CPU")
def test_a_judge_as_slow_as_the_rollout(record: measure.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asserted holds whatever the machine: nothing is waited for longer than the judge worked."""
    monkeypatch.setattr("mteditflow.reward.check_scores", lambda *_: None)
    table = Table("wave", "advantage.std", "T_a s", "T_b s", "T_ab s", "waited for %", "efficiency")
    for std, wave_size in (("group", 4), ("global", 4), ("global", 2), ("group", 8), ("group", 16)):
        row = time_waiting(wave_size, std, monkeypatch)
        record.add("waiting", row, WAITED if wave_size <= 4 else None)
        table.add_row(str(wave_size), std, *(f"{row[key]:.2f}" for key in ("t_a", "t_b", "t_ab")),
                      f"{row['waited_percent']:.0f}", f"{row['efficiency']:.2f}")  # fmt: skip
        assert 0 <= row["waited_percent"] <= 100
    Console(width=120, stderr=True).print("\n", table)
