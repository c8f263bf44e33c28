"""From a rollout and its advantages to optimizer steps.

A microbatch is rows of the rollout at one draw of one turn, as many as a chunk of the rollout has, so that the forward
pass that is trained on has the geometry of the one that sampled it. Rows of advantage 0 (groups without spread,
trajectories without a score) teach nothing and are left out, of the pull of KL and of NFT's old policy too, and the
microbatches filled up with others. The loss is normalised by the count of all transitions of a step, of all ranks.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks, even_out
from mteditflow.guards import GuardError, check_ratio
from mteditflow.objective import Objective
from mteditflow.policy import Policy
from mteditflow.record.clock import phase
from mteditflow.record.metrics import Tally
from mteditflow.transformer.sharded import clip_, uncut
from mteditflow.types import Microbatch, Rollout, Rollouts


class Microbatches:
    """Cuts this rank's rows of a rollout, as their advantages become known, in the order of groups however they come.
    What is left of N after whole microbatches has one of its own size, as in the rollout. Repetitions of a wanted row,
    of weight 0, make the last one whole: rows without a score may hold NaN. With several optimizer steps, chunks of the
    rollout, turns and draws take turns, the same on any number of ranks.
    """

    def __init__(self, rollout: Rollout | Rollouts, objective: Objective, config: Config, ranks: Ranks) -> None:
        self.lengths, self.num_turns = [len(part.group) for part in rollout.parts], len(rollout.parts[0].turns)
        *self.firsts, self.num_rows = accumulate(self.lengths, initial=0)
        self.size, self.num_updates = config.optimizer.microbatch_size, config.optimizer.num_updates
        self.draws, self.first = objective.draws(rollout.parts[0].schedule), ranks.rank * self.num_rows
        chunks = torch.arange(self.num_rows * ranks.world_size)[:, None] // self.size
        steps = (chunks + torch.arange(self.num_turns * len(self.draws))) % self.num_updates  # of every transition
        self.scales = steps.flatten().bincount(minlength=self.num_updates).double().reciprocal().tolist()
        self.advantages = torch.zeros(self.num_rows, self.num_turns)  # so far
        self.of_parts = self.advantages.split(self.lengths)

    def __call__(self, parts: Iterable[Tensor]) -> Iterator[tuple[int, Microbatch]]:
        """Yield step and microbatch of the advantages (M, K) of the first M rows, the next, and so on to the last."""
        regions, start = list[tuple[int, int, int, int]](), 0
        for number, (first, length) in enumerate(zip(self.firsts, self.lengths, strict=True)):
            num_whole, stop = first + length // self.size * self.size, first + length
            regions += [(number, first, num_whole, self.size), (number, num_whole, stop, stop - num_whole)]
        waiting = {
            (turn, step, *region): torch.zeros(0, dtype=torch.int64)
            for region in regions for turn in range(self.num_turns) for step in range(self.num_updates)
        }  # fmt: skip
        for part in parts:
            stop = start + len(part)
            self.advantages[start:stop] = part
            for (turn, step, number, first, last, size), rows in waiting.items():
                inside = torch.arange(max(start, first), max(start, first, min(stop, last)))
                is_of_step = ((inside + self.first) // self.size + turn * len(self.draws)) % self.num_updates == step
                rows = torch.cat([rows, inside[(self.advantages[inside, turn] != 0) & is_of_step]])
                while len(rows) >= size > 0:
                    yield from self._at_draws(turn, step, number, rows[:size], size)
                    rows = rows[size:]
                waiting[turn, step, number, first, last, size] = rows
            start = stop
        assert start == self.num_rows, (start, self.num_rows)
        for (turn, step, number, *_, size), rows in waiting.items():
            if len(rows):
                yield from self._at_draws(turn, step, number, rows, size)

    def _at_draws(self, turn: int, step: int, part: int, rows: Tensor, size: int) -> Iterator[tuple[int, Microbatch]]:
        is_own = (torch.arange(size) < len(rows)).float()
        filled = torch.cat([rows, rows[:1].expand(size - len(rows))]) - self.firsts[part]
        for i, draw in enumerate(self.draws, start=step):
            weight = self.scales[i % self.num_updates] * is_own
            yield i % self.num_updates, Microbatch(part=part, turn=turn, draw=draw, rows=filled, weight=weight)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, objective: Objective, rollout: Rollout | Rollouts,
    advantages: Tensor | Iterable[Tensor], config: Config, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """Make the optimizer steps of an iteration; returns diagnostics over all ranks' transitions, and their number.

    advantages: (N, K) of this rank's trajectories, or those of group after group as they become known: what is known is
    trained on while the rest is awaited. Where there were none, diagnostics are NaN. Raises GuardError on every rank,
    before any harm is done.
    """
    tally, steps = Tally(objective.figures, objective.worst_figures), list[tuple[float, float]]()
    microbatches = Microbatches(rollout, objective, config, ranks)
    later: list[list[Microbatch]] = [[] for _ in range(config.optimizer.num_updates)]

    def first() -> Iterator[Microbatch]:
        for number, microbatch in microbatches([advantages] if isinstance(advantages, Tensor) else advantages):
            if number:
                later[number].append(microbatch)
            else:
                yield microbatch

    for number, waiting in enumerate(later):
        losses = [torch.zeros((), device=policy.device)]
        for microbatch in even_out(waiting if number else first(), rollout, config, ranks):
            with phase("forward, backward"):
                part, known = rollout.parts[microbatch.part], microbatches.of_parts[microbatch.part]
                alike, is_first = policy.at(part.shape), number == 0
                loss, diagnostics = objective.loss(alike, part, known, microbatch, is_first_update=is_first)
                loss.backward()
            losses.append(loss.detach())
            tally.add(diagnostics, microbatch.weight.count_nonzero().item())
        if number == 0 and "ratio_error" in objective.worst_figures:
            check_ratio(tally.keep_largest("ratio_error", "first_ratio_error", ranks), config)
        steps.append(step(policy, optimizer, torch.stack(losses).sum(), config, ranks))
    loss, norm = torch.tensor(steps, dtype=torch.float64).mean(0).tolist()
    values = tally.read(ranks) | {"loss": loss, "grad_norm": norm}
    return {f"update/{name}": value for name, value in values.items()}


@phase("optimizer")
def step(
    policy: Policy, optimizer: torch.optim.Optimizer, loss: Tensor, config: Config, ranks: Ranks
) -> tuple[float, float]:
    """Sum gradients and loss over ranks, clip, step, average; returns loss and gradient norm. No gradient: no step."""
    parameters, gradients = [weight for _, weight in policy.adapters.trainable], list[Tensor]()
    for weight in parameters:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients.append(weight.grad)
    ranks.sum_([*uncut(gradients), loss])
    norm = clip_(parameters, config.optimizer.max_grad_norm)
    if not torch.stack([loss, norm]).isfinite().all():
        optimizer.zero_grad()
        raise GuardError(f"loss {loss.item()}, gradient norm {norm.item()}: not finite; lower optimizer.learning_rate")
    if norm > 0:
        optimizer.step()
        policy.adapters.copy("current", "ema", decay=config.optimizer.ema_decay)
    optimizer.zero_grad()
    return loss.item(), norm.item()
