"""What ranks send each other in an iteration, by collective, and how long that takes: bytes from shapes, over what the
links of GPUs and of nodes carry.

A ring moves, for B bytes over W ranks, (W - 1) / W of B from each rank where something is gathered or scattered, twice
that where it is summed, in W - 1 steps (summed: twice as many). A ring over nodes goes through the slowest link: within
a node a GPU's own, between nodes that of the whole node, since each of its GPUs has a ring that leaves the node at
another place. Steps cost what NCCL's own model assumes.

    gradients     of the adapter, float32, summed once per optimizer step; of a trained transformer that is cut,
                  scattered at every backward pass
    base          where it is cut, gathered for every forward pass, and again for every backward pass
    scores        of all trajectories, on every rank, and what the alarms measure
"""

import math
from dataclasses import dataclass
from typing import Literal

from mteditflow.config import Config
from mteditflow.distributed import BUCKET
from mteditflow.objective import build_objective
from mteditflow.plan.gpus import Gpu
from mteditflow.plan.memory import Sizes, num_passes
from mteditflow.plan.sharding import GPUS_PER_NODE, cut_units

NVLINK_STEP_S, NETWORK_STEP_S = 3.4e-6, 14e-6  # NCCL's tuning model: a ring's step, protocol Simple
LINK_SHARE = 0.8  # of a link's peak that large messages reach (ours)
ALARMS = 7  # numbers of a turn that the alarms gather, beside one of each trajectory (record/alarms.py)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What connects nodes of 8 GPUs."""

    name: str
    gb_s: float  # of a node, in one direction


NETWORKS = (
    Network(name="InfiniBand, 400 Gb/s a GPU", gb_s=GPUS_PER_NODE * 50.0),
    Network(name="Ethernet, 100 Gb/s a node", gb_s=12.5),
)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What ranks do together in an iteration, `count` times with `num_bytes`: of all ranks where it is gathered or
    scattered, of one where it is summed.
    """

    name: str
    kind: Literal["sum", "gather", "scatter"]
    count: int
    num_bytes: float
    num_ranks: int
    is_between: bool = False  # by one rank of each node, the others doing the same beside it

    def sent(self) -> float:
        """Bytes that a rank sends in an iteration."""
        return self.count * (1 + (self.kind == "sum")) * (self.num_ranks - 1) / self.num_ranks * self.num_bytes

    def seconds(self, gpu: Gpu, network: Network) -> float:
        """Seconds in an iteration."""
        num_nodes = self.num_ranks if self.is_between else math.ceil(self.num_ranks / GPUS_PER_NODE)
        gb_s = network.gb_s / GPUS_PER_NODE if self.is_between else network.gb_s
        rate, between = (min(gpu.link, gb_s), num_nodes) if num_nodes > 1 else (gpu.link, 0)
        steps = between * NETWORK_STEP_S + max(self.num_ranks - 1 - between, 0) * NVLINK_STEP_S
        return self.sent() / (LINK_SHARE * rate * 1e9) + self.count * (1 + (self.kind == "sum")) * steps


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of an iteration through the transformer, of one rank."""

    forward: int
    backward: int


def count_passes(config: Config) -> Passes:
    """Count the most that a rank makes: microbatches of its rows, all of them trained on."""
    rollout, objective, turns = config.rollout, build_objective(config), config.data.num_turns
    rows = rollout.num_tasks * rollout.group_size // config.run.num_gpus
    sampled = turns * rollout.num_steps * math.ceil(rows / rollout.microbatch_size)
    trained = turns * objective.num_draws * math.ceil(rows / config.optimizer.microbatch_size)
    passes = num_passes(config)
    return Passes(forward=passes * (sampled + objective.num_forwards * trained), backward=passes * trained)


def traffic(config: Config, sizes: Sizes) -> list[Collective]:
    """What the ranks of a run do together in an iteration; nothing of one rank. ValueError: sharding over one rank."""
    num_ranks, updates, passes = config.run.num_gpus, config.optimizer.num_updates, count_passes(config)
    cut, rows = cut_units(config, sizes.stored, sizes.trained), config.rollout.num_tasks * config.rollout.group_size
    if num_ranks == 1:
        return []
    found, over = list[Collective](), cut.base.num_ranks
    if cut.gradients is None:
        buckets, size = math.ceil(sizes.num_trained / BUCKET), 4.0 * (sizes.num_trained + 1)  # and the loss
        found.append(
            Collective(
                name="gradients, summed", kind="sum", count=updates * buckets, num_bytes=size / buckets,
                num_ranks=num_ranks,
            )
        )  # fmt: skip
    if over > 1:
        units = cut.at_work
        num_gathers = passes.forward + passes.backward
        found.append(
            Collective(
                name="base, gathered", kind="gather", count=num_gathers * (len(units.blocks) + 1),
                num_bytes=units.total / (len(units.blocks) + 1), num_ranks=over,
            )
        )  # fmt: skip
    if cut.gradients is not None:
        num_units = sum(size > 0 for size in (*cut.gradients.blocks, cut.gradients.root))
        scattered = Collective(
            name="gradients, scattered", kind="scatter", count=passes.backward * num_units,
            num_bytes=cut.gradients.total / num_units, num_ranks=over,
        )  # fmt: skip
        found.append(scattered)
        if num_ranks > over:
            name, shard = "gradients, summed over nodes", cut.gradients.kept / num_units
            found.append(
                Collective(name=name, kind="sum", count=scattered.count, num_bytes=shard, num_ranks=num_ranks // over,
                           is_between=True)
            )  # fmt: skip
    reward, turns = config.reward, config.data.num_turns
    num_rewards = 1 + (reward.consistency_measure != "none") + len(reward.also_rewards)
    row_bytes = 4 * (turns * (num_rewards + ALARMS) + 1) + 1 + 8 * (reward.judge == "vlm")  # and why it has no score
    count = 2 + num_rewards
    scores = Collective(
        name="scores, gathered", kind="gather", count=count, num_bytes=rows * row_bytes / count, num_ranks=num_ranks
    )
    return [*found, scores]
