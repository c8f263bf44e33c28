"""From a rollout and its advantages to optimizer steps.

A microbatch is rows of the rollout at one denoising step of one turn, as many as a chunk of the rollout has, so that
the forward pass that is trained on has the geometry of the one that sampled it. Rows of advantage 0 (groups without
spread, trajectories without a score) carry no gradient: they are left out, and the microbatches filled up with others.
The loss is normalised by the count of all transitions of all ranks, so leaving them out changes nothing.
"""

import math
from dataclasses import dataclass

import torch
from mteditflow_kernels import C_V, C_X, STD, counter_normal, counter_uniform
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.objective import grpo, nft
from mteditflow.policy import Policy
from mteditflow.rollout import row_keys
from mteditflow.types import Rollout, Scores, Transitions

GRPO_FIGURES = (
    *("ratio_mean", "ratio_error", "clip_fraction", "approx_kl", "kl"),
    *("policy_loss", "log_prob_difference", "first_ratio_error"),
)
NFT_FIGURES = ("policy_loss", "kl")
TIMES_KEY, NOISE_KEY = 2**15, 2**15 + 1  # where NFT's draws stand among the denoising steps of the noise keys


class GuardError(RuntimeError):
    """Training must not go on: what a guard found, and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of a rollout that go through the model together, at one turn and one trained step (GRPO) or draw (NFT)."""

    turn: int
    step: int
    rows: Tensor  # (B,) int64
    weight: Tensor  # (B,) 1, or 0 for a row that only fills the microbatch


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What NFT's draws depend on, and whether the trained adapter still is the one that made the rollout."""

    iteration: int
    is_on_policy: bool


def filled(is_wanted: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The wanted rows, `is_wanted` (N,) bool, in microbatches of `size` with their weights, 1.

    Repetitions of a wanted row, of weight 0, make the last microbatch whole: rows without a score may hold NaN. What is
    left of N after whole microbatches is one of its own, as in the rollout.
    """
    num_whole = len(is_wanted) // size * size
    parts = []
    for start, stop, length in ((0, num_whole, size), (num_whole, len(is_wanted), len(is_wanted) - num_whole)):
        wanted = start + is_wanted[start:stop].nonzero().flatten()
        for rows in wanted.split(length) if len(wanted) else ():
            padding = rows[:1].expand(length - len(rows))
            parts.append((torch.cat([rows, padding]), (torch.arange(length) < len(rows)).float()))
    return parts


def minibatches(rollout: Rollout, advantages: Tensor, config: Config) -> list[list[Chunk]]:
    """The chunks of each optimizer step of an iteration. `advantages` (N, K)."""
    size, num_updates = config.optimizer.microbatch_size, config.optimizer.num_updates
    steps = range(config.objective.nft_num_times) if config.objective.name == "nft" else rollout.trained_steps
    parts = [filled(advantages[:, turn].cpu() != 0, size) for turn in range(len(rollout.turns))]
    chunks = [
        Chunk(turn=turn, step=step, rows=rows, weight=weight)
        for turn, own in enumerate(parts)
        for step in steps
        for rows, weight in own
    ]
    return [chunks[update::num_updates] for update in range(num_updates)]


def transitions(rollout: Rollout, advantages: Tensor, chunk: Chunk) -> Transitions:
    """The denoising steps of a chunk."""
    turn, rows, step = rollout.turns[chunk.turn], chunk.rows.to(rollout.table.device), chunk.step
    return Transitions(
        condition=turn.condition.rows(rows),
        latents=turn.latents[step, rows],
        next_latents=turn.latents[step + 1, rows],
        step=torch.full_like(rows, step),
        sigma=rollout.sigmas[step].expand(len(rows)),
        sigma_next=rollout.sigmas[step + 1].expand(len(rows)),
        old_log_prob=turn.old_log_prob[step, rows],
        advantage=advantages[chunk.rows, chunk.turn].to(rollout.table.device),
    )


def chunk_keys(rollout: Rollout, chunk: Chunk, config: Config, iteration: int, denoising_step: int) -> Tensor:
    """Noise keys (B, 5) of a chunk's rows."""
    keys = row_keys(
        rollout.tasks,
        config.rollout.group_size,
        seed=config.run.seed,
        step=iteration,
        turn=chunk.turn,
        denoising_step=denoising_step,
    )
    return keys[chunk.rows].to(rollout.table.device)


def old_velocity(t: Transitions, table: Tensor, keys: Tensor) -> Tensor:
    """What moved `latents` to `next_latents` in the rollout: the step undone, since its noise can be counted again."""
    noise = counter_normal(keys, tuple(t.latents.shape[1:]))
    c_x, c_v, std = (table[t.step, column].reshape(-1, 1, 1) for column in (C_X, C_V, STD))
    return (t.next_latents - std * noise - c_x * t.latents) / c_v


def grpo_chunk(
    policy: Policy, rollout: Rollout, advantages: Tensor, chunk: Chunk, config: Config, scale: float, draw: Draw
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss on a chunk, each row weighted by `scale` and its own weight."""
    t = transitions(rollout, advantages, chunk)
    reference, old = None, None
    if config.objective.ratio == "guard":
        keys = chunk_keys(rollout, chunk, config, draw.iteration, chunk.step)
        old = old_velocity(t, rollout.table, keys).to(t.latents.dtype)
    if config.objective.kl_beta > 0:
        with torch.no_grad(), policy.adapters.use("off"):
            reference = policy.velocity(t.latents, t.sigma, t.condition)
    velocity = policy.velocity(t.latents, t.sigma, t.condition)
    return grpo.loss(velocity, t, rollout.table, config.objective, reference, old, scale * chunk.weight.to(t.sigma))


def nft_chunk(
    policy: Policy, rollout: Rollout, advantages: Tensor, chunk: Chunk, config: Config, scale: float, draw: Draw
) -> tuple[Tensor, dict[str, Tensor]]:
    """NFT's loss on a chunk: the turn's clean latents, noised to sigmas drawn per row, without replacement over draws.

    Where the trained adapter still is the old one (`is_on_policy`), one forward pass gives both velocities.
    """
    turn, rows = rollout.turns[chunk.turn], chunk.rows.to(rollout.table.device)

    def keys(kind: int, number: int) -> Tensor:
        return chunk_keys(rollout, chunk, config, draw.iteration, kind + number)

    order = counter_uniform(keys(TIMES_KEY, 0), len(rollout.sigmas) - 1).argsort(dim=1)  # the steps, permuted per row
    sigma = rollout.sigmas[order[:, chunk.step]]
    clean, condition = turn.latents[-1, rows], turn.condition.rows(rows)
    noise = counter_normal(keys(NOISE_KEY, chunk.step), tuple(clean.shape[1:])).to(clean)
    latents = nft.noised(clean, noise, sigma)
    velocity = policy.velocity(latents, sigma, condition)
    old_velocity, reference = velocity.detach(), None
    with torch.no_grad():
        if not draw.is_on_policy:
            with policy.adapters.use("old"):
                old_velocity = policy.velocity(latents, sigma, condition)
        if config.objective.kl_beta > 0:
            with policy.adapters.use("off"):
                reference = policy.velocity(latents, sigma, condition)
    advantage = advantages[chunk.rows, chunk.turn].to(clean.device)
    return nft.loss(
        velocity,
        old_velocity,
        clean,
        noise,
        sigma,
        advantage,
        config.objective,
        reference,
        scale * chunk.weight.to(sigma),
    )


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Tensor,
    config: Config,
    iteration: int,
    ranks: Ranks,
) -> dict[str, float]:
    """The optimizer steps of an iteration; returns diagnostics over the chunks.

    Every rank has all the keys: they are NaN where no chunk was run. Raises GuardError before any harm is done.
    """
    totals: dict[str, list[Tensor]] = {}
    is_nft = config.objective.name == "nft"
    num_steps = config.objective.nft_num_times if is_nft else len(rollout.trained_steps)
    scale = config.optimizer.num_updates / (advantages.numel() * num_steps * ranks.world_size)
    for number, chunks in enumerate(minibatches(rollout, advantages, config)):
        losses = [torch.zeros((), device=policy.device)]
        draw = Draw(iteration=iteration, is_on_policy=number == 0 and config.objective.nft_old_decay == "on_policy")
        for chunk in chunks:
            loss, diagnostics = (nft_chunk if is_nft else grpo_chunk)(
                policy, rollout, advantages, chunk, config, scale, draw
            )
            loss.backward()
            losses.append(loss.detach())
            for name, value in diagnostics.items():
                totals.setdefault(f"update/{name}", []).append(value)
        if number == 0 and not is_nft and chunks:
            totals["update/first_ratio_error"] = [torch.stack(totals["update/ratio_error"]).max()]
            _check_ratio(totals["update/first_ratio_error"][0].item(), config)
        loss = torch.stack(losses).sum()
        norm = _optimizer_step(policy, optimizer, loss, config, ranks)
        totals.setdefault("update/loss", []).append(loss)
        totals.setdefault("update/grad_norm", []).append(norm)
    worst = {"update/ratio_error", "update/first_ratio_error", "update/log_prob_difference"}
    return {f"update/{name}": math.nan for name in (NFT_FIGURES if is_nft else GRPO_FIGURES)} | {
        name: (torch.stack(v).max() if name in worst else torch.stack(v).mean()).item() for name, v in totals.items()
    }


def _check_ratio(error: float, config: Config) -> None:
    """The log-prob that training computes has to be the one that the rollout stored, before the first update."""
    if error > config.run.max_ratio_error:
        raise GuardError(
            f"the ratio before the first update is off by {error:.3g}, run.max_ratio_error is "
            f"{config.run.max_ratio_error:g}: rollout.microbatch_size ({config.rollout.microbatch_size}) and "
            f"optimizer.microbatch_size ({config.optimizer.microbatch_size}) must be equal, or the limit higher"
        )


def _optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, loss: Tensor, config: Config, ranks: Ranks
) -> Tensor:
    """Sum the gradients over ranks, clip, step, average; returns the gradient's norm. No gradient at all: no step."""
    parameters = [parameter for _, parameter in policy.adapters.trainable]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
    if not torch.stack([loss, norm]).isfinite().all():
        optimizer.zero_grad()
        raise GuardError(f"loss {loss.item()}, gradient norm {norm.item()}: not finite; lower optimizer.learning_rate")
    if norm > 0:
        optimizer.step()
        policy.adapters.copy("current", "ema", decay=config.optimizer.ema_decay)
    optimizer.zero_grad()
    return norm


def check_scores(scores: Scores, config: Config) -> None:
    """Stop where too many trajectories could not be scored: a run on the few that are left learns little."""
    share = 1 - scores.valid.float().mean().item()
    if share > config.run.max_invalid_share:
        raise GuardError(
            f"{share:.0%} of the trajectories could not be scored, run.max_invalid_share is "
            f"{config.run.max_invalid_share:.0%}: look at the reward, judge {config.reward.judge!r}"
        )


@torch.no_grad()
def check_adapter(policy: Policy, rollout: Rollout) -> None:
    """Stop where the updated adapter leaves the velocity as it was: a LoRA that reaches nothing trains in silence."""
    rows = torch.arange(min(2, len(rollout.group)), device=rollout.table.device)
    turn = rollout.turns[0]
    condition, sigma = turn.condition.rows(rows), rollout.sigmas[0].expand(len(rows))
    own = policy.velocity(turn.latents[0, rows], sigma, condition)
    with policy.adapters.use("off"):
        base = policy.velocity(turn.latents[0, rows], sigma, condition)
    if torch.equal(own, base):
        raise GuardError(
            "the adapter does not change the velocity after an update: check lora.targets, and whether "
            "optimizer.learning_rate is too small"
        )
