"""Runs that can be exported, and their edits by the trainer and by the stock pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline, calculate_shift
from torch import Tensor

from mteditflow.config import Config, DataConfig, EvaluationConfig, LoraConfig, ModelConfig, RunConfig, cli, command
from mteditflow.policy import build_policy
from mteditflow.record import checkpoint
from mteditflow.types import Condition

SIZE, NUM_STEPS, PROMPT = 64, 3, "make the red square blue"
LORA, FULL = LoraConfig(rank=2, alpha=8, targets=()), LoraConfig(is_full=True, targets=())
# As tests/test_policy.py: 1e3 operations in sequence, each of relative error 2^-24, at values of at most about 4.
ORDER_TOLERANCE = 3e-4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config_of(model: Path, lora: LoraConfig = LORA, **overrides: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(model), max_text_tokens=TINY_MAX_TEXT_TOKENS, **overrides),
        lora=lora,
        data=DataConfig(num_turns=2),
        evaluation=EvaluationConfig(num_steps=NUM_STEPS),
        run=RunConfig(num_iterations=7),
    )


def write_run(folder: Path, config: Config, iteration: int = 3) -> dict[str, dict[str, Tensor]]:
    """A run folder with a checkpoint, whose adapters are far from their start; returns them."""
    policy = build_policy(config.model, config.lora, seed=0, has_old=False)
    first = policy.adapters.state("ema")
    scale = 0.05 if config.lora.is_full else 0.2
    state = {
        name: {key: w + scale * draw(*w.shape, seed=seed + i) for i, (key, w) in enumerate(start.items())}
        for name, start, seed in (("ema", first, 0), ("current", first, 99))
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cli.to_yaml(config))
    optimizer = {"0.step": torch.zeros(1)}
    checkpoint.save(folder, iteration=iteration, config=config, state=state | {"optimizer": optimizer}, keep=2)
    return state


def ours(config: Config, state: dict[str, Tensor]) -> Tensor:
    """The trainer's edit with these weights: images (1, 3, H, W) in [0, 1]."""
    policy = build_policy(config.model, config.lora, seed=0, has_old=False)
    policy.adapters.load("current", state)
    source = (picture() * 0.5 + 0.5) * 2 - 1  # the trip to [0, 1] and back that a pipeline's input makes
    text = policy.encode_text([PROMPT], source, has_cfg=False)
    condition = Condition(text=text, image=policy.encode_image(source, microbatch_size=1))
    scheduler = policy.pipeline.scheduler
    sigmas = np.linspace(1.0, 1 / NUM_STEPS, NUM_STEPS)  # as the pipeline does, in float64
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(policy.num_tokens))
    latents = draw(1, policy.num_tokens, policy.num_channels)
    with torch.no_grad():
        for sigma, sigma_next in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
            latents = latents + policy.velocity(latents, sigma.expand(1), condition) * (sigma_next - sigma)
        return policy.decode(latents, microbatch_size=1) * 0.5 + 0.5


def picture() -> Tensor:
    return draw(1, 3, SIZE, SIZE, seed=5).clamp(-1, 1)


def stock(pipeline: Any) -> Tensor:
    """The stock pipeline's edit, images (1, 3, H, W) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=picture() * 0.5 + 0.5, prompt=PROMPT, height=SIZE, width=SIZE, max_area=SIZE * SIZE, _auto_resize=False,
        latents=draw(1, SIZE * SIZE // 256, 16), num_inference_steps=NUM_STEPS, guidance_scale=2.5,
        max_sequence_length=TINY_MAX_TEXT_TOKENS, output_type="pt",
    ).images  # fmt: skip


def loaded(folder: Path) -> Any:
    return FluxKontextPipeline.from_pretrained(folder)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a command that has to exit with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command.export([str(word) for word in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mteditflow: ")]
    assert caught.value.code == 2 and len(lines) == 1
    return lines[0]


def flux_map(num_double: int, num_single: int, d: int) -> dict[str, tuple[str, int, int]]:
    """Module -> ComfyUI's weight, first row, number of rows (0: all).

    Facts from ComfyUI's comfy/utils.py `flux_to_diffusers` and, for the `transformer.` before each key, comfy/lora.py
    `model_lora_keys_unet` (github.com/Comfy-Org/ComfyUI); its class Flux2 is a Flux, so the map is FLUX.2's too.
    """
    found: dict[str, tuple[str, int, int]] = {}
    whole = {
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    }  # fmt: skip
    for n in range(num_double):
        for place, letter in enumerate("qkv"):
            found[f"transformer_blocks.{n}.attn.to_{letter}"] = (f"double_blocks.{n}.img_attn.qkv", place * d, d)
            added = f"transformer_blocks.{n}.attn.add_{letter}_proj"
            found[added] = (f"double_blocks.{n}.txt_attn.qkv", place * d, d)
        found |= {f"transformer_blocks.{n}.{a}": (f"double_blocks.{n}.{b}", 0, 0) for a, b in whole.items()}
    for n in range(num_single):
        name, to = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        found |= {f"{name}.attn.to_{letter}": (f"{to}.linear1", place * d, d) for place, letter in enumerate("qkv")}
        found |= {f"{name}.proj_mlp": (f"{to}.linear1", 3 * d, 4 * d), f"{name}.proj_out": (f"{to}.linear2", 0, 0)}
        found |= {f"{name}.norm.linear": (f"{to}.modulation.lin", 0, 0)}
        found |= {
            f"{name}.attn.to_qkv_mlp_proj": (f"{to}.linear1", 0, 0),
            f"{name}.attn.to_out": (f"{to}.linear2", 0, 0),
        }
    found |= {"proj_out": ("final_layer.linear", 0, 0), "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 0)}
    found |= {"x_embedder": ("img_in", 0, 0), "context_embedder": ("txt_in", 0, 0)}
    for a, b in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        for place, layer in ((1, "in_layer"), (2, "out_layer")):
            found[f"time_text_embed.{a}_embedder.linear_{place}"] = (f"{b}.{layer}", 0, 0)
    return found


def qwen_map(num_blocks: int) -> set[str]:
    """Modules of ComfyUI's own Qwen-Image model (comfy/ldm/qwen_image/model.py), whose names are the keys."""
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    tails = [f"attn.{name}" for name in attention]
    tails += [f"{stream}_{tail}" for stream in ("img", "txt") for tail in ("mod.1", "mlp.net.0.proj", "mlp.net.2")]
    found = {f"transformer_blocks.{n}.{tail}" for n in range(num_blocks) for tail in tails}
    found |= {f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)}
    return found | {"img_in", "txt_in", "norm_out.linear", "proj_out"}
