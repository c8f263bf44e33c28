"""The denoising step with its noise, and the log-prob of stored latents: one kernel, so both give the same bits."""

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
    elements,
    geometry,
    is_last,
    load,
    mean_of,
    normals,
    ordered_sum,
    step_arguments,
    tickets,
)


@triton.jit
def _normal_kernel(keys, out, num_elements, BLOCK: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1)
    offset, inside = elements(num_elements, BLOCK)
    tl.store(out + offset, normals(keys + row * 5, block, BLOCK), inside)


@triton.jit(do_not_specialize=["step"])
def _step_kernel(
    velocity, latents, next_latents, log_prob, partial, tickets, table, steps, step, keys, num_elements, num_blocks,
    IS_SAMPLED: tl.constexpr, IS_NOISY: tl.constexpr, HAS_STEPS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Make next_latents (IS_SAMPLED) or read them, and score the stored values."""
    block, row = tl.program_id(0), tl.program_id(1)
    coefficients = coefficients_of(table, steps, step, HAS_STEPS)
    std = tl.load(coefficients + STD)
    offset, inside = elements(num_elements, BLOCK)
    mean, _ = mean_of(velocity, latents, coefficients, offset, inside)
    if IS_SAMPLED:
        sample = mean
        if IS_NOISY:
            sample = mean + std * normals(keys + row * 5, block, BLOCK)
        stored = sample.to(next_latents.dtype.element_ty)
        tl.store(next_latents + offset, stored, inside)
    else:
        stored = tl.load(next_latents + offset, inside, other=0.0)
    residual = tl.where(inside, stored.to(tl.float32) - mean, 0.0)
    sums = partial + row * num_blocks
    tl.store(sums + block, tl.sum(residual * residual))
    if is_last(tickets + row, num_blocks):
        square = ordered_sum(sums, num_blocks, BLOCKS) / num_elements
        value = tl.load(coefficients + CONST) - tl.load(coefficients + SCALE) * square
        tl.store(log_prob + row, tl.where(std == 0.0, float("nan"), value))


@triton.jit(do_not_specialize=["step"])
def _log_prob_backward_kernel(
    velocity, latents, next_latents, grad_log_prob, grad_velocity, table, steps, step, num_elements,
    HAS_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlog_prob/dv = 2 scale c_v (next - mean) / D."""
    row = tl.program_id(1)
    coefficients = coefficients_of(table, steps, step, HAS_STEPS)
    c_v = tl.load(coefficients + C_V)
    factor = tl.load(grad_log_prob + row) * 2.0 * tl.load(coefficients + SCALE) * c_v / num_elements
    offset, inside = elements(num_elements, BLOCK)
    mean, _ = mean_of(velocity, latents, coefficients, offset, inside)
    residual = load(next_latents, offset, inside) - mean
    tl.store(grad_velocity + offset, (factor * residual).to(grad_velocity.dtype.element_ty), inside)


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Compute `philox.counter_normal` within NORMAL_ERROR."""
    out = torch.empty(len(keys), *shape, dtype=torch.float32, device=keys.device)
    num_rows, num_elements, num_blocks = geometry(out)
    _normal_kernel[(num_blocks, num_rows)](keys, out, num_elements, BLOCK=BLOCK, **OPTIONS)
    return out


def step_and_score(
    velocity: Tensor, latents: Tensor, next_latents: Tensor | None, table: Tensor, step: Tensor | int,
    keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score next_latents, made where it is None; returns it and its log_prob (B,)."""
    num_rows, num_elements, num_blocks = geometry(latents)
    made = torch.empty_like(latents) if next_latents is None else next_latents
    log_prob, partial = (torch.empty(n, device=latents.device) for n in (num_rows, num_rows * num_blocks))
    table, steps, number, has_steps = step_arguments(table, step)
    _step_kernel[(num_blocks, num_rows)](
        velocity, latents, made, log_prob, partial, tickets(num_rows, latents.device), table, steps, number,
        table if keys is None else keys, num_elements, num_blocks, IS_SAMPLED=next_latents is None,
        IS_NOISY=keys is not None, HAS_STEPS=has_steps, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
        **OPTIONS,
    )  # fmt: skip
    return made, log_prob


def log_prob_backward(
    grad_log_prob: Tensor, velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor, step: Tensor | int
) -> Tensor:
    """Compute the gradient of `velocity`."""
    num_rows, num_elements, num_blocks = geometry(latents)
    grad = torch.empty_like(velocity)
    table, steps, number, has_steps = step_arguments(table, step)
    _log_prob_backward_kernel[(num_blocks, num_rows)](
        velocity, latents, next_latents, grad_log_prob.contiguous(), grad, table, steps, number, num_elements,
        HAS_STEPS=has_steps, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip
    return grad


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor, step: Any) -> Tensor:
        ctx.save_for_backward(velocity, latents, next_latents, table)
        ctx.step = step
        return step_and_score(velocity, latents, next_latents, table, step, None)[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return log_prob_backward(grad_outputs[0], *ctx.saved_tensors, ctx.step), None, None, None, None


log_prob = _LogProb.apply
