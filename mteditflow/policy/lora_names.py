"""What others call the linears that a LoRA adapts.

FLUX's original code, and with it ComfyUI, kohya's scripts and ai-toolkit, has q, k and v in one linear where diffusers
has three, and its own names for the rest; those of Qwen-Image are diffusers' own. Kohya writes `_` for each `.` of a
name, so names are compared in that spelling.
"""

import re
from collections.abc import Collection, Iterator, Mapping

Names = Mapping[str, tuple[str, ...]]
"""From an original name, `#` for the block's number, to the linears of diffusers that are its rows, from the first."""

ATTENTION: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
}
ENDS: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # the original has the shift first, diffusers' norm_out.linear the scale
PREFIXES = (
    *("base_model_model_", "model_diffusion_model_", "diffusion_model_"),  # peft; ComfyUI
    *("lora_unet_", "lora_transformer_", "lycoris_", "transformer_", "unet_"),  # kohya, ai-toolkit, LyCORIS; diffusers
)


def _flux(double: Names, single: Names, rest: Names) -> Names:
    """Put together the names of a FLUX: within a block of either kind, and outside of blocks."""
    blocks = (("double_blocks", "transformer_blocks", double), ("single_blocks", "single_transformer_blocks", single))
    found = {
        f"{original}.#.{name}": tuple(f"{ours}.#.{part}" for part in parts)
        for original, ours, names in blocks
        for name, parts in names.items()
    }
    return found | {**rest}


def _embedders(family: str, kinds: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Name both layers of each embedder of a time, a guidance or a pooled text."""
    layers = (("in_layer", 1), ("out_layer", 2))
    return {f"{a}.{layer}": (f"{family}.{b}.linear_{n}",) for a, b in kinds.items() for layer, n in layers}


TIMES = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
FLUX1 = _flux(
    ATTENTION
    | {f"{a}_mlp.{n}": (f"{b}.net.{layer}",) for a, b in (("img", "ff"), ("txt", "ff_context"))
       for n, layer in ((0, "0.proj"), (2, "2"))}
    | {"img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",)},
    {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
    ENDS | {SWAPPED: ("norm_out.linear",)} | _embedders("time_text_embed", TIMES | {"vector_in": "text_embedder"}),
)  # fmt: skip
FLUX2 = _flux(
    ATTENTION
    | {f"{a}_mlp.{n}": (f"{b}.{layer}",) for a, b in (("img", "ff"), ("txt", "ff_context"))
       for n, layer in ((0, "linear_in"), (2, "linear_out"))},
    {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ENDS | {SWAPPED: ("norm_out.linear",)} | _embedders("time_guidance_embed", TIMES)
    | {f"{name}.lin": (f"{name}.linear",) for name in
       ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")},
)  # fmt: skip


def flat(name: str) -> str:
    """Spell a name as kohya does."""
    return name.replace(".", "_")


def spellings(originals: Names, linears: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Map every name that a linear, or several as one, may have in a file to those linears; flat, without prefixes."""
    found: dict[str, tuple[str, ...]] = {flat(name): (name,) for name in linears}
    known = set(linears)
    numbers = sorted({number for name in linears for number in re.findall(r"_blocks\.(\d+)\.", name)})
    for original, parts in originals.items():
        for number in numbers if "#" in original else [""]:
            linear_parts = tuple(part.replace("#", number) for part in parts)
            if known.issuperset(linear_parts):
                found[flat(original.replace("#", number))] = linear_parts
    return found


def without_prefixes(name: str) -> Iterator[str]:
    """Yield the flat spelling of a name, then what is left as each of its prefixes is taken off."""
    left: str | None = flat(name)
    while left is not None:
        yield left
        left = next((left.removeprefix(prefix) for prefix in PREFIXES if left.startswith(prefix)), None)
