"""The public ops: arguments are checked on the host, without a sync, then Triton or the eager reference runs.

`reference` says what each op computes. Triton runs on CUDA tensors of float32, bfloat16 and float16; float64 is always
eager. Both give a row the same bits in every batch, and the log-prob that training computes those of the rollout, but
not each other's bits.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mteditflow_kernels import philox, reference

BACKENDS = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_chosen = "auto"

GRPO_FIGURES = (
    *("ratio_mean", "ratio_error", "clip_fraction", "approx_kl", "kl", "policy_loss", "log_prob_difference"),
)


def use_backend(name: str) -> None:
    """'auto': Triton for CUDA tensors where it is installed; 'triton': Triton or an error; 'reference': eager torch."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: must be one of {', '.join(BACKENDS)}")
    if name == "triton" and not _has_triton():
        raise ValueError("backend is 'triton': triton is not installed, pip install triton")
    _chosen = name


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _triton(part: str) -> ModuleType:
    """The Triton implementation of a part of the ops; imported when it first runs."""
    return import_module(f"mteditflow_kernels.triton_{part}")


def _is_triton(tensor: Tensor) -> bool:
    if _chosen == "reference" or tensor.dtype == torch.float64:
        return False
    return _chosen == "triton" or (tensor.is_cuda and _has_triton())


def _check_latents(like: Tensor, **tensors: Tensor | None) -> None:
    """(B, ...) each, of the shape and device of `like`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: must be float32, bfloat16, float16 or float64")
        if tensor.shape != like.shape or tensor.ndim < 2:
            raise ValueError(f"{name} is {tuple(tensor.shape)}: must be (B, ...), here {tuple(like.shape)}")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {like.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: must be contiguous")


def _check_rows(like: Tensor, **tensors: Tensor | None) -> None:
    """One floating-point number for each row of `like`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != like.shape[:1] or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: must be floating-point of shape ({len(like)},)"
            )
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {like.device}")


def _check_step(like: Tensor, table: Tensor, step: Tensor | int) -> None:
    if table.ndim != 2 or table.shape[1] != reference.NUM_COLUMNS or table.dtype != torch.float32:
        raise ValueError(
            f"table is {table.dtype} {tuple(table.shape)}: must be float32 of shape (S, {reference.NUM_COLUMNS})"
        )
    if table.device != like.device:
        raise ValueError(f"table is on {table.device}: must be on {like.device}")
    if isinstance(step, int):
        smallest = largest = step
    elif step.dtype != torch.int64 or step.shape != like.shape[:1] or step.device != like.device:
        raise ValueError(
            f"step is {step.dtype} {tuple(step.shape)} on {step.device}: must be an int, or int64 of shape "
            f"({len(like)},) on {like.device}"
        )
    elif step.is_cuda:
        return  # its values are not the host's to know
    else:
        smallest, largest = int(step.min()), int(step.max())
    if smallest < 0 or largest >= len(table):
        raise ValueError(f"step is {smallest if smallest < 0 else largest}: must lie in 0 to {len(table) - 1}")


def _check_keys(like: Tensor, keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.shape != (len(like), 5) or keys.device != like.device:
        raise ValueError(
            f"keys are {keys.dtype} {tuple(keys.shape)} on {keys.device}: must be int64 of shape ({len(like)}, 5) "
            f"on {like.device}"
        )


def counter_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 (B, *shape), a function of `keys` (B, 5) int64 and the element alone."""
    _check_keys(keys, keys)
    if _is_triton(keys):
        return _triton("sde").normal(keys.contiguous(), shape)
    return philox.counter_normal(keys, shape)


def sde_step(
    velocity: Tensor, latents: Tensor, table: Tensor, step: Tensor | int, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One denoising step: next_latents (B, ...) in the dtype of `latents`, and log_prob (B,) of these stored values.

    `keys` (B, 5) int64 are the noise keys of `counter_normal`; None draws no noise, which only an ODE step can do
    without. `step` (B,) int64, or one for all rows. Raises ValueError for arguments that do not go together.
    """
    _check_latents(latents, latents=latents, velocity=velocity)
    _check_step(latents, table, step)
    if keys is not None:
        _check_keys(latents, keys)
    if _is_triton(latents):
        return _triton("sde").step_and_score(
            velocity, latents, None, table, step, None if keys is None else keys.contiguous()
        )
    return reference.sde_step(velocity, latents, table, step, keys)


def sde_log_prob(velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor, step: Tensor | int) -> Tensor:
    """Log-prob (B,) of `next_latents` (B, ...) given `latents`, differentiable in velocity; NaN at ODE steps. The bits
    that `sde_step` returned. Raises ValueError for arguments that do not go together.
    """
    _check_latents(latents, latents=latents, velocity=velocity, next_latents=next_latents)
    _check_step(latents, table, step)
    if _is_triton(latents):
        return _triton("sde").log_prob(velocity, latents, next_latents, table, step)
    return reference.sde_log_prob(velocity, latents, next_latents, table, step)


def grpo_loss(
    velocity: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    table: Tensor,
    step: Tensor | int,
    *,
    clip_range: float,
    kl_beta: float = 0.0,
    ref_velocity: Tensor | None = None,
    kl_form: str = "published",
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.grpo_loss`; differentiable in velocity. Raises ValueError for arguments that do not go together."""
    _check_latents(latents, latents=latents, velocity=velocity, next_latents=next_latents, ref_velocity=ref_velocity)
    _check_rows(latents, old_log_prob=old_log_prob, advantage=advantage, weight=weight)
    _check_step(latents, table, step)
    reference.check_kl(kl_beta, ref_velocity, kl_form)
    if not _is_triton(latents):
        return reference.grpo_loss(
            velocity, latents, next_latents, old_log_prob, advantage, table, step,
            clip_range=clip_range, kl_beta=kl_beta, ref_velocity=ref_velocity, kl_form=kl_form, weight=weight,
        )  # fmt: skip
    column = reference.KL_EXACT if kl_form == "exact" else reference.KL_PUBLISHED
    loss, figures = _triton("grpo").loss(
        velocity, latents, next_latents, ref_velocity, *_rows(old_log_prob, advantage, weight), table,
        (step, clip_range, kl_beta, column),
    )  # fmt: skip
    return loss, dict(zip(GRPO_FIGURES, figures[1:].unbind(), strict=True))


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    clean_latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    reward_probability: Tensor,
    *,
    beta: float,
    kl_beta: float = 0.0,
    ref_velocity: Tensor | None = None,
    max_advantage: float = 5.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.nft_loss`; differentiable in velocity. Raises ValueError for arguments that do not go together."""
    own = {"velocity": velocity, "old_velocity": old_velocity, "noise": noise, "ref_velocity": ref_velocity}
    _check_latents(clean_latents, clean_latents=clean_latents, **own)
    _check_rows(clean_latents, sigma=sigma, reward_probability=reward_probability, weight=weight)
    reference.check_kl(kl_beta, ref_velocity, "published")
    if not _is_triton(clean_latents):
        return reference.nft_loss(
            velocity, old_velocity, clean_latents, noise, sigma, reward_probability, beta=beta, kl_beta=kl_beta,
            ref_velocity=ref_velocity, max_advantage=max_advantage, weight=weight,
        )  # fmt: skip
    loss, figures = _triton("nft").loss(
        velocity, old_velocity.detach(), clean_latents, noise, ref_velocity,
        *_rows(sigma, reward_probability, weight), (beta, kl_beta, max_advantage),
    )  # fmt: skip
    return loss, dict(zip(("policy_loss", "kl"), figures[1:].unbind(), strict=True))


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """What the kernels read one number of per row: float32, contiguous."""
    return [None if tensor is None else tensor.detach().to(torch.float32).contiguous() for tensor in tensors]
