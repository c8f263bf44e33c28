"""Ranks: every rank rolls out its own share of the tasks, and gradients are summed. One process needs none of it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all ranks, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, (world_size * N, ...), in the order of the ranks; every rank has N rows."""
        if self.world_size == 1:
            return tensor
        rows = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts).to(tensor.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, of anything small that can be pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any, source: int = 0) -> Any:
        """The main rank's value, or that of another `source`, of anything small that can be pickled."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, source)
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def local_device() -> torch.device:
    """Return this process's GPU, or else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start() -> Ranks:
    """Join the process group that torchrun has laid out; without torchrun, one rank."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank=rank, world_size=world_size, device=device)


def stop(ranks: Ranks) -> None:
    """Leave the process group."""
    if ranks.world_size > 1:
        dist.destroy_process_group()
