"""Floating-point operations of the families' transformers, from their configs: two per product-and-sum of their matrix
products; and the ceiling that a device has for them.

A block of width d has w d^2 weights per token (`Family.block_weights`) and attends over all n tokens: 2 w d^2 n +
4 d n^2. FLUX.1's 57 blocks of 3072: 74.4 TFLOP at 1024 px without a condition. What stands outside the blocks or acts
once per row (embeddings, modulation) is counted apart; norms, activations and rotations are not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from mteditflow.config import Config
from mteditflow.data import size_shares
from mteditflow.policy import Family
from mteditflow.policy.family import width_of

TIME_CHANNELS = 256  # of the embedding of a timestep


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Of one row: the linears of the blocks, their attention, and the rest."""

    linear: float
    attention: float
    other: float

    @property
    def blocks(self) -> float:
        """What the published figures count."""
        return self.linear + self.attention

    @property
    def total(self) -> float:
        return self.blocks + self.other

    @property
    def backward(self) -> float:
        """Of a frozen base: the gradient of each linear's input, and of both products of attention. LoRA's own, a share
        of rank / d, is left out.
        """
        return self.linear + 2 * self.attention

    @property
    def backward_full(self) -> float:
        """Of all weights trained: the gradient of each weight besides."""
        return self.backward + self.linear + self.other


def forward_flops(family: Family, config: Mapping[str, Any], *, text_tokens: int, image_tokens: int) -> ForwardFlops:
    """Count one row through the family's transformer of this config; `image_tokens` are noisy and the condition's."""
    width, num_blocks = width_of(config), config["num_layers"] + (config.get("num_single_layers") or 0)
    channels, tokens = config["in_channels"], text_tokens + image_tokens
    out_channels = config.get("out_channels") or channels
    embeddings = image_tokens * (channels + out_channels * config["patch_size"] ** 2) * width
    embeddings += text_tokens * config["joint_attention_dim"] * width
    per_row = (TIME_CHANNELS + width) * width * (1 + bool(config.get("guidance_embeds"))) + family.row_weights(config)
    return ForwardFlops(
        linear=2 * family.block_weights * width**2 * tokens * num_blocks,
        attention=4 * width * tokens**2 * num_blocks,
        other=2 * (embeddings + per_row),
    )


def mean_flops(count: Callable[[tuple[int, int]], ForwardFlops], config: Config) -> ForwardFlops:
    """Average a count over the sizes that pictures take, (height, width), by their shares."""
    rows = [(count(size), share) for size, share in size_shares(config).items()]
    names = ("linear", "attention", "other")
    return ForwardFlops(**{name: sum(share * getattr(row, name) for row, share in rows) for name in names})


def matmul_ceiling(device: torch.device, dtype: torch.dtype, num_products: int = 10) -> float:
    """TFLOP/s of a square matrix product in this precision on this device, the median of some.

    Large enough to fill a GPU (8192), and on a CPU for a twentieth of a second (512). No random state is touched.
    """
    size = 8192 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    seconds = []
    for _ in range(num_products + 3):  # the first ones warm up
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / median(seconds[3:]) / 1e12
