"""FLUX.1-Kontext: what the stock FluxKontextPipeline computes, cut at the places where a trainer needs it.

Text, latents, position ids, guidance and timestep are made by the pipeline's own methods or in its own order of
operations, so that a deterministic rollout here is a stock generation (tests/test_policy.py says to how many bits). The
condition has the configured size, which the stock pipeline keeps only with `_auto_resize=False`.

Precision: the base runs in the config's dtype. Trained weights, latents, velocities and images are float32; text
embeddings, which are only ever an input of the base, have its dtype.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mteditflow.flow import sigma_schedule
from mteditflow.policy.encoding import Prompts, resize
from mteditflow.policy.family import ATTENTION, FLOW_MATCHING, Base, Family, Saved, Stream, gelu_streams, width_of
from mteditflow.policy.lora_names import FLUX1
from mteditflow.types import Condition


class FluxKontext:
    """See `family.Editor`. The text of a condition: 'text' (N, T, E) and 'pooled' (N, E')."""

    has_cfg = False
    is_distilled = False

    def __init__(self, base: Base) -> None:
        self.base, self.pipeline = base, base.pipeline
        self._image_ids = self._position_ids()  # (L + L', 3)
        self._text_ids = torch.zeros(base.config.max_text_tokens, 3, device=base.device, dtype=base.dtype)  # (T, 3)
        self._prompts = Prompts(base, ("text", "pooled"))

    def encode_text(
        self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool, references: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Text embeddings (N, T, E) and pooled ones (N, E'), in the base's dtype; the images play no part."""
        return self._prompts(instructions)

    def encode_image(self, images: Tensor) -> Tensor:
        """The mode of the VAE, shifted, scaled and packed."""
        pictures = resize(images.to(self.base.device), self.base.config.condition_size).to(self.base.dtype)
        latents = self.pipeline._encode_vae_image(image=pictures, generator=None)  # the mode uses no generator
        return self.pipeline._pack_latents(latents, *latents.shape)

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents unpacked, unscaled and shifted back."""
        vae, config = self.pipeline.vae, self.base.config
        unpacked = self.pipeline._unpack_latents(latents, config.height, config.width, self.pipeline.vae_scale_factor)
        unpacked = (unpacked / vae.config.scaling_factor) + vae.config.shift_factor
        return vae.decode(unpacked, return_dict=False)[0]

    def _position_ids(self) -> Tensor:
        """Ids (L + L', 3) of the noisy tokens, then of the condition's, whose first column is 1."""
        base = self.base
        noisy, condition = (
            self.pipeline._prepare_latent_image_ids(1, *grid, base.device, base.dtype)
            for grid in (base.grid, base.condition_grid)
        )
        condition[:, 0] = 1
        return torch.cat([noisy, condition])

    def velocity(self, transformer: Any, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,)."""
        has_guidance = self.pipeline.transformer.config.guidance_embeds
        inputs = {
            "guidance": self.base.embedded_guidance(latents) if has_guidance else None,
            "pooled_projections": condition.text["pooled"],
            "encoder_hidden_states": condition.text["text"],
            "txt_ids": self._text_ids,
            "img_ids": self._image_ids,
        }
        return self.base.predict(transformer, latents, sigma, condition.image, inputs)

    def sigmas(self, num_steps: int) -> Tensor:
        """FLUX's shifted schedule of noise levels (S+1,), float64 on the host."""
        rows, columns = self.base.grid
        return sigma_schedule(num_steps, rows * columns)


def _row_weights(transformer: Mapping[str, Any]) -> int:
    """Of pooled text; of modulation in each block, of both streams or of the one, and of the output."""
    width = width_of(transformer)
    modulation = 12 * transformer["num_layers"] + 3 * (transformer.get("num_single_layers") or 0) + 2
    return (transformer["pooled_projection_dim"] + width) * width + modulation * width**2


FAMILY = Family(
    pipelines=("FluxKontextPipeline",),
    editor=FluxKontext,
    transformer="FluxTransformer2DModel",
    targets=(
        *ATTENTION,
        *(f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
        "proj_mlp",
    ),
    scheduler=FLOW_MATCHING
    | {
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "shift_terminal": None,
    },
    saved=Saved(
        double=gelu_streams("ff", "ff_context"),
        single=Stream(
            needed={
                "input of LayerNorm": 1,
                "q, k before their norms": 2,
                "q, k, v": 3,
                "output of attention": 1,
                "input of GELU": 4,
            },
            inputs={("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): 1, ("proj_out",): 5},
            of_weights={"output of LayerNorm, for the scale": 1, "output of the block, for the gate": 1},
        ),
        forward=17.1,
        beyond=11.0,
        again=11.1,
    ),
    picture_numbers=768,
    block_weights=12,  # 4 of attention, 8 of a feed-forward of 4 d
    row_weights=_row_weights,
    # T5's: what CLIP makes of the beginning is one vector for all of it
    count_tokens=lambda pipeline: lambda text: len(pipeline.tokenizer_2(text, verbose=False)["input_ids"]),
    stock_arguments=lambda _, model: {
        "guidance_scale": model.guidance_scale,
        "max_area": model.height * model.width,
        "_auto_resize": False,
    },
    note="Without `_auto_resize=False` the pipeline resizes the picture to about a megapixel",
    originals=FLUX1,
    comfyui=(  # comfy/utils.py, `flux_to_diffusers`: q, k and v are thirds of a joint weight, proj_mlp the rest of one
        rf"transformer_blocks\.\d+\.({'|'.join(ATTENTION)}|norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))",
        r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
        r"x_embedder|context_embedder|proj_out|norm_out\.linear",
        r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]",
    ),
)
