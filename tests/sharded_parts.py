"""Inputs of a policy, what it makes of them, and what equal bits are, for the checks of ranks that cut it."""

from typing import Any

import torch
from torch import Tensor

from mteditflow.policy import Policy
from mteditflow.transformer.sharded import whole_on_host
from mteditflow.types import Condition

SIZE, NUM_ROWS = 64, 2
UNREAD = "attn.add_q_proj", "attn.to_add_out", "txt_mlp"  # of Qwen-Image's last block, whose text nothing reads
PROMPT = "make the red square blue"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(policy: Policy, rank: int) -> tuple[Tensor, Tensor, Condition]:
    """Latents, noise levels and condition of two rows, others on each rank."""
    source, scale = draw(NUM_ROWS, 3, SIZE, SIZE, seed=5 + rank).clamp(-1, 1), policy.config.cfg_scale
    text = policy.encode_text([PROMPT] * NUM_ROWS, source, has_cfg=scale != 1)
    condition = Condition(text=text, image=policy.encode_image(source), cfg_scale=scale)
    latents = draw(NUM_ROWS, policy.num_tokens, policy.num_channels, seed=20 + rank)
    return latents, torch.linspace(1, 0.3, NUM_ROWS), condition


def perturb(policy: Policy, name: Any, scale: float = 0.05) -> None:
    """Move an adapter from where all start, alike on all ranks, cut or not."""
    state = whole_on_host(policy.adapters.state(name), is_kept=True)
    moved = {key: w + scale * draw(*w.shape, seed=len(name) + i) for i, (key, w) in enumerate(state.items())}
    policy.adapters.load(name, moved)


def velocities_and_gradients(policy: Policy, rank: int) -> list[Tensor]:
    """Under each adapter without gradients, then with them under `current`, with others used while the graph waits."""
    for i, name in enumerate(("current", "old", "ema")):
        perturb(policy, name, 0.05 + 0.05 * i)
    given, found = inputs(policy, rank), list[Tensor]()
    for name in ("current", "old", "ema", "off"):
        with policy.adapters.use(name), torch.no_grad():
            found.append(policy.velocity(*given))
    assert not any(torch.equal(found[0], other) for other in found[1:])
    trained = policy.velocity(*given)
    with policy.adapters.use("off"), torch.no_grad():
        policy.velocity(*given)
    trained.square().sum().backward()
    found.append(trained.detach())
    transformer = policy.pipeline.transformer
    is_text_read = hasattr(transformer, "single_transformer_blocks")  # after the last block of both streams
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."
    for name, weight in policy.adapters.trainable:
        if not is_text_read and last in name and any(part in name for part in UNREAD):
            assert weight.grad is None or not weight.grad.any(), name
        else:
            assert weight.grad is not None, name
            found.append(weight.grad)
    assert all(bool(value.any()) for value in found)
    return found


def assert_equal_bits(mine: list[Tensor], whole: list[Tensor]) -> None:
    assert len(mine) == len(whole)
    differing = [i for i, (a, b) in enumerate(zip(mine, whole, strict=True)) if not torch.equal(a, b)]
    assert not differing, f"{len(differing)} of {len(mine)} differ in bits: {differing[:9]}"
