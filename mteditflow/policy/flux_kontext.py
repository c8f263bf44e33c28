"""FLUX.1-Kontext as a policy: what the stock FluxKontextPipeline computes, cut at the places where a trainer needs it.

Text, latents, position ids, guidance and timestep are made by the pipeline's own methods or in its own order of
operations, so that a deterministic rollout here is a stock generation (tests/test_policy.py says to how many bits). The
condition has the configured size, which the stock pipeline keeps only with `_auto_resize=False`.

Precision: the base runs in the config's dtype. Trained weights, latents, velocities and images are float32; text
embeddings, which are only ever an input of the base, have its dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from torch import Tensor

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.flow import sigma_schedule
from mteditflow.policy.full_weights import build_adapters
from mteditflow.policy.pipelines import DTYPES, Prompts, encoders_on, in_chunks, opened, resized, token_grid
from mteditflow.types import Condition

TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
    "proj_mlp",
)

# What `flow.sigma_schedule` assumes. A pipeline with another scheduler would be trained on noise levels at which it
# does not sample.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


class FluxKontextPolicy:
    """See `mteditflow.policy.Policy`. The text of a condition: 'text' (N, T, E) and 'pooled' (N, E')."""

    has_cfg = False
    is_distilled = False
    is_text_of_image = False

    def __init__(
        self,
        path: str,
        config: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        has_old: bool,
        device: torch.device,
        loaded: FluxKontextPipeline | None = None,
    ) -> None:
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.config = config
        pipeline: Any = opened(FluxKontextPipeline, path, config, device, SCHEDULER, loaded)
        self.pipeline = pipeline
        self._grid, self._condition_grid = token_grid(config, 2 * pipeline.vae_scale_factor, path)
        self.num_tokens = self._grid[0] * self._grid[1]
        self.num_condition_tokens = self._condition_grid[0] * self._condition_grid[1]
        self.num_channels: int = pipeline.transformer.config.in_channels
        self._image_ids = self._position_ids()  # (L + L', 3)
        self._text_ids = torch.zeros(config.max_text_tokens, 3, device=device, dtype=self.dtype)  # (T, 3)
        self._prompts = Prompts(self._encode_prompt)
        self.adapters = build_adapters(pipeline.transformer, lora, TARGETS, seed=seed, has_old=has_old)

    # Text and images

    @torch.no_grad()
    def encode_text(self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool) -> dict[str, Tensor]:
        """Text embeddings (N, T, E) and pooled ones (N, E'), in the base's dtype; the images play no part."""
        assert not has_cfg, "guidance is embedded: the config allows no other"
        return self._prompts(instructions, self.device)

    def _encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        with encoders_on(self.pipeline, self.device):
            text, pooled, _ = self.pipeline.encode_prompt(
                prompt, device=self.device, max_sequence_length=self.config.max_text_tokens
            )
        return {"text": text[0], "pooled": pooled[0]}

    @torch.no_grad()
    def encode_image(self, images: Tensor, microbatch_size: int = 16) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to clean latents (N, L', C), float32: the mode of the VAE, shifted, scaled
        and packed. Always `microbatch_size` rows at a time: bits do not depend on N.
        """

        def encode(rows: Tensor) -> Tensor:
            # The pipeline's own: (mode - shift) * scale; generator is unused by the mode.
            pictures = resized(rows.to(self.device), self.config.condition_size).to(self.dtype)
            latents = self.pipeline._encode_vae_image(image=pictures, generator=None)
            return self.pipeline._pack_latents(latents, *latents.shape).float()

        return in_chunks(encode, images, microbatch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, microbatch_size: int = 16) -> Tensor:
        """Latents (N, L, C) to images (N, 3, H, W) clamped to [-1, 1], float32, not rounded.

        Always `microbatch_size` rows at a time: bits do not depend on N.
        """
        assert latents.shape[1:] == (self.num_tokens, self.num_channels), latents.shape
        vae, size = self.pipeline.vae, (self.config.height, self.config.width)

        def decode(rows: Tensor) -> Tensor:
            unpacked = self.pipeline._unpack_latents(rows.to(self.dtype), *size, self.pipeline.vae_scale_factor)
            unpacked = (unpacked / vae.config.scaling_factor) + vae.config.shift_factor
            return vae.decode(unpacked, return_dict=False)[0].float().clamp(-1, 1)

        return in_chunks(decode, latents, microbatch_size)

    # Velocity

    def _position_ids(self) -> Tensor:
        """Ids (L + L', 3) of the noisy tokens, then of the condition's, whose first column is 1."""
        noisy, condition = (
            self.pipeline._prepare_latent_image_ids(1, *grid, self.device, self.dtype)
            for grid in (self._grid, self._condition_grid)
        )
        condition[:, 0] = 1
        return torch.cat([noisy, condition])

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), under the selected adapter."""
        batch, num_tokens = latents.shape[:2]
        assert num_tokens + condition.image.shape[1] == len(self._image_ids), (latents.shape, condition.image.shape)
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            scale = torch.full([1], self.config.guidance_scale, device=self.device, dtype=torch.float32)
            guidance = scale.expand(batch)
        # rounded to the base's dtype on this scale, as the pipeline does
        timestep = (sigma.float() * 1000).to(self.dtype)
        predicted = self.adapters.transformer(
            hidden_states=torch.cat([latents.to(self.dtype), condition.image.to(self.dtype)], dim=1),
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=condition.text["pooled"],
            encoder_hidden_states=condition.text["text"],
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return predicted[:, :num_tokens].float().contiguous()

    def sigmas(self, num_steps: int) -> Tensor:
        """FLUX's shifted schedule of noise levels (S+1,), float64 on the host."""
        return sigma_schedule(num_steps, self.num_tokens)
