"""DiffusionNFT: both implicit policies, adaptive weights, KL and diagnostics in one launch; the gradient in another."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels.reference import NFT_FIGURES
from mteditflow_kernels.triton_common import BLOCK, OPTIONS, elements, geometry, is_last, load, ordered_sum, tickets


@triton.jit
def _nft_errors(velocity, old_velocity, clean, noise, sigma, offset, inside, beta):
    """Compute x+ - x0 and x- - x0; returns them and the velocity, all float32, 0 outside the row."""
    v = load(velocity, offset, inside)
    old = load(old_velocity, offset, inside)
    x0 = load(clean, offset, inside)
    xt = (1.0 - sigma) * x0 + sigma * load(noise, offset, inside)
    positive = xt - sigma * (beta * v + (1.0 - beta) * old) - x0
    negative = xt - sigma * ((1.0 + beta) * old - beta * v) - x0
    return positive, negative, v


@triton.jit
def _nft_kernel(
    velocity, old_velocity, clean, noise, ref_velocity, sigmas, probability, weight, loss, rows, figures, partial,
    tickets, beta, kl_beta, max_advantage, num_rows, num_elements, num_blocks, HAS_REF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Take five sums a row; `rows` (4, B) gets policy, kl, w+ and w-, `figures` (2,) policy_loss and kl."""
    block, row = tl.program_id(0), tl.program_id(1)
    offset, inside = elements(num_elements, BLOCK)
    sigma = tl.load(sigmas + row)
    positive, negative, v = _nft_errors(velocity, old_velocity, clean, noise, sigma, offset, inside, beta)
    partials, stride = partial + row * num_blocks, num_rows * num_blocks
    tl.store(partials + block, tl.sum(tl.abs(positive)))
    tl.store(partials + stride + block, tl.sum(tl.abs(negative)))
    tl.store(partials + 2 * stride + block, tl.sum(positive * positive))
    tl.store(partials + 3 * stride + block, tl.sum(negative * negative))
    if HAS_REF:
        difference = v - load(ref_velocity, offset, inside)
        tl.store(partials + 4 * stride + block, tl.sum(difference * difference))
    if is_last(tickets + row, num_blocks):
        scale_positive = tl.maximum(ordered_sum(partials, num_blocks, BLOCKS) / num_elements, 1e-5)
        scale_negative = tl.maximum(ordered_sum(partials + stride, num_blocks, BLOCKS) / num_elements, 1e-5)
        good = ordered_sum(partials + 2 * stride, num_blocks, BLOCKS) / num_elements / scale_positive
        bad = ordered_sum(partials + 3 * stride, num_blocks, BLOCKS) / num_elements / scale_negative
        r = tl.load(probability + row)
        kl = 0.0
        if HAS_REF:
            kl = ordered_sum(partials + 4 * stride, num_blocks, BLOCKS) / num_elements
        tl.store(rows + row, max_advantage * (r * good + (1.0 - r) * bad) / beta)
        tl.store(rows + num_rows + row, kl)
        tl.store(rows + 2 * num_rows + row, scale_positive)
        tl.store(rows + 3 * num_rows + row, scale_negative)
        if is_last(tickets + num_rows, num_rows):
            place = tl.arange(0, ROWS)
            is_row = place < num_rows
            policy = tl.load(rows + place, is_row, other=0.0, cache_modifier=".cg")
            penalty = tl.load(rows + num_rows + place, is_row, other=0.0, cache_modifier=".cg")
            share = tl.full((ROWS,), 1.0, tl.float32) / num_rows
            if HAS_WEIGHT:
                share = tl.load(weight + place, is_row, other=0.0)
            tl.store(loss, tl.sum((policy + kl_beta * penalty) * share))
            is_counted = is_row & (share != 0.0)
            num_counted = tl.maximum(tl.sum(is_counted.to(tl.float32)), 1.0)
            tl.store(figures, tl.sum(tl.where(is_counted, policy, 0.0)) / num_counted)
            tl.store(figures + 1, tl.sum(tl.where(is_counted, penalty, 0.0)) / num_counted)


@triton.jit
def _nft_backward_kernel(
    velocity, old_velocity, clean, noise, ref_velocity, sigmas, probability, weight, grad_loss, grad_velocity, rows,
    beta, kl_beta, max_advantage, num_rows, num_elements, HAS_REF: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(2 / D) weight {A_max t [-r (x+ - x0) / w+ + (1 - r) (x- - x0) / w-] + kl_beta (v - v_ref)}"""
    row = tl.program_id(1)
    offset, inside = elements(num_elements, BLOCK)
    sigma = tl.load(sigmas + row)
    positive, negative, v = _nft_errors(velocity, old_velocity, clean, noise, sigma, offset, inside, beta)
    r = tl.load(probability + row)
    outer = 2.0 * tl.load(grad_loss) / num_elements
    outer = outer * tl.load(weight + row) if HAS_WEIGHT else outer / num_rows
    grad = (1.0 - r) * negative / tl.load(rows + 3 * num_rows + row) - r * positive / tl.load(rows + 2 * num_rows + row)
    grad = outer * max_advantage * sigma * grad
    if HAS_REF:
        grad += outer * kl_beta * (v - load(ref_velocity, offset, inside))
    tl.store(grad_velocity + offset, grad.to(grad_velocity.dtype.element_ty), inside)


Latents = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
Rows = tuple[Tensor, Tensor, Tensor | None]


def forward(
    latents: Latents, rows: Rows, beta: float, kl_beta: float, max_advantage: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, figures (2,) and what the backward pass needs, of (velocity, old_velocity, clean_latents, noise,
    ref_velocity) and (sigma, reward_probability, weight).
    """
    velocity, old_velocity, clean, noise, ref_velocity = latents
    sigma, probability, weight = rows
    num_rows, num_elements, num_blocks = geometry(clean)
    loss, figures = torch.empty((), device=clean.device), torch.empty(len(NFT_FIGURES), device=clean.device)
    sums, partial = (torch.empty(n, device=clean.device) for n in (4 * num_rows, 5 * num_rows * num_blocks))
    _nft_kernel[(num_blocks, num_rows)](
        velocity, old_velocity, clean, noise, velocity if ref_velocity is None else ref_velocity, sigma, probability,
        sigma if weight is None else weight, loss, sums, figures, partial, tickets(num_rows, clean.device), beta,
        kl_beta, max_advantage, num_rows, num_elements, num_blocks, HAS_REF=ref_velocity is not None,
        HAS_WEIGHT=weight is not None, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
        ROWS=triton.next_power_of_2(num_rows), **OPTIONS,
    )  # fmt: skip
    return loss, figures, sums


def backward(
    grad_loss: Tensor, latents: Latents, rows: Rows, sums: Tensor, beta: float, kl_beta: float, max_advantage: float
) -> Tensor:
    """Compute the gradient of `velocity`."""
    velocity, old_velocity, clean, noise, ref_velocity = latents
    sigma, probability, weight = rows
    num_rows, num_elements, num_blocks = geometry(clean)
    grad = torch.empty_like(velocity)
    _nft_backward_kernel[(num_blocks, num_rows)](
        velocity, old_velocity, clean, noise, velocity if ref_velocity is None else ref_velocity, sigma, probability,
        sigma if weight is None else weight, grad_loss, grad, sums, beta, kl_beta, max_advantage, num_rows,
        num_elements, HAS_REF=ref_velocity is not None, HAS_WEIGHT=weight is not None, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return grad


class _NftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, velocity: Tensor, others: Any, rows: Rows, options: tuple[float, float, float]) -> Any:
        latents = (velocity.detach(), *others)
        loss, figures, sums = forward(latents, rows, *options)
        ctx.save_for_backward(*latents, *rows, sums)
        ctx.options = options
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return backward(grad_outputs[0], saved[:5], saved[5:8], saved[8], *ctx.options), None, None, None


def loss(latents: Latents, rows: Rows, beta: float, kl_beta: float, max_advantage: float) -> tuple[Tensor, Tensor]:
    """Run `forward`, differentiable in velocity, without the dispatcher."""
    return _NftLoss.apply(latents[0], latents[1:], rows, (beta, kl_beta, max_advantage))
