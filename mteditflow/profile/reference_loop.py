"""The loop that users write with diffusers and peft, to compare ours with: peft's LoRA on the same frozen weights, no
compile, torch's own attention, eager steps with `torch.randn` that look their sigma up on the host (`.item()`, as in
Flow-GRPO's public code), text and condition encoded for every batch, all steps trained, one batch of transitions at a
time, the judge asked when the rollout is over.

It computes what the trainer does: from the same noise the same latents, losses and gradients (tests/test_compare.py).
Methods of the stock pipeline are called through our editor, whose kept prompts it thus shares. It makes GRPO's SDE
steps, all of them noisy, or DiffusionNFT's ODE by Euler; CPS, GRPO-Guard and DPM-Solver++ have no part here.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.ranges import require
from mteditflow.flow import make_schedule
from mteditflow.noise import NoiseSource
from mteditflow.objective import Nft
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy
from mteditflow.profile.command import Case
from mteditflow.types import Condition, EditTask, Rollout, Turn

TRAINED, OLD = "default", "old"
Noise = Callable[[int, int, Tensor], Tensor]
"""Normal numbers (B, L, C) for (turn, draw, rows): draw 0 is the start, 1 to S are the steps."""


def peft_transformer(policy: Policy, config: Config) -> Any:
    """Copy the policy's transformer as it was, on the same frozen tensors, with peft's LoRA at the policy's values.

    ValueError: the weights themselves are trained.
    """
    require(not config.lora.is_full, "lora.is_full", True, "the reference loop trains peft's LoRA: must be false")
    ours = policy.pipeline.transformer
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*ours.parameters(), *ours.buffers())}
    transformer = copy.deepcopy(ours, shared)
    for target in policy.adapters.targets:
        parent, _, leaf = target.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, transformer.get_submodule(target).base)
    for module in transformer.modules():
        module.__dict__.pop("forward", None)  # a compiled one, which is ours
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = None
    transformer.disable_gradient_checkpointing()  # it may replay our blocks
    if config.model.is_checkpointed:
        transformer.enable_gradient_checkpointing()
    settings = {"r": config.lora.rank, "lora_alpha": config.lora.alpha, "target_modules": policy.adapters.targets}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # two are meant
        for name in (OLD, TRAINED):  # the last one is active
            transformer.add_adapter(peft.LoraConfig(**settings), adapter_name=name)
    state = policy.adapters.state("current")
    for name, weight in transformer.named_parameters():
        if ".lora_" in name:
            weight.data = state[name.replace(f".{OLD}.", ".").replace(f".{TRAINED}.", ".")].clone()
    return transformer


def sde_step(
    velocity: Tensor, latents: Tensor, sigmas: Tensor, sigma: Tensor, noise_level: float, noise: Tensor | None,
    next_latents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Flow-GRPO's step from `sigma` (B,): next latents, drawn or given, log-prob (B,), mean, and std over sqrt(-dt)."""
    steps = [(sigmas == level).nonzero()[0].item() for level in sigma]
    before = sigma.view(-1, 1, 1)
    after = sigmas[[int(step) + 1 for step in steps]].view(-1, 1, 1)
    highest, dt = sigmas[1].item(), after - before
    rate = torch.sqrt(before / (1 - torch.where(before == 1, highest, before))) * noise_level
    mean = latents * (1 + rate**2 / (2 * before) * dt) + velocity * (1 + rate**2 * (1 - before) / (2 * before)) * dt
    std = rate * torch.sqrt(-dt)
    if next_latents is None:
        assert noise is not None
        next_latents = mean + std * noise
    log_prob = -((next_latents.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return next_latents, log_prob.mean(dim=(1, 2)), mean, rate


@dataclass(frozen=True, kw_only=True)
class ReferenceLoop:
    """A rollout and an update of a config by that loop."""

    policy: Policy
    config: Config
    tasks: Sequence[EditTask]
    transformer: Any
    optimizer: torch.optim.Optimizer
    is_contrastive: bool  # DiffusionNFT; else GRPO

    @property
    def trained_steps(self) -> range:
        """All; GRPO leaves out the last, as the trainer does."""
        return range(self.config.rollout.num_steps - (not self.is_contrastive))

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The transformer's prediction, under the adapter that peft has active."""
        return self.policy.editor.velocity(self.transformer, latents, sigma, condition)

    @torch.no_grad()
    def roll_out(self, noise: Noise) -> Rollout:
        """Roll out the tasks, `rollout.microbatch_size` trajectories at a time."""
        config, group_size = self.config.rollout, self.config.rollout.group_size
        if self.is_contrastive:
            self.transformer.set_adapter(OLD)
        rows = torch.arange(len(self.tasks) * group_size)
        batches = [self._batch(part, noise) for part in rows.split(config.microbatch_size)]
        turns = [_concatenate(parts) for parts in zip(*batches, strict=True)]
        self.transformer.set_adapter(TRAINED)
        schedule = make_schedule(self.policy.sigmas(config.num_steps)).to(self.policy.device)
        source = NoiseSource(seed=self.config.run.seed, step=0)
        return Rollout(
            tasks=list(self.tasks), turns=turns, group=rows // group_size, member=rows % group_size, schedule=schedule,
            noise=source,
        )  # fmt: skip

    def _batch(self, rows: Tensor, noise: Noise) -> list[Turn]:
        config, editor, turns = self.config, self.policy.editor, []
        cfg_scale = config.model.cfg_scale if config.rollout.is_guided else 1.0
        tasks = [self.tasks[int(row) // config.rollout.group_size] for row in rows]
        image = torch.stack([task.source for task in tasks])
        sigmas = self.policy.sigmas(config.rollout.num_steps).float().to(self.policy.device)
        for turn in range(config.data.num_turns):
            instructions = [task.instructions[turn] for task in tasks]
            text = editor.encode_text(instructions, image, has_cfg=cfg_scale != 1)
            condition = Condition(text=text, image=editor.encode_image(image).float(), cfg_scale=cfg_scale)
            path, log_probs = [noise(turn, 0, rows)], []
            for step in range(config.rollout.num_steps):
                latents, sigma = path[-1], sigmas[step].expand(len(rows))
                velocity = self.velocity(latents, sigma, condition)
                if self.is_contrastive:
                    path.append(latents + (sigmas[step + 1].item() - sigmas[step].item()) * velocity)
                    continue
                drawn, level = noise(turn, step + 1, rows), config.rollout.noise_level
                next_latents, log_prob, _, _ = sde_step(velocity, latents, sigmas, sigma, level, drawn)
                path.append(next_latents)
                log_probs.append(log_prob)
            image = round_to_8_bit(editor.decode(path[-1].to(self.policy.dtype)).float().clamp(-1, 1))
            log_prob = torch.stack(log_probs) if log_probs else torch.empty(0, len(rows))
            turns.append(Turn(condition=condition, latents=torch.stack(path), old_log_prob=log_prob, image=image))
        return turns

    def update(self, rollout: Rollout, advantages: Tensor, noise: Noise) -> Tensor:
        """Train on every step of every turn, and make one optimizer step; returns the gradient's norm.

        `advantages` (N, K).
        """
        config, num_steps = self.config, self.config.rollout.num_steps
        batches = torch.arange(len(advantages)).split(config.optimizer.microbatch_size)
        limit = config.objective.max_advantage
        for number, turn in enumerate(rollout.turns):
            for step in self.trained_steps:
                for rows in batches:
                    advantage = advantages[rows, number].to(self.policy.device).clamp(-limit, limit)
                    loss_of = self._contrastive_loss if self.is_contrastive else self._clipped_loss
                    drawn = noise(number, num_steps + 1 + step, rows) if self.is_contrastive else None
                    loss = loss_of(turn, step, rows, advantage, rollout.schedule.sigmas, drawn)
                    loss = loss * len(rows) / (advantages.numel() * len(self.trained_steps))
                    loss.backward()
                    loss.item()  # as it is logged
        parameters = [weight for weight in self.transformer.parameters() if weight.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _without_adapter(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.transformer.disable_adapters()
        with torch.no_grad():
            velocity = self.velocity(latents, sigma, condition)
        self.transformer.enable_adapters()
        return velocity

    def _clipped_loss(
        self, turn: Turn, step: int, rows: Tensor, advantage: Tensor, sigmas: Tensor, _: Tensor | None
    ) -> Tensor:
        settings, level = self.config.objective, self.config.rollout.noise_level
        condition, latents, sigma = turn.condition.rows(rows), turn.latents[step, rows], sigmas[step].expand(len(rows))
        following = turn.latents[step + 1, rows]
        velocity = self.velocity(latents, sigma, condition)
        _, log_prob, mean, rate = sde_step(velocity, latents, sigmas, sigma, level, None, following)
        ratio = torch.exp(log_prob - turn.old_log_prob[step, rows])
        clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
        if settings.kl_beta > 0:
            reference = self._without_adapter(latents, sigma, condition)
            _, _, mean_of_reference, _ = sde_step(reference, latents, sigmas, sigma, level, None, following)
            kl = ((mean - mean_of_reference) ** 2 / (2 * rate**2)).mean()
            loss = loss + settings.kl_beta * kl
        return loss

    def _contrastive_loss(
        self, turn: Turn, step: int, rows: Tensor, advantage: Tensor, sigmas: Tensor, noise: Tensor | None
    ) -> Tensor:
        assert noise is not None
        settings, condition, clean = self.config.objective, turn.condition.rows(rows), turn.latents[-1, rows]
        sigma = sigmas[step].expand(len(rows))
        level = sigma.view(-1, 1, 1)
        latents = (1 - level) * clean + level * noise
        self.transformer.set_adapter(OLD)
        with torch.no_grad():
            old = self.velocity(latents, sigma, condition)
        self.transformer.set_adapter(TRAINED)
        velocity, beta = self.velocity(latents, sigma, condition), settings.nft_beta
        losses = []
        for implicit in (beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity):
            difference = latents - level * implicit - clean
            weight = difference.detach().abs().mean(dim=(1, 2), keepdim=True).clamp(min=1e-5)
            losses.append((difference**2 / weight).mean(dim=(1, 2)))
        share = advantage / settings.max_advantage / 2 + 0.5
        loss = settings.max_advantage * ((share * losses[0] + (1 - share) * losses[1]) / beta).mean()
        if settings.kl_beta > 0:
            loss = loss + settings.kl_beta * ((velocity - self._without_adapter(latents, sigma, condition)) ** 2).mean()
        return loss


def _concatenate(parts: Sequence[Turn]) -> Turn:
    text = {name: torch.cat([part.condition.text[name] for part in parts]) for name in parts[0].condition.text}
    image = torch.cat([part.condition.image for part in parts])
    return Turn(
        condition=Condition(text=text, image=image, cfg_scale=parts[0].condition.cfg_scale),
        latents=torch.cat([part.latents for part in parts], dim=1),
        old_log_prob=torch.cat([part.old_log_prob for part in parts], dim=1),
        image=torch.cat([part.image for part in parts]),
    )


def build_reference(case: Case) -> ReferenceLoop:
    """Build the loop beside a case. ValueError as for `peft_transformer`."""
    transformer = peft_transformer(case.policy, case.config)
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]
    return ReferenceLoop(
        policy=case.policy, config=case.config, tasks=case.tasks, transformer=transformer,
        optimizer=torch.optim.AdamW(weights, lr=1e-9),  # a comparison leaves the weights where they are
        is_contrastive=isinstance(case.objective, Nft),
    )  # fmt: skip
