"""`pytest bench/` without a GPU: what the compiler made of every kernel, the floor that follows, eager CPU times.

The floor is bytes over bandwidth, with the 4.3 TB/s that a copy reaches on an H200 (not measured here); it is no
measurement of a kernel. Times in the benchmark table are of the eager reference on this machine's CPU.
"""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import BLOCK_BYTES, BYTES
from mteditflow_kernels import grpo_loss, nft_loss, noise_keys, sde_log_prob, sde_step
from mteditflow_kernels.static import BLOCK_VARIANTS, VARIANTS, figures
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mteditflow.flow import sigma_schedule, step_table

COPY_BYTES_PER_SECOND = 4.3e12
NUM_ELEMENTS = 16 * 4096 * 64  # B = 16 at 1024 px


@pytest.mark.parametrize("capability", [90, 100])
def test_table_of_static_figures(capability: int, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=f"ahead of time for sm_{capability}, bfloat16, [16, 4096, 64]; nothing here was run on a GPU")
    names = ("registers", "stack + local", "128-bit loads / stores", "instructions / element", "bytes / element")
    table.add_column("kernel", no_wrap=True)
    for name in (*names, "floor, us"):
        table.add_column(name)
    num_bytes = BYTES | BLOCK_BYTES
    for name, variant in (VARIANTS | BLOCK_VARIANTS).items():
        f = figures(variant, capability)
        floor = 1e6 * num_bytes[name] * NUM_ELEMENTS / COPY_BYTES_PER_SECOND
        moved = f"{f.loads_128} / {f.stores_128}"
        row = (
            f.registers,
            f.stack + f.local,
            moved,
            f"{f.instructions_per_element:.0f}",
            num_bytes[name],
            f"{floor:.1f}",
        )
        table.add_row(name, *map(str, row))
    with capsys.disabled():
        Console(width=120).print("\n", table)


def _eager(name: str) -> Callable[[], object]:
    """The reference on 32 rows of the embedded editor's 512 elements, float32."""
    table, rows = step_table(sigma_schedule(4, 16), noise_level=0.9), torch.arange(32)
    keys = noise_keys(seed=0, step=0, task=rows, trajectory=rows, turn=0, denoising_step=0)
    velocity, latents, other = (torch.randn(32, 16, 32) for _ in range(3))
    made, log_prob = sde_step(velocity, latents, table, 1, keys)
    ones = torch.full((32,), 0.5)

    def backward(loss_of: Callable[[Tensor], Tensor]) -> None:
        loss_of(velocity.clone().requires_grad_()).backward()

    return {
        "step": lambda: sde_step(velocity, latents, table, 1, keys),
        "log-prob": lambda: sde_log_prob(velocity, latents, made, table, 1),
        "GRPO, forward and backward": lambda: backward(
            lambda v: grpo_loss(v, latents, made, log_prob, ones, table, 1, clip_range=1e-3)[0]
        ),
        "NFT, forward and backward": lambda: backward(
            lambda v: nft_loss(v, velocity, latents, other, ones, ones, beta=1.0)[0]
        ),
    }[name]


@pytest.mark.parametrize("name", ["step", "log-prob", "GRPO, forward and backward", "NFT, forward and backward"])
def test_eager_cpu_time(name: str, benchmark: Callable[..., object]) -> None:
    """32 rows of 512 elements: what the default run's microbatch costs beside the transformer."""
    benchmark(_eager(name))
