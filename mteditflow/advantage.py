"""From scores to advantages (MT-EditFlow, arXiv 2606.01985, section 4).

    z(r) = (r - mean of the group) / (std + 1e-4), biased std
    A    = z(R_IF) + sum of weight z(R) over the other rewards, the same for every turn of the trajectory       default

The paper's other reward is consistency, R_CC. R_IF is the first reward, aggregated over the turns by turn_aggregation;
every other R is the mean over the turns where it is defined. The numbers are few, so they run in float64 and return in
the dtype of the scores. What the paper leaves open is ours:

- An undefined (NaN) reward is absent: out of mean and std, its z contributes 0. Where rewards are added before z, its
  group's mean stands in for it, so that it neither helps nor harms.
- The credit baselines treat the other rewards as they treat instruction following. The return to go of one with
  undefined turns is the mean over the defined turns from k on times the number of turns from k on: their sum, where all
  are defined.
- 'early_stop': a turn failed if its score is below 3/4 (4 of 5), as for the binary aggregations; the failed turn keeps
  its advantage.
"""

from functools import reduce

import torch
from torch import Tensor

from mteditflow.config import AdvantageConfig
from mteditflow.types import Scores

SUCCESS = 0.75
"""A turn succeeded if its instruction score is at least this: 4 of 5."""
STD_OFFSET = 1e-4
ZERO_SPREAD = 1e-7
"""Deviations up to this are rounding (float32 scores have steps of 6e-8): no spread, and z is exactly 0."""


def aggregate_turns(instruction: Tensor, how: str) -> Tensor:
    """R_IF (N,) from the scores q of the turns (N, K); `how` is AdvantageConfig.turn_aggregation."""
    is_binary = how in ("binary_mean", "binary_all", "prefix_binary")
    score = (instruction >= SUCCESS).to(instruction.dtype) if is_binary else instruction
    match how:
        case "mean" | "binary_mean":
            return score.mean(1)
        case "prod" | "binary_all":
            return score.prod(1)
        case "prefix_soft" | "prefix_binary":
            return score.cumprod(1).mean(1)
        case "sum":
            return score.sum(1)
        case "min":
            return score.amin(1)
        case "geomean":
            return score.prod(1) ** (1 / score.shape[1])
        case "last":
            return score[:, -1]
        case _:
            raise ValueError(f"advantage.turn_aggregation is {how!r}: not one of the names in AdvantageConfig")


def _return_to_go(values: Tensor) -> Tensor:
    """Sum over the turns from k on (N, K); an undefined turn counts as the mean of the defined, if there are any."""
    is_defined = (~values.isnan()).to(values.dtype)
    sums, num_defined, num_turns = (
        part.flip(1).cumsum(1).flip(1) for part in (values.nan_to_num(nan=0.0), is_defined, torch.ones_like(values))
    )
    return sums * (num_turns / num_defined).masked_fill(num_defined == 0, torch.nan)


def _group_sum(values: Tensor, group: Tensor) -> Tensor:
    """(N, J) -> (P, J)."""
    return values.new_zeros(int(group.max()) + 1, values.shape[1]).index_add(0, group, values)


def _group_mean(values: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """Mean of the group over the rows in `mask`, given to each row: (N, J)."""
    count = _group_sum(mask.to(values.dtype), group).clamp(min=1)
    return (_group_sum(values.masked_fill(~mask, 0), group) / count)[group]


def _z(values: Tensor, mask: Tensor, group: Tensor, std: str) -> Tensor:
    """z of each column over the group, (N, J); rows outside `mask` (N, J) have no part and get 0."""
    mean = _group_mean(values, mask, group)
    deviation = (values - mean).masked_fill(~mask, 0)
    index = group[:, None].expand_as(values)
    largest = torch.zeros_like(_group_sum(values, group)).scatter_reduce(0, index, deviation.abs(), "amax")[group]
    if std == "global":  # Flow-GRPO's option: std of all rewards about the mean of all
        group = torch.zeros_like(group)
        mean = _group_mean(values, mask, group)
    scale = _group_mean((values - mean).square(), mask, group).sqrt()
    return (deviation / (scale + STD_OFFSET)).masked_fill(largest <= ZERO_SPREAD, 0)


def _aggregate(rewards: dict[str, Tensor], config: AdvantageConfig) -> list[Tensor]:
    """R (N, 1) of each reward (N, K); NaN where undefined."""
    first, *others = rewards.values()
    return [aggregate_turns(first, config.turn_aggregation)[:, None], *(r.nanmean(1, keepdim=True) for r in others)]


def _add(weights: list[float], parts: list[Tensor]) -> Tensor:
    return reduce(torch.add, (weight * part for weight, part in zip(weights, parts, strict=True)))


def mean_reward(scores: Scores, config: AdvantageConfig) -> Tensor:
    """The mean over the valid trajectories of what training maximises, (): the weighted sum of R_IF and the other R.

    The weights are those of the advantage. A reward that is undefined counts as the mean of the trajectories where it
    is defined, and as nothing where it is defined nowhere. The credit baselines, which need no R, do not change it.
    """
    valid = {name: values[scores.valid].double() for name, values in scores.rewards.items()}
    first, *others = (reward.nanmean() for reward in _aggregate(valid, config))
    return _add([scores.weights[name] for name in scores.rewards], [first, *(mean.nan_to_num() for mean in others)])


def advantages(scores: Scores, group: Tensor, config: AdvantageConfig) -> Tensor:
    """Advantage of every trajectory at every turn, (N, K); `group` (N,) int64 in 0..P-1, in any order.

    Invalid trajectories, those in groups with fewer than two valid ones, and rewards without spread in their group get
    exactly 0. Raises ValueError if a valid trajectory has no finite instruction score or advantage.
    """
    instruction = scores.instruction
    if not bool(instruction[scores.valid].isfinite().all()):
        raise ValueError("the instruction score of a valid trajectory is not finite: mark the trajectory invalid")
    counted = scores.valid & (_group_sum(scores.valid.double()[:, None], group)[group, 0] >= 2)
    rewards = {name: v.double().masked_fill(~counted[:, None], torch.nan) for name, v in scores.rewards.items()}
    if config.credit == "return_to_go":
        parts = [_return_to_go(values) for values in rewards.values()]
    elif config.credit == "broadcast" and config.aggregate_at == "reward":
        parts = _aggregate(rewards, config)
    else:
        parts = list(rewards.values())  # a column per turn
    masks = [counted[:, None] & ~part.isnan() for part in parts]
    weights = [scores.weights[name] for name in scores.rewards]
    if config.fusion == "reward":
        filled = [torch.where(mask, r, _group_mean(r, mask, group)) for r, mask in zip(parts, masks, strict=True)]
        advantage = _z(_add(weights, filled), masks[0], group, config.std)
    else:
        advantage = _add(weights, [_z(r, mask, group, config.std) for r, mask in zip(parts, masks, strict=True)])
    if config.credit == "broadcast":
        advantage = advantage.mean(1, keepdim=True).expand_as(instruction)
    if config.credit == "early_stop":
        success = (instruction.double() >= SUCCESS).double()
        is_alive = torch.cat([torch.ones_like(success[:, :1]), success.cumprod(1)[:, :-1]], dim=1)  # all earlier turns
        advantage = advantage * is_alive
    if not bool(advantage.isfinite().all()):
        raise ValueError(f"an advantage is not finite: one of {', '.join(scores.rewards)} of a valid trajectory is not")
    return advantage.to(instruction.dtype)
