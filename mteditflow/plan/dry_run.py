"""What a run will cost, before it starts: batch arithmetic, memory, duration.

Memory is an estimate from
shapes (memory.py), held against the GPU that the run is meant for. The duration is estimated for a GPU that is named
(estimate.py), with its energy and cost; without one it is measured, where the model is on this machine and fits: the
policy is built and a few rows are timed.
"""

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from mteditflow.config import Config
from mteditflow.data import check_data, size_shares
from mteditflow.distributed import check_world
from mteditflow.objective import build_objective
from mteditflow.plan.duration import (
    Batches,
    RowSeconds,
    batch_plan,
    check_timeout,
    duration_plan,
    longest_waits,
    mean_seconds,
)
from mteditflow.plan.estimate import describe, estimate
from mteditflow.plan.gpus import GPUS, Gpu, Target
from mteditflow.plan.memory import GIB, Sizes, folder_of, memory_plan, read_sizes
from mteditflow.plan.sharding import GPUS_PER_NODE
from mteditflow.plan.traffic import NETWORKS, traffic
from mteditflow.policy import Policy, build_policy, check_references
from mteditflow.types import Condition

TIMED_ROWS, NUM_TIMINGS = 16, 5
TABLE_WIDTH, NOTE_WIDTH = 46, 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table to print, and in one line why the run cannot be, where it does not fit."""

    table: str
    problem: str | None


LEVERS = {  # what makes a part of the memory smaller
    "activations of a training microbatch": "lower optimizer.microbatch_size or set model.is_checkpointed true",
    "base: text encoders": "set model.text_encoder offload or int8",
    "encoders, to encode, beyond a training pass": "set model.text_encoder int8",
    "evaluation, beyond a training pass": "lower evaluation.num_steps or evaluation.num_sessions",
    "judge": "serve the judge elsewhere and set reward.url",
    "reward models": "take smaller ones in reward.also",
    "adapter, averages": "lower lora.rank",
    "gradient, optimizer": "lower lora.rank",
    "latents of a rollout": "lower rollout.num_tasks",
    "base: transformer": "take model.base bfloat16, float8, int8 or nf4, or a smaller model",
}


def dry_run(config: Config, target: Target | None = None) -> Plan:
    """Make the plan of a run, on `target` where a GPU is named and else on this machine.

    ValueError: a model that is not there and whose sizes are not known; a GPU that lacks the precision.
    """
    sizes = read_sizes(config)
    check_references(config)
    memory = memory_plan(config, sizes)
    check_world(config, config.run.num_gpus)
    total, free = sum(memory.values()), free_gib()
    if target:
        limit, name = target.gpu.gib, f"--gpu {target.gpu.name}"
    else:
        limit, name = (config.run.gpu_gib, "run.gpu_gib") if config.run.gpu_gib else (free, "free on this machine now")
    problem = _excess(config, memory, limit) if total > limit else _impatience(config, sizes)
    notes: list[str] = []
    if total > limit:
        title, durations = "Duration", {"not estimated": "the run does not fit"}
    elif target:
        title = f"Duration on {config.run.num_gpus} x {target.gpu.name}, estimated"
        seconds = estimate(config, sizes, memory["judge"], target)
        if seconds:
            durations = _costs(config, sizes, target, seconds)
            problem = problem or check_timeout(config, seconds[0], is_text_of_image=sizes.family.is_text_of_image)
            notes = [line for note in describe(config, target) for line in textwrap.wrap(note, NOTE_WIDTH)]
        else:
            durations = {"not estimated": "so small an editor waits for the host, not for the GPU"}
    elif total > free or folder_of(config.model.path) is None:
        title = "Duration"
        durations = {"not measured": "the model is not on this machine; --gpu NAME estimates it for a GPU"}
    else:
        policy = build_policy(config.model, config.lora, config.run.seed, has_old=build_objective(config).has_old)
        shares = size_shares(config)
        rows = [(measure(policy.at((size,)), config.at(*size)), share) for size, share in shares.items()]
        title, measured = "Duration, expected", mean_seconds(rows)
        durations = {part: _duration(value) for part, value in duration_plan(config, measured).items()}
        problem = problem or check_timeout(config, measured)
    sections = {
        "Batches of an iteration": _batch_rows(config, batch_plan(config)),
        "Memory of a GPU, estimated, GiB": {
            part: f"{value:.3f}" for part, value in (memory | {"sum": total, name: limit}).items()
        },
        title: durations,
    }
    if config.data.buckets:
        how = "" if Path(config.data.path).exists() else ", alike: data.path is not on this machine"
        sections[f"Sizes of pictures{how}"] = {
            f"{width} x {height}": f"{share:.0%}" for (height, width), share in size_shares(config).items()
        }
    if config.run.num_gpus > 1:
        sections["Between GPUs, of an iteration"] = _traffic_rows(config, sizes, target.gpu if target else GPUS["h200"])
        waits = {name: _duration(value) for name, value in _waits(config, sizes).items()}
        limit = _duration(config.distributed.timeout_s)
        sections["Ranks that wait for one, at most"] = waits | {"distributed.timeout_s": limit}
    lines = []
    for heading, rows in sections.items():
        lines += [heading, *(f"  {name:<{TABLE_WIDTH}}{value}" for name, value in rows.items()), ""]
    return Plan(table="\n".join(lines[:-1] + [f"  {note}" for note in notes]), problem=problem or _unfit_data(config))


def _unfit_data(config: Config) -> str | None:
    """Say why a run would refuse its data, where they are on this machine."""
    if Path(config.data.path).exists():
        try:
            check_data(config, is_speaking=False)
        except ValueError as error:
            return str(error)
    return None


def _costs(config: Config, sizes: Sizes, target: Target, seconds: tuple[RowSeconds, RowSeconds]) -> dict[str, str]:
    """Duration, GPU-hours, energy at the board's power and cost, each from the least to the most."""
    most, least = (duration_plan(config, rows, is_text_of_image=sizes.family.is_text_of_image) for rows in seconds)
    rows = {part: _duration(least[part], most[part]) for part in least}
    hours = [config.run.num_gpus * list(plan.values())[-1] / 3600 for plan in (least, most)]  # of GPUs, of the run
    rows["GPU-hours"] = _span([f"{value:.1f}" for value in hours])
    watts = target.gpu.watts
    rows[f"energy at {watts} W a GPU, without the host, kWh"] = _span([f"{value * watts / 1e3:.1f}" for value in hours])
    if target.price is not None:
        rows[f"cost at {target.price:g} a GPU-hour"] = _span([f"{value * target.price:.0f}" for value in hours])
    return rows


def _span(values: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(values))


def _excess(config: Config, memory: dict[str, float], limit: float) -> str:
    """What does not fit, with the levers of the three largest parts that have one, largest first. Sharding is one where
    there are several GPUs.
    """
    levers = dict(LEVERS)
    if config.run.num_gpus > 1 and config.distributed.shard == "none":
        cut = "set distributed.shard full"
        levers["base: transformer"] = f"{cut}, or {levers['base: transformer']}"
        if config.lora.is_full:
            levers |= {"adapter, averages": cut, "gradient, optimizer": cut}
    parts = sorted((part for part in memory if part in levers and memory[part] > 0), key=lambda part: -memory[part])
    chosen = parts[:3] if "base: transformer" in parts[:3] or levers == LEVERS else [*parts[:3], "base: transformer"]
    said = dict.fromkeys(f"{levers[part]} ({part}: {memory[part]:.1f})" for part in chosen)
    return f"the run needs about {sum(memory.values()):.1f} GiB of a GPU's {limit:.1f}: {'; or '.join(said)}"


def _waits(config: Config, sizes: Sizes) -> dict[str, float]:
    return longest_waits(config, sizes.num_trained, sizes.num_transformer)


def _impatience(config: Config, sizes: Sizes) -> str | None:
    """What ranks would not wait for."""
    limit = config.distributed.timeout_s
    too_long = {name: seconds for name, seconds in _waits(config, sizes).items() if seconds > limit}
    if not too_long:
        return None
    name = max(too_long, key=lambda name: too_long[name])
    return f"distributed.timeout_s is {limit}: ranks may wait {too_long[name]:.0f} s for one ({name}): raise it"


def _traffic_rows(config: Config, sizes: Sizes, gpu: Gpu) -> dict[str, str]:
    """What a GPU sends, and the seconds that takes over the networks between nodes."""
    found, is_one_node = traffic(config, sizes), config.run.num_gpus <= GPUS_PER_NODE
    rows = {f"{part.name}, GB sent by a GPU": f"{part.sent() / 1e9:.3g}" for part in found}
    for network in NETWORKS[:1] if is_one_node else NETWORKS:
        seconds = sum(part.seconds(gpu, network) for part in found)
        name = f"{gpu.link:g} GB/s in a node" if is_one_node else network.name
        rows[f"seconds, {name}"] = f"{seconds:.2f}"
    return rows


def measure(policy: Policy, config: Config) -> RowSeconds:
    """Time a few rows of each kind of work, with the guidance of training and with that of evaluation."""
    rows = min(TIMED_ROWS, config.rollout.microbatch_size, config.optimizer.microbatch_size)
    images = torch.zeros(rows, 3, config.model.height, config.model.width, device=policy.device)
    text = policy.encode_text(["make it red"] * rows, images, has_cfg=config.model.cfg_scale != 1)
    guided = Condition(text=text, image=policy.encode_image(images), cfg_scale=config.model.cfg_scale)
    condition = guided if config.rollout.is_guided else replace(guided, cfg_scale=1.0)
    latents = torch.zeros(rows, policy.num_tokens, policy.num_channels, device=policy.device)
    sigma = torch.full((rows,), 0.5, device=policy.device)  # (B,)

    def forward_backward() -> None:
        policy.velocity(latents, sigma, condition).square().mean().backward()

    with torch.no_grad():
        forward = _seconds(lambda: policy.velocity(latents, sigma, condition)) / rows
        is_same = condition.cfg_scale == guided.cfg_scale
        at_evaluation = forward if is_same else _seconds(lambda: policy.velocity(latents, sigma, guided)) / rows
        decode = _seconds(lambda: policy.decode(latents)) / rows
        encode = _seconds(lambda: policy.encode_image(images)) / rows
    both = _seconds(forward_backward) / rows
    return RowSeconds(forward=forward, forward_backward=both, guided=at_evaluation, decode=decode, encode=encode)


def _batch_rows(config: Config, batches: Batches) -> dict[str, str]:
    """The batch arithmetic, each number with where it comes from."""
    p, g, k, s = config.rollout.num_tasks, config.rollout.group_size, config.data.num_turns, config.rollout.num_steps
    b, iterations, objective = batches, config.run.num_iterations, build_objective(config)
    sizes = config.rollout.microbatch_size, config.optimizer.microbatch_size
    return {
        "tasks P": f"{p}",
        "trajectories N = P G": f"{b.trajectories} = {p} x {g}",
        "turn-images N K": f"{b.turn_images} = {b.trajectories} x {k}",
        "rollout forwards, rows N K S": f"{b.rollout_rows} = {b.turn_images} x {s}",
        "rollout forwards, microbatches": f"{b.rollout_microbatches} of at most {sizes[0]} rows",
        "transitions trained": f"{b.transitions} = {b.turn_images} x {objective.num_draws} steps",
        "training forwards, rows": f"{b.train_forward_rows} = {b.transitions} x {objective.num_forwards}",
        "training backwards, rows": f"{b.transitions}",
        "training backwards, microbatches": f"{b.train_microbatches} of at most {sizes[1]} rows",
        "optimizer steps": f"{b.optimizer_steps}",
        "optimizer steps in the run": f"{b.optimizer_steps * iterations} = {iterations} x {b.optimizer_steps}",
    }


def _duration(*seconds: float) -> str:
    """Seconds, or a span of them, in one unit."""
    longest = max(seconds)
    unit, size = ("s", 1) if longest < 120 else ("min", 60) if longest < 7200 else ("h", 3600)
    return f"{_span([f'{value / size:.1f}' for value in seconds])} {unit}"


def free_gib() -> float:
    """Memory free for the model: the GPU's, else the host's."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return free / GIB


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the fastest run of `work`: the one that other work on the machine disturbed least."""
    times = []
    for _ in range(NUM_TIMINGS):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
