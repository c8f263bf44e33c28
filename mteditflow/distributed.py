"""Ranks: every rank makes its share of the trajectories, and gradients are summed. One process needs none of it.

What is numbered is numbered over all ranks: trajectory n is made by rank n W / N, and rows that are gathered come in
that order. So what is computed of gathered rows has the bits that one rank would have given it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.ranges import require
from mteditflow.types import Microbatch, Rollout

BUCKET = 2**26  # elements that are summed by one collective: 256 MiB of float32, beside the gradients


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others. On one rank every method gives back what it was given."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    def share(self, num_rows: int) -> range:
        """This rank's rows of so many, which the ranks divide."""
        size, rest = divmod(num_rows, self.world_size)
        assert rest == 0, (num_rows, self.world_size)
        return range(self.rank * size, (self.rank + 1) * size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all ranks, in place, many of them by one collective."""
        if self.world_size > 1:
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                dist.all_reduce(flat)
                for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(total.view_as(tensor))

    def max_(self, tensor: Tensor) -> None:
        """Take the largest of all ranks, element by element, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

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


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Cut tensors into lists of one dtype and device, of up to BUCKET elements or one tensor, in their order."""
    waiting: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket = waiting.setdefault(kind, [])
        if bucket and sum(part.numel() for part in bucket) + tensor.numel() > BUCKET:
            yield waiting.pop(kind)
            bucket = waiting.setdefault(kind, [])
        bucket.append(tensor)
    yield from waiting.values()


def even_out(
    microbatches: Iterable[Microbatch], rollout: Rollout, config: Config, ranks: Ranks
) -> Iterable[Microbatch]:
    """Add, where the base is sharded, microbatches of weight 0 until every rank has as many: a forward pass is then
    made by all ranks together, and one that makes fewer than the others leaves them waiting.
    """
    if config.distributed.shard == "none":
        return microbatches
    made = list(microbatches)
    num = torch.tensor(len(made), device=ranks.device)
    ranks.max_(num)
    if made:
        spare = replace(made[-1], weight=torch.zeros_like(made[-1].weight))
    else:
        is_finite = rollout.turns[0].latents.isfinite().flatten(2).all(2).all(0)  # weight 0 times NaN is NaN
        rows = is_finite.byte().argmax().cpu()[None]
        spare = Microbatch(turn=0, draw=(*rollout.schedule.trained_steps, 0)[0], rows=rows, weight=torch.zeros(1))
    return made + [spare] * (int(num) - len(made))


def local_device() -> torch.device:
    """Return this process's GPU, or else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def alone() -> Ranks:
    """One rank, on this process's device."""
    return Ranks(rank=0, world_size=1, device=local_device())


def start(config: Config, *, is_training: bool = True) -> Ranks:
    """Join the process group that torchrun has laid out; without torchrun, one rank. ValueError for ranks that cannot
    share the run; an evaluation needs no rollout that they divide.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_world(config, world_size, is_training=is_training)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        # gloo beside NCCL: small things that lie on the host
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.distributed.timeout_s))
    return Ranks(rank=rank, world_size=world_size, device=device)


def check_world(config: Config, world_size: int, *, is_training: bool = True) -> None:
    """ValueError where so many ranks cannot share an iteration's trajectories, or there is nobody to shard with."""
    num_rows = config.rollout.num_tasks * config.rollout.group_size
    remedy = (
        f"num_tasks x group_size = {num_rows} trajectories must be a multiple of the {world_size} ranks that share them"
    )
    require(not is_training or num_rows % world_size == 0, "rollout.num_tasks", config.rollout.num_tasks, remedy)
    judge, limit = config.reward, config.distributed.timeout_s
    is_patient = world_size == 1 or judge.judge != "vlm" or not judge.url or judge.max_wait_s < limit
    remedy = f"the other ranks give up after distributed.timeout_s, {limit} s: must be below it"
    require(is_patient, "reward.max_wait_s", judge.max_wait_s, remedy)
    is_right = world_size > 1 or config.distributed.shard == "none"
    require(is_right, "distributed.shard", config.distributed.shard, "one rank has nobody to share with: must be none")


def stop(ranks: Ranks) -> None:
    """Leave the process group."""
    if ranks.world_size > 1:
        dist.destroy_process_group()
