"""Where the time of an iteration goes, on this machine: `python -m mteditflow.profile [--section.field VALUE ...]`

A rollout and an update of the configured model are run twice to warm up, timed by phase, and run once more under
torch.profiler, which counts launches and host syncs and writes a trace for Perfetto. `--model.path random` is
FLUX.1-Kontext-dev's true shape with random weights: nothing is downloaded. Every trajectory is trained on, as if each
group had spread. Figures are those of the machine that it runs on.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile, record_function

from mteditflow import rollout, update
from mteditflow.config import EMBEDDED, Config
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, local_device
from mteditflow.objective import Objective, build_objective
from mteditflow.plan.dry_run import batch_plan
from mteditflow.plan.flops import forward_flops
from mteditflow.plan.memory import num_passes
from mteditflow.policy import DTYPES, Policy, build_policy
from mteditflow.policy.published import RANDOM
from mteditflow.profile.random_kontext import random_kontext
from mteditflow.record.metrics import Timer, used_memory
from mteditflow.reward import build_reward
from mteditflow.types import EditTask
from mteditflow.world.scenes import IMAGE

PHASES = ("encode text", "encode images", "denoise", "decode", "score", "forward, backward", "optimizer")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
Context = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is profiled: the configured policy, or one of random weights, and the tasks of iteration 0."""

    config: Config
    policy: Policy
    objective: Objective
    tasks: list[EditTask]
    ranks: Ranks

    def run(self, context: Context) -> None:
        """A rollout, its scores where the pictures are the world's, and an update with an advantage for every row."""
        policy, objective, config = self.policy, self.objective, self.config
        optimizer = torch.optim.AdamW([parameter for _, parameter in policy.adapters.trainable], lr=1e-9)
        made = rollout.sample_rollout(policy, objective, self.tasks, config, 0)
        if config.data.path == EMBEDDED and (config.model.height, config.model.width) == (IMAGE, IMAGE):
            with context("score"):
                build_reward(config)(made)
        sign = 1.0 - 2.0 * (torch.arange(len(made.group)) % 2)
        advantages = sign[:, None].repeat(1, len(made.turns))
        update.update(policy, optimizer, objective, made, advantages, config, self.ranks)


def build_case(config: Config) -> Case:
    """Build the policy; the world's pictures are brought to the size of the config. ValueError as for a run."""
    ranks, objective = Ranks(rank=0, world_size=1, device=local_device()), build_objective(config)
    if config.model.path == RANDOM:
        policy = random_kontext(config, has_old=objective.has_old)
    else:
        policy = build_policy(config.model, config.lora, config.run.seed, has_old=objective.has_old)
    tasks, size = training_tasks(config, 0, ranks), (config.model.height, config.model.width)
    sources = interpolate(torch.stack([task.source for task in tasks]), size, mode="bilinear")
    tasks = [replace(task, source=source) for task, source in zip(tasks, sources, strict=True)]
    return Case(config=config, policy=policy, objective=objective, tasks=tasks, ranks=ranks)


@contextmanager
def phases(case: Case, context: Context) -> Iterator[None]:
    """Within it, each phase of a rollout and an update runs in its own `context(name)`."""
    parts: list[tuple[Any, str, str]] = [
        (case.policy, "encode_text", "encode text"),
        (case.policy, "encode_image", "encode images"),
        (rollout, "denoise", "denoise"),
        (rollout, "denoise_by_graph", "denoise"),
        (case.policy, "decode", "decode"),
        (case.objective, "loss", "forward, backward"),
        (Tensor, "backward", "forward, backward"),
        (update, "step", "optimizer"),
    ]

    def within(original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with context(phase):
                return original(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for owner, name, phase in parts:
            original = getattr(owner, name)
            if isinstance(owner, type) or owner in (rollout, update):
                stack.callback(setattr, owner, name, original)
            else:  # a method: what is set on the instance hides it, and goes again
                stack.callback(delattr, owner, name)
            setattr(owner, name, within(original, phase))
        yield


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product in this precision, median of 10."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        timer = Timer()
        with timer("product"):
            torch.mm(a, b)
        seconds += timer.pop().values()
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def time_phases(case: Case) -> dict[str, Any]:
    """Seconds by phase and in all, of one iteration after two to warm up; peak memory is counted from there."""
    timer = Timer()
    for _ in range(2):
        case.run(Timer())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with timer("all"), phases(case, timer):
        case.run(timer)
    seconds = {name.removesuffix("_s"): value for name, value in timer.pop().items()}
    return {"seconds": {name: seconds[name] for name in PHASES if name in seconds}, "total_s": seconds["all"]}


def trace(case: Case, path: Path) -> dict[str, Any]:
    """Launches and host syncs of an iteration, by phase; the trace goes to `path`.

    A sync is a wait of the host for the GPU. On a CPU there are none, and what would be one is counted: a number of a
    tensor read by the host.
    """
    is_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler, phases(case, record_function):
        case.run(record_function)
    profiler.export_chrome_trace(str(path))
    events = profiler.events() or []
    spans = {phase: [e.time_range for e in events if e.name == phase] for phase in PHASES}

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


def count_work(case: Case) -> tuple[float, dict[str, float]]:
    """TFLOP of a forward pass of one row, and of the phases that are matrix products."""
    config, policy, batches, passes = case.config, case.policy, batch_plan(case.config), num_passes(case.config)
    row = forward_flops(
        policy.family, policy.pipeline.transformer.config, text_tokens=policy.family.num_text_tokens(config.model),
        image_tokens=policy.num_tokens + policy.num_condition_tokens,
    )  # fmt: skip
    backward = batches.transitions * (row.backward_full if config.lora.is_full else row.backward)
    return row.total / 1e12, {
        "denoise": passes * batches.rollout_rows * row.total / 1e12,
        "forward, backward": passes * (batches.train_forward_rows * row.total + backward) / 1e12,
    }


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """All figures of a profile, as `profile.json` has them."""
    case = build_case(config)
    device, num_images = case.policy.device, batch_plan(config).turn_images
    figures: dict[str, Any] = time_phases(case) | {"memory_gib": used_memory()[1]}
    ceiling, (forward, work) = matmul_ceiling(device, DTYPES[config.model.dtype]), count_work(case)
    seconds = figures["seconds"]
    rollout_s = sum(seconds[phase] for phase in ("encode text", "encode images", "denoise", "decode"))
    return figures | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "turn_images": num_images,
        "turn_images_per_second": num_images / rollout_s,
        "forward_tflop": forward,
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
    for phase, seconds in figures["seconds"].items():
        rate = figures["tflop_per_second"].get(phase)
        work = (
            [f"{figures['tflop'][phase]:.3g}", f"{rate:.3g}", f"{100 * rate / figures['ceiling_tflop_per_second']:.0f}",
             f"{figures['floor_s'][phase]:.3g}"]
            if rate else [""] * 4
        )  # fmt: skip
        launches = figures["launches"][phase] if figures["launches"] else "no GPU"
        phase_table.add_row(phase, f"{seconds:.3g}", *work, str(launches), str(syncs[phase]))
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
