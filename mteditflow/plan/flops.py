"""Floating-point operations of the families' transformers, from their configs: two per product-and-sum of their matrix
products.

A block of width d has w d^2 weights per token, double (each stream has its own) and single alike, and attends over
all n tokens: 2 w d^2 n + 4 d n^2. w is 12 in FLUX.1 and Qwen-Image (4 of attention, 8 of a feed-forward of 4 d) and 13
in FLUX.2 (9 of a gated one of 3 d). FLUX.1's 57 blocks of 3072: 74.4 TFLOP at 1024 px without a condition. What stands
outside the blocks or acts once per row (embeddings, modulation) is counted apart; norms, activations and rotations are
not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHTS = {"FluxTransformer2DModel": 12, "Flux2Transformer2DModel": 13, "QwenImageTransformer2DModel": 12}
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


def forward_flops(
    config: Mapping[str, Any], *, text_tokens: int, image_tokens: int, family: str = "FluxTransformer2DModel"
) -> ForwardFlops:
    """One row through a transformer of this class, `family`, and config; `image_tokens` counts noisy and condition
    tokens.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    num_double, num_single = config["num_layers"], config.get("num_single_layers") or 0
    channels, tokens = config["in_channels"], text_tokens + image_tokens
    out_channels = config.get("out_channels") or channels
    embeddings = image_tokens * (channels + out_channels * config["patch_size"] ** 2) * width
    embeddings += text_tokens * config["joint_attention_dim"] * width
    per_row = (TIME_CHANNELS + width) * width * (1 + bool(config.get("guidance_embeds")))
    match family:  # modulation of both streams and of a stream, in each block or once for all; of the output
        case "FluxTransformer2DModel":
            per_row += (config["pooled_projection_dim"] + width) * width
            per_row += (num_double * 12 + num_single * 3 + 2) * width**2
        case "Flux2Transformer2DModel":
            per_row += (12 + 3 + 2) * width**2
        case "QwenImageTransformer2DModel":
            per_row += (num_double * 12 + 2) * width**2
    return ForwardFlops(
        linear=2 * WEIGHTS[family] * width**2 * tokens * (num_double + num_single),
        attention=4 * width * tokens**2 * (num_double + num_single),
        other=2 * (embeddings + per_row),
    )
