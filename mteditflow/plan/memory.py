"""The memory that a run will take on one GPU, by part, from shapes alone: nothing is allocated.

Sizes come from a pipeline's folder, or from the hub's cache, or, for a published model that is not there yet, from
`policy/published.py`. The transformer is built on the meta device, so that parameters and targets are counted on the
model itself.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from mteditflow.config import EMBEDDED, Config, ModelConfig
from mteditflow.config.model import EMBEDDED_FOLDER
from mteditflow.objective import build_objective
from mteditflow.policy import flux2, flux_kontext, qwen_image_edit
from mteditflow.policy.adapters import bound_modules
from mteditflow.policy.published import JUDGES, MODELS

GIB = 2**30
NUM_BYTES = {"float32": 4, "bfloat16": 2}
RANDOM_PATH = "random"  # FLUX.1-Kontext-dev's shape, for profiles
RANDOM = MODELS["black-forest-labs/FLUX.1-Kontext-dev"]
PIXELS_PER_TOKEN = 16  # per side: an autoencoder of 8 and patches of 2, in all families
VISION_TOKEN = 28  # pixels per side of a vision token of Qwen2.5-VL
NUM_TEMPLATE_TOKENS = 20  # about, of Qwen-Image-Edit's template around the instruction


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Numbers that autograd keeps per token of a block, in units of its width d and of the adapter's rank r.

    Counted with saved-tensor hooks (diffusers 0.42) at d 128 and 256, r 8 and 32, where the formula is within 0.1 %.
    Checkpointing keeps one d per block, and the rest of one block at a time.
    """

    double: tuple[float, float]
    single: tuple[float, float]
    full_double: float
    full_single: float


SAVED = {
    "FluxTransformer2DModel": Saved(double=(18.1, 6.0), single=(12.1, 4.0), full_double=24.1, full_single=21.1),
    "Flux2Transformer2DModel": Saved(double=(22.1, 6.0), single=(21.1, 2.0), full_double=28.1, full_single=25.1),
    "QwenImageTransformer2DModel": Saved(double=(18.1, 6.0), single=(0.0, 0.0), full_double=24.1, full_single=0.0),
}
TARGETS = {
    "FluxTransformer2DModel": flux_kontext.TARGETS,
    "Flux2Transformer2DModel": flux2.TARGETS,
    "QwenImageTransformer2DModel": qwen_image_edit.TARGETS,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a pipeline's files, or its published configs, say of its size. Numbers of weights by part."""

    transformer_class: str
    num_transformer: int
    num_text_encoders: int
    num_autoencoder: int
    num_trained: int
    num_double: int
    num_single: int
    width: int
    num_channels: int
    text_width: int

    @property
    def num_weights(self) -> int:
        """Of all parts."""
        return self.num_transformer + self.num_text_encoders + self.num_autoencoder


def read_sizes(config: Config) -> Sizes:
    """Sizes of `model.path`; no weight is read. ValueError: neither a folder nor a model whose sizes are known."""
    path = config.model.path
    folder = folder_of(path)
    if folder is None:
        known = RANDOM if path == RANDOM_PATH else MODELS.get(path)
        if known is None:
            raise ValueError(
                f"model.path is {path!r}: no folder, not in the hub's cache here, and none of {', '.join(MODELS)}; "
                f"give a folder or download it"
            )
        others = {"text_encoder": round(1e9 * known.text_encoders), "vae": round(1e9 * known.autoencoder)}
        return _sizes(config, known.transformer_class, known.transformer, others)
    try:
        transformer = json.loads((folder / "transformer" / "config.json").read_text())
    except OSError as error:
        missing = f"{Path(error.filename).parent.name}/config.json"
        raise ValueError(
            f"model.path is {path!r}, without {missing}: must be the folder of a diffusers pipeline"
        ) from None
    name = transformer.get("_class_name")
    if name not in SAVED:
        raise ValueError(f"model.path is {path!r}, with a {name}: must be a pipeline with one of {', '.join(SAVED)}")
    return _sizes(config, name, transformer, _weights_by_part(folder))


def _sizes(config: Config, name: str, transformer: dict[str, Any], others: dict[str, int]) -> Sizes:
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, name).from_config(transformer)
    return Sizes(
        transformer_class=name,
        num_transformer=sum(weight.numel() for weight in model.parameters()),
        num_text_encoders=sum(count for part, count in others.items() if part.startswith("text_encoder")),
        num_autoencoder=others.get("vae", 0),
        num_trained=_num_trained(config, model, TARGETS[name]),
        num_double=transformer["num_layers"],
        num_single=transformer.get("num_single_layers", 0),
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        num_channels=transformer["in_channels"],
        text_width=transformer["joint_attention_dim"],
    )


def _num_trained(config: Config, model: nn.Module, default_targets: Sequence[str]) -> int:
    """Of an adapter, or of the transformer's own weights with rank 0."""
    lora = config.lora
    if lora.rank == 0 and not lora.targets:
        return sum(weight.numel() for weight in model.parameters())
    names = set(bound_modules(model, list(lora.targets or default_targets), is_default=not lora.targets))
    linears = [module for name, module in model.named_modules() if name in names and isinstance(module, nn.Linear)]
    if lora.rank == 0:
        return sum(weight.numel() for module in linears for weight in module.parameters())
    return lora.rank * sum(module.in_features + module.out_features for module in linears)


def memory_plan(config: Config, sizes: Sizes) -> dict[str, float]:
    """GiB by part, on each of `run.num_gpus` ranks.

    Trained weights, gradients and two moments of AdamW are four float32 each, `ema` and NFT's `old` one more each. A
    rollout keeps, per turn, the latents of S+1 noise levels, the condition's latents and text, and the images.
    Activations: rows x tokens x (double blocks x (a d + b r) + single blocks x (c d + e r)) of `SAVED`, in the base's
    dtype, twice with guidance; with all weights trained in another precision than float32, each weight once more.
    """
    model, rollout, num_bytes = config.model, config.rollout, NUM_BYTES[config.model.dtype]
    copies = 5 + build_objective(config).has_old
    tokens, text_tokens = num_image_tokens(model), num_text_tokens(model, sizes)
    rows_of_rank = math.ceil(rollout.num_tasks * rollout.group_size / config.run.num_gpus)
    numbers = (rollout.num_steps + 1) * tokens[0] + tokens[1]
    per_turn = 4 * (numbers * sizes.num_channels + 3 * model.height * model.width)
    per_turn += text_tokens * sizes.text_width * num_bytes
    rows = min(config.optimizer.microbatch_size, rows_of_rank)
    is_full = config.lora.rank == 0
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


def num_image_tokens(model: ModelConfig) -> tuple[int, int]:
    """L of the output and L' of the condition."""
    height, width = model.condition_size
    area = PIXELS_PER_TOKEN**2
    return model.height * model.width // area, height * width // area


def num_text_tokens(model: ModelConfig, sizes: Sizes) -> int:
    """T; of Qwen-Image-Edit with the image's vision tokens, at -2509's size where the config leaves it open."""
    if sizes.transformer_class != "QwenImageTransformer2DModel":
        return model.max_text_tokens
    pixels = model.vision_pixels or 384**2
    return model.max_text_tokens + pixels // VISION_TOKEN**2 + NUM_TEMPLATE_TOKENS


def _saved_per_token(config: Config, sizes: Sizes) -> float:
    saved, width, rank = SAVED[sizes.transformer_class], sizes.width, config.lora.rank
    blocks = (
        (sizes.num_double, saved.full_double if rank == 0 else saved.double[0], saved.double[1]),
        (sizes.num_single, saved.full_single if rank == 0 else saved.single[0], saved.single[1]),
    )
    each = [own * width + per_rank * rank for _, own, per_rank in blocks]
    if config.model.is_checkpointed:
        return sum(count for count, *_ in blocks) * width + max(each)
    return sum(count * own for (count, *_), own in zip(blocks, each, strict=True))


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
        if path != RANDOM_PATH:
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
    """Of a safetensors file: eight bytes of length, then a JSON header."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
