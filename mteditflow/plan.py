"""What a run will cost, before it starts: batch arithmetic, memory, duration.

The arithmetic is the most that an iteration does: groups without spread are not trained on. Memory is an estimate from
the shapes in the pipeline's files. The duration is measured: the policy is built and a few rows are timed on this
machine, unless the estimate says that it would not fit.
"""

import json
import math
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from mteditflow.config import EMBEDDED, Config
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.flux_kontext import TARGETS
from mteditflow.types import Condition

GIB = 2**30
NUM_BYTES = {"float32": 4, "bfloat16": 2}
TIMED_ROWS, NUM_TIMINGS = 16, 5
TABLE_WIDTH = 46

# Numbers that autograd keeps per token of a block, in units of the block's width d and the adapter's rank r, counted
# with saved-tensor hooks on FluxTransformer2DModel (diffusers 0.42) with the default targets, at d 128, r 8 and 32,
# 76 and 268 tokens.
SAVED_DOUBLE, SAVED_SINGLE = (19.5, 6.0), (12.2, 4.0)
SAVED_FULL_DOUBLE, SAVED_FULL_SINGLE = (24.4, 0.0), (21.2, 0.0)  # all weights trained, at d 128, 76 and 268 tokens


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch arithmetic of an iteration, and of the run's optimizer."""

    trajectories: int
    turn_images: int
    rollout_rows: int
    rollout_microbatches: int
    transitions: int
    train_forward_rows: int
    train_microbatches: int
    optimizer_steps: int
    optimizer_steps_in_run: int


@dataclass(frozen=True, kw_only=True)
class RowSeconds:
    """Measured seconds per row."""

    forward: float
    forward_backward: float
    decode: float
    encode: float


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What the files of a pipeline folder say of its size."""

    num_weights: int
    num_adapter_weights: int
    num_double: int
    num_single: int
    width: int
    num_channels: int
    text_width: int
    pixels_per_token: int


def dry_run(config: Config) -> str:
    """The plan of a run as a table. ValueError: a model that is not there or that is no Flux pipeline."""
    batches = batch_plan(config)
    memory = memory_plan(config, read_pipeline(config))
    total, free = sum(memory.values()), _free_gib()
    lines = ["Batches of an iteration", *_batch_rows(config, batches)]
    lines += ["", "Memory, estimated, GiB", *(_row(name, f"{value:.3f}") for name, value in memory.items())]
    lines += [_row("sum", f"{total:.3f}"), _row("free on this machine now", f"{free:.3f}"), "", "Duration, expected"]
    if total > free:
        return "\n".join([*lines, _row("not measured", "the model does not fit into what is free")])
    policy = build_policy(config.model, config.lora, config.run.seed, config.objective.name)
    seconds = measure(policy, config)
    return "\n".join(lines + [_row(name, _duration(value)) for name, value in duration_plan(config, seconds).items()])


def batch_plan(config: Config) -> Batches:
    """Counts over all ranks; rows are trajectories in a forward pass."""
    rollout, turns = config.rollout, config.data.num_turns
    trajectories = rollout.num_tasks * rollout.group_size
    turn_images = trajectories * turns
    if config.objective.name == "nft":
        is_old_known = config.objective.nft_old_decay == "on_policy" and config.optimizer.num_updates == 1
        steps, forwards = config.objective.nft_num_times, 1 if is_old_known else 2  # trained, and old where it differs
    else:
        steps, forwards = rollout.window_size or rollout.num_steps - 1, 1
    forwards += config.objective.kl_beta > 0  # the reference
    return Batches(
        trajectories=trajectories,
        turn_images=turn_images,
        rollout_rows=turn_images * rollout.num_steps,
        rollout_microbatches=turns * rollout.num_steps * math.ceil(trajectories / rollout.microbatch_size),
        transitions=turn_images * steps,
        train_forward_rows=turn_images * steps * forwards,
        train_microbatches=turns * steps * math.ceil(trajectories / config.optimizer.microbatch_size),
        optimizer_steps=config.optimizer.num_updates,
        optimizer_steps_in_run=config.optimizer.num_updates * config.run.num_iterations,
    )


def read_pipeline(config: Config) -> Pipeline:
    """Sizes from the headers of the folder's safetensors files and from its configs; no weight is read."""
    folder = _folder(config.model.path)
    try:
        transformer = json.loads((folder / "transformer" / "config.json").read_text())
        vae = json.loads((folder / "vae" / "config.json").read_text())
    except OSError as error:
        missing = f"{Path(error.filename).parent.name}/config.json"
        raise ValueError(
            f"model.path is {config.model.path!r}, without {missing}: must be the folder of a FluxKontextPipeline"
        ) from None
    if transformer.get("_class_name") != "FluxTransformer2DModel":
        other = transformer.get("_class_name")
        raise ValueError(f"model.path is {config.model.path!r}, with a {other}: must be a FluxKontextPipeline")
    shapes = {path.parent.name: {} for path in folder.glob("*/*.safetensors")}
    for path in folder.glob("*/*.safetensors"):
        if len(path.name.split(".")) == 2:  # model.fp16.safetensors is the same weights once more
            shapes[path.parent.name] |= _shapes(path)
    targets = tuple(config.lora.targets or TARGETS)
    own = shapes.get("transformer", {})
    adapted = [shape for name, shape in own.items() if _is_adapted(name, targets)]
    trained = [shape for name, shape in own.items() if not config.lora.targets or _is_trained(name, targets)]
    return Pipeline(
        num_weights=sum(math.prod(shape) for part in shapes.values() for shape in part.values()),
        num_adapter_weights=config.lora.rank * sum(sum(shape) for shape in adapted)
        or sum(math.prod(shape) for shape in trained),
        num_double=transformer["num_layers"],
        num_single=transformer["num_single_layers"],
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        num_channels=transformer["in_channels"],
        text_width=transformer["joint_attention_dim"],
        pixels_per_token=2 ** len(vae["block_out_channels"]),  # a token is 2 x 2 latents of 2^(blocks - 1) pixels
    )


def memory_plan(config: Config, pipeline: Pipeline) -> dict[str, float]:
    """GiB by part, on one rank that does everything.

    Adapter: weights, gradients and two moments of AdamW are four float32 each, `ema` and NFT's `old` one more each.
    Rollout: per turn the latents of S+1 noise levels, the condition's latents and text, the images.
    Activations: rows x (text + 2 L tokens) x (double blocks x (19.5 d + 6 r) + single blocks x (12.2 d + 4 r)),
    in the base's dtype; 24.4 d and 21.2 d where all weights are trained, and then, with a base in another precision
    than float32, each trained weight once more, as it was rounded for the forward pass.
    """
    model, rollout, num_bytes = config.model, config.rollout, NUM_BYTES[config.model.dtype]
    num_tokens = model.height * model.width // pipeline.pixels_per_token**2
    copies = 5 + (config.objective.name == "nft")
    per_turn_image = (rollout.num_steps + 2) * num_tokens * pipeline.num_channels + 3 * model.height * model.width
    text = model.max_text_tokens * pipeline.text_width
    images = rollout.num_tasks * rollout.group_size * config.data.num_turns
    rows = min(config.optimizer.microbatch_size, rollout.num_tasks * rollout.group_size)
    is_full = config.lora.rank == 0
    double, single = (SAVED_FULL_DOUBLE, SAVED_FULL_SINGLE) if is_full else (SAVED_DOUBLE, SAVED_SINGLE)
    per_token = sum(
        count * (saved[0] * pipeline.width + saved[1] * config.lora.rank)
        for count, saved in ((pipeline.num_double, double), (pipeline.num_single, single))
    )
    rounded = pipeline.num_adapter_weights * num_bytes if is_full and model.dtype != "float32" else 0
    tokens = rows * (model.max_text_tokens + 2 * num_tokens)
    return {
        "base weights": pipeline.num_weights * num_bytes / GIB,
        "adapter, gradient, optimizer, averages": pipeline.num_adapter_weights * 4 * copies / GIB,
        "a rollout, stored": images * (per_turn_image * 4 + text * num_bytes) / GIB,
        "activations of a training microbatch": (tokens * per_token * num_bytes + rounded) / GIB,
    }


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


def _batch_rows(config: Config, batches: Batches) -> list[str]:
    """The batch arithmetic as lines of the table, each with where it comes from."""
    p, g, k, s = config.rollout.num_tasks, config.rollout.group_size, config.data.num_turns, config.rollout.num_steps
    steps = batches.transitions // batches.turn_images
    forwards = batches.train_forward_rows // batches.transitions
    microbatch, train_microbatch = config.rollout.microbatch_size, config.optimizer.microbatch_size
    return [
        _row("tasks P", f"{p}"),
        _row("trajectories N = P G", f"{batches.trajectories} = {p} x {g}"),
        _row("turn-images N K", f"{batches.turn_images} = {batches.trajectories} x {k}"),
        _row("rollout forwards, rows N K S", f"{batches.rollout_rows} = {batches.turn_images} x {s}"),
        _row("rollout forwards, microbatches", f"{batches.rollout_microbatches} of at most {microbatch} rows"),
        _row("transitions trained", f"{batches.transitions} = {batches.turn_images} x {steps} steps"),
        _row("training forwards, rows", f"{batches.train_forward_rows} = {batches.transitions} x {forwards}"),
        _row("training backwards, rows", f"{batches.transitions}"),
        _row("training backwards, microbatches", f"{batches.train_microbatches} of at most {train_microbatch} rows"),
        _row("optimizer steps", f"{batches.optimizer_steps}"),
        _row(
            "optimizer steps in the run",
            f"{batches.optimizer_steps_in_run} = {config.run.num_iterations} x {batches.optimizer_steps}",
        ),
    ]


def _row(name: str, value: str) -> str:
    return f"  {name:<{TABLE_WIDTH}}{value}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _folder(path: str) -> Path:
    """Where a pipeline's files are on this machine."""
    if path == EMBEDDED:
        return Path(__file__).parent / "world" / "editor"
    if Path(path).is_dir():
        return Path(path)
    found = None if path.count("/") != 1 else try_to_load_from_cache(path, "model_index.json")
    if not isinstance(found, str):
        raise ValueError(
            f"model.path is {path!r}: no folder, and not in the hub's cache here; give a folder or download it"
        )
    return Path(found).parent


def _shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file: eight bytes of length, then a JSON header."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _is_adapted(name: str, targets: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and _is_trained(name, targets)


def _is_trained(name: str, targets: tuple[str, ...]) -> bool:
    module = name.rsplit(".", 1)[0]
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _free_gib() -> float:
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
