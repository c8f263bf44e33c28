"""DiffusionNFT (arXiv 2509.16117): the rollout's final latents are noised again, and the velocity is fitted to the good
ones and away from the bad ones, relative to the old adapter that made the rollout.

    r      = clamp(A, +-A_max) / A_max / 2 + 1/2
    v+     = beta v + (1 - beta) v_old,   v- = (1 + beta) v_old - beta v,   xh+- = xt - t v+-
    L+-    = mean (xh+- - x0)^2 / max(mean |xh+- - x0|, 1e-5)
    loss   = A_max mean (r L+ + (1 - r) L-) / beta + kl_beta mean (v - v_ref)^2

as `mteditflow_kernels.reference.nft_loss` computes it. No log-prob, so the rollout is an ODE, by any
solver.
"""

from collections.abc import Sequence

import torch
from mteditflow_kernels import counter_normal, counter_uniform, nft_loss, noised
from torch import Tensor

from mteditflow.config import Config, ObjectiveConfig
from mteditflow.flow import Schedule, make_schedule
from mteditflow.noise import Place
from mteditflow.policy import AdapterName, Policy
from mteditflow.types import Microbatch, Rollout


class Nft:
    """See `mteditflow.objective.Objective`."""

    rollout_adapter: AdapterName = "old"
    has_old = True
    blurs_distilled = True
    figures: tuple[str, ...] = ("policy_loss", "kl")
    worst_figures: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.objective
        if self.settings.nft_num_times > config.rollout.num_steps:
            raise ValueError(
                f"objective.nft_num_times is {self.settings.nft_num_times}: must be at most rollout.num_steps = "
                f"{config.rollout.num_steps}"
            )

    @property
    def num_draws(self) -> int:
        """Training times per edit."""
        return self.settings.nft_num_times

    @property
    def num_forwards(self) -> int:
        """Of the trained adapter, of the old one where it may differ, and of the reference."""
        is_old_known = self.settings.nft_old_decay == "on_policy" and self.config.optimizer.num_updates == 1
        return (1 if is_old_known else 2) + (self.settings.kl_beta > 0)

    def schedule(self, sigmas: Tensor, iteration: int) -> Schedule:
        """The ODE's, the same in every iteration."""
        return make_schedule(sigmas, is_second_order=self.config.rollout.solver == "dpm2")

    def draws(self, schedule: Schedule) -> Sequence[int]:
        """Numbers of the training times."""
        return range(self.num_draws)

    def loss(
        self, policy: Policy, rollout: Rollout, advantages: Tensor, microbatch: Microbatch, *, is_first_update: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The turn's clean latents, noised to sigmas drawn per row, without replacement over the draws.

        Where the trained adapter still is the old one, one forward pass gives both velocities.
        """
        turn, rows = rollout.turns[microbatch.turn], microbatch.rows.to(rollout.schedule.table.device)
        sigmas = rollout.schedule.sigmas

        def keys(place: Place, number: int = 0) -> Tensor:
            return rollout.keys(turn=microbatch.turn, place=place, number=number)[microbatch.rows].to(rows.device)

        order = counter_uniform(keys(Place.NFT_TIMES), len(sigmas) - 1).argsort(dim=1)  # the steps, permuted per row
        sigma = sigmas[order[:, microbatch.draw]]
        clean, condition = turn.latents[-1, rows], turn.condition.rows(rows)
        fresh = counter_normal(keys(Place.NFT_NOISE, microbatch.draw), tuple(clean.shape[1:])).to(clean)
        latents = noised(clean, fresh, sigma)
        velocity = policy.velocity(latents, sigma, condition)
        old_velocity, reference = velocity.detach(), None
        with torch.no_grad():
            if not (is_first_update and self.settings.nft_old_decay == "on_policy"):
                with policy.adapters.use("old"):
                    old_velocity = policy.velocity(latents, sigma, condition)
            if self.settings.kl_beta > 0:
                with policy.adapters.use("off"):
                    reference = policy.velocity(latents, sigma, condition)
        advantage = advantages[microbatch.rows, microbatch.turn].to(clean.device)
        weight = microbatch.weight.to(sigma)
        return contrastive_loss(
            velocity, old_velocity, clean, fresh, sigma, advantage, self.settings, reference, weight
        )

    def old_decay(self, num_updates: int) -> float:
        """d in old <- d old + (1 - d) current: 0, or rising with the number of optimizer steps."""
        match self.settings.nft_old_decay:
            case "on_policy":
                return 0.0
            case "ramp":
                return min(0.001 * num_updates, 0.5)
            case "late_ramp":
                return min(0.0075 * max(num_updates - 75, 0), 0.999)


def optimality(advantage: Tensor, max_advantage: float) -> Tensor:
    """r in [0, 1] from the advantage: clamp(A, +-A_max) / A_max / 2 + 1/2, of the same shape."""
    return (advantage.clamp(-max_advantage, max_advantage) / max_advantage / 2 + 0.5).clamp(0, 1)


def contrastive_loss(
    velocity: Tensor, old_velocity: Tensor, clean_latents: Tensor, noise: Tensor, sigma: Tensor, advantage: Tensor,
    config: ObjectiveConfig, ref_velocity: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss (0-d) and diagnostics (0-d, detached) of B noised edits.

    Velocities (B, L, C) at noised(clean_latents, noise, sigma), by the trained adapter, the old one and (needed if
    kl_beta > 0) none; `clean_latents` (B, L, C) are the edits, the last latents of their turns; sigma, advantage (B,);
    `weight` (B,), default 1/B.
    """
    probability = optimality(advantage, config.max_advantage)
    return nft_loss(
        velocity, old_velocity, clean_latents, noise, sigma, probability, beta=config.nft_beta, kl_beta=config.kl_beta,
        ref_velocity=ref_velocity, max_advantage=config.max_advantage, weight=weight,
    )  # fmt: skip
