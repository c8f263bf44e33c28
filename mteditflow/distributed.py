"""Ranks: every rank makes its share of the trajectories, and gradients are summed. One process needs none of it.

What is numbered is numbered over all ranks: trajectory n is made by rank n W / N, and rows that are gathered come in
that order. So what is computed of gathered rows has the bits that one rank would have given it.
"""

import os
import platform
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mteditflow.config import Config
from mteditflow.config.ranges import require
from mteditflow.config.version import describe_version
from mteditflow.types import Microbatch, Rollout, Rollouts

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

    def to_main(self, value: Any, rank: int) -> Any:
        """The value of one rank, of anything small that can be pickled, on the main rank; the others have their own."""
        values = [value]
        if rank == self.rank and rank > 0:
            dist.send_object_list(values, 0)
        elif self.is_main and rank > 0:
            dist.recv_object_list(values, rank)
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
    microbatches: Iterable[Microbatch], rollout: Rollout | Rollouts, config: Config, ranks: Ranks
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
        part = rollout.parts[0]
        is_finite = part.turns[0].latents.isfinite().flatten(2).all(2).all(0)  # weight 0 times NaN is NaN
        rows = is_finite.byte().argmax().cpu()[None]
        spare = Microbatch(turn=0, draw=(*part.schedule.trained_steps, 0)[0], rows=rows, weight=torch.zeros(1))
    return made + [spare] * (int(num) - len(made))


def local_device() -> torch.device:
    """Return this process's GPU, or else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def alone() -> Ranks:
    """One rank, on this process's device."""
    return Ranks(rank=0, world_size=1, device=local_device())


def start(config: Config, *, is_training: bool = True) -> Ranks:
    """Join the process group that torchrun has laid out; without torchrun, one rank. ValueError, one line: an
    environment that makes no sense; ranks that cannot share the run; an evaluation needs no rollout that they divide.
    """
    rank, world_size, local_rank = read_environment()
    check_world(config, world_size, is_training=is_training)
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
        # gloo beside NCCL: small things that lie on the host
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=config.distributed.timeout_s)
        store, *_ = next(rendezvous("env://", timeout=timeout))
        store = _new_part(store, rank, world_size, config.distributed.timeout_s)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return Ranks(rank=rank, world_size=world_size, device=device)


def _new_part(store: Store, rank: int, world_size: int, timeout_s: float) -> Store:
    """A part of the store that the first rank names, for all that have started with it.

    torchrun keeps one store through its restarts, and a rank that finds there what a dead one has left waits for that
    one for ever. How often a rank was restarted does not tell: machines that did not fail count otherwise. So each
    leaves a new word, and is told the part by it.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank:
        store.set(f"arrived/{rank}", word)
        part = store.get(f"part of/{word}").decode()
        store.set(f"{part}/met/{rank}", "")
        return PrefixStore(part, store)
    told, missing = set[bytes](), list(range(1, world_size))
    while missing := [other for other in missing if not store.check([f"{word}/met/{other}"])]:
        arrived = [f"arrived/{other}" for other in missing if store.check([f"arrived/{other}"])]
        for other in {store.get(key) for key in arrived} - told:
            store.set(f"part of/{other.decode()}", word)
            told.add(other)
        if time.monotonic() > end:
            raise ValueError(f"ranks {', '.join(map(str, missing))} have not come in {timeout_s} s: see their output")
        time.sleep(0.02)
    return PrefixStore(word, store)


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
    facts = {"mteditflow": describe_version(), "torch": torch.__version__, "Python": platform.python_version()}
    for section, fields in asdict(config).items():
        facts |= {f"{section}.{name}": repr(value) for name, value in fields.items()}
    every = ranks.gather_objects(facts | {"host": socket.gethostname()})
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
    rows, is_cut = config.rollout.microbatch_size, config.distributed.shard != "none"
    is_even = not (is_training and is_cut and config.data.buckets) or num_rows // world_size % rows == 0
    remedy = (
        f"with data.buckets and distributed.shard every rank makes equally many forward passes: must divide its "
        f"{num_rows // world_size} trajectories"
    )
    require(is_even, "rollout.microbatch_size", rows, remedy)
    is_right = world_size > 1 or config.distributed.shard == "none"
    require(is_right, "distributed.shard", config.distributed.shard, "one rank has nobody to share with: must be none")


def stop(ranks: Ranks) -> None:
    """Leave the process group, where all ranks have come to their end."""
    if ranks.world_size > 1:
        dist.destroy_process_group()
