"""What families share where text and images are encoded: encoders that come and go, prompts kept, sizes, chunks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mteditflow.policy.family import Base

MAX_CACHED_PROMPTS = 512  # 4 MiB each for FLUX.1-Kontext at 512 text tokens in bfloat16


@contextmanager
def encoders_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Move text encoders that live on the host to the device, within the context."""
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder")]
    away = [module for module in encoders if module is not None and module.device != device]
    for module in away:
        module.to(device)
    try:
        yield
    finally:
        for module in away:
            module.to("cpu")


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring images (N, 3, H, W) in [-1, 1] to another size, antialiased; as they are where they have it."""
    if tuple(images.shape[2:]) == size:
        return images
    return torch.nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)


def in_chunks(function: Callable[[Tensor], Tensor], values: Tensor, size: int) -> Tensor:
    """Apply a function to `size` rows at a time; the last chunk is filled up with copies of its last row."""
    chunks = []
    for rows in values.split(size):
        missing = size - len(rows)
        full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        chunks.append(function(full)[: len(rows)])
    return torch.cat(chunks)


class Prompts:
    """Embeddings of prompts by the pipeline, each encoded alone, so that its bits do not depend on the others, and the
    most recently used kept: the text encoders are frozen.
    """

    def __init__(self, base: Base, names: Sequence[str]) -> None:
        """names: of the tensors that the pipeline's `encode_prompt` returns first."""
        self._base, self._names = base, names
        self._kept: dict[str, dict[str, Tensor]] = {}  # the last used comes last

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode N prompts: a row of each tensor for each."""
        unique = list(dict.fromkeys(prompts))
        for prompt in unique:
            self._kept[prompt] = self._kept.pop(prompt, None) or self.encode(prompt)
        encoded = [self._kept[prompt] for prompt in unique]
        while len(self._kept) > MAX_CACHED_PROMPTS:
            del self._kept[next(iter(self._kept))]
        place = {prompt: index for index, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts]).to(self._base.device, non_blocking=True)
        return {name: torch.stack([row[name] for row in encoded])[rows] for name in self._names}

    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Encode a prompt, which is not kept."""
        base = self._base
        with encoders_on(base.pipeline, base.device):
            values = base.pipeline.encode_prompt(
                prompt, device=base.device, max_sequence_length=base.config.max_text_tokens
            )
        return {name: value[0] for name, value in zip(self._names, values, strict=False)}
