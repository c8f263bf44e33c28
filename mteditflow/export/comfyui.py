"""A LoRA in the keys that ComfyUI loads: `transformer.<module>.lora_A.weight`, `.lora_B.weight` and `.alpha`.

ComfyUI (comfy/lora.py, `model_lora_keys_unet`) makes a map from key prefixes to its own weights. For Flux, of which
FLUX.2 is a subclass there, it holds `transformer.` before the diffusers name of each module in comfy/utils.py
`flux_to_diffusers`: q, k and v are thirds of a joint weight, `proj_mlp` the rest of a joint one, and `norm_out.linear`
has its halves swapped. For Qwen-Image it holds `transformer.` before each module of a model whose names are diffusers'
own. `load_lora` reads `<prefix>.alpha` beside A and B (comfy/weight_adapter/lora.py) and adds alpha / r B A; without
alpha the factor would be 1, which is wrong for any alpha other than r.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_FLUX = (
    rf"transformer_blocks\.\d+\.({_ATTENTION}|norm1(_context)?\.linear)",
    r"transformer_blocks\.\d+\.ff(_context)?\.(net\.0\.proj|net\.2|linear_in|linear_out)",
    r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|attn\.to_qkv_mlp_proj|attn\.to_out|proj_mlp|proj_out|norm\.linear)",
    r"x_embedder|context_embedder|proj_out|norm_out\.linear",
    r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]",
)
_QWEN = (
    rf"transformer_blocks\.\d+\.({_ATTENTION}|(img|txt)_mod\.1|(img|txt)_mlp\.net\.(0\.proj|2))",
    r"img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]",
)


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
    if pipeline.startswith("Flux"):
        patterns = _FLUX
    elif pipeline.startswith("QwenImage"):
        patterns = _QWEN
    else:
        raise ValueError(f"--format comfyui: its keys for a {pipeline} are not known here, take --format diffusers")
    return [module for module in modules if not any(re.fullmatch(pattern, module) for pattern in patterns)]
