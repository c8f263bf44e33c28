"""FLUX.1-Kontext-dev at its true shape with random weights, made on the device: for profiles, without a download.

What the base quantises is made and quantised linear by linear, so that it never stands whole on the device, as when
weights are loaded.
"""

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mteditflow.config import Config, ModelConfig
from mteditflow.distributed import local_device
from mteditflow.plan.dry_run import free_gib
from mteditflow.plan.memory import GIB
from mteditflow.policy import DTYPES, Policy
from mteditflow.policy.published import FLUX_AUTOENCODER, FLUX_KONTEXT, RANDOM
from mteditflow.transformer.base import Kind, QuantisedLinear, check_float8, linears_to_quantise, num_bytes
from mteditflow.world.tiny_kontext import clip_tokenizer, flux_scheduler, t5_tokenizer

WORDS = ("make", "the", "red", "remove", "add", "a")  # what an instruction says does not matter here


def _makers(max_text_tokens: int) -> dict[str, Callable[[], nn.Module]]:
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=max(77, max_text_tokens + 1), eos_token_id=len(WORDS) + 3,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return {
        "transformer": lambda: FluxTransformer2DModel(**FLUX_KONTEXT),
        "vae": lambda: AutoencoderKL(**FLUX_AUTOENCODER),
        "text_encoder": lambda: CLIPTextModel(clip),
        "text_encoder_2": lambda: T5EncoderModel(t5),
    }


def _quantised_parts(model: ModelConfig) -> dict[str, Kind]:
    """Parts of the pipeline that the config quantises; CLIP, a fortieth of T5, is quantised after it was made."""
    parts: dict[str, Kind] = {"transformer": model.quantised} if model.quantised else {}
    if model.text_encoder == "int8":
        parts["text_encoder_2"] = "int8"
    return parts


def num_pipeline_bytes(model: ModelConfig) -> int:
    """Bytes of the whole pipeline's weights as the config has them; nothing is allocated."""
    quantised = _quantised_parts(model)
    with torch.device("meta"):
        return sum(num_bytes(make(), quantised.get(name, model.dtype)) for name, make in _makers(77).items())


def _make_quantised(make: Callable[[], nn.Module], kind: Kind, device: torch.device) -> nn.Module:
    """Make a model on the device, of which the linears that are quantised come one by one."""
    with torch.device("meta"):
        model = make()
    for name, (linear, stored) in linears_to_quantise(model, kind).items():
        with device:
            drawn = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantisedLinear(drawn, stored, device))
    for module in model.modules():
        if any(weight.is_meta for weight in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            if isinstance(module, nn.Linear | nn.Embedding):
                module.reset_parameters()
            else:  # a norm's scale
                for weight in module.parameters(recurse=False):
                    nn.init.ones_(weight)
    return model


def random_kontext(config: Config, *, has_old: bool) -> Policy:
    """Make the policy. ValueError where the weights alone do not fit into what is free."""
    model, device = config.model, local_device()
    check_float8(model.base, device)
    needed, free = num_pipeline_bytes(model) / GIB, free_gib()
    if needed > free:
        raise ValueError(
            f"model.path is {RANDOM!r}: FLUX.1-Kontext's weights take {needed:.1f} GiB as {model.base}, but only "
            f"{free:.1f} GiB are free: take another machine, or model.path drifting"
        )
    before, quantised, parts = torch.get_default_dtype(), _quantised_parts(model), {}
    torch.set_default_dtype(DTYPES[model.dtype])
    try:
        for name, make in _makers(model.max_text_tokens).items():
            with device:
                parts[name] = _make_quantised(make, quantised[name], device) if name in quantised else make()
    finally:
        torch.set_default_dtype(before)
    pipeline = FluxKontextPipeline(
        scheduler=flux_scheduler(),
        tokenizer=clip_tokenizer(WORDS, min(model.max_text_tokens + 1, 77)),  # pyright: ignore[reportArgumentType]
        tokenizer_2=t5_tokenizer(WORDS, model.max_text_tokens),  # pyright: ignore[reportArgumentType]
        **parts,  # pyright: ignore[reportArgumentType]
    )
    return Policy(pipeline, model, config.lora, seed=config.run.seed, has_old=has_old, device=device)
