"""The editor that is trained: one file per family of editors, one Protocol that the rest of the trainer sees."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from mteditflow.config import EMBEDDED, LoraConfig, ModelConfig
from mteditflow.policy.flux_kontext import AdapterName, FluxKontextPolicy
from mteditflow.types import Condition

__all__ = ["AdapterName", "Policy", "build_policy"]


class Policy(Protocol):
    """An editor with LoRA adapters.

    current is trained, old is NFT's rollout policy, ema is evaluated and exported, off is the reference: no adapter.
    """

    @property
    def num_tokens(self) -> int:
        """L, latent tokens of an image."""
        ...

    @property
    def num_channels(self) -> int:
        """C, channels of a latent token."""
        ...

    @property
    def num_bound_modules(self) -> int:
        """Modules that the adapter changes."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, with the adapters in its transformer."""
        ...

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of adapter `current`, float32, always in the same order."""
        ...

    def encode_text(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings (N, T, E) and pooled ones (N, E')."""
        ...

    def encode_image(self, images: Tensor, microbatch_size: int = 16) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to clean latents (N, L, C), float32."""
        ...

    def decode(self, latents: Tensor, microbatch_size: int = 16) -> Tensor:
        """Latents (N, L, C) to images (N, 3, H, W) clamped to [-1, 1], float32, not rounded to 8 bits."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), under the selected adapter."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """The model's own schedule of noise levels (S+1,), float64 on the host."""
        ...

    @property
    def selected(self) -> AdapterName:
        """The adapter that `velocity` uses now. Its weights change in place: a captured graph sees the new ones."""
        ...

    def adapter(self, name: AdapterName) -> AbstractContextManager[None]:
        """Selects the weights that `velocity` uses within the context; `current` outside of any."""
        ...

    def copy_adapter(self, source: AdapterName, target: AdapterName, decay: float = 0.0) -> None:
        """target <- decay * target + (1 - decay) * source."""
        ...

    def adapter_state(self, name: AdapterName) -> dict[str, Tensor]:
        """A copy of the adapter's weights."""
        ...

    def load_adapter_state(self, name: AdapterName, state: dict[str, Tensor]) -> None:
        """Puts back what `adapter_state` gave."""
        ...

    def save_lora(self, folder: Path, adapter: AdapterName = "ema") -> None:
        """Writes the adapter so that the stock pipeline's `load_lora_weights(folder)` gives the same editor."""
        ...


def build_policy(config: ModelConfig, lora: LoraConfig, seed: int, objective: str) -> Policy:
    """The policy of `config.path`, by the class that its model_index.json names, on this process's GPU or else the CPU.

    seed: of the adapter's initial weights. objective: 'nft' has an adapter `old` besides `current` and `ema`.
    """
    path = str(Path(__file__).parent.parent / "world" / "editor") if config.path == EMBEDDED else config.path
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    match _pipeline_class(path):
        case "FluxKontextPipeline":
            return FluxKontextPolicy(path, config, lora, seed=seed, has_old=objective == "nft", device=device)
        case other:
            raise ValueError(
                f"model.path {path!r} is a {other}, which cannot be trained here: supported is FluxKontextPipeline"
            )


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
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.path {path!r} is no folder, and no hub name that can be reached: {reason}") from error
    return str(index["_class_name"])
