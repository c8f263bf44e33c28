"""From a rollout and its advantages to optimizer steps.

A microbatch is rows of the rollout at one draw of one turn, as many as a chunk of the rollout has, so that the forward
pass that is trained on has the geometry of the one that sampled it. Rows of advantage 0 (groups without spread,
trajectories without a score) carry no gradient: they are left out, and the microbatches filled up with others. The loss
is normalised by the count of all transitions of all ranks, so leaving them out changes nothing. Groups are trained on
in their order, the first while the last are still being scored.
"""

import math
from collections.abc import Iterable, Iterator

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


class Microbatches:
    """Cuts the rows of a rollout into what goes through the model together, as their advantages become known.

    Rows of advantage 0 are left out. A microbatch is as large as a chunk of the rollout; what is left of N after whole
    chunks has one of its own size, as there. Repetitions of a wanted row, of weight 0, make the last one whole: rows
    without a score may hold NaN. The order is that of groups, whenever and however many at once they come.
    """

    def __init__(self, rollout: Rollout, objective: Objective, config: Config, num_ranks: int = 1) -> None:
        self.num_rows, self.num_turns = len(rollout.group), len(rollout.turns)
        self.size, self.draws = config.optimizer.microbatch_size, objective.draws(rollout.schedule)
        num_transitions = self.num_rows * self.num_turns * len(self.draws) * num_ranks
        self.scale = config.optimizer.num_updates / num_transitions
        self.advantages = torch.zeros(self.num_rows, self.num_turns)  # so far

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[Microbatch]:
        """Yield the microbatches of the advantages (M, K) of the first M rows, the next, and so on to the last."""
        num_whole, start = self.num_rows // self.size * self.size, 0
        regions = [(0, num_whole, self.size), (num_whole, self.num_rows, self.num_rows - num_whole)]
        waiting: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.int64)] * self.num_turns for _ in regions]
        for part in parts:
            stop = start + len(part)
            self.advantages[start:stop] = part
            for (first, last, size), rows_by_turn in zip(regions, waiting, strict=True):
                for turn in range(self.num_turns):
                    inside = torch.arange(max(start, first), max(start, first, min(stop, last)))
                    wanted = inside[self.advantages[inside, turn] != 0]
                    rows = torch.cat([rows_by_turn[turn], wanted])
                    while len(rows) >= size > 0:
                        yield from self._at_every_draw(turn, rows[:size], size)
                        rows = rows[size:]
                    rows_by_turn[turn] = rows
            start = stop
        assert start == self.num_rows, (start, self.num_rows)
        for (_, _, size), rows_by_turn in zip(regions, waiting, strict=True):
            for turn, rows in enumerate(rows_by_turn):
                if len(rows):
                    yield from self._at_every_draw(turn, rows, size)

    def _at_every_draw(self, turn: int, rows: Tensor, size: int) -> Iterator[Microbatch]:
        weight = self.scale * (torch.arange(size) < len(rows)).float()
        filled = torch.cat([rows, rows[:1].expand(size - len(rows))])
        for draw in self.draws:
            yield Microbatch(turn=turn, draw=draw, rows=filled, weight=weight)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    rollout: Rollout,
    advantages: Tensor | Iterable[Tensor],
    config: Config,
    ranks: Ranks,
) -> dict[str, float]:
    """Make the optimizer steps of an iteration; returns diagnostics over the microbatches, and how many transitions
    this rank trained on.

    advantages: (N, K), or those of group after group as they become known: what is known is trained on while the rest
    is awaited. With several updates their microbatches are dealt out in turn. Every rank has all the keys: they are
    NaN where no microbatch was run. Raises GuardError before any harm is done.
    """
    num_updates, figures = config.optimizer.num_updates, dict[str, list[Tensor]]()
    microbatches = Microbatches(rollout, objective, config, ranks.world_size)
    later: list[list[Microbatch]] = [[] for _ in range(num_updates)]

    def first_update() -> Iterator[Microbatch]:
        for i, microbatch in enumerate(microbatches([advantages] if isinstance(advantages, Tensor) else advantages)):
            if i % num_updates:
                later[i % num_updates].append(microbatch)
            else:
                yield microbatch

    for number in range(num_updates):
        losses = [torch.zeros((), device=policy.device)]
        for microbatch in later[number] if number else first_update():
            with phase("forward, backward"):
                loss, diagnostics = objective.loss(
                    policy, rollout, microbatches.advantages, microbatch, is_first_update=number == 0
                )
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
    values["num_transitions"] = float((microbatches.advantages != 0).sum()) * objective.num_draws
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
