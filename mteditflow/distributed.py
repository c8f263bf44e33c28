"""Ranks: every rank rolls out its own share of the tasks, and gradients are summed. One process needs none of it."""

import os
import platform
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.version import describe_version


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

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def local_device() -> torch.device:
    """Return this process's GPU, or else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_s: int) -> Ranks:
    """Join the process group that torchrun has laid out; without torchrun, one rank.

    timeout_s: after which a rank that waits for another gives up. ValueError, one line: an environment that makes no
    sense.
    """
    rank, world_size, local_rank = read_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= (num_gpus := torch.cuda.device_count()):
            raise ValueError(
                f"LOCAL_RANK is {local_rank}: this machine shows {num_gpus} GPUs; start at most that many processes on "
                f"it (torchrun --nproc-per-node), or see CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout)
    return Ranks(rank=rank, world_size=world_size, device=device)


def read_environment() -> tuple[int, int, int]:
    """Read rank, number of ranks, and rank on this machine, as torchrun sets them; (0, 1, 0) where nobody has.

    ValueError, one line: they make no sense.
    """
    environment, remedy = os.environ, "start by torchrun, which sets it, or unset it"
    if ("RANK" in environment) != ("WORLD_SIZE" in environment):
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in environment else ("WORLD_SIZE", "RANK")
        raise ValueError(f"{there} is {environment[there]!r} and {missing} is not set: {remedy}")
    numbers = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = environment.get(name, default)
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(f"{name} is {text!r}: must be a number from 0; {remedy}")
        numbers.append(int(text))
    rank, world_size, local_rank = numbers
    if rank >= world_size:
        raise ValueError(f"RANK is {rank} of WORLD_SIZE {world_size}: must be less; {remedy}")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise ValueError(f"WORLD_SIZE is {world_size} and {name} is not set: {remedy}")
    return rank, world_size, local_rank


def check_same(ranks: Ranks, config: Config) -> None:
    """Raise ValueError, one line, on every rank where one runs another program or config than the first."""
    if ranks.world_size == 1:
        return
    sections = {name: section for name, section in asdict(config).items() if isinstance(section, dict)}
    facts = {"mteditflow": describe_version(), "torch": torch.__version__, "Python": platform.python_version()}
    facts |= {f"{name}.{key}": repr(value) for name, section in sections.items() for key, value in section.items()}
    every: list[dict[str, str]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(every, facts | {"host": socket.gethostname()})
    first = every[0]
    for rank, other in enumerate(every):
        names = [name for name in {**first, **other} if name != "host" and first.get(name) != other.get(name)]
        if names:
            differing = "; ".join(f"{name} is {other.get(name)}, not {first.get(name)}" for name in names[:5])
            more = f"; {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"rank {rank} (on {other['host']}) is not as rank 0 (on {first['host']}): {differing}{more}; give all "
                f"ranks the same program, config and command line"
            )


def stop(ranks: Ranks) -> None:
    """Leave the process group, where all ranks have come to their end."""
    if ranks.world_size > 1:
        dist.destroy_process_group()
