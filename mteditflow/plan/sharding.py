"""A transformer cut over ranks by FSDP2, as transformer/sharded.py does it, from shapes: what a rank keeps, and what is
gathered while a block is at work. torch's own account agrees (tests/test_plan_sharded.py).

Each block is a unit, and what is outside of the blocks another. A tensor is cut along its first dimension, padded to a
multiple of the ranks. A unit is gathered into one buffer and copied out of it, forwards and backwards, and let go:

    forward pass    the root, the block at work, and the buffer it came from until the next is copied out
    backward pass   the root, the block at work, and the buffer of the block before it, gathered ahead
    gradients       of trained weights (float32) of a block whole, and once more on their way to the shards
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mteditflow.config import Config
from mteditflow.plan.activations import Kept

GPUS_PER_NODE = 8
_BLOCK = re.compile(r"\w+blocks\.\d+\.")  # of the name of a weight


def num_cut(config: Config) -> int:
    """Count the ranks over which the transformer is cut; 1: it is whole on each. ValueError where there is but one."""
    shard, num_gpus = config.distributed.shard, config.run.num_gpus
    if shard != "none" and num_gpus == 1:
        raise ValueError(
            f"distributed.shard is {shard!r}: cuts the base over GPUs, and run.num_gpus is 1: take none, or more GPUs"
        )
    return {"none": 1, "full": num_gpus, "hybrid": min(GPUS_PER_NODE, num_gpus)}[shard]


@dataclass(frozen=True, kw_only=True)
class Units:
    """Bytes of the units of a transformer that is cut over some ranks, with their padding."""

    blocks: tuple[int, ...]  # in the order in which they are called
    root: int  # what is outside of them
    num_ranks: int

    @property
    def total(self) -> int:
        """Of all ranks."""
        return self.root + sum(self.blocks)

    @property
    def kept(self) -> float:
        """Of a rank."""
        return self.total / self.num_ranks

    @property
    def gathered(self) -> int:
        """At most in a forward pass: the root, and a block twice."""
        return (self.root + 2 * max(self.blocks)) * (self.num_ranks > 1)


def units(stored: Mapping[str, tuple[int, int]], num_ranks: int) -> Units:
    """Cut the tensors of a transformer, given as rows and bytes of a row, over ranks."""
    sizes = {"": 0}
    for name, (rows, row_bytes) in stored.items():
        block = _BLOCK.match(name)
        prefix, padded = block[0] if block else "", -(-rows // num_ranks) * num_ranks
        sizes[prefix] = sizes.get(prefix, 0) + padded * row_bytes
    return Units(root=sizes.pop(""), blocks=tuple(sizes.values()), num_ranks=num_ranks)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What of a transformer is cut over ranks; in full fine-tuning each copy of it too, and the gradients."""

    base: Units
    copy: Units | None = None  # None: what is trained is whole on each rank
    gradients: Units | None = None

    @property
    def at_work(self) -> Units:
        """What is gathered for a forward pass."""
        return self.copy or self.base


def cut_units(config: Config, stored: Mapping[str, tuple[int, int]], trained: Mapping[str, int]) -> Cut:
    """Cut a transformer as `distributed.shard` says; `trained` by names of linears. ValueError: over one rank."""
    num_ranks, lora = num_cut(config), config.lora
    base = units(stored, num_ranks)
    if num_ranks == 1 or not lora.is_full:
        return Cut(base=base)
    to_float32 = 1 if config.model.base == "float32" else 2
    gradients = {  # of every block, so that they stand beside the weights
        name: (rows, to_float32 * size if not lora.targets or name.rpartition(".")[0] in trained else 0)
        for name, (rows, size) in stored.items()
    }
    copy = {name: (rows, gradients[name][1] or size) for name, (rows, size) in stored.items()}
    return Cut(base=base, copy=units(copy, num_ranks), gradients=units(gradients, num_ranks))


def at_training(weights: Units, gradients: Units | None, kept: Kept, num_rows: int) -> float:
    """Bytes gathered at the peak of a training pass, of weights and what is needed for their gradients where they are
    cut, beyond the activations at the peak of the last block.

    At a block, beside what is kept until then: forwards itself twice; backwards itself, the one before it and the
    gradients of the one behind it, which are on their way; when it is done, its own gradients instead of activations.
    """
    if weights.num_ranks == 1:
        return 0.0
    blocks = weights.blocks
    made = gradients.blocks if gradients else [0] * len(blocks)
    at_blocks = [0.0] * (len(blocks) - len(kept.at_blocks)) + [num_rows * size for size in kept.at_blocks]
    peaks = []
    for i, block in enumerate(blocks):
        before, behind = blocks[i - 1] if i else 0, made[i + 1] if i + 1 < len(blocks) else 0
        when_done = (at_blocks[i - 1] if i else 0.0) + made[i] - num_rows * kept.at_peak
        peaks += [2 * block + at_blocks[i], block + before + behind + max(at_blocks[i], when_done)]
    return weights.root + max(peaks) - num_rows * kept.per_row
