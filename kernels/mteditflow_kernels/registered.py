"""What runs inside the transformer's blocks, as torch.compile needs it: ops that it does not look into, with what their
outputs look like and what their gradient is. A fake tensor, whose memory is counted, gets their outputs and no others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from mteditflow_kernels.backend import triton


@custom_op("mteditflow::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantise_rows` of a contiguous x."""
    return triton("rows").quantise(x)


@quantise_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@custom_op("mteditflow::norm_rope", mutates_args=())
def norm_rope(x: list[Tensor], weight: list[Tensor], angles: list[Tensor], eps: float) -> Tensor:
    """`reference.norm_rope` of parts, given by their fields; differentiable in x."""
    return triton("rope").forward(x, weight, angles, eps)


@custom_op("mteditflow::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    grad: Tensor, x: list[Tensor], weight: list[Tensor], angles: list[Tensor], eps: float
) -> list[Tensor]:
    """The gradients of x."""
    return triton("rope").backward(grad, x, weight, angles, eps)


@norm_rope.register_fake
def _(x: list[Tensor], *_: Any) -> Tensor:
    return x[0].new_empty(x[0].shape[0], sum(part.shape[1] for part in x), *x[0].shape[2:])


@norm_rope_backward.register_fake
def _(grad: Tensor, x: list[Tensor], *_: Any) -> list[Tensor]:
    return [part.new_empty(part.shape) for part in x]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *fields, ctx.eps = inputs
    ctx.save_for_backward(*(tensor for field in fields for tensor in field))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # asked for once: a checkpoint gives them once
    n = len(saved) // 3
    fields = [list(saved[start : start + n]) for start in range(0, 3 * n, n)]
    return norm_rope_backward(grad, *fields, ctx.eps), [None] * n, [None] * n, None


norm_rope.register_autograd(_gradient, setup_context=_keep)
