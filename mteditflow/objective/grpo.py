"""GRPO on the log-prob of noisy denoising steps (Flow-GRPO, arXiv 2505.05470).

ratio = exp(log_prob - old_log_prob)
loss  = mean max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)) + kl_beta kl

GRPO-Guard (arXiv 2510.22319) makes the ratio alike at all steps, and divides the policy term by -dt.
"""

from mteditflow_kernels import grpo_loss
from torch import Tensor

from mteditflow.config import ObjectiveConfig
from mteditflow.types import Transitions


def loss(
    velocity: Tensor,
    transitions: Transitions,
    table: Tensor,
    config: ObjectiveConfig,
    ref_velocity: Tensor | None = None,
    old_velocity: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (0-d) and diagnostics (0-d, detached) of B transitions; the advantage is clamped to +-max_advantage.

    `velocity` (B, L, C) at transitions.latents; `ref_velocity` that of the adapter off, needed if kl_beta > 0;
    `old_velocity` that of the rollout, given if and only if the ratio is GRPO-Guard's; `table` (S, 7); `weight` (B,) of
    each row, default 1/B: microbatches with weight 1/B_total add up to the minibatch.
    """
    advantage = transitions.advantage.clamp(-config.max_advantage, config.max_advantage)
    if config.step_weight == "inverse_dt":  # the policy term is proportional to the advantage
        advantage = advantage / (transitions.sigma - transitions.sigma_next)
    return grpo_loss(
        velocity,
        transitions.latents,
        transitions.next_latents,
        transitions.old_log_prob,
        advantage,
        table,
        transitions.step,
        clip_range=config.clip_range,
        kl_beta=config.kl_beta,
        ref_velocity=ref_velocity,
        kl_form=config.kl_form,
        old_velocity=old_velocity,
        weight=weight,
    )
