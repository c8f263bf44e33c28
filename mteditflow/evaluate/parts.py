"""An evaluation in parts: sessions are independent and their noise is counted, so every rank takes parts, and what is
there is kept on the disk, where a killed evaluation goes on, on any number of ranks.

A part is sessions that follow each other, whole microbatches of them, so that a session has the same neighbours, and
with them the same bits, on any number of ranks. In a round every rank evaluates a part; then all ranks learn of all.
Pictures travel from the rank that has them, and only those that are wanted: large pictures of every session are not.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad

from mteditflow.distributed import Ranks
from mteditflow.record.files import read_json, replace_file, write_json
from mteditflow.report.seen import Seen, choose
from mteditflow.types import EditTask, Shape

T = TypeVar("T")

NUM_TOGETHER = 64  # sessions of a rank whose sources and texts are encoded together, at most
NUM_PARTS = 64  # an evaluation has as many where its sessions allow: one for each of so many ranks


@dataclass(frozen=True, kw_only=True)
class Part:
    """What an evaluation learnt of n sessions, as in `Evaluation`, and those of them that may be shown."""

    verdict: Tensor  # (n, K) bool
    consistency: Tensor  # (n, K); NaN where undefined
    valid: Tensor  # (n,) bool
    images: Tensor  # (K, m, 3, H, W): of its first m, which are in the strips
    drift: Tensor  # (n, K, 6), NaN where unknown
    seen: tuple[Seen, ...] = ()


def part_size(num_sessions: int, microbatch_size: int) -> int:
    """Sessions of a part: whole microbatches, as many as leave NUM_PARTS parts. Two parts, of which one is judged while
    the next is made, are in memory at once.
    """
    return max(1, min(NUM_TOGETHER // 2, num_sessions // NUM_PARTS) // microbatch_size) * microbatch_size


def cut_sessions(tasks: Sequence[EditTask], size: int) -> list[list[int]]:
    """Cut sessions into parts of one shape and at most `size`: the places of each, those of a shape in their order."""
    places: dict[Shape, list[int]] = {}
    for n, task in enumerate(tasks):
        places.setdefault(task.shape, []).append(n)
    return [alike[first : first + size] for alike in places.values() for first in range(0, len(alike), size)]


def join_images(images: Sequence[Tensor]) -> Tensor:
    """Join pictures (K, m, 3, H, W) along m; where sizes differ, smaller ones stand at left and top, on white."""
    height, width = (max(part.shape[axis] for part in images) for axis in (3, 4))
    frames = [(0, width - part.shape[4], 0, height - part.shape[3]) for part in images]
    return torch.cat([pad(part, frame, value=1.0) for part, frame in zip(images, frames, strict=True)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the ranks evaluate at the same time."""

    numbers: list[int]  # of the parts, that of rank r at place r
    mine: int | None  # the part that this rank rolls out
    is_wanted: bool  # False: it only keeps step with the others


def make_rounds(sizes: dict[int, int], ranks: Ranks, *, is_in_step: bool) -> list[Round]:
    """Deal parts, by number, of so many sessions out to the ranks. is_in_step: every rank makes equally many forward
    passes in a round, so what is left of the sessions after whole parts has a round of its own, and a rank without a
    part makes another's once more.
    """
    whole = [number for number, size in sizes.items() if not is_in_step or size == max(sizes.values())]
    dealt = [whole[first : first + ranks.world_size] for first in range(0, len(whole), ranks.world_size)]
    dealt += [[number] for number in sizes if number not in whole]
    rounds = []
    for numbers in dealt:
        is_wanted = ranks.rank < len(numbers)
        spare = numbers[-1] if is_in_step else None
        rounds.append(Round(numbers=numbers, mine=numbers[ranks.rank] if is_wanted else spare, is_wanted=is_wanted))
    return rounds


def one_behind(values: Iterable[T]) -> Iterator[T]:
    """Yield values in their order, each once the next is made."""
    waiting: list[T] = []
    for value in values:
        waiting.append(value)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


@dataclass(frozen=True, kw_only=True)
class PartFolder:
    """Where the parts of an evaluation are kept until it is whole."""

    path: Path
    about: dict[str, Any]  # all that the parts depend on, as JSON gives it back

    def load(self) -> dict[int, Part]:
        """Read the parts that are there. What another evaluation left is deleted, and a file that cannot be read is as
        one that is not there.
        """
        found: dict[int, Part] = {}
        try:
            is_same = read_json(self.path / "about.json") == self.about
        except ValueError:
            is_same = False
        if not is_same:
            self.remove()
            self.path.mkdir(parents=True)
            write_json(self.path / "about.json", self.about)
        for path in self.path.glob("part-*.safetensors"):
            with suppress(safetensors.SafetensorError):
                found[int(path.stem.removeprefix("part-"))] = load_part(path)
        return found

    def save(self, number: int, part: Part) -> None:
        """Write a part, whole or not at all."""
        save_part(self.path / f"part-{number:06d}.safetensors", part)

    def remove(self) -> None:
        """Delete the folder, once the evaluation is kept elsewhere."""
        shutil.rmtree(self.path, ignore_errors=True)


class Gathered:
    """The parts that are there, by number, the same on every rank."""

    def __init__(self, ranks: Ranks, folder: PartFolder | None, num_seen: int) -> None:
        """Begin with what the folder has. num_seen: sessions that are shown at the end."""
        self._ranks, self._folder, self.num_seen = ranks, folder, num_seen
        self.parts: dict[int, Part] = ranks.from_main(folder.load() if folder and ranks.is_main else {})

    @property
    def num_sessions(self) -> int:
        """Sessions that are evaluated."""
        return sum(len(part.valid) for part in self.parts.values())

    @property
    def seen(self) -> list[Seen]:
        """The sessions to show, of all parts so far."""
        return self._choose([])

    def _choose(self, more: Sequence[Seen]) -> list[Seen]:
        there = [session for _, part in sorted(self.parts.items()) for session in part.seen]
        return choose([*there, *more], self.num_seen)

    def add(self, numbers: Sequence[int], mine: Part | None) -> None:
        """Take in a round: the parts of the first ranks, of which `mine` is this rank's."""
        bare = [replace(session, pictures=()) for session in mine.seen] if mine else []
        new = [session for of_rank in self._ranks.gather_objects(bare) for session in of_rank]
        wanted = {session.key for session in self._choose(new)}
        if mine is not None:
            mine = replace(mine, seen=tuple(session for session in mine.seen if session.key in wanted))
        for rank, number in enumerate(numbers):
            self.parts[number] = self._ranks.from_main(mine if rank == self._ranks.rank else None, rank)
            if self._folder is not None and self._ranks.is_main:
                self._folder.save(number, self.parts[number])


def save_part(path: Path, part: Part) -> None:
    """Write a part as one safetensors file, which appears whole or not at all."""
    tensors = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
    rows = []
    for place, session in enumerate(part.seen):
        tensors |= {f"seen.{place}.{turn}": picture for turn, picture in enumerate(session.pictures)}
        rows.append({name: value for name, value in vars(session).items() if name != "pictures"})
    dense = {name: value.contiguous() for name, value in tensors.items()}  # pictures may have their channels last
    replace_file(path, safetensors.torch.save(dense, {"seen": json.dumps(rows)}))


def load_part(path: Path) -> Part:
    """Read what `save_part` wrote."""
    with safetensors.safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rows: list[dict[str, Any]] = json.loads(file.metadata()["seen"])
    seen = []
    for place, row in enumerate(rows):
        texts = {name: tuple(row.pop(name)) for name in ("instructions", "reasons")}
        pictures = tuple(tensors.pop(f"seen.{place}.{turn}") for turn in range(len(texts["instructions"]) + 1))
        seen.append(Seen(pictures=pictures, **texts, **row))
    return Part(seen=tuple(seen), **tensors)
