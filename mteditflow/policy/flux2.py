"""FLUX.2 as a policy: FLUX.2-klein-base and the distilled klein (Flux2KleinPipeline), FLUX.2-dev (Flux2Pipeline).

What the stock pipelines compute, cut at the places where a trainer needs it: text, latents, position ids and the shift
of the schedule are made by their own methods, and a deterministic rollout here is a stock generation, bit for bit in
float32 (tests/test_flux2.py). In bfloat16 the stock pipeline rounds the latents, and what guidance combines, after
every step; here both stay float32.

klein-base takes true classifier-free guidance against the empty prompt, which is encoded once and kept here: a row of
its own for each trajectory would double the memory of the text. klein is distilled to few steps and takes none.
FLUX.2-dev has its guidance embedded.

Unlike FLUX.1's, the schedule depends on the number of steps and not on that of the tokens alone, so that training and
evaluation at different numbers of steps see different noise levels; and its last step is large.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu, format_input
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from einops import rearrange
from torch import Tensor

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.policy.full_weights import build_adapters
from mteditflow.policy.pipelines import DTYPES, Prompts, encoders_on, in_chunks, opened, resized, token_grid
from mteditflow.types import Condition

TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.{layer}" for name in ("ff", "ff_context") for layer in ("linear_in", "linear_out")),
    *(f"attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")),  # single blocks
)

# What `sigmas` assumes; base_shift and max_shift play no part, since the pipeline computes mu itself.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


class Flux2Policy:
    """See `mteditflow.policy.Policy`. The text of a condition: 'text' (N, T, E), three layers of the text encoder."""

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
        loaded: DiffusionPipeline | None = None,
    ) -> None:
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.config = config
        pipeline: Any = opened(DiffusionPipeline, path, config, device, SCHEDULER, loaded)
        _check_text_tokens(pipeline, config, path)
        self.pipeline = pipeline
        self._has_embedded_guidance = isinstance(pipeline, Flux2Pipeline)
        self.is_distilled: bool = bool(pipeline.config.get("is_distilled", False))
        self.has_cfg = not (self._has_embedded_guidance or self.is_distilled)
        self._grid, self._condition_grid = token_grid(config, 2 * pipeline.vae_scale_factor, path)
        self.num_tokens = self._grid[0] * self._grid[1]
        self.num_condition_tokens = self._condition_grid[0] * self._condition_grid[1]
        self.num_channels: int = pipeline.transformer.config.in_channels
        self._image_ids = self._position_ids()  # (L + L', 4)
        self._text_ids = pipeline._prepare_text_ids(torch.empty(1, config.max_text_tokens, 1))[0].to(device)  # (T, 4)
        self._prompts = Prompts(self._encode_prompt)
        self._unconditional: Tensor | None = None  # (T, E)
        self.adapters = build_adapters(pipeline.transformer, lora, TARGETS, seed=seed, has_old=has_old)

    # Text and images

    @torch.no_grad()
    def encode_text(self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool) -> dict[str, Tensor]:
        """Text embeddings (N, T, E), in the base's dtype; the images play no part.

        has_cfg: the empty prompt is encoded too, unless it was before.
        """
        assert self.has_cfg or not has_cfg, "the config allows no guidance here"
        if has_cfg and self._unconditional is None:
            self._unconditional = self._encode_prompt("")["text"]
        return self._prompts(instructions, self.device)

    def _encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        with encoders_on(self.pipeline, self.device):
            text, _ = self.pipeline.encode_prompt(
                prompt, device=self.device, max_sequence_length=self.config.max_text_tokens
            )
        return {"text": text[0]}

    @torch.no_grad()
    def encode_image(self, images: Tensor, microbatch_size: int = 16) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to clean latents (N, L', C), float32: the mode of the VAE, in patches of
        2 x 2, normalised by the statistics of its batch norm and packed. Always `microbatch_size` rows at a time: bits
        do not depend on N.
        """

        def encode(rows: Tensor) -> Tensor:
            pictures = resized(rows.to(self.device), self.config.condition_size).to(self.dtype)
            latents = self.pipeline._encode_vae_image(image=pictures, generator=None)  # the mode needs no generator
            return self.pipeline._pack_latents(latents).float()

        return in_chunks(encode, images, microbatch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, microbatch_size: int = 16) -> Tensor:
        """Latents (N, L, C) to images (N, 3, H, W) clamped to [-1, 1], float32, not rounded.

        Always `microbatch_size` rows at a time: bits do not depend on N.
        """
        assert latents.shape[1:] == (self.num_tokens, self.num_channels), latents.shape
        vae = self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(self.dtype)  # (1, C, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(self.dtype)

        def decode(rows: Tensor) -> Tensor:
            # `_unpack_latents_with_ids` by another way: the ids count rows and columns in order, and Flux2Pipeline's
            # would sync with the host for each row.
            unpacked = rearrange(rows.to(self.dtype), "n (h w) c -> n c h w", h=self._grid[0])
            unpacked = self.pipeline._unpatchify_latents(unpacked * std + mean)
            return vae.decode(unpacked, return_dict=False)[0].float().clamp(-1, 1)

        return in_chunks(decode, latents, microbatch_size)

    # Velocity

    def _position_ids(self) -> Tensor:
        """Ids (L + L', 4) of the noisy tokens, then of the condition's, whose first column is 10."""
        noisy, condition = (torch.empty(1, 1, *grid) for grid in (self._grid, self._condition_grid))
        ids = [self.pipeline._prepare_latent_ids(noisy)[0], self.pipeline._prepare_image_ids([condition])[0]]
        return torch.cat(ids).to(self.device)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), under the selected adapter and
        with the condition's guidance: without + cfg_scale (with - without) the text.
        """
        velocity = self._velocity(latents, sigma, condition.image, condition.text["text"])
        if condition.cfg_scale == 1:
            return velocity
        assert self._unconditional is not None, "encode_text was not asked for guidance"
        # contiguous, as the stock pipeline's: a stride of 0 would be another matrix product
        text = self._unconditional.repeat(len(latents), 1, 1)
        without = self._velocity(latents, sigma, condition.image, text)
        return without + condition.cfg_scale * (velocity - without)

    def _velocity(self, latents: Tensor, sigma: Tensor, image: Tensor, text: Tensor) -> Tensor:
        num_tokens = latents.shape[1]
        assert num_tokens + image.shape[1] == len(self._image_ids), (latents.shape, image.shape)
        assert text.shape[1] == len(self._text_ids), text.shape
        guidance = None
        if self._has_embedded_guidance:
            scale = torch.full([1], self.config.guidance_scale, device=self.device, dtype=torch.float32)
            guidance = scale.expand(len(latents))
        # rounded to the base's dtype on this scale, as the pipeline does
        timestep = (sigma.float() * 1000).to(self.dtype)
        predicted = self.adapters.transformer(
            hidden_states=torch.cat([latents.to(self.dtype), image.to(self.dtype)], dim=1),
            timestep=timestep / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return predicted[:, :num_tokens].float().contiguous()

    def sigmas(self, num_steps: int) -> Tensor:
        """FLUX.2's shifted schedule of noise levels (S+1,), float64 on the host; mu depends on L and on S."""
        mu = compute_empirical_mu(self.num_tokens, num_steps)
        # numpy, as in the pipeline: torch divides a number by a tensor in two roundings, and the first would not be 1
        shifted = self.pipeline.scheduler.time_shift(mu, 1.0, np.linspace(1, 1 / num_steps, num_steps))
        return torch.from_numpy(np.append(shifted, 0.0))


def _check_text_tokens(pipeline: Any, config: ModelConfig, path: str) -> None:
    """The instruction stands within a chat template, from whose end the pipeline cuts what is too long."""
    if isinstance(pipeline, Flux2Pipeline):
        encoded = pipeline.tokenizer.apply_chat_template(
            format_input([""], pipeline.system_message), tokenize=True, return_dict=True
        )
    else:
        encoded = pipeline.tokenizer.apply_chat_template(
            [[{"role": "user", "content": ""}]],
            add_generation_prompt=True,
            enable_thinking=False,
            tokenize=True,
            return_dict=True,
        )
    num_tokens = len(encoded["input_ids"][0])
    if config.max_text_tokens <= num_tokens:
        raise ValueError(
            f"model.max_text_tokens is {config.max_text_tokens}: the chat template of {path!r} takes {num_tokens} "
            f"tokens itself; take {pipeline.tokenizer_max_length}, as the stock pipeline does"
        )
