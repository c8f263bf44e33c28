"""What stops a run: a ratio that is not 1, an adapter that reaches nothing; and scores that are not there (reward)."""

import torch

from mteditflow.config import Config
from mteditflow.policy import Policy
from mteditflow.types import Rollout, Rollouts

MAX_INVALID_SHARE = 0.5  # of trajectories, or of held-out sessions, that may be without a score


class GuardError(RuntimeError):
    """Training must not go on: what a guard found, and the remedy."""


def check_ratio(error: float, config: Config) -> None:
    """The log-prob that training computes has to be the one that the rollout stored, before the first update."""
    if error > config.run.max_ratio_error:
        raise GuardError(
            f"the ratio before the first update is off by {error:.3g}, run.max_ratio_error is "
            f"{config.run.max_ratio_error:g}: rollout.microbatch_size ({config.rollout.microbatch_size}) and "
            f"optimizer.microbatch_size ({config.optimizer.microbatch_size}) must be equal, or the limit higher"
        )


@torch.no_grad()
def check_adapter(policy: Policy, rollout: Rollout | Rollouts, config: Config) -> None:
    """Stop where the updated adapter leaves the velocity as it was: a LoRA that reaches nothing trains in silence."""
    part = rollout.parts[0]
    policy, turn, sigmas = policy.at(part.shape), part.turns[0], part.schedule.sigmas
    num_rows = min(config.rollout.microbatch_size, len(part.group))  # compiled already
    rows = torch.arange(num_rows, device=sigmas.device)
    latents, sigma, condition = turn.latents[0, rows], sigmas[0].expand(len(rows)), turn.condition.rows(rows)
    velocity = policy.velocity(latents, sigma, condition)
    with policy.adapters.use("off"):
        base = policy.velocity(latents, sigma, condition)
    if torch.equal(velocity, base):
        raise GuardError(
            "the adapter does not change the velocity after an update: check lora.targets, and whether "
            "optimizer.learning_rate is too small"
        )
