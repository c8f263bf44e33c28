"""DiffusionNFT: both implicit policies, adaptive weights, KL and diagnostics in one launch; the gradient in another."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels.triton_common import (
    BLOCK,
    OPTIONS,
    geometry,
    is_last,
    load,
    ordered_sum,
    own_elements,
    tickets,
)


@triton.jit
def _nft_errors(velocity, old_velocity, clean, noise, sigma, offset, inside, beta):
    """x+ - x0 and x- - x0, the velocity, all float32; 0 outside the row."""
    v = load(velocity, offset, inside)
    old = load(old_velocity, offset, inside)
    x0 = load(clean, offset, inside)
    xt = (1.0 - sigma) * x0 + sigma * load(noise, offset, inside)
    positive = xt - sigma * (beta * v + (1.0 - beta) * old) - x0
    negative = xt - sigma * ((1.0 + beta) * old - beta * v) - x0
    return positive, negative, v


@triton.jit
def _nft_kernel(
    velocity, old_velocity, clean, noise, ref_velocity, sigmas, probability, weight, rows, figures, partial, tickets,
    beta, kl_beta, max_advantage, num_rows, num_elements, num_blocks, HAS_REF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Five sums a row; `rows` (4, B) gets policy, kl, w+ and w-, `figures` (3,) loss, policy_loss and kl."""
    block, row = tl.program_id(0), tl.program_id(1)
    offset, inside = own_elements(num_elements, BLOCK)
    sigma = tl.load(sigmas + row)
    positive, negative, v = _nft_errors(velocity, old_velocity, clean, noise, sigma, offset, inside, beta)
    own, stride = partial + row * num_blocks, num_rows * num_blocks
    tl.store(own + block, tl.sum(tl.abs(positive)))
    tl.store(own + stride + block, tl.sum(tl.abs(negative)))
    tl.store(own + 2 * stride + block, tl.sum(positive * positive))
    tl.store(own + 3 * stride + block, tl.sum(negative * negative))
    if HAS_REF:
        difference = v - load(ref_velocity, offset, inside)
        tl.store(own + 4 * stride + block, tl.sum(difference * difference))
    if is_last(tickets + row, num_blocks):
        scale_positive = tl.maximum(ordered_sum(own, num_blocks, BLOCKS) / num_elements, 1e-5)
        scale_negative = tl.maximum(ordered_sum(own + stride, num_blocks, BLOCKS) / num_elements, 1e-5)
        good = ordered_sum(own + 2 * stride, num_blocks, BLOCKS) / num_elements / scale_positive
        bad = ordered_sum(own + 3 * stride, num_blocks, BLOCKS) / num_elements / scale_negative
        r = tl.load(probability + row)
        kl = 0.0
        if HAS_REF:
            kl = ordered_sum(own + 4 * stride, num_blocks, BLOCKS) / num_elements
        tl.store(rows + row, max_advantage * (r * good + (1.0 - r) * bad) / beta)
        tl.store(rows + num_rows + row, kl)
        tl.store(rows + 2 * num_rows + row, scale_positive)
        tl.store(rows + 3 * num_rows + row, scale_negative)
        if is_last(tickets + num_rows, num_rows):
            each = tl.arange(0, ROWS)
            real = each < num_rows
            policy = tl.load(rows + each, real, other=0.0, cache_modifier=".cg")
            penalty = tl.load(rows + num_rows + each, real, other=0.0, cache_modifier=".cg")
            share = tl.full((ROWS,), 1.0, tl.float32) / num_rows
            if HAS_WEIGHT:
                share = tl.load(weight + each, real, other=0.0)
            tl.store(figures, tl.sum((policy + kl_beta * penalty) * share))
            tl.store(figures + 1, tl.sum(policy) / num_rows)
            tl.store(figures + 2, tl.sum(penalty) / num_rows)


@triton.jit
def _nft_backward_kernel(
    velocity, old_velocity, clean, noise, ref_velocity, sigmas, probability, weight, grad_loss, grad_velocity, rows,
    beta, kl_beta, max_advantage, num_rows, num_elements, HAS_REF: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(2 / D) weight {A_max t [-r (x+ - x0) / w+ + (1 - r) (x- - x0) / w-] + kl_beta (v - v_ref)}"""
    row = tl.program_id(1)
    offset, inside = own_elements(num_elements, BLOCK)
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


class _NftLoss(torch.autograd.Function):
    """Loss and (3,) figures; `options` are (beta, kl_beta, max_advantage)."""

    @staticmethod
    def forward(
        ctx: Any, velocity: Tensor, old_velocity: Tensor, clean: Tensor, noise: Tensor, ref_velocity: Tensor | None,
        sigma: Tensor, probability: Tensor, weight: Tensor | None, options: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        num_rows, num_elements, num_blocks = geometry(clean)
        rows, figures, partial = (
            torch.empty(n, device=clean.device) for n in (4 * num_rows, 3, 5 * num_rows * num_blocks)
        )
        _nft_kernel[(num_blocks, num_rows)](
            velocity, old_velocity, clean, noise, velocity if ref_velocity is None else ref_velocity, sigma,
            probability, sigma if weight is None else weight, rows, figures, partial,
            tickets(num_rows, clean.device), *options, num_rows, num_elements, num_blocks,
            HAS_REF=ref_velocity is not None, HAS_WEIGHT=weight is not None, BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(num_blocks), ROWS=triton.next_power_of_2(num_rows), **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(velocity, old_velocity, clean, noise, ref_velocity, sigma, probability, weight, rows)
        ctx.options = options
        ctx.mark_non_differentiable(figures)
        return figures[0].clone(), figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        velocity, old_velocity, clean, noise, ref_velocity, sigma, probability, weight, rows = ctx.saved_tensors
        num_rows, num_elements, num_blocks = geometry(clean)
        grad = torch.empty_like(velocity)
        _nft_backward_kernel[(num_blocks, num_rows)](
            velocity, old_velocity, clean, noise, velocity if ref_velocity is None else ref_velocity, sigma,
            probability, sigma if weight is None else weight, grad_outputs[0], grad, rows, *ctx.options, num_rows,
            num_elements, HAS_REF=ref_velocity is not None, HAS_WEIGHT=weight is not None, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        return grad, *[None] * 8


loss = _NftLoss.apply
