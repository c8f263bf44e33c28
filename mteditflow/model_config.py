"""The settings of the editor and of its adapter; config.py has all the others."""

from dataclasses import dataclass
from typing import Literal

EMBEDDED = "embedded"


def require(is_right: bool, name: str, value: object, remedy: str) -> None:
    """ValueError in one line, of the field, its value and the remedy, unless `is_right`."""
    if not is_right:
        raise ValueError(f"{name} is {value!r}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The editor to train."""

    path: str = EMBEDDED
    """Folder or hub name of a diffusers pipeline of a family in docs/models; 'embedded' is the miniature that ships
    with the package."""
    height: int = 64
    """Height of source and edit, pixels; a multiple of 16."""
    width: int = 64
    """Width of source and edit, pixels; a multiple of 16."""
    condition_height: int = 0
    """Height at which the image that is edited is encoded, pixels, in training and at evaluation; 0: height."""
    condition_width: int = 0
    """Width at which the image that is edited is encoded, pixels; 0: width."""
    guidance_scale: float = 2.5
    """Embedded guidance, of models that have it (defaults: FLUX.1-Kontext 2.5, FLUX.2-dev 4)."""
    cfg_scale: float = 1.0
    """True classifier-free guidance, of models that take it (FLUX.2-klein-base, Qwen-Image-Edit: 4); 1: none."""
    max_text_tokens: int = 12
    """T5 tokens of an instruction, longer ones are cut; 512 is what FLUX.1-Kontext was trained with, 12 the
    miniature."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen base; the adapter and the equations are float32."""
    text_encoder: Literal["resident", "offload"] = "resident"
    """Where the text encoders stay: on the GPU, or on the host but for the moments in which they encode."""
    vae_tiling: bool = False
    """Encode and decode images in tiles: less memory above 1024 px, and seams that the stock pipeline has too."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value >= 16 and value % 16 == 0, f"model.{name}", value, "must be a positive multiple of 16")
        for name in ("condition_height", "condition_width"):
            value = getattr(self, name)
            require(value >= 0 and value % 16 == 0, f"model.{name}", value, "must be 0 or a multiple of 16")
        require(self.cfg_scale >= 1, "model.cfg_scale", self.cfg_scale, "must be at least 1")
        require(self.max_text_tokens > 0, "model.max_text_tokens", self.max_text_tokens, "must be positive")

    @property
    def condition_size(self) -> tuple[int, int]:
        """Height and width at which the image that is edited is encoded."""
        return self.condition_height or self.height, self.condition_width or self.width


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter (peft LoRA on the transformer)."""

    rank: int = 32
    """Rank of the adapter (DiffusionNFT: 32, Flow-GRPO: 64)."""
    alpha: int = 64
    """Scale of the adapter is alpha / rank."""
    targets: tuple[str, ...] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj")
    """Names of modules to adapt; empty: attention and feed-forward linears of the model's family."""

    def __post_init__(self) -> None:
        require(self.rank > 0, "lora.rank", self.rank, "must be positive")
        require(self.alpha > 0, "lora.alpha", self.alpha, "must be positive")
