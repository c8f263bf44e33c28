"""LoRAs in the forms of others: drawn on the linears of a small transformer of each family, and written as they write.

Which original name stands for which linears is ComfyUI's map (`export_parts.flux_map`), not ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from export_parts import draw, flux_map
from torch import Tensor, nn

from mteditflow.policy import flux2, flux_kontext, qwen_image_edit
from mteditflow.policy.lora_file import Lora, parse_lora

SMALL: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16}
FAMILIES = {
    "kontext": (flux_kontext.FAMILY, FluxTransformer2DModel,
                SMALL | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
                         "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}),
    "flux2": (flux2.FAMILY, Flux2Transformer2DModel,
              SMALL | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24,
                       "axes_dims_rope": (4, 4, 4, 4)}),
    "qwen": (qwen_image_edit.FAMILY, QwenImageTransformer2DModel,
             SMALL | {"num_layers": 2, "joint_attention_dim": 24, "out_channels": 4, "axes_dims_rope": (4, 6, 6)}),
}  # fmt: skip


EMBEDDER = "time_guidance_embed.{}_embedder.linear_{}"
BEYOND = {  # of FLUX.2, for which ComfyUI's map has no names of diffusers; as diffusers' converter has them
    **{f"{name}.linear": f"{name}.lin" for name in
       ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")},
    **{EMBEDDER.format(a, n): f"{b}.{c}_layer" for a, b in (("timestep", "time_in"), ("guidance", "guidance_in"))
       for n, c in ((1, "in"), (2, "out"))},
}  # fmt: skip


@cache
def shapes(family: str) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear of the small transformer."""
    _, transformer, config = FAMILIES[family]
    with torch.device("meta"):
        modules = transformer(**config).named_modules()
    return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, nn.Linear)}


def read(family: str, word: str | Path) -> Lora:
    return parse_lora(str(word), "the model", shapes(family), FAMILIES[family][0].originals)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows that a linear of diffusers has of an original one."""

    original: str
    first: int
    num_rows: int


def parts(family: str) -> dict[str, Part]:
    """Each linear that has another name in the original code."""
    if family == "qwen":
        return {name: Part(original=name, first=0, num_rows=size) for name, (size, _) in shapes("qwen").items()}
    width, found = 32, {}
    for name, (original, first, num_rows) in flux_map(1, 1, width).items():
        if name in shapes(family):
            found[name] = Part(original=original, first=first, num_rows=num_rows or shapes(family)[name][0])
    for name, original in BEYOND.items():
        if name in shapes(family):
            found[name] = Part(original=original, first=0, num_rows=shapes(family)[name][0])
    return found


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn for an original linear: B A is multiplied by alpha / r."""

    down: Tensor
    up: Tensor
    alpha: float


def draw_originals(family: str, *, rank: int = 3, alpha: float = 6.0) -> dict[str, Drawn]:
    """A LoRA on all of a family's original linears."""
    found, rows = parts(family), dict[str, int]()
    for part in found.values():
        rows[part.original] = max(rows.get(part.original, 0), part.first + part.num_rows)
    widths = {part.original: shapes(family)[name][1] for name, part in found.items()}
    return {
        name: Drawn(down=draw(rank, widths[name], seed=i), up=draw(num, rank, seed=1000 + i), alpha=alpha)
        for i, (name, num) in enumerate(sorted(rows.items()))
    }


def kohya(drawn: Mapping[str, Drawn]) -> dict[str, Tensor]:
    """As kohya's sd-scripts and musubi-tuner save it."""
    file = {}
    for name, it in drawn.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        file |= {f"{stem}.lora_down.weight": it.down, f"{stem}.lora_up.weight": it.up}
        file[f"{stem}.alpha"] = torch.tensor(it.alpha)
    return file


def comfyui(drawn: Mapping[str, Drawn]) -> dict[str, Tensor]:
    """As trainers for ComfyUI save it: the original names, and an alpha of each."""
    file = {}
    for name, it in drawn.items():
        stem = f"diffusion_model.{name}"
        file |= {
            f"{stem}.lora_A.weight": it.down,
            f"{stem}.lora_B.weight": it.up,
            f"{stem}.alpha": torch.tensor(it.alpha),
        }
    return file


def ai_toolkit(drawn: Mapping[str, Drawn]) -> dict[str, Tensor]:
    """As ai-toolkit saves it: the original names, and no alpha, which is the rank."""
    return {key: weight for key, weight in comfyui(drawn).items() if not key.endswith(".alpha")}


def save(file: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: weight.clone() for key, weight in file.items()}, path, metadata)
    return path
