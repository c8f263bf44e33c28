"""K turns of S denoising steps: every turn edits the image that the model itself made in the turn before.

Trajectories are made wave by wave, K turns each, so that one wave can be scored while the next is made.

Rows go through the model in chunks of `microbatch_size`, always cut at the same places, and training cuts where the
rollout cut: a matrix product may give a row other bits in a batch of another size, and the ratio before the first
update has to be exactly 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from mteditflow_kernels import counter_normal, sde_step
from torch import Tensor

from mteditflow.config import Config, RolloutConfig
from mteditflow.distributed import Ranks, alone
from mteditflow.flow import Schedule
from mteditflow.noise import NoiseSource, Place, row_keys
from mteditflow.objective import Objective
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy
from mteditflow.policy.cuda_graph import by_graph, is_captured
from mteditflow.policy.encoding import rows_at_a_time, stack_references
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


def chunks(condition: Condition, noise: Tensor, keys: Keys, size: int) -> Iterator[tuple[Condition, Tensor, Keys]]:
    """Cut N rows into what goes through the model together: `size` at a time, and what is left."""
    for rows in torch.arange(len(noise), device=noise.device).split(size):
        yield condition.rows(rows), noise[rows], [None if key is None else key[rows] for key in keys]


def cut_shapes(tasks: Sequence[EditTask]) -> list[slice]:
    """Cut tasks where their shape changes."""
    starts = [n for n, task in enumerate(tasks) if n == 0 or task.shape != tasks[n - 1].shape]
    return [slice(start, stop) for start, stop in pairwise([*starts, len(tasks)])]


def cut_waves(rows: range, config: RolloutConfig) -> list[Tensor]:
    """The trajectories (W,) of each wave: whole microbatches, the fewest that have wave_size rows, or a group's."""
    size = config.wave_size or config.group_size
    size = math.ceil(size / config.microbatch_size) * config.microbatch_size
    return list(torch.tensor(rows).split(size))


class Sampler:
    """K turns of the trajectories of some tasks, any at a time: what they start from is encoded once, and noise is
    counted, so that a row is the same to the bit in every wave of whole microbatches.
    """

    def __init__(
        self, policy: Policy, tasks: list[EditTask], schedule: Schedule, noise: NoiseSource, config: RolloutConfig, *,
        num_turns: int, group_size: int, cfg_scale: float = 1.0,
    ) -> None:  # fmt: skip
        """Encode the sources, of one shape, and each text that does not depend on what the model makes. Of the config:
        hand_off, microbatch_size, is_start_shared, cuda_graph.
        """
        policy = policy.at(tasks[0].shape)
        self.policy, self.tasks, self.noise, self.config = policy, tasks, noise, config
        self.schedule, self.num_turns, self.cfg_scale = schedule.to(policy.device), num_turns, cfg_scale
        sizes = policy.config.condition_size, (policy.config.height, policy.config.width)
        self.to_encode, self.to_decode = (min(config.microbatch_size, rows_at_a_time(*size)) for size in sizes)
        every = torch.arange(len(tasks) * group_size)
        self.group, self.member = every // group_size, every % group_size
        images = torch.stack([task.source for task in tasks])
        self.source_latents = policy.encode_image(images, self.to_encode)
        self.references = stack_references(tasks)
        self.reference_latents = policy.encode_references(self.references, self.to_encode)
        self.encode_text = partial(policy.encode_text, has_cfg=cfg_scale != 1)
        num_texts = 1 if policy.family.is_text_of_image else num_turns
        self.texts = [
            self.encode_text([task.instructions[turn] for task in tasks], images, references=self.references)
            for turn in range(num_texts)
        ]

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Rollout:
        """Roll out the trajectories `rows` (W,), with the adapter that is selected."""
        policy, config, schedule = self.policy, self.config, self.schedule
        group, member = self.group[rows], self.member[rows]
        ids = torch.tensor([task.id for task in self.tasks])[group]
        on_device = group.to(policy.device)
        image, image_latents, turns = torch.zeros(0), self.source_latents[on_device], list[Turn]()
        given = [latents[on_device] for latents in self.reference_latents]
        for turn in traced("turn", range(self.num_turns)):
            text = self._text(turn, group, image)
            image_latents = torch.cat([image_latents, *given], dim=1)
            condition = Condition(text=text, image=image_latents, cfg_scale=self.cfg_scale)

            def keys(place: Place, number: int = 0, turn: int = turn, member: Tensor = member) -> Tensor:
                return row_keys(ids, member, self.noise, turn=turn, place=place, number=number).to(policy.device)

            shape = (policy.num_tokens, policy.num_channels)
            whose = member * (not config.is_start_shared)  # 0: the group's
            start = counter_normal(keys(Place.INITIAL_LATENTS, member=whose), shape).to(image_latents)
            step_keys = [keys(Place.DENOISING_STEP, s) if noisy else None for s, noisy in enumerate(schedule.is_noisy)]
            is_by_graph = is_captured(policy, min(config.microbatch_size, len(start)), condition, config.cuda_graph)
            run = by_graph(denoise) if is_by_graph else denoise
            parts = [
                run(policy, chunk, latents, schedule, chunk_keys)
                for chunk, latents, chunk_keys in chunks(condition, start, step_keys, config.microbatch_size)
            ]
            latents, log_prob = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
            image = round_to_8_bit(policy.decode(latents[-1], self.to_decode))
            turns.append(Turn(condition=condition, latents=latents, old_log_prob=log_prob, image=image))
            if turn + 1 < self.num_turns:
                image_latents = latents[-1]
                if config.hand_off == "pixels":
                    image_latents = policy.encode_image(image, self.to_encode)
        return Rollout(tasks=self.tasks, turns=turns, group=group, member=member, schedule=schedule, noise=self.noise)

    def _text(self, turn: int, group: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The text of a turn: of the tasks, or where the encoder sees the picture of the trajectories."""
        if turn < len(self.texts):
            at = group.to(self.policy.device)
            return {name: value[at] for name, value in self.texts[turn].items()}
        instructions = [self.tasks[g].instructions[turn] for g in group.tolist()]
        return self.encode_text(instructions, image, references=[images[group] for images in self.references])


@torch.no_grad()
def roll_out(
    policy: Policy, tasks: list[EditTask], schedule: Schedule, noise: NoiseSource, config: RolloutConfig, *,
    num_turns: int, group_size: int, cfg_scale: float = 1.0,
) -> Rollout:  # fmt: skip
    """Roll out G trajectories of K turns for each task at once, as `Sampler` does."""
    how = partial(Sampler, num_turns=num_turns, group_size=group_size, cfg_scale=cfg_scale)
    return how(policy, tasks, schedule, noise, config)(torch.arange(len(tasks) * group_size))


def sample_waves(
    policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, iteration: int, ranks: Ranks
) -> Iterator[Rollout]:
    """Roll out this rank's trajectories, of its tasks, wave by wave under the old policy on the objective's steps."""
    size, num_steps = config.rollout.group_size, config.rollout.num_steps
    share = ranks.share(config.rollout.num_tasks * size)  # which begins within the group of the first task
    first, stop = share[0] % size, share[0] % size + len(share)
    for part in cut_shapes(tasks):
        sigmas = policy.at(tasks[part.start].shape).sigmas(num_steps)  # fewer tokens, less noise
        sampler = Sampler(
            policy, tasks[part], objective.schedule(sigmas, iteration),
            NoiseSource(seed=config.run.seed, step=iteration), config.rollout, num_turns=config.data.num_turns,
            group_size=size, cfg_scale=config.model.cfg_scale if config.rollout.is_guided else 1.0,
        )  # fmt: skip
        start = part.start * size
        for rows in cut_waves(range(max(first, start) - start, min(stop, part.stop * size) - start), config.rollout):
            with policy.adapters.use(objective.rollout_adapter):
                wave = sampler(rows)
            yield wave


def sample_rollout(
    policy: Policy, objective: Objective, tasks: list[EditTask], config: Config, iteration: int
) -> Rollout:
    """All trajectories of some tasks of one shape in one wave, as an iteration makes them."""
    whole = replace(config.rollout, num_tasks=len(tasks), wave_size=len(tasks) * config.rollout.group_size)
    return next(sample_waves(policy, objective, tasks, replace(config, rollout=whole), iteration, alone()))
