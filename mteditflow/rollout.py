"""K turns of S denoising steps: every turn edits the image that the model itself made in the turn before.

Rows go through the model in chunks of `microbatch_size`, always cut at the same places, and training cuts where the
rollout cut: a matrix product may give a row other bits in a batch of another size, and the ratio before the first
update has to be exactly 1.
"""

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from mteditflow_kernels import counter_normal, sde_step
from torch import Tensor

from mteditflow.config import Config, RolloutConfig
from mteditflow.flow import Schedule
from mteditflow.noise import NoiseSource, Place, row_keys
from mteditflow.objective import Objective
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy
from mteditflow.policy.cuda_graph import Graphs, is_captured
from mteditflow.record.clock import phase, traced
from mteditflow.types import Condition, EditTask, Rollout, Turn

Keys = Sequence[Tensor | None]
"""Per denoising step the noise keys (B, 5) of its rows, None at an ODE step."""


@phase("denoise")
def denoise(
    policy: Policy, condition: Condition, latents: Tensor, schedule: Schedule, keys: Keys
) -> tuple[Tensor, Tensor]:
    """Run all denoising steps of a turn from noise `latents` (B, L, C): latents (S+1, B, L, C) and log-prob (S, B)."""
    path, log_probs, before = [latents], [], latents
    for step, correction in enumerate(schedule.corrections):
        sigma = schedule.sigmas[step]
        velocity = policy.velocity(latents, sigma.expand(len(latents)), condition)
        if any(schedule.corrections):
            estimate = latents - sigma * velocity
            velocity, before = velocity + correction * (estimate - before), estimate
        latents, log_prob = sde_step(velocity, latents, schedule.table, step, keys[step])
        path.append(latents)
        log_probs.append(log_prob)
    return torch.stack(path), torch.stack(log_probs)


_GRAPHS: WeakKeyDictionary[Policy, Graphs] = WeakKeyDictionary()


@phase("denoise")
def denoise_by_graph(
    policy: Policy, condition: Condition, latents: Tensor, schedule: Schedule, keys: Keys
) -> tuple[Tensor, Tensor]:
    """Replay `denoise` as one CUDA graph for each selected adapter, choice of noisy steps, and shapes.

    Optimizer, `copy` and `load` write the adapter's weights in place: a graph sees new ones.
    """
    if policy not in _GRAPHS:
        _GRAPHS[policy] = Graphs()
    names, is_noisy = tuple(condition.text), tuple(key is not None for key in keys)

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        text = dict(zip(names, inputs, strict=False))
        image, latents, sigmas, table, *noisy_keys = inputs[len(names) :]
        remaining = iter(noisy_keys)
        replayed = Schedule(
            sigmas=sigmas, table=table, corrections=schedule.corrections, is_noisy=is_noisy, trained_steps=()
        )
        rows = Condition(text=text, image=image, cfg_scale=condition.cfg_scale)
        return denoise(policy, rows, latents, replayed, [next(remaining) if noisy else None for noisy in is_noisy])

    inputs = [*condition.text.values(), condition.image, latents, schedule.sigmas, schedule.table]
    inputs += [key for key in keys if key is not None]
    signature = (policy.adapters.selected, condition.cfg_scale, names, is_noisy, schedule.corrections)
    path, log_prob = _GRAPHS[policy](run, inputs, signature)
    return path, log_prob


def chunks(condition: Condition, noise: Tensor, keys: Keys, size: int) -> Iterator[tuple[Condition, Tensor, Keys]]:
    """Cut N rows into what goes through the model together: `size` at a time, and what is left."""
    for rows in torch.arange(len(noise), device=noise.device).split(size):
        yield condition.rows(rows), noise[rows], [None if key is None else key[rows] for key in keys]


def _encode_text(
    policy: Policy, instructions: list[str], images: Tensor, group_size: int, *, has_cfg: bool
) -> dict[str, Tensor]:
    """The text of N trajectories: encoded once per task where all of its trajectories have it in common.

    `instructions` (P); `images` of the P tasks, or of the N trajectories from the second turn on.
    """
    is_of_tasks = len(images) == len(instructions)
    if policy.family.is_text_of_image and not is_of_tasks:
        repeated = [instruction for instruction in instructions for _ in range(group_size)]
        return policy.encode_text(repeated, images, has_cfg=has_cfg)
    text = policy.encode_text(instructions, images if is_of_tasks else images[::group_size], has_cfg=has_cfg)
    return {name: value.repeat_interleave(group_size, dim=0) for name, value in text.items()}


@torch.no_grad()
def roll_out(
    policy: Policy,
    tasks: list[EditTask],
    schedule: Schedule,
    noise: NoiseSource,
    config: RolloutConfig,
    *,
    num_turns: int,
    group_size: int,
    cfg_scale: float = 1.0,
) -> Rollout:
    """Roll out G trajectories of K turns for each task, with the adapter that is selected.

    Of the config: hand_off, microbatch_size, cuda_graph.
    """
    schedule, num_steps = schedule.to(policy.device), len(schedule.table)
    rows = torch.arange(len(tasks) * group_size)
    group, member = rows // group_size, rows % group_size
    ids = [task.id for task in tasks for _ in range(group_size)]
    image = torch.stack([task.source for task in tasks])
    image_latents = policy.encode_image(image).repeat_interleave(group_size, dim=0)
    turns = []
    for turn in traced("turn", range(num_turns)):
        instructions = [task.instructions[turn] for task in tasks]
        text = _encode_text(policy, instructions, image, group_size, has_cfg=cfg_scale != 1)
        condition = Condition(text=text, image=image_latents, cfg_scale=cfg_scale)

        def keys(place: Place, number: int = 0, turn: int = turn) -> Tensor:
            return row_keys(ids, member, noise, turn=turn, place=place, number=number).to(policy.device)

        shape = (policy.num_tokens, policy.num_channels)
        start = counter_normal(keys(Place.INITIAL_LATENTS), shape).to(image_latents)
        step_keys = [keys(Place.DENOISING_STEP, step) if schedule.is_noisy[step] else None for step in range(num_steps)]
        is_by_graph = is_captured(policy, min(config.microbatch_size, len(start)), condition, config.cuda_graph)
        run = denoise_by_graph if is_by_graph else denoise
        parts = [
            run(policy, rows, latents, schedule, chunk_keys)
            for rows, latents, chunk_keys in chunks(condition, start, step_keys, config.microbatch_size)
        ]
        latents, log_prob = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        image = round_to_8_bit(policy.decode(latents[-1]))
        turns.append(Turn(condition=condition, latents=latents, old_log_prob=log_prob, image=image))
        if turn + 1 < num_turns:
            image_latents = policy.encode_image(image) if config.hand_off == "pixels" else latents[-1]
    return Rollout(tasks=tasks, turns=turns, group=group, member=member, schedule=schedule, noise=noise)


def sample_rollout(
    policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, iteration: int
) -> Rollout:
    """The rollout of a training iteration, under the old policy and on the steps of the objective."""
    schedule = objective.schedule(policy.sigmas(config.rollout.num_steps), iteration)
    with policy.adapters.use(objective.rollout_adapter):
        return roll_out(
            policy, tasks, schedule, NoiseSource(seed=config.run.seed, step=iteration), config.rollout,
            num_turns=config.data.num_turns, group_size=config.rollout.group_size,
            cfg_scale=config.model.cfg_scale if config.rollout.is_guided else 1.0,
        )  # fmt: skip
