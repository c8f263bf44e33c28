"""Attention by `norm_rope` computes what diffusers does; `triton_block_cases.py` runs the kernel."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor

from mteditflow.transformer.attention import choose_attention
from mteditflow.transformer.rope import RopeProcessor, fuse_rope

Velocity = Callable[[Tensor], Tensor]
SIZES = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6)}


def flux() -> tuple[torch.nn.Module, Velocity]:
    """A block of two streams and one of one; its velocity of latents (2, 8, 16)."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=8, guidance_embeds=False, **SIZES
    )  # fmt: skip
    text, pooled, ids = torch.randn(2, 5, 12), torch.randn(2, 8), torch.randn(13, 3)
    return model, lambda x: model(x, text, pooled, torch.full((2,), 0.5), ids[5:], ids[:5], return_dict=False)[0]


def qwen() -> tuple[torch.nn.Module, Velocity]:
    """Two blocks; texts of five and three tokens."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=2, **SIZES)
    text, mask = torch.randn(2, 5, 12), torch.arange(5) < torch.tensor([[5], [3]])
    return model, lambda x: model(
        x, text, mask, torch.full((2,), 0.5), [[(1, 2, 4)]] * 2, return_dict=False
    )[0]  # fmt: skip


def randomised(made: tuple[torch.nn.Module, Velocity]) -> tuple[torch.nn.Module, Velocity]:
    """Frozen, with norms that do something."""
    for name, weight in made[0].requires_grad_(False).named_parameters():
        if "norm" in name:
            weight.add_(0.3 * torch.randn(weight.shape))
    return made


def both(made: tuple[torch.nn.Module, Velocity]) -> list[tuple[Tensor, Tensor]]:
    """The velocity and its gradient to the latents, by diffusers' attention and by ours."""
    model, velocity = randomised(made)
    found = []
    for _ in range(2):
        latents = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = velocity(latents)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), latents)[0]))
        fuse_rope(model)
    return found


@pytest.mark.parametrize("make", [flux, qwen])
def test_bits_are_those_of_diffusers(make: Callable[[], tuple[torch.nn.Module, Velocity]]) -> None:
    (velocity, gradient), (own, own_gradient) = both(make())
    assert torch.equal(own, velocity)
    # the same sums in another order: a hundred float32 roundings of the largest
    assert (own_gradient - gradient).abs().max() <= 100 * 2.0**-24 * gradient.abs().max()


def test_the_attention_is_still_chosen() -> None:
    model, velocity = randomised(flux())
    fuse_rope(model)
    choose_attention(model, "native", dtype=torch.float32, device=torch.device("cpu"), is_masked=False)
    processors: list[Any] = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert len(processors) == 2 and all(isinstance(processor, RopeProcessor) for processor in processors)
    assert {processor._attention_backend for processor in processors} == {AttentionBackendName.NATIVE}
    latents = torch.randn(2, 8, 16)
    assert torch.equal(deepcopy(model).state_dict()["x_embedder.weight"], model.state_dict()["x_embedder.weight"])
    assert velocity(latents).isfinite().all()
