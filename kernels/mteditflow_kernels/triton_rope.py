"""Queries and keys on their way to the attention: heads normalised and turned, one launch for each stream of tokens,
the input read once and kept once, as it came. A program takes BLOCK / D heads; a head's sum has one order.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels.triton_common import BLOCK, OPTIONS


@triton.jit
def _pairs(tensor, at, inside, HEADS: tl.constexpr, HEAD: tl.constexpr):
    """Load (HEADS, HEAD) in whole and as float32; returns its even and odd columns, (HEADS, HEAD / 2) each."""
    value = tl.load(tensor + at + tl.arange(0, HEAD)[None, :], inside[:, None], other=0.0).to(tl.float32)
    return tl.split(tl.reshape(value, (HEADS, HEAD // 2, 2)))


@triton.jit
def _store_pairs(tensor, at, even, odd, inside, HEADS: tl.constexpr, HEAD: tl.constexpr):
    value = tl.reshape(tl.join(even, odd), (HEADS, HEAD)).to(tensor.dtype.element_ty)
    tl.store(tensor + at + tl.arange(0, HEAD)[None, :], value, inside[:, None])


@triton.jit
def _heads(num_tokens, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """The batch's row, and for each head of this program: its number among all tokens', (HEADS, 1), its token, its
    number in its token, and whether the token is there.
    """
    number = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    token = number // NUM_HEADS
    return tl.program_id(1).to(tl.int64), number[:, None], token, (number % NUM_HEADS)[:, None], token < num_tokens


@triton.jit
def _normal(even, odd, eps, HEAD: tl.constexpr):
    """The factor (HEADS, 1) that makes a head's mean square 1."""
    return tl.rsqrt(tl.sum(even * even + odd * odd, 1) / HEAD + eps)[:, None]


@triton.jit
def _norm_rope_kernel(
    x, weight_of_norm, angles, turned, x_batch, x_token, out_batch, num_tokens, eps, NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    batch, number, token, head, inside = _heads(num_tokens, NUM_HEADS, HEADS)
    at = batch * x_batch + token[:, None].to(tl.int64) * x_token + head * HEAD
    even, odd = _pairs(x, at, inside, HEADS, HEAD)
    cosine, sine = _pairs(angles, token[:, None] * HEAD, inside, HEADS, HEAD)
    weight_even, weight_odd = _pairs(weight_of_norm, token[:, None] * 0, inside, HEADS, HEAD)
    scale = _normal(even, odd, eps, HEAD)
    even, odd = even * scale * weight_even, odd * scale * weight_odd
    at = batch * out_batch + number * HEAD
    _store_pairs(turned, at, even * cosine - odd * sine, odd * cosine + even * sine, inside, HEADS, HEAD)


@triton.jit
def _norm_rope_backward_kernel(
    x, weight_of_norm, angles, grad, grad_x, x_batch, x_token, grad_batch, grad_token, grad_head, num_tokens, eps,
    NUM_HEADS: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dx = r (h - x r^2 mean_d(h x)), h the gradient turned back, times weight; r is computed again."""
    batch, number, token, head, inside = _heads(num_tokens, NUM_HEADS, HEADS)
    at = batch * x_batch + token[:, None].to(tl.int64) * x_token + head * HEAD
    even, odd = _pairs(x, at, inside, HEADS, HEAD)
    at = batch * grad_batch + token[:, None].to(tl.int64) * grad_token + head.to(tl.int64) * grad_head
    grad_even, grad_odd = _pairs(grad, at, inside, HEADS, HEAD)
    cosine, sine = _pairs(angles, token[:, None] * HEAD, inside, HEADS, HEAD)
    weight_even, weight_odd = _pairs(weight_of_norm, token[:, None] * 0, inside, HEADS, HEAD)
    back_even = (grad_even * cosine + grad_odd * sine) * weight_even
    back_odd = (grad_odd * cosine - grad_even * sine) * weight_odd
    scale = _normal(even, odd, eps, HEAD)
    slope = scale * scale * (tl.sum(back_even * even + back_odd * odd, 1) / HEAD)[:, None]
    at = batch * num_tokens * NUM_HEADS * HEAD + number * HEAD
    result = scale * (back_even - even * slope), scale * (back_odd - odd * slope)
    _store_pairs(grad_x, at, result[0], result[1], inside, HEADS, HEAD)


def _heads_in_a_row(x: Tensor) -> Tensor:
    """x (B, S, H, D) itself where a token's heads lie side by side, as in a projection or a part of one."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _geometry(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and the compile-time parameters."""
    num_heads, size = x.shape[2:]
    heads = max(1, BLOCK // size)
    grid = -(-x.shape[1] * num_heads // heads), len(x)
    return grid, {"NUM_HEADS": num_heads, "HEAD": size, "HEADS": heads} | OPTIONS


def forward(x: list[Tensor], weight: list[Tensor], angles: list[Tensor], eps: float) -> Tensor:
    """Compute `reference.norm_rope`."""
    rows, _, *head = x[0].shape
    out = torch.empty(rows, sum(part.shape[1] for part in x), *head, dtype=x[0].dtype, device=x[0].device)
    start = 0
    for part, scales, table in zip(map(_heads_in_a_row, x), weight, angles, strict=True):
        grid, constants = _geometry(part)
        _norm_rope_kernel[grid](
            part, scales, table.contiguous(), out[:, start:], *part.stride()[:2], out.stride(0), part.shape[1], eps,
            **constants,
        )  # fmt: skip
        start += part.shape[1]
    return out


def backward(grad: Tensor, x: list[Tensor], weight: list[Tensor], angles: list[Tensor], eps: float) -> list[Tensor]:
    """Compute the gradients of x; `grad` may lie as an attention left it, a head's numbers side by side."""
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    grads, start = [], 0
    for part, scales, table in zip(map(_heads_in_a_row, x), weight, angles, strict=True):
        grid, constants = _geometry(part)
        grads.append(torch.empty(part.shape, dtype=part.dtype, device=part.device))
        _norm_rope_backward_kernel[grid](
            part, scales, table.contiguous(), grad[:, start:], grads[-1], *part.stride()[:2], *grad.stride()[:3],
            part.shape[1], eps, **constants,
        )  # fmt: skip
        start += part.shape[1]
    return grads
