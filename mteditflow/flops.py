"""Floating-point operations of a Flux transformer, from its config: two per product-and-sum of its matrix products.

A block of width d has 12 d^2 weights per token, double (each stream has its own) and single alike, and attends over
all n tokens: 24 d^2 n + 4 d n^2. FLUX.1's 57 blocks of 3072: 74.4 TFLOP at 1024 px without a condition. What stands
outside the blocks or acts once per row (embeddings, modulation) is counted apart; norms, activations and rotations are
not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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


def forward_flops(config: Mapping[str, Any], *, text_tokens: int, image_tokens: int) -> ForwardFlops:
    """One row through a FluxTransformer2DModel of this config; `image_tokens` counts noisy and condition tokens."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    num_double, num_single = config["num_layers"], config["num_single_layers"]
    channels, tokens = config["in_channels"], text_tokens + image_tokens
    out_channels = config.get("out_channels") or channels
    embeddings = image_tokens * (channels + out_channels * config["patch_size"] ** 2) * width
    embeddings += text_tokens * config["joint_attention_dim"] * width
    # timestep, guidance: 256 -> d -> d; pooled text -> d -> d; modulation of both streams, of a stream, of the output
    per_row = (1 + bool(config["guidance_embeds"])) * (256 + width) * width
    per_row += (config["pooled_projection_dim"] + width) * width
    per_row += (num_double * 12 + num_single * 3 + 2) * width**2
    return ForwardFlops(
        linear=24 * width**2 * tokens * (num_double + num_single),
        attention=4 * width * tokens**2 * (num_double + num_single),
        other=2 * (embeddings + per_row),
    )
