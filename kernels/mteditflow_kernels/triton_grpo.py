"""GRPO: log-prob, ratio, clip, advantage weight, KL and diagnostics in one launch; the gradient in another."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels.triton_common import (
    BLOCK,
    C_V,
    CONST,
    OPTIONS,
    SCALE,
    STD,
    coefficients_of,
    geometry,
    is_last,
    load,
    mean_of,
    ordered_sum,
    own_elements,
    step_arguments,
    tickets,
)


@triton.jit(do_not_specialize=["step"])
def _grpo_kernel(
    velocity, latents, next_latents, ref_velocity, old_log_prob, advantage, weight, rows, figures, partial, tickets,
    table, steps, step, kl_column, clip_range, kl_beta, num_rows, num_elements, num_blocks, HAS_REF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Row sums as in `_step_kernel`; the last program of a row writes its row of `rows` (4, B), the last of all rows
    writes the loss and the diagnostics to `figures` (8,).
    """
    block, row = tl.program_id(0), tl.program_id(1)
    coefficients = coefficients_of(table, steps, step, HAS_STEPS)
    c_v = tl.load(coefficients + C_V)
    offset, inside = own_elements(num_elements, BLOCK)
    mean, v = mean_of(velocity, latents, coefficients, offset, inside)
    residual = load(next_latents, offset, inside) - mean
    residual = tl.where(inside, residual, 0.0)
    own = partial + row * num_blocks
    tl.store(own + block, tl.sum(residual * residual))
    if HAS_REF:
        difference = c_v * (v - load(ref_velocity, offset, inside))
        tl.store(own + num_rows * num_blocks + block, tl.sum(difference * difference))
    if is_last(tickets + row, num_blocks):
        square = ordered_sum(own, num_blocks, BLOCKS) / num_elements
        log_prob = tl.load(coefficients + CONST) - tl.load(coefficients + SCALE) * square
        log_prob = tl.where(tl.load(coefficients + STD) == 0.0, float("nan"), log_prob)
        log_ratio = log_prob - tl.load(old_log_prob + row)
        kl = 0.0
        if HAS_REF:
            kl = tl.load(coefficients + kl_column) * (
                ordered_sum(own + num_rows * num_blocks, num_blocks, BLOCKS) / num_elements
            )
        tl.store(rows + row, log_ratio)
        tl.store(rows + num_rows + row, kl)
        if is_last(tickets + num_rows, num_rows):
            _grpo_figures(rows, advantage, weight, figures, clip_range, kl_beta, num_rows, HAS_REF, HAS_WEIGHT, ROWS)


@triton.jit
def _grpo_figures(
    rows, advantage, weight, figures, clip_range, kl_beta, num_rows, HAS_REF: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Ratio, clip, loss and diagnostics of all rows; `rows` gets the derivatives after log_prob and after kl."""
    place = tl.arange(0, ROWS)
    inside = place < num_rows
    log_ratio = tl.load(rows + place, inside, other=0.0, cache_modifier=".cg")
    kl = tl.load(rows + num_rows + place, inside, other=0.0, cache_modifier=".cg")
    a = tl.load(advantage + place, inside, other=0.0)
    share = tl.full((ROWS,), 1.0, tl.float32) / num_rows
    if HAS_WEIGHT:
        share = tl.load(weight + place, inside, other=0.0)
    ratio = tl.exp(log_ratio)
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_range), 1.0 + clip_range)
    policy = tl.maximum(-a * ratio, -a * clipped, propagate_nan=tl.PropagateNan.ALL)
    is_clipped = ((a > 0) & (ratio > 1.0 + clip_range)) | ((a < 0) & (ratio < 1.0 - clip_range))
    tl.store(rows + 2 * num_rows + place, tl.where(is_clipped, 0.0, -a * ratio) * share, inside)
    tl.store(rows + 3 * num_rows + place, kl_beta * share, inside)
    loss = policy + kl_beta * kl if HAS_REF else policy
    error = tl.where(inside, tl.abs(ratio - 1.0), 0.0)
    tl.store(figures, tl.sum(tl.where(inside, loss * share, 0.0)))
    tl.store(figures + 1, tl.sum(tl.where(inside, ratio, 0.0)) / num_rows)
    tl.store(figures + 2, tl.max(error))
    tl.store(figures + 3, tl.sum((error > clip_range).to(tl.float32)) / num_rows)
    tl.store(figures + 4, 0.5 * tl.sum(log_ratio * log_ratio) / num_rows)
    tl.store(figures + 5, tl.sum(kl) / num_rows)
    tl.store(figures + 6, tl.sum(tl.where(inside, policy, 0.0)) / num_rows)
    tl.store(figures + 7, tl.max(tl.abs(log_ratio)))


@triton.jit(do_not_specialize=["step"])
def _grpo_backward_kernel(
    velocity, latents, next_latents, ref_velocity, grad_loss, grad_velocity, rows, table, steps, step, kl_column,
    num_rows, num_elements, HAS_REF: tl.constexpr, HAS_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chain rule through log_prob and kl, whose derivatives by row the forward pass has left in `rows`."""
    row = tl.program_id(1)
    coefficients = coefficients_of(table, steps, step, HAS_STEPS)
    c_v = tl.load(coefficients + C_V)
    outer = tl.load(grad_loss)
    factor = outer * tl.load(rows + 2 * num_rows + row) * 2.0 * tl.load(coefficients + SCALE) * c_v / num_elements
    offset, inside = own_elements(num_elements, BLOCK)
    mean, v = mean_of(velocity, latents, coefficients, offset, inside)
    grad = factor * (load(next_latents, offset, inside) - mean)
    if HAS_REF:
        kl_factor = outer * tl.load(rows + 3 * num_rows + row) * 2.0 * tl.load(coefficients + kl_column)
        kl_factor = kl_factor * c_v * c_v / num_elements
        grad += kl_factor * (v - load(ref_velocity, offset, inside))
    tl.store(grad_velocity + offset, grad.to(grad_velocity.dtype.element_ty), inside)


class _GrpoLoss(torch.autograd.Function):
    """Loss and (8,) figures; `options` are (step, clip_range, kl_beta, kl_column)."""

    @staticmethod
    def forward(
        ctx: Any, velocity: Tensor, latents: Tensor, next_latents: Tensor, ref_velocity: Tensor | None,
        old_log_prob: Tensor, advantage: Tensor, weight: Tensor | None, table: Tensor,
        options: tuple[Any, float, float, int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        step, clip_range, kl_beta, kl_column = options
        num_rows, num_elements, num_blocks = geometry(latents)
        rows, figures, partial = (
            torch.empty(n, device=latents.device) for n in (4 * num_rows, 8, 2 * num_rows * num_blocks)
        )
        table, steps, number, has_steps = step_arguments(table, step)
        _grpo_kernel[(num_blocks, num_rows)](
            velocity, latents, next_latents, velocity if ref_velocity is None else ref_velocity, old_log_prob,
            advantage, advantage if weight is None else weight, rows, figures, partial,
            tickets(num_rows, latents.device), table, steps, number, kl_column, clip_range, kl_beta, num_rows,
            num_elements, num_blocks, HAS_REF=ref_velocity is not None, HAS_WEIGHT=weight is not None,
            HAS_STEPS=has_steps, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
            ROWS=triton.next_power_of_2(num_rows), **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(velocity, latents, next_latents, ref_velocity, rows, table)
        ctx.options = options
        ctx.mark_non_differentiable(figures)
        return figures[0].clone(), figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        velocity, latents, next_latents, ref_velocity, rows, table = ctx.saved_tensors
        step, _, _, kl_column = ctx.options
        num_rows, num_elements, num_blocks = geometry(latents)
        grad = torch.empty_like(velocity)
        table, steps, number, has_steps = step_arguments(table, step)
        _grpo_backward_kernel[(num_blocks, num_rows)](
            velocity, latents, next_latents, velocity if ref_velocity is None else ref_velocity, grad_outputs[0],
            grad, rows, table, steps, number, kl_column, num_rows, num_elements, HAS_REF=ref_velocity is not None,
            HAS_STEPS=has_steps, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
        return grad, *[None] * 8


loss = _GrpoLoss.apply
