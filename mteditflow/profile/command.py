"""Where the time of an iteration goes, on this machine: `python -m mteditflow.profile [--section.field VALUE ...]`

A rollout and an update of the configured model are run twice to warm up, timed by phase, and run once more under
torch.profiler, which counts launches and host syncs and writes a trace for Perfetto. `--model.path random` is
FLUX.1-Kontext-dev's true shape with random weights: nothing is downloaded. Every trajectory is trained on, as if each
group had spread. Figures are those of the machine that it runs on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile

from mteditflow.config import EMBEDDED, Config
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, alone
from mteditflow.objective import Objective, build_objective
from mteditflow.plan.compiling import Settled, settle
from mteditflow.plan.duration import batch_plan
from mteditflow.plan.flops import matmul_ceiling
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.published import RANDOM
from mteditflow.profile.account import count_work, row_flops
from mteditflow.profile.random_kontext import random_kontext
from mteditflow.record.clock import ROLLOUT, STEP, Clock, phase
from mteditflow.record.metrics import used_memory
from mteditflow.reward import build_reward
from mteditflow.rollout import sample_rollout
from mteditflow.types import EditTask, Rollout
from mteditflow.update import update
from mteditflow.world.scenes import IMAGE

SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is profiled: the configured policy, or one of random weights, and the tasks of iteration 0."""

    config: Config
    policy: Policy
    objective: Objective
    tasks: list[EditTask]
    ranks: Ranks
    settled: Settled = "as it is"  # how training computes the rollout's bits

    def run(self) -> None:
        """A rollout, its scores, and an update with an advantage for every row."""
        self.train(self.roll_out())

    def roll_out(self) -> Rollout:
        """The rollout, scored."""
        made = sample_rollout(self.policy, self.objective, self.tasks, self.config, 0)
        self.score(made)
        return made

    def score(self, made: Rollout) -> None:
        """Score a rollout, where its pictures are the world's."""
        if self.config.data.path == EMBEDDED and (self.config.model.height, self.config.model.width) == (IMAGE, IMAGE):
            with phase("score"):
                build_reward(self.config)(made)

    def train(self, made: Rollout) -> None:
        """Train on every row of a rollout, half of them praised; the weights stay where they are."""
        weights = [weight for _, weight in self.policy.adapters.trainable]
        optimizer = torch.optim.AdamW(weights, lr=1e-9)
        update(self.policy, optimizer, self.objective, made, praise(made), self.config, self.ranks)


def praise(made: Rollout) -> Tensor:
    """Advantages (N, K) of 1 and -1 by turns, as if each group had spread."""
    return alternate_signs(len(made.group), len(made.turns))


def alternate_signs(num_rows: int, num_turns: int) -> Tensor:
    """(N, K) of 1 in even rows and -1 in odd ones."""
    return (1.0 - 2.0 * (torch.arange(num_rows) % 2))[:, None].repeat(1, num_turns)


def build_case(config: Config) -> Case:
    """Build the policy; the world's pictures are brought to the size of the config. ValueError as for a run."""
    ranks, objective = alone(), build_objective(config)
    if config.model.path == RANDOM:
        policy = random_kontext(config, has_old=objective.has_old)
    else:
        policy = build_policy(config.model, config.lora, config.run.seed, has_old=objective.has_old)
    tasks, size = training_tasks(config, 0, ranks), (config.model.height, config.model.width)
    sources = interpolate(torch.stack([task.source for task in tasks]), size, mode="bilinear")
    tasks = [replace(task, source=source) for task, source in zip(tasks, sources, strict=True)]
    settled = settle(policy, objective, tasks, config)
    return Case(config=config, policy=policy, objective=objective, tasks=tasks, ranks=ranks, settled=settled)


def time_phases(case: Case) -> dict[str, Any]:
    """Seconds by phase and in all, of one iteration after two to warm up; peak memory is counted from there."""
    for _ in range(2):
        case.run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with Clock(case.policy.device) as clock:
        case.run()
        seconds = clock.read()
    return {"seconds": {name: seconds[name] for name in STEP if seconds[name]}, "total_s": sum(seconds.values())}


def trace(case: Case, path: Path) -> dict[str, Any]:
    """Launches and host syncs of an iteration, by phase; the trace goes to `path`.

    A sync is a wait of the host for the GPU. On a CPU there are none, and what would be one is counted: a number of a
    tensor read by the host.
    """
    is_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        case.run()
    profiler.export_chrome_trace(str(path))
    events = profiler.events() or []
    spans = {phase: [e.time_range for e in events if e.name == phase] for phase in STEP}

    def count(names: Sequence[str]) -> dict[str, int]:
        starts = [e.time_range.start for e in events if e.name in names]
        within = {
            phase: sum(any(span.start <= start < span.end for span in of_phase) for start in starts)
            for phase, of_phase in spans.items()
        }
        return within | {"all": len(starts)}

    return {
        "launches": count(LAUNCHES) if is_cuda else None,
        "host_syncs": count(SYNCS) if is_cuda else None,
        "host_reads": None if is_cuda else count(["aten::_local_scalar_dense"]),
        "trace": str(path),
    }


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """All figures of a profile, as `profile.json` has them."""
    case = build_case(config)
    device, num_images = case.policy.device, batch_plan(config).turn_images
    figures: dict[str, Any] = time_phases(case) | {"memory_gib": used_memory()[1]}
    ceiling, row = matmul_ceiling(device, case.policy.dtype), row_flops(config, case.policy)
    work, seconds = count_work(config, row, batch_plan(config).transitions), figures["seconds"]
    return figures | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "model": {name: getattr(config.model, name) for name in ("base", "compile", "is_checkpointed")},
        "turn_images": num_images,
        "turn_images_per_second": num_images / sum(seconds[name] for name in ROLLOUT),
        "forward_tflop": row.total / 1e12,
        "tflop": work,
        "tflop_per_second": {phase: value / seconds[phase] for phase, value in work.items()},
        "ceiling_tflop_per_second": ceiling,
        "floor_s": {phase: value / ceiling for phase, value in work.items()},
        **trace(case, folder / "trace.json.gz"),
    }  # fmt: skip


def tables(figures: dict[str, Any]) -> list[Table | str]:
    """What the terminal shows."""
    reads = "host syncs" if figures["host_reads"] is None else "host reads"
    phase_table = Table(title=f"One iteration on {figures['device']}, torch {figures['torch']}")
    for column in ("phase", "seconds", "TFLOP", "TFLOP/s", "% of ceiling", "floor s", "launches", reads):
        phase_table.add_column(column, justify="left" if column == "phase" else "right")
    syncs = figures["host_reads"] or figures["host_syncs"]
    for name, seconds in figures["seconds"].items():
        rate = figures["tflop_per_second"].get(name)
        work = (
            [f"{figures['tflop'][name]:.3g}", f"{rate:.3g}", f"{100 * rate / figures['ceiling_tflop_per_second']:.0f}",
             f"{figures['floor_s'][name]:.3g}"]
            if rate else [""] * 4
        )  # fmt: skip
        launches = figures["launches"][name] if figures["launches"] else "no GPU"
        phase_table.add_row(name, f"{seconds:.3g}", *work, str(launches), str(syncs[name]))
    return [
        phase_table,
        f"{figures['turn_images_per_second']:.3g} turn-images per second per GPU, {figures['turn_images']} a rollout;"
        f" {figures['total_s']:.3g} s in all, {figures['memory_gib']:.3g} GiB at most",
        f"ceiling: a matrix product in the model's precision, {figures['ceiling_tflop_per_second']:.3g} TFLOP/s;"
        f" a forward pass of one row is {figures['forward_tflop']:.3g} TFLOP",
        f"open {figures['trace']} at ui.perfetto.dev",
    ]


def write_profile(config: Config) -> None:
    """Profile an iteration, show the tables, and write `profile.json` and `trace.json.gz` into `run.folder`."""
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = measure(config, folder)
    (folder / "profile.json").write_text(json.dumps(figures, indent=1))
    console = Console(width=None if Console().is_terminal else 120)
    for part in tables(figures):
        console.print(part)
