"""Qwen-Image's blocks keep less for the backward pass, and compute what diffusers' own compute, to the bit."""

import copy
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor

from mteditflow.transformer.lean_qwen import make_lean

WIDTH, TOKENS, TEXT = 32, 8, 3


def transformer(dtype: torch.dtype, *, is_2511: bool) -> Any:
    torch.manual_seed(0)
    model: Any = QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6), zero_cond_t=is_2511,
    )  # fmt: skip
    for block in model.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
            torch.nn.init.normal_(norm.weight, 1, 0.3)
    return model.requires_grad_(False).eval().to(dtype)


def predict(model: Any, dtype: torch.dtype, *, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """Output and input."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2 * TOKENS, 8, generator=generator).to(dtype).requires_grad_(needs_gradient)
    output = model(
        hidden_states=x, encoder_hidden_states=torch.randn(2, TEXT, 8, generator=generator).to(dtype),
        encoder_hidden_states_mask=torch.ones(2, TEXT, dtype=torch.bool), timestep=torch.tensor([0.3, 0.8]).to(dtype),
        img_shapes=[[(1, 2, 4), (1, 2, 4)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    return output, x


def run(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient to the input, and what was kept for it."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, x = predict(model, dtype, needs_gradient=True)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), x)
    return output, gradient, kept


@pytest.mark.parametrize("is_2511", [False, True], ids=["2509", "2511"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_diffusers(dtype: torch.dtype, is_2511: bool) -> None:
    stock = transformer(dtype, is_2511=is_2511)
    lean = copy.deepcopy(stock)
    make_lean(lean)
    expected, expected_gradient, before = run(stock, dtype)
    output, gradient, after = run(copy.deepcopy(lean), dtype)
    assert torch.equal(output, expected) and torch.equal(gradient, expected_gradient) and gradient.any()
    assert len(after) < len(before)
    assert torch.equal(predict(lean, dtype, needs_gradient=False)[0], expected)
    if dtype == torch.bfloat16:
        size = 2 * TEXT * WIDTH
        assert not any(tensor.dtype == torch.float32 and tensor.numel() >= size for tensor in after)
        assert any(tensor.dtype == torch.float32 and tensor.numel() >= size for tensor in before)
