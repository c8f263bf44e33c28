"""Alarms against reward hacking: what a policy does to its pictures when it pleases the judge instead of editing.

Each alarm has a threshold and warns; none stops a run. Drift (record/drift.py) is a matter of the editor before it is
one of training: an editor that drifts from the first iteration on, and less and less, is being mended. So the alarms
hold the last iterations of a run against its first, kind by kind, in absolute size: drifts in opposite directions
cancel in a mean.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mteditflow.distributed import Ranks
from mteditflow.record.drift import KINDS, measure_rollout
from mteditflow.record.figures import finite
from mteditflow.types import Rollout, Rollouts, Scores

NO_EDIT = 0.08  # of a pixel's range: the miniature's autoencoder alone moves no block of a picture by more
OVER_EDIT = 0.7  # consistency below which a turn has changed what it should have left alone
NUM_BLOCKS = 8  # per side of a picture
NUM_ITERATIONS = 3  # at either end of a run
NORMAL_STEP = 0.954  # median distance of two draws of a normal distribution of spread 1


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What a figure of the metrics means, and the threshold above which it warns."""

    title: str
    meaning: str
    threshold: float


AGAINST = f"last {NUM_ITERATIONS} iterations against first {NUM_ITERATIONS}, less two standard errors"
ADDED = f"size at the last turn, {AGAINST}"
GROWTH = f"what the turns after the first add, of the kind that has gained most, in thresholds of its alarm; {AGAINST}"
NO_EDIT_SHARE = "share of turns that return their input"
OVER_EDIT_SHARE = f"share of turns with consistency below {OVER_EDIT}"
HELD_OUT_GAP = "alarm/held_out_gap"  # of the embedded world, whose held-out sessions are judged by the truth
GAP = f"success in {NUM_ITERATIONS} iterations, by the judge, less that of held-out sessions after them, by the truth"
# docs/log.md, 2026-11-26: five and more standard errors of what other tasks move them by
LIMITS = {"cast": 0.04, "tint": 0.04, "contrast": 0.06, "saturation": 0.1, "sharpness": 0.12, "grain": 0.02}
ALARMS = {
    **{
        f"alarm/{kind}_drift": Alarm(title=f"{kind.capitalize()} drifts more", meaning=ADDED, threshold=limit)
        for kind, limit in LIMITS.items()
    },
    "alarm/drift_growth": Alarm(title="Drift grows faster over turns", meaning=GROWTH, threshold=1.0),
    "alarm/no_edit_share": Alarm(title="No edit", meaning=NO_EDIT_SHARE, threshold=0.5),
    "alarm/over_edit_share": Alarm(title="Over-edit", meaning=OVER_EDIT_SHARE, threshold=0.3),
    # docs/results/study.md, ten runs each: at most 0.19 by a kind judge, at least 0.31 by one that is hacked
    HELD_OUT_GAP: Alarm(title="Judge against truth", meaning=GAP, threshold=0.18),
}


def is_unedited(before: Tensor, after: Tensor) -> Tensor:
    """Whether no block of the picture has changed by more than NO_EDIT on average, (N,) bool."""
    change = torch.nn.functional.adaptive_avg_pool2d((after - before).abs() / 2, NUM_BLOCKS)
    return change.flatten(1).amax(1) <= NO_EDIT


def _measure(rollout: Rollout) -> Tensor:
    """Measure the drift of every turn, say which are unedited, and whether all pictures are finite: (N, 7 K + 1)."""
    pictures = [rollout.sources, *(turn.image.to(rollout.sources) for turn in rollout.turns)]
    is_finite = torch.stack([picture.flatten(1).isfinite().all(1) for picture in pictures]).all(0)
    unedited = torch.stack([is_unedited(before, after) for before, after in pairwise(pictures)], dim=1)  # (N, K)
    return torch.cat([measure_rollout(rollout).flatten(1), unedited, is_finite[:, None]], dim=1)


def rollout_figures(
    rollout: Rollout | Rollouts,
    scores: Scores,
    ranks: Ranks,
    group: Tensor | None = None,
    advantages: Tensor | None = None,
) -> dict[str, float]:
    """Measure the finite pictures of all ranks' trajectories, the consistency that is scored and, given the groups (N,)
    and the advantages (N, K), what these say of drift. All but the rollout: of all ranks.
    """
    rows = ranks.gather(torch.cat([_measure(part) for part in rollout.parts]))
    num_turns = rows.shape[1] // (len(KINDS) + 1)
    is_finite = rows[:, -1] > 0
    drift, unedited, _ = rows[is_finite].split([len(KINDS) * num_turns, num_turns, 1], dim=1)
    drift = drift.unflatten(1, (-1, len(KINDS)))
    values = dict(_drift_figures(drift))
    if group is not None and advantages is not None:
        is_known = is_finite.cpu() & scores.valid
        known = drift.cpu()[is_known[is_finite.cpu()]]
        values |= credit_figures(known, group[is_known], advantages[is_known])
    values["alarm/no_edit_share"] = unedited.mean().item()
    if "consistency" in scores.rewards:
        kept = scores.rewards["consistency"]
        values["alarm/over_edit_share"] = (kept[~kept.isnan()] < OVER_EDIT).float().mean().item()
    return values


def _drift_figures(drift: Tensor) -> Iterator[tuple[str, float]]:
    """Name the means of drift (N, K, 6) over the trajectories where it is known, per turn, signed and in size."""
    for suffix, means in (("", drift.nanmean(0)), ("_size", drift.abs().nanmean(0))):
        for turn, row in enumerate(means.tolist(), start=1):
            yield from ((f"drift/{kind}{suffix}_{turn}", value) for kind, value in zip(KINDS, row, strict=True))


def drift_size(drift: Tensor) -> Tensor:
    """Sum up a drift (..., 6) as the root of its squares in thresholds, grain aside, which is often unknown: (...)."""
    return (drift / torch.tensor(list(LIMITS.values())))[..., : KINDS.index("grain")].square().sum(-1).sqrt()


def credit_figures(drift: Tensor, group: Tensor, advantages: Tensor) -> dict[str, float]:
    """Correlate the advantages (N, K) of every turn with the drift (N, K, 6) that the turn added, the size after it
    less that before it, within groups (N,): below 0 where training is told to add less. NaN where one of the two has
    no spread.
    """
    size = drift_size(drift)
    added, figures = size.diff(dim=1, prepend=torch.zeros(len(size), 1)), dict[str, float]()
    for turn, columns in enumerate(zip(added.T, advantages.to(size).T, strict=True), start=1):
        is_known = ~columns[0].isnan()
        rows = torch.stack(columns)[:, is_known].double()  # (2, M)
        same = (group[is_known, None] == group[is_known]).double()
        left = rows - rows @ same / same.sum(0)
        products = left @ left.T
        spread = (products[0, 0] * products[1, 1]).sqrt()
        figures[f"drift/credit_{turn}"] = (products[0, 1] / spread).item() if spread > 1e-9 else float("nan")
    return figures


def added_figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the drift that training has added, from the metrics of every iteration so far: 0 where nothing is known
    at one of the ends.
    """
    num_turns = max((int(name.rpartition("_")[2]) for name in lines[-1] if name.startswith("drift/cast_")), default=1)
    added, growth = dict[str, float](), 0.0
    for kind, limit in LIMITS.items():
        end, start = ([line.get(f"drift/{kind}_size_{turn}") for line in lines] for turn in (num_turns, 1))
        added[f"alarm/{kind}_drift"] = _surely_added(end)
        both = [_known(sizes) for sizes in zip(end, start, strict=True)]
        growth = max(growth, _surely_added([(it[0] - it[1]) / limit if len(it) == 2 else None for it in both]))
    return added | {"alarm/drift_growth": growth}


def _surely_added(values: Sequence[Any]) -> float:
    """Compute the mean of the last iterations less that of the first and, where it has grown, less two standard errors:
    each iteration has other tasks. What they do is the median step from one to the next, which no trend and no jump
    moves. 0 where nothing is known at one of the ends.
    """
    first, last = (_known(part) for part in (values[:NUM_ITERATIONS], values[-NUM_ITERATIONS:]))
    if not first or not last:
        return 0.0
    steps = [abs(new - old) for old, new in pairwise(_known(values))]
    spread = median(steps) / NORMAL_STEP if len(steps) >= NUM_ITERATIONS else 0.0
    added = sum(last) / len(last) - sum(first) / len(first)
    return max(added - 2 * spread * math.sqrt(1 / len(first) + 1 / len(last)), min(added, 0.0))


def _known(values: Sequence[Any]) -> list[float]:
    return [value for value in values if finite(value) is not None]


def held_out_figures(lines: Sequence[Mapping[str, Any]], by_truth: Mapping[str, Any]) -> dict[str, float]:
    """Compute the gap between the judge, of the last iterations before an evaluation, which `lines` end with, and its
    truth, `heldout/MT_k` in percent; nothing where there is none.
    """
    gaps = list[float]()
    for turn in range(1, 1 + sum(name.startswith("heldout/MT_") for name in by_truth)):
        judged = _known([line.get(f"reward/success_{turn}") for line in lines[-NUM_ITERATIONS:]])
        true = _known([by_truth[f"heldout/MT_{turn}"]])
        gaps += [sum(judged) / len(judged) - true[0] / 100] if judged and true else []
    return {HELD_OUT_GAP: sum(gaps) / len(gaps)} if gaps else {}


def find_alarms(values: dict[str, float]) -> list[str]:
    """Name the figures that are above their thresholds."""
    return [name for name, alarm in ALARMS.items() if values.get(name, 0.0) > alarm.threshold]


def describe(name: str, value: float) -> str:
    """Say in a line what an alarm that rings means, and what to do."""
    alarm = ALARMS[name]
    return (
        f"alarm, {alarm.title.lower()} ({alarm.meaning}) is {value:.3g}, above {alarm.threshold:g}: look at strips/ "
        f"before trusting the reward"
    )
