"""The definition of every op, eagerly, in torch only: what the Triton files are tested against.

Equations run in float32; bfloat16 and float16 inputs are cast up, float64 inputs stay float64. Latents have any shape
(B, ...), D elements per row. A denoising step is a row of a coefficient table (S, NUM_COLUMNS), which the caller
computes in float64:

    mean     = c_x x + c_v v
    next     = mean + std eps
    log_prob = const - scale mean_d (next - mean)^2        the mean over elements, not the sum: Flow-GRPO's convention
    kl       = coefficient mean_d (mean - mean_ref)^2

A step is an ODE step if and only if its std is 0; then it has no log-prob (NaN).

Sums over elements follow a fixed tree (`row_mean`), because torch's own order depends on the number of rows and
threads, and a ratio of exactly 1 before the first update needs the same bits for a row in every batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mteditflow_kernels.philox import counter_normal

C_X, C_V, STD, LOG_PROB_SCALE, LOG_PROB_CONST, KL_PUBLISHED, KL_EXACT = range(7)
NUM_COLUMNS = 7
GRPO_FIGURES = ("ratio_mean", "ratio_error", "clip_fraction", "approx_kl", "kl", "policy_loss", "log_prob_difference")
NFT_FIGURES = ("policy_loss", "kl")
E4M3_MAX, SMALLEST_AMAX = 448.0, 1e-12
RopePart = tuple[Tensor, Tensor, Tensor]


class _RowMean(torch.autograd.Function):
    """Mean over the columns of (B, D) by halving, left half plus right half: the same tree for every row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        num_elements = values.shape[1]
        ctx.num_elements = num_elements
        width = 1 << (num_elements - 1).bit_length()
        values = torch.nn.functional.pad(values, (0, width - num_elements))
        while width > 1:
            width //= 2
            values = values[:, :width] + values[:, width:]
        return values[:, 0] / num_elements

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (grad,) = grad_outputs
        return (grad / ctx.num_elements)[:, None].expand(-1, ctx.num_elements)


def row_mean(values: Tensor) -> Tensor:
    """Average all but the first dimension, (B, ...) -> (B,), in an order of summation that depends on D alone."""
    mean = _RowMean.apply(values.flatten(1))
    assert isinstance(mean, Tensor)
    return mean


def _upcast(*tensors: Tensor) -> list[Tensor]:
    """Cast the tensors to their common dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1), to go with the rows of `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _coefficients(table: Tensor, step: Tensor | int, like: Tensor) -> Tensor:
    """Look up (B, NUM_COLUMNS) in the dtype of `like` (B, ...); `step` (B,) int64, or one for all rows."""
    return table[step].to(like.dtype).expand(len(like), -1)


def _mean(velocity: Tensor, latents: Tensor, coefficients: Tensor) -> Tensor:
    return _column(coefficients[:, C_X], latents) * latents + _column(coefficients[:, C_V], latents) * velocity


def _weighted_sum(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Sum weight_b rows_b over b; without weights take the mean."""
    return rows.mean() if weight is None else (rows * weight).sum()


def _counted_mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Take the mean over the rows whose weight is not 0, which are those that do not only fill a microbatch."""
    if weight is None:
        return rows.mean()
    is_counted = weight != 0
    return torch.where(is_counted, rows, 0.0).sum() / is_counted.sum().clamp(min=1)


def sde_log_prob(velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor, step: Tensor | int) -> Tensor:
    """Compute the log-prob (B,) of `next_latents` given `latents`, differentiable in velocity; NaN at ODE steps."""
    velocity, latents, next_latents = _upcast(velocity, latents, next_latents)
    coefficients = _coefficients(table, step, latents)
    square = row_mean((next_latents - _mean(velocity, latents, coefficients)).square())  # (B,)
    log_prob = coefficients[:, LOG_PROB_CONST] - coefficients[:, LOG_PROB_SCALE] * square
    return log_prob.masked_fill(coefficients[:, STD] == 0, torch.nan)


def sde_step(
    velocity: Tensor, latents: Tensor, table: Tensor, step: Tensor | int, noise_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make a denoising step: next_latents (B, ...) in the dtype of `latents`, and log_prob (B,) of the stored values.

    `noise_keys` (B, 5) int64 are the keys of `counter_normal`; None draws no noise, which only an ODE step can do
    without. `step` (B,) int64, or one for all rows.
    """
    velocity_, latents_ = _upcast(velocity, latents)
    coefficients = _coefficients(table, step, latents_)
    next_latents = _mean(velocity_, latents_, coefficients)
    if noise_keys is not None:
        noise = counter_normal(noise_keys, tuple(latents.shape[1:])).to(latents_.dtype)
        next_latents = next_latents + _column(coefficients[:, STD], latents) * noise
    next_latents = next_latents.to(latents.dtype)
    return next_latents, sde_log_prob(velocity, latents, next_latents, table, step)


def check_kl(kl_beta: float, ref_velocity: Tensor | None, kl_form: str) -> None:
    """Raise ValueError where the penalty is asked for and cannot be had."""
    if kl_form not in ("published", "exact"):
        raise ValueError(f"kl_form is {kl_form!r}: must be 'published' or 'exact'")
    if kl_beta > 0 and ref_velocity is None:
        raise ValueError(f"kl_beta is {kl_beta}: the penalty needs ref_velocity")


def _log_ratio(
    velocity: Tensor, latents: Tensor, next_latents: Tensor, old_log_prob: Tensor, old_velocity: Tensor | None,
    table: Tensor, step: Tensor | int,
) -> Tensor:  # fmt: skip
    """Compute log_prob - old_log_prob (B,); GRPO-Guard's log ratio where the old velocity is given."""
    log_ratio = sde_log_prob(velocity, latents, next_latents, table, step) - old_log_prob
    if old_velocity is None:
        return log_ratio
    c = _coefficients(table, step, velocity)
    moved = _column(c[:, C_V], latents) * (velocity - old_velocity.to(velocity.dtype))
    return (log_ratio + c[:, LOG_PROB_SCALE] * row_mean(moved.square())) * c[:, STD]


def grpo_loss(
    velocity: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    clip_range: float,
    kl_beta: float = 0.0,
    ref_velocity: Tensor | None = None,
    kl_form: str = "published",
    old_velocity: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-GRPO's objective: sum_b weight_b [max(-A ratio, -A clip(ratio)) + kl_beta kl], weight 1/B by default.

    Latents and velocities (B, ...); old_log_prob, advantage, weight (B,). With `old_velocity`, that of the rollout, the
    ratio is GRPO-Guard's (arXiv 2510.22319), whose log is linear in the velocity and alike in scale at every step:

        exp(std (log_prob - old_log_prob + scale mean_d (mean - mean_old)^2))

    The diagnostics are 0-d, detached, of the rows alike whose weight is not 0: ratio_mean, ratio_error (largest |ratio
    - 1|), clip_fraction, approx_kl, kl, policy_loss, log_prob_difference (largest |log ratio|). An ODE row makes the
    loss NaN.
    """
    check_kl(kl_beta, ref_velocity, kl_form)
    velocity, latents = _upcast(velocity, latents)
    coefficients = _coefficients(table, step, latents)
    log_ratio = _log_ratio(velocity, latents, next_latents, old_log_prob, old_velocity, table, step)
    ratio = torch.exp(log_ratio)  # (B,)
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    kl = torch.zeros_like(ratio)
    if ref_velocity is not None:
        # c_x x is the same in both means: subtracting velocities instead loses no digits
        difference = _column(coefficients[:, C_V], latents) * (velocity - ref_velocity.to(velocity.dtype))
        kl = coefficients[:, KL_EXACT if kl_form == "exact" else KL_PUBLISHED] * row_mean(difference.square())
    loss = _weighted_sum(policy + kl_beta * kl if kl_beta > 0 else policy, weight)
    ratio_error, difference = (ratio.detach() - 1).abs(), log_ratio.detach().abs()
    means = {
        "ratio_mean": ratio,
        "clip_fraction": (ratio_error > clip_range).to(ratio.dtype),
        # the second-order form: ratio - 1 - log ratio cancels to nothing in float32 at log ratios of 1e-4
        "approx_kl": 0.5 * log_ratio.square(),
        "kl": kl,
        "policy_loss": policy,
    }
    diagnostics = {name: _counted_mean(rows.detach(), weight) for name, rows in means.items()}
    if weight is not None:
        ratio_error, difference = (rows.masked_fill(weight == 0, 0.0) for rows in (ratio_error, difference))
    return loss, diagnostics | {"ratio_error": ratio_error.max(), "log_prob_difference": difference.max()}


def noised(clean_latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mix (1 - sigma) x0 + sigma eps, (B, ...), float32 or float64; `sigma` (B,)."""
    clean_latents, noise, sigma = _upcast(clean_latents, noise, sigma)
    level = _column(sigma, clean_latents)
    return (1 - level) * clean_latents + level * noise


def _nft_errors(
    velocity: Tensor, old_velocity: Tensor, clean_latents: Tensor, noise: Tensor, sigma: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Compute xt - t v+- - x0, (B, ...): how far x0 of the implicit good and bad policies is from the true one."""
    latents = noised(clean_latents, noise, sigma).to(velocity.dtype)
    old_velocity, level = old_velocity.to(velocity.dtype), _column(sigma.to(velocity.dtype), latents)
    positive = latents - level * (beta * velocity + (1 - beta) * old_velocity) - clean_latents
    negative = latents - level * ((1 + beta) * old_velocity - beta * velocity) - clean_latents
    return positive, negative


def _nft_scale(error: Tensor) -> Tensor:
    """Compute w (B,) = max(mean_d |error|, 1e-5), held constant."""
    return row_mean(error.detach().abs()).clamp(min=1e-5)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    clean_latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    reward_probability: Tensor,
    *,
    beta: float,
    kl_beta: float = 0.0,
    ref_velocity: Tensor | None = None,
    max_advantage: float = 5.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DiffusionNFT: sum_b weight_b [A_max (r L+ + (1 - r) L-) / beta + kl_beta mean_d (v - v_ref)^2].

    v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v are the implicit good and bad policies. Latents,
    noise and velocities (B, ...); sigma, reward_probability r and weight (B,), which is 1/B by default. The diagnostics
    policy_loss and kl are 0-d, detached, of the rows alike whose weight is not 0.
    """
    check_kl(kl_beta, ref_velocity, "published")
    velocity, clean_latents = _upcast(velocity, clean_latents)
    errors = _nft_errors(velocity, old_velocity.detach(), clean_latents, noise, sigma, beta)
    positive, negative = (row_mean(error.square()) / _nft_scale(error) for error in errors)
    policy = max_advantage * (reward_probability * positive + (1 - reward_probability) * negative) / beta  # (B,)
    kl = torch.zeros_like(policy)
    if ref_velocity is not None:
        kl = row_mean((velocity - ref_velocity.to(velocity.dtype)).square())
    loss = _weighted_sum(policy + kl_beta * kl if kl_beta > 0 else policy, weight)
    return loss, {"policy_loss": _counted_mean(policy.detach(), weight), "kl": _counted_mean(kl.detach(), weight)}


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of x (..., K) to 8 bits: q (..., K) float8_e4m3fn and scale (..., 1) float32, x = q scale.

    The scale max(max |x|, 1e-12) / 448 is a function of the row alone: its largest element becomes 448, the largest
    number of the format. A maximum rounds nothing, so no bit depends on the order in which it is taken. A product with
    the inverse takes one division a row, where a quotient takes one an element.
    """
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST_AMAX)
    # On a GPU torch multiplies by the inverse of a number, and divides by a tensor.
    scale = largest / torch.full_like(largest, E4M3_MAX)
    return (x.float() * (largest.reciprocal() * E4M3_MAX)).to(torch.float8_e4m3fn), scale


def norm_rope(parts: Sequence[RopePart], eps: float) -> Tensor:
    """Normalise the heads of queries or keys and turn them by their places: (B, S, H, D), the parts' tokens in a row.

        n = x rsqrt(mean_d x^2 + eps) weight
        y_2i = n_2i cos_i - n_2i+1 sin_i    y_2i+1 = n_2i+1 cos_i + n_2i sin_i

    A part is x (B, s, H, D), weight (D,) and angles (s, D) float32: cos_0, sin_0, cos_1, sin_1 and so on. In float32
    these are the bits of diffusers, FLUX's and Qwen's; in bfloat16 they round once, where those do two or three times.
    """
    turned = []
    for x, weight, angles in parts:
        (value,) = _upcast(x)
        normal = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps) * weight.to(value.dtype)
        even, odd = normal.unflatten(-1, (-1, 2)).unbind(-1)  # (B, s, H, D / 2)
        cosine, sine = angles.unsqueeze(1).unflatten(-1, (-1, 2)).unbind(-1)  # (s, 1, D / 2)
        pair = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
        turned.append(pair.flatten(-2).to(x.dtype))
    return torch.cat(turned, dim=1)


def norm_turn(x: Tensor, weight: Tensor, angles: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Normalise heads x (B, H, D) and turn them by angles cos, sin (B, D), whose second half repeats the first.

    n = x rsqrt(mean_d x^2 + eps) weight        y = n cos + (-n_2, n_1) sin,  n_1 and n_2 the halves of n
    """
    value, cosine, sine = _upcast(x, *(angle.unsqueeze(1) for angle in angles))
    normal = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps) * weight.to(value.dtype)
    first, second = normal.chunk(2, -1)
    return (normal * cosine + torch.cat([-second, first], -1) * sine).to(x.dtype)


def attend_cache(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    weights: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor], eps: float,
) -> Tensor:  # fmt: skip
    """Attend from one new token a row to those before it and itself: (B, H, D). Key and value are written at `places`.

    query (B, H, D), key and value (B, h, D) are as projected: queries and keys go through `norm_turn` here, with
    `weights` (D,) of their own and the row's angles cos, sin (B, D).
    keys and values (B, h, L, D) hold places 0 to places[b] - 1 of row b, places (B,) int64 below L. H / h queries share
    a key.
    """
    rows = torch.arange(len(key), device=key.device)
    keys[rows, :, places] = norm_turn(key, weights[1], angles, eps)
    values[rows, :, places] = value
    is_read = torch.arange(keys.shape[2], device=key.device) <= places[:, None]  # (B, L)
    grouped = norm_turn(query, weights[0], angles, eps).unflatten(
        1, (key.shape[1], -1)
    )  # (B, h, H / h, D): as if in time
    found = scaled_dot_product_attention(grouped, keys, values, attn_mask=is_read[:, None, None])
    return found.flatten(1, 2)
