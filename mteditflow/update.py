"""From a rollout and its advantages to optimizer steps.

A microbatch is rows of the rollout at one draw of one turn, as many as a chunk of the rollout has, so that the forward
pass that is trained on has the geometry of the one that sampled it. Rows of advantage 0 (groups without spread,
trajectories without a score) carry no gradient: they are left out, and the microbatches filled up with others. The loss
is normalised by the count of all transitions of all ranks, so leaving them out changes nothing.
"""

import math

import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.guards import GuardError, check_ratio
from mteditflow.objective import Objective
from mteditflow.policy import Policy
from mteditflow.record.clock import phase
from mteditflow.types import Microbatch, Rollout


def build_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """AdamW on the trained weights."""
    parameters = [parameter for _, parameter in policy.adapters.trainable]
    o = config.optimizer
    return torch.optim.AdamW(parameters, lr=o.learning_rate, eps=o.epsilon, weight_decay=o.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, iteration: int) -> None:
    """Give the optimizer the learning rate of an iteration."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(config, iteration)


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate of an iteration: constant, or falling linearly to 0 at the end of the run."""
    optimizer, end = config.optimizer, config.run.num_iterations
    share = (end - iteration) / end if optimizer.schedule == "linear" else 1.0
    return optimizer.learning_rate * share


def fill_microbatches(is_wanted: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut the wanted rows, `is_wanted` (N,) bool, into microbatches of `size` with their weights, 1.

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


def minibatches(
    rollout: Rollout, advantages: Tensor, objective: Objective, config: Config, num_ranks: int = 1
) -> list[list[Microbatch]]:
    """The microbatches of each optimizer step of an iteration. `advantages` (N, K)."""
    size, num_updates = config.optimizer.microbatch_size, config.optimizer.num_updates
    draws = objective.draws(rollout.schedule)
    scale = num_updates / (advantages.numel() * len(draws) * num_ranks)
    microbatches = [
        Microbatch(turn=turn, draw=draw, rows=rows, weight=scale * weight)
        for turn, parts in enumerate(fill_microbatches(is_wanted, size) for is_wanted in (advantages.cpu() != 0).T)
        for draw in draws
        for rows, weight in parts
    ]
    return [microbatches[update::num_updates] for update in range(num_updates)]


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    rollout: Rollout,
    advantages: Tensor,
    config: Config,
    ranks: Ranks,
) -> dict[str, float]:
    """Make the optimizer steps of an iteration; returns diagnostics over the microbatches, and how many transitions
    this rank trained on.

    Every rank has all the keys: they are NaN where no microbatch was run. Raises GuardError before any harm is done.
    """
    figures: dict[str, list[Tensor]] = {}
    for number, microbatches in enumerate(minibatches(rollout, advantages, objective, config, ranks.world_size)):
        losses = [torch.zeros((), device=policy.device)]
        for microbatch in microbatches:
            with phase("forward, backward"):
                loss, diagnostics = objective.loss(policy, rollout, advantages, microbatch, is_first_update=number == 0)
                loss.backward()
            losses.append(loss.detach())
            for name, value in diagnostics.items():
                figures.setdefault(name, []).append(value)
        if number == 0 and "ratio_error" in figures:
            figures["first_ratio_error"] = [torch.stack(figures["ratio_error"]).max()]
            check_ratio(figures["first_ratio_error"][0].item(), config)
        loss = torch.stack(losses).sum()
        norm = step(policy, optimizer, loss, config, ranks)
        figures.setdefault("loss", []).append(loss)
        figures.setdefault("grad_norm", []).append(norm)
    values = dict.fromkeys((*objective.figures, *objective.worst_figures), math.nan)
    for name, parts in figures.items():
        together = torch.stack(parts)
        values[name] = (together.max() if name in objective.worst_figures else together.mean()).item()
    values["num_transitions"] = float((advantages != 0).sum()) * objective.num_draws
    return {f"update/{name}": value for name, value in values.items()}


@phase("optimizer")
def step(policy: Policy, optimizer: torch.optim.Optimizer, loss: Tensor, config: Config, ranks: Ranks) -> Tensor:
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
