"""Iterations on more and more GPUs, as docs/scaling.md shows them: `python -m mteditflow.plan.scaling`.

Work grows with the GPUs: each has two groups, whatever their number. The transformer's time is the shortest that is to
be expected (estimate.py), so that nothing of the traffic hides behind slowness. Gathers and scatters of a cut
transformer run beside the blocks before and after, sums at the end of an update and scores do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mteditflow.config import Config
from mteditflow.config.cli import from_yaml
from mteditflow.plan.duration import duration_plan
from mteditflow.plan.estimate import estimate
from mteditflow.plan.gpus import GPUS, Gpu, Target
from mteditflow.plan.memory import Sizes, memory_plan, read_sizes
from mteditflow.plan.traffic import NETWORKS, Network, traffic

CONFIGS = ("kontext_grpo_8gpu", "flux2_dev_80gb_grpo_8gpu")
NUM_GPUS = (1, 8, 64, 1024)
GROUPS_PER_GPU = 2
HIDDEN = ("base, gathered", "gradients, scattered", "gradients, summed over nodes")
HEAD = (
    "| GPUs | network | shard | P | GiB a GPU | work, s | sent, GB | hidden, s | exposed, s | efficiency | limit |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of an iteration on each GPU."""

    work: float
    sent_gb: float  # by a GPU
    hidden: float  # traffic that runs beside the transformer, as long as it is shorter
    exposed: float  # traffic that does not, and what is longer
    bottleneck: str

    @property
    def efficiency(self) -> float:
        """Share of the time that is work."""
        return self.work / (self.work + self.exposed)


def predict(config: Config, sizes: Sizes, gpu: Gpu, network: Network) -> Step:
    """Predict an iteration, at the fastest that the GPU is to be expected to be."""
    memory = memory_plan(config, sizes)
    seconds = estimate(config, sizes, memory["judge"], Target(gpu=gpu))
    assert seconds is not None, config.model.path
    parts = duration_plan(config, seconds[1], is_text_of_image=sizes.family.is_text_of_image)
    work = sum(value for name, value in parts.items() if name.endswith("of an iteration"))
    found = {part.name: part for part in traffic(config, sizes)}
    took = {name: part.seconds(gpu, network) for name, part in found.items()}
    beside = sum(took[name] for name in HIDDEN if name in took)
    beyond = max(0.0, beside - work)
    exposed = sum(took.values()) - beside + beyond
    slowest = max(took, key=lambda name: took[name], default="")
    return Step(
        work=work,
        sent_gb=sum(part.sent() for part in found.values()) / 1e9,
        hidden=beside - beyond,
        exposed=exposed,
        bottleneck=slowest if exposed > 0.05 * work else "the transformer",
    )


def rows(name: str, gpu: Gpu) -> Iterator[str]:
    """Yield the lines of the page's table for a config."""
    config = from_yaml(Path("configs") / f"{name}.yaml")
    sizes, kinds = read_sizes(config), ("none",) if config.distributed.shard == "none" else ("none", "full", "hybrid")
    for num_gpus in NUM_GPUS:
        for network in NETWORKS[: 1 + (num_gpus > 8)]:
            for shard in kinds[: 1 if num_gpus == 1 else 2 if num_gpus <= 8 else 3]:
                spread = replace(
                    config,
                    rollout=replace(config.rollout, num_tasks=GROUPS_PER_GPU * num_gpus),
                    distributed=replace(config.distributed, shard=shard),
                    run=replace(config.run, num_gpus=num_gpus),
                )
                step, gib = predict(spread, sizes, gpu, network), sum(memory_plan(spread, sizes).values())
                link = network.name if num_gpus > 8 else "NVLink" if num_gpus > 1 else ""
                yield (
                    f"| {num_gpus:,} | {link} | {shard} | {spread.rollout.num_tasks:,} | {gib:.0f} | {step.work:.0f} | "
                    f"{step.sent_gb:,.1f} | {step.hidden:.1f} | {step.exposed:.2f} | {step.efficiency:.1%} | "
                    f"{step.bottleneck} |"
                )


def page() -> str:
    """The tables of docs/scaling.md."""
    parts = []
    for name in CONFIGS:
        parts += [f"`{name}.yaml`, H200:\n", HEAD, *rows(name, GPUS["h200"]), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
