"""A GPU's kernels of attention, cuDNN's and FlashAttention, under their names in torch but on the CPU, by its own flash
kernel: what calls them by their names runs without a GPU, forwards and backwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

aten, NONE = torch.ops.aten, torch.zeros(0, dtype=torch.int64)
Gradients = tuple[Tensor, Tensor, Tensor]


@contextmanager
def attention_on_cpu(within: Callable[[], None]) -> Iterator[None]:
    """Have them; `within` is called in each forward pass."""

    def flash(
        query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        is_debugged: bool = False, *, mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        within()
        made = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )
        return *made, NONE, NONE, query.shape[2], key.shape[2], NONE, NONE, NONE

    def cudnn(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, has_sums: bool, dropout_p: float = 0.0,
        is_causal: bool = False, is_debugged: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert all(part.is_contiguous() for part in (query, key, value))
        output, sums, *rest = flash(query, key, value, dropout_p, is_causal, mask=mask, scale=scale)
        return output, sums if has_sums else NONE, *rest

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_scaled_dot_product_flash_attention", flash)
    library.impl("_scaled_dot_product_flash_attention_backward", _flash_backward)
    library.impl("_scaled_dot_product_cudnn_attention", cudnn)
    library.impl("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward)
    try:
        yield
    finally:
        library._destroy()


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, cum_q: Tensor, cum_k: Tensor,
    max_q: int, max_k: int, dropout_p: float, is_causal: bool, *rest: Tensor, mask: Tensor | None = None,
    scale: float | None = None,
) -> Gradients:  # fmt: skip
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, sums, dropout_p, is_causal, attn_mask=mask, scale=scale
    )


def _cudnn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, seed: Tensor, offset: Tensor,
    mask: Tensor | None, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *,
    scale: float | None = None,
) -> Gradients:  # fmt: skip
    assert sums.numel(), "a gradient without the sums of its forward pass"
    places = cum_q, cum_k, max_q, max_k
    return _flash_backward(grad, query, key, value, out, sums, *places, dropout_p, is_causal, mask=mask, scale=scale)
