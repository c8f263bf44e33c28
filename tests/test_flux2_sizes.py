"""FLUX.2 at its true shapes, on the meta device: weights, tokens, adapters, and the schedule of 512 px."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from flux2_parts import qwen_tokenizer

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.flow import step_table
from mteditflow.policy import Policy
from mteditflow.policy.published import FLUX2_DEV, KLEIN_4B, KLEIN_9B
from mteditflow.world.tiny_kontext import flux_scheduler

# The published sizes, and the numbers of weights: those of the 4B fill its published
# bfloat16 file, flux-2-klein-base-4b.safetensors of 7,751,105,712 bytes, up to the header.
FULL = {
    "klein-4B": (KLEIN_4B, 3_875_544_576, 5 * 12 + 20 * 2),
    "klein-9B": (KLEIN_9B, 9_078_581_248, 8 * 12 + 24 * 2),
    "dev": (FLUX2_DEV, 32_223_281_152, 8 * 12 + 48 * 2),
}


def full_policy(name: str, pixels: int) -> Policy:
    """The true shapes, without weights; the text encoder plays no part in them."""
    with torch.device("meta"):
        parts: dict[str, Any] = {"vae": AutoencoderKLFlux2(), "transformer": Flux2Transformer2DModel(**FULL[name][0])}
    parts |= {"scheduler": flux_scheduler(), "tokenizer": qwen_tokenizer(), "text_encoder": None}
    pipeline: Any = Flux2KleinPipeline(**parts)
    config = ModelConfig(path=name, height=pixels, width=pixels, max_text_tokens=512, base="bfloat16")
    lora = LoraConfig(rank=1, alpha=1, targets=())
    return Policy(pipeline, config, lora, seed=0, has_old=False, device=torch.device("meta"))


@pytest.mark.parametrize("name", FULL)
def test_true_sizes(name: str) -> None:
    _, num_weights, num_targets = FULL[name]
    policy = full_policy(name, 512)
    transformer = policy.pipeline.transformer
    own = {key: weight for key, weight in transformer.named_parameters() if not key.endswith((".down", ".up"))}
    assert sum(weight.numel() for weight in own.values()) == num_weights
    assert policy.adapters.num_modules == num_targets
    # Every linear of a block has its adapter, and none outside.
    blocks = {key for key in own if "blocks." in key and "norm" not in key}
    assert {key.removesuffix(".base.weight") for key in blocks} == set(policy.adapters.targets)
    assert (policy.num_tokens, policy.num_condition_tokens, policy.num_channels) == (1024, 1024, 128)
    editor: Any = policy.editor
    assert editor._image_ids.shape == (2048, 4) and editor._text_ids.shape == (512, 4)


def test_tokens_at_1024_px_and_the_schedule_of_512() -> None:
    assert full_policy("klein-4B", 1024).num_tokens == 4096
    policy = full_policy("klein-4B", 512)
    assert compute_empirical_mu(policy.num_tokens, 12) == pytest.approx(1.973519, abs=5e-7)
    table = step_table(policy.sigmas(12), noise_level=0.9).double()
    assert policy.sigmas(12)[-2].item() == pytest.approx(0.395, abs=5e-4)
    assert table[-1, 2].item() == pytest.approx(0.458, abs=5e-4)


def test_file_of_the_4b() -> None:
    assert 0 < 7_751_105_712 - 2 * FULL["klein-4B"][1] < 2**16
