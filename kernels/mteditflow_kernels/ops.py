"""The public ops: arguments are checked on the host, without a sync, then Triton or the eager reference runs.

`reference` says what each op computes. Triton runs on CUDA tensors of float32, bfloat16 and float16; float64 is always
eager. Both give a row the same bits in every batch, and the log-prob that training computes those of the rollout, but
not each other's bits. They run outside of what torch.compile sees, which is the transformer's blocks; `quantise_rows`
and `norm_rope` run inside.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mteditflow_kernels import philox, reference, registered
from mteditflow_kernels.backend import is_triton, triton
from mteditflow_kernels.reference import GRPO_FIGURES, NFT_FIGURES, RopePart

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_latents(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless the tensors are (B, ...), of the shape and device of `like`."""
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
    """Raise ValueError unless the tensors hold one floating-point number for each row of `like`."""
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


def _rows(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Prepare what the kernels read one number of per row: float32 (float64 for such latents), contiguous."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [None if tensor is None else tensor.detach().to(dtype).contiguous() for tensor in tensors]


def counter_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers, float32 (B, *shape), a function of `keys` (B, 5) int64 and the element alone."""
    _check_keys(keys, keys)
    if is_triton(keys):
        return triton("sde").normal(keys.contiguous(), shape)
    return philox.counter_normal(keys, shape)


def sde_step(
    velocity: Tensor, latents: Tensor, table: Tensor, step: Tensor | int, noise_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make a denoising step: next_latents (B, ...) in the dtype of `latents`, and log_prob (B,) of the stored values.

    `noise_keys` (B, 5) int64 are the keys of `counter_normal`; None draws no noise, which only an ODE step can do
    without. `step` (B,) int64, or one for all rows. Raises ValueError for arguments that do not go together.
    """
    _check_latents(latents, latents=latents, velocity=velocity)
    _check_step(latents, table, step)
    if noise_keys is not None:
        _check_keys(latents, noise_keys)
        noise_keys = noise_keys.contiguous()
    if is_triton(latents):
        return triton("sde").step_and_score(velocity, latents, None, table, step, noise_keys)
    return reference.sde_step(velocity, latents, table, step, noise_keys)


def sde_log_prob(velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor, step: Tensor | int) -> Tensor:
    """Compute the log-prob (B,) of `next_latents` (B, ...) given `latents`, to the bit that of `sde_step`; NaN at ODE
    steps. Differentiable in velocity. Raises ValueError for arguments that do not go together.
    """
    _check_latents(latents, latents=latents, velocity=velocity, next_latents=next_latents)
    _check_step(latents, table, step)
    if is_triton(latents):
        return triton("sde").log_prob(velocity, latents, next_latents, table, step)
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
    old_velocity: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `reference.grpo_loss`, differentiable in velocity. ValueError for arguments that do not go together."""
    velocities = {"velocity": velocity, "ref_velocity": ref_velocity, "old_velocity": old_velocity}
    _check_latents(latents, latents=latents, next_latents=next_latents, **velocities)
    _check_rows(latents, old_log_prob=old_log_prob, advantage=advantage, weight=weight)
    _check_step(latents, table, step)
    reference.check_kl(kl_beta, ref_velocity, kl_form)
    if not is_triton(latents):
        return reference.grpo_loss(
            velocity, latents, next_latents, old_log_prob, advantage, table, step, clip_range=clip_range,
            kl_beta=kl_beta, ref_velocity=ref_velocity, kl_form=kl_form, old_velocity=old_velocity, weight=weight,
        )  # fmt: skip
    tensors = velocity, latents, next_latents, ref_velocity, old_velocity
    rows = _rows(latents, old_log_prob, advantage, weight)
    column = reference.KL_EXACT if kl_form == "exact" else reference.KL_PUBLISHED
    loss, figures = triton("grpo").loss(tensors, tuple(rows), table, step, clip_range, kl_beta, column)
    return loss, dict(zip(GRPO_FIGURES, figures.detach().unbind(), strict=True))


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
    """Compute `reference.nft_loss`, differentiable in velocity. ValueError for arguments that do not go together."""
    velocities = {"velocity": velocity, "old_velocity": old_velocity, "ref_velocity": ref_velocity}
    _check_latents(clean_latents, clean_latents=clean_latents, noise=noise, **velocities)
    _check_rows(clean_latents, sigma=sigma, reward_probability=reward_probability, weight=weight)
    reference.check_kl(kl_beta, ref_velocity, "published")
    if not is_triton(clean_latents):
        return reference.nft_loss(
            velocity, old_velocity, clean_latents, noise, sigma, reward_probability, beta=beta, kl_beta=kl_beta,
            ref_velocity=ref_velocity, max_advantage=max_advantage, weight=weight,
        )  # fmt: skip
    tensors = velocity, old_velocity.detach(), clean_latents, noise, ref_velocity
    rows = _rows(clean_latents, sigma, reward_probability, weight)
    loss, figures = triton("nft").loss(tensors, tuple(rows), beta, kl_beta, max_advantage)
    return loss, dict(zip(NFT_FIGURES, figures.detach().unbind(), strict=True))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.quantise_rows`, not differentiable: q (..., K) float8_e4m3fn and scale (..., 1) float32.

    Raises ValueError where x is not floating-point (..., K).
    """
    if x.dtype not in DTYPES or x.ndim < 1:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: must be floating-point of shape (..., K)")
    x = x.detach()
    return registered.quantise_rows(x.contiguous()) if is_triton(x) else reference.quantise_rows(x)


def norm_rope(parts: Sequence[RopePart], eps: float) -> Tensor:
    """Compute `reference.norm_rope`, by one launch a part where no weight is trained and D is a power of two.

    Raises ValueError for parts that do not go together.
    """
    first = parts[0][0]
    for x, weight, angles in parts:
        size = x.shape[-1]
        if x.ndim != 4 or x.dtype not in DTYPES or size % 2 or weight.shape != (size,):
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}, its weight {tuple(weight.shape)}: must be (B, S, H, D) and (D,)"
            )
        if (len(x), x.shape[2:], x.dtype) != (len(first), first.shape[2:], first.dtype):
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: must differ from {tuple(first.shape)} in tokens alone")
        if angles.shape != (x.shape[1], size):
            raise ValueError(f"angles are {tuple(angles.shape)}: must be {(x.shape[1], size)}")
    size = first.shape[-1]
    is_fit = size & (size - 1) == 0 and not any(weight.requires_grad for _, weight, _ in parts)
    if not (is_triton(first) and is_fit):
        return reference.norm_rope(parts, eps)
    return registered.norm_rope(*map(list, zip(*parts, strict=True)), eps)


def attend_cache(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    weights: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor], eps: float,
) -> Tensor:  # fmt: skip
    """Compute `reference.attend_cache`, not differentiable, by two launches where D is a power of two.

    Raises ValueError for arguments that do not go together.
    """
    num_rows, num_heads, size = key.shape
    if value.shape != key.shape or query.shape != (num_rows, query.shape[1], size) or query.shape[1] % num_heads:
        raise ValueError(f"query is {tuple(query.shape)}, key {tuple(key.shape)}: must be (B, H, D) and (B, h, D)")
    for name, cache in (("keys", keys), ("values", values)):
        if cache.shape != (num_rows, num_heads, keys.shape[2], size) or cache.stride() != keys.stride():
            raise ValueError(f"{name} are {tuple(cache.shape)}: must be (B, h, L, D), alike in memory, here "
                             f"{(num_rows, num_heads, keys.shape[2], size)}")  # fmt: skip
        if cache.stride(2) != size or cache.stride(3) != 1:
            raise ValueError(f"{name} have strides {cache.stride()}: a head's places must be contiguous")
    if places.shape != (num_rows,) or places.dtype != torch.int64:
        raise ValueError(f"places are {places.dtype} {tuple(places.shape)}: must be int64 of shape ({num_rows},)")
    if any(weight.shape != (size,) for weight in weights) or any(a.shape != (num_rows, size) for a in angles):
        raise ValueError(f"weights must be ({size},) and angles {(num_rows, size)}")
    if not (is_triton(query) and size >= 16 and size & (size - 1) == 0):
        return reference.attend_cache(query, key, value, keys, values, places, weights, angles, eps)
    query, key, value, *turn = (part.contiguous() for part in (query, key, value, *angles))
    return triton("attend").attend_cache(query, key, value, keys, values, places, weights, (turn[0], turn[1]), eps)
