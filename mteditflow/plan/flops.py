"""Floating-point operations of the families' transformers, from their configs: two per product-and-sum of their matrix
products.

A block of width d has w d^2 weights per token (`Family.block_weights`) and attends over all n tokens: 2 w d^2 n +
4 d n^2. FLUX.1's 57 blocks of 3072: 74.4 TFLOP at 1024 px without a condition. What stands outside the blocks or acts
once per row (embeddings, modulation) is counted apart; norms, activations and rotations are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
