"""True-shape blocks of FLUX.1-Kontext-dev with random weights, and what each lever of the model makes of them: forward,
and forward with backward, in turn with the plain bfloat16 path. A lever is a line of VARIANTS.

Three double and three single blocks are built; what one of each kind takes is the difference of two times, and the
whole model's 19 and 38 are reckoned from it, embedders and output included. The iteration (test_iteration.py) has the
whole model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import measure
import peft
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from torch import nn

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.plan.flops import ForwardFlops, forward_flops
from mteditflow.policy import Policy
from mteditflow.policy.published import FLUX_KONTEXT, RANDOM
from mteditflow.types import Condition
from mteditflow.world.tiny_kontext import flux_scheduler

SCHEDULER = flux_scheduler()  # it reads numbers of its tensors, which fake ones have not
VAE: dict[str, Any] = {  # of the right scale; no picture is decoded here
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
STEPS = 12  # of a turn
DENOISED = {  # turn-images per second at 512 px: goals
    "bfloat16": measure.Goal(value=1.35, is_least=True),
    "float8": measure.Goal(value=2.0, is_least=True),
}
SLICES = {"1+1": (1, 1), "3+1": (3, 1), "1+3": (1, 3)}  # double and single blocks


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model's blocks, and of what goes through them."""

    transformer: dict[str, Any]
    pixels: int
    text_tokens: int
    rows: int
    rank: int


TRUE = Size(
    transformer=FLUX_KONTEXT | {"num_layers": 3, "num_single_layers": 3}, pixels=512, text_tokens=512, rows=4, rank=64
)
SMALL = Size(
    transformer=TRUE.transformer
    | {"num_attention_heads": 4, "attention_head_dim": 16, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    | {"axes_dims_rope": (4, 6, 6)},
    pixels=32, text_tokens=8, rows=2, rank=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings of the model that differ from the plain path's, and whose LoRA linears they are."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    is_peft: bool = False
    needs_gpu: bool = False

    def config(self, size: Size) -> ModelConfig:
        """The plain path: bfloat16, eager, torch's own attention; with the variant's settings."""
        settings: dict[str, Any] = {"base": "bfloat16", "compile": "off", "attention": "native"} | dict(self.model)
        return ModelConfig(
            path=RANDOM, height=size.pixels, width=size.pixels, max_text_tokens=size.text_tokens, **settings
        )


PLAIN = Variant(name="eager")
COMPILED = {"compile": "blocks"}
VARIANTS = [
    PLAIN,
    Variant(name="compiled", model=COMPILED),
    Variant(name="cuDNN's attention", model={"attention": "cudnn"}, needs_gpu=True),
    Variant(name="cuDNN's attention, compiled", model=COMPILED | {"attention": "cudnn"}, needs_gpu=True),
    Variant(name="float8", model={"base": "float8"}),
    Variant(
        name="float8, cuDNN's attention, compiled",
        model=COMPILED | {"base": "float8", "attention": "cudnn"},
        needs_gpu=True,
    ),
    Variant(name="peft's LoRA", is_peft=True),
    Variant(name="checkpointed", model={"is_checkpointed": True}),
    Variant(name="int8", model={"base": "int8"}),
    Variant(name="nf4", model={"base": "nf4"}),
    Variant(name="FlashAttention 3", model={"attention": "flash3"}, needs_gpu=True),
    Variant(name="FlashAttention 4", model={"attention": "flash4"}, needs_gpu=True),
]


def build_policy(variant: Variant, size: Size, device: torch.device) -> Policy:
    """The blocks with their adapters, as the trainer builds them. ValueError: the device cannot do the variant."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            transformer = FluxTransformer2DModel(**size.transformer)
            autoencoder = AutoencoderKL(**VAE, latent_channels=size.transformer["in_channels"] // 4)
    finally:
        torch.set_default_dtype(before)
    nothing: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = FluxKontextPipeline(scheduler=SCHEDULER, vae=autoencoder, transformer=transformer, **nothing)
    lora = LoraConfig(rank=size.rank, alpha=2 * size.rank, targets=())
    policy = Policy(pipeline, variant.config(size), lora, seed=0, has_old=False, device=device)
    if variant.is_peft:
        use_peft(policy, lora)
    return policy


def use_peft(policy: Policy, lora: LoraConfig) -> None:
    """Put peft's linears in the place of ours: what a trainer without its own has."""
    transformer = policy.adapters.transformer
    for name in policy.adapters.targets:
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, transformer.get_submodule(name).base)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=policy.adapters.targets, init_lora_weights=False
    )
    transformer.add_adapter(config)
    for name, weight in transformer.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()


@contextmanager
def only(transformer: Any, num_double: int, num_single: int) -> Iterator[None]:
    """The transformer with its first blocks alone."""
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    transformer.transformer_blocks = nn.ModuleList(list(double)[:num_double])
    transformer.single_transformer_blocks = nn.ModuleList(list(single)[:num_single])
    try:
        yield
    finally:
        transformer.transformer_blocks, transformer.single_transformer_blocks = double, single


def calls_of(policy: Policy, size: Size) -> dict[str, Callable[[], torch.Tensor]]:
    """A forward pass, and one with its backward pass, of every slice: 'forward 1+1' and so on. They give a velocity."""
    rows, device, width = size.rows, policy.device, size.transformer
    text = {
        "text": torch.randn(rows, size.text_tokens, width["joint_attention_dim"], device=device).bfloat16(),
        "pooled": torch.randn(rows, width["pooled_projection_dim"], device=device).bfloat16(),
    }
    image = torch.randn(rows, policy.num_condition_tokens, policy.num_channels, device=device)
    condition = Condition(text=text, image=image, cfg_scale=1.0)
    latents = torch.randn(rows, policy.num_tokens, policy.num_channels, device=device)
    sigma = torch.full((rows,), 0.5, device=device)

    def forward(blocks: tuple[int, int]) -> torch.Tensor:
        with torch.no_grad(), only(policy.adapters.transformer, *blocks):
            return policy.velocity(latents, sigma, condition)

    def both(blocks: tuple[int, int]) -> torch.Tensor:
        with only(policy.adapters.transformer, *blocks):
            velocity = policy.velocity(latents, sigma, condition)
            velocity.backward(latents)
        return velocity.detach()

    return {
        f"{kind} {name}": lambda call=call, blocks=blocks: call(blocks)
        for name, blocks in SLICES.items()
        for kind, call in (("forward", forward), ("both", both))
    }


def whole_seconds(seconds: Mapping[str, float], kind: str) -> float:
    """Of 19 double and 38 single blocks and what stands around them."""
    first = seconds[f"{kind} 1+1"]
    double, single = ((seconds[f"{kind} {name}"] - first) / 2 for name in ("3+1", "1+3"))
    return first + 18 * double + 37 * single


def whole_flops(policy: Policy, size: Size) -> ForwardFlops:
    """Of a row through the whole model."""
    layers = {name: FLUX_KONTEXT[name] for name in ("num_layers", "num_single_layers")}
    tokens = policy.num_tokens + policy.num_condition_tokens
    config = dict(size.transformer) | layers
    return forward_flops(policy.family, config, text_tokens=size.text_tokens, image_tokens=tokens)


def time_variant(variant: Variant, plain: Policy, size: Size, ceilings: Mapping[str, float | None]) -> dict[str, Any]:
    """The row of a variant: milliseconds of its calls and of the plain path's, in turn, and what follows from them."""
    device = plain.device
    policy = plain if variant == PLAIN else build_policy(variant, size, device)
    varied, others = calls_of(policy, size), calls_of(plain, size)
    for call in (*varied.values(), *others.values()):
        call()  # compiles, and chooses products
    is_equal = torch.equal(varied["forward 1+1"](), varied["both 1+1"]())
    calls = {("varied", name): call for name, call in varied.items()} | {
        ("plain", name): others[name] for name in varied
    }
    medians = measure.medians(calls, device)
    seconds, plain_seconds = ({name: medians[which, name] for name in varied} for which in ("varied", "plain"))
    forward_s, both_s = (whole_seconds(seconds, kind) for kind in ("forward", "both"))
    work, ceiling = whole_flops(policy, size), ceilings["bfloat16_tflop_per_s"]
    float8 = ceilings.get("float8_tflop_per_s") if policy.config.base == "float8" else None
    rates = {
        "forward": 1e-12 * size.rows * work.total / forward_s,
        "both": 1e-12 * size.rows * (work.total + work.backward) / both_s,
    }
    return {
        "variant": variant.name, "base": policy.config.base, "attention": policy.attention,
        "rows": size.rows, "pixels": size.pixels,
        "ms": {name: 1e3 * value for name, value in seconds.items()},
        "times_plain": {name: plain_seconds[name] / value for name, value in seconds.items()},
        "whole_forward_ms": 1e3 * forward_s, "whole_both_ms": 1e3 * both_s, "tflop_per_s": rates,
        "percent_of_bfloat16": {name: 100 * rate / ceiling for name, rate in rates.items()} if ceiling else None,
        "percent_of_float8": {name: 100 * rate / float8 for name, rate in rates.items()} if float8 else None,
        "denoised_per_second": size.rows / (STEPS * forward_s),
        "is_equal_with_gradient": is_equal, "clocks": measure.clocks(device),
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Policy:
    device, size = measure.device_and(TRUE, SMALL)
    return build_policy(PLAIN, size, device)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variant(variant: Variant, plain: Policy, record: measure.Record) -> None:
    device, size = measure.device_and(TRUE, SMALL)
    if variant.needs_gpu and device.type == "cpu":
        pytest.skip("needs a GPU")
    try:
        row = time_variant(variant, plain, size, record.found["ceilings"])
    except ValueError as problem:  # not for this card, or a package is not there
        record.add("blocks", {"variant": variant.name, "problem": str(problem)})
        pytest.skip(str(problem))
    record.add("blocks", row, {"denoised_per_second": DENOISED[row["base"]]} if row["base"] in DENOISED else {})
    # Compiled blocks may round otherwise with a gradient than without: a run finds it, and replays (settle_bits).
    assert row["is_equal_with_gradient"] or plain.config.compile != variant.config(size).compile
