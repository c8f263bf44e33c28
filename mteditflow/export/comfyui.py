"""A LoRA in the keys that ComfyUI loads: `transformer.<module>.lora_A.weight`, `.lora_B.weight` and `.alpha`.

ComfyUI (comfy/lora.py, `model_lora_keys_unet`) makes a map from key prefixes to its own weights; for the families here
it holds `transformer.` before diffusers' names of some modules, those of `Family.comfyui`. `load_lora` reads
`<prefix>.alpha` beside A and B (comfy/weight_adapter/lora.py) and adds alpha / r B A; without alpha the factor would be
1, which is wrong for any alpha other than r.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from mteditflow.policy import family_of


def comfyui_keys(pipeline: str, state: dict[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """An adapter's state, `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r), in ComfyUI's keys.

    pipeline: its class's name. ValueError for a family, or modules, that ComfyUI has no keys for.
    """
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    unknown = unknown_modules(pipeline, modules)
    if unknown:
        raise ValueError(
            f"--format comfyui: ComfyUI has no keys for {len(unknown)} of the adapted modules, such as {unknown[0]!r}: "
            f"leave them out of lora.targets, or take --format merged"
        )
    keys = {f"transformer.{key}": weight for key, weight in state.items()}
    return keys | {f"transformer.{module}.alpha": torch.tensor(float(alpha)) for module in modules}


def unknown_modules(pipeline: str, modules: Iterable[str]) -> list[str]:
    """The modules that ComfyUI's map for this pipeline does not hold."""
    family = family_of(pipeline)
    if family is None or not family.comfyui:
        raise ValueError(f"--format comfyui: its keys for a {pipeline} are not known here, take --format diffusers")
    return [module for module in modules if not any(re.fullmatch(pattern, module) for pattern in family.comfyui)]
