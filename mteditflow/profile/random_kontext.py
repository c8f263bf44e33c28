"""FLUX.1-Kontext-dev at its true shape with random weights, made on the device: for profiles, without a download."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mteditflow.config import Config
from mteditflow.distributed import local_device
from mteditflow.plan.dry_run import free_gib
from mteditflow.plan.memory import GIB
from mteditflow.policy import DTYPES, Policy
from mteditflow.policy.published import FLUX_KONTEXT, RANDOM
from mteditflow.world.tiny_kontext import clip_tokenizer, flux_scheduler, t5_tokenizer

# As in the published vae/config.json.
VAE: dict[str, Any] = {
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
WORDS = ("make", "the", "red", "remove", "add", "a")  # what an instruction says does not matter here


def _parts(max_text_tokens: int) -> dict[str, nn.Module]:
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=max(77, max_text_tokens + 1), eos_token_id=len(WORDS) + 3,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return {
        "transformer": FluxTransformer2DModel(**FLUX_KONTEXT),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }


def num_weights() -> int:
    """Count the weights of the whole pipeline; nothing is allocated."""
    with torch.device("meta"):
        return sum(weight.numel() for part in _parts(77).values() for weight in part.parameters())


def random_kontext(config: Config, *, has_old: bool) -> Policy:
    """Make the policy. ValueError where the weights alone do not fit into what is free."""
    model, device, dtype = config.model, local_device(), DTYPES[config.model.dtype]
    needed, free = num_weights() * dtype.itemsize / GIB, free_gib()
    if needed > free:
        raise ValueError(
            f"model.path is {RANDOM!r}: FLUX.1-Kontext's weights take {needed:.1f} GiB as {model.dtype}, but only "
            f"{free:.1f} GiB are free: take another machine, or model.path embedded"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts = _parts(model.max_text_tokens)
    finally:
        torch.set_default_dtype(before)
    pipeline = FluxKontextPipeline(
        scheduler=flux_scheduler(),
        tokenizer=clip_tokenizer(WORDS, min(model.max_text_tokens + 1, 77)),  # pyright: ignore[reportArgumentType]
        tokenizer_2=t5_tokenizer(WORDS, model.max_text_tokens),  # pyright: ignore[reportArgumentType]
        **parts,  # pyright: ignore[reportArgumentType]
    )
    return Policy(pipeline, model, config.lora, seed=config.run.seed, has_old=has_old, device=device)
