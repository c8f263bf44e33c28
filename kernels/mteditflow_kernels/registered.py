"""The ops as torch.compile, opcheck and export see them: opaque, with a fake, an autograd formula and a backward op.

Only compiled code comes through here: the dispatcher costs about 10 microseconds, and eager calls go straight to the
implementation (`ops`). Each is `torch.ops.mteditflow.NAME`; a step is `steps` (B,) int64, or None and `step` for all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from mteditflow_kernels import philox, reference
from mteditflow_kernels.backend import is_triton, triton


def _step(steps: Tensor | None, step: int) -> Tensor | int:
    return step if steps is None else steps


def _column(kl_form: str) -> int:
    return reference.KL_EXACT if kl_form == "exact" else reference.KL_PUBLISHED


def _row(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """A float32 result, float64 for float64 latents; (B,) unless given."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape or (like.shape[0],), dtype=dtype)


@custom_op("mteditflow::counter_normal", mutates_args=())
def counter_normal(keys: Tensor, shape: list[int]) -> Tensor:
    """`ops.counter_normal`."""
    own = tuple(shape)
    return triton("sde").normal(keys, own) if is_triton(keys) else philox.counter_normal(keys, own)


@counter_normal.register_fake
def _(keys: Tensor, shape: list[int]) -> Tensor:
    return keys.new_empty((keys.shape[0], *shape), dtype=torch.float32)


@custom_op("mteditflow::sde_step", mutates_args=())
def sde_step(
    velocity: Tensor, latents: Tensor, table: Tensor, steps: Tensor | None, step: int, noise_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.sde_step`; not differentiable."""
    if is_triton(latents):
        return triton("sde").step_and_score(velocity, latents, None, table, _step(steps, step), noise_keys)
    return reference.sde_step(velocity, latents, table, _step(steps, step), noise_keys)


@sde_step.register_fake
def _(velocity: Tensor, latents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(latents), _row(latents)


@custom_op("mteditflow::sde_log_prob", mutates_args=())
def sde_log_prob(
    velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor, steps: Tensor | None, step: int
) -> Tensor:
    """`ops.sde_log_prob`."""
    if is_triton(latents):
        return triton("sde").step_and_score(velocity, latents, next_latents, table, _step(steps, step), None)[1]
    return reference.sde_log_prob(velocity, latents, next_latents, table, _step(steps, step))


@custom_op("mteditflow::sde_log_prob_backward", mutates_args=())
def sde_log_prob_backward(
    grad_log_prob: Tensor, velocity: Tensor, latents: Tensor, next_latents: Tensor, table: Tensor,
    steps: Tensor | None, step: int,
) -> Tensor:  # fmt: skip
    """The gradient of `velocity`."""
    backward = triton("sde").log_prob_backward if is_triton(latents) else reference.sde_log_prob_backward
    return backward(grad_log_prob, velocity, latents, next_latents, table, _step(steps, step))


@sde_log_prob.register_fake
def _(velocity: Tensor, latents: Tensor, *_: Any) -> Tensor:
    return _row(latents)


@sde_log_prob_backward.register_fake
def _(grad_log_prob: Tensor, velocity: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(velocity)


def _keep_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.step = inputs
    ctx.save_for_backward(*tensors)


def _log_prob_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return sde_log_prob_backward(grad, *ctx.saved_tensors, ctx.step), *[None] * 5


sde_log_prob.register_autograd(_log_prob_gradient, setup_context=_keep_step)


@custom_op("mteditflow::grpo_loss", mutates_args=())
def grpo_loss(
    velocity: Tensor, latents: Tensor, next_latents: Tensor, ref_velocity: Tensor | None, old_velocity: Tensor | None,
    old_log_prob: Tensor, advantage: Tensor, weight: Tensor | None, table: Tensor, steps: Tensor | None, step: int,
    clip_range: float, kl_beta: float, kl_form: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, the diagnostics (7,) in the order of `reference.GRPO_FIGURES`, and what the backward op needs."""
    if is_triton(latents):
        return triton("grpo").forward(
            (velocity, latents, next_latents, ref_velocity, old_velocity), (old_log_prob, advantage, weight), table,
            _step(steps, step), clip_range, kl_beta, _column(kl_form),
        )  # fmt: skip
    loss, figures = reference.grpo_loss(
        velocity, latents, next_latents, old_log_prob, advantage, table, _step(steps, step), clip_range=clip_range,
        kl_beta=kl_beta, ref_velocity=ref_velocity, kl_form=kl_form, old_velocity=old_velocity, weight=weight,
    )  # fmt: skip
    return loss, torch.stack(list(figures.values())), _row(latents, 4 * len(latents)).zero_()


@custom_op("mteditflow::grpo_loss_backward", mutates_args=())
def grpo_loss_backward(
    grad_loss: Tensor, velocity: Tensor, latents: Tensor, next_latents: Tensor, ref_velocity: Tensor | None,
    old_velocity: Tensor | None, old_log_prob: Tensor, advantage: Tensor, weight: Tensor | None, table: Tensor,
    steps: Tensor | None, slopes: Tensor, step: int, clip_range: float, kl_beta: float, kl_form: str,
) -> Tensor:  # fmt: skip
    """The gradient of `velocity`."""
    if is_triton(latents):
        tensors = (velocity, latents, next_latents, ref_velocity, old_velocity)
        return triton("grpo").backward(grad_loss, tensors, slopes, table, _step(steps, step), _column(kl_form))
    return reference.grpo_loss_backward(
        grad_loss, velocity, latents, next_latents, old_log_prob, advantage, table, _step(steps, step),
        clip_range=clip_range, kl_beta=kl_beta, ref_velocity=ref_velocity, kl_form=kl_form, old_velocity=old_velocity,
        weight=weight,
    )  # fmt: skip


@grpo_loss.register_fake
def _(velocity: Tensor, latents: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = len(reference.GRPO_FIGURES)
    return _row(latents)[0].clone(), _row(latents, count), _row(latents, 4 * latents.shape[0])


@grpo_loss_backward.register_fake
def _(grad_loss: Tensor, velocity: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(velocity)


def _keep_grpo(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[10:]
    ctx.save_for_backward(*inputs[:10], output[2])


def _grpo_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return grpo_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 13


grpo_loss.register_autograd(_grpo_gradient, setup_context=_keep_grpo)


@custom_op("mteditflow::nft_loss", mutates_args=())
def nft_loss(
    velocity: Tensor, old_velocity: Tensor, clean_latents: Tensor, noise: Tensor, ref_velocity: Tensor | None,
    sigma: Tensor, reward_probability: Tensor, weight: Tensor | None, beta: float, kl_beta: float,
    max_advantage: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, the diagnostics (2,) in the order of `reference.NFT_FIGURES`, and what the backward op needs."""
    if is_triton(clean_latents):
        return triton("nft").forward(
            (velocity, old_velocity, clean_latents, noise, ref_velocity), (sigma, reward_probability, weight), beta,
            kl_beta, max_advantage,
        )  # fmt: skip
    loss, figures = reference.nft_loss(
        velocity, old_velocity, clean_latents, noise, sigma, reward_probability, beta=beta, kl_beta=kl_beta,
        ref_velocity=ref_velocity, max_advantage=max_advantage, weight=weight,
    )  # fmt: skip
    return loss, torch.stack(list(figures.values())), _row(clean_latents, 4 * len(clean_latents)).zero_()


@custom_op("mteditflow::nft_loss_backward", mutates_args=())
def nft_loss_backward(
    grad_loss: Tensor, velocity: Tensor, old_velocity: Tensor, clean_latents: Tensor, noise: Tensor,
    ref_velocity: Tensor | None, sigma: Tensor, reward_probability: Tensor, weight: Tensor | None, sums: Tensor,
    beta: float, kl_beta: float, max_advantage: float,
) -> Tensor:  # fmt: skip
    """The gradient of `velocity`."""
    if is_triton(clean_latents):
        return triton("nft").backward(
            grad_loss, (velocity, old_velocity, clean_latents, noise, ref_velocity),
            (sigma, reward_probability, weight), sums, beta, kl_beta, max_advantage,
        )  # fmt: skip
    return reference.nft_loss_backward(
        grad_loss, velocity, old_velocity, clean_latents, noise, sigma, reward_probability, beta=beta, kl_beta=kl_beta,
        ref_velocity=ref_velocity, max_advantage=max_advantage, weight=weight,
    )  # fmt: skip


@nft_loss.register_fake
def _(velocity: Tensor, old_velocity: Tensor, clean_latents: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = len(reference.NFT_FIGURES)
    return _row(clean_latents)[0].clone(), _row(clean_latents, count), _row(clean_latents, 4 * clean_latents.shape[0])


@nft_loss_backward.register_fake
def _(grad_loss: Tensor, velocity: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(velocity)


def _keep_nft(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], output[2])


def _nft_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return nft_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 10


nft_loss.register_autograd(_nft_gradient, setup_context=_keep_nft)
