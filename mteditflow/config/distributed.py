"""Settings of a run on several GPUs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mteditflow.config.ranges import Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """What the GPUs of a run share; how many there are, torchrun says."""

    shard: Literal["none", "full", "hybrid"] = "none"
    """The base on every GPU whole (none); cut over all of them (full), for one that does not fit; or over those of a
    node (hybrid), with no gathering between nodes. A LoRA is whole everywhere; with lora.is_full all copies of the
    weights are cut, with gradients and moments, and all nodes must see run.folder."""
    timeout_s: Annotated[int, Range(30, 86_400)] = 1800
    """Seconds after which a rank that waits for another gives up; above the longest that one works alone."""

    def __post_init__(self) -> None:
        check_ranges(self)
