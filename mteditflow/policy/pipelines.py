"""What the families of editors share: loading, sizes, rows in chunks, prompts kept, encoders that come and go."""

import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from mteditflow.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_CACHED_PROMPTS = 512  # 4 MiB each for FLUX.1-Kontext at 512 text tokens in bfloat16


def load_pipeline(pipeline_class: Any, path: str, config: ModelConfig, device: torch.device) -> Any:
    """The pipeline of a folder or a hub name, frozen, on the device; its text encoders stay on the host where
    `model.text_encoder` is 'offload'. ValueError where a component's class needs a package that is not installed.
    """
    _check_packages(path)
    with warnings.catch_warnings():
        # `dtype` is its new name; the old one is known to every diffusers that pyproject.toml allows.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        logging.disable_progress_bar()  # the run has its own, and none where output is piped
        pipeline = pipeline_class.from_pretrained(path, torch_dtype=DTYPES[config.dtype])
    return prepare(pipeline, config, device)


def _check_packages(path: str) -> None:
    """transformers has a stand-in for a class whose packages are missing, of which diffusers says nothing useful."""
    library, index = importlib.import_module("transformers"), DiffusionPipeline.load_config(path)
    assert isinstance(index, dict)
    for value in index.values():
        if isinstance(value, (list, tuple)) and value[0] == "transformers":
            missing = getattr(getattr(library, value[1], None), "_backends", ())
            if missing:
                needed = ", ".join(missing)
                raise ValueError(f"model.path {path!r} has a {value[1]}, which needs {needed}: install it with pip")


def opened(
    pipeline_class: Any,
    path: str,
    config: ModelConfig,
    device: torch.device,
    scheduler: Mapping[str, object],
    loaded: Any = None,
) -> Any:
    """The pipeline of `path`, or the one that is `loaded` already, ready for a policy. ValueError where its scheduler
    has other constants than `scheduler`.
    """
    pipeline = prepare(loaded, config, device) if loaded else load_pipeline(pipeline_class, path, config, device)
    check_scheduler(pipeline.scheduler, path, scheduler)
    return pipeline


def prepare(pipeline: Any, config: ModelConfig, device: torch.device) -> Any:
    """A loaded pipeline, frozen, on the device."""
    pipeline.set_progress_bar_config(disable=True)
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
            if config.text_encoder == "resident" or not name.startswith("text_encoder"):
                module.to(device)
    if config.is_checkpointed:
        pipeline.transformer.enable_gradient_checkpointing()
    if config.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    return pipeline


def check_scheduler(scheduler: Any, path: str, constants: Mapping[str, object]) -> None:
    """ValueError where the scheduler would sample at other noise levels than those that are trained."""
    for name, value in constants.items():
        found = scheduler.config.get(name, value)
        if found != value:
            raise ValueError(f"scheduler of {path!r} has {name} {found!r}: the schedule of its family has {value!r}")


@contextmanager
def encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Text encoders that live on the host are on the device within the context."""
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder")]
    away = [module for module in encoders if module is not None and module.device != device]
    for module in away:
        module.to(device)
    try:
        yield
    finally:
        for module in away:
            module.to("cpu")


def token_grid(config: ModelConfig, pixels: int, path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of tokens of the output, and of the condition, at `pixels` per side of a token."""
    for name in ("height", "width", "condition_height", "condition_width"):
        value = getattr(config, name)
        if value % pixels:
            raise ValueError(f"model.{name} is {value}: must be a multiple of {pixels} for the autoencoder of {path!r}")
    height, width = config.condition_size
    return (config.height // pixels, config.width // pixels), (height // pixels, width // pixels)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] at another size, antialiased; as they are where they have it."""
    if tuple(images.shape[2:]) == size:
        return images
    grown = torch.nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return grown.clamp(-1, 1)


def in_chunks(function: Callable[[Tensor], Tensor], values: Tensor, size: int) -> Tensor:
    """function of `size` rows at a time; the last chunk is filled up with copies of its last row."""
    chunks = []
    for rows in values.split(size):
        missing = size - len(rows)
        full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        chunks.append(function(full)[: len(rows)])
    return torch.cat(chunks)


class Prompts:
    """Embeddings of prompts, each encoded alone, so that its bits do not depend on the others, and the most recently
    used kept: the text encoders are frozen.
    """

    def __init__(self, encode: Callable[[str], dict[str, Tensor]]) -> None:
        self._encode = encode
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __call__(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """A row per prompt of each tensor that `encode` names."""
        unique = list(dict.fromkeys(prompts))
        encoded = [self._of(prompt) for prompt in unique]
        while len(self._kept) > MAX_CACHED_PROMPTS:
            self._kept.popitem(last=False)
        place = {prompt: index for index, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts]).to(device, non_blocking=True)
        return {name: torch.stack([own[name] for own in encoded])[rows] for name in encoded[0]}

    def _of(self, prompt: str) -> dict[str, Tensor]:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
        else:
            self._kept[prompt] = self._encode(prompt)
        return self._kept[prompt]
