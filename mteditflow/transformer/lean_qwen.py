"""Qwen-Image's blocks with less kept for the backward pass, bits unchanged.

diffusers' RMSNorm of q and k keeps a float32 copy beside its input, 8 bytes per token and width of each block on top of
38; -2511 keeps its modulation, which is one of two values, once for every token: another 8. Here the norm keeps its
input and runs again in the backward pass, and the modulation keeps the two values. A compiled block needs neither: the
partitioner finds both (docs/log.md).

Before its blocks diffusers copies the length of the text to the GPU in every forward pass, to find the lengths of rows
that it then drops. The host waits for such a copy, and a CUDA graph cannot have it.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn


class LeanRMSNorm(RMSNorm):
    """diffusers' RMSNorm; takes the place of a norm's class, weights and all."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise (..., d); the gradient is diffusers' own, to the bit."""
        is_frozen = self.weight is not None and not self.weight.requires_grad
        if torch.compiler.is_compiling() or not (is_frozen and hidden_states.requires_grad):
            return super().forward(hidden_states)
        return _RunAgain.apply(hidden_states, super().forward)


class _RunAgain(torch.autograd.Function):
    """A function of one tensor that keeps nothing but it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.function(x)
        return torch.autograd.grad(y, x, gradients[0])[0], None


class _Scaled(torch.autograd.Function):
    """x (B, N, d) times, token by token, the first or the second half of frozen factors (2 B, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(factors, index)
        return x * _choose(factors, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * _choose(*ctx.saved_tensors), None, None


class _Gate:
    """What a block multiplies its branches with."""

    def __init__(self, values: Tensor, index: Tensor) -> None:
        self.values, self.index = values, index

    def __mul__(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x, self.values, self.index)


def _choose(values: Tensor, index: Tensor) -> Tensor:
    """Spread values (2 B, d) over the tokens: (B, N, d); index (B, N) is 0 for the first half of them."""
    first, second = values.chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, first.unsqueeze(1), second.unsqueeze(1))


def _modulation(stock: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    def modulate(x: Tensor, parameters: Tensor, index: Any = None) -> tuple[Tensor, Any]:
        """Shift and scale x (B, N, d), in the place of `QwenImageTransformerBlock._modulate`; and the gate."""
        if index is None or parameters.requires_grad or torch.compiler.is_compiling():
            return stock(x, parameters, index)
        shift, scale, gate = parameters.chunk(3, dim=-1)
        return _Scaled.apply(x, 1 + scale, index) + _choose(shift, index), _Gate(gate, index)

    return modulate


def _text_length(states: Tensor, mask: Tensor | None) -> tuple[int, None, Tensor | None]:
    """Text length T of states (B, T, E) and mask (B, T), in the place of `compute_text_seq_len_from_mask`."""
    return states.shape[1], None, mask if mask is None else mask.bool()


def make_lean(transformer: nn.Module) -> None:
    """Let a transformer of Qwen-Image keep less; and each of the process leave the host alone."""
    transformer_qwenimage.compute_text_seq_len_from_mask = _text_length  # pyright: ignore[reportAttributeAccessIssue]
    for module in transformer.modules():
        if type(module) is RMSNorm:
            module.__class__ = LeanRMSNorm
        if isinstance(module, QwenImageTransformerBlock) and "_modulate" not in vars(module):  # or it is lean already
            module._modulate = _modulation(module._modulate)  # pyright: ignore[reportAttributeAccessIssue]
