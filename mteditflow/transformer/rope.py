"""Queries and keys of FLUX.1 and Qwen-Image by one kernel for each stream of tokens, in place of diffusers' own ops.

What it saves is in docs/kernels.md: for a number of its queries and keys an eager block of FLUX.1 moves 56 to 60 bytes
and a compiled one of Qwen's 20, since torch.compile leaves complex numbers to eager torch; the kernel moves 4. FLUX.2
has them mostly in blocks of one stream, where compiled ops move no more than the kernel, and keeps its own.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from mteditflow_kernels import norm_rope
from torch import Tensor, nn


def fuse_rope(transformer: Any) -> None:
    """Put the kernel into a transformer of FLUX.1 or Qwen-Image; another keeps what it has. The norms' weights must be
    frozen, and the attention's kernels be chosen afterwards.
    """
    attentions = [
        module
        for module in transformer.modules()
        if isinstance(getattr(module, "processor", None), (FluxAttnProcessor, QwenDoubleStreamAttnProcessor2_0))
    ]
    for attention in attentions:
        attention.set_processor(RopeProcessor())
    if attentions:
        transformer.pos_embed = _Angles(transformer.pos_embed)


class _Angles(nn.Module):
    """Cosine and sine of each angle side by side, float32 (tokens, D), once for all blocks of a forward pass: of all
    tokens together as FLUX has them, of image and text as Qwen has them.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        first, second = self.embed(*args, **kwargs)
        if first.is_complex():
            return torch.view_as_real(first).flatten(1), torch.view_as_real(second).flatten(1)
        return torch.stack([first[:, ::2], second[:, ::2]], dim=-1).flatten(1)  # FLUX's numbers stand there twice


class RopeProcessor:
    """The attention of a block, of text and image or, in a block of one stream, of both in one."""

    _attention_backend = None  # as diffusers and `choose_attention` set them
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        text = encoder_hidden_states
        num_text = 0 if text is None else text.shape[1]
        if isinstance(image_rotary_emb, Tensor):
            text_angles, angles = image_rotary_emb[:num_text], image_rotary_emb[num_text:]
        else:
            angles, text_angles = image_rotary_emb
        size, eps = attn.norm_q.weight.shape[0], attn.norm_q.eps
        query, key, value = (
            part.unflatten(-1, (-1, size)) for part in _project(attn, hidden_states, "to_q", "to_k", "to_v")
        )
        queries, keys = [(query, attn.norm_q.weight, angles)], [(key, attn.norm_k.weight, angles)]
        if text is not None:
            names = "add_q_proj", "add_k_proj", "add_v_proj"
            query, key, text_value = (part.unflatten(-1, (-1, size)) for part in _project(attn, text, *names))
            queries.insert(0, (query, attn.norm_added_q.weight, text_angles))
            keys.insert(0, (key, attn.norm_added_k.weight, text_angles))
            value = torch.cat([text_value, value], dim=1)
        if encoder_hidden_states_mask is not None:
            is_image = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            attention_mask = torch.cat([encoder_hidden_states_mask, is_image], dim=1)[:, None, None, :]
        attended = dispatch_attention_fn(
            norm_rope(queries, eps), norm_rope(keys, eps), value, attn_mask=attention_mask,
            backend=self._attention_backend, parallel_config=self._parallel_config,
        ).flatten(2)  # fmt: skip
        if text is None:
            return attended
        image = attn.to_out[1](attn.to_out[0](attended[:, num_text:].contiguous()))
        return image, attn.to_add_out(attended[:, :num_text].contiguous())


def _project(attn: Any, x: Tensor, *names: str) -> list[Tensor]:
    return [getattr(attn, name)(x) for name in names]
