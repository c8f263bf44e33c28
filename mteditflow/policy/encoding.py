"""What families share where text and images are encoded: encoders that come and go, prompts kept, sizes, chunks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from mteditflow.policy.family import Base
from mteditflow.types import EditTask

LARGE_PIXELS = 256**2
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


def rows_at_a_time(height: int, width: int) -> int:
    """Pictures that go through an autoencoder together: one where it is large enough to fill a GPU by itself (2.5 TFLOP
    to decode 512 x 512), so that small work stays small and memory low; 16 where launching takes longer than computing.
    """
    return 1 if height * width >= LARGE_PIXELS else 16


def in_chunks(function: Callable[[Tensor], Tensor], values: Tensor, size: int) -> Tensor:
    """Apply a function to `size` rows at a time; the last chunk is filled up with copies of its last row."""
    chunks = []
    for rows in values.split(size):
        missing = size - len(rows)
        full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        chunks.append(function(full)[: len(rows)])
    return torch.cat(chunks)


def hasten_upsampling(vae: Any) -> None:
    """Have an autoencoder on the CPU double its pictures by copies, of which `interpolate` makes four times as much
    work: a tenth of the miniature's decoding on an AVX2 core, and the same bits.
    """
    for module in vae.modules():
        if type(module) is Upsample2D and module.interpolate and module.use_conv and module.norm is None:
            module.forward = _upsampling(module)


def _upsampling(module: Any) -> Callable[..., Tensor]:
    stock, convolution = module.forward, module.conv if module.name == "conv" else module.Conv2d_0

    def run(hidden_states: Tensor, output_size: int | None = None) -> Tensor:
        if output_size is not None or not hidden_states.is_contiguous():  # of channels last, the layout has to stay
            return stock(hidden_states, output_size)
        return convolution(_doubled(hidden_states))

    return run


def _doubled(x: Tensor) -> Tensor:
    """Repeat the pixels of x (N, C, H, W) in height and width."""
    num, channels, height, width = x.shape
    y = x.new_empty(num, channels, height, 2, width, 2)
    y[:, :, :, 0, :, 0] = x
    y[:, :, :, 0, :, 1] = x
    y[:, :, :, 1] = y[:, :, :, 0]
    return y.view(num, channels, 2 * height, 2 * width)


def stack_references(tasks: Sequence[EditTask]) -> list[Tensor]:
    """Stack the references of N tasks of one shape: (N, 3, h, w) each."""
    return [torch.stack(images) for images in zip(*(task.references for task in tasks), strict=True)]


class Prompts:
    """Embeddings of prompts by the pipeline, each encoded alone, so that its bits do not depend on the others, and the
    most recently used kept: the text encoders are frozen.
    """

    def __init__(self, base: Base, names: Sequence[str]) -> None:
        """names: of the tensors that the pipeline's `encode_prompt` returns first."""
        self._base, self._names = base, names
        self._kept = base.prompts  # the last used comes last

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
