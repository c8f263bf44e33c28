"""The editor that is trained: one file per family of editors, one Protocol that the rest of the trainer sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from torch import Tensor, nn

from mteditflow.config import EMBEDDED, LoraConfig, ModelConfig
from mteditflow.config.model import EMBEDDED_FOLDER
from mteditflow.policy.adapters import AdapterName, Adapters
from mteditflow.policy.flux2 import Flux2Policy
from mteditflow.policy.flux_kontext import FluxKontextPolicy
from mteditflow.policy.qwen_image_edit import QwenImageEditPolicy
from mteditflow.types import Condition

__all__ = ["AdapterName", "Adapters", "Policy", "build_policy", "linear_shapes", "model_path", "stock_class"]


class Policy(Protocol):
    """An editor with adapters, of one family."""

    has_cfg: bool
    """Whether the model takes true classifier-free guidance."""
    is_distilled: bool
    """Whether the model is distilled to few steps, which NFT blurs."""
    is_text_of_image: bool
    """Whether the text encoder sees the image that is edited too, so that each trajectory has a text of its own."""
    adapters: Adapters
    """The weights that are trained, and which ones `velocity` uses."""

    @property
    def num_tokens(self) -> int:
        """L, latent tokens of an edit."""
        ...

    @property
    def num_condition_tokens(self) -> int:
        """L', latent tokens of the image that is edited."""
        ...

    @property
    def num_channels(self) -> int:
        """C, channels of a latent token."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, with the adapters in its transformer."""
        ...

    def encode_text(self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool) -> dict[str, Tensor]:
        """What a condition has of N instructions on images (N, 3, H, W): tensors (N, ...), by the family's names.

        has_cfg: with what the unconditional half of classifier-free guidance needs.
        """
        ...

    def encode_image(self, images: Tensor, microbatch_size: int = 16) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], resized to the condition's size, to clean latents (N, L', C), float32."""
        ...

    def decode(self, latents: Tensor, microbatch_size: int = 16) -> Tensor:
        """Latents (N, L, C) to images (N, 3, H, W) clamped to [-1, 1], float32, not rounded to 8 bits."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), under the selected adapter and
        with the condition's guidance.
        """
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """The model's own schedule of noise levels (S+1,), float64 on the host."""
        ...


def build_policy(config: ModelConfig, lora: LoraConfig, seed: int, *, has_old: bool) -> Policy:
    """The policy of `config.path`, by the class that its model_index.json names, on this process's GPU or else the CPU.

    seed: of the adapter's initial weights. has_old: with an adapter `old` besides `current` and `ema`.
    """
    path = model_path(config)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    match _pipeline_class(path):
        case "FluxKontextPipeline":
            family = FluxKontextPolicy
        case "Flux2Pipeline" | "Flux2KleinPipeline":
            family = Flux2Policy
        case "QwenImageEditPipeline" | "QwenImageEditPlusPipeline":
            family = QwenImageEditPolicy
        case other:
            raise ValueError(
                f"model.path {path!r} is a {other}, which cannot be trained here: supported are FluxKontextPipeline, "
                f"Flux2Pipeline, Flux2KleinPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline"
            )
    if config.vision_pixels and not family.is_text_of_image:
        raise ValueError(
            f"model.vision_pixels is {config.vision_pixels}: the text encoder of {path!r} sees no image; it must be 0"
        )
    policy = family(path, config, lora, seed=seed, has_old=has_old, device=device)
    if config.cfg_scale != 1 and not policy.has_cfg:
        reason = "is distilled and takes no guidance" if policy.is_distilled else "has its guidance embedded"
        remedy = "" if policy.is_distilled else "; set model.guidance_scale"
        raise ValueError(f"model.cfg_scale is {config.cfg_scale:g}: {path!r} {reason}, so it must be 1{remedy}")
    return policy


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear of the editor's transformer, by full name; no weight is read."""
    path = model_path(config)
    _pipeline_class(path)  # says what is wrong with the path
    index: Any = DiffusionPipeline.load_config(path)
    transformer_class: Any = getattr(diffusers, index["transformer"][1])
    with torch.device("meta"):
        transformer = transformer_class.from_config(transformer_class.load_config(path, subfolder="transformer"))
    return {
        name: (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def model_path(config: ModelConfig) -> str:
    """The folder or hub name of the configured pipeline."""
    return str(EMBEDDED_FOLDER) if config.path == EMBEDDED else config.path


def stock_class(config: ModelConfig) -> Any:
    """The diffusers class of the configured pipeline. ValueError where there is no such pipeline."""
    return getattr(diffusers, _pipeline_class(model_path(config)))


def _pipeline_class(path: str) -> str:
    """The pipeline's class by its model_index.json, from a folder or the hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model.path {path!r} is not a diffusers pipeline: the folder has no model_index.json")
    elif folder.exists():
        raise ValueError(
            f"model.path {path!r} is a file: give the folder of a diffusers pipeline, or its name on the hub"
        )
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:  # a hub name is owner/name
        raise ValueError(
            f"model.path {path!r} does not exist: give the folder of a diffusers pipeline, or its name on the hub"
        )
    try:
        index: Any = DiffusionPipeline.load_config(path)
    except OSError as error:
        if any(isinstance(cause, GatedRepoError) for cause in (error, error.__cause__, error.__context__)):
            raise ValueError(
                f"model.path {path!r} is gated: accept its licence on huggingface.co/{path}, then log in with hf auth "
                f"login"
            ) from error
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.path {path!r} is no folder, and no hub name that can be reached: {reason}") from error
    return str(index["_class_name"])
