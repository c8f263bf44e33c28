"""GRPO on the log-prob of noisy denoising steps (Flow-GRPO, arXiv 2505.05470).

    ratio = exp(log_prob - old_log_prob)
    loss  = mean max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)) + kl_beta kl

as `mteditflow_kernels.reference.grpo_loss` computes it, forward and backward in one kernel. The rollout is made by the
trained adapter itself, on noisy steps; what is trained are the steps of a window. GRPO-Guard (arXiv 2510.22319) makes
the ratio alike at all steps, and divides the policy term by -dt.
"""

from collections.abc import Sequence

import torch
from mteditflow_kernels import C_V, C_X, STD, counter_normal, grpo_loss
from torch import Tensor

from mteditflow.config import Config, ObjectiveConfig
from mteditflow.flow import Schedule, make_schedule, noisy_steps, window_steps
from mteditflow.noise import Place
from mteditflow.policy import AdapterName, Policy
from mteditflow.types import Microbatch, Rollout, Transitions


class Grpo:
    """See `mteditflow.objective.Objective`."""

    rollout_adapter: AdapterName = "current"
    has_old = False
    blurs_distilled = False
    figures: tuple[str, ...] = ("ratio_mean", "clip_fraction", "approx_kl", "kl", "policy_loss")
    worst_figures: tuple[str, ...] = ("ratio_error", "first_ratio_error", "log_prob_difference")

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.objective
        if config.rollout.solver != "euler":
            raise ValueError(
                f"rollout.solver is {config.rollout.solver!r}: objective 'grpo' takes Euler steps, whose noise has a "
                f"log-prob: must be 'euler'"
            )

    @property
    def num_draws(self) -> int:
        """The window's steps, or all but the last."""
        return self.config.rollout.window_size or self.config.rollout.num_steps - 1

    @property
    def num_forwards(self) -> int:
        """Of the trained adapter, and of the reference."""
        return 1 + (self.settings.kl_beta > 0)

    def schedule(self, sigmas: Tensor, iteration: int) -> Schedule:
        """Noisy steps in the window of the iteration, ODE steps outside."""
        r, at = self.config.rollout, (iteration, self.config.run.num_iterations, self.config.run.seed)
        trained = window_steps(r.num_steps, r.window_size, r.window_placement, *at, r.window_range, r.iters_per_window)
        noisy = noisy_steps(r.num_steps, r.window_size, trained, r.last_step)
        return make_schedule(sigmas, noise_level=r.noise_level, rule=r.rule, noisy_steps=noisy, trained_steps=trained)

    def draws(self, schedule: Schedule) -> Sequence[int]:
        """The trained denoising steps."""
        return schedule.trained_steps

    def loss(
        self, policy: Policy, rollout: Rollout, advantages: Tensor, microbatch: Microbatch, *, is_first_update: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped loss, with forward passes of the trained adapter and, if kl_beta > 0, of the reference."""
        t, table = transitions(rollout, advantages, microbatch), rollout.schedule.table
        reference, old = None, None
        if self.settings.ratio == "guard":
            keys = rollout.keys(turn=microbatch.turn, place=Place.DENOISING_STEP, number=microbatch.draw)
            old = old_velocity(t, table, keys[microbatch.rows].to(table.device)).to(t.latents.dtype)
        if self.settings.kl_beta > 0:
            with torch.no_grad(), policy.adapters.use("off"):
                reference = policy.velocity(t.latents, t.sigma, t.condition)
        velocity = policy.velocity(t.latents, t.sigma, t.condition)
        return clipped_loss(velocity, t, table, self.settings, reference, old, microbatch.weight.to(t.sigma))

    def old_decay(self, num_updates: int) -> float:
        """0: the next rollout is made by the weights as they are."""
        return 0.0


def clipped_loss(
    velocity: Tensor, transitions: Transitions, table: Tensor, config: ObjectiveConfig,
    ref_velocity: Tensor | None = None, old_velocity: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss (0-d) and diagnostics (0-d, detached) of B transitions; the advantage is clamped to +-max_advantage.

    `velocity` (B, L, C) at transitions.latents; `ref_velocity` that of the adapter off, needed if kl_beta > 0;
    `old_velocity` that of the rollout, given if and only if the ratio is GRPO-Guard's; `table` (S, 7); `weight` (B,) of
    each row, default 1/B: microbatches with weight 1/B_total add up to the minibatch.
    """
    advantage = transitions.advantage.clamp(-config.max_advantage, config.max_advantage)
    if config.ratio == "guard":  # the policy term is proportional to the advantage
        advantage = advantage / (transitions.sigma - transitions.sigma_next)
    return grpo_loss(
        velocity, transitions.latents, transitions.next_latents, transitions.old_log_prob, advantage, table,
        transitions.step, clip_range=config.clip_range, kl_beta=config.kl_beta, ref_velocity=ref_velocity,
        kl_form=config.kl_form, old_velocity=old_velocity, weight=weight,
    )  # fmt: skip


def transitions(rollout: Rollout, advantages: Tensor, microbatch: Microbatch) -> Transitions:
    """The denoising steps of a microbatch; `advantages` (N, K)."""
    turn, device, step = rollout.turns[microbatch.turn], rollout.schedule.table.device, microbatch.draw
    rows, sigmas = microbatch.rows.to(device), rollout.schedule.sigmas
    return Transitions(
        condition=turn.condition.rows(rows), step=torch.full_like(rows, step),
        latents=turn.latents[step, rows], next_latents=turn.latents[step + 1, rows],
        sigma=sigmas[step].expand(len(rows)), sigma_next=sigmas[step + 1].expand(len(rows)),
        old_log_prob=turn.old_log_prob[step, rows],
        advantage=advantages[microbatch.rows, microbatch.turn].to(device),
    )  # fmt: skip


def old_velocity(t: Transitions, table: Tensor, keys: Tensor) -> Tensor:
    """The velocity that moved `latents` to `next_latents` in the rollout: the step undone, its noise counted again."""
    noise = counter_normal(keys, tuple(t.latents.shape[1:]))
    c_x, c_v, std = (table[t.step, column].reshape(-1, 1, 1) for column in (C_X, C_V, STD))
    return (t.next_latents - std * noise - c_x * t.latents) / c_v
