"""Sizes of the published models by their names on the hub, so that a run can be planned before anything is downloaded.

Transformers: as in their transformer/config.json; the parameters follow from it (tests count them on the meta device).
Text encoders and autoencoders: parameters of the published weights, in billions.
"""

from dataclasses import dataclass, field, replace
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
        "patch_size": 1,
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
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


FLUX_AUTOENCODER: dict[str, Any] = {  # as in FLUX.1's vae/config.json
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

RANDOM = "random"
"""The `model.path` of FLUX.1-Kontext-dev's shape with random weights, for profiles."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published pipeline: its class, its transformer's config, billions of parameters of the other parts, and its
    autoencoder's class with what of its config is not diffusers' default.
    """

    pipeline: str
    transformer: dict[str, Any]
    text_encoders: float
    autoencoder: float = 0.084
    autoencoder_class: str = "AutoencoderKLFlux2"
    autoencoder_config: dict[str, Any] = field(default_factory=dict)


KONTEXT = Published(
    pipeline="FluxKontextPipeline", transformer=FLUX_KONTEXT, text_encoders=4.885,
    autoencoder_class="AutoencoderKL", autoencoder_config=FLUX_AUTOENCODER,
)  # fmt: skip
BASE_4B = Published(pipeline="Flux2KleinPipeline", transformer=KLEIN_4B, text_encoders=4.02)  # Qwen3-4B
BASE_9B = Published(pipeline="Flux2KleinPipeline", transformer=KLEIN_9B, text_encoders=8.19)  # Qwen3-8B
DEV = Published(pipeline="Flux2Pipeline", transformer=FLUX2_DEV, text_encoders=24.01)  # Mistral-Small-3.2-24B
QWEN = Published(
    pipeline="QwenImageEditPlusPipeline", transformer=QWEN_IMAGE_EDIT, text_encoders=8.292, autoencoder=0.127,
    autoencoder_class="AutoencoderKLQwenImage",
)  # fmt: skip

MODELS = {
    "black-forest-labs/FLUX.1-Kontext-dev": KONTEXT,
    "black-forest-labs/FLUX.2-klein-base-4B": BASE_4B,
    "black-forest-labs/FLUX.2-klein-4B": BASE_4B,
    "black-forest-labs/FLUX.2-klein-base-9B": BASE_9B,
    "black-forest-labs/FLUX.2-klein-9B": BASE_9B,
    "black-forest-labs/FLUX.2-dev": DEV,
    "Qwen/Qwen-Image-Edit": replace(QWEN, pipeline="QwenImageEditPipeline"),
    "Qwen/Qwen-Image-Edit-2509": QWEN,
    "Qwen/Qwen-Image-Edit-2511": replace(QWEN, transformer=QWEN_IMAGE_EDIT | {"zero_cond_t": True}),
    RANDOM: KONTEXT,
}

JUDGES = {  # billions of parameters
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3-VL-32B-Instruct": 33.4,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
}
