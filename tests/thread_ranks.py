"""Ranks as threads of one process, for what meets by objects alone: torchrun takes 6 s a rank to start."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from mteditflow.distributed import Ranks

T = TypeVar("T")
PATIENCE = 60  # seconds until a rank that waits for the others gives up


@dataclass(frozen=True, kw_only=True)
class ThreadRanks(Ranks):
    """One of several threads. What it gives to others is pickled, as between processes."""

    place: threading.Barrier
    slots: list[bytes]
    meetings: list[None] = field(default_factory=list)

    def gather_objects(self, value: Any) -> list[Any]:
        self.meetings.append(None)
        self.slots[self.rank] = pickle.dumps(value)
        self.place.wait(PATIENCE)
        values = [pickle.loads(slot) for slot in self.slots]
        self.place.wait(PATIENCE)
        return values

    def from_main(self, value: Any, source: int = 0) -> Any:
        return self.gather_objects(value if self.rank == source else None)[source]

    def barrier(self) -> None:
        self.gather_objects(None)


def on_ranks(num: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `num` ranks; where it raises on one, the others' meetings end too."""
    place, slots, failures = threading.Barrier(num), [b""] * num, list[BaseException]()

    def run(rank: int) -> T:
        try:
            return work(ThreadRanks(rank=rank, world_size=num, device=torch.device("cpu"), place=place, slots=slots))
        except BaseException as error:
            failures.append(error)
            place.abort()
            raise

    with ThreadPoolExecutor(num) as pool:
        futures = [pool.submit(run, rank) for rank in range(num)]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
