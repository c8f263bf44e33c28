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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mteditflow import rollout, update
from mteditflow.config import EMBEDDED, Config, cli
from mteditflow.data import SIZE, training_tasks
from mteditflow.distributed import Ranks
from mteditflow.objective import Objective, build_objective
from mteditflow.plan.dry_run import batch_plan, dry_run
from mteditflow.plan.flops import forward_flops
from mteditflow.plan.memory import num_passes, num_text_tokens, read_sizes
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.random_kontext import random_kontext
from mteditflow.record.metrics import Timer, used_memory
from mteditflow.reward import build_reward
from mteditflow.types import EditTask

RANDOM = "random"
PHASES = ("encode text", "encode images", "denoise", "decode", "score", "forward, backward", "optimizer")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
Context = Callable[[str], AbstractContextManager[Any]]


def build(config: Config) -> Policy:
    """The configured policy, or one of random weights."""
    has_old = build_objective(config).has_old
    if config.model.path != RANDOM:
        return build_policy(config.model, config.lora, config.run.seed, has_old=has_old)
    return random_kontext(config, has_old=has_old)


def resized_tasks(config: Config, ranks: Ranks) -> list[EditTask]:
    """The tasks of iteration 0, the world's pictures at the size of the config."""
    size = (config.model.height, config.model.width)
    tasks = training_tasks(config, 0, ranks)
    sources = torch.nn.functional.interpolate(torch.stack([task.source for task in tasks]), size, mode="bilinear")
    return [replace(task, source=source) for task, source in zip(tasks, sources, strict=True)]


@contextmanager
def phases(policy: Policy, objective: Objective, context: Context) -> Iterator[None]:
    """Within it, each phase of a rollout and an update runs in its own `context(name)`."""
    parts: list[tuple[Any, str, str]] = [
        (policy, "encode_text", "encode text"),
        (policy, "encode_image", "encode images"),
        (rollout, "denoise", "denoise"),
        (rollout, "denoise_by_graph", "denoise"),
        (policy, "decode", "decode"),
        (objective, "loss", "forward, backward"),
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


def iteration(
    policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, ranks: Ranks, context: Context
) -> None:
    """A rollout, its scores where the pictures are the world's, and an update with an advantage for every row."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in policy.adapters.trainable], lr=1e-9)
    own = rollout.sample_rollout(policy, objective, tasks, config, 0)
    if config.data.path == EMBEDDED and (config.model.height, config.model.width) == (SIZE, SIZE):
        with context("score"):
            build_reward(config)(own)
    num_rows = len(own.group)
    sign = 1.0 - 2.0 * (torch.arange(num_rows) % 2)
    update.update(policy, optimizer, objective, own, sign[:, None].repeat(1, len(own.turns)), config, ranks)


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


def timed(policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, ranks: Ranks) -> dict[str, Any]:
    """Seconds by phase and in all, and peak memory, of one iteration after two to warm up."""
    timer = Timer()
    for _ in range(2):
        iteration(policy, objective, tasks, config, ranks, Timer())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with timer("all"), phases(policy, objective, timer):
        iteration(policy, objective, tasks, config, ranks, timer)
    seconds = {name.removesuffix("_s"): value for name, value in timer.pop().items()}
    return {"seconds": {name: seconds[name] for name in PHASES if name in seconds}, "total_s": seconds["all"]}


def traced(
    policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, ranks: Ranks, path: Path
) -> dict[str, Any]:
    """Launches and host syncs of an iteration, by phase; the trace goes to `path`.

    A sync is a wait of the host for the GPU. On a CPU there are none, and what would be one is counted: a number of a
    tensor read by the host.
    """
    is_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler, phases(policy, objective, record_function):
        iteration(policy, objective, tasks, config, ranks, record_function)
    profiler.export_chrome_trace(str(path))
    events = profiler.events() or []
    spans = {phase: [e.time_range for e in events if e.name == phase] for phase in PHASES}

    def count(names: Sequence[str]) -> dict[str, int]:
        starts = [e.time_range.start for e in events if e.name in names]
        within = {
            phase: sum(any(span.start <= start < span.end for span in own) for start in starts)
            for phase, own in spans.items()
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
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policy, objective, tasks = build(config), build_objective(config), resized_tasks(config, ranks)
    figures: dict[str, Any] = timed(policy, objective, tasks, config, ranks) | {"memory_gib": used_memory()[1]}
    ceiling = matmul_ceiling(policy.device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype])
    batches = batch_plan(config)
    transformer = policy.pipeline.transformer
    row = forward_flops(
        transformer.config, text_tokens=num_text_tokens(config.model, read_sizes(config)),
        image_tokens=policy.num_tokens + policy.num_condition_tokens, family=type(transformer).__name__,
    )  # fmt: skip
    backward = row.backward if config.lora.rank else row.backward_full
    passes = num_passes(config)
    work = {
        "denoise": passes * batches.rollout_rows * row.total / 1e12,
        "forward, backward": passes * (batches.train_forward_rows * row.total + batches.transitions * backward) / 1e12,
    }
    seconds, num_threads = figures["seconds"], torch.get_num_threads()
    rollout_s = sum(seconds[phase] for phase in ("encode text", "encode images", "denoise", "decode"))
    return figures | {
        "device": torch.cuda.get_device_name() if policy.device.type == "cuda" else f"CPU, threads: {num_threads}",
        "torch": torch.__version__,
        "turn_images": batches.turn_images,
        "turn_images_per_second": batches.turn_images / rollout_s,
        "forward_tflop": row.total / 1e12,
        "tflop": work,
        "tflop_per_second": {phase: value / seconds[phase] for phase, value in work.items()},
        "ceiling_tflop_per_second": ceiling,
        "floor_s": {phase: value / ceiling for phase, value in work.items()},
        **traced(policy, objective, tasks, config, ranks, folder / "trace.json.gz"),
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: every field of a run; writes `profile.json` and `trace.json.gz` into `run.folder`."""
    config, is_dry_run = cli.parse(argv, prog="python -m mteditflow.profile")
    folder = Path(config.run.folder)
    try:
        if is_dry_run:
            print(dry_run(config).table)
            return
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(config, folder)
    except ValueError as error:
        cli.fail(error)
    (folder / "profile.json").write_text(json.dumps(figures, indent=1))
    console = Console(width=None if Console().is_terminal else 120)
    for part in tables(figures):
        console.print(part)
