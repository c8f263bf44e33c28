"""GRPO: log-prob, ratio, clip, advantage weight, KL and diagnostics in one launch; the gradient in another."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels.reference import GRPO_FIGURES
from mteditflow_kernels.triton_common import (
    BLOCK,
    C_V,
    CONST,
    OPTIONS,
    SCALE,
    STD,
    coefficients_of,
    elements,
    geometry,
    is_last,
    load,
    mean_of,
    ordered_sum,
    step_arguments,
    tickets,
)


@triton.jit(do_not_specialize=["step"])
def _grpo_kernel(
    velocity, latents, next_latents, ref_velocity, old_velocity, old_log_prob, advantage, weight, loss, rows, figures,
    partial, tickets, table, steps, step, kl_column, clip_range, kl_beta, num_rows, num_elements, num_blocks,
    HAS_REF: tl.constexpr, HAS_OLD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_STEPS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum rows as `_step_kernel` does; the last program of a row writes its row of `rows` (4, B), the last of all
    rows writes the loss and the diagnostics, `figures` (7,).
    """
    block, row = tl.program_id(0), tl.program_id(1)
    coefficients = coefficients_of(table, steps, step, HAS_STEPS)
    c_v = tl.load(coefficients + C_V)
    offset, inside = elements(num_elements, BLOCK)
    mean, v = mean_of(velocity, latents, coefficients, offset, inside)
    residual = load(next_latents, offset, inside) - mean
    residual = tl.where(inside, residual, 0.0)
    sums, stride = partial + row * num_blocks, num_rows * num_blocks
    tl.store(sums + block, tl.sum(residual * residual))
    if HAS_REF:
        difference = c_v * (v - load(ref_velocity, offset, inside))
        tl.store(sums + stride + block, tl.sum(difference * difference))
    if HAS_OLD:
        moved = c_v * (v - load(old_velocity, offset, inside))
        tl.store(sums + 2 * stride + block, tl.sum(moved * moved))
    if is_last(tickets + row, num_blocks):
        square = ordered_sum(sums, num_blocks, BLOCKS) / num_elements
        log_prob = tl.load(coefficients + CONST) - tl.load(coefficients + SCALE) * square
        std = tl.load(coefficients + STD)
        log_prob = tl.where(std == 0.0, float("nan"), log_prob)
        log_ratio = log_prob - tl.load(old_log_prob + row)
        if HAS_OLD:
            moved_square = ordered_sum(sums + 2 * stride, num_blocks, BLOCKS) / num_elements
            log_ratio = (log_ratio + tl.load(coefficients + SCALE) * moved_square) * std
        kl = 0.0
        if HAS_REF:
            kl = tl.load(coefficients + kl_column) * (ordered_sum(sums + stride, num_blocks, BLOCKS) / num_elements)
        tl.store(rows + row, log_ratio)
        tl.store(rows + num_rows + row, kl)
        if is_last(tickets + num_rows, num_rows):
            _grpo_figures(
                rows, advantage, weight, loss, figures, clip_range, kl_beta, num_rows, HAS_REF, HAS_WEIGHT, ROWS
            )


@triton.jit
def _grpo_figures(
    rows, advantage, weight, loss, figures, clip_range, kl_beta, num_rows, HAS_REF: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute ratio, clip, loss and diagnostics of all rows; `rows` gets the derivatives by log ratio and by kl."""
    place = tl.arange(0, ROWS)
    inside = place < num_rows
    log_ratio = tl.load(rows + place, inside, other=0.0, cache_modifier=".cg")
    kl = tl.load(rows + num_rows + place, inside, other=0.0, cache_modifier=".cg")
    a = tl.load(advantage + place, inside, other=0.0)
    share = tl.full((ROWS,), 1.0, tl.float32) / num_rows
    if HAS_WEIGHT:
        share = tl.load(weight + place, inside, other=0.0)
    is_counted = inside & (share != 0.0)
    num_counted = tl.maximum(tl.sum(is_counted.to(tl.float32)), 1.0)
    ratio = tl.exp(log_ratio)
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_range), 1.0 + clip_range)
    policy = tl.maximum(-a * ratio, -a * clipped, propagate_nan=tl.PropagateNan.ALL)
    is_clipped = ((a > 0) & (ratio > 1.0 + clip_range)) | ((a < 0) & (ratio < 1.0 - clip_range))
    tl.store(rows + 2 * num_rows + place, tl.where(is_clipped, 0.0, -a * ratio) * share, inside)
    tl.store(rows + 3 * num_rows + place, kl_beta * share, inside)
    total = policy + kl_beta * kl if HAS_REF else policy
    tl.store(loss, tl.sum(tl.where(inside, total * share, 0.0)))
    error = tl.where(is_counted, tl.abs(ratio - 1.0), 0.0)
    log_ratio = tl.where(is_counted, log_ratio, 0.0)
    tl.store(figures, tl.sum(tl.where(is_counted, ratio, 0.0)) / num_counted)
    tl.store(figures + 1, tl.max(error))
    tl.store(figures + 2, tl.sum((error > clip_range).to(tl.float32)) / num_counted)
    tl.store(figures + 3, 0.5 * tl.sum(log_ratio * log_ratio) / num_counted)
    tl.store(figures + 4, tl.sum(tl.where(is_counted, kl, 0.0)) / num_counted)
    tl.store(figures + 5, tl.sum(tl.where(is_counted, policy, 0.0)) / num_counted)
    tl.store(figures + 6, tl.max(tl.abs(log_ratio)))


@triton.jit(do_not_specialize=["step"])
def _grpo_backward_kernel(
    velocity, latents, next_latents, ref_velocity, old_velocity, grad_loss, grad_velocity, rows, table, steps, step,
    kl_column, num_rows, num_elements, HAS_REF: tl.constexpr, HAS_OLD: tl.constexpr, HAS_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply the chain rule through the log ratio and kl of a row, by which the forward pass left the loss's derivatives
    in `rows`. GRPO-Guard's log ratio has the residual to the old mean, and a factor std.
    """
    row = tl.program_id(1)
    coefficients = coefficients_of(table, steps, step, HAS_STEPS)
    c_v = tl.load(coefficients + C_V)
    outer = tl.load(grad_loss)
    factor = outer * tl.load(rows + 2 * num_rows + row) * 2.0 * tl.load(coefficients + SCALE) * c_v / num_elements
    offset, inside = elements(num_elements, BLOCK)
    if HAS_OLD:
        factor = factor * tl.load(coefficients + STD)
        mean, _ = mean_of(old_velocity, latents, coefficients, offset, inside)
    else:
        mean, _ = mean_of(velocity, latents, coefficients, offset, inside)
    grad = factor * (load(next_latents, offset, inside) - mean)
    if HAS_REF:
        kl_factor = outer * tl.load(rows + 3 * num_rows + row) * 2.0 * tl.load(coefficients + kl_column)
        kl_factor = kl_factor * c_v * c_v / num_elements
        grad += kl_factor * (load(velocity, offset, inside) - load(ref_velocity, offset, inside))
    tl.store(grad_velocity + offset, grad.to(grad_velocity.dtype.element_ty), inside)


Latents = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Rows = tuple[Tensor, Tensor, Tensor | None]


def forward(
    latents: Latents, rows: Rows, table: Tensor, step: Tensor | int, clip_range: float, kl_beta: float, kl_column: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, figures (7,) and what the backward pass needs, of (velocity, latents, next_latents, ref_velocity,
    old_velocity) and (old_log_prob, advantage, weight).
    """
    velocity, x, next_latents, ref_velocity, old_velocity = latents
    old_log_prob, advantage, weight = rows
    num_rows, num_elements, num_blocks = geometry(x)
    loss, figures = torch.empty((), device=x.device), torch.empty(len(GRPO_FIGURES), device=x.device)
    slopes, partial = (torch.empty(n, device=x.device) for n in (4 * num_rows, 3 * num_rows * num_blocks))
    table, steps, number, has_steps = step_arguments(table, step)
    _grpo_kernel[(num_blocks, num_rows)](
        velocity, x, next_latents, velocity if ref_velocity is None else ref_velocity,
        velocity if old_velocity is None else old_velocity, old_log_prob, advantage,
        advantage if weight is None else weight, loss, slopes, figures, partial, tickets(num_rows, x.device), table,
        steps, number, kl_column, clip_range, kl_beta, num_rows, num_elements, num_blocks,
        HAS_REF=ref_velocity is not None, HAS_OLD=old_velocity is not None, HAS_WEIGHT=weight is not None,
        HAS_STEPS=has_steps, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
        ROWS=triton.next_power_of_2(num_rows), **OPTIONS,
    )  # fmt: skip
    return loss, figures, slopes


def backward(
    grad_loss: Tensor, latents: Latents, slopes: Tensor, table: Tensor, step: Tensor | int, kl_column: int
) -> Tensor:
    """Compute the gradient of `velocity`."""
    velocity, x, next_latents, ref_velocity, old_velocity = latents
    num_rows, num_elements, num_blocks = geometry(x)
    grad = torch.empty_like(velocity)
    table, steps, number, has_steps = step_arguments(table, step)
    _grpo_backward_kernel[(num_blocks, num_rows)](
        velocity, x, next_latents, velocity if ref_velocity is None else ref_velocity,
        velocity if old_velocity is None else old_velocity, grad_loss, grad, slopes, table, steps, number, kl_column,
        num_rows, num_elements, HAS_REF=ref_velocity is not None, HAS_OLD=old_velocity is not None,
        HAS_STEPS=has_steps, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return grad


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, velocity: Tensor, others: Any, rows: Rows, table: Tensor, options: Any) -> Any:
        step, clip_range, kl_beta, kl_column = options
        latents = (velocity.detach(), *others)
        loss, figures, slopes = forward(latents, rows, table, step, clip_range, kl_beta, kl_column)
        ctx.save_for_backward(*latents, slopes, table)
        ctx.options = options
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *latents, slopes, table = ctx.saved_tensors
        step, _, _, kl_column = ctx.options
        return backward(grad_outputs[0], tuple(latents), slopes, table, step, kl_column), None, None, None, None


def loss(
    latents: Latents, rows: Rows, table: Tensor, step: Tensor | int, clip_range: float, kl_beta: float, kl_column: int
) -> tuple[Tensor, Tensor]:
    """Run `forward`, differentiable in velocity, without the dispatcher."""
    return _GrpoLoss.apply(latents[0], latents[1:], rows, table, (step, clip_range, kl_beta, kl_column))
