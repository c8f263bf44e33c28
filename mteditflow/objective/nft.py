"""DiffusionNFT (arXiv 2509.16117): the rollout's final latents are noised again, and the velocity is fitted to the good
ones and away from the bad ones, relative to the old adapter that made the rollout. No log-prob, so the rollout may be
an ODE.
"""

from mteditflow_kernels import nft_loss, noised
from torch import Tensor

from mteditflow.advantage import nft_probability
from mteditflow.config import ObjectiveConfig

__all__ = ["loss", "noised", "old_decay"]


def loss(
    velocity: Tensor,
    old_velocity: Tensor,
    clean_latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    config: ObjectiveConfig,
    ref_velocity: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (0-d) and diagnostics (0-d, detached) of B noised edits.

    Velocities (B, L, C) at noised(clean_latents, noise, sigma), by the trained adapter, the old one and (needed if
    kl_beta > 0) none; `clean_latents` (B, L, C) are the edits, the last latents of their turns; sigma, advantage (B,);
    `weight` (B,), default 1/B.
    """
    return nft_loss(
        velocity,
        old_velocity,
        clean_latents,
        noise,
        sigma,
        nft_probability(advantage, config.max_advantage, config.nft_advantage),
        beta=config.nft_beta,
        kl_beta=config.kl_beta,
        ref_velocity=ref_velocity,
        max_advantage=config.max_advantage,
        weight=weight,
    )


def old_decay(num_updates: int, schedule: str) -> float:
    """d in old <- d old + (1 - d) new after an iteration, from the number of optimizer steps made so far."""
    match schedule:
        case "on_policy":
            return 0.0
        case "ramp":
            return min(0.001 * num_updates, 0.5)
        case "late_ramp":
            return min(0.0075 * max(num_updates - 75, 0), 0.999)
        case _:
            raise ValueError(f"nft_old_decay is {schedule!r}: must be 'on_policy', 'ramp' or 'late_ramp'")
