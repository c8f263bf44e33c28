"""Which kernels compute the trained transformer's attention: one choice for rollout, training and evaluation.

It is set on the processors of this transformer. diffusers' `set_attention_backend` also sets a default of the process,
which every other model would inherit. FlashAttention 3 and 4 come through torch's own operator, which they take over:
diffusers' `_flash_3` has no backward. Quantised attention (sage) is no choice: a log-prob needs more than eight bits.

On a GPU the gradient reaches these kernels contiguous. torch keeps a cuDNN backward pass by the layout of queries, keys
and values, not by that of the gradient (so in 2.11, whose `native` is cuDNN's on an H200): a block of one stream hands
it a part of a wider tensor, and the next block's is read by those strides, beyond its end or wrongly.

A kernel that was chosen is called by its name. diffusers calls torch's `scaled_dot_product_attention` with all others
switched off, which are switches of the process: the attention of a judge or of a user's reward, scored in another
thread meanwhile, would find none that takes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

Attention = Literal["native", "cudnn", "flash3", "flash4"]
Wanted = Attention | Literal["auto"]
BACKENDS: dict[Attention, AttentionBackendName] = {
    "native": AttentionBackendName.NATIVE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash3": AttentionBackendName._NATIVE_FLASH,
    "flash4": AttentionBackendName._NATIVE_FLASH,
}
PROBE_ROWS, PROBE_TOKENS, PROBE_HEADS = 2, 64, 2
MASKED = -65504.0  # what torch adds to a masked key for cuDNN, which does not take an infinity; its exponential is 0


@dataclass(frozen=True, kw_only=True)
class Flash:
    """A FlashAttention that torch does not contain."""

    name: str
    """What torch calls it."""
    module: str
    majors: tuple[int, ...]
    """First figure of the compute capabilities that it runs on."""
    cards: str
    package: str


FLASH = {
    "flash3": Flash(
        name="FA3", module="flash_attn_interface", majors=(9,), cards="an H100 or H200",
        package="flash_attn_3, a wheel for your torch and CUDA or built from hopper/ of Dao-AILab/flash-attention",
    ),
    "flash4": Flash(
        name="FA4", module="flash_attn.cute", majors=(9, 10), cards="an H100, H200, B200 or B300",
        package="flash-attn-4, pip install 'mteditflow[flash]'",
    ),
}  # fmt: skip


def choose_attention(
    transformer: Any, wanted: Wanted, *, dtype: torch.dtype, device: torch.device, is_masked: bool
) -> Attention:
    """Set `model.attention` on all processors of a transformer, and return which it is.

    is_masked: whether the family's attention has a mask. ValueError, with what to take, where the choice cannot run
    forwards and backwards on the device.
    """
    head_size: int = transformer.config.attention_head_dim

    def problem_of(name: Attention) -> str | None:
        return _find_problem(name, head_size, dtype, device, is_masked)

    if device.type == "cuda":
        for backend in set(BACKENDS.values()):
            hand_contiguous_gradients(backend, BY_NAME.get(backend))
    chosen = _resolve(wanted, device, problem_of)
    processors = [module.processor for module in transformer.modules() if _has_backend(module)]
    assert processors, f"{type(transformer).__name__} has no attention whose kernels can be chosen"
    for processor in processors:
        processor._attention_backend = BACKENDS[chosen]
    return chosen


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.contiguous()


def hand_contiguous_gradients(backend: AttentionBackendName, by_name: Callable[..., Tensor] | None = None) -> None:
    """See to it that diffusers' attention by this backend gets a contiguous gradient of its output (B, S, H, D).

    by_name: what computes the attention in the place of diffusers' function.
    """
    plain = _AttentionBackendRegistry._backends[backend]
    if not hasattr(plain, "plain"):
        attend = by_name or plain

        def wrapped(**arguments: Any) -> Tensor:
            return _ContiguousGradient.apply(attend(**arguments))  # pyright: ignore[reportReturnType]

        wrapped.plain = plain  # pyright: ignore[reportFunctionMemberAccess]
        _AttentionBackendRegistry._backends[backend] = wrapped


def _attend_cudnn(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool = False, _parallel_config: None = None,
) -> Tensor:  # fmt: skip
    """Attention (B, S, H, D) by cuDNN, with what torch's `scaled_dot_product_attention` would call it with."""
    assert not enable_gqa and _parallel_config is None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, MASKED)
    has_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    query, key, value = (part.transpose(1, 2).contiguous() for part in (query, key, value))  # (B, H, S, D)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, attn_mask, has_gradient, dropout_p, is_causal, False, scale=scale
    )
    return found[0].transpose(1, 2)


def _attend_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool = False, _parallel_config: None = None,
) -> Tensor:  # fmt: skip
    """Attention (B, S, H, D) by torch's FlashAttention, or by the one that was activated in its place."""
    assert not enable_gqa and _parallel_config is None
    if attn_mask is not None:
        raise ValueError("FlashAttention takes no attn_mask")
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, H, S, D)
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )
    return found[0].transpose(1, 2)


BY_NAME: dict[AttentionBackendName, Callable[..., Tensor]] = {
    AttentionBackendName._NATIVE_CUDNN: _attend_cudnn,
    AttentionBackendName._NATIVE_FLASH: _attend_flash,
}


def _has_backend(module: nn.Module) -> bool:
    return hasattr(getattr(module, "processor", None), "_attention_backend")


def _resolve(wanted: Wanted, device: torch.device, problem_of: Callable[[Attention], str | None]) -> Attention:
    if wanted == "auto":
        return "cudnn" if device.type == "cuda" and problem_of("cudnn") is None else "native"
    problem = problem_of(wanted) if wanted != "native" else None
    if problem:
        others = ["auto", *(name for name in ("native", "cudnn") if name != wanted and device.type == "cuda")]
        raise ValueError(f"model.attention is {wanted!r}: {problem}; take {' or '.join(others)}")
    return wanted


def _find_problem(
    name: Attention, head_size: int, dtype: torch.dtype, device: torch.device, is_masked: bool
) -> str | None:
    """Why these kernels cannot be had: from what is known of them, then from what they do."""
    if device.type != "cuda":
        return f"this machine computes on {device.type}, where attention is torch's native"
    flash = FLASH.get(name)
    if flash and is_masked:
        return "the model's text has a mask, which FlashAttention does not take"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, and the model in {str(dtype).removeprefix('torch.')}"
    if flash:
        major, minor = torch.cuda.get_device_capability(device)
        if major not in flash.majors:
            card = torch.cuda.get_device_name(device)
            return f"it needs {flash.cards}, and this is a {card} of compute capability {major}.{minor}"
        if not _is_installed(flash.module):
            return f"it needs the package {flash.package}"
    try:
        if flash:
            torch.nn.attention.activate_flash_attention_impl(flash.name)
        _run_once(name, head_size, dtype, device, is_masked)
    except (ImportError, RuntimeError, ValueError) as error:
        if flash:
            torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        return f"it does not run here: {str(error).splitlines()[0]}"
    return None


def _is_installed(module: str) -> bool:
    """Whether a module is there; that of a package that is not has no place to be looked for."""
    package = module.split(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


def _run_once(name: Attention, head_size: int, dtype: torch.dtype, device: torch.device, is_masked: bool) -> None:
    """Attend forwards and backwards over a few tokens: by diffusers' function, where torch says what its kernels cannot
    do, and as it is called from then on.
    """
    shape = (PROBE_ROWS, PROBE_TOKENS, PROBE_HEADS, head_size)
    query, key, value = (torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(PROBE_ROWS, 1, 1, PROBE_TOKENS, device=device, dtype=torch.bool) if is_masked else None
    attend = _AttentionBackendRegistry._backends[BACKENDS[name]]
    attended = getattr(attend, "plain", attend)(query, key, value, attn_mask=mask)
    attended = attended + dispatch_attention_fn(query, key, value, attn_mask=mask, backend=BACKENDS[name])
    attended.sum().backward()
    assert query.grad is not None and query.grad.shape == shape
