"""The settings of the editor, and of what is trained of it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from mteditflow.config.ranges import Count, Pixels, Range, check_ranges, require

EMBEDDED = "embedded"
_WORLD = Path(__file__).parent.parent / "world"
MINIATURES = {name: _WORLD / name for name in ("drifting", EMBEDDED)}
"""Editors that ship with the package, by `model.path`: one that breaks on its own output, one that hardly does."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The editor to train."""

    path: str = "drifting"
    """Folder or hub name of a diffusers pipeline of a family in docs/models; 'drifting' and 'embedded' are miniatures
    that ship with the package: the first breaks on its own output, as real editors do (docs/miniature.md)."""
    height: Pixels = 64
    """Height of source and edit, pixels; a multiple of 16."""
    width: Pixels = 64
    """Width of source and edit, pixels; a multiple of 16."""
    condition_height: Annotated[int, Range(0, 8192, step=16)] = 0
    """Height at which the image that is edited is encoded, pixels, in training and at evaluation; 0: height."""
    condition_width: Annotated[int, Range(0, 8192, step=16)] = 0
    """Width at which the image that is edited is encoded, pixels; 0: width."""
    vision_pixels: Annotated[int, Range(0, 8192**2)] = 0
    """Pixels, height x width, of the image that Qwen-Image-Edit's text encoder sees, in training and at evaluation; 0:
    the stock pipeline's own, 1024^2 for Qwen-Image-Edit and 384^2 for -2509 and -2511."""
    guidance_scale: Annotated[float, Range(0, 100)] = 2.5
    """Embedded guidance, of models that have it (defaults: FLUX.1-Kontext 2.5, FLUX.2-dev 4)."""
    cfg_scale: Annotated[float, Range(1, 100)] = 1.0
    """True classifier-free guidance, of models that take it (FLUX.2-klein-base, Qwen-Image-Edit: 4); 1: none."""
    max_text_tokens: Annotated[int, Range(1, 8192)] = 12
    """Tokens of an instruction, longer ones are cut: T5's of FLUX.1-Kontext (trained with 512, the miniature with
    12), of FLUX.2 with the chat template around it (512), of Qwen-Image-Edit without."""
    base: Literal["float32", "bfloat16", "float8", "int8", "nf4"] = "float32"
    """Precision of the frozen base; that of its forward passes is float32 or, of all others, bfloat16, and float8 also
    multiplies in 8 bits. Trained weights and the equations are float32."""
    attention: Literal["auto", "native", "cudnn", "flash3", "flash4"] = "auto"
    """Kernels of the transformer's attention, in rollouts, training and evaluation alike (docs/speed.md); auto: cuDNN's
    on a GPU where they run forwards and backwards, else torch's own choice."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    """Compile the transformer's blocks, for rollouts and training alike (docs/speed.md); auto: on a GPU, and on a CPU
    where a run is long enough to get the time back."""
    is_checkpointed: bool = False
    """Keep only the inputs of the transformer's blocks for the backward pass and run the blocks again in it: far less
    memory, a third more time."""
    text_encoder: Literal["resident", "offload", "int8"] = "resident"
    """Where the text encoders stay: on the GPU, there with the weights of their blocks in 8 bits, or on the host but
    for the moments in which they encode."""

    def __post_init__(self) -> None:
        check_ranges(self)
        remedy = f"must be one of {', '.join(MINIATURES)}, a folder or a name on the hub"
        require(self.path != "", "model.path", self.path, remedy)
        is_seen = self.vision_pixels == 0 or self.vision_pixels >= 56**2  # Qwen2.5-VL enlarges what is smaller
        require(is_seen, "model.vision_pixels", self.vision_pixels, "must be 0 or at least 3136")

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Precision of the forward passes: the base's own, or bfloat16 where its weights are quantised."""
        return "float32" if self.base == "float32" else "bfloat16"

    @property
    def quantised(self) -> Literal["float8", "int8", "nf4"] | None:
        """The base where its weights are stored in 8 or 4 bits."""
        return None if self.base in ("float32", "bfloat16") else self.base

    @property
    def condition_size(self) -> tuple[int, int]:
        """Height and width at which the image that is edited is encoded."""
        return self.condition_height or self.height, self.condition_width or self.width

    def at(self, height: int, width: int) -> Self:
        """Return the settings of an edit of another size; a condition of its own size keeps its area, at the edit's
        aspect.
        """
        if (height, width) == (self.height, self.width):
            return self
        area = math.prod(self.condition_size) if self.condition_size != (self.height, self.width) else 0
        sides = (math.sqrt(area * height / width), math.sqrt(area * width / height))
        tall, wide = (max(1, round(side / 16)) * 16 if area else 0 for side in sides)
        return replace(self, height=height, width=width, condition_height=tall, condition_width=wide)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is trained of the transformer: a peft LoRA, or the weights themselves."""

    is_full: bool = False
    """Full fine-tuning: no LoRA, but the targets' own weights are trained, in float32; rank and alpha have no part."""
    rank: Annotated[int, Range(1, 4096, hint="; lora.is_full true trains the weights themselves")] = 32
    """Rank of the LoRA (DiffusionNFT: 32, Flow-GRPO: 64)."""
    alpha: Count = 64
    """Scale of the LoRA is alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of modules to train; empty: attention and feed-forward linears of the model's family, or with is_full the
    whole transformer."""
    init_from: str = ""
    """A LoRA to start from: a file, a folder or a hub name, in any form of docs/export.md; its rank, alpha and modules
    take the place of those here. Empty: a new one, which changes nothing yet."""

    def __post_init__(self) -> None:
        check_ranges(self)
        remedy = "lora.is_full trains the weights: must be empty; merge the LoRA into the base (docs/export.md)"
        require(not (self.is_full and self.init_from), "lora.init_from", self.init_from, remedy)
