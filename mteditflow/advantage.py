"""From scores to advantages (MT-EditFlow, arXiv 2606.01985, section 4).

    z(r) = (r - mean of the group) / (std + 1e-4), biased std
    A    = z(R_IF) + consistency_weight z(R_CC), the same for every turn of the trajectory              the default

The numbers are few, so they run in float64 and return in the dtype of the scores. What the paper leaves open is ours:

- Undefined (NaN) consistency is absent: out of mean and std, its z contributes 0. Where rewards are added before z, its
  group's mean stands in for it, so that it neither helps nor harms. R_CC is the mean over the turns where it is
  defined.
- The credit baselines treat consistency as they treat instruction following. Its return to go is the mean over the
  defined turns from k on times the number of turns from k on: their sum, where all are defined.
- 'early_stop': a turn failed if its score is below 3/4 (4 of 5), as for the binary aggregations; the failed turn keeps
  its advantage.
- Every z has mean 0 over its group, so whitening only divides by the batch's std; a zero advantage stays exactly zero.
"""

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
        each.flip(1).cumsum(1).flip(1) for each in (values.nan_to_num(nan=0.0), is_defined, torch.ones_like(values))
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
    deviation = (values - _group_mean(values, mask, group)).masked_fill(~mask, 0)
    largest = torch.zeros_like(_group_sum(values, group)).scatter_reduce(
        0, group[:, None].expand_as(values), deviation.abs(), "amax"
    )[group]
    if std == "global":  # Flow-GRPO's option: std of all rewards about the mean of all
        everyone = torch.zeros_like(group)
        center, place = _group_mean(values, mask, everyone), everyone
    else:
        center, place = _group_mean(values, mask, group), group
    scale = _group_mean((values - center).square(), mask, place).sqrt()
    return (deviation / (scale + STD_OFFSET)).masked_fill(largest <= ZERO_SPREAD, 0)


def _counted(scores: Scores, group: Tensor) -> Tensor:
    """(N,) bool: valid, and not the only valid trajectory of its group."""
    valid = scores.valid.to(torch.float64)[:, None]
    return scores.valid & (_group_sum(valid, group)[group, 0] >= 2)


def _rewards(instruction: Tensor, consistency: Tensor, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """The rewards to normalise, (N, J) each: one column per turn, or a single one for the trajectory."""
    if config.credit == "return_to_go":
        return _return_to_go(instruction), _return_to_go(consistency)
    if config.credit == "broadcast" and config.aggregate_at == "reward":
        return aggregate_turns(instruction, config.turn_aggregation)[:, None], consistency.nanmean(1, keepdim=True)
    return instruction, consistency


def advantages(scores: Scores, group: Tensor, config: AdvantageConfig) -> Tensor:
    """Advantage of every trajectory at every turn, (N, K); `group` (N,) int64 in 0..P-1, in any order.

    Invalid trajectories, those in groups with fewer than two valid ones, and rewards without spread in their group get
    exactly 0. Raises ValueError if a valid trajectory has no finite instruction score or advantage.
    """
    if not bool(scores.instruction[scores.valid].isfinite().all()):
        raise ValueError("scores.instruction of a valid trajectory is not finite: mark the trajectory invalid")
    counted = _counted(scores, group)
    instruction = scores.instruction.double().masked_fill(~counted[:, None], 0)
    consistency = scores.consistency.double().masked_fill(~counted[:, None], torch.nan)
    reward, extra = _rewards(instruction, consistency, config)
    mask, extra_mask = counted[:, None].expand_as(reward), ~extra.isnan()
    extra_weight = config.consistency_weight
    weight = 1 - extra_weight if config.weights == "convex" else 1.0
    if config.fusion == "reward":
        extra = torch.where(extra_mask, extra, _group_mean(extra, extra_mask, group))
        advantage = _z(weight * reward + extra_weight * extra, mask, group, config.std)
    else:
        extra = extra.masked_fill(~extra_mask, 0)
        z, extra_z = _z(reward, mask, group, config.std), _z(extra, extra_mask, group, config.std)
        advantage = weight * z + extra_weight * extra_z
    if config.credit == "broadcast":
        advantage = advantage.mean(1, keepdim=True).expand_as(instruction)
    if config.is_whitened and bool(counted.any()):
        advantage = advantage / (advantage[counted].std(correction=0) + STD_OFFSET)
    if config.credit == "early_stop":
        success = (instruction >= SUCCESS).to(instruction.dtype)
        is_alive = torch.cat([torch.ones_like(success[:, :1]), success.cumprod(1)[:, :-1]], dim=1)  # all earlier turns
        advantage = advantage * is_alive
    if not bool(advantage.isfinite().all()):
        raise ValueError("an advantage is not finite: a consistency score of a valid trajectory is infinite")
    return advantage.to(scores.instruction.dtype)
