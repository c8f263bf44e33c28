"""K turns of S denoising steps: every turn edits the image that the model itself made in the turn before.

Rows go through the model in chunks of `microbatch_size`, always cut at the same places, and training cuts where the
rollout cut: a matrix product may give a row other bits in a batch of another size, and the ratio before the first
update has to be exactly 1.
"""

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from mteditflow_kernels import STD, counter_normal, noise_keys, sde_step
from torch import Tensor

from mteditflow.config import Config
from mteditflow.flow import noisy_steps, second_order, step_table, window_steps
from mteditflow.graph import Graphs, is_launch_bound
from mteditflow.policy import Policy
from mteditflow.types import Condition, EditTask, Rollout, Turn

INITIAL_NOISE = 2**16 - 1  # where a turn's first latents stand among the denoising steps of the noise keys


def row_keys(
    tasks: Sequence[EditTask], group_size: int, *, seed: int, step: int, turn: int, denoising_step: int
) -> Tensor:
    """Noise keys (N, 5) of the trajectories of the tasks, in order."""
    task = torch.tensor([task.id for task in tasks]).repeat_interleave(group_size)
    trajectory = torch.arange(group_size).repeat(len(tasks))
    return noise_keys(seed=seed, step=step, task=task, trajectory=trajectory, turn=turn, denoising_step=denoising_step)


def to_8_bit(images: Tensor) -> Tensor:
    """What a picture file holds of images in [-1, 1]."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def denoise(
    policy: Policy,
    condition: Condition,
    latents: Tensor,
    sigmas: Tensor,
    table: Tensor,
    keys: Sequence[Tensor | None],
    corrections: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """All denoising steps of a turn from noise `latents` (B, L, C): latents (S+1, B, L, C) and log-prob (S, B).

    `keys`: per step the noise keys (B, 5), or None at an ODE step; `corrections`: those of `flow.second_order`, or 0.
    """
    path, log_probs, before = [latents], [], latents
    for step, correction in enumerate(corrections):
        velocity = policy.velocity(latents, sigmas[step].expand(len(latents)), condition)
        if any(corrections):
            estimate = latents - sigmas[step] * velocity
            velocity, before = velocity + correction * (estimate - before), estimate
        latents, log_prob = sde_step(velocity, latents, table, step, keys[step])
        path.append(latents)
        log_probs.append(log_prob)
    return torch.stack(path), torch.stack(log_probs)


_GRAPHS: WeakKeyDictionary[Policy, Graphs] = WeakKeyDictionary()


def denoise_by_graph(
    policy: Policy,
    condition: Condition,
    latents: Tensor,
    sigmas: Tensor,
    table: Tensor,
    keys: Sequence[Tensor | None],
    corrections: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """`denoise` as one CUDA graph for each selected adapter, choice of noisy steps, and shapes.

    Optimizer, `copy_adapter` and `load_adapter_state` write the adapter's weights in place: a graph sees new ones.
    """
    if policy not in _GRAPHS:
        _GRAPHS[policy] = Graphs()
    is_noisy = tuple(own is not None for own in keys)

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        text, (image, latents, sigmas, table, *drawn) = dict(zip(names, inputs, strict=False)), inputs[len(names) :]
        own_keys = [drawn[sum(is_noisy[:step])] if is_noisy[step] else None for step in range(len(is_noisy))]
        own = Condition(text=text, image=image, cfg_scale=condition.cfg_scale)
        return denoise(policy, own, latents, sigmas, table, own_keys, corrections)

    names = tuple(condition.text)
    given = [*condition.text.values(), condition.image, latents, sigmas, table]
    given += [own for own in keys if own is not None]
    signature = (policy.adapters.selected, condition.cfg_scale, names, is_noisy, tuple(corrections))
    path, log_prob = _GRAPHS[policy](run, given, signature)
    return path, log_prob


def is_captured(policy: Policy, num_rows: int, condition: Condition, cuda_graph: str) -> bool:
    """Whether chunks of `num_rows` are denoised by graph. ValueError where that is asked for without CUDA."""
    is_cuda = policy.device.type == "cuda"
    if cuda_graph == "on" and not is_cuda:
        raise ValueError(f"rollout.cuda_graph is 'on': there are no graphs on {policy.device}, take 'auto' or 'off'")
    # Qwen-Image-Edit-2511's transformer makes a tensor of Python numbers in every forward pass: that waits for the host
    if is_cuda and policy.pipeline.transformer.config.get("zero_cond_t", False):
        if cuda_graph == "on":
            raise ValueError("rollout.cuda_graph is 'on': a model with zero_cond_t has no graph, take 'auto' or 'off'")
        return False
    if cuda_graph != "auto" or not is_cuda:
        return cuda_graph == "on"
    num_text = max(value.shape[1] for value in condition.text.values() if value.ndim == 3)  # (N, T, E)
    num_tokens = num_rows * (policy.num_tokens + policy.num_condition_tokens + num_text)
    return is_launch_bound(policy.pipeline.transformer, num_tokens, policy.pipeline.transformer.dtype)


def chunks(
    condition: Condition, noise: Tensor, keys: Sequence[Tensor | None], size: int
) -> Iterator[tuple[Condition, Tensor, list[Tensor | None]]]:
    """What goes through the model together: `size` rows at a time, and what is left."""
    for rows in torch.arange(len(noise), device=noise.device).split(size):
        yield condition.rows(rows), noise[rows], [None if own is None else own[rows] for own in keys]


def _text(
    policy: Policy, instructions: list[str], images: Tensor, group_size: int, *, has_cfg: bool
) -> dict[str, Tensor]:
    """The text of N trajectories: once per task where all of its trajectories have it in common.

    `instructions` (P); `images` of the P tasks, or of the N trajectories from the second turn on.
    """
    is_of_tasks = len(images) == len(instructions)
    if policy.is_text_of_image and not is_of_tasks:
        each = [instruction for instruction in instructions for _ in range(group_size)]
        return policy.encode_text(each, images, has_cfg=has_cfg)
    text = policy.encode_text(instructions, images if is_of_tasks else images[::group_size], has_cfg=has_cfg)
    return {name: value.repeat_interleave(group_size, dim=0) for name, value in text.items()}


@torch.no_grad()
def roll_out(
    policy: Policy,
    tasks: list[EditTask],
    *,
    num_turns: int,
    group_size: int,
    sigmas: Tensor,
    table: Tensor,
    trained_steps: tuple[int, ...],
    hand_off: str,
    microbatch_size: int,
    seed: int,
    step: int,
    solver: str = "euler",
    cfg_scale: float = 1.0,
    cuda_graph: str = "auto",
) -> Rollout:
    """G trajectories of K turns for each task, with the adapter that is selected. `sigmas` (S+1,) and `table` (S, 7)
    make a schedule, ValueError where they do not; `solver` of ODE steps is 'euler' or 'dpm2'.
    """
    if len(table) != len(sigmas) - 1:
        raise ValueError(f"table has {len(table)} rows: must have {len(sigmas) - 1}, one for each step of sigmas")
    corrections = second_order(sigmas) if solver == "dpm2" else [0.0] * len(table)
    noisy = (table[:, STD] > 0).tolist()
    table, sigmas = table.to(policy.device), sigmas.float().to(policy.device)
    image = torch.stack([task.source for task in tasks])
    image_latents = policy.encode_image(image).repeat_interleave(group_size, dim=0)
    turns = []
    for turn in range(num_turns):
        text = _text(policy, [task.instructions[turn] for task in tasks], image, group_size, has_cfg=cfg_scale != 1)
        condition = Condition(text=text, image=image_latents, cfg_scale=cfg_scale)
        keys = [
            row_keys(tasks, group_size, seed=seed, step=step, turn=turn, denoising_step=i).to(policy.device)
            for i in [*range(len(table)), INITIAL_NOISE]
        ]  # S+1 times (N, 5)
        noise = counter_normal(keys[-1], (policy.num_tokens, policy.num_channels)).to(image_latents)
        is_by_graph = is_captured(policy, min(microbatch_size, len(noise)), condition, cuda_graph)
        run = denoise_by_graph if is_by_graph else denoise
        drawn = [own if is_noisy else None for own, is_noisy in zip(keys, noisy, strict=False)]
        parts = [
            run(policy, rows, start, sigmas, table, own, corrections)
            for rows, start, own in chunks(condition, noise, drawn, microbatch_size)
        ]
        latents, log_prob = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        image = to_8_bit(policy.decode(latents[-1]))
        turns.append(Turn(condition=condition, latents=latents, old_log_prob=log_prob, image=image))
        if turn + 1 < num_turns:
            image_latents = policy.encode_image(image) if hand_off == "pixels" else latents[-1]
    group = torch.arange(len(tasks)).repeat_interleave(group_size)
    return Rollout(tasks=tasks, turns=turns, group=group, table=table, sigmas=sigmas, trained_steps=trained_steps)


def sample_rollout(policy: Policy, tasks: list[EditTask], config: Config, iteration: int) -> Rollout:
    """The rollout of a training iteration: noisy steps under GRPO, the ODE of the old adapter under NFT."""
    r, is_nft = config.rollout, config.objective.name == "nft"
    sigmas = policy.sigmas(r.num_steps)
    trained = window_steps(
        r.num_steps, r.window_size, r.window_placement, iteration, config.run.num_iterations, config.run.seed
    )
    noisy = () if is_nft else noisy_steps(r.num_steps, r.window_size, trained, r.last_step)
    with policy.adapters.use("old" if is_nft else "current"):
        return roll_out(
            policy, tasks, num_turns=config.data.num_turns, group_size=r.group_size, sigmas=sigmas,
            table=step_table(sigmas, noise_level=r.noise_level, rule=r.rule, noisy_steps=noisy), trained_steps=trained,
            hand_off=r.hand_off, microbatch_size=r.microbatch_size, seed=config.run.seed, step=iteration,
            solver=r.solver, cfg_scale=config.model.cfg_scale if r.is_guided else 1.0, cuda_graph=r.cuda_graph,
        )  # fmt: skip
