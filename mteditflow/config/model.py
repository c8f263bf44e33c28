"""The settings of the editor and of its adapter; config.py has all the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "world" / "editor"


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
    vision_pixels: int = 0
    """Pixels, height x width, of the image that Qwen-Image-Edit's text encoder sees, in training and at evaluation; 0:
    the stock pipeline's own, 1024^2 for Qwen-Image-Edit and 384^2 for -2509 and -2511."""
    guidance_scale: float = 2.5
    """Embedded guidance, of models that have it (defaults: FLUX.1-Kontext 2.5, FLUX.2-dev 4)."""
    cfg_scale: float = 1.0
    """True classifier-free guidance, of models that take it (FLUX.2-klein-base, Qwen-Image-Edit: 4); 1: none."""
    max_text_tokens: int = 12
    """Tokens of an instruction, longer ones are cut: T5's of FLUX.1-Kontext (trained with 512, the miniature with
    12), of FLUX.2 with the chat template around it (512), of Qwen-Image-Edit without."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the base and of its forward passes; trained weights and the equations are float32."""
    is_checkpointed: bool = False
    """Keep only the inputs of the transformer's blocks for the backward pass and run the blocks again in it: far less
    memory, a third more time."""
    text_encoder: Literal["resident", "offload"] = "resident"
    """Where the text encoders stay: on the GPU, or on the host but for the moments in which they encode."""
    vae_slicing: bool = False
    """Encode and decode one image at a time, not 16: less memory for real editors, the same work."""
    vae_tiling: bool = False
    """Encode and decode images in the autoencoder's tiles (of FLUX.1: 1024 px): less memory above that size."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            require(value >= 16 and value % 16 == 0, f"model.{name}", value, "must be a positive multiple of 16")
        for name in ("condition_height", "condition_width"):
            value = getattr(self, name)
            require(value >= 0 and value % 16 == 0, f"model.{name}", value, "must be 0 or a multiple of 16")
        require(
            self.vision_pixels == 0 or self.vision_pixels >= 56**2,  # Qwen2.5-VL enlarges what is smaller
            "model.vision_pixels", self.vision_pixels, "must be 0 or at least 3136",
        )  # fmt: skip
        require(self.cfg_scale >= 1, "model.cfg_scale", self.cfg_scale, "must be at least 1")
        require(self.max_text_tokens > 0, "model.max_text_tokens", self.max_text_tokens, "must be positive")

    @property
    def condition_size(self) -> tuple[int, int]:
        """Height and width at which the image that is edited is encoded."""
        return self.condition_height or self.height, self.condition_width or self.width


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is trained of the transformer: a peft LoRA, or the weights themselves."""

    rank: int = 32
    """Rank of the adapter (DiffusionNFT: 32, Flow-GRPO: 64); 0: full fine-tuning, the targets' own weights are
    trained in float32."""
    alpha: int = 64
    """Scale of the adapter is alpha / rank; unused with rank 0."""
    targets: tuple[str, ...] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj")
    """Names of modules to adapt; empty: attention and feed-forward linears of the model's family, or with rank 0 the
    whole transformer."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "must be positive, or 0 for full fine-tuning")
        require(self.alpha > 0, "lora.alpha", self.alpha, "must be positive")
