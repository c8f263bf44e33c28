"""A whole iteration at FLUX.1-Kontext-dev's true shape with random weights, 512 px: one group of 16, K = 3, 12 steps of
which 2 are trained, GRPO. Seconds by phase, turn-images per second, the ratio before the first update, and the peak of
memory beside what the dry run says of the same config. A kind of iteration is a line of ITERATIONS.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import measure
import pytest
import torch

from mteditflow.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from mteditflow.objective import build_objective
from mteditflow.plan.duration import batch_plan
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.policy.published import RANDOM
from mteditflow.profile.account import Account
from mteditflow.profile.command import Case, build_case
from mteditflow.rollout import sample_rollout
from mteditflow.transformer.compiled import count_graphs
from mteditflow.update import update


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """Settings of the model, and the goals of the figures on one H200."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    goals: Mapping[str, measure.Goal]


def goals(turn_images_per_second: float, total_s: float) -> dict[str, measure.Goal]:
    return {
        "speed/rollout_images_per_second": measure.Goal(value=turn_images_per_second, is_least=True),
        "total_s": measure.Goal(value=total_s),
        "ratio_error": measure.Goal(value=0.0),
        "outside_percent": measure.Goal(value=5.0),
    }


ITERATIONS = [
    Iteration(name="bfloat16", goals=goals(1.35, 52)),
    Iteration(name="float8", model={"base": "float8"}, goals=goals(2.0, 36)),
]
TRUE = Config(
    model=ModelConfig(path=RANDOM, height=512, width=512, max_text_tokens=512, base="bfloat16"),
    lora=LoraConfig(rank=64, alpha=128, targets=()),
    data=DataConfig(num_turns=3),
    rollout=RolloutConfig(num_tasks=1, group_size=16, num_steps=12, window_size=2),
    objective=ObjectiveConfig(name="grpo", clip_range=1e-5),
    optimizer=OptimizerConfig(num_updates=1),
)
SMALL = replace(  # the miniature
    TRUE,
    model=ModelConfig(),
    lora=LoraConfig(rank=2, alpha=4),
    rollout=replace(TRUE.rollout, group_size=2, num_steps=3),
)


def with_rows(config: Config, rows: int) -> Config:
    """`rows` in a microbatch of rollout and update alike, as a ratio of exactly 1 needs."""
    return replace(
        config,
        rollout=replace(config.rollout, microbatch_size=rows),
        optimizer=replace(config.optimizer, microbatch_size=rows),
    )


def planned_gib(config: Config) -> float:
    """What the dry run says that the iteration takes."""
    return sum(memory_plan(config, read_sizes(config)).values())


def fitting(config: Config, gib: float) -> Config:
    """The config with the largest microbatch that fits by the dry run, its margin included; a row where none does."""
    sizes = (rows for rows in (8, 4, 2) if planned_gib(with_rows(config, rows)) <= gib)
    return with_rows(config, next(sizes, 1))


def run_once(case: Case) -> dict[str, float]:
    """A rollout and an update with an advantage for every row; gives the figures of the update."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in case.policy.adapters.trainable], lr=1e-9)
    made = sample_rollout(case.policy, case.objective, case.tasks, case.config, 0)
    sign = 1.0 - 2.0 * (torch.arange(len(made.group)) % 2)
    advantages = sign[:, None].repeat(1, len(made.turns))
    return update(case.policy, optimizer, case.objective, made, advantages, case.config, case.ranks)


def shortened(config: Config) -> Config:
    """Two steps of one turn, in the same microbatches: what compiles and chooses products."""
    group = min(2 * config.rollout.microbatch_size, config.rollout.group_size)
    return replace(
        config,
        rollout=replace(config.rollout, num_steps=2, window_size=1, group_size=group),
        data=replace(config.data, num_turns=1),
    )


def time_iteration(iteration: Iteration, config: Config) -> dict[str, Any]:
    """The row of an iteration, after a short one to warm up: its account as a run has it (profile/account.py)."""
    is_cuda = torch.cuda.is_available()
    config = replace(config, model=replace(config.model, **iteration.model))
    if is_cuda:
        config = fitting(config, torch.cuda.mem_get_info()[0] / 2**30)
        torch.cuda.reset_peak_memory_stats()
    case, start = build_case(config), time.perf_counter()
    short = shortened(config)
    run_once(replace(case, config=short, objective=build_objective(short)))
    warm_up_s = time.perf_counter() - start
    with Account(config, case.policy, 1) as account:
        figures = run_once(case)
        found = account.read(batch_plan(config).transitions)
    total = sum(value for name, value in found.items() if name.startswith("time/"))
    in_transformer = found["time/denoise_s"] + found["time/forward_backward_s"]
    return found | {
        "iteration": iteration.name, "base": config.model.base, "attention": case.policy.attention,
        "is_compiled": case.policy.is_compiled, "settled": case.settled, "num_graphs": count_graphs()[0],
        "warm_up_s": warm_up_s, "microbatch": config.rollout.microbatch_size, "total_s": total,
        "outside_percent": 100 * (1 - in_transformer / total), "ratio_error": figures["update/first_ratio_error"],
        "planned_gib": planned_gib(config),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        "clocks": measure.clocks(case.policy.device),
    }  # fmt: skip


@pytest.mark.parametrize("iteration", ITERATIONS, ids=lambda iteration: iteration.name)
def test_iteration(iteration: Iteration, record: measure.Record) -> None:
    row = time_iteration(iteration, TRUE if torch.cuda.is_available() else SMALL)
    record.add("iterations", row, iteration.goals)
    assert row["ratio_error"] == 0
    assert row["peak_gib"] is None or row["peak_gib"] <= row["planned_gib"]
