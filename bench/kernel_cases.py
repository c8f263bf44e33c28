"""What `pytest bench/` runs of every op: ours, the eager reference, and the reference compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mteditflow_kernels
import torch
from mteditflow_kernels import philox, reference
from near import draw, make_keys
from torch import Tensor

from mteditflow.flow import sigma_schedule, step_table

STEP = 5  # of 12, in the middle of the schedule
SHAPES = [(16, 4096, 64), (16, 1024, 64), (1, 4096, 64), (1, 1024, 64)]  # FLUX.1-Kontext at 1024 and at 512 px
GOAL_SHAPE = SHAPES[0]
BYTES = {  # moved per element of bfloat16 latents by the kernels of `static.VARIANTS`; noise float32
    "noise": 4,
    "step, noisy": 6,
    "step, ODE": 6,
    "log-prob": 6,
    "log-prob, backward": 8,
    "GRPO": 6,
    "GRPO, KL": 8,
    "GRPO-Guard": 8,
    "GRPO, backward": 8,
    "GRPO, KL, backward": 10,
    "GRPO-Guard, backward": 8,
    "NFT": 8,
    "NFT, KL": 10,
    "NFT, backward": 10,
    "NFT, KL, backward": 12,
}

BLOCK_BYTES = {"rows to 8 bits": 3, "norm and rope": 4, "norm and rope, backward": 6}  # `static.BLOCK_VARIANTS`
HEAD, WIDTH = 128, 4096  # as many elements as the latents have, in heads of FLUX's and rows of klein's


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of the ops."""

    counter_normal: Callable[..., Tensor]
    sde_step: Callable[..., tuple[Tensor, Tensor]]
    sde_log_prob: Callable[..., Tensor]
    grpo_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    nft_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    quantise_rows: Callable[..., tuple[Tensor, Tensor]]
    norm_rope: Callable[..., Tensor]


OWN = Ops(
    counter_normal=mteditflow_kernels.counter_normal,
    sde_step=mteditflow_kernels.sde_step,
    sde_log_prob=mteditflow_kernels.sde_log_prob,
    grpo_loss=mteditflow_kernels.grpo_loss,
    nft_loss=mteditflow_kernels.nft_loss,
    quantise_rows=mteditflow_kernels.quantise_rows,
    norm_rope=mteditflow_kernels.norm_rope,
)
EAGER = Ops(
    counter_normal=philox.counter_normal,
    sde_step=reference.sde_step,
    sde_log_prob=reference.sde_log_prob,
    grpo_loss=reference.grpo_loss,
    nft_loss=reference.nft_loss,
    quantise_rows=reference.quantise_rows,
    norm_rope=reference.norm_rope,
)


def compiled() -> Ops:
    """The reference by torch.compile, each shape for itself."""
    return Ops(**{name: torch.compile(op, dynamic=False) for name, op in vars(EAGER).items()})


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One number, or five, for each row of latents (B, L, C); the same for every set of buffers."""

    shape: tuple[int, ...]
    table: Tensor
    keys: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    sigma: Tensor
    probability: Tensor


def rows_for(latents: Tensor) -> Rows:
    """For a set of latents (n, B, L, C); the first three are velocity, latents and next latents where there are."""
    num_rows, device = latents.shape[1], latents.device
    table = step_table(sigma_schedule(12, 1024), noise_level=0.9).to(device)
    old = torch.zeros(num_rows, device=device)
    if len(latents) >= 3:
        velocity, x, made = latents[:3].double()
        old = reference.sde_log_prob(velocity, x, made, table, STEP).float()  # ratios near 1
    return Rows(
        shape=tuple(latents.shape[2:]),
        table=table,
        keys=make_keys(num_rows).to(device),
        old_log_prob=old - 2e-4,
        advantage=draw(1, num_rows).to(device),
        sigma=torch.linspace(0.9, 0.1, num_rows, device=device),
        probability=torch.linspace(0.1, 0.9, num_rows, device=device),
    )


Prepare = Callable[[Ops, Sequence[Tensor], Rows], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`prepare` makes the call that is timed, of `num_latents` tensors (B, L, C); `kernels` are what ours launches."""

    name: str
    kernels: tuple[str, ...]
    num_latents: int
    prepare: Prepare
    goal_us: float | None = None  # at GOAL_SHAPE in bfloat16, on one H200

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """What the algorithm moves in a call."""
        return sum((BYTES | BLOCK_BYTES)[name] for name in self.kernels) * prod(shape)


def _step(is_noisy: bool) -> Prepare:
    return lambda ops, x, rows: lambda: ops.sde_step(x[0], x[1], rows.table, STEP, rows.keys if is_noisy else None)[0]


def _grpo(has_kl: bool) -> Callable[[Ops, Sequence[Tensor], Rows], Tensor]:
    def loss(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Tensor:
        kl: dict[str, Any] = {"kl_beta": 0.1, "ref_velocity": x[3]} if has_kl else {}
        return ops.grpo_loss(
            x[0], x[1], x[2], rows.old_log_prob, rows.advantage, rows.table, STEP, clip_range=1e-3, **kl
        )[0]

    return loss


def _guard(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Tensor:
    return ops.grpo_loss(
        x[0], x[1], x[2], rows.old_log_prob, rows.advantage, rows.table, STEP, clip_range=1.0, old_velocity=x[3]
    )[0]


def _nft(has_kl: bool) -> Callable[[Ops, Sequence[Tensor], Rows], Tensor]:
    def loss(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Tensor:
        kl: dict[str, Any] = {"kl_beta": 0.1, "ref_velocity": x[4]} if has_kl else {}
        return ops.nft_loss(x[0], x[1], x[2], x[3], rows.sigma, rows.probability, beta=1.0, **kl)[0]

    return loss


Loss = Callable[[Ops, Sequence[Tensor], Rows], Tensor]


def _forward(loss_of: Loss) -> Prepare:
    return lambda ops, x, rows: lambda: loss_of(ops, x, rows)


def _both(loss_of: Loss) -> Prepare:
    """Forward and backward, to the gradient of the velocity."""

    def prepare(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Callable[[], Tensor]:
        velocity, one = x[0].detach().requires_grad_(), torch.ones((), device=x[0].device)
        one = one.to(torch.promote_types(velocity.dtype, torch.float32))
        return lambda: torch.autograd.grad(loss_of(ops, [velocity, *x[1:]], rows), velocity, one)[0]

    return prepare


def _backward(loss_of: Loss) -> Prepare:
    """Backward alone, of a forward pass made beforehand."""

    def prepare(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Callable[[], Tensor]:
        velocity = x[0].detach().requires_grad_()
        loss = loss_of(ops, [velocity, *x[1:]], rows)
        one = torch.ones_like(loss)
        return lambda: torch.autograd.grad(loss, velocity, one, retain_graph=True)[0]

    return prepare


def _quantise(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Callable[[], Tensor]:
    """The scales stand for both: the parity of the bits is `triton_block_cases.py`'s."""
    wide = x[0].reshape(-1, min(WIDTH, prod(rows.shape)))
    return lambda: ops.quantise_rows(wide)[1]


def _norm_rope(has_gradient: bool) -> Prepare:
    def prepare(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Callable[[], Tensor]:
        heads = x[0].detach().reshape(len(x[0]), -1, min(4, prod(rows.shape) // HEAD), HEAD)
        weight, angles = torch.ones_like(heads[0, 0, 0]), draw(2, heads.shape[1], HEAD).to(heads.device)
        if not has_gradient:
            return lambda: ops.norm_rope([(heads, weight, angles)], 1e-6)
        heads.requires_grad_()
        given = torch.ones_like(heads)
        return lambda: torch.autograd.grad(ops.norm_rope([(heads, weight, angles)], 1e-6), heads, given)[0]

    return prepare


CASES = [
    Case(
        name="noise", kernels=("noise",), num_latents=1,
        prepare=lambda ops, _, rows: lambda: ops.counter_normal(rows.keys, rows.shape),
    ),
    Case(name="step, noisy", kernels=("step, noisy",), num_latents=2, prepare=_step(True), goal_us=12),
    Case(name="step, ODE", kernels=("step, ODE",), num_latents=2, prepare=_step(False)),
    Case(
        name="log-prob, replayed", kernels=("log-prob",), num_latents=3, goal_us=7.5,
        prepare=lambda ops, x, rows: lambda: ops.sde_log_prob(x[0], x[1], x[2], rows.table, STEP),
    ),
    Case(name="GRPO, forward", kernels=("GRPO",), num_latents=3, prepare=_forward(_grpo(False))),
    Case(
        name="GRPO, both", kernels=("GRPO", "GRPO, backward"), num_latents=3, prepare=_both(_grpo(False)), goal_us=17
    ),
    Case(
        name="GRPO with KL, both", kernels=("GRPO, KL", "GRPO, KL, backward"), num_latents=4,
        prepare=_both(_grpo(True)),
    ),
    Case(
        name="GRPO-Guard, both", kernels=("GRPO-Guard", "GRPO-Guard, backward"), num_latents=4, prepare=_both(_guard)
    ),
    Case(name="NFT, forward", kernels=("NFT",), num_latents=4, prepare=_forward(_nft(False))),
    Case(name="NFT, backward", kernels=("NFT, backward",), num_latents=4, prepare=_backward(_nft(False))),
    Case(name="rows to 8 bits", kernels=("rows to 8 bits",), num_latents=1, prepare=_quantise),
    Case(name="norm and rope", kernels=("norm and rope",), num_latents=1, prepare=_norm_rope(False)),
    Case(
        name="norm and rope, both", kernels=("norm and rope", "norm and rope, backward"), num_latents=1,
        prepare=_norm_rope(True),
    ),
    Case(name="NFT with KL, both", kernels=("NFT, KL", "NFT, KL, backward"), num_latents=5, prepare=_both(_nft(True))),
]  # fmt: skip
