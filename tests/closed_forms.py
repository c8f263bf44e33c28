"""The losses' gradients after velocity written out, in float64: what autograd and the kernels are compared with.

All latents and velocities (B, ...), the rest (B,); `weight` is what a row counts in the loss.
"""

import torch
from mteditflow_kernels import C_V, C_X, STD
from torch import Tensor


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.double().reshape(-1, *[1] * (like.ndim - 1))


def grpo_gradient(
    *,
    velocity: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    ref_velocity: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    kl_scale: Tensor | float,
    clip_range: float,
    kl_beta: float,
) -> tuple[Tensor, Tensor]:
    """weight [-A ratio active c_v (next - mean) / (s^2 D) + kl_beta kl_scale c_v (mean - mean_ref) / (s^2 D)], and
    which rows are clipped; `coefficients` (B, 7) are rows of the table, `kl_scale` is 1 for the exact penalty and
    |dt| for the published one.
    """
    velocity, latents, next_latents, ref_velocity, ratio, advantage, weight = (
        each.double() for each in (velocity, latents, next_latents, ref_velocity, ratio, advantage, weight)
    )
    c_x, c_v, std = (_column(coefficients[:, i], latents) for i in (C_X, C_V, STD))
    mean, ref_mean = (c_x * latents + c_v * v for v in (velocity, ref_velocity))
    is_clipped = ((advantage > 0) & (ratio > 1 + clip_range)) | ((advantage < 0) & (ratio < 1 - clip_range))
    policy = _column(-advantage * ratio * ~is_clipped, latents) * (next_latents - mean)
    kl = kl_beta * _column(torch.as_tensor(kl_scale).expand(len(ratio)), latents) * (mean - ref_mean)
    return _column(weight, latents) * c_v * (policy + kl) / (std**2 * latents[0].numel()), is_clipped


def nft(
    *,
    velocity: Tensor,
    old_velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    ref_velocity: Tensor,
    sigma: Tensor,
    probability: Tensor,
    weight: Tensor,
    beta: float,
    kl_beta: float,
    max_advantage: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy term A_max (r L+ + (1 - r) L-) / beta and penalty of each row, (B,), and the gradient
    weight {A_max (2 t / D) [-r d+ / w+ + (1 - r) d- / w-] + 2 kl_beta (v - v_ref) / D}, d+- = x+- - x0.
    """
    velocity, old, clean, noise, ref_velocity, probability = (
        each.double() for each in (velocity, old_velocity, clean, noise, ref_velocity, probability)
    )
    t, r = _column(sigma, clean), _column(probability, clean)
    latents = (1 - t) * clean + t * noise
    implicit = (beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity)
    errors = [latents - t * v - clean for v in implicit]
    scales = [error.abs().flatten(1).mean(1) for error in errors]
    positive, negative = (error / _column(scale, clean) for error, scale in zip(errors, scales, strict=True))
    policy_grad = max_advantage * 2 * t * (-r * positive + (1 - r) * negative)
    kl_grad = 2 * kl_beta * (velocity - ref_velocity)
    good, bad = (error.square().flatten(1).mean(1) / scale for error, scale in zip(errors, scales, strict=True))  # (B,)
    policy = max_advantage * (probability * good + (1 - probability) * bad) / beta
    kl = (velocity - ref_velocity).square().flatten(1).mean(1)
    return policy, kl, _column(weight, clean) * (policy_grad + kl_grad) / clean[0].numel()
