"""Tasks with pictures of several sizes, and a judge that looks at any."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rollouts import GivenRewards
from torch.nn.functional import interpolate

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.evaluate.edival import Evaluation
from mteditflow.evaluate.held_out import evaluate
from mteditflow.policy import Policy
from mteditflow.reward.overlap import Overlap
from mteditflow.types import EditTask, Rollout, Scores

SQUARE, WIDE, TALL = (64, 64), (48, 80), (80, 48)  # height and width; wide and tall have as many tokens


def of_sizes(tasks: list[EditTask], sizes: list[tuple[int, int]]) -> list[EditTask]:
    """The tasks with pictures of these sizes."""
    sources = [interpolate(task.source[None], size)[0] for task, size in zip(tasks, sizes, strict=True)]
    return [replace(task, source=source, truth=None) for task, source in zip(tasks, sources, strict=True)]


def redness(rollout: Rollout) -> Scores:
    """A judge that looks at each picture."""
    means = (rollout.pictures[:, :, 0].flatten(2).mean(2).T / 2 + 0.5).clamp(0, 1)  # (N, K)
    ids = [rollout.tasks[g].id for g in rollout.group.tolist()]
    words = tuple(f"of {number}" for number in ids)
    rewards, weights = {"instruction": means, "consistency": means}, {"instruction": 1.0, "consistency": 0.1}
    return Scores(rewards=rewards, weights=weights, valid=torch.ones(len(ids)).bool(), words=words)


def evaluated(
    policy: Policy, config: Config, tasks: list[EditTask], ranks: Ranks, see: Callable[[Any], None] | None = None
) -> Evaluation:
    with Overlap(GivenRewards(redness), config.reward, ranks.device) as judge:  # pyright: ignore[reportArgumentType]
        return evaluate(policy, tasks, config, "ema", ranks, judge, see=see)
