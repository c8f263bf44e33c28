"""What an update costs when half of the groups have no spread, against one in which all have: `pytest bench/`."""

from dataclasses import replace
from time import perf_counter

import pytest
import torch

from mteditflow.config import Config
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.rollout import sample_rollout
from mteditflow.update import update

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_groups_without_spread(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The default's groups, half as many; gradients first: the dropped groups add nothing to them."""
    config = Config()
    config = replace(
        config,
        rollout=replace(config.rollout, num_tasks=4),
        data=replace(config.data, num_turns=1),
        objective=replace(config.objective, name=name),
    )
    objective = build_objective(config)
    policy = build_policy(config.model, config.lora, 0, has_old=objective.has_old)
    tasks = training_tasks(config, 0, RANKS)
    rollout = sample_rollout(policy, objective, tasks, config, 0)
    optimizer = torch.optim.SGD([parameter for _, parameter in policy.adapters.trainable], lr=1e-12)
    full = torch.linspace(-1, 1, len(rollout.group))[:, None]
    half = full * (rollout.group % 2 == 0)[:, None]

    def seconds(advantage: torch.Tensor) -> tuple[float, float]:
        start = perf_counter()
        figures = update(policy, optimizer, objective, rollout, advantage, config, RANKS)
        return perf_counter() - start, figures["update/grad_norm"]

    seconds(full)
    nearly = torch.where(half == 0, 1e-30, half)  # all rows run, with the gradient of half of them
    assert abs(seconds(nearly)[1] / seconds(half)[1] - 1) < 1e-4  # float32 sums in another order
    rounds = [(seconds(full)[0], seconds(half)[0]) for _ in range(5)]
    own = [sorted(column)[2] for column in zip(*rounds, strict=True)]
    with capsys.disabled():
        print(f"\n{name} update, half of the groups without spread: {own[1]:.2f} s of {own[0]:.2f} s", end="")
        print(f" = {own[1] / own[0]:.0%} (median of 5, interleaved; goal 60 %)")
