"""The Qwen-Image-Edit policy against the stock pipelines, on random-weight editors in the true format."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from mteditflow.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from mteditflow.distributed import Ranks
from mteditflow.export import save_lora
from mteditflow.flow import step_table
from mteditflow.policy import build_policy, qwen_image_edit
from mteditflow.policy.adapters import bound_modules
from mteditflow.policy.qwen_image_edit import TARGETS, QwenImageEditPolicy, schedule
from mteditflow.rollout import roll_out, sample_rollout, to_8_bit
from mteditflow.types import Condition, EditTask
from mteditflow.update import update

NUM_STEPS = 4
LORA = LoraConfig(rank=4, alpha=12, targets=())
PROMPTS = ("make the red square blue", "remove the big blue circle", "add a blue circle")  # of 5, 5 and 4 tokens
SQUARE, WIDE, LARGE = (64, 64), (64, 96), (128, 192)  # WIDE is not square: a swap would show
# Masked padding leaves the exact result as it is and moves the order of float32 sums: of 1e3 operations in sequence,
# each of relative error 2^-24 at values of at most 4, and guidance of 4 takes 4 + 3 parts of it: 7 * 1e3 * 2^-24 * 4.
PADDING_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        tiny_qwen.without_torchvision(patch)
        root = tmp_path_factory.mktemp("qwen")
        yield {variant: tiny_qwen.save(variant, PROMPTS, root / variant) for variant in tiny_qwen.VARIANTS}


def config_of(
    folder: Path, size: tuple[int, int] = WIDE, condition: tuple[int, int] = (0, 0), **fields: Any
) -> ModelConfig:
    """By default 5 tokens, those of the first two prompts: no padding. The vision input is the first pipeline's: the
    condition's size.
    """
    pixels = (condition[0] or size[0]) * (condition[1] or size[1])
    given = {"vision_pixels": pixels, "max_text_tokens": 5, "cfg_scale": 4.0} | fields
    return ModelConfig(
        path=str(folder), height=size[0], width=size[1], condition_height=condition[0], condition_width=condition[1],
        **given,
    )  # fmt: skip


def build(config: ModelConfig, objective: str = "nft") -> QwenImageEditPolicy:
    policy = build_policy(config, LORA, seed=3, objective=objective)
    assert isinstance(policy, QwenImageEditPolicy)
    return policy


def stock(config: ModelConfig, patch: pytest.MonkeyPatch) -> Any:
    """The stock pipeline, with the constants that fix the sizes of its inputs replaced by those of the config."""
    height, width = config.condition_size
    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (width, height, None))
    patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", height * width)
    patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", config.vision_pixels)
    pipeline: Any = DiffusionPipeline.from_pretrained(config.path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, config: ModelConfig, prompt: Any, source: Tensor, latents: Tensor, **text: Any) -> Tensor:
    """The stock pipeline's image (1, 3, H, W) in [0, 1] of a source (1, 3, H, W) in [-1, 1]."""
    has_negative = config.cfg_scale > 1 and not text
    return pipeline(
        image=picture(source),
        prompt=prompt,
        negative_prompt=" " if has_negative else None,
        true_cfg_scale=config.cfg_scale,
        height=config.height,
        width=config.width,
        num_inference_steps=NUM_STEPS,
        latents=latents,
        output_type="pt",
        **text,
    ).images


def picture(source: Tensor) -> Image.Image:
    return Image.fromarray(((source[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(num: int, size: tuple[int, int] = WIDE) -> Tensor:
    coarse = torch.nn.functional.interpolate(draw(num, 3, 8, 8, seed=5), size, mode="bilinear")
    return to_8_bit(coarse.clamp(-1, 1))


def noise(policy: QwenImageEditPolicy, num: int, seed: int = 0) -> Tensor:
    return draw(num, policy.num_tokens, policy.num_channels, seed=seed)


def condition_on(policy: QwenImageEditPolicy, prompts: list[str], source: Tensor, rows: int = 16) -> Condition:
    scale = policy.config.cfg_scale
    text = policy.encode_text(prompts, source, has_cfg=scale != 1)
    return Condition(text=text, image=policy.encode_image(source, microbatch_size=rows), cfg_scale=scale)


def perturb(policy: QwenImageEditPolicy, name: Any, seed: int = 1) -> None:
    state = policy.adapters.state(name)
    changed = {key: own + 0.2 * draw(*own.shape, seed=seed + i) for i, (key, own) in enumerate(state.items())}
    policy.adapters.load(name, changed)


@torch.no_grad()
def rollout(policy: QwenImageEditPolicy, condition: Condition, latents: Tensor, sigmas: Tensor) -> Tensor:
    """An ODE rollout of one turn: images (N, 3, H, W) in [0, 1]."""
    for sigma, sigma_next in pairwise(sigmas):
        velocity = policy.velocity(latents, sigma.expand(len(latents)), condition)
        latents = latents + velocity * (sigma_next - sigma)
    return policy.decode(latents, microbatch_size=len(latents)) * 0.5 + 0.5


SIZES = [(SQUARE, (0, 0)), (SQUARE, (96, 96)), (WIDE, (0, 0)), (WIDE, LARGE)]


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize(("size", "condition"), SIZES)
@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
def test_ode_rollout_is_a_stock_generation_bit_for_bit(
    folders: dict[str, Path], variant: str, size: Any, condition: Any, cfg_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scheduler's own float32 sigmas and a text without padding: equal bits."""
    config = config_of(folders[variant], size, condition, cfg_scale=cfg_scale)
    pipeline, policy, source = stock(config, monkeypatch), build(config), images(1, size)
    latents = noise(policy, 1)
    expected = generate(pipeline, config, PROMPTS[0], source, latents)
    own = condition_on(policy, [PROMPTS[0]], source, rows=1)
    assert own.text["mask"].all()
    result = rollout(policy, own, latents, pipeline.scheduler.sigmas)
    print("delta", (result - expected).abs().max())
    assert torch.equal(result, expected)
