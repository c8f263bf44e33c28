"""Policies that have moved, rollouts of them, and updates whose gradients are kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mteditflow.config import (
    Config,
)
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.objective import build_objective
from mteditflow.policy import Policy, build_policy
from mteditflow.rollout import sample_rollout
from mteditflow.types import Condition, Microbatch, Rollout
from mteditflow.update import Microbatches, update

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
# (N, K): every trajectory and turn another one
ADVANTAGE = torch.tensor([[1.0, -0.5], [-1.0, 0.25], [0.5, 2.0], [-0.25, -1.5]])


def change(config: Config, section: str, **values: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def in_chunks(config: Config, size: int) -> Config:
    return change(change(config, "rollout", microbatch_size=size), "optimizer", microbatch_size=size)


def as_nft(config: Config) -> Config:
    return change(config, "objective", name="nft")


def build(config: Config, is_moved: bool = True) -> Policy:
    """A policy whose adapters, if moved, are not the zero that LoRA starts from; all adapters alike."""
    policy = build_policy(config.model, config.lora, seed=0, has_old=build_objective(config).has_old)
    if is_moved:
        generator = torch.Generator().manual_seed(1)
        state = policy.adapters.state("current")
        state = {key: w + 0.1 * torch.randn(w.shape, generator=generator) for key, w in state.items()}
        for name in ("current", "ema", "old") if build_objective(config).has_old else ("current", "ema"):
            policy.adapters.load(name, state)
    return policy


def roll(policy: Policy, config: Config) -> Rollout:
    return sample_rollout(policy, build_objective(config), training_tasks(config, 0, ONE_RANK), config, 0)


def minibatches(rollout: Rollout, advantages: Tensor, objective: Any, config: Config) -> list[list[Microbatch]]:
    """The microbatches of each optimizer step."""
    every = list(Microbatches(rollout, objective, config, ONE_RANK)([advantages]))
    steps = range(config.optimizer.num_updates)
    return [[microbatch for step, microbatch in every if step == number] for number in steps]


class KeepsGradients(torch.optim.SGD):
    """An optimizer that notes the gradients of each step."""

    def __init__(self, policy: Policy, learning_rate: float) -> None:
        super().__init__([parameter for _, parameter in policy.adapters.trainable], lr=learning_rate)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        parameters = self.param_groups[0]["params"]
        self.gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return super().step(closure)


def step(
    policy: Policy, rollout: Rollout, advantage: Tensor, config: Config, learning_rate: float = 1e-3
) -> tuple[dict[str, float], list[Tensor]]:
    """One call of `update` by plain SGD: figures, and the gradient of each step, unscaled by max_grad_norm."""
    config = change(config, "optimizer", max_grad_norm=1e6)
    optimizer = KeepsGradients(policy, learning_rate)
    figures = update(policy, optimizer, build_objective(config), rollout, advantage, config, ONE_RANK)
    assert all(parameter.grad is None for _, parameter in policy.adapters.trainable)
    return figures, optimizer.gradients


@contextmanager
def counted(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The batch size of every call of `policy.velocity`."""
    calls: list[int] = []
    original = policy.velocity

    def velocity(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        calls.append(len(latents))
        return original(latents, sigma, condition)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "velocity", velocity)
        yield calls


def assert_near(actual: Tensor, expected: Tensor, num_roundings: float) -> None:
    """Equal up to so many float32 roundings of the largest element."""
    atol = num_roundings * 2**-24 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_adapter(policy: Policy, before: dict[str, Tensor], name: Any = "current") -> None:
    after = policy.adapters.state(name)
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
