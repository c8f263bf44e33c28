"""What is learned from a rollout: one file per objective, one Protocol that the rest of the trainer sees."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mteditflow.config import Config
from mteditflow.flow import Schedule
from mteditflow.objective.grpo import Grpo
from mteditflow.objective.nft import Nft
from mteditflow.policy import AdapterName, Policy
from mteditflow.types import Microbatch, Rollout

__all__ = ["Grpo", "Nft", "Objective", "build_objective"]


class Objective(Protocol):
    """How an iteration rolls out, what it draws from the rollout, and the loss on it."""

    rollout_adapter: AdapterName
    """The old policy: the weights that make the rollout."""
    has_old: bool
    """Whether the old policy is an adapter of its own, `old`, which follows `current` after every iteration."""
    blurs_distilled: bool
    """Whether models that are distilled to few steps get worse by it."""
    figures: tuple[str, ...]
    """Names of the diagnostics of `loss`: of microbatches the mean is reported."""
    worst_figures: tuple[str, ...]
    """Those of which the largest is reported instead."""

    @property
    def num_draws(self) -> int:
        """Transitions that are trained per turn and trajectory."""
        ...

    @property
    def num_forwards(self) -> int:
        """Forward passes for each of them."""
        ...

    def schedule(self, sigmas: Tensor, iteration: int) -> Schedule:
        """The denoising steps of the iteration's rollout, on the model's noise levels (S+1,)."""
        ...

    def draws(self, schedule: Schedule) -> Sequence[int]:
        """Numbers of the draws: denoising steps of the schedule, or 0, 1, ..."""
        ...

    def loss(
        self, policy: Policy, rollout: Rollout, advantages: Tensor, microbatch: Microbatch, *, is_first_update: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (0-d) and diagnostics (0-d, detached) of a microbatch.

        `advantages` (N, K); is_first_update: no optimizer step was made since the rollout.
        """
        ...

    def old_decay(self, num_updates: int) -> float:
        """d in old <- d old + (1 - d) current after an iteration, from the number of optimizer steps made so far."""
        ...


def build_objective(config: Config) -> Objective:
    """The objective that `config.objective.name` names. ValueError for a setting that it cannot have."""
    match config.objective.name:
        case "grpo":
            return Grpo(config)
        case "nft":
            return Nft(config)
