"""What torch.library and torch.compile ask of the registered ops, for any backend: `test_registered.py` runs it for the
reference, `triton_cases.py` for the kernels under the interpreter.
"""

from collections.abc import Callable
from typing import Any

import torch
from mteditflow_kernels import counter_normal, grpo_loss, nft_loss, sde_log_prob, sde_step
from near import draw, make_keys
from torch import Tensor

from mteditflow.flow import sigma_schedule, step_table

B, D = 3, 65


def schedule() -> tuple[Tensor, Tensor, Tensor]:
    """A table, a step of it for each row, noise keys; on the default device."""
    return step_table(sigma_schedule(12, 1024), noise_level=0.9), torch.tensor([0, 5, 10]), make_keys(B)


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents, next_latents, reference and old velocity; the trained one, draw(0), is not far from the old."""
    x, near = draw(1, B, D, dtype=dtype), draw(0, B, D, dtype=dtype)
    old = near + 0.1 * draw(2, B, D, dtype=dtype)
    return x, sde_step(old, x, *schedule())[0], near + draw(3, B, D, dtype=dtype), old


def calls(dtype: torch.dtype = torch.float32) -> dict[str, Callable[[Tensor], Any]]:
    """Each op as a function of the velocity; what the ones that can be differentiated return first is."""
    x, made, ref, old = drawn(dtype)
    table, steps, keys = schedule()
    row = [draw(i, B, dtype=dtype) for i in range(5, 7)]
    old_log_prob = sde_log_prob(old, x, made, table, steps)
    sigma, half = torch.linspace(1, 0.1, B).to(dtype), torch.full((B,), 0.3, dtype=dtype)
    return {
        "noise": lambda v: counter_normal(keys, (D,)),
        "step": lambda v: sde_step(v, x, table, 5, keys),
        "ODE step": lambda v: sde_step(v, x, table, steps, None)[0],
        "log-prob": lambda v: sde_log_prob(v, x, made, table, steps),
        "GRPO": lambda v: grpo_loss(v, x, made, old_log_prob, row[0], table, steps, clip_range=10.0),
        "GRPO, all options": lambda v: grpo_loss(
            v, x, made, old_log_prob, row[0], table, steps, clip_range=10.0, kl_beta=0.1, ref_velocity=ref,
            kl_form="exact", old_velocity=old, weight=row[1].abs(),
        ),
        "NFT": lambda v: nft_loss(v, old, x, made, sigma, half, beta=0.5),
        "NFT, all options": lambda v: nft_loss(
            v, old, x, made, sigma, half, beta=0.5, kl_beta=0.1, ref_velocity=ref, weight=row[1].abs()
        ),
    }  # fmt: skip


DIFFERENTIABLE = ("log-prob", "GRPO", "GRPO, all options", "NFT", "NFT, all options")


def first(result: Any) -> Tensor:
    """The output that a gradient is taken of."""
    return result if isinstance(result, Tensor) else result[0]


def tensors(result: Any) -> list[Tensor]:
    """All outputs, diagnostics included."""
    if isinstance(result, Tensor):
        return [result]
    return [each for part in result for each in (part.values() if isinstance(part, dict) else [part])]


def check_compiled(name: str, backend: str) -> None:
    """Compiled without a graph break, an op gives the bits of the eager call, and so does its gradient."""
    torch._dynamo.reset()
    call, results = calls()[name], []
    for run in (call, torch.compile(call, fullgraph=True, backend=backend)):
        velocity = draw(0, B, D).requires_grad_(name in DIFFERENTIABLE)
        out = run(velocity)
        grad = None
        if name in DIFFERENTIABLE:
            (grad,) = torch.autograd.grad(first(out).sum(), velocity)
        results.append([*tensors(out), *([] if grad is None else [grad])])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled), name


def registered_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of each registered op, as `torch.ops.mteditflow` takes them."""
    v = draw(0, B, D, dtype=dtype).requires_grad_()
    x, made, ref, old = drawn(dtype)
    table, steps, keys = schedule()
    rows = [sde_log_prob(old, x, made, table, steps), draw(6, B), draw(7, B).abs()]
    nft = (old, x, made, ref, torch.linspace(1, 0.1, B), torch.full((B,), 0.3), rows[2])
    return {
        "counter_normal": (keys, [5, 13]),
        "sde_step": (v.detach(), x, table, steps, 0, keys),
        "sde_log_prob": (v, x, made, table, None, 5),
        "grpo_loss": (v, x, made, ref, old, *rows, table, steps, 0, 10.0, 0.1, "exact"),
        "nft_loss": (v, *nft, 0.5, 0.1, 5.0),
    }


def check_op(name: str, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic shapes agree with the op."""
    op = getattr(torch.ops.mteditflow, name).default
    torch.library.opcheck(op, registered_arguments(dtype)[name], atol=0.0, rtol=0.0)
