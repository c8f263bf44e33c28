"""Sizes of the published models by their names on the hub, so that a run can be planned before anything is downloaded.

Transformers: as in their transformer/config.json; the parameters follow from it (tests count them on the meta device).
Text encoders and autoencoders: parameters of the published weights, in billions.
"""

from dataclasses import dataclass
from typing import Any

FLUX_KONTEXT: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


def _flux2(num_layers: int, num_single: int, num_heads: int, text_width: int, *, has_guidance: bool) -> dict[str, Any]:
    return {
        "in_channels": 128,
        "num_layers": num_layers,
        "num_single_layers": num_single,
        "attention_head_dim": 128,
        "num_attention_heads": num_heads,
        "joint_attention_dim": text_width,
        "guidance_embeds": has_guidance,
    }


KLEIN_4B = _flux2(5, 20, 24, 7680, has_guidance=False)
KLEIN_9B = _flux2(8, 24, 32, 12288, has_guidance=False)
FLUX2_DEV = _flux2(8, 48, 48, 15360, has_guidance=True)
QWEN_IMAGE_EDIT: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published pipeline: class and config of its transformer, billions of parameters of the other parts."""

    transformer_class: str
    transformer: dict[str, Any]
    text_encoders: float
    autoencoder: float


def _of_flux2(transformer: dict[str, Any], text_encoders: float) -> Published:
    return Published(
        transformer_class="Flux2Transformer2DModel", transformer=transformer, text_encoders=text_encoders,
        autoencoder=0.084,
    )  # fmt: skip


QWEN = Published(
    transformer_class="QwenImageTransformer2DModel", transformer=QWEN_IMAGE_EDIT, text_encoders=8.292, autoencoder=0.127
)

MODELS = {
    "black-forest-labs/FLUX.1-Kontext-dev": Published(
        transformer_class="FluxTransformer2DModel", transformer=FLUX_KONTEXT, text_encoders=4.885, autoencoder=0.084
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": _of_flux2(KLEIN_4B, 4.02),  # Qwen3-4B
    "black-forest-labs/FLUX.2-klein-4B": _of_flux2(KLEIN_4B, 4.02),
    "black-forest-labs/FLUX.2-klein-base-9B": _of_flux2(KLEIN_9B, 8.19),  # Qwen3-8B
    "black-forest-labs/FLUX.2-klein-9B": _of_flux2(KLEIN_9B, 8.19),
    "black-forest-labs/FLUX.2-dev": _of_flux2(FLUX2_DEV, 24.01),  # Mistral-Small-3.2-24B
    "Qwen/Qwen-Image-Edit": QWEN,
    "Qwen/Qwen-Image-Edit-2509": QWEN,
    "Qwen/Qwen-Image-Edit-2511": QWEN,
}

JUDGES = {  # billions of parameters
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3-VL-32B-Instruct": 33.4,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
}
