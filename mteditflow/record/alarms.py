"""Alarms against reward hacking: what a policy does to its pictures when it pleases the judge instead of editing.

Drifts compare the pictures of the last turn with the sources; a step of training that sharpens, bleaches or paints
everything shows there first. Each alarm has a threshold and warns; none stops a run. Thresholds are ours: several times
what the miniature shows while it learns from an exact reward (docs/log.md).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mteditflow.distributed import Ranks
from mteditflow.types import Rollout, Rollouts, Scores

NO_EDIT = 0.08  # of a pixel's range: the miniature's autoencoder alone moves no block of a picture by more
OVER_EDIT = 0.7  # consistency below which a turn has changed what it should have left alone
NUM_BLOCKS = 8  # per side of a picture


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What a figure of the metrics means, and the threshold above which it warns."""

    title: str
    meaning: str
    threshold: float


DRIFT = "last turn against source, relative"
NO_EDIT_SHARE = "share of turns that return their input"
OVER_EDIT_SHARE = f"share of turns with consistency below {OVER_EDIT}"
GAP = "success in training, by the judge, less success on held-out sessions, by the truth"
ALARMS = {
    "alarm/edge_density_drift": Alarm(title="Edge density", meaning=DRIFT, threshold=0.3),
    "alarm/saturation_drift": Alarm(title="Saturation", meaning=DRIFT, threshold=0.3),
    "alarm/colourfulness_drift": Alarm(title="Colourfulness", meaning=DRIFT, threshold=0.3),
    "alarm/no_edit_share": Alarm(title="No edit", meaning=NO_EDIT_SHARE, threshold=0.5),
    "alarm/over_edit_share": Alarm(title="Over-edit", meaning=OVER_EDIT_SHARE, threshold=0.3),
    # docs/results/study.md: at most 0.14 by a kind judge, at least 0.21 by one that is hacked
    "alarm/held_out_gap": Alarm(title="Judge against truth", meaning=GAP, threshold=0.18),
}


def edge_density(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, (N,), of images (N, 3, H, W)."""
    return torch.stack([images.diff(dim=axis).abs().flatten(1).mean(1) for axis in (2, 3)]).mean(0)


def saturation(images: Tensor) -> Tensor:
    """Mean of HSV's S, (N,) in [0, 1], of images (N, 3, H, W) in [-1, 1]."""
    pixels = images / 2 + 0.5
    high, low = pixels.amax(1), pixels.amin(1)
    return ((high - low) / high.clamp(min=1e-6)).flatten(1).mean(1)


def colourfulness(images: Tensor) -> Tensor:
    """Hasler and Süsstrunk's (2003) measure, (N,), of images (N, 3, H, W) in [-1, 1], for pixels in [0, 1]."""
    red, green, blue = (images / 2 + 0.5).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(2)  # (2, N, H W)
    std, mean = opponents.std(-1, correction=0), opponents.mean(-1)
    return std.square().sum(0).sqrt() + 0.3 * mean.square().sum(0).sqrt()


def is_unedited(before: Tensor, after: Tensor) -> Tensor:
    """Whether no block of the picture has changed by more than NO_EDIT on average, (N,) bool."""
    change = torch.nn.functional.adaptive_avg_pool2d((after - before).abs() / 2, NUM_BLOCKS)
    return change.flatten(1).amax(1) <= NO_EDIT


def rollout_figures(rollout: Rollout | Rollouts, scores: Scores, ranks: Ranks) -> dict[str, float]:
    """Measure the finite pictures of all ranks' trajectories, and the consistency that is scored. scores: of all."""
    measures = (edge_density, saturation, colourfulness)

    def measure_part(part: Rollout) -> Tensor:
        """Measure first and last pictures, say which turns are unedited, and whether all is finite: (N, 7 + K)."""
        pictures = [part.sources, *(turn.image.to(part.sources) for turn in part.turns)]
        is_finite = torch.stack([picture.flatten(1).isfinite().all(1) for picture in pictures]).all(0)
        unedited = torch.stack([is_unedited(before, after) for before, after in pairwise(pictures)], dim=1)  # (N, K)
        columns = [measure(picture) for measure in measures for picture in (pictures[0], pictures[-1])]
        return torch.cat([torch.stack(columns, dim=1), unedited, is_finite[:, None]], dim=1)

    rows = ranks.gather(torch.cat([measure_part(part) for part in rollout.parts]))
    num_columns = 2 * len(measures)
    measured, unedited = rows[rows[:, -1] > 0][:, :-1].split([num_columns, rows.shape[1] - 1 - num_columns], dim=1)
    first, last = measured.mean(0).view(-1, 2).unbind(1)
    drifts = (last / first - 1).abs()
    values = {f"alarm/{measure.__name__}_drift": drift for measure, drift in zip(measures, drifts, strict=True)}
    values["alarm/no_edit_share"] = unedited.mean()
    if "consistency" in scores.rewards:
        kept = scores.rewards["consistency"]
        values["alarm/over_edit_share"] = (kept[~kept.isnan()] < OVER_EDIT).float().mean()
    return {name: value.item() for name, value in values.items()}


def held_out_figures(values: dict[str, float]) -> dict[str, float]:
    """Compute the gap between judge and truth, of an iteration with a short evaluation; else nothing."""
    by_judge = [value for name, value in values.items() if name.startswith("reward/success_")]
    by_truth = [value / 100 for name, value in values.items() if name.startswith("heldout/MT_")]
    num = min(len(by_judge), len(by_truth))
    return {"alarm/held_out_gap": (sum(by_judge[:num]) - sum(by_truth[:num])) / num} if num else {}


def find_alarms(values: dict[str, float]) -> list[str]:
    """Name the figures that are above their thresholds."""
    return [name for name, alarm in ALARMS.items() if values.get(name, 0.0) > alarm.threshold]
