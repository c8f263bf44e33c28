"""What a run will cost, before it starts: batch arithmetic, memory, duration.

The arithmetic is the most that an iteration does: groups without spread are not trained on. Memory is an estimate from
shapes (memory.py), held against the GPU that the run is meant for. The duration is measured, where the model is on this
machine and fits: the policy is built and a few rows are timed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from mteditflow.config import Config
from mteditflow.objective import build_objective
from mteditflow.plan.memory import GIB, folder_of, memory_plan, read_sizes
from mteditflow.policy import Policy, build_policy
from mteditflow.types import Condition

TIMED_ROWS, NUM_TIMINGS = 16, 5
TABLE_WIDTH = 46


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch arithmetic of an iteration."""

    trajectories: int
    turn_images: int
    rollout_rows: int
    rollout_microbatches: int
    transitions: int
    train_forward_rows: int
    train_microbatches: int
    optimizer_steps: int


@dataclass(frozen=True, kw_only=True)
class RowSeconds:
    """Measured seconds per row."""

    forward: float
    forward_backward: float
    decode: float
    encode: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table to print, and in one line why the run cannot be, where it does not fit."""

    table: str
    problem: str | None


LEVERS = {  # what makes a part of the memory smaller
    "activations of a training microbatch": "lower optimizer.microbatch_size or set model.is_checkpointed true",
    "base: text encoders": "set model.text_encoder offload",
    "judge": "serve the judge elsewhere and set reward.url",
    "adapter, averages": "lower lora.rank",
    "gradient, optimizer": "lower lora.rank",
    "latents of a rollout": "lower rollout.num_tasks",
    "base: transformer": "take model.dtype bfloat16 or a smaller model",
}


def dry_run(config: Config) -> Plan:
    """Make the plan of a run. ValueError: a model that is not there and whose sizes are not known."""
    memory = memory_plan(config, read_sizes(config))
    total, free = sum(memory.values()), free_gib()
    limit, name = (config.run.gpu_gib, "run.gpu_gib") if config.run.gpu_gib else (free, "free on this machine now")
    gib = {part: f"{value:.3f}" for part, value in (memory | {"sum": total, name: limit}).items()}
    problem = _excess(memory, limit) if total > limit else None
    if problem:
        durations = {"not measured": "the run does not fit"}
    elif total > free or folder_of(config.model.path) is None:
        durations = {"not measured": "the model is not on this machine"}
    else:
        policy = build_policy(config.model, config.lora, config.run.seed, has_old=build_objective(config).has_old)
        durations = {part: _duration(value) for part, value in duration_plan(config, measure(policy, config)).items()}
    sections = {
        "Batches of an iteration": _batch_rows(config, batch_plan(config)),
        "Memory of a GPU, estimated, GiB": gib,
        "Duration, expected": durations,
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{TABLE_WIDTH}}{value}" for name, value in rows.items()), ""]
    return Plan(table="\n".join(lines[:-1]), problem=problem)


def _excess(memory: dict[str, float], limit: float) -> str:
    """What does not fit, with the levers of the three largest parts that have one, largest first."""
    parts = sorted((part for part in memory if part in LEVERS and memory[part] > 0), key=lambda part: -memory[part])
    levers = dict.fromkeys(f"{LEVERS[part]} ({part}: {memory[part]:.1f})" for part in parts[:3])
    return f"the run needs about {sum(memory.values()):.1f} GiB of a GPU's {limit:.1f}: {'; or '.join(levers)}"


def batch_plan(config: Config) -> Batches:
    """Counts over all ranks; rows are trajectories in a forward pass."""
    rollout, turns, objective = config.rollout, config.data.num_turns, build_objective(config)
    trajectories = rollout.num_tasks * rollout.group_size
    transitions = trajectories * turns * objective.num_draws
    chunks, train_chunks = (math.ceil(trajectories / c.microbatch_size) for c in (rollout, config.optimizer))
    return Batches(
        trajectories=trajectories,
        turn_images=trajectories * turns,
        rollout_rows=trajectories * turns * rollout.num_steps,
        rollout_microbatches=turns * rollout.num_steps * chunks,
        transitions=transitions,
        train_forward_rows=transitions * objective.num_forwards,
        train_microbatches=turns * objective.num_draws * train_chunks,
        optimizer_steps=config.optimizer.num_updates,
    )


def measure(policy: Policy, config: Config) -> RowSeconds:
    """Times a few rows of each kind of work."""
    rows = min(TIMED_ROWS, config.rollout.microbatch_size, config.optimizer.microbatch_size)
    images = torch.zeros(rows, 3, config.model.height, config.model.width, device=policy.device)
    text = policy.encode_text(["make it red"] * rows, images, has_cfg=config.model.cfg_scale != 1)
    condition = Condition(text=text, image=policy.encode_image(images), cfg_scale=config.model.cfg_scale)
    latents = torch.zeros(rows, policy.num_tokens, policy.num_channels, device=policy.device)
    sigma = torch.full((rows,), 0.5, device=policy.device)  # (B,)

    def forward_backward() -> None:
        policy.velocity(latents, sigma, condition).square().mean().backward()

    with torch.no_grad():
        forward = _seconds(lambda: policy.velocity(latents, sigma, condition)) / rows
        decode = _seconds(lambda: policy.decode(latents)) / rows
        encode = _seconds(lambda: policy.encode_image(images)) / rows
    both = _seconds(forward_backward) / rows
    return RowSeconds(forward=forward, forward_backward=both, decode=decode, encode=encode)


def duration_plan(config: Config, seconds: RowSeconds) -> dict[str, float]:
    """Seconds of an iteration and of the run, scoring, saving and start-up left out."""
    batches, evaluation = batch_plan(config), config.evaluation
    images = seconds.decode + seconds.encode
    rollout = batches.rollout_rows * seconds.forward + batches.turn_images * images
    extra_rows = batches.train_forward_rows - batches.transitions
    training = batches.transitions * seconds.forward_backward + extra_rows * seconds.forward
    num_short = config.run.num_iterations // evaluation.every if evaluation.every else 0
    sessions = 2 * evaluation.num_sessions + num_short * evaluation.num_sessions_short
    evaluations = sessions * config.num_held_out_turns * (evaluation.num_steps * seconds.forward + images)
    return {
        "rollout of an iteration": rollout,
        "updates of an iteration": training,
        f"{config.run.num_iterations} iterations": config.run.num_iterations * (rollout + training),
        f"evaluations: before, after, {num_short} short": evaluations,
        "run, without scoring and saving": config.run.num_iterations * (rollout + training) + evaluations,
    }


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


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


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
