"""The Qwen-Image-Edit policy against the stock pipelines, on random-weight editors in the true format."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from tiny_qwen import (
    LARGE,
    LORA,
    PROMPTS,
    SQUARE,
    WIDE,
    build,
    condition_on,
    config_of,
    editor_of,
    images,
    noise,
    perturb,
)
from torch import Tensor

from mteditflow.config import ModelConfig, RolloutConfig
from mteditflow.export.weights import write_lora
from mteditflow.flow import make_schedule
from mteditflow.noise import NoiseSource
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy
from mteditflow.policy.qwen_image_edit import schedule
from mteditflow.rollout import roll_out
from mteditflow.types import Condition, EditTask

NUM_STEPS = 4
# Masked padding leaves the exact result as it is and moves the order of float32 sums: of 1e3 operations in sequence,
# each of relative error 2^-24 at values of at most 4, and guidance of 4 takes 4 + 3 parts of it: 7 * 1e3 * 2^-24 * 4.
PADDING_TOLERANCE = 2e-3

folders = tiny_qwen.folders


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


@torch.no_grad()
def rollout(policy: Policy, condition: Condition, latents: Tensor, sigmas: Tensor) -> Tensor:
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
    assert torch.equal(rollout(policy, own, latents, pipeline.scheduler.sigmas), expected)


@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
def test_padding_changes_nothing_but_the_order_of_sums(
    folders: dict[str, Path], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 4 tokens padded to 40: equal bits to the stock pipeline given the padded text, close to it without."""
    config = config_of(folders[variant], max_text_tokens=40)
    pipeline, policy, source = stock(config, monkeypatch), build(config), images(1)
    own, latents = condition_on(policy, [PROMPTS[2]], source, rows=1), noise(policy, 1)
    assert (
        own.text["mask"].sum() == editor_of(policy).num_text_tokens - 36
        and not own.text["text"][~own.text["mask"]].any()
    )
    unpadded = generate(pipeline, config, PROMPTS[2], source, latents)
    result = rollout(policy, own, latents, pipeline.scheduler.sigmas)
    torch.testing.assert_close(result, unpadded, rtol=0, atol=PADDING_TOLERANCE)
    padded = generate(
        pipeline, config, None, source, latents, prompt_embeds=own.text["text"], prompt_embeds_mask=own.text["mask"],
        negative_prompt_embeds=own.text["negative"], negative_prompt_embeds_mask=None,
    )  # fmt: skip
    assert torch.equal(result, padded)
    # Own sigmas are other roundings of the same numbers.
    close = rollout(policy, own, latents, policy.sigmas(NUM_STEPS).float())
    torch.testing.assert_close(close, padded, rtol=0, atol=PADDING_TOLERANCE)
    without = Condition(text=own.text | {"mask": torch.ones_like(own.text["mask"])}, image=own.image, cfg_scale=4.0)
    assert (rollout(policy, without, latents, pipeline.scheduler.sigmas) - padded).abs().max() > PADDING_TOLERANCE


@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
@pytest.mark.parametrize("condition", [(0, 0), LARGE])
def test_three_turns_are_three_stock_calls(
    folders: dict[str, Path], variant: str, condition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of each call is the picture of the next; equal bits."""
    config = config_of(folders[variant], WIDE, condition)
    pipeline, policy = stock(config, monkeypatch), build(config)
    own = theirs = images(1)
    for turn in range(3):
        latents, prompt = noise(policy, 1, seed=turn), PROMPTS[turn % 2]
        expected = generate(pipeline, config, prompt, theirs, latents)
        pixels = np.asarray(picture(expected * 2 - 1), dtype=np.float32)  # (H, W, 3), what a file holds
        theirs = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        image = rollout(policy, condition_on(policy, [prompt], own, rows=1), latents, pipeline.scheduler.sigmas)
        assert torch.equal(image, expected)
        own = round_to_8_bit(image * 2 - 1)


@pytest.mark.parametrize("hand_off", ["pixels", "latents"])
def test_roll_out_is_three_stock_calls(
    folders: dict[str, Path], hand_off: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders["2511"])
    pipeline, policy = stock(config, monkeypatch), build(config)
    tasks = [EditTask(id=7, source=images(1)[0], instructions=(*PROMPTS[:2], PROMPTS[0]), edit_types=("",) * 3)]
    result = roll_out(
        policy, tasks, make_schedule(policy.sigmas(NUM_STEPS)), NoiseSource(seed=1, step=0),
        RolloutConfig(microbatch_size=2, hand_off=hand_off), num_turns=3, group_size=2, cfg_scale=4.0,
    )  # fmt: skip
    source = tasks[0].source[None]
    for index, turn in enumerate(result.turns):
        if hand_off == "pixels":  # else the stock pipeline, which takes pixels, is given another condition
            expected = generate(pipeline, config, tasks[0].instructions[index], source, turn.latents[0, 1:])
            # One level of 255 where the rounding to 8 bits falls on another side, and what it does to the next turn.
            difference = (turn.image[1:] - (expected * 2 - 1)).abs()
            assert difference.max() <= 2 / 255 + PADDING_TOLERANCE
        elif index:
            assert torch.equal(turn.condition.image, result.turns[index - 1].latents[-1])
        source = turn.image[1:]
    assert not torch.equal(result.turns[0].image[0], result.turns[0].image[1])


@pytest.mark.parametrize("variant", tiny_qwen.VARIANTS)
def test_export_gives_the_stock_pipeline_the_same_editor(
    folders: dict[str, Path], variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders[variant])
    pipeline, policy, source = stock(config, monkeypatch), build(config), images(1)
    perturb(policy, "ema")
    write_lora(type(policy.pipeline), policy.adapters.state("ema"), LORA, tmp_path)
    latents, prompt = noise(policy, 1), PROMPTS[1]
    base = generate(pipeline, config, prompt, source, latents)
    pipeline.load_lora_weights(tmp_path)
    exported = generate(pipeline, config, prompt, source, latents)
    own = condition_on(policy, [prompt], source, rows=1)
    with policy.adapters.use("ema"):
        assert torch.equal(rollout(policy, own, latents, pipeline.scheduler.sigmas), exported)
    assert torch.equal(rollout(policy, own, latents, pipeline.scheduler.sigmas), base)  # current: B is 0
    assert (exported - base).abs().max() > 1e-2
    loaded = next(iter(pipeline.transformer.peft_config.values()))
    assert (loaded.r, loaded.lora_alpha) == (LORA.rank, LORA.alpha)


@pytest.mark.parametrize("num_steps", [2, 8, 50])
@pytest.mark.parametrize("size", [SQUARE, (512, 512), (1024, 1024)])
def test_sigmas_are_the_scheduler_s(num_steps: int, size: tuple[int, int]) -> None:
    num_tokens = size[0] * size[1] // 256
    scheduler: Any = tiny_qwen.scheduler()
    unshifted = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(
        sigmas=unshifted, mu=pipeline_qwenimage_edit.calculate_shift(num_tokens, 256, 8192, 0.5, 0.9)
    )
    sigmas = schedule(scheduler.config, num_steps, num_tokens)
    assert sigmas.dtype == torch.float64 and sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(0.02, abs=1e-15)
    # In float32 the shift is rounded four times and the stretch, of values up to 1 that are differences from 1, four
    # times more, its divisor by as much: 12 roundings of 2^-24 at values of at most 1, absolutely.
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=0, atol=12 * 2**-24)


def test_schedule_s_errors() -> None:
    config = tiny_qwen.scheduler().config
    with pytest.raises(ValueError, match="num_steps is 1: must be at least 2"):
        schedule(config, 1, 1024)
    assert schedule(dict(config) | {"shift_terminal": None}, 1, 1024).tolist() == [1, 0]
