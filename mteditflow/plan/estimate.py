"""Seconds per row on a GPU that is not at hand: floating-point operations over what such a GPU was reported or measured
to reach (gpus.py). Each is a span, from the least to the most that is to be expected.

Left out: LoRA's own products (a share of rank / d), the optimizer, consistency by DINO, users' rewards, saving,
start-up, and ranks that wait for each other.
"""

import json
import math
from functools import cache
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from mteditflow.config import Config
from mteditflow.config.ranges import require
from mteditflow.data import count_references, size_shares
from mteditflow.plan.duration import RowSeconds, mean_seconds
from mteditflow.plan.flops import forward_flops
from mteditflow.plan.gpus import Gpu, Span, Target
from mteditflow.plan.memory import GIB, Sizes, folder_of, num_image_tokens, num_passes, num_text_tokens
from mteditflow.policy.published import MODELS
from mteditflow.transformer.compiled import is_compiled

TERA = 1e12

# Slowest first, as everything that is indexed by `end` below.
MEASURED = (0.9, 1.1)  # of what a profile measured: another batch, another day (ours)
FLOAT32_SHARE = (0.6, 0.9)  # of the peak without tensor cores (ours)
FP8_GAIN = (1.2, 1.6)  # of a forward pass's linears, reported for editors; a frozen base's backward pass stays bf16
WEIGHT_ONLY = (0.9, 0.96)  # int8, nf4: dequantised at each use; 0.96: FLUX.1-dev in nf4, 0.512 s for 0.493 (diffusers)
AUTOENCODER_SHARE = (0.12, 0.25)  # of the bf16 peak; 0.25: 48 pictures encoded and decoded in 0.7 s, H200 (derived)
HOST_GB_S = (12.0, 25.0)  # between host and GPU, for text encoders that are 'offload': PCIe 4 and 5 (ours)
THOUGHT_TOKENS = (500, 128)  # of a judge that reasons

TOKEN_S = 0.008  # a batch's next token by CUDA graph, however large the batch (7.3 ms on an H200, 8 B)
BLOCK_S = 5e-4  # that a host takes to launch a transformer's block, eager: about 100 launches (ours)
SCORE_TOKENS = 12  # of a turn's score
QUESTION_TOKENS, IMAGE_TOKENS = 500, 256  # of rubric and instructions, and of a picture of 512 px: Qwen3-VL's


def estimate(config: Config, sizes: Sizes, judge_gib: float, target: Target) -> tuple[RowSeconds, RowSeconds] | None:
    """Estimate seconds per row, at the slowest and at the fastest, averaged over the sizes of pictures; `judge_gib`, of
    a judge in the process. None: the editor is so small that the GPU would wait for the host.

    ValueError: the GPU has no such precision, or what was measured is another.
    """
    found = {size: _estimate_one_size(config.at(*size), sizes, judge_gib, target) for size in config.sizes}
    known, shares = {size: both for size, both in found.items() if both}, size_shares(config)
    if len(known) < len(found):
        return None
    slowest, fastest = (mean_seconds([(known[size][end], shares[size]) for size in known]) for end in (0, 1))
    return slowest, fastest


def _estimate_one_size(
    config: Config, sizes: Sizes, judge_gib: float, target: Target
) -> tuple[RowSeconds, RowSeconds] | None:
    """Estimate them where all pictures have the model's size."""
    _check(config, target)
    num_blocks = sizes.transformer["num_layers"] + (sizes.transformer.get("num_single_layers") or 0)
    seconds_of_row, _ = _transformer_seconds(config, sizes, target, 0)
    if config.rollout.microbatch_size * seconds_of_row < num_blocks * BLOCK_S:
        return None
    encoding, decoding = _autoencoder_tflop(config)

    def row_seconds(end: int) -> RowSeconds:
        forward, backward = _transformer_seconds(config, sizes, target, end)
        if target.measured is None and config.model.is_checkpointed:
            backward += forward  # a profile that was measured with checkpointing has it already
        passes, picture_rate = num_passes(config), _picture_rate(config, target.gpu, end)
        return RowSeconds(
            forward=passes * forward,
            forward_backward=passes * (forward + backward),
            guided=forward * (2 if config.model.cfg_scale != 1 else 1),
            decode=decoding / picture_rate,
            encode=encoding / picture_rate,
            text=_text_seconds(config, sizes, target, end),
            judge=_judge_seconds(config, judge_gib, target.gpu, end),
        )

    return row_seconds(0), row_seconds(1)


def describe(config: Config, target: Target) -> list[str]:
    """Say in lines whence the figures are, and what they leave out."""
    gpu, measured = target.gpu, target.measured
    if measured:
        lines = [
            f"measured on {gpu.name}, {measured.path}: {measured.forward:.0f} TFLOP/s in forward passes, "
            f"{measured.training:.0f} in training, a tenth less to a tenth more"
        ]
    elif config.model.dtype == "float32":
        low, high = FLOAT32_SHARE
        lines = [f"not measured on {gpu.name}: {low} to {high} (ours) of {gpu.fp32:g} TFLOP/s ({gpu.source})"]
    else:
        low, high = _shares(config, gpu)
        lines = [
            f"not measured on {gpu.name}: forward passes at {low} to {high} of {gpu.bf16:g} TFLOP/s ({gpu.source}), "
            f"{'compiled' if low == gpu.shares.compiled[0] else 'eager'}:",
            gpu.shares.source,
        ]
    judged = "" if _judge_seconds(config, 1.0, gpu, 0) is not None else "scores, "
    return [*lines, f"left out: {judged}consistency by DINO, rewards of your own, saving, start-up"]


def _check(config: Config, target: Target) -> None:
    gpu, precision, measured = target.gpu, config.model.base, target.measured
    remedy = f"{gpu.name} has no FP8: take bfloat16, or int8 or nf4 where memory is short"
    require(precision != "float8" or gpu.fp8 > 0, "model.base", precision, remedy)
    if measured:
        for name, value in measured.model.items():
            planned = getattr(config.model, name)
            remedy = f"{measured.path} was measured with {value!r}: take a profile of the run's own settings"
            require(planned == value, f"model.{name}", planned, remedy)


def _shares(config: Config, gpu: Gpu) -> Span:
    """Shares of the bf16 peak that a forward pass reaches."""
    is_fast = is_compiled(config.model, config.lora, torch.device("cuda"))
    return gpu.shares.compiled if is_fast else gpu.shares.eager


def _rate(config: Config, gpu: Gpu, end: int) -> float:
    """TFLOP/s of the products that are made in the base's compute precision."""
    match config.model.base:
        case "float32":
            return FLOAT32_SHARE[end] * gpu.fp32
        case "int8" | "nf4":
            return WEIGHT_ONLY[end] * _shares(config, gpu)[end] * gpu.bf16
        case _:
            return _shares(config, gpu)[end] * gpu.bf16


def _transformer_seconds(config: Config, sizes: Sizes, target: Target, end: int) -> tuple[float, float]:
    """Seconds of a row's forward pass and of its backward pass, one of each."""
    mean, _ = count_references(config)
    row = forward_flops(
        sizes.family, sizes.transformer, text_tokens=num_text_tokens(config.model, sizes.family, mean),
        image_tokens=sum(num_image_tokens(config.model, sizes.family, mean)),
    )  # fmt: skip
    flops = row.backward_full if config.lora.is_full else row.backward
    if target.measured:
        scale = MEASURED[end] * TERA
        forward, both = row.total / target.measured.forward, (row.total + flops) / target.measured.training
        return forward / scale, (both - forward) / scale
    rate = _rate(config, target.gpu, end) * TERA
    gain = FP8_GAIN[end] if config.model.base == "float8" else 1.0
    return (row.linear / gain + row.attention + row.other) / rate, flops / rate


def _picture_rate(config: Config, gpu: Gpu, end: int) -> float:
    """TFLOP/s of the autoencoder."""
    if config.model.dtype == "float32":
        return FLOAT32_SHARE[end] * gpu.fp32
    return AUTOENCODER_SHARE[end] * gpu.bf16


def _text_seconds(config: Config, sizes: Sizes, target: Target, end: int) -> float:
    """Seconds of an instruction: every weight of the text encoders on every token; encoders that come and go."""
    model, num_weights, (mean, _) = config.model, sizes.num_text_encoders, count_references(config)
    num_texts = 2 if model.cfg_scale != 1 and sizes.family.is_text_of_image else 1
    seconds = 2 * num_weights * num_text_tokens(model, sizes.family, mean) / (_rate(config, target.gpu, end) * TERA)
    is_away, num_bytes = model.text_encoder == "offload", 4 if model.dtype == "float32" else 2
    return num_texts * (seconds + is_away * 2 * num_weights * num_bytes / (HOST_GB_S[end] * 1e9))


def _judge_seconds(config: Config, judge_gib: float, gpu: Gpu, end: int) -> float | None:
    """Seconds of a trajectory's question to a judge in this process, in batches; None where it is not on the GPU."""
    reward, turns = config.reward, config.data.num_turns
    if reward.judge != "vlm" or reward.url:
        return None
    trajectories = config.rollout.num_tasks * config.rollout.group_size
    wave = config.rollout.wave_size or config.rollout.group_size
    rows = min(reward.num_parallel, wave, math.ceil(trajectories / config.run.num_gpus))
    tokens = QUESTION_TOKENS + IMAGE_TOKENS * (turns + 1)
    question = judge_gib * GIB * tokens / (gpu.shares.eager[end] * gpu.bf16 * TERA)  # 2 a weight, of 2 bytes
    num_tokens = SCORE_TOKENS * turns + (THOUGHT_TOKENS[end] if reward.readout == "thinking" else 0)
    return question + num_tokens * max(TOKEN_S, judge_gib * GIB / (gpu.bandwidth * TERA)) / rows


def _autoencoder_tflop(config: Config) -> tuple[float, float]:
    """TFLOP to encode a condition and to decode an edit, as torch counts them; 0 of a pipeline without autoencoder."""
    folder, model = folder_of(config.model.path), config.model
    if folder is None:
        known = MODELS[model.path]
        name, settings = known.autoencoder_class, known.autoencoder_config
    elif (folder / "vae" / "config.json").is_file():
        settings = json.loads((folder / "vae" / "config.json").read_text())
        name = settings["_class_name"]
    else:
        return 0.0, 0.0
    return _count_autoencoder(name, json.dumps(settings), model.condition_size, (model.height, model.width))


@cache
def _count_autoencoder(
    name: str, settings: str, condition_size: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float]:
    with torch.device("meta"), torch.no_grad():
        vae: Any = getattr(diffusers, name).from_config(json.loads(settings))
        is_video = "z_dim" in vae.config  # a picture is a film of one frame
        channels, frames = vae.config["z_dim" if is_video else "latent_channels"], [1] if is_video else []
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, *frames, *condition_size))
        with FlopCounterMode(display=False) as decoding:
            vae.decode(torch.empty(1, channels, *frames, size[0] // 8, size[1] // 8))
    return encoding.get_total_flops() / TERA, decoding.get_total_flops() / TERA
