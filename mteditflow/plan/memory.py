"""The memory that a run will take on one GPU, by part, from shapes alone: nothing is allocated.

Sizes come from a pipeline's folder, or from the hub's cache, or, for a published model that is not there yet, from
`policy/published.py`. The transformer is built on the meta device, so that parameters and targets are counted on the
model itself.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn

from mteditflow.config import EMBEDDED, Config, ModelConfig
from mteditflow.config.model import EMBEDDED_FOLDER
from mteditflow.objective import build_objective
from mteditflow.policy import DTYPES, Family, configured_family, family_of
from mteditflow.policy.adapters import find_targets
from mteditflow.policy.family import width_of
from mteditflow.policy.published import JUDGES, MODELS, RANDOM

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a pipeline's files, or its published configs, say of its size. Numbers of weights by part."""

    family: Family
    transformer: dict[str, Any]  # its config
    num_transformer: int
    num_text_encoders: int
    num_autoencoder: int
    num_trained: int


def read_sizes(config: Config) -> Sizes:
    """Sizes of `model.path`; no weight is read. ValueError: neither a folder nor a model whose sizes are known."""
    path = config.model.path
    folder = folder_of(path)
    if folder is None:
        if path not in MODELS:
            raise ValueError(
                f"model.path is {path!r}: no folder, not in the hub's cache here, and none of {', '.join(MODELS)}; "
                f"give a folder or download it"
            )
        known = MODELS[path]
        family, transformer = family_of(known.pipeline), known.transformer
        assert family is not None, known
        others = {"text_encoder": round(1e9 * known.text_encoders), "vae": round(1e9 * known.autoencoder)}
    else:
        family, others = configured_family(replace(config.model, path=str(folder))), _weights_by_part(folder)
        try:
            transformer = json.loads((folder / "transformer" / "config.json").read_text())
        except OSError:
            raise ValueError(
                f"model.path is {path!r}, without transformer/config.json: must be the folder of a diffusers pipeline"
            ) from None
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, family.transformer).from_config(transformer)
    return Sizes(
        family=family,
        transformer=transformer,
        num_transformer=sum(weight.numel() for weight in model.parameters()),
        num_text_encoders=sum(count for part, count in others.items() if part.startswith("text_encoder")),
        num_autoencoder=others.get("vae", 0),
        num_trained=_num_trained(config, model, family),
    )


def _num_trained(config: Config, model: nn.Module, family: Family) -> int:
    """Weights of an adapter, or with lora.is_full of the transformer itself."""
    lora = config.lora
    if lora.is_full and not lora.targets:
        return sum(weight.numel() for weight in model.parameters())
    names = set(find_targets(model, lora.targets, family.targets))
    linears = [module for name, module in model.named_modules() if name in names and isinstance(module, nn.Linear)]
    if lora.is_full:
        return sum(weight.numel() for module in linears for weight in module.parameters())
    return lora.rank * sum(module.in_features + module.out_features for module in linears)


def memory_plan(config: Config, sizes: Sizes) -> dict[str, float]:
    """GiB by part, on each of `run.num_gpus` ranks.

    Trained weights, gradients and two moments of AdamW are four float32 each, `ema` and NFT's `old` one more each. A
    rollout keeps, per turn, the latents of S+1 noise levels, the condition's latents and text, and the images.
    Activations: rows x tokens x what the family's blocks save, in the base's dtype, twice with guidance; with all
    weights trained in another precision than float32, each weight once more.
    """
    model, rollout, num_bytes = config.model, config.rollout, DTYPES[config.model.dtype].itemsize
    copies = 5 + build_objective(config).has_old
    tokens, text_tokens = num_image_tokens(model, sizes.family), sizes.family.num_text_tokens(model)
    rows_of_rank = math.ceil(rollout.num_tasks * rollout.group_size / config.run.num_gpus)
    numbers = (rollout.num_steps + 1) * tokens[0] + tokens[1]
    per_turn = 4 * (numbers * sizes.transformer["in_channels"] + 3 * model.height * model.width)
    per_turn += text_tokens * sizes.transformer["joint_attention_dim"] * num_bytes
    rows = min(config.optimizer.microbatch_size, rows_of_rank)
    is_full = config.lora.is_full
    rounded = sizes.num_trained * num_bytes if is_full and model.dtype != "float32" else 0
    kept = rows * (sum(tokens) + text_tokens) * _saved_per_token(config, sizes) * num_bytes * num_passes(config)
    resident = sizes.num_text_encoders if model.text_encoder == "resident" else 0
    return {
        "base: transformer": sizes.num_transformer * num_bytes / GIB,
        "base: text encoders": resident * num_bytes / GIB,
        "base: autoencoder": sizes.num_autoencoder * num_bytes / GIB,
        "adapter, averages": sizes.num_trained * 4 * (copies - 3) / GIB,
        "gradient, optimizer": sizes.num_trained * 4 * 3 / GIB,
        "latents of a rollout": rows_of_rank * config.data.num_turns * per_turn / GIB,
        "activations of a training microbatch": (kept + rounded) / GIB,
        "judge": _judge(config) / GIB,
    }


def num_passes(config: Config) -> int:
    """Forward passes for a velocity in training: two with guidance."""
    return 2 if config.model.cfg_scale != 1 and config.rollout.is_guided else 1


def num_image_tokens(model: ModelConfig, family: Family) -> tuple[int, int]:
    """L of the output and L' of the condition."""
    height, width = model.condition_size
    area = family.pixels_per_token**2
    return model.height * model.width // area, height * width // area


def _saved_per_token(config: Config, sizes: Sizes) -> float:
    """Activations saved per token of all blocks; checkpointing keeps d of each, and the rest of one at a time."""
    saved, width, rank = sizes.family.saved, width_of(sizes.transformer), config.lora.rank
    kinds = (
        (sizes.transformer["num_layers"], *saved.double, saved.full_double),
        (sizes.transformer.get("num_single_layers") or 0, *saved.single, saved.full_single),
    )
    blocks = [(count, full * width if config.lora.is_full else a * width + b * rank) for count, a, b, full in kinds]
    if config.model.is_checkpointed:
        return sum(count for count, _ in blocks) * width + max(size for _, size in blocks)
    return sum(count * size for count, size in blocks)


def _judge(config: Config) -> float:
    """Bytes of a VLM judge in this process, in bfloat16."""
    reward = config.reward
    if reward.judge != "vlm" or reward.url:
        return 0.0
    folder = folder_of(reward.vlm, "reward.vlm")
    if folder is None:
        if reward.vlm not in JUDGES:
            raise ValueError(f"reward.vlm is {reward.vlm!r}: no folder, and its size is not known; give a folder")
        return 2e9 * JUDGES[reward.vlm]
    return 2.0 * sum(_num_weights(path) for path in folder.glob("*.safetensors"))


def folder_of(path: str, name: str = "model.path") -> Path | None:
    """Where a model's files are on this machine; None: a hub name that is not in the cache. `name` is the field's."""
    if path == EMBEDDED:
        return EMBEDDED_FOLDER
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1:
        if path != RANDOM:
            raise ValueError(f"{name} is {path!r}: no folder, and no hub name, which is owner/name")
        return None
    found = try_to_load_from_cache(path, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _weights_by_part(folder: Path) -> dict[str, int]:
    """Numbers of weights of a pipeline's parts, from the headers of its safetensors files."""
    counts: dict[str, int] = {}
    for path in folder.glob("*/*.safetensors"):
        if len(path.name.split(".")) == 2:  # model.fp16.safetensors is the same weights once more
            counts[path.parent.name] = counts.get(path.parent.name, 0) + _num_weights(path)
    return counts


def _num_weights(path: Path) -> int:
    """Count the numbers of a safetensors file, by its header."""
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
