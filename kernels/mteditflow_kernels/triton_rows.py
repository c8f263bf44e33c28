"""Rows to 8 bits: one launch, one program a row, which is read a second time from the cache that the first filled."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels import reference
from mteditflow_kernels.triton_common import BLOCK, OPTIONS

E4M3_MAX, SMALLEST_AMAX = tl.constexpr(reference.E4M3_MAX), tl.constexpr(reference.SMALLEST_AMAX)


@triton.jit
def _quantise_kernel(x, quantised, scale, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        inside = start + place < num_columns
        value = tl.load(x + row * num_columns + start + place, inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    amax = tl.maximum(tl.max(largest), SMALLEST_AMAX)
    tl.store(scale + row, tl.div_rn(amax, E4M3_MAX))
    inverse = tl.div_rn(1.0, amax) * E4M3_MAX
    for start in range(0, num_columns, BLOCK):
        inside = start + place < num_columns
        value = tl.load(x + row * num_columns + start + place, inside, other=0.0).to(tl.float32)
        tl.store(quantised + row * num_columns + start + place, (value * inverse).to(tl.float8e4nv), inside)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantise_rows` of a contiguous x (..., K), to the bit."""
    quantised = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    _quantise_kernel[(scale.numel(),)](x, quantised, scale, x.shape[-1], BLOCK=BLOCK, **OPTIONS)
    return quantised, scale
