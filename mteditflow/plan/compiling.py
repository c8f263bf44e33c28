"""Whether a run's blocks are compiled, which takes a while, and whether training then computes what was sampled."""

import os
import shutil
from dataclasses import replace
from typing import Literal

import torch
from mteditflow_kernels import counter_normal
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks, alone
from mteditflow.guards import GuardError
from mteditflow.noise import NoiseSource, Place, row_keys
from mteditflow.objective import Objective
from mteditflow.plan.duration import batch_plan, num_evaluated_turns, num_short_evaluations
from mteditflow.plan.flops import ForwardFlops, forward_flops, mean_flops
from mteditflow.plan.memory import num_image_tokens, read_sizes
from mteditflow.policy import Policy
from mteditflow.policy.encoding import stack_references
from mteditflow.types import Condition, EditTask

# Of the miniature on one thread of an AMD EPYC (docs/log.md).
FLOP_PER_SECOND = 14e9
SAVED_SHARE = 0.2
SECONDS_PER_GRAPH = 28.0
MARGIN = 3.0  # what is saved has to be this many times what is spent: both are estimates


def choose_compile(config: Config, device_type: str) -> tuple[Config, str]:
    """Decide `model.compile: auto` on a CPU, by the config alone, so that a run that goes on decides as it did.

    Returns the config, and why in a line.
    """
    if config.model.compile != "auto" or device_type != "cpu" or config.lora.is_full:
        return config, f"model.compile {config.model.compile}"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return replace(config, model=replace(config.model, compile="off")), "model.compile auto: off, no C++ compiler"
    saved, spent = SAVED_SHARE * _seconds_of_blocks(config), SECONDS_PER_GRAPH * num_graphs(config)
    chosen = "blocks" if saved > MARGIN * spent else "off"
    line = f"model.compile auto: {chosen}, since it saves about {saved:.0f} s of a core and costs {spent:.0f}"
    return replace(config, model=replace(config.model, compile=chosen)), line


def num_graphs(config: Config) -> int:
    """Graphs of a run's blocks: of each class, for each number of rows without gradients, and with."""
    transformer = read_sizes(config).transformer
    num_classes = 2 if transformer.get("num_single_layers") else 1
    total, sessions = config.rollout.num_tasks * config.rollout.group_size, config.evaluation
    sampled = {
        size
        for rows in (total, sessions.num_sessions, sessions.num_sessions_short)
        for size in _chunk_sizes(rows, config.rollout.microbatch_size)
    }
    trained = _chunk_sizes(total, config.optimizer.microbatch_size)
    num_passes = 2 if config.model.cfg_scale != 1 else 1
    return num_classes * (len(sampled | trained) + len(trained)) * num_passes * len(config.sizes)


def _chunk_sizes(num_rows: int, size: int) -> set[int]:
    return {min(size, num_rows), num_rows % size or size}


def _seconds_of_blocks(config: Config) -> float:
    """Seconds of one core in the transformer's blocks, by the estimate above."""
    sizes, evaluation, batches = read_sizes(config), config.evaluation, batch_plan(config)
    text_tokens = sizes.family.num_text_tokens(config.model)

    def count(size: tuple[int, int]) -> ForwardFlops:
        image_tokens = sum(num_image_tokens(config.model.at(*size), sizes.family))
        return forward_flops(sizes.family, sizes.transformer, text_tokens=text_tokens, image_tokens=image_tokens)

    row = mean_flops(count, config)
    forwards = batches.rollout_rows + batches.train_forward_rows
    turns = 2 * evaluation.num_sessions * num_evaluated_turns(config)
    turns += num_short_evaluations(config) * evaluation.num_sessions_short * config.num_held_out_turns
    evaluated = turns * evaluation.num_steps
    flop = config.run.num_iterations * (forwards * row.blocks + batches.transitions * row.backward)
    return (flop + evaluated * row.blocks) / FLOP_PER_SECOND


Settled = Literal["as it is", "eager", "replayed"]
SAID: dict[Settled, list[str]] = {
    "as it is": [],
    "eager": ["compiled blocks differ in bits where they are trained on: blocks run eagerly, sooner than be replayed"],
    "replayed": ["training and rollout differ in bits: training replays the rollout's pass, at some 40 % more time"],
}
"""What a run says of it."""


def settle(
    policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, ranks: Ranks | None = None
) -> Settled:
    """Make training compute the velocities of the rollout, to the bit, as `settle_bits` does. In eager mode on a CPU it
    does; so it does in full fine-tuning, where nothing is compiled.
    """
    if config.lora.is_full or not (policy.is_compiled or policy.device.type == "cuda"):
        return "as it is"
    settled: Settled = "as it is"
    for size in config.sizes:
        alike, has_ratio = policy.at((size, *tasks[0].shape[1:])), "ratio_error" in objective.worst_figures
        found = settle_bits(alike, *first_microbatch(alike, tasks, config), has_ratio=has_ratio, ranks=ranks)
        settled = settled if found == "as it is" else found
    return settled


def settle_bits(
    policy: Policy, condition: Condition, latents: Tensor, *, has_ratio: bool, ranks: Ranks | None = None
) -> Settled:
    """See to it that training computes the velocity of the rollout, to the bit, and say how: as it is, by blocks that
    are not compiled after all where `model.compile` is auto, or by replaying the rollout's pass. GuardError where it
    cannot be, or where no gradient arrives.

    On an H200 compiled blocks save 2 % of a rollout and 7 % of an update, and a replay costs a third of one
    (bench/results/): they are not worth it. condition and latents (B, L, C): a microbatch, of which two passes are made
    under weights that are not the zero that a LoRA starts from. has_ratio: whether the objective has a ratio, which has
    to be 1; else bits do not matter. ranks: which agree, since they may have to make equally many passes.
    """
    ranks = ranks or alone()

    def is_settled() -> bool:
        return all(ranks.gather_objects(_is_trained_as_sampled(policy, condition, latents)))

    if is_settled() or not has_ratio:
        return "as it is"
    if policy.is_compiled and policy.config.compile == "auto":
        policy.run_eagerly()
        if is_settled():
            return "eager"
    policy.replay()
    if not is_settled():
        raise GuardError(
            f"training computes other velocities than the rollout, with attention {policy.attention}, by compiled "
            f"blocks and by replay: set model.compile off or model.attention native"
        )
    return "replayed"


def _is_trained_as_sampled(policy: Policy, condition: Condition, latents: Tensor) -> bool:
    before, sigma = policy.adapters.state("current"), torch.full([len(latents)], 0.7, device=latents.device)
    moved = {key: w + 0.01 * torch.linspace(-1, 1, w.numel()).view(w.shape).to(w) for key, w in before.items()}
    policy.adapters.load("current", moved)
    with torch.no_grad():
        sampled = policy.velocity(latents, sigma, condition)
    trained = policy.velocity(latents, sigma, condition)
    trained.square().mean().backward()
    gradients = [weight.grad for _, weight in policy.adapters.trainable]
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        raise GuardError("no gradient reaches the adapter: set model.compile off, or check lora.targets")
    for _, weight in policy.adapters.trainable:
        weight.grad = None
    policy.adapters.load("current", before)
    return torch.equal(sampled, trained)


def first_microbatch(policy: Policy, tasks: list[EditTask], config: Config) -> tuple[Condition, Tensor]:
    """Make the first rows of a rollout, at the policy's size, as many as a microbatch has: condition, and latents
    (B, L, C) of noise.
    """
    size, has_cfg = config.rollout.group_size, config.rollout.is_guided and config.model.cfg_scale != 1
    rows = [task for task in tasks for _ in range(size)][: config.optimizer.microbatch_size]
    images = torch.stack([task.source for task in rows])
    references, instructions = stack_references(rows), [task.instructions[0] for task in rows]
    text = policy.encode_text(instructions, images, has_cfg=has_cfg, references=references)
    image = torch.cat([policy.encode_image(images), *policy.encode_references(references)], dim=1)
    keys = row_keys([task.id for task in rows], torch.arange(len(rows)) % size,
                    NoiseSource(seed=config.run.seed, step=0), turn=0, place=Place.INITIAL_LATENTS)  # fmt: skip
    latents = counter_normal(keys.to(policy.device), (policy.num_tokens, policy.num_channels))
    return Condition(text=text, image=image, cfg_scale=config.model.cfg_scale if has_cfg else 1.0), latents
