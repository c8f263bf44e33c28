"""What stops a run: a ratio that is not 1, scores that are not there, an adapter that reaches nothing."""

from collections import Counter

import torch

from mteditflow.config import Config
from mteditflow.policy import Policy
from mteditflow.types import FAULTS, Rollout, Scores

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


@torch.no_grad()
def check_adapter(policy: Policy, rollout: Rollout, config: Config) -> None:
    """Stop where the updated adapter leaves the velocity as it was: a LoRA that reaches nothing trains in silence."""
    turn, sigmas = rollout.turns[0], rollout.schedule.sigmas
    num_rows = min(config.rollout.microbatch_size, len(rollout.group))  # compiled already
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
